"""An engine's ONNX graphs as OpenVINO reads, compiles and describes them.

A linear layer is one operator of ours, `LINEAR`, because ONNX has no form of packed weights that OpenVINO keeps packed
at all bit widths. Here it becomes what OpenVINO's CPU plugin recognises: constant codes, converted, times their scales.
"""

import importlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_policy.core.backends.openvino import Precision
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL_PRECISION
from vla_policy.core.processor import cpu_name

if TYPE_CHECKING:
    import openvino as ov

DOMAIN, LINEAR = "vla_deploy", "Linear"
"""x [1, tokens, in], weights -> [1, tokens, out]. Attribute `bits`. 16 bits: weights are bfloat16 [out, in]. Else they
are uint8, packed rows [out, columns], lowest bits first, and a third input has their scales, float16 [out, groups];
attribute `columns`: inputs, filled up to whole groups with zeros. 2-bit codes are shifted by `TWO_BIT_ZERO`."""
TWO_BIT_ZERO = 2
TYPES = {Precision.FLOAT32: "f32", Precision.BFLOAT16: "bf16"}
"""In OpenVINO's words."""
_BFLOAT16 = "BF16"
"""What OpenVINO says of processors that multiply them."""
_BITS = {"u2": 2, "i4": 4, "i8": 8}
_INSTALL = "pip install 'openvino>=2026.4,<2027'"
_DEVICE = "CPU"


def module() -> Any:
    """OpenVINO's Python module. Raises ArtefactError saying how to install it."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ArtefactError(f"backend openvino is not installed ({error}); {_INSTALL}") from error


def version() -> str:
    """Of the installed OpenVINO, e.g. `2026.4.1`. Raises as `module`."""
    return str(module().__version__).split("-")[0]


def check_processor(precision: Precision) -> None:
    """Raises ArtefactError where this processor has no products of `precision`; as `module` too."""
    if precision is Precision.FLOAT32:
        return
    if _BFLOAT16 not in module().Core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
        raise ArtefactError(
            f"{cpu_name()} has no bfloat16 products (AMX or AVX512-BF16), which openvino_bf16 needs; take another "
            "machine, or build the engine with `engine_build build --backend openvino`, which computes in float32"
        )


def settings(precision: Precision, threads: int | None) -> dict[str, Any]:
    """How graphs are compiled: activations in `precision` and never rounded to integers, one stream.

    Threads are not bound to cores: several processes would be to the same.
    """
    chosen = {"INFERENCE_PRECISION_HINT": TYPES[precision], "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "NUM_STREAMS": 1}
    chosen |= {"ENABLE_CPU_PINNING": False}
    return chosen | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})


@dataclass(frozen=True)
class Running:
    """A linear layer as it runs.

    weights, activations: the types of what is multiplied, in OpenVINO's words, e.g. `u2` and `f32`.
    group: inputs per scale, None without scales. resident_bytes: of codes and scales.
    """

    weights: str
    activations: str
    group: int | None
    resident_bytes: int

    @property
    def weight_bits(self) -> int:
        """Those of the codes; 16 where the engine's 16-bit weights run in any floating type."""
        return _BITS.get(self.weights, FULL_PRECISION.weight_bits)


@dataclass(frozen=True)
class Compiled:
    """A graph that is ready to run, and what OpenVINO made of its linear layers, by name."""

    model: "ov.CompiledModel"
    layers: Mapping[str, Running]


def compiled(path: Path, precision: Precision, threads: int | None = None, shown: Collection[str] = ()) -> Compiled:
    """The graph at `path`. Raises ArtefactError, in one line, when OpenVINO refuses it; as `module` too.

    shown: names of values inside it that become outputs.
    """
    ov = module()
    from openvino.frontend.onnx import ConversionExtension

    products: list[Any] = []

    def convert(context: Any) -> Any:
        products.append(_product(context))
        return products[-1].outputs()

    core = ov.Core()
    core.add_extension(ConversionExtension(LINEAR, DOMAIN, convert))
    try:
        model = core.read_model(path)
        names = {alias: product.friendly_name for product in products for alias in _aliases(product)}
        if shown:
            model.add_outputs(list(shown))
        runs = core.compile_model(model, _DEVICE, settings(precision, threads))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-300:]
        raise ArtefactError(f"{path}: OpenVINO {version()} cannot load it ({reason}); build it again") from error
    return Compiled(runs, _layers(runs, names))


def _aliases(product: "ov.Node") -> Iterator[str]:
    """The names under which a product may run: its own, and those of what is folded into it or only renames it."""
    yield product.friendly_name
    for end in product.output(0).get_target_inputs():
        node = end.get_node()
        constants = [value.get_node().get_type_name() == "Constant" for value in node.input_values()]
        if node.get_type_name() == "Identity" or (node.get_type_name() in ("Add", "Multiply") and any(constants)):
            yield from _aliases(node)


def _layers(runs: "ov.CompiledModel", names: Mapping[str, str]) -> dict[str, Running]:
    """Read from the graph that runs. names: of layers, by the names that their products may have there."""
    found: dict[str, Running] = {}
    for node in runs.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        fused = {node.friendly_name, *info["originalLayersNames"].value.split(",")}
        if info["layerType"].value == "FullyConnected":
            found |= {names[name]: _running(node) for name in fused if name in names}
    return found


def _running(node: "ov.Node") -> Running:
    x, weights, _, *rest = node.inputs()
    activations = x.get_element_type()
    codes, scales = math.prod(_shape(weights)), math.prod(_shape(rest[0])) if rest else 0
    # Weights without scales are shown as they are stored, and held as they are multiplied.
    kind = weights.get_element_type() if rest else activations
    return Running(
        weights=kind.to_string(),
        activations=activations.to_string(),
        group=codes // scales if rest else None,
        resident_bytes=codes * kind.bitwidth // 8 + 4 * scales,
    )


def _shape(end: Any) -> tuple[int, ...]:
    return tuple(end.get_partial_shape().to_shape())


def _product(context: Any) -> Any:
    """`LINEAR` in OpenVINO's operators: the last of them."""
    ov = module()
    from openvino import opset13 as ops

    x, weights = context.get_input(0), context.get_input(1)
    bits = context.get_attribute("bits")
    if bits == 16:
        # [in, out]: gate, up and down weights that lie [out, in] OpenVINO would fuse, in float16 that does not hold all
        # of bfloat16, and in a kernel that ends the process (SIGFPE) where sizes are no multiples of its blocks.
        stored = weights.get_node().data.view(np.uint16).T.astype(np.uint32) << 16
        return ops.matmul(x, ops.constant(np.ascontiguousarray(stored).view(np.float32)), False, False)
    scales = context.get_input(2).get_node().data.astype(np.float32)
    columns, (outputs, groups) = context.get_attribute("columns"), scales.shape
    kind = {2: ov.Type.u2, 4: ov.Type.i4, 8: ov.Type.i8}[bits]
    # A tensor of its own: one that shares NumPy's memory does not keep it alive.
    codes = ov.Tensor(kind, ov.Shape([outputs, groups, columns // groups]))
    codes.data.reshape(-1).view(np.uint8)[...] = weights.get_node().data.reshape(-1)
    values = ops.convert(ov.op.Constant(codes), "f32")
    if bits == 2:
        zero = ops.constant(np.full((1, 1, 1), TWO_BIT_ZERO, np.uint8))
        values = ops.subtract(values, ops.convert(zero, "f32"))
    rows = ops.multiply(values, ops.constant(scales[:, :, None]))
    rows = ops.reshape(rows, ops.constant(np.array([outputs, columns], np.int64)), False)
    missing = columns - x.get_partial_shape()[2].get_length()
    if missing:
        ends = ops.constant(np.array([0, 0, missing], np.int64))
        x = ops.pad(x, ops.constant(np.zeros(3, np.int64)), ends, "constant").output(0)
    return ops.matmul(x, rows, False, True)
