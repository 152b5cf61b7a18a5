"""What a kernel takes of a multiprocessor, as the assembler says, and how many of its blocks fit on one at once.

Limits are those of NVIDIA's CUDA programming guide, "Compute Capabilities": registers are given to a warp in units of
256, shared memory to a block in units of 128 bytes beside 1 KiB that the system takes. Nothing is measured here.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine_build.backends.tensorrt.kernels import Kernel, compile_ptx
from vla_policy.core.errors import ArtefactError

_REGISTERS, _WARP, _REGISTER_UNIT, _SHARED_UNIT, _SYSTEM = 65536, 32, 256, 128, 1024
STATIC_SHARED_BYTES = 48 * 1024
"""Of a block that asks for no more."""
MOST_REGISTERS = 255
"""Of a thread."""


@dataclass(frozen=True)
class Multiprocessor:
    """capability: (major, minor). shared_bytes: for all blocks. warps, blocks: at most."""

    capability: tuple[int, int]
    shared_bytes: int
    warps: int
    blocks: int


MULTIPROCESSORS = (
    Multiprocessor((8, 0), 164 * 1024, 64, 32),
    Multiprocessor((8, 6), 100 * 1024, 48, 16),
    Multiprocessor((8, 7), 164 * 1024, 48, 16),
    Multiprocessor((8, 9), 100 * 1024, 48, 24),
    Multiprocessor((9, 0), 228 * 1024, 64, 32),
)
"""A100; RTX 30; Orin; RTX 40; H100 and H200."""


@dataclass(frozen=True)
class Taken:
    """By a thread: registers, and bytes spilled to memory. By a block: static shared memory, and threads."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int

    def blocks_on(self, one: Multiprocessor) -> int:
        """Blocks that fit on it at once."""
        warps = self.threads // _WARP
        per_warp = -(-self.registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
        shared = -(-self.shared_bytes // _SHARED_UNIT) * _SHARED_UNIT + _SYSTEM
        return min(_REGISTERS // per_warp // warps, one.shared_bytes // shared, one.warps // warps, one.blocks)

    def check(self, kernel: Kernel) -> None:
        """Raises ArtefactError for a kernel that takes more than there is, or spills."""
        if self.registers > MOST_REGISTERS or self.shared_bytes > STATIC_SHARED_BYTES or self.spilled_bytes:
            raise ArtefactError(
                f"{kernel.name}: {self.registers} registers (at most {MOST_REGISTERS}), {self.shared_bytes} bytes of "
                f"shared memory (at most {STATIC_SHARED_BYTES}), {self.spilled_bytes} bytes spilled; cut it smaller"
            )


def taken(kernel: Kernel, capability: tuple[int, int]) -> Taken:
    """By the kernel on a GPU of this compute capability. Raises ArtefactError as `compile_ptx` does."""
    return assembled(compile_ptx(kernel, capability), kernel, capability)


def assembled(ptx: str, kernel: Kernel, capability: tuple[int, int], out: Path | None = None) -> Taken:
    """The same of its PTX. out: where the machine code goes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        architecture, cubin = "-arch=sm_{}{}".format(*capability), str(out or Path(folder) / "kernel.cubin")
        command = ["ptxas", architecture, "-v", "-o", cubin, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    numbers = re.search(
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        done.stderr,
        re.DOTALL,
    )
    if done.returncode != 0 or numbers is None:
        raise ArtefactError(f"{kernel.name}: ptxas {architecture} failed ({' '.join(done.stderr.split())[:300]})")
    stores, loads, registers, shared = (int(number or 0) for number in numbers.groups())
    return Taken(registers, stores + loads, shared, kernel.threads)


def table(kernels: Sequence[Kernel]) -> str:
    """Registers, shared memory and, on every GPU, the blocks and warps that run on a multiprocessor at once."""
    titles = "".join(f"{'sm_{}{}'.format(*one.capability):>20}" for one in MULTIPROCESSORS)
    lines = [f"{'registers, shared KiB: blocks (warps)':40}" + titles]
    with ThreadPoolExecutor() as pool:
        cells = pool.map(lambda pair: _cell(*pair), itertools.product(kernels, MULTIPROCESSORS))
        for kernel in kernels:
            row = itertools.islice(cells, len(MULTIPROCESSORS))
            lines.append(f"{kernel.name:40}" + "".join(f"{cell:>20}" for cell in row))
    return "\n".join(lines)


def _cell(kernel: Kernel, one: Multiprocessor) -> str:
    used = taken(kernel, one.capability)
    used.check(kernel)
    blocks = used.blocks_on(one)
    return f"{used.registers}, {used.shared_bytes / 1024:.1f}: {blocks} ({blocks * used.threads // _WARP})"
