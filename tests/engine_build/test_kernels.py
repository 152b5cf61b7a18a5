"""The CUDA kernels: their numbers on a CPU against float64, and their compilation for every target's GPU."""

import itertools
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from choices import rtn
from cpu_kernels import run_kernel

from calibrator.quantizers import QuantizedWeight, quantize
from calibrator.quantizers.activations import quantize_activation
from engine_build.backends.tensorrt import kernels
from engine_build.backends.tensorrt.kernels import (
    CUTS,
    FAMILIES,
    FEW,
    GROUPS,
    MANY,
    MOST_PARTS,
    ROUNDING,
    ROW,
    Cut,
    Family,
    Kernel,
    compile_ptx,
    grid_outputs,
    product_kernel,
    roofline,
)
from engine_build.backends.tensorrt.kernels.occupancy import MULTIPROCESSORS, Taken, assembled
from engine_build.backends.tensorrt.kernels.roofline import KINDS, MACHINES, PREFILL, bound
from engine_build.packing import RUN, SLAB, pack_runs, pack_scales
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.targets import TARGETS

W2A16, W4A16, W4A8 = FAMILIES
COMPILED = [ROUNDING, Kernel(W4A8, MANY, 128, 2)] + [
    Kernel(family, cut, group, MOST_PARTS if group in (ROW, 32) else 1)
    for family, cut, group in itertools.product(FAMILIES, CUTS, GROUPS)
]
CAPABILITIES = sorted({target.compute_capability for target in TARGETS.values() if target.compute_capability})
GPUS = sorted({*CAPABILITIES, (8, 6), (8, 9), (12, 0)})

on_cpu = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the kernels on the CPU")
with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of the CUDA toolkit")


@dataclass(frozen=True)
class Case:
    """A product's sizes. group: inputs per scale, None for one scale per row."""

    tokens: int
    outputs: int
    inputs: int
    group: int | None


# One token, a whole tile, more; outputs beside 16, 64 and 128; whole and ragged runs, groups, blocks and stages.
CASES = [
    Case(1, 16, 128, 128),
    Case(1, 40, 1288, None),
    Case(3, 17, 24, 32),
    Case(8, 33, 392, 64),
    Case(9, 130, 264, 32),
    Case(70, 16, 160, None),
    Case(66, 144, 520, 128),  # more than one block of the cut for many, on both sides
]


def multiply(
    family: Family, cut: Cut, x: torch.Tensor, matrices: list[QuantizedWeight], backwards: bool = False
) -> list[np.ndarray]:
    """y [tokens, out], float16, of each matrix, in one launch; through `quantize_rows` for 8-bit activations."""
    tokens, width = x.shape
    packed = []
    for one in matrices:
        codes = pack_runs(one.codes.numpy(), family.weight_bits)
        packed.append((codes, pack_scales(one.scales.numpy().astype(np.float16), width, one.format.group_size)))
    rows = [len(codes) for codes, _ in packed]
    results = [np.full((tokens, count), np.nan, np.float16) for count in rows]
    inputs, count = [x.numpy()], width
    if family.rounded:
        count = -(-width // RUN) * RUN
        inputs = [np.zeros((tokens, count // 4), np.int32), np.zeros(tokens, np.float32)]
        run_kernel(ROUNDING, (tokens, 1), [x.numpy(), width, *inputs], backwards)
    codes, scales = packed[0]
    kernel = product_kernel(family, cut, codes.shape, scales.shape, len(matrices))
    grid = (grid_outputs(cut, rows), -(-tokens // cut.tokens))
    given = [*inputs, *itertools.chain(*packed), tokens, count, scales.shape[1], *rows, *results]
    run_kernel(kernel, grid, given, backwards)
    for one, y in zip(matrices, results, strict=True):
        assert not y[:, len(one.codes) :].any()
    return [y[:, : len(one.codes)] for one, y in zip(matrices, results, strict=True)]


def random_case(case: Case, family: Family, parts: int = 1) -> tuple[torch.Tensor, list[QuantizedWeight]]:
    """Tokens, and so many matrices, each of 16 outputs more than the one before."""
    generator = torch.Generator().manual_seed(case.inputs * 31 + case.outputs)
    x = torch.randn(case.tokens, case.inputs, generator=generator).half()
    choice = rtn(Format(family.weight_bits, family.activation_bits, case.group))
    sizes = [case.outputs + 16 * part for part in range(parts)]
    weights = [torch.randn(size, case.inputs, generator=generator) / case.inputs**0.5 for size in sizes]
    return x, [quantize(weight, choice) for weight in weights]


def check(family: Family, y: np.ndarray, x: torch.Tensor, quantized: QuantizedWeight) -> None:
    """`y` against the sum in float64, to the rounding of the result and of float32 sums.

    These sums are made of at most some 80 slices of 16 products each, whose own error is far below their bound.
    """
    seen = quantize_activation(x.float(), 8) if family.rounded else x
    weight = quantized.dequantize()
    expected = (seen.double() @ weight.double().T).numpy()
    allowed = rounding.HALF * np.abs(expected)
    allowed += 2.0**-20 * rounding.magnitude(seen.float().numpy(), weight.numpy()) + 1e-7
    assert (np.abs(y - expected) <= allowed).all()


@on_cpu
@pytest.mark.parametrize(
    ("case", "cut"),
    [*itertools.product(CASES[:-1], CUTS), (CASES[-1], MANY)],
    ids=lambda one: getattr(one, "name", None),
)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_products_are_those_of_float64(case: Case, family: Family, cut: Cut) -> None:
    x, (quantized,) = random_case(case, family)
    (y,) = multiply(family, cut, x, [quantized])
    check(family, y, x, quantized)
    # The same compiled code: bits may differ only if threads do not wait for each other.
    (again,) = multiply(family, cut, x, [quantized], backwards=True)
    np.testing.assert_array_equal(y, again)


@on_cpu
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_launch_multiplies_by_several_matrices(family: Family, cut: Cut, parts: int) -> None:
    """Each result is the one that its matrix has alone, bit for bit; the parts end within a thread block's outputs."""
    x, matrices = random_case(Case(5, 120, 264, 64), family, parts)
    together = multiply(family, cut, x, matrices)
    for y, quantized in zip(together, matrices, strict=True):
        check(family, y, x, quantized)
        np.testing.assert_array_equal(y, multiply(family, cut, x, [quantized])[0])


@on_cpu
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_code_at_every_place_counts_once(family: Family, cut: Cut) -> None:
    """One input at a time is 1: the results are the codes themselves, zero scales silence their groups."""
    bits = family.weight_bits
    rng, low, high = np.random.default_rng(bits), -(1 << bits - 1), (1 << bits - 1) - 1
    codes = rng.integers(low, high + 1, (16, RUN)).astype(np.int8)
    codes[0], codes[1] = low, high
    scales = np.tile(np.array([1, 0, 0.5, 2], np.float32), (len(codes), 1))
    fmt = Format(bits, family.activation_bits, 32)
    quantized = QuantizedWeight(torch.from_numpy(codes), torch.from_numpy(scales), fmt, codes.shape)
    (result,) = multiply(family, cut, torch.eye(RUN).half(), [quantized])
    y = result.astype(np.float32)
    # The rounded token is 127 codes of 1 / 127: a product in float32, exact up to its last place.
    np.testing.assert_allclose(y, (codes * scales.repeat(32, 1)).T, rtol=1e-3)


@on_cpu
def test_tokens_are_rounded_as_the_calibrator_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 72, generator=generator).half()
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 0], x[3, 1:] = 127, torch.arange(71) / 2  # halves round to even
    codes, scales = np.zeros((5, RUN // 4), np.int32), np.zeros(5, np.float32)
    run_kernel(ROUNDING, (5, 1), [x.numpy(), 72, codes, scales])
    rounded = codes.view(np.int8)[:, :72] * scales[:, None].astype(np.float64)
    whole = [0, 1, 3, 4]
    # Equal codes; peak / 127 and its product with a code are two roundings on either side.
    np.testing.assert_allclose(
        rounded[whole], quantize_activation(x.float(), 8)[whole].numpy(), rtol=4 * rounding.SINGLE
    )
    assert scales[1] == 1
    assert np.isnan(scales[2])
    assert not codes.view(np.int8)[:, 72:].any()


def test_words_hold_what_their_layout_says() -> None:
    """Every lane of the second slab's second run, read by the rule at the head of the kernels."""
    rng = np.random.default_rng(3)
    for bits in (2, 4):
        codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (20, 200)).astype(np.int8)
        words = pack_runs(codes, bits).view(np.uint32).reshape(2, 2, -1)[1, 1]
        run = np.pad(codes, ((0, 12), (0, 56)))[SLAB:, RUN:]
        mask = (1 << bits) - 1
        for lane, half, block in np.ndindex(32, 2, 4):
            expected = run[lane // 4 + 8 * half, 32 * block + 8 * (lane % 4) :][:8] & mask
            if bits == 2:
                word = int(words.reshape(32, 2, 2)[lane, half, block // 2]) >> 8 * (block % 2)
                places = [2 * (k // 2) + 16 * (k % 2) for k in range(8)]
            else:
                word = int(words.reshape(2, 32, 4)[half, lane, block])
                places = [8 * (k % 4) + 4 * (k // 4) for k in range(8)]
            assert [word >> place & mask for place in places] == expected.tolist()


def test_scales_lie_in_pairs_and_are_filled_up() -> None:
    scales = np.arange(20 * 3, dtype=np.float16).reshape(20, 3)
    packed = pack_scales(scales, inputs=90, group=32).reshape(2, 4, 8, 2)
    filled = np.pad(scales, ((0, 12), (0, 1)))
    for slab, group, row, half in np.ndindex(packed.shape):
        assert packed[slab, group, row, half] == filled[16 * slab + 8 * half + row, group]
    assert pack_scales(scales[:, :1], inputs=90, group=None).shape == (32, 1)


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("inputs", [8, 128, 136, 1152, 4304])
def test_kernels_follow_from_shapes(inputs: int, group: int | None) -> None:
    words = pack_runs(np.zeros((1, inputs), np.int8), 2)
    scales = pack_scales(np.zeros((1, -(-inputs // group) if group else 1), np.float16), inputs, group)
    kernel = product_kernel(W2A16, FEW, words.shape, scales.shape)
    assert kernel.group == (ROW if scales.shape[1] == 1 else group)


@on_cpu
def test_the_largest_sums_of_a_group_stay_exact() -> None:
    """Codes of -8 and 127 throughout: the integer sum of a whole group, and of a row, at its largest."""
    for group in (None, RUN):
        codes = torch.full((16, 4 * RUN), -8, dtype=torch.int8)
        scales = torch.ones(16, 1 if group is None else 4)
        quantized = QuantizedWeight(codes, scales, Format(4, 8, group), codes.shape)
        x = torch.full((1, 4 * RUN), 1 / 64).half()
        for cut in CUTS:
            (y,) = multiply(W4A8, cut, x, [quantized])
            np.testing.assert_array_equal(y, np.float16(-8 * 4 * RUN / 64))


@with_nvcc
@pytest.mark.parametrize("kernel", COMPILED, ids=lambda kernel: kernel.name)
def test_kernels_compile_for_every_gpu(kernel: Kernel, tmp_path: Path) -> None:
    """The PTX that an engine would carry, assembled as the driver does: entry point, architecture, registers without
    spilling and no more shared memory than is there without asking."""
    ptx, cubin = compile_ptx(kernel, (8, 0)), tmp_path / "kernel.cubin"
    for major, minor in GPUS if kernel.group == ROW else CAPABILITIES:
        assembled(ptx, kernel, (major, minor), cubin).check(kernel)
        content = cubin.read_bytes()
        assert architecture(content) == 10 * major + minor
        assert kernel.name.encode() in content


def test_blocks_are_bound_by_what_runs_out_first() -> None:
    """By hand: 65,536 registers, 164 KiB of shared memory and 48 warps of an Orin's multiprocessor."""
    orin = next(one for one in MULTIPROCESSORS if one.capability == (8, 7))
    assert Taken(168, 0, 32832, 128).blocks_on(orin) == 3  # 65536 / (168 * 128)
    assert Taken(32, 0, 32 * 1024, 128).blocks_on(orin) == 4  # 164 / 33
    assert Taken(32, 0, 1024, 512).blocks_on(orin) == 3  # 48 / 16
    with pytest.raises(ArtefactError, match=r"w2a16_few_row: 168 registers .*, 8 bytes spilled; cut it smaller"):
        Taken(168, 8, 0, 128).check(Kernel(W2A16, FEW))


@with_nvcc
@pytest.mark.parametrize("capability", GPUS, ids=str)
def test_ptx_is_made_for_the_gpu_that_is_asked_for(capability: tuple[int, int]) -> None:
    ptx = compile_ptx(Kernel(W4A8, MANY, 64, 2), capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry w4a8_many_g64_x2(" in ptx
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in ptx
    assert "cp.async.cg.shared.global" in ptx


def test_bounds_are_bytes_over_bandwidth_or_sums_over_peak() -> None:
    """Computed by hand for the attention's products on an A100: 2,039 GB/s, 312 and 624 T/s."""
    a100, _ = MACHINES
    kinds = {kind.name: kind for kind in KINDS}
    one = {name: bound(a100, kind, 1, 4096, 4096) for name, kind in kinds.items()}
    assert one["bf16"].us == pytest.approx((4096 * 4096 * 2 + 2 * 4096 * 2) / 2039e3)
    assert one["w4a8"].us == pytest.approx((4096 * 4096 / 2 + 4096 * 32 * 2 + 4096 * 3) / 2039e3)
    assert one["bf16"].us / one["w2a16"].us == pytest.approx(16 / (2 + 16 / 128), rel=0.01)
    many = {name: bound(a100, kind, PREFILL, 4096, 4096) for name, kind in kinds.items()}
    assert many["w2a16"].us == many["bf16"].us == pytest.approx(2 * 290 * 4096 * 4096 / 312e6)
    assert many["bf16"].us == 2 * many["w4a8"].us
    assert roofline.table().count("AGX Orin") == 10


def architecture(cubin: bytes) -> int:
    """Compute capability that a cubin was made for: bits 8 to 15 of e_flags, or the lowest byte in older files."""
    assert cubin[:4] == b"\x7fELF"
    (flags,) = struct.unpack_from("<I", cubin, 48)
    return flags >> 8 & 0xFF or flags & 0xFF


def test_without_a_compiler_the_format_and_the_remedy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    compile_uncached = kernels.compile_ptx.__wrapped__
    with pytest.raises(ArtefactError, match=r"w2a16_few_g32: nvcc is not on PATH, .* install the CUDA toolkit"):
        compile_uncached(Kernel(W2A16, FEW, 32), (8, 7))
