"""TensorRT, on the device that runs the engine; formats that it lacks run by plugins of this package.

Compiling, reading back and running need neither torch nor the policy: a Jetson has neither.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from engine_build.backends.base import (
    ROUNDED_ACTIVATIONS_TOLERANCE,
    RUN,
    SLAB,
    Dialect,
    Layer,
    ReadBack,
    Seen,
    Written,
    deferred,
)
from engine_build.backends.tensorrt import inspector, readback
from engine_build.backends.tensorrt.builder import Module, build_engines, inspect
from engine_build.backends.tensorrt.kernels import FAMILIES, Family
from engine_build.backends.tensorrt.stored import StoredGraph
from vla_policy.core.backends.base import Version
from vla_policy.core.backends.tensorrt import INT4_BLOCKS, SEQUENCE_LAYERS_SINCE
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, Sequences, Session
from vla_policy.core.targets import Target, find_target

HALF_TOLERANCE = 0.02
"""Of whole decisions: activations are float16."""
HALF_ARITHMETIC = 0.005
"""Of a single layer, and of what lies between two: float16 rounds to 2^-11 of a value, 0.0005, where it is dequantized,
where it is summed up and at every step of what is not a layer, of which there are some ten in a row, most of them small
against what they are added to."""


class TensorRt:
    """See the protocol. What TensorRT and TensorRT-RTX differ in is given: the module, and how layers are written."""

    compiles = True
    float_error = HALF_ARITHMETIC

    def __init__(self, module: Module, linear: Callable[..., Any]) -> None:
        self.module = module
        self._linear = linear

    def version(self) -> str:
        return str(self.module.load().__version__)

    def dialect(self, version: Version) -> Dialect:
        return Dialect(TensorProto.FLOAT16, self._linear, sequences=Sequences.UPDATED)

    def compile(self, written: Written, target: Target, replaced: Path) -> dict[str, GraphSpec]:
        return build_engines(self.module, target, written, replaced)

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> ReadBack:
        """By the engine's bytes."""
        packed, found = readback.packed_layers(written, layers), readback.find_tensors(written, built, layers, True)
        readback.check_found(built, packed, found, planned)
        how = {name: "found in the engine" if name in packed else _unpacked(name, found) for name in layers}
        realised = {
            name: readback.realised(layer, planned[name] if name in packed else FULL_PRECISION, False, how[name])
            for name, layer in layers.items()
        }
        return ReadBack(realised, found)

    def filling(self, fmt: Format) -> tuple[int, int]:
        """Whole groups, and pairs where two 2-bit codes share an INT4."""
        return 1, fmt.group_size or (2 if fmt.weight_bits == 2 else 1)

    def tolerance(self, fmt: Format) -> float:
        return ROUNDED_ACTIVATIONS_TOLERANCE if fmt.activation_bits < 16 else HALF_TOLERANCE

    def open_tapped(
        self, written: Written, manifest: Manifest, taps: Mapping[str, Collection[str]], seen: Seen, scratch: Path
    ) -> Session | None:
        """On engines that are built for it from the same graphs, with the values marked as debug tensors."""
        from engine_build.backends.tensorrt.tapped import open_tapped

        target = find_target(manifest.target).on(manifest.backend)
        return open_tapped(self.module, target, written, manifest, taps, seen, scratch)

    def stored_result(self, graph: Path, layer: Layer, fmt: Format, x: np.ndarray) -> np.ndarray:
        return StoredGraph.of(graph).result(layer, fmt, x)

    def needs_input_range(self, fmt: Format) -> bool:
        return has_fixed_scale(fmt)

    def open_layer(self, graph: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], object]:
        raise ArtefactError(f"layers are not measured with {self.module.name}; name a CPU engine")


def has_fixed_scale(fmt: Format) -> bool:
    """Whether TensorRT rounds the activations of such a layer with a scale that is known when the engine is built."""
    return fmt == Format(8, 8)


def _unpacked(name: str, found: Collection[str]) -> str:
    return "found in the engine" if f"{name}.weight" in found else "as built"


class WithPlugins(TensorRt):
    """TensorRT itself, whose plugins take codes in slabs and runs, and which must be asked what it made of the others:
    it may interleave codes as a kernel wants them."""

    def dialect(self, version: Version) -> Dialect:
        sequences = Sequences.UPDATED if version >= SEQUENCE_LAYERS_SINCE else Sequences.APPENDED
        return replace(super().dialect(version), sequences=sequences)

    def filling(self, fmt: Format) -> tuple[int, int]:
        return (SLAB, RUN) if plugin_family(fmt) else super().filling(fmt)

    def read_back(
        self, written: Path, built: Path, layers: Mapping[str, Layer], planned: Mapping[str, Format], scratch: Path
    ) -> ReadBack:
        """By TensorRT's engine inspector. Codes that a plugin takes are as they were: the inspector tells the plugin,
        and where they stand in the file byte for byte that is said."""
        packed, found = readback.packed_layers(written, layers), readback.find_tensors(written, built, layers, False)
        plugins = {name for name, plugin in packed.items() if plugin}
        told = inspector.parse(inspect(self.module, built), built)
        seen = {name for name in plugins if f"{name}.codes" in found}
        nodes = readback.readers(written, plugins - seen)
        kept_by = {name for name, node in nodes.items() if inspector.became_plugin(told, node)}
        readback.check_found(built, plugins - kept_by, found, planned)
        realised = {}
        for name, layer in layers.items():
            if name in plugins:
                how = "found in the engine" if name in seen else "told by TensorRT's inspector"
                realised[name] = readback.realised(layer, planned[name], True, how)
                continue
            bits = inspector.bits_of(told, frozenset((name, f"{name}.dequantized", f"{name}.input_rounded")))
            if bits is None:
                raise ArtefactError(f"{built}: TensorRT's inspector names no layer that {name} went into")
            kept = name in packed and planned[name].weight_bits in bits
            how = f"by TensorRT's inspector ({_widths(bits)})"
            realised[name] = readback.realised(layer, planned[name] if kept else FULL_PRECISION, False, how)
        return ReadBack(realised, found)


def plugin_family(fmt: Format) -> Family | None:
    """By which kernels of ours a layer of this format runs; None where TensorRT has its own."""
    if (fmt.weight_bits, fmt.activation_bits) == (4, 16) and fmt.group_size in INT4_BLOCKS:
        return None
    return next((one for one in FAMILIES if (one.weight_bits, one.activation_bits) == fmt.precision[:2]), None)


def _widths(bits: Collection[int]) -> str:
    return " and ".join(f"INT{width}" for width in sorted(bits)) or "no integers"


_INSTALL = "install TensorRT on the device (JetPack brings it)"
BACKEND = WithPlugins(Module("tensorrt", _INSTALL, ahead=False), deferred(f"{__name__}.linear_plugin", "linear"))
