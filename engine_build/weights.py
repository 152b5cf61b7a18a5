"""A policy's layers as linear maps, and one of them ready to be written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from calibrator.families import live_units
from calibrator.families.loading import Tensors, empty_policy
from calibrator.quantizers import Codes, QuantizedWeight
from calibrator.quantizers.rows import Part, RowBits
from engine_build.backends.base import Layer
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Choice, Format
from vla_policy.core.policy_config import PolicyConfig


def layers_of(config: PolicyConfig) -> dict[str, Layer]:
    """Every live layer of the policy by name, in the order in which they run."""
    layers = {}
    for unit in live_units(empty_policy(config)):
        left_out = len(unit.module.weight) - unit.outputs
        layers[unit.name] = Layer(
            unit.name, unit.kind, unit.group, unit.outputs, unit.inputs, unit.module.bias is not None,
            rows=unit.rows if left_out else None, left_out=left_out,
        )  # fmt: skip
    return layers


def split(layers: Mapping[str, Layer], rows: RowBits) -> dict[str, Layer]:
    """The layers in their order, with its parts in the place of each that `rows` splits.

    Raises ArtefactError where `rows` has another number of output channels than a layer, gives bits to one that no
    decision reads, or to none at all.
    """
    found: dict[str, Layer] = {}
    for name, layer in layers.items():
        if name not in rows.bits:
            found[name] = layer
            continue
        bits, outputs = rows.bits[name], layer.outputs + layer.left_out
        if len(bits) != outputs:
            raise ArtefactError(f"{name}: rows of {len(bits)} output channels, it has {outputs}")
        if not bits.any():
            raise ArtefactError(f"{name}: all its output channels have 0 bits, which leaves it nothing; allocate again")
        kept = layer.rows or range(outputs)
        if bits[: kept.start].any() or bits[kept.stop :].any():
            raise ArtefactError(f"{name}: rows outside {kept.start} to {kept.stop - 1} have bits: decisions read none")
        found |= {part.name: part_of(layer, part) for part in rows.of(name)}
    return found


def part_of(layer: Layer, part: Part) -> Layer:
    """Some rows of a layer as a layer of their own."""
    return replace(layer, name=part.name, outputs=len(part.rows), part=part, rows=None, left_out=0)


@dataclass(frozen=True)
class LayerWeights:
    """One layer ready to be written: quantized, or as float32 rows [out, in]; bias float32 [out] or None.

    input_peak: largest |input|, where a backend rounds activations with a fixed scale.
    """

    layer: Layer
    format: Format
    quantized: QuantizedWeight | None
    rows: torch.Tensor | None
    bias: np.ndarray | None
    input_peak: float | None = None

    @property
    def codes(self) -> np.ndarray:
        """int8 [out, in]."""
        assert self.quantized is not None
        return self.quantized.codes.numpy()

    @property
    def scales(self) -> np.ndarray:
        """float16 [out, groups]: the quantizer's scales are float16 numbers."""
        assert self.quantized is not None
        return self.quantized.scales.numpy().astype(np.float16)


def layer_weights(
    tensors: Tensors, layer: Layer, choice: Choice, codes: Codes, input_peak: float | None = None
) -> LayerWeights:
    """Reads one layer; its codes come from the calibrator: nothing is rounded here. Raises as `codes` does.

    Of a layer that keeps some rows the whole weight is rounded, as it was when it was scored.
    """
    kept = slice(layer.rows.start, layer.rows.stop) if layer.rows else slice(None)
    weight = _rows(tensors, layer, "weight")
    bias = as_float32(_rows(tensors, layer, "bias"))[kept] if layer.bias else None
    if choice.recipe is None:
        return LayerWeights(layer, choice.format, None, weight.flatten(1)[kept], bias)
    rounded = codes.of(layer.name, weight, choice)
    if rounded.operator is not None and layer.part is not None:
        raise ArtefactError(f"{layer.name} in {choice}: a layer with several widths has one input for all rows")
    rounded = rounded.part(kept) if layer.rows else rounded
    return LayerWeights(layer, choice.format, rounded, None, bias, input_peak)


def _rows(tensors: Tensors, layer: Layer, what: str) -> torch.Tensor:
    """A layer's tensor, of a part its rows."""
    tensor = tensors.tensor(f"{layer.part.layer if layer.part else layer.name}.{what}")
    return tensor[layer.part.rows] if layer.part else tensor


def as_float32(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values as a NumPy array."""
    values: np.ndarray = tensor.float().numpy()
    return values
