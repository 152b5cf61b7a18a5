"""Layer by layer without a policy: an engine's layers beside what their own stored codes and scales give.

The engine shows what comes to every layer and what it gives. A few tokens of each are computed again in NumPy from the
graph that the engine was compiled from, so that single layers are compared, each by its own format, and nothing adds
up. What happens between layers is not looked at here: the golden states are decided by all of it.
"""

import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine_build.backends import find_backend
from engine_build.backends.base import Layer, Written, allowed_error, taps_of
from engine_build.golden import Golden
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.runner import Engine
from vla_policy.core.verification import Largest, Layers

_TOKENS = 16  # of every call that are computed again; the first and the last among them


def check_stored_layers(written: Written, manifest: Manifest, golden: Golden) -> Layers:
    """The largest errors by format, over all golden states. Raises ArtefactError naming the first layer that differs by
    more than is allowed, and where the backend shows no values."""
    backend = find_backend(manifest.backend)
    layers = {
        unit.name: Layer(unit.name, unit.kind, unit.name, unit.outputs, unit.inputs, bias=False)
        for unit in manifest.units
    }
    formats = {unit.name: Format.parse(unit.planned) for unit in manifest.units}
    values: dict[tuple[str, str], list[np.ndarray]] = {}

    def add(graph: str, name: str, value: np.ndarray) -> None:
        values.setdefault((graph, name), []).append(_some(value.reshape(-1, value.shape[-1])))

    with tempfile.TemporaryDirectory(prefix="prove.") as scratch:
        session = backend.open_tapped(written, manifest, taps_of(written.places), add, Path(scratch))
        if session is None:
            raise ArtefactError(f"backend {manifest.backend} shows no values inside its engines")
        policy = manifest.config.family.policy(manifest.config, written.folder, golden.unnorm_key)
        engine = Engine(manifest, session, policy, golden.unnorm_key)
        largest: dict[str, Largest] = {}
        for state, wanted in tqdm(
            zip(golden.states, golden.same, strict=True), total=len(golden.states), desc="single layers", disable=None
        ):
            values.clear()
            engine.scores(state, wanted.decision)
            for name, place in written.places.items():
                x, y = (np.concatenate(values[place.graph, value]) for value in (place.x, place.result))
                fmt, graph = formats[name], written.folder / written.graphs[place.graph].file
                error = _error(y, backend.stored_result(graph, layers[name], fmt, x))
                allowed = allowed_error(fmt, backend)
                if not error <= allowed:
                    raise ArtefactError(
                        f"{name} ({fmt}): its result differs from what its stored codes give by {error:.2e} of a "
                        f"token's root mean square, allowed {allowed:g}; build the engine again"
                    )
                known = largest.get(str(fmt))
                if known is None or error > known.error:
                    largest[str(fmt)] = Largest(error, name, allowed)
    return Layers(largest, Largest(0.0, "", backend.float_error))


def _some(rows: np.ndarray) -> np.ndarray:
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _TOKENS)).round().astype(int))
    return rows[chosen]


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest root mean square difference of a token's values over those of this token, or of the median one."""
    size = np.sqrt(np.square(expected, dtype=np.float64).mean(-1))
    difference = np.sqrt(np.square(got - expected, dtype=np.float64).mean(-1))
    return float((difference / np.maximum(size, max(float(np.median(size)), 1e-30))).max())
