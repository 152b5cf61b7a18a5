"""Weights held in bfloat16 under float32 arithmetic: values, gradients, and what is left as it was."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from calibrator.families import load_policy
from calibrator.quantizers import parse_choice, quantized
from calibrator.sensitivity.arithmetic import float32_products


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (functional.linear, (random(2, 5, 16), random(8, 16))),
    "linear with bias": (functional.linear, (random(2, 5, 16), random(8, 16), random(8))),
    "convolution": (
        lambda x, weight, bias: functional.conv2d(x, weight, bias, stride=4),
        (random(2, 3, 8, 8), random(6, 3, 4, 4), random(6)),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_both_derivatives_are_those_of_float64(name: str) -> None:
    operation, (x, weight, *bias) = OPERATIONS[name]
    narrow = weight.bfloat16()

    def derivatives(x: Tensor, weight: Tensor, *bias: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = operation(x, weight, *bias)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return [y.detach(), first.detach(), second]

    expected = derivatives(x.double(), narrow.double(), *(one.double() for one in bias))
    with float32_products(torch.bfloat16):
        found = derivatives(x, narrow, *bias)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype is torch.float32
        # Sums of at most 48 products in float32, up to five of them one after another.
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5 * 48 * 2**-24 * float(wanted.abs().max()))


def test_words_become_float32() -> None:
    table = random(7, 4).bfloat16()
    with float32_products(torch.bfloat16):
        words = functional.embedding(torch.tensor([[3, 5]]), table)
    assert words.dtype is torch.float32 and torch.equal(words, table[[3, 5]][None].float())


def test_the_weight_that_is_kept_is_the_narrow_one() -> None:
    x, weight = random(3, 16).requires_grad_(), random(8, 16).bfloat16()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with float32_products(torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional.linear(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


@pytest.mark.parametrize("choice", ["w16a16", "w8a16_g32", "w4a8_g32"])
def test_a_policy_computes_the_same_bits_whichever_way_it_is_held(policy_folder: Path, choice: str) -> None:
    """Its checkpoint is bfloat16, as published ones are, so that nothing is lost; also with one layer in codes."""
    wide, narrow = load_policy(policy_folder), load_policy(policy_folder, matrices=torch.bfloat16)
    held = {name: parameter.dtype for name, parameter in narrow.named_parameters()}
    assert held["language_model.lm_head.weight"] is torch.bfloat16
    assert held["language_model.model.norm.weight"] is torch.float32
    assert held["vision_backbone.featurizer.pos_embed"] is torch.float32
    inputs = {"pixel_values": random(2, 6, 32, 32), "input_ids": torch.tensor([[1, 4, 5, 6], [1, 7, 8, 9]])}
    decided = torch.full((2, 3), wide.config.token_vocab - 7)
    unit, parsed = "language_model.model.layers.0.mlp.up_proj", parse_choice(choice)
    with quantized(wide, unit, parsed):
        expected = wide.output(inputs, decided)
    with quantized(narrow, unit, parsed), float32_products(torch.bfloat16):
        assert torch.equal(narrow.output(inputs, decided), expected)
    assert narrow.get_submodule(unit).weight.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize("error", [False, True])
def test_tf32_is_off_inside_and_as_it_was_outside(dtype: torch.dtype, asked_for: bool, error: bool) -> None:
    """Whatever the program around has asked for, also when the block fails. No GPU is needed to see the switches."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = asked_for
        with suppress(ZeroDivisionError), float32_products(dtype):
            assert not cudnn.allow_tf32 and not matmul.allow_tf32
            _ = 1 / (not error)
        assert cudnn.allow_tf32 == matmul.allow_tf32 == asked_for
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
