"""float32 arithmetic, also on weights that are held in bfloat16.

Rounding activations and gradients to bfloat16 (8 significant bits) changes evidence more than 8-bit weights do, so only
weights are held so: a published checkpoint's are bfloat16 numbers, and lose nothing by it. Each is widened to float32
for the one product that needs it, and no wide copy is kept for the backward pass. What is computed is what float32
weights would give, to the last bit; the price is the widening, about a quarter of a product of 290 rows on a CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Product(torch.autograd.Function):
    """x W^T + b in float32. Only the narrow weight is kept for the backward pass; no gradient for it or the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.float(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(gradients[0], weight.T, None), None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = _Product.apply(x, weight, bias)
    return product


def _convolution(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return functional.conv2d(x, weight.float(), *args, **kwargs)


def _embedding(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return functional.embedding(ids, weight, *args, **kwargs).float()


_WIDE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.conv2d: _convolution,
    functional.embedding: _embedding,
}


class _Widened(TorchFunctionMode):
    """Layers whose weight is bfloat16 give float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        wide = _WIDE.get(func)
        if wide is not None and args[1].dtype is torch.bfloat16:
            return wide(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def float32_products(weights: torch.dtype) -> Iterator[None]:
    """Inside the block products are float32's, of weights that are held in `weights`."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    # A GPU's convolutions would otherwise round their operands to 10 bits (TF32), and so would products where the
    # program around has asked for it.
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        with ExitStack() as stack:
            if weights is not torch.float32:
                stack.enter_context(_Widened())
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
