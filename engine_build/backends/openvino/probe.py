"""Numbers tell what OpenVINO's description of a graph does not: how activations were rounded.

One in 16 of a probe's inputs is a thousand times as large as the others, and no weight takes it up. Rounded to 8 bits
with a scale that it shares, the others would all become zero; in floating point they stay what they are. What is left
is the error of the type itself, which lies between bounds for float32 and for bfloat16.
"""

from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper

from calibrator.quantizers import QuantizedWeight
from calibrator.quantizers.weights import code_range, groups_per_row
from engine_build.backends.openvino.linear import linear
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights
from vla_policy.core.backends.openvino import Precision
from vla_policy.core.backends.openvino.graphs import compiled, version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.processor import cpu_name

_OUTPUTS, _ROWS = 64, (1, 64)  # one row, as in a decode step, runs in kernels of its own
_EVERY, _PEAK = 16, 1e3
BOUNDS = {Precision.FLOAT32: (0.0, 1e-5), Precision.BFLOAT16: (3e-4, 1e-2)}
"""Root mean square error over that of the result: least and most. A value's rounding alone is 2^-25 and 2^-9 at most,
3e-8 and 2e-3. Seen are 2e-7 where values are float32, 3e-3 where they are bfloat16, and 1 where they are integers."""


def probe(fmt: Format, inputs: int, precision: Precision, folder: Path) -> None:
    """Raises ArtefactError where a layer of this format and number of inputs does not multiply in `precision`.

    folder: for the graph that is run.
    """
    weights, values = _weights(fmt, inputs)
    path = folder / f"{fmt}_{inputs}.onnx"
    with GraphBuilder(path) as builder:
        builder.rename(linear(builder, "x", weights), "y")
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])
            for name, size in (("x", inputs), ("y", _OUTPUTS))
        ]
        builder.save(ends[:1], ends[1:])
    model = compiled(path, precision).model
    least, most = BOUNDS[precision]
    generator = np.random.default_rng(1)
    for rows in _ROWS:
        x = generator.standard_normal((1, rows, inputs), np.float32)
        x[..., ::_EVERY] = _PEAK
        (got,) = model({"x": x}).values()
        expected = x.astype(np.float64) @ values.T
        error = float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()))
        if not least <= error <= most:
            raise ArtefactError(
                f"{fmt} with {inputs} inputs: OpenVINO {version()} on {cpu_name()} is off by {error:.1e} of the result "
                f"at {rows} rows, {precision.value} gives {least:g} to {most:g}; build with --backend onnxruntime"
            )


def _weights(fmt: Format, inputs: int) -> tuple[LayerWeights, np.ndarray]:
    """A layer of random weights, none of them where a peak comes, and their values in float64 [out, in]."""
    generator = np.random.default_rng(0)
    layer = Layer("probe", "linear", "probe", _OUTPUTS, inputs, bias=False)
    if fmt == FULL_PRECISION:
        rows = torch.from_numpy(generator.standard_normal((_OUTPUTS, inputs), np.float32)).bfloat16()
        rows[:, ::_EVERY] = 0
        return LayerWeights(layer, fmt, None, rows, None), rows.double().numpy()
    low, high = code_range(fmt.weight_bits)
    codes = torch.from_numpy(generator.integers(low, high, (_OUTPUTS, inputs), np.int8, endpoint=True))
    codes[:, ::_EVERY] = 0
    scales = torch.from_numpy(generator.uniform(1e-3, 2e-3, (_OUTPUTS, groups_per_row(inputs, fmt)))).half().float()
    quantized = QuantizedWeight(codes, scales, fmt, tuple(codes.shape))
    return LayerWeights(layer, fmt, quantized, None, None), quantized.dequantize().double().numpy()
