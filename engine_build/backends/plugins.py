"""The kernels of this package as TensorRT plugins, compiled ahead of time: engines carry them, a robot needs no file.

`register` adds, per activation type, `vla_policy::w2a16_<type>`, `w4a8_<type>` and `quantize_rows_<type>`. TensorRT's
ONNX parser maps nodes of the same names to them, times both tiles for each optimisation profile and keeps the faster.
All numbers that a kernel needs follow from shapes, so the plugins have no attributes.

Written against the documented interface of `tensorrt.plugin`; the kernels are proven on a CPU, not yet run on a GPU.
"""

import functools
from typing import Any

from engine_build.kernels import NAMESPACE, SCALARS, TILES, Kernel, compile_ptx, numbers_of
from engine_build.packing import RUN
from vla_policy.core.errors import ArtefactError

_DTYPES = {"f16": "FP16", "bf16": "BF16"}
_TACTICS = dict(enumerate(TILES, start=1))


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
    for scalar in SCALARS:
        _register_w2a16(scalar, capability)
        _register_w4a8(scalar, capability)
        _register_quantize_rows(scalar, capability)


def _register_w2a16(scalar: str, capability: tuple[int, int]) -> None:
    import tensorrt.plugin as trtp

    name, dtype = f"{NAMESPACE}::w2a16_{scalar}", _DTYPES[scalar]

    @trtp.register(name)
    def describe(x: trtp.TensorDesc, codes: trtp.TensorDesc, scales: trtp.TensorDesc) -> trtp.TensorDesc:
        return trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1], codes.shape_expr[0]), dtype=x.dtype)

    @trtp.autotune(name)
    def tune(x: Any, codes: Any, scales: Any, outputs: Any) -> list[Any]:
        return [trtp.AutoTuneCombination(f"{dtype}, INT32, FP16, {dtype}", "LINEAR", list(_TACTICS))]

    @trtp.aot_impl(name)
    def launch(x: Any, codes: Any, scales: Any, outputs: Any, tactic: int) -> Any:
        kernel = Kernel("W2A16", scalar, _TACTICS[tactic])
        return _launch_product(kernel, capability, x, x.shape_expr[2].constant_value(), codes, scales, bits=2)


def _register_w4a8(scalar: str, capability: tuple[int, int]) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    name, dtype = f"{NAMESPACE}::w4a8_{scalar}", _DTYPES[scalar]

    @trtp.register(name)
    def describe(
        x: trtp.TensorDesc, token_scales: trtp.TensorDesc, codes: trtp.TensorDesc, scales: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        shape = (x.shape_expr[0], x.shape_expr[1], codes.shape_expr[0])
        return trtp.from_shape_expr(shape, dtype=trt.float16 if scalar == "f16" else trt.bfloat16)

    @trtp.autotune(name)
    def tune(x: Any, token_scales: Any, codes: Any, scales: Any, outputs: Any) -> list[Any]:
        return [trtp.AutoTuneCombination(f"INT32, FP32, INT32, FP16, {dtype}", "LINEAR", list(_TACTICS))]

    @trtp.aot_impl(name)
    def launch(x: Any, token_scales: Any, codes: Any, scales: Any, outputs: Any, tactic: int) -> Any:
        kernel = Kernel("W4A8", scalar, _TACTICS[tactic])
        return _launch_product(kernel, capability, x, x.shape_expr[2].constant_value() * 4, codes, scales, bits=4)


def _register_quantize_rows(scalar: str, capability: tuple[int, int]) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    name, dtype = f"{NAMESPACE}::quantize_rows_{scalar}", _DTYPES[scalar]

    @trtp.register(name)
    def describe(x: trtp.TensorDesc) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        words = -(-x.shape_expr[2].constant_value() // RUN) * RUN // 4
        codes = trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1], words), dtype=trt.int32)
        return codes, trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1]), dtype=trt.float32)

    @trtp.autotune(name)
    def tune(x: Any, outputs: Any) -> list[Any]:
        return [trtp.AutoTuneCombination(f"{dtype}, INT32, FP32", "LINEAR")]

    @trtp.aot_impl(name)
    def launch(x: Any, outputs: Any, tactic: int) -> Any:
        kernel = Kernel("QUANTIZE_ROWS", scalar)
        return _launch(kernel, capability, (x.shape_expr[0] * x.shape_expr[1], 1), [x.shape_expr[2]])


def _launch_product(
    kernel: Kernel, capability: tuple[int, int], x: Any, inputs: int, codes: Any, scales: Any, bits: int
) -> Any:
    """A product's launch. Only the number of tokens may be free."""
    import tensorrt.plugin as trtp

    assert kernel.tile is not None
    tokens = x.shape_expr[0] * x.shape_expr[1]
    codes_shape, scales_shape = (tuple(size.constant_value() for size in one.shape_expr) for one in (codes, scales))
    grid = (-(-codes_shape[0] // kernel.tile.outputs), trtp.cdiv(tokens, kernel.tile.tokens))
    numbers = [tokens, *numbers_of(bits, inputs, codes_shape, scales_shape)]
    return _launch(kernel, capability, grid, numbers)


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
