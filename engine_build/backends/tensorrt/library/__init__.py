"""The kernels as a plugin library for releases of TensorRT whose engines carry none, built on the device.

JetPack 6 brings all it takes: nvcc, g++ and TensorRT's headers. The library lies in the engine's folder, whose manifest
has its hash, and is loaded before the engine.
"""

import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from engine_build.backends.base import RUN
from engine_build.backends.tensorrt.kernels import (
    CUTS,
    FAMILIES,
    GROUPS,
    MOST_PARTS,
    NAMESPACE,
    ROUNDING,
    VERSION,
    Kernel,
    compile_ptx,
)
from vla_policy.core.errors import ArtefactError

LAYOUT = 1
"""Of codes and scales as the kernels read them, `pack_runs` and `pack_scales`; engines of another one are refused."""
INCLUDE = "TENSORRT_INCLUDE"
"""Names the folder of TensorRT's headers where the compiler does not know it."""

_SOURCE = Path(__file__).with_name("plugins.cpp")
_EXPORTED = "{ global: getCreators; setLoggerFinder; local: *; };"
KERNELS = (
    ROUNDING,
    *(
        Kernel(family, cut, group, parts)
        for family, cut, group in itertools.product(FAMILIES, CUTS, GROUPS)
        for parts in range(1, MOST_PARTS + 1)
    ),
)


def build_library(out: Path, capability: tuple[int, int], kernels: Sequence[Kernel] = KERNELS) -> None:
    """Writes the library for a GPU of this compute capability.

    Raises ArtefactError where a compiler or TensorRT's headers are missing, with what to install.
    """
    if shutil.which("nvcc") is None:
        raise ArtefactError(
            f"{out}: nvcc is not on PATH, and this TensorRT's engines carry no kernels; install the CUDA toolkit "
            "(JetPack brings it) or plan other formats"
        )
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(functools.partial(compile_ptx, capability=capability), kernels)
        named = dict(
            zip(kernels, tqdm(texts, "compiling kernels", len(kernels), unit="kernel", disable=None), strict=True)
        )
        folder = Path(scratch)
        (folder / "constants.inc").write_text(_constants(named), encoding="utf-8")
        (folder / "exported.map").write_text(_EXPORTED, encoding="utf-8")
        includes = [f"-I{path}" for path in (folder, os.environ.get(INCLUDE)) if path]
        command = ["nvcc", "-std=c++17", "-O2", "-shared", "-cudart=none", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command += ["-Xlinker", f"--version-script={folder / 'exported.map'}", *includes]
        done = subprocess.run(
            [*command, "-o", str(out), str(_SOURCE), "-ldl"], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[:300]
        raise ArtefactError(
            f"{out}: the plugin library does not compile ({reason}); it needs TensorRT's headers (JetPack's "
            f"libnvinfer-headers-dev), which {INCLUDE} can name, and a C++ compiler"
        )


def _constants(texts: dict[Kernel, str]) -> str:
    """What plugins.cpp shares with the packing and the kernels, as C++."""
    families = ", ".join(f'{{"{one.name}", {one.weight_bits}, {one.activation_bits}}}' for one in FAMILIES)
    cuts = ", ".join(
        f'{{"{cut.name}", {cut.outputs}, {cut.tokens}, {Kernel(FAMILIES[0], cut).threads}}}' for cut in CUTS
    )
    lines = [
        f'constexpr char kNamespace[] = "{NAMESPACE}", kVersion[] = "{VERSION}", kRounding[] = "{ROUNDING.name}";',
        f"constexpr int kRun = {RUN}, kMostParts = {MOST_PARTS}, kLayout = {LAYOUT};",
        f"constexpr int kRoundingThreads = {ROUNDING.threads};",
        f"constexpr Family kFamilies[] = {{{families}}};",
        f"constexpr Cut kCuts[] = {{{cuts}}};",
        "constexpr Text kTexts[] = {",
        *(f'{{"{kernel.name}", R"PTX({text})PTX"}},' for kernel, text in texts.items()),
        "};",
    ]
    return "\n".join(lines)
