"""QuantVLA's rotation: singular vectors of the weight in blocks, beside NumPy's; the layer computes what it did."""

from collections import deque

import numpy as np
import pytest
import torch
from tables import scored, table
from torch import Tensor

from calibrator.allocation.options import build_groups
from calibrator.quantizers import parse_choice, quantize
from calibrator.quantizers.methods.quantvla import alternating, found_operator, singular_vectors
from calibrator.sensitivity.table import Objective
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import FULL


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("outputs", [20, 5])
def test_columns_are_numpy_s_singular_vectors(outputs: int) -> None:
    """Up to their signs; where the block has more columns than rows, up to a basis of what the rows do not reach."""
    blocks = normal(3, outputs, 8)
    found = singular_vectors(blocks)
    torch.testing.assert_close(found.mT @ found, torch.eye(8).double().expand(3, -1, -1), rtol=0, atol=1e-12)
    for weight, columns in zip(blocks.numpy(), found.numpy(), strict=True):
        expected, values, _ = np.linalg.svd(weight.T, full_matrices=True)
        rank = len(values)
        # The gaps between these values are above 1e-2 of the largest, so that the vectors are well determined.
        assert (np.diff(-(values**2)) > 1e-2 * values[0] ** 2 / 8).all()
        np.testing.assert_allclose(np.abs(expected[:, :rank].T @ columns[:, :rank]), np.eye(rank), atol=1e-10)
        np.testing.assert_allclose(weight @ columns[:, rank:], 0, atol=1e-10)
    assert bool((found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()), "signs are settled"


@pytest.mark.parametrize("inputs", [2, 7, 12])
def test_channels_alternate_between_large_and_small(inputs: int) -> None:
    energy = torch.rand(inputs, generator=torch.Generator().manual_seed(inputs))
    left, expected = deque(sorted(range(inputs), key=lambda channel: -float(energy[channel]))), []
    while left:
        expected.append(left.popleft() if len(expected) % 2 == 0 else left.pop())
    assert alternating(energy).tolist() == expected


@pytest.mark.parametrize(("inputs", "outputs", "block"), [(128, 96, 64), (150, 20, 64), (40, 30, 64), (96, 8, 32)])
def test_the_layer_computes_what_it_did(inputs: int, outputs: int, block: int) -> None:
    """In float64, with the very numbers that are stored, whether blocks fit or something is left over."""
    weight, x = normal(outputs, inputs), normal(50, inputs, seed=1)
    operator = found_operator(weight, {"block": block})
    expected = x @ weight.T
    turned = operator.apply(x) @ operator.weight(weight).T
    assert float((turned - expected).abs().max()) < 1e-11 * float(expected.abs().max())
    (turn,) = operator.turns
    size = min(block, inputs)
    assert turn.blocks.shape == (inputs // size, size, size)
    assert torch.equal(turn.blocks, turn.blocks.half().float())


def test_the_turned_weight_is_compact() -> None:
    """Columns of a block are orthogonal, the largest first, and hold what the channels held."""
    weight = normal(96, 128) * torch.linspace(0.2, 2, 128)
    turned = found_operator(weight, {"block": 32}).weight(weight)
    for part in turned.split(32, 1):
        gram = part.T @ part
        # Numbers of R are rounded to float16: to 2^-11 of themselves.
        assert float((gram - gram.diag().diag()).abs().max()) < 2**-9 * float(gram.max())
        assert bool((gram.diag()[:-1] > gram.diag()[1:]).all())
    assert float(turned.norm()) == pytest.approx(float(weight.norm()), rel=2**-11)


def test_codes_are_of_the_turned_weight_and_need_no_inputs() -> None:
    weight, x = normal(24, 150).float(), normal(20, 150, seed=1)
    found = quantize(weight, parse_choice("w4a8_g32:quantvla"))
    assert found.operator is not None
    (turn,) = found.operator.turns
    held, blocks = weight.double().numpy()[:, turn.order.numpy()], turn.blocks.double().numpy()
    for number, block in enumerate(blocks):
        held[:, 64 * number : 64 * number + 64] @= np.linalg.inv(block).T
    step = np.abs(found.scales.numpy()).repeat(32, 1)[:, :150]
    codes = np.clip(np.round(held.astype(np.float32) / step), -8, 7)
    np.testing.assert_array_equal(found.codes.numpy(), codes)
    least = found.dequantize().double() - torch.from_numpy(held)
    nearest = quantize(torch.from_numpy(held).float(), parse_choice("w4a8_g32:rtn")).dequantize().double()
    assert float(least.norm()) < float((nearest - torch.from_numpy(held)).norm())
    got, wanted = found.operator.apply(x) @ found.dequantize().double().T, x @ weight.double().T
    # Four bits with a scale for 32 of them lose about a tenth; a wrong operator everything.
    assert 0.02 < float((got - wanted).norm() / wanted.norm()) < 0.2


def test_its_bytes_are_counted() -> None:
    """An order of 256 channels in 32 bits, four matrices of 64 x 64 in 16."""
    plain, turned = (
        build_groups(table([scored("layer", {parse_choice(f"w4a8_g32{method}"): 0.1, FULL: 0.0}, inputs=256)]),
                     Objective())[0].options[0].size_bits
        for method in ("", ":quantvla")
    )  # fmt: skip
    assert turned - plain == 32 * 256 + 16 * 4 * 64**2


def test_a_block_of_one_is_refused() -> None:
    with pytest.raises(ArtefactError, match="quantvla: block=1: expected at least 2"):
        found_operator(normal(4, 8), {"block": 1})
