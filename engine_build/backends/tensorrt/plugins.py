"""TensorRT plugins for formats that it has no kernels for, compiled ahead of time: engines carry them, a robot needs no
file.

`register` adds `vla_policy::w2a16`, `w4a16` and `w4a8`, each for one matrix, two (`w2a16_x2`) or three of one input,
and `quantize_rows`. TensorRT's ONNX parser maps nodes of the same names to them, times both cuts of a product for each
optimisation profile and keeps the faster. All numbers that a kernel needs follow from shapes, so the plugins have no
attributes.

Written against the documented interface of `tensorrt.plugin`, which has not run here; the kernels have. It calls
`describe` once with shapes that are not known, so that only arithmetic of shapes may stand there.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from engine_build.backends.base import RUN
from engine_build.backends.tensorrt.kernels import (
    CUTS,
    FAMILIES,
    MOST_PARTS,
    NAMESPACE,
    ROUNDING,
    Family,
    Kernel,
    compile_ptx,
    grid_outputs,
    node_name,
    product_kernel,
)

_TACTICS = dict(enumerate(CUTS, start=1))


def are_embedded() -> bool:
    """Whether engines of the installed TensorRT carry compiled kernels: from 10.9 on; before, a library has them."""
    try:
        from tensorrt.plugin import aot_impl  # noqa: F401 (asked for)
    except ImportError:
        return False
    return True


@functools.cache
def register(capability: tuple[int, int]) -> None:
    """Makes the plugins known to TensorRT, once per process. capability: of the GPU, (major, minor)."""
    for family in FAMILIES:
        for parts in range(1, MOST_PARTS + 1):
            _register_product(family, parts, capability)
    _register_quantize_rows(capability)


def _register_product(family: Family, parts: int, capability: tuple[int, int]) -> None:
    """x [1, tokens, in], codes and scales of every part -> [1, tokens, out of the part] each."""
    import tensorrt as trt
    import tensorrt.plugin as trtp

    name = f"{NAMESPACE}::{node_name(family, parts)}"
    tokens = ["x", "token_scales"] if family.rounded else ["x"]
    names = [*tokens, *(f"{what}{part}" for part in range(parts) for what in ("codes", "scales"))]
    described = trtp.TensorDesc if parts == 1 else tuple[(trtp.TensorDesc,) * parts]  # type: ignore[misc]

    @trtp.register(name)
    @_taking(names, trtp.TensorDesc, described)
    def describe(*inputs: trtp.TensorDesc) -> Any:
        x, codes = inputs[0].shape_expr, inputs[len(tokens) :: 2]
        results = [trtp.from_shape_expr((x[0], x[1], part.shape_expr[0]), dtype=trt.float16) for part in codes]
        return results[0] if parts == 1 else tuple(results)

    @trtp.autotune(name)
    @_taking([*names, "outputs"])
    def tune(*tensors: Any) -> list[Any]:
        types = ["INT32", "FP32"] if family.rounded else ["FP16"]
        types += ["INT32", "FP16"] * parts + ["FP16"] * parts
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", list(_TACTICS))]

    @trtp.aot_impl(name)
    @_taking([*names, "outputs", "tactic"])
    def launch(*given: Any) -> Any:
        *inputs, _, tactic = given
        x, matrices = inputs[0].shape_expr, inputs[len(tokens) :]
        shapes = [tuple(size.constant_value() for size in one.shape_expr) for one in matrices]
        codes, scales = shapes[::2], shapes[1::2]
        cut, count = _TACTICS[tactic], x[0] * x[1]
        kernel = product_kernel(family, cut, codes[0], scales[0], parts)
        outputs = [rows for rows, _ in codes]
        grid = (grid_outputs(cut, outputs), trtp.cdiv(count, cut.tokens))
        width = x[2] * 4 if family.rounded else x[2]  # four codes to a word
        return _launch(kernel, capability, grid, [count, width, scales[0][1], *outputs])


def _register_quantize_rows(capability: tuple[int, int]) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    name = f"{NAMESPACE}::quantize_rows"

    @trtp.register(name)
    def describe(x: trtp.TensorDesc) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        words = (x.shape_expr[2] + (RUN - 1)) // RUN * (RUN // 4)
        codes = trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1], words), dtype=trt.int32)
        return codes, trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1]), dtype=trt.float32)

    @trtp.autotune(name)
    def tune(x: Any, outputs: Any) -> list[Any]:
        return [trtp.AutoTuneCombination("FP16, INT32, FP32", "LINEAR")]

    @trtp.aot_impl(name)
    def launch(x: Any, outputs: Any, tactic: int) -> Any:
        grid = (x.shape_expr[0] * x.shape_expr[1], 1)
        return _launch(ROUNDING, capability, grid, [x.shape_expr[2]])


def _taking(
    names: Sequence[str], kind: Any = inspect.Parameter.empty, result: Any = inspect.Signature.empty
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a function of any number of tensors the parameters that TensorRT reads off its signature."""

    def sign(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name in names
        ]
        function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
        return function

    return sign


def _launch(kernel: Kernel, capability: tuple[int, int], grid: tuple[Any, Any], numbers: list[Any]) -> Any:
    """What an `aot_impl` returns: entry point, PTX, launch parameters, and the kernel's numbers."""
    import tensorrt.plugin as trtp

    parameters = trtp.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y = grid
    parameters.block_x = kernel.threads
    parameters.shared_mem = 0
    extra = trtp.SymIntExprs(len(numbers))
    for place, number in enumerate(numbers):
        extra[place] = trtp.SymInt32(number)
    return kernel.name, compile_ptx(kernel, capability), parameters, extra
