"""Matrix products as the chosen number format means them, wherever the policy runs.

bfloat16 stands for operands of 8 significant bits and sums in float32. oneDNN gives that on a CPU with AVX-512; on
others torch falls back to loops that take 150 times as long as float32 for a product with an untransposed weight,
which every backward pass is. There each operand is widened to float32 for the one product that needs it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Product(torch.autograd.Function):
    """x W^T rounded to x's format. Only the narrow weight is kept for the backward pass; no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(gradients[0], weight.T), None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = _Product.apply(x, weight)
    return product if bias is None else product + bias


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    wide = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), *args, **kwargs)
    return wide.to(query.dtype)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    wide = functional.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), *args, **kwargs)
    return wide.to(x.dtype)


_WIDE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.scaled_dot_product_attention: _attention,
    functional.conv2d: _convolution,
}


class _Widened(TorchFunctionMode):
    """Sends bfloat16 products through float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        wide = _WIDE.get(func)
        if wide is not None and args[0].dtype is torch.bfloat16:
            return wide(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, so that they are worth having."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def products(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, products on `device` have the precision of `dtype`, at a speed worth having."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    # float32 means float32: a GPU's convolutions would otherwise round their operands to 10 bits (TF32), and so would
    # products where the program around has asked for it.
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        if dtype is torch.bfloat16 and not multiplies_bfloat16(torch.device(device)):
            with _Widened():
                yield
        else:
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
