"""Largest inputs of layers over a calibration set: the fixed activation scales that TensorRT's INT8 layers need."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from calibrator.data.calibration import load_calibration
from calibrator.families import TorchActor
from calibrator.quantizers import find_layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.observation import check_strays


def input_peaks(
    policy_folder: Path, calibration: Path, names: Sequence[str], unnorm_key: str | None = None
) -> dict[str, float]:
    """max |x| of every named layer's input while the full-precision policy decides each calibration state.

    unnorm_key: of the statistics that normalise a state. Raises ArtefactError for a layer whose input is zero or not
    finite throughout, and PolicyError for a policy that decides something else than actions.
    """
    states = load_calibration(calibration)
    actor = TorchActor.load(policy_folder, unnorm_key)
    peaks, strays = dict.fromkeys(names, 0.0), 0
    with _watched(actor.policy, peaks):
        for index in tqdm(range(len(states)), desc="activation ranges", unit="state", disable=None):
            state = states.observation(index)
            strays += actor.scores(state, actor.act(state).tokens)[1]
    check_strays(strays, len(states), str(calibration))
    useless = [name for name, peak in peaks.items() if not 0 < peak < float("inf")]
    if useless:
        raise ArtefactError(f"{calibration}: inputs of {useless[0]} are zero or not finite; collect other states")
    return peaks


@contextmanager
def _watched(policy: torch.nn.Module, peaks: dict[str, float]) -> Iterator[None]:
    """Updates `peaks` whenever one of its layers runs."""

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def see(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            peaks[name] = max(peaks[name], float(arguments[0].abs().max()))

        return find_layer(policy, name).register_forward_pre_hook(see)

    handles = [watch(name) for name in peaks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
