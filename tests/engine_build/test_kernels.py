"""The CUDA kernels: their numbers on a CPU against float64, and their compilation for every target's GPU."""

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_kernels import run_kernel

from calibrator.quantization import QuantizedWeight, groups_per_row, quantize_activation, quantize_weight
from engine_build import kernels
from engine_build.kernels import FEW, MANY, SCALARS, TILES, Kernel, Tile, compile_ptx, group_log2, numbers_of
from engine_build.packing import RUN, pack_runs
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.targets import TARGETS

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}
ULP = {"f16": 2.0**-11, "bf16": 2.0**-8}
ALL = [Kernel(family, scalar, tile) for family in ("W2A16", "W4A8") for scalar in SCALARS for tile in TILES]
ALL += [Kernel("QUANTIZE_ROWS", scalar) for scalar in SCALARS]
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


# One token, a whole tile, more; outputs beside 16 and 128; whole and ragged runs, groups and blocks.
CASES = [
    Case(1, 16, 128, 128),
    Case(1, 40, 1288, None),
    Case(3, 17, 24, 32),
    Case(8, 33, 392, 64),
    Case(9, 130, 264, 32),
    Case(33, 16, 160, None),
]


def bits_of(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().copy()


def from_bits(bits: np.ndarray, scalar: str) -> torch.Tensor:
    return torch.from_numpy(bits).view(TORCH[scalar])


def scales_of(quantized: QuantizedWeight, case: Case) -> np.ndarray:
    """float16 [out, groups], filled up to whole runs as the exporter does, with numbers that must not matter."""
    scales = quantized.scales.numpy().astype(np.float16)
    if case.group is None:
        return scales
    groups = -(-case.inputs // RUN) * RUN // case.group
    return np.pad(scales, ((0, 0), (0, groups - scales.shape[1])), constant_values=np.float16(77))


def product(
    tile: Tile, scalar: str, x: torch.Tensor, quantized: QuantizedWeight, case: Case, backwards: bool = False
) -> torch.Tensor:
    """y [tokens, out] by the kernels, through `quantize_rows` for 8-bit activations."""
    bits = quantized.format.weight_bits
    codes, scales = pack_runs(quantized.codes.numpy(), bits), scales_of(quantized, case)
    y = np.full((case.tokens, case.outputs), -1, np.int16)
    grid = (-(-case.outputs // tile.outputs), -(-case.tokens // tile.tokens))
    if bits == 2:
        inputs = [bits_of(x)]
    else:
        words = -(-case.inputs // RUN) * RUN // 4
        inputs = [np.zeros((case.tokens, words), np.int32), np.zeros(case.tokens, np.float32)]
        run_kernel(Kernel("QUANTIZE_ROWS", scalar), (case.tokens, 1), [bits_of(x), case.inputs, *inputs], backwards)
    numbers = [case.tokens, *numbers_of(bits, case.inputs, codes.shape, scales.shape)]
    family = "W2A16" if bits == 2 else "W4A8"
    run_kernel(Kernel(family, scalar, tile), grid, [*inputs, codes, scales, *numbers, y], backwards)
    return from_bits(y, scalar)


def random_case(case: Case, scalar: str, bits: int) -> tuple[torch.Tensor, QuantizedWeight]:
    generator = torch.Generator().manual_seed(case.inputs * 31 + case.outputs)
    x = torch.randn(case.tokens, case.inputs, generator=generator).to(TORCH[scalar])
    weight = torch.randn(case.outputs, case.inputs, generator=generator) / case.inputs**0.5
    return x, quantize_weight(weight, Format(bits, 16 if bits == 2 else 8, case.group))


def check(y: torch.Tensor, x: torch.Tensor, quantized: QuantizedWeight, scalar: str) -> None:
    """`y` against the sum in float64, to the rounding of the result and of float32 sums."""
    expected = x.double() @ quantized.dequantize().double().T
    size = x.double().abs() @ quantized.dequantize().double().abs().T
    allowed = ULP[scalar] * expected.abs() + 2.0**-20 * size + 1e-7
    assert bool(((y.double() - expected).abs() <= allowed).all())


@on_cpu
@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_bit_weights(case: Case, tile: Tile, scalar: str) -> None:
    x, quantized = random_case(case, scalar, 2)
    y = product(tile, scalar, x, quantized, case)
    check(y, x, quantized, scalar)
    assert torch.equal(y, product(tile, scalar, x, quantized, case, backwards=True))


@on_cpu
@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("case", [*CASES, Case(2, 20, 75, 64)], ids=str)
def test_four_bit_weights_with_eight_bit_activations(case: Case, tile: Tile, scalar: str) -> None:
    x, quantized = random_case(case, scalar, 4)
    y = product(tile, scalar, x, quantized, case)
    check(y, quantize_activation(x.float(), 8), quantized, scalar)
    assert torch.equal(y, product(tile, scalar, x, quantized, case, backwards=True))


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
    y = product(MANY, "f16", torch.eye(RUN).half(), quantized, case).float().numpy()
    # The rounded token is 127 codes of 1 / 127: a product in float32, exact up to its last place.
    np.testing.assert_allclose(y, (codes * scales.repeat(32, 1)).T, rtol=1e-3)


@on_cpu
def test_tokens_are_rounded_as_the_calibrator_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 75, generator=generator).half()
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 0], x[3, 1:] = 127, torch.arange(74) / 2  # halves round to even
    codes, scales = np.zeros((5, RUN // 4), np.int32), np.zeros(5, np.float32)
    run_kernel(Kernel("QUANTIZE_ROWS", "f16"), (5, 1), [bits_of(x), 75, codes, scales])
    rounded = codes.view(np.int8)[:, :75] * scales[:, None].astype(np.float64)
    whole = [0, 1, 3, 4]
    np.testing.assert_allclose(rounded[whole], quantize_activation(x.float(), 8)[whole].numpy(), rtol=1e-6)
    assert scales[1] == 1
    assert np.isnan(scales[2])
    assert not codes.view(np.int8)[:, 75:].any()


def test_words_hold_what_their_layout_says() -> None:
    """Lane 1 of the second run, read by the rule in the kernel's first comment."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-2, 2, (2, 200)).astype(np.int8)
    words = pack_runs(codes, 2).view(np.uint32).reshape(2, -1, 4, 2)
    filled = np.pad(codes, ((0, 0), (0, 56))).reshape(2, 2, RUN)
    for block in range(4):
        for pair in range(4):
            word = words[1, 1, 1, block // 2] >> np.uint32(8 * (block % 2) + 2 * pair)
            k = 32 * block + 8 + 2 * pair
            assert (int(word) & 3, int(word) >> 16 & 3) == (filled[1, 1, k] & 3, filled[1, 1, k + 1] & 3)


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("inputs", [8, 128, 136, 1152, 4304])
def test_group_sizes_follow_from_shapes(inputs: int, group: int | None) -> None:
    runs = -(-inputs // RUN)
    groups = runs * RUN // group if group else 1
    assert groups >= groups_per_row(inputs, Format(2, 16, group))
    for bits in (2, 4):
        log2 = group_log2(groups, runs * 4 * bits, bits)
        assert all(k >> log2 == (k // group if group else 0) for k in range(inputs)) or (groups == 1 and log2 == 31)


@with_nvcc
@pytest.mark.parametrize("kernel", [kernel for kernel in ALL if kernel.scalar == "f16"], ids=lambda kernel: kernel.name)
def test_kernels_compile_for_every_gpu(kernel: Kernel, tmp_path: Path) -> None:
    """The PTX that an engine would carry, assembled as the driver does: entry point, architecture, registers."""
    source = tmp_path / "kernel.ptx"
    source.write_text(compile_ptx(kernel, (8, 0)))
    for major, minor in CAPABILITIES:
        cubin = tmp_path / "kernel.cubin"
        command = ["ptxas", f"-arch=sm_{major}{minor}", "-v", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.search(r"0 bytes spill stores, 0 bytes spill loads", done.stderr)
        content = cubin.read_bytes()
        assert architecture(content) == 10 * major + minor
        assert kernel.name.encode() in content


@with_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_ptx_is_made_for_the_gpu_that_is_asked_for(capability: tuple[int, int]) -> None:
    ptx = compile_ptx(Kernel("W4A8", "bf16", FEW), capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry w4a8_few_bf16(" in ptx
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in ptx


def architecture(cubin: bytes) -> int:
    """Compute capability that a cubin was made for: bits 8 to 15 of e_flags, or the lowest byte in older files."""
    assert cubin[:4] == b"\x7fELF"
    (flags,) = struct.unpack_from("<I", cubin, 48)
    return flags >> 8 & 0xFF or flags & 0xFF


def test_without_a_compiler_the_format_and_the_remedy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    compile_uncached = kernels.compile_ptx.__wrapped__
    with pytest.raises(ArtefactError, match=r"w2a16_few_f16: nvcc is not on PATH, .* install the CUDA toolkit"):
        compile_uncached(Kernel("W2A16", "f16", FEW), (8, 7))
