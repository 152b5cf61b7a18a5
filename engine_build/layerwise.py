"""Layer by layer: an engine beside torch, which is held to the engine's own values at every layer.

The engine runs with every layer's input and result shown. The torch policy, its layers quantized by the calibrator,
then runs along: at each layer what comes is compared with the engine's input, the layer gets the engine's instead, its
result is compared with the engine's, and the engine's goes on. So single layers are compared, and single stretches
between two layers; nothing adds up, and no layer's rounding loosens what another is allowed.

Between layers, and in layers with 16-bit activations, both compute the same products, torch in float32 and the engine
in its backend's type, which says by how much that may differ (`Backend.float_error`). Activations of 8 bits
are rounded by the engine's rule, but a quotient may fall on the other side of .5, which moves a token's result by up to
1 / 127.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibrator.families import TorchActor
from calibrator.quantizers import find_layer
from calibrator.quantizers.activations import input_rows
from calibrator.quantizers.rows import WHOLE, RowBits
from engine_build.backends.base import Backend, Layer, Place, Written, allowed_error, taps_of
from engine_build.weights import layers_of, split
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Observation
from vla_policy.core.runner import Engine
from vla_policy.core.verification import Largest, Layers


def check_layers(
    folder: Path,
    manifest: Manifest,
    written: Written,
    backend: Backend,
    actor: TorchActor,
    states: Sequence[Observation],
    scratch: Path,
    rows: RowBits = WHOLE,
) -> Layers | None:
    """The largest errors over all states, with `actor` quantized as the engine is; None where nothing is shown.

    written: the engine's graphs as they were exported. scratch: see `Backend.open_tapped`. rows: of split layers, whose
    parts are compared one by one.

    Raises ArtefactError naming the first layer, or the stretch before it, that differs by more than is allowed.
    """
    values = _Values()
    places, layers = written.places, split(layers_of(manifest.config), rows)
    session = backend.open_tapped(written, manifest, taps_of(places), values.add, scratch)
    if session is None:
        return None
    policy = manifest.config.family.policy(manifest.config, folder, actor.unnorm_key)
    engine = Engine(manifest, session, policy, actor.unnorm_key)
    planned = {unit.name: Format.parse(unit.planned) for unit in manifest.units}
    largest: dict[str, Largest] = {}
    between = Largest(0.0, "", backend.float_error)
    for state in tqdm(states, desc="layer by layer", unit="state", disable=None):
        decided = actor.act(state)
        values.clear()
        engine.scores(state, decided)
        with _held_to(values, places, layers, actor.policy, rows) as errors:
            actor.scores(state, decided.tokens)
        for name, (before, inside) in errors.items():
            fmt = planned[name]
            known = largest.get(str(fmt), Largest(0.0, "", allowed_error(fmt, backend)))
            between, largest[str(fmt)] = _larger(between, before, name), _larger(known, inside, name)
            _refuse(folder, f"{name}: what comes to it", before, between.allowed)
            _refuse(folder, f"{name}: its result ({fmt})", inside, known.allowed)
    return Layers(largest, between)


def _refuse(folder: Path, what: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise ArtefactError(
            f"{folder}: {what} differs from torch's on the same values by {error:.2e} of a token's root mean square, "
            f"allowed {allowed:g}; build it again"
        )


def _larger(known: Largest, error: float, layer: str) -> Largest:
    return Largest(error, layer, known.allowed) if error > known.error or not known.layer else known


class _Values:
    """What an engine showed, call by call."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[np.ndarray]] = {}

    def add(self, graph: str, name: str, value: np.ndarray) -> None:
        self._values.setdefault((graph, name), []).append(value)

    def clear(self) -> None:
        self._values.clear()

    def rows(self, graph: str, name: str) -> Tensor:
        """float32 [tokens, values] of all calls."""
        joined = np.concatenate(self._values[graph, name], axis=1)
        return torch.from_numpy(joined.reshape(-1, joined.shape[-1]))


@contextmanager
def _held_to(
    values: _Values, places: Mapping[str, Place], layers: Mapping[str, Layer], policy: nn.Module, rows: RowBits
) -> Iterator[dict[str, tuple[float, float]]]:
    """Inside, every layer takes and gives the engine's rows; yields the errors before and in each, as they come."""
    errors: dict[str, tuple[float, float]] = {}
    before: dict[str, float] = {}

    def hold(name: str, place: Place) -> list[torch.utils.hooks.RemovableHandle]:
        part = rows.parts.get(name)
        module = find_layer(policy, part.layer if part else name)
        kept = layers[name].rows or range(len(module.weight))
        mine = part.rows if part else torch.arange(kept.start, kept.stop)
        xs, ys = values.rows(place.graph, place.x), values.rows(place.graph, place.result)
        first = 0

        def enter(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen = input_rows(layer, arguments[0])
            x = xs[first : first + len(seen)]
            before[name] = max(before.get(name, 0.0), _error(x, seen))
            return (_like(layer, x, arguments[0]), *arguments[1:])

        def leave(layer: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
            channels_first = isinstance(layer, nn.Conv2d)
            given = result.flatten(2).transpose(1, 2) if channels_first else result
            nonlocal first
            y = ys[first : first + given.shape[:-1].numel()]
            # A layer that runs step by step takes the engine's steps one after the other, and again from the first.
            first = (first + len(y)) % len(ys)
            inside = errors[name][1] if name in errors else 0.0
            errors[name] = (before[name], max(inside, _error(y, given[..., mine].reshape(y.shape))))
            taken = given.index_copy(-1, mine, y.reshape(*given.shape[:-1], -1))
            return taken.transpose(1, 2).reshape(result.shape) if channels_first else taken

        # First of all hooks: the one that rounds the input is to get the engine's.
        return [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]

    handles = [handle for name, place in places.items() for handle in hold(name, place)]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def _like(layer: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
    """The inverse of `input_rows`, in the shape of `x`."""
    if isinstance(layer, nn.Conv2d):
        columns = rows.reshape(len(x), -1, rows.shape[-1]).transpose(1, 2)
        return nn.functional.fold(columns, x.shape[2:], layer.kernel_size, stride=layer.stride)
    return rows.reshape(x.shape)


def _error(got: Tensor, expected: Tensor) -> float:
    """Largest root mean square difference of a token's values over those of this token, or of the median one if they
    are larger: what nearly cancels has no digits to agree in."""
    size = expected.square().mean(-1).sqrt()
    difference = (got - expected).square().mean(-1).sqrt()
    return float((difference / size.clamp(min=max(float(size.median()), 1e-30))).max())
