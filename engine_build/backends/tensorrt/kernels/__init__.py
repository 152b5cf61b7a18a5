"""CUDA kernels for the formats that TensorRT has none for, compiled ahead of time to PTX that the engine carries.

CUDA C++ rather than Triton: nvcc comes with JetPack, Triton does not; and the codes can be laid out so that they arrive
in the fragments of a tensor-core instruction, without shuffles. TensorRT hands the PTX to the driver, which fits it to
the GPU.
"""

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_build.backends.base import SLAB
from vla_policy.core.errors import ArtefactError

NAMESPACE, VERSION = "vla_policy", "1"
"""Namespace and version of the plugins that hold the kernels, and of the graph nodes that name them."""

FOLDER = Path(__file__).parent
_WARP, _COLUMNS = 32, 8  # threads of a warp; tokens of a tensor core's product
_QUANTIZERS = 256  # threads that round one token
_WORD_BITS = 32
ROW = 0
GROUPS = (ROW, 32, 64, 128)
"""Inputs per scale that the kernels are compiled for; one scale per row leaves nothing to do before a row's end."""


@dataclass(frozen=True)
class Family:
    """Products of one kind: bits of weights and activations. 8-bit activations come with a scale per token."""

    weight_bits: int
    activation_bits: int

    @property
    def name(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def rounded(self) -> bool:
        """Whether `quantize_rows` has rounded the tokens."""
        return self.activation_bits == 8


FAMILIES = (Family(2, 16), Family(4, 16), Family(4, 8))
MOST_PARTS = 3
"""Matrices of one input that a launch multiplies at most: q, k and v."""


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
    """A product cut for prompts: each of a block's `warps` has 16 `slabs` outputs of the same `tokens`.

    stages: of asynchronous copies, of 128 bytes a token. All of them, and the block's results, fit in the 48 KiB of
    shared memory that a kernel has without asking for more, which an ahead-of-time plugin of TensorRT cannot.
    """

    tokens: int
    slabs: int
    warps: int
    stages: int
    name: str = "many"

    @property
    def outputs(self) -> int:
        return SLAB * self.slabs * self.warps

    @property
    def definitions(self) -> dict[str, int]:
        return {"MANY": 1, "TOKENS": self.tokens, "SLABS": self.slabs, "STAGES": self.stages}


Cut = Few | Many
FEW = Few(warps=16, ahead=1)
MANY = Many(tokens=64, slabs=2, warps=4, stages=4)
CUTS: tuple[Cut, ...] = (FEW, MANY)
"""TensorRT times both on the device, at the typical rows of each optimisation profile, and keeps the faster."""


@dataclass(frozen=True)
class Kernel:
    """One entry point: a product, or without a family the rounding of tokens to 8 bits.

    cut, group (one of GROUPS), parts (matrices, 1 to MOST_PARTS): of the products.
    """

    family: Family | None = None
    cut: Cut | None = None
    group: int = ROW
    parts: int = 1

    @property
    def name(self) -> str:
        """The entry point's name."""
        if self.family is None or self.cut is None:
            return "quantize_rows"
        scales, parts = f"g{self.group}" if self.group else "row", f"_x{self.parts}" if self.parts > 1 else ""
        return f"{self.family.name}_{self.cut.name}_{scales}{parts}"

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
        named: dict[str, str | int] = {"NAME": self.name, "THREADS": self.threads}
        if self.family and self.cut:
            named |= {self.family.name.upper(): 1, "GROUP": self.group, "PARTS": self.parts}
            named |= self.cut.definitions | {"BLOCK_OUTPUTS": self.cut.outputs}
        return [f"-D{name}={value}" for name, value in named.items()]


ROUNDING = Kernel()
"""Rounds tokens to 8 bits, for the families that want them so."""


def node_name(family: Family, parts: int) -> str:
    """Of the plugin, and of the nodes, that multiply by so many matrices of one input."""
    return family.name + (f"_x{parts}" if parts > 1 else "")


def product_kernel(family: Family, cut: Cut, codes: tuple[int, int], scales: tuple[int, int], parts: int = 1) -> Kernel:
    """The kernel for codes [out, words] and scales [out, groups] of these shapes, outputs in whole slabs."""
    groups, inputs = scales[1], codes[1] * _WORD_BITS // family.weight_bits
    return Kernel(family, cut, ROW if groups == 1 else inputs // groups, parts)


def grid_outputs(cut: Cut, outputs: Sequence[int]) -> int:
    """Thread blocks that the outputs of all parts take."""
    return sum(-(-count // cut.outputs) for count in outputs)


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
