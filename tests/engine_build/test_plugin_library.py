"""JetPack 6's plugin library: compiled against TensorRT's own headers, loaded and driven as TensorRT does, with a
stand-in for the CUDA driver alone, which tells what is launched; and the library's way into an engine and a session.

The headers come with TensorRT (JetPack: libnvinfer-headers-dev) or from its open repository; where the compiler does
not find them, TENSORRT_INCLUDE names them, else what needs them is skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from choices import rtn

from engine_build.backends.tensorrt import builder, library, plugins
from engine_build.backends.tensorrt.kernels import CUTS, FAMILIES, MOST_PARTS, ROUNDING, ROW, grid_outputs, node_name
from engine_build.backends.tensorrt.library import INCLUDE, KERNELS, build_library
from engine_build.backends.tensorrt.library.__main__ import main
from engine_build.build import Request, build
from engine_build.packing import RUN, pack_runs, pack_scales
from vla_policy.core.backends.tensorrt import plugin_library
from vla_policy.core.backends.tensorrt.plugin_library import LIBRARY, load_library, load_plugins
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.targets import find_target

SOURCES = Path(__file__).parents[1] / "plugin_library"
TYPES = {"float32": 0, "float16": 1, "int32": 3}  # of TensorRT's DataType
ORIN = (8, 7)


def _headers() -> str | None:
    """Why the library cannot be compiled here, or None."""
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        return "needs nvcc and g++"
    include = [f"-I{os.environ[INCLUDE]}"] if INCLUDE in os.environ else []
    command = ["nvcc", *include, "-x", "c++", "-E", "-"]
    seen = subprocess.run(command, input="#include <NvInfer.h>", capture_output=True, text=True, check=False)
    return None if seen.returncode == 0 else f"needs TensorRT's headers, which {INCLUDE} can name"


MISSING = _headers()
with_headers = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, of the kernels of two groups, a program that drives it, and a stand-in for libcuda."""
    folder = tmp_path_factory.mktemp("library")
    build_library(folder / LIBRARY, ORIN, [kernel for kernel in KERNELS if kernel.group in (ROW, 64)])
    include = [f"-I{os.environ[INCLUDE]}"] if INCLUDE in os.environ else []
    compiler = [
        "nvcc",
        "-std=c++17",
        "-cudart=none",
        "-x",
        "c++",
        *include,
        "-Xcompiler",
        "-Wno-deprecated-declarations",
    ]
    driver, fake = SOURCES / "driver.cpp", SOURCES / "fake_cuda.cpp"
    subprocess.run([*compiler, str(driver), "-o", str(folder / "driver"), "-ldl"], check=True)
    subprocess.run(["g++", "-shared", "-fPIC", str(fake), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def drive(built: Path, tokens: int, inputs: int, group: int, gpu: bool = True) -> list[str]:
    """What the driver says of every plugin, line by line."""
    found = {"LD_LIBRARY_PATH": str(built)} if gpu else {}
    command = [str(built / "driver"), str(built / LIBRARY), str(tokens), str(inputs), str(group)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=found).stdout.splitlines()


@with_headers
@pytest.mark.parametrize(("tokens", "inputs", "group"), [(1, 4096, 64), (290, 200, 64), (70, 264, ROW)])
def test_the_library_launches_what_the_ahead_of_time_plugins_do(
    built: Path, tokens: int, inputs: int, group: int, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plugin and tactic: kernel, grid, threads, tensors and numbers, as `plugins.py` gives them to TensorRT."""
    monkeypatch.setattr(plugins, "compile_ptx", lambda kernel, capability: "")
    launched = [
        line.removeprefix("launch ") for line in drive(built, tokens, inputs, group) if line.startswith("launch")
    ]
    assert launched == [_expected_rounding(tokens, inputs), *_expected_products(tokens, inputs, group)]


def _expected_rounding(tokens: int, inputs: int) -> str:
    return f"quantize_rows {tokens} 1 {ROUNDING.threads} 0 @100 {inputs} @101 @102"


def _expected_products(tokens: int, inputs: int, group: int) -> list[str]:
    """Of a stand-in for TensorRT's Python plugins, to which the library is to be equal."""
    plugins.register.__wrapped__(ORIN)
    trtp = sys.modules["tensorrt.plugin"]
    lines = []
    for family in FAMILIES:
        for parts in range(1, MOST_PARTS + 1):
            width = -(-inputs // RUN) * RUN // 4 if family.rounded else inputs
            arrays: list[tuple[int, ...]] = [(1, tokens, width), *([(1, tokens)] if family.rounded else [])]
            for part in range(parts):
                codes = np.zeros((48 * (part + 1), inputs), np.int8)
                scales = np.zeros((len(codes), -(-inputs // group) if group else 1), np.float16)
                packed = pack_scales(scales, inputs, group or None)
                arrays += [pack_runs(codes, family.weight_bits).shape, packed.shape]
            plugin = trtp.REGISTRY[f"vla_policy::{node_name(family, parts)}"]
            seen = [trtp.from_shape_expr(shape, None) for shape in arrays]
            for tactic in range(1, len(CUTS) + 1):
                name, _, launch, numbers = plugin.launch(*seen, None, tactic)
                tensors = [f"@{100 + place}" for place in range(len(arrays))]
                results = [f"@{100 + len(arrays) + part}" for part in range(parts)]
                counted = [str(int(number.value)) for number in numbers]
                grid = f"{int(launch.grid_x)} {int(launch.grid_y)} {launch.block_x} 0"
                lines.append(" ".join([name, grid, *tensors, *counted, *results]))
    return lines


@with_headers
def test_a_plugin_says_its_types_tactics_and_fields_and_is_made_out_of_them_again(built: Path) -> None:
    lines = drive(built, 3, 128, 64)
    told = {line.split()[2]: line for line in lines if line.startswith("plugin")}
    assert set(told) == {"quantize_rows"} | {
        node_name(family, parts) for family in FAMILIES for parts in range(1, MOST_PARTS + 1)
    }
    half, single, words = TYPES["float16"], TYPES["float32"], TYPES["int32"]
    assert told["w4a8_x2"] == (
        "plugin vla_policy w4a8_x2 1 fields weight_bits=4 activation_bits=8 parts=2 layout=1 "
        f"types {words} {single} {words} {half} {words} {half} {half} {half} other 0 results {half} {half} tactics 2"
    )
    assert told["quantize_rows"].endswith(f"types {half} {words} {single} other 0 results {words} {single} tactics 0")
    assert lines.count("foreign 0") == len(told)
    refused = [line for line in lines if "another version of this library" in line]
    assert len(refused) == len(told)
    assert "enqueued 1" not in lines


@with_headers
def test_without_a_gpu_or_with_a_kernel_that_it_lacks_a_plugin_says_so(built: Path) -> None:
    lines = drive(built, 3, 128, 64, gpu=False)
    assert "enqueued 0" not in lines
    assert any("libcuda.so.1 is missing or lacks what they need; install the GPU's driver" in line for line in lines)
    assert any("w2a16_few_g32: no such kernel" in line for line in drive(built, 3, 128, 32))


@with_headers
def test_only_what_tensorrt_asks_for_is_exported_and_nothing_of_it_is_missing(built: Path) -> None:
    """The library is linked with nothing of TensorRT's and CUDA's: what it needs are the C and C++ libraries."""
    listed = subprocess.run(["nm", "-D", str(built / LIBRARY)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in listed.splitlines()]
    assert {symbol[2] for symbol in symbols if symbol[-2] == "T"} == {"getCreators", "setLoggerFinder"}
    needed = [symbol[-1] for symbol in symbols if symbol[-2] == "U"]
    assert all("@GLIBC" in name or "@CXXABI" in name or "@GCC" in name for name in needed)


def test_one_command_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, without a compiler: it names what is missing, and leaves nothing."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ArtefactError, match=r"plugins\.so: nvcc is not on PATH, .* \(JetPack brings it\)"):
        main(["--target", "orin-jp6", "--out", str(tmp_path / LIBRARY)])
    with pytest.raises(ArtefactError, match="target cpu has no GPU"):
        main(["--target", "cpu", "--out", str(tmp_path / LIBRARY)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_without_headers_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_SOURCE", tmp_path / "missing.cpp")
    with pytest.raises(ArtefactError, match=r"does not compile .* TensorRT's headers .* TENSORRT_INCLUDE"):
        build_library(tmp_path / LIBRARY, ORIN, [ROUNDING])
    assert not (tmp_path / LIBRARY).exists()


class Registry:
    """A stand-in for TensorRT's plugin registry."""

    def __init__(self, handle: object) -> None:
        self.handle, self.loaded = handle, list[str]()
        self.__version__ = "10.3.0"

    def get_plugin_registry(self) -> "Registry":
        return self

    def load_library(self, plugin_path: str) -> object:
        self.loaded.append(plugin_path)
        return self.handle


def test_a_process_loads_one_library_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_library, "_loaded", {})
    first, same, other = (tmp_path / name for name in ("first.so", "same.so", "other.so"))
    for path, content in ((first, b"1"), (same, b"1"), (other, b"2")):
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"first\.so: TensorRT 10\.3\.0 cannot load it; build the engine again"):
        load_library(first, Registry(None))
    registry = Registry(object())
    load_library(first, registry)
    load_library(same, registry)
    assert registry.loaded == [str(first)]
    with pytest.raises(ArtefactError, match=r"other\.so: this process has the plugins of .*first\.so already"):
        load_library(other, registry)


@with_headers
@pytest.mark.usefixtures("device")
def test_an_engine_for_jetpack_6_brings_its_library(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built with a stand-in for TensorRT 10.3, which embeds no kernels: the library is in the folder, has its hash, is
    loaded in every process that opens a graph, and a session loads it first."""
    monkeypatch.setenv("FAKE_TENSORRT", "10.3.0")
    monkeypatch.setattr(builder, "build_library", lambda out, capability: build_library(out, capability, KERNELS[:2]))
    monkeypatch.setattr(plugin_library, "_loaded", {})
    two_bits = rtn(Format(2, 16, 64))
    request = Request(workshop / "policy", find_target("orin-jp6"), tmp_path / "e", uniform=two_bits, legalize=True)
    manifest = build(request)
    assert manifest.backend_version == "10.3.0"
    planned = {unit.kind: unit.planned for unit in manifest.units}
    assert (planned["linear"], planned["head"], planned["encoder"]) == ("w2a16_g64", "w2a16_g64", "w4a16_g64")
    record = json.loads((tmp_path / "e" / "decoder.engine").read_bytes().rpartition(b"\nRECORD ")[2])
    assert record["creators"] == 1 + len(FAMILIES) * MOST_PARTS
    assert {"w2a16", "w2a16_x2", "w2a16_x3"} == set(record["plugins"])
    assert LIBRARY in manifest.files
    registry = Registry(object())
    load_plugins(tmp_path / "e", manifest, registry)
    assert registry.loaded == [str(tmp_path / "e" / LIBRARY)]
    content = bytearray((tmp_path / "e" / LIBRARY).read_bytes())
    content[-1] ^= 1
    (tmp_path / "e" / LIBRARY).write_bytes(content)
    with pytest.raises(ArtefactError, match=r"plugins\.so"):
        load_plugins(tmp_path / "e", manifest, registry)


def test_the_grid_counts_every_part() -> None:
    few, many = CUTS
    assert grid_outputs(few, [48, 16]) == 4
    assert grid_outputs(many, [130, 16, 128]) == 2 + 1 + 1
