"""The CUDA kernels: their numbers on a CPU against float64, and their compilation for every target's GPU."""

import re
import shutil
import struct
import subprocess
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
    FEW,
    GROUPS,
    MANY,
    ROW,
    Few,
    Kernel,
    Many,
    compile_ptx,
    product_kernel,
    roofline,
)
from engine_build.backends.tensorrt.kernels.roofline import KINDS, MACHINES, PREFILL, bound
from engine_build.packing import RUN, SLAB, pack_runs, pack_scales
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.targets import TARGETS

FAMILIES = ("W2A16", "W4A8")
ALL = [Kernel(family, cut, group) for family in FAMILIES for cut in CUTS for group in GROUPS] + [
    Kernel("QUANTIZE_ROWS")
]
CAPABILITIES = sorted({target.compute_capability for target in TARGETS.values() if target.compute_capability})

on_cpu = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the kernels on the CPU")
with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of the CUDA toolkit")


@dataclass(frozen=True)
class Case:
    """A product's sizes. group: inputs per scale, None for one scale per row."""

    tokens: int
    outputs: int
    inputs: int
    group: int | None


# One token, a whole tile, more; outputs beside 16 and 64; whole and ragged runs, groups and blocks.
CASES = [
    Case(1, 16, 128, 128),
    Case(1, 40, 1288, None),
    Case(3, 17, 24, 32),
    Case(8, 33, 392, 64),
    Case(9, 130, 264, 32),
    Case(70, 16, 160, None),
]


def product(
    cut: Few | Many, x: torch.Tensor, quantized: QuantizedWeight, case: Case, backwards: bool = False
) -> np.ndarray:
    """y [tokens, out], float16, by the kernels, through `quantize_rows` for 8-bit activations."""
    bits = quantized.format.weight_bits
    codes = pack_runs(quantized.codes.numpy(), bits)
    scales = pack_scales(quantized.scales.numpy().astype(np.float16), case.inputs, case.group)
    y = np.full((case.tokens, len(codes)), np.nan, np.float16)
    grid = (-(-len(codes) // cut.outputs), -(-case.tokens // cut.tokens))
    inputs, count = [x.numpy()], case.inputs
    if bits == 4:
        count = -(-case.inputs // RUN) * RUN
        inputs = [np.zeros((case.tokens, count // 4), np.int32), np.zeros(case.tokens, np.float32)]
        run_kernel(Kernel("QUANTIZE_ROWS"), (case.tokens, 1), [x.numpy(), case.inputs, *inputs], backwards)
    numbers = [case.tokens, len(codes), count, scales.shape[1]]
    kernel = product_kernel(bits, cut, codes.shape, scales.shape)
    run_kernel(kernel, grid, [*inputs, codes, scales, *numbers, y], backwards)
    assert not y[:, case.outputs :].any()
    return y[:, : case.outputs]


def random_case(case: Case, bits: int) -> tuple[torch.Tensor, QuantizedWeight]:
    generator = torch.Generator().manual_seed(case.inputs * 31 + case.outputs)
    x = torch.randn(case.tokens, case.inputs, generator=generator).half()
    weight = torch.randn(case.outputs, case.inputs, generator=generator) / case.inputs**0.5
    return x, quantize(weight, rtn(Format(bits, 16 if bits == 2 else 8, case.group)))


def check(y: np.ndarray, x: torch.Tensor, quantized: QuantizedWeight) -> None:
    """`y` against the sum in float64, to the rounding of the result and of float32 sums.

    These sums are made of at most 8 slices of 16 products each, whose own error is far below their bound.
    """
    weight = quantized.dequantize()
    expected = (x.double() @ weight.double().T).numpy()
    allowed = rounding.HALF * np.abs(expected) + 2.0**-20 * rounding.magnitude(x.numpy(), weight.numpy()) + 1e-7
    assert (np.abs(y - expected) <= allowed).all()


@on_cpu
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_bit_weights(case: Case, cut: Few | Many) -> None:
    x, quantized = random_case(case, 2)
    y = product(cut, x, quantized, case)
    check(y, x, quantized)
    # The same compiled code: bits may differ only if threads do not wait for each other.
    np.testing.assert_array_equal(y, product(cut, x, quantized, case, backwards=True))


@on_cpu
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_bit_weights_with_eight_bit_activations(case: Case, cut: Few | Many) -> None:
    x, quantized = random_case(case, 4)
    y = product(cut, x, quantized, case)
    check(y, quantize_activation(x.float(), 8), quantized)
    np.testing.assert_array_equal(y, product(cut, x, quantized, case, backwards=True))


@on_cpu
@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (4, -8, 7)])
def test_every_code_at_every_place_counts_once(bits: int, low: int, high: int) -> None:
    """One input at a time is 1: the results are the codes themselves, zero scales silence their groups."""
    case = Case(RUN, 16, RUN, 32)
    rng = np.random.default_rng(bits)
    codes = rng.integers(low, high + 1, (case.outputs, case.inputs)).astype(np.int8)
    codes[0], codes[1] = low, high
    scales = np.tile(np.array([1, 0, 0.5, 2], np.float32), (case.outputs, 1))
    fmt = Format(bits, 16 if bits == 2 else 8, 32)
    quantized = QuantizedWeight(torch.from_numpy(codes), torch.from_numpy(scales), fmt, codes.shape)
    y = product(MANY, torch.eye(RUN).half(), quantized, case).astype(np.float32)
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
    run_kernel(Kernel("QUANTIZE_ROWS"), (5, 1), [x.numpy(), 72, codes, scales])
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
    kernel = product_kernel(2, FEW, words.shape, scales.shape)
    assert kernel.group == (ROW if scales.shape[1] == 1 else group)


@with_nvcc
@pytest.mark.parametrize("kernel", ALL, ids=lambda kernel: kernel.name)
def test_kernels_compile_for_every_gpu(kernel: Kernel, tmp_path: Path) -> None:
    """The PTX that an engine would carry, assembled as the driver does: entry point, architecture, registers."""
    source = tmp_path / "kernel.ptx"
    source.write_text(compile_ptx(kernel, (8, 0)))
    for major, minor in CAPABILITIES:
        cubin = tmp_path / "kernel.cubin"
        command = ["ptxas", f"-arch=sm_{major}{minor}", "-v", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.search(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", done.stderr)
        content = cubin.read_bytes()
        assert architecture(content) == 10 * major + minor
        assert kernel.name.encode() in content


@with_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_ptx_is_made_for_the_gpu_that_is_asked_for(capability: tuple[int, int]) -> None:
    ptx = compile_ptx(Kernel("W4A8", FEW, 64), capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry w4a8_few_g64(" in ptx
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in ptx


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
        compile_uncached(Kernel("W2A16", FEW, 32), (8, 7))
