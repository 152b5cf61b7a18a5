"""CUDA kernels for the formats that TensorRT has none for, compiled ahead of time to PTX that the engine carries.

CUDA C++ rather than Triton: nvcc comes with JetPack, Triton does not; and the codes can be laid out so that they arrive
in the fragments of a tensor-core instruction, without shuffles. TensorRT hands the PTX to the driver, which fits it to
the GPU.
"""

import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engine_build.backends.base import SLAB
from vla_policy.core.errors import ArtefactError

NAMESPACE = "vla_policy"
"""Of the plugins that hold the kernels, and of the graph nodes that name them."""

FOLDER = Path(__file__).parent
_WARP, _COLUMNS = 32, 8  # threads of a warp; tokens of a tensor core's product
_QUANTIZERS = 256  # threads that round one token
_WORD_BITS = 32
ROW = 0
GROUPS = (ROW, 32, 64, 128)
"""Inputs per scale that the kernels are compiled for; one scale per row leaves nothing to do before a row's end."""


@dataclass(frozen=True)
class Few:
    """A product cut for decode steps: a thread block's `warps` share the inputs of 16 outputs and 8 tokens.

    ahead: runs of 128 inputs whose codes a warp asks for at once.
    """

    warps: int
    ahead: int
    name: str = "few"

    outputs, tokens = SLAB, _COLUMNS

    @property
    def definitions(self) -> dict[str, int]:
        return {"FEW": 1, "AHEAD": self.ahead}


@dataclass(frozen=True)
class Many:
    """A product cut for prefill: each of a block's `warps` has 16 `slabs` outputs of the same 8 `tiles` tokens."""

    tiles: int
    slabs: int
    warps: int
    name: str = "many"

    @property
    def tokens(self) -> int:
        return _COLUMNS * self.tiles

    @property
    def outputs(self) -> int:
        return SLAB * self.slabs * self.warps

    @property
    def definitions(self) -> dict[str, int]:
        return {"MANY": 1, "TILES": self.tiles, "SLABS": self.slabs}


FEW = Few(warps=16, ahead=1)
MANY = Many(tiles=4, slabs=2, warps=4)
CUTS: tuple[Few | Many, ...] = (FEW, MANY)
"""TensorRT times both on the device, for each optimisation profile, and keeps the faster."""


@dataclass(frozen=True)
class Kernel:
    """One entry point. family: `W2A16`, `W4A8` or `QUANTIZE_ROWS`; cut and group, one of GROUPS: of the products."""

    family: str
    cut: Few | Many | None = None
    group: int | None = None

    @property
    def name(self) -> str:
        """The entry point's name."""
        cut = f"_{self.cut.name}_{f'g{self.group}' if self.group else 'row'}" if self.cut else ""
        return self.family.lower() + cut

    @property
    def source(self) -> Path:
        """The file that holds it."""
        return FOLDER / ("quantized_matmul.cu" if self.cut else "quantize_rows.cu")

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return _WARP * self.cut.warps if self.cut else _QUANTIZERS

    @property
    def definitions(self) -> list[str]:
        """What the compiler has to be told."""
        named: dict[str, str | int] = {self.family: 1, "NAME": self.name, "THREADS": self.threads}
        if self.cut and self.group is not None:
            named |= self.cut.definitions | {"GROUP": self.group}
        return [f"-D{name}={value}" for name, value in named.items()]


def product_kernel(bits: int, cut: Few | Many, codes: tuple[int, int], scales: tuple[int, int]) -> Kernel:
    """The kernel for codes [out, words] and scales [out, groups] of these shapes, outputs in whole slabs."""
    groups, inputs = scales[1], codes[1] * _WORD_BITS // bits
    return Kernel("W2A16" if bits == 2 else "W4A8", cut, ROW if groups == 1 else inputs // groups)


@functools.cache
def compile_ptx(kernel: Kernel, capability: tuple[int, int]) -> str:
    """PTX of one kernel for a compute capability (major, minor). Raises ArtefactError if nvcc is missing or fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.ptx"
        architecture = f"-arch=compute_{capability[0]}{capability[1]}"
        command = ["nvcc", "-std=c++17", "-ptx", architecture, f"-I{FOLDER}", *kernel.definitions]
        try:
            done = subprocess.run(
                [*command, "-o", str(out), str(kernel.source)], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise ArtefactError(
                f"{kernel.name}: nvcc is not on PATH, and TensorRT has no kernel of its own for this format; install "
                "the CUDA toolkit (JetPack brings it) or plan other formats"
            ) from error
        if done.returncode != 0:
            reason = " ".join(done.stderr.split())[:300]
            raise ArtefactError(f"{kernel.name}: nvcc {architecture} failed ({reason}); check the CUDA toolkit's age")
        return out.read_text(encoding="utf-8")
