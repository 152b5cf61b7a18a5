"""The kernels of this package as TensorRT plugins, compiled ahead of time: engines carry them, a robot needs no file.

`register` adds `vla_policy::w2a16`, `w4a8` and `quantize_rows`. TensorRT's ONNX parser maps nodes of the same names to
them, times both cuts of a product for each optimisation profile and keeps the faster. All numbers that a kernel needs
follow from shapes, so the plugins have no attributes.

Written against the documented interface of `tensorrt.plugin`, which has not run here; the kernels have.
"""

import functools
from typing import Any

from engine_build.backends.base import RUN
from engine_build.backends.tensorrt.kernels import CUTS, NAMESPACE, Kernel, compile_ptx, product_kernel
from vla_policy.core.errors import ArtefactError

_TACTICS = dict(enumerate(CUTS, start=1))


@functools.cache
def register(capability: tuple[int, int]) -> None:
    """Makes the plugins known to TensorRT, once per process. capability: of the GPU, (major, minor).

    Raises ArtefactError for a TensorRT that embeds no compiled kernels.
    """
    try:
        from tensorrt.plugin import aot_impl  # noqa: F401 (asked for, used below)
    except ImportError as error:
        raise ArtefactError(
            f"layers in w2a16 and w4a8 need TensorRT 10.9 or later, which embeds compiled kernels ({error}); install "
            "it, or plan other formats"
        ) from error
    _register_w2a16(capability)
    _register_w4a8(capability)
    _register_quantize_rows(capability)


def _register_w2a16(capability: tuple[int, int]) -> None:
    import tensorrt.plugin as trtp

    name = f"{NAMESPACE}::w2a16"

    @trtp.register(name)
    def describe(x: trtp.TensorDesc, codes: trtp.TensorDesc, scales: trtp.TensorDesc) -> trtp.TensorDesc:
        return trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1], codes.shape_expr[0]), dtype=x.dtype)

    @trtp.autotune(name)
    def tune(x: Any, codes: Any, scales: Any, outputs: Any) -> list[Any]:
        return [trtp.AutoTuneCombination("FP16, INT32, FP16, FP16", "LINEAR", list(_TACTICS))]

    @trtp.aot_impl(name)
    def launch(x: Any, codes: Any, scales: Any, outputs: Any, tactic: int) -> Any:
        return _launch_product(2, tactic, capability, x, x.shape_expr[2], codes, scales)


def _register_w4a8(capability: tuple[int, int]) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    name = f"{NAMESPACE}::w4a8"

    @trtp.register(name)
    def describe(
        x: trtp.TensorDesc, token_scales: trtp.TensorDesc, codes: trtp.TensorDesc, scales: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        return trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1], codes.shape_expr[0]), dtype=trt.float16)

    @trtp.autotune(name)
    def tune(x: Any, token_scales: Any, codes: Any, scales: Any, outputs: Any) -> list[Any]:
        return [trtp.AutoTuneCombination("INT32, FP32, INT32, FP16, FP16", "LINEAR", list(_TACTICS))]

    @trtp.aot_impl(name)
    def launch(x: Any, token_scales: Any, codes: Any, scales: Any, outputs: Any, tactic: int) -> Any:
        return _launch_product(4, tactic, capability, x, x.shape_expr[2] * 4, codes, scales)


def _register_quantize_rows(capability: tuple[int, int]) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    name = f"{NAMESPACE}::quantize_rows"

    @trtp.register(name)
    def describe(x: trtp.TensorDesc) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        words = -(-x.shape_expr[2].constant_value() // RUN) * RUN // 4
        codes = trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1], words), dtype=trt.int32)
        return codes, trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1]), dtype=trt.float32)

    @trtp.autotune(name)
    def tune(x: Any, outputs: Any) -> list[Any]:
        return [trtp.AutoTuneCombination("FP16, INT32, FP32", "LINEAR")]

    @trtp.aot_impl(name)
    def launch(x: Any, outputs: Any, tactic: int) -> Any:
        grid = (x.shape_expr[0] * x.shape_expr[1], 1)
        return _launch(Kernel("QUANTIZE_ROWS"), capability, grid, [x.shape_expr[2]])


def _launch_product(
    bits: int, tactic: int, capability: tuple[int, int], x: Any, inputs: Any, codes: Any, scales: Any
) -> Any:
    """A product's launch. Only the number of tokens may be free. inputs: of a token of `x`, filled up for 8 bits."""
    import tensorrt.plugin as trtp

    cut, tokens = _TACTICS[tactic], x.shape_expr[0] * x.shape_expr[1]
    codes_shape, scales_shape = (tuple(size.constant_value() for size in one.shape_expr) for one in (codes, scales))
    kernel = product_kernel(bits, cut, codes_shape, scales_shape)
    grid = (-(-codes_shape[0] // cut.outputs), trtp.cdiv(tokens, cut.tokens))
    return _launch(kernel, capability, grid, [tokens, codes_shape[0], inputs, scales_shape[1]])


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
