"""A small graph beside an engine's: one layer of each of its formats, with the numbers that it must give.

ONNX Runtime falls back to other arithmetic where it has no kernel for a processor, and says nothing. So a session first
runs this graph (`core.backends.onnxruntime.probe`). Inputs are near the middle between two codes, where rounding moves
them most: activations that are rounded otherwise, or not at all, or are although they must not be, are all seen.
"""

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto, helper

from calibrator.quantizers import parse_choice, quantize
from calibrator.quantizers.activations import quantize_activation
from engine_build.graph.builder import GraphBuilder
from engine_build.graph.context import LinearWriter
from engine_build.weights import Layer, LayerWeights
from vla_policy.core.backends.onnxruntime.probe import ALLOWED, EXPECTED, GIVEN
from vla_policy.core.formats import FULL_PRECISION, Format

_ROWS, _INPUTS, _OUTPUTS = 17, 256, 16
_SINGLE = 2.0**-24


def write_probe(write_linear: LinearWriter, builder: GraphBuilder, formats: Sequence[Format]) -> None:
    """Writes the probe of the quantized `formats`."""
    x, outputs = _between_codes(), []
    builder.tensor("x", x)  # an input with a value: what only depends on constants would be computed beforehand
    builder.node("Identity", ["x"], GIVEN)
    for fmt in formats:
        outputs.append(builder.rename(write_linear(builder, "x", _layer(fmt)), str(fmt)))
        for name, values in zip((EXPECTED, ALLOWED), _reference(x, fmt), strict=True):
            outputs.append(builder.rename(builder.tensor(f"{fmt}.{name}", values), f"{fmt}:{name}"))
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (GIVEN, *outputs)]
    builder.save([helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", _INPUTS])], infos)


def _between_codes() -> np.ndarray:
    """float32 [1, rows, inputs]: a third of a code beside the middle of two, whatever the group."""
    generator = np.random.default_rng(0)
    codes = generator.integers(-100, 100, (1, _ROWS, _INPUTS)) + generator.choice([0.4, 0.6], (1, _ROWS, _INPUTS))
    codes[..., ::32] = 127  # every group's peak
    return (codes / 127).astype(np.float32)


def _layer(fmt: Format) -> LayerWeights:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator) / _INPUTS**0.5
    name = f"probe.{fmt}"
    layer = Layer(name, "linear", name, _OUTPUTS, _INPUTS, bias=False)
    return LayerWeights(layer, fmt, quantize(weight, parse_choice(str(fmt))), None, None)


def _reference(x: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and what float32 sums may differ by, both float32."""
    quantized = _layer(fmt).quantized
    assert quantized is not None
    seen, weight = torch.from_numpy(x), quantized.dequantize().double().numpy()
    if fmt.activation_bits < FULL_PRECISION.activation_bits:
        seen = quantize_activation(seen, fmt.activation_bits, fmt.group_size)
    rows = seen.double().numpy()
    allowed = (_INPUTS + 4) * _SINGLE * (np.abs(rows) @ np.abs(weight).T)
    return (rows @ weight.T).astype(np.float32), allowed.astype(np.float32)
