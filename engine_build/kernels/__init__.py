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

from engine_build.packing import RUN
from vla_policy.core.errors import ArtefactError

NAMESPACE = "vla_policy"
"""Of the plugins that hold the kernels, and of the graph nodes that name them."""

SOURCE = Path(__file__).with_name("quantized_matmul.cu")
_WARP = 32
_QUANTIZERS = 256  # threads that round one token
_WORD_BITS = 32
_ONE_SCALE_PER_ROW = 31
SCALARS = {"f16": "half", "bf16": "__nv_bfloat16"}
"""CUDA's names of the activation types that the kernels are made for."""


@dataclass(frozen=True)
class Tile:
    """How a matrix product is cut: 8-token tiles and 16-output slabs per warp; `split` of the `warps` share a row."""

    name: str
    tiles: int
    slabs: int
    split: int
    warps: int

    @property
    def tokens(self) -> int:
        """Tokens of one thread block."""
        return 8 * self.tiles

    @property
    def outputs(self) -> int:
        """Outputs of one thread block."""
        return 16 * self.slabs * self.warps // self.split


FEW = Tile("few", tiles=1, slabs=1, split=8, warps=8)
MANY = Tile("many", tiles=4, slabs=2, split=1, warps=4)
TILES = (FEW, MANY)
"""For decode steps, where all warps read one row's codes, and for prefill, where codes serve many tokens."""


@dataclass(frozen=True)
class Kernel:
    """One entry point. family: `W2A16`, `W4A8` or `QUANTIZE_ROWS`; scalar: a key of SCALARS; tile: of the products."""

    family: str
    scalar: str
    tile: Tile | None = None

    @property
    def name(self) -> str:
        """The entry point's name."""
        parts = (self.family.lower(), self.tile.name if self.tile else None, self.scalar)
        return "_".join(part for part in parts if part)

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return _WARP * self.tile.warps if self.tile else _QUANTIZERS

    @property
    def definitions(self) -> list[str]:
        """What the compiler has to be told."""
        named = {self.family: 1, "NAME": self.name, "SCALAR": SCALARS[self.scalar], "THREADS": self.threads}
        if self.tile:
            named |= {name.upper(): getattr(self.tile, name) for name in ("tiles", "slabs", "split")}
        return [f"-D{name}={value}" for name, value in named.items()]


def group_log2(groups: int, words: int, bits: int) -> int:
    """What the kernels call `group_log2`, from the shapes of scales [out, groups] and codes [out, words]."""
    return _ONE_SCALE_PER_ROW if groups == 1 else (words * _WORD_BITS // bits // groups).bit_length() - 1


def numbers_of(bits: int, inputs: int, codes: tuple[int, int], scales: tuple[int, int]) -> list[int]:
    """A product's numbers behind its tokens: outputs, inputs, groups, group_log2.

    inputs: of a token as it lies in memory, which 8-bit tokens fill up to whole runs. codes, scales: their shapes.
    """
    if bits == 4:
        inputs = -(-inputs // RUN) * RUN
    return [codes[0], inputs, scales[1], group_log2(scales[1], codes[1], bits)]


@functools.cache
def compile_ptx(kernel: Kernel, capability: tuple[int, int]) -> str:
    """PTX of one kernel for a compute capability (major, minor). Raises ArtefactError if nvcc is missing or fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.ptx"
        architecture = f"-arch=compute_{capability[0]}{capability[1]}"
        command = ["nvcc", "-std=c++17", "-ptx", architecture, f"-I{SOURCE.parent}", *kernel.definitions]
        try:
            done = subprocess.run([*command, "-o", str(out), str(SOURCE)], capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise ArtefactError(
                f"{kernel.name}: nvcc is not on PATH, and TensorRT has no kernel of its own for this format; install "
                "the CUDA toolkit (JetPack brings it) or plan other formats"
            ) from error
        if done.returncode != 0:
            reason = " ".join(done.stderr.split())[:300]
            raise ArtefactError(f"{kernel.name}: nvcc {architecture} failed ({reason}); check the CUDA toolkit's age")
        return out.read_text(encoding="utf-8")
