"""bfloat16 products that go through float32: values, gradients, and what is left as it was."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibrator.sensitivity.arithmetic import products


@pytest.fixture(autouse=True)
def narrow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """This processor, whatever it is, counts as one without bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (functional.linear, (random(2, 5, 16), random(8, 16))),
    "linear with bias": (functional.linear, (random(2, 5, 16), random(8, 16), random(8))),
    "attention": (
        functional.scaled_dot_product_attention,
        (random(2, 4, 5, 8), random(2, 4, 6, 8), random(2, 4, 6, 8)),
    ),
    "convolution": (
        lambda x, weight, bias: functional.conv2d(x, weight, bias, stride=4),
        (random(2, 3, 8, 8), random(6, 3, 4, 4), random(6)),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_both_derivatives_are_those_of_float64(name: str) -> None:
    operation, operands = OPERATIONS[name]

    def derivatives(dtype: torch.dtype) -> list[Tensor]:
        x, *rest = (tensor.to(dtype) for tensor in operands)
        x.requires_grad_()
        # Only the plain formula of attention can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            y = operation(x, *rest)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return [y.detach(), first.detach(), second]

    with products("cpu", torch.bfloat16):
        found = derivatives(torch.bfloat16)
    for got, expected in zip(found, derivatives(torch.float64), strict=True):
        assert got.dtype is torch.bfloat16
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 0.03, "bfloat16 has a relative spacing of 0.008, and rounds operands and results"


def test_the_weight_that_is_kept_is_the_narrow_one() -> None:
    x, weight = random(3, 16).bfloat16().requires_grad_(), random(8, 16).bfloat16()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with products("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional.linear(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize("error", [False, True])
def test_tf32_is_off_inside_and_as_it_was_outside(dtype: torch.dtype, asked_for: bool, error: bool) -> None:
    """Whatever the program around has asked for, also when the block fails. No GPU is needed to see the switches."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = asked_for
        with suppress(ZeroDivisionError), products("cpu", dtype):
            assert not cudnn.allow_tf32 and not matmul.allow_tf32
            _ = 1 / (not error)
        assert cudnn.allow_tf32 == matmul.allow_tf32 == asked_for
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def test_float32_is_not_widened() -> None:
    """The very call of the program, so the very bits: float32 goes through the same function with the same operands."""
    x, weight = random(3, 16).float(), random(8, 16).float()
    expected = functional.linear(x, weight)
    with products("cpu", torch.float32):
        assert torch.equal(functional.linear(x, weight), expected)
