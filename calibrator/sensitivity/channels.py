"""QVLA's sensitivity of every output channel: the action's error when that channel alone has fewer bits.

Two stages, as published: the first-order estimate (Eq. (6), `proxy`) for all channels, and for the part of them with
the largest estimates exact passes (Eq. (4)). Both are of the expected action under the policy's distribution, since a
greedy token does not move for most single channels. 0 bits are a channel without weights; its bias stays.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibrator.conventions.check import check
from calibrator.conventions.deciders import PolicyDecider
from calibrator.families.loading import check_device
from calibrator.quantizers import needs_statistics
from calibrator.sensitivity.channel_table import (
    KIND,
    SCHEMA_VERSION,
    TENSORS,
    ChannelLayer,
    ChannelTable,
    save,
    scores_path,
)
from calibrator.sensitivity.journal import difference
from calibrator.sensitivity.passes import Trunk, output
from calibrator.sensitivity.proxy import channel_errors
from calibrator.sensitivity.run import signature_of, unit_shapes
from calibrator.sensitivity.sweep import Sweep, SweepSpec
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.files import read_json, sha256_policy
from vla_policy.core.formats import FULL_PRECISION
from vla_policy.core.outputs import atomic_path, check_file

_JOURNAL = "channels-journal"
Channel = tuple[str, int]
"""Layer and output channel."""


@dataclass(frozen=True)
class ChannelOptions:
    """exact: part of all channels that is evaluated exactly, those with the largest estimates at the narrowest width.
    accept_conventions, resume: as of `RunOptions`."""

    exact: float = 0.01
    accept_conventions: bool = False
    resume: bool = True


def measure_channels(spec: SweepSpec, out: Path, options: ChannelOptions) -> ChannelTable:
    """Measures every live layer's channels and writes `out`, its scores beside it.

    Exact evaluations are kept beside `out` until it is written, so that a killed run continues. Raises ArtefactError
    when `out` or what is kept is of other inputs, PolicyError for choices that are no widths.
    """
    _check(spec, options)
    for kind, path in {KIND: out, TENSORS: scores_path(out), _JOURNAL: _journal_path(out)}.items():
        check_file(path, kind, [Path(spec.policy), Path(spec.calibration)])
    check_device(spec.device)
    empty = spec.empty_policy()
    states = spec.load_states(empty)
    choices = spec.settings.choices
    identity = signature_of(spec, sha256_policy(spec.policy), states.calibration.sha256) | {
        "choices": [choice.to_json() for choice in choices],
        "exact": options.exact,
    }
    if options.resume and out.is_file():
        if changed := difference(read_json(out, KIND, SCHEMA_VERSION)["identity"], identity):
            raise ArtefactError(f"{out}: was measured with other inputs ({changed}); choose another --out")
        return ChannelTable.load(out)
    with spec.arithmetic():
        with _states_bar(len(states), "full precision") as done:
            sweep = spec.open(done=done)
        decider = PolicyDecider(sweep.policy, Path(spec.policy))
        found = check(decider, states.calibration, spec.settings.unnorm_key)
        conventions = found.require(options.accept_conventions, "--accept-conventions")
        with _states_bar(len(states), "first order") as done:
            estimates = channel_errors(sweep, list(sweep.units), done)
        kept = {name: sweep.units[name].rows for name in estimates}
        estimates = {name: rows[:, kept[name].start : kept[name].stop] for name, rows in estimates.items()}
        exact = {name: np.full_like(rows, np.nan) for name, rows in estimates.items()}
        with _Journal(_journal_path(out), identity, fresh=not options.resume) as journal:
            for (name, row), errors in exact_errors(sweep, _largest(estimates, kept, options.exact), journal).items():
                exact[name][:, row - kept[name].start] = errors
    shapes = {shape.name: shape for shape in unit_shapes(empty, states)}
    layers = [
        ChannelLayer(shapes[name], kept[name].start, len(unit.module.weight), estimates[name], exact[name])
        for name, unit in sweep.units.items()
    ]
    weights = sum(unit.module.weight.numel() for unit in sweep.units.values())
    content = {
        "identity": identity,
        "policy": {"id": Path(spec.policy).resolve().name, "sha256": identity["policy_sha256"]},
        "calibration": {"sha256": states.calibration.sha256, "samples": len(states)},
        "choices": identity["choices"],
        "exact_channels": int(sum(np.isfinite(rows[0]).sum() for rows in exact.values())),
        "unquantized_params": sum(parameter.numel() for parameter in sweep.policy.parameters()) - weights,
        "conventions": conventions.to_json(),
    }
    table = save(out, layers, content)
    _journal_path(out).unlink(missing_ok=True)
    return table


@contextmanager
def _states_bar(total: int, title: str) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, desc=title, unit="state", disable=None) as bar:

        def done(states: int) -> None:
            bar.update(states)

        yield done


def _check(spec: SweepSpec, options: ChannelOptions) -> None:
    if not 0 <= options.exact <= 1:
        raise PolicyError(f"--exact {options.exact:g}: expected a part between 0 and 1")
    choices = spec.settings.choices
    bits = [choice.format.weight_bits for choice in choices]
    if len(set(bits)) != len(bits):
        raise PolicyError(f"--choices {' '.join(map(str, choices))}: expected one of each number of bits")
    for choice in choices:
        if choice.format.activation_bits < FULL_PRECISION.activation_bits or needs_statistics(choice.recipe):
            raise PolicyError(
                f"--choices {choice}: channels are scored with activations of 16 bits and codes that do not depend on "
                "the layer's input; another method may round the plan's parts afterwards (`quantize --method`)"
            )


def _largest(estimates: dict[str, np.ndarray], kept: dict[str, range], part: float) -> list[Channel]:
    """The channels with the largest estimates at the narrowest width that is not 0, layer by layer."""
    names = [(name, row) for name in estimates for row in kept[name]]
    order = np.argsort(-np.concatenate([rows[1] for rows in estimates.values()]), kind="stable")
    return [names[place] for place in sorted(order[: round(part * len(order))])]


@torch.no_grad()
def exact_errors(
    sweep: Sweep, channels: Sequence[Channel], journal: "_Journal | None" = None
) -> dict[Channel, np.ndarray]:
    """Eq. (4) of single channels, float64 [widths], the mean over all states, widths as of `channel_errors`.

    journal: knows the sums of finished batches, and is told of the others.
    """
    sums = {channel: np.zeros(1 + len(sweep.settings.choices)) for channel in channels}
    batches = sweep.states.split(range(len(sweep.states)))
    coded = {name: _coded(sweep, name) for name, _ in channels}
    with tqdm(total=len(batches) * len(channels), desc="exact", unit="channel", disable=None) as bar:
        for batch in batches:
            trunk: Trunk | None = None
            for name, row in channels:
                known = journal.find(batch, name, row) if journal else None
                if known is None:
                    if trunk is None:
                        states = sweep.states.batch(sweep.policy, batch, sweep.reference.decided)
                        trunk = Trunk(sweep.chain, states, differentiable=False)
                    known = _batch_errors(sweep, trunk, name, row, coded[name])
                    if journal:
                        journal.add(batch, name, row, known)
                sums[name, row] += known
                bar.update()
    return {channel: total / len(sweep.states) for channel, total in sums.items()}


def _coded(sweep: Sweep, name: str) -> list[Tensor]:
    """The layer's weight in every width."""
    weight = sweep.units[name].module.weight.detach().float()
    return [torch.zeros_like(weight), *(sweep.coded(name, weight, choice) for choice in sweep.settings.choices)]


def _batch_errors(sweep: Sweep, trunk: Trunk, name: str, row: int, coded: Sequence[Tensor]) -> np.ndarray:
    """Sums over a batch of the expected action's squared distances."""
    unit, decisions = sweep.units[name], trunk.batch.decisions
    reference = decisions.expected(trunk.values[sweep.chain.output]).double()
    found = []
    for values in coded:
        with _row_replaced(unit.module, row, values[row]):
            now = decisions.expected(output(trunk, unit.segment)).double()
        found.append(float((now - reference).square().sum()))
    return np.array(found)


@contextmanager
def _row_replaced(module: nn.Linear | nn.Conv2d, row: int, values: Tensor) -> Iterator[None]:
    """Inside, one output channel has other weights."""
    before = module.weight.data[row].clone()
    module.weight.data[row] = values
    try:
        yield
    finally:
        module.weight.data[row] = before


def _journal_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.unfinished.jsonl")


class _Journal:
    """Finished evaluations, a line each behind one that says what they are of; a torn last line is cut off."""

    def __init__(self, path: Path, identity: dict[str, object], fresh: bool) -> None:
        """Raises ArtefactError for a file of other inputs."""
        self._known: dict[tuple[str, str, int], np.ndarray] = {}
        lines = [] if fresh or not path.exists() else path.read_bytes().split(b"\n")[:-1]
        if lines:
            if changed := difference(json.loads(lines[0])["identity"], identity):
                raise ArtefactError(f"{path}: is of other inputs ({changed}); remove it, or choose another --out")
            for batch, name, row, errors in map(json.loads, lines[1:]):
                self._known[batch, name, row] = np.array(errors)
        head = lines or [json.dumps({"kind": _JOURNAL, "identity": identity}).encode()]
        with atomic_path(path, _JOURNAL) as temporary:
            temporary.write_bytes(b"\n".join(head) + b"\n")
        self._stream = open(path, "ab")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def find(self, batch: tuple[int, ...], name: str, row: int) -> np.ndarray | None:
        return self._known.get((str(batch), name, row))

    def add(self, batch: tuple[int, ...], name: str, row: int, errors: np.ndarray) -> None:
        line = json.dumps([str(batch), name, row, errors.tolist()])
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
