"""What the inputs of layers look like over a calibration set: ranges of activations, and what rounding methods ask."""

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibrator.data.calibration import CalibrationSet
from calibrator.data.guidance import guided_rows
from calibrator.families import TorchActor
from calibrator.quantizers import LayerStatistics, find_layer
from calibrator.quantizers.activations import input_rows
from vla_policy.core.errors import ArtefactError
from vla_policy.core.observation import check_strays

T = TypeVar("T")
_MOMENT_BYTES = 4 << 30
_ROWS = 64


def input_statistics(
    actor: TorchActor,
    states: CalibrationSet,
    names: Collection[str],
    source: str,
    second_moments: bool = False,
    guided: bool = False,
) -> dict[str, LayerStatistics]:
    """Statistics of every named layer's input while the full-precision policy decides each state.

    second_moments: also E[x x^T], float64 [in, in] per layer, and some rows. guided: rows weigh what `guidance` says.
    source: what the states are called in messages. Raises ArtefactError for a layer whose input is zero or not finite
    throughout, and PolicyError for a policy that decides something else than actions.
    """
    layers = {name: find_layer(actor.policy, name) for name in names}
    sums = {name: _Sums(layer, second_moments) for name, layer in layers.items()}
    strays = 0
    for index in tqdm(range(len(states)), desc="inputs of layers", unit="state", disable=None):
        state = states.observation(index)
        if guided:
            weighed, stray = guided_rows(actor, state, layers)
            for name, (rows, weights) in weighed.items():
                sums[name].add(rows, weights)
        else:
            with _watched(sums):
                tokens = actor.act(state).tokens
            stray = actor.scores_and_stray(state, tokens)[1]
        strays += stray
    check_strays(strays, len(states), source)
    statistics = {name: one.statistics() for name, one in sums.items()}
    useless = [name for name, one in statistics.items() if not 0 < one.peak < float("inf")]
    if useless:
        raise ArtefactError(f"{source}: inputs of {useless[0]} are zero or not finite; collect other states")
    return statistics


@contextmanager
def watched_peaks(policy: nn.Module, peaks: MutableMapping[str, float]) -> Iterator[None]:
    """Inside the block the largest |input| of every layer that is named in `peaks` is kept there."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        largest = arguments[0].detach().abs().amax().float()
        found[name] = torch.maximum(found.get(name, largest), largest)

    handles = [find_layer(policy, name).register_forward_pre_hook(partial(watch, name)) for name in peaks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, largest in found.items():
        peaks[name] = max(peaks[name], float(largest))


def portions(items: Sequence[T], layer: Callable[[T], nn.Linear | nn.Conv2d]) -> Iterator[list[T]]:
    """The items in order, as many at a time as have second moments of `_MOMENT_BYTES` together, at least one.

    layer: whose input an item is measured at.
    """
    share: list[T] = []
    held = 0
    for item in items:
        size = 8 * layer(item).weight[0].numel() ** 2
        if share and held + size > _MOMENT_BYTES:
            yield share
            share, held = [], 0
        share.append(item)
        held += size
    if share:
        yield share


class _Sums:
    """Statistics of one layer so far."""

    def __init__(self, module: nn.Linear | nn.Conv2d, second_moment: bool) -> None:
        self.layer = module
        inputs = module.weight[0].numel()
        self.tokens, self.weight = 0, 0.0
        self.peaks = torch.zeros(inputs)
        self.magnitudes = torch.zeros(inputs, dtype=torch.float64)
        self.products = torch.zeros(inputs, inputs, dtype=torch.float64) if second_moment else None
        self.largest, self.random = _Kept(inputs), _Kept(inputs)
        self.generator = torch.Generator().manual_seed(0)

    def see(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = input_rows(module, arguments[0]).detach().float()
        self.add(rows, torch.ones(len(rows), dtype=torch.float64, device=rows.device))

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Some more rows [n, in]; of the statistics only the second moment weighs them."""
        self.tokens += len(rows)
        self.weight += float(weights.sum())
        magnitudes = rows.abs()
        self.peaks = torch.maximum(self.peaks, magnitudes.amax(0).cpu())
        self.magnitudes += magnitudes.sum(0, dtype=torch.float64).cpu()
        if self.products is not None:
            wide = rows.double().cpu()
            self.products.addmm_((wide * weights.cpu()[:, None]).T, wide)
            kept = rows.cpu()
            self.largest.see(kept, kept.abs().amax(1))
            self.random.see(kept, torch.rand(len(kept), generator=self.generator))

    def statistics(self) -> LayerStatistics:
        moment = None if self.products is None else self.products / self.weight
        rows = None if self.products is None else torch.cat([self.largest.rows, self.random.rows])
        return LayerStatistics(self.tokens, self.peaks, (self.magnitudes / self.tokens).float(), moment, rows)


class _Kept:
    """The rows with the highest numbers so far."""

    def __init__(self, inputs: int) -> None:
        self.rows, self._numbers = torch.zeros(0, inputs), torch.zeros(0)

    def see(self, rows: Tensor, numbers: Tensor) -> None:
        every, joined = torch.cat([self._numbers, numbers]), torch.cat([self.rows, rows])
        self._numbers, places = every.topk(min(_ROWS, len(every)))
        self.rows = joined[places]


@contextmanager
def _watched(sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Inside the block, the layers' inputs are added up whenever they run."""
    handles = [one.layer.register_forward_pre_hook(one.see) for one in sums.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
