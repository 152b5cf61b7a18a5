"""This project's CPU kernels in every format against float64, ONNX Runtime's own, and each other."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from choices import with_every_code
from onnx import TensorProto, helper
from vnni import needs_vnni

from calibrator.quantizers.activations import quantize_activation
from engine_build.backends import find_backend
from engine_build.backends.base import canonical
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights
from vla_policy.core import processor
from vla_policy.core.backends.base import Workload
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.backends.onnxruntime_vnni import library, runs_here
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.targets import find_target

TARGET = find_target("cpu").on("onnxruntime_vnni")
FORMATS = [fmt for fmt in TARGET.legal() if runs_here(fmt)]
ROWS = (1, 2, 3, 4, 5, 33, 290)
"""One to four have their own code each; 33 and 290 leave 1 and 2 over of 16, and 290 none of 10."""


def layer(fmt: Format, outputs: int, inputs: int, bias: bool) -> LayerWeights:
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    added = torch.randn(outputs, generator=generator).numpy() if bias else None
    shape = Layer("stack.layer", "linear", "stack.layer", outputs, inputs, bias)
    return LayerWeights(shape, fmt, with_every_code(weight, fmt), None, added)


def write(path: Path, weights: LayerWeights, backend: str) -> Path:
    with GraphBuilder(path) as builder:
        builder.rename(find_backend(backend).dialect((1, 31)).linear(builder, "x", weights), "y")
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])
            for name, size in (("x", weights.layer.inputs), ("y", weights.layer.outputs))
        )
        builder.save([x], [y])
    return path


def run(path: Path, x: np.ndarray, threads: int = 1, lib: Path | None = None) -> np.ndarray:
    options = session_options(threads, lib or library.library())
    (y,) = open_session(path, options).run(None, {"x": x[None]})
    result: np.ndarray = y[0]
    return result


def normal(rows: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(inputs).standard_normal((rows, inputs)).astype(np.float32)


@pytest.fixture(scope="module")
def without_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as it is on a processor without AMX."""
    made, found = tmp_path_factory.mktemp("library") / "vectors.so", library.compiler()
    assert found is not None
    command = [found, *library._FLAGS, "-DWITHOUT_TILES", *map(str, library._SOURCES), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@needs_vnni
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs", "bias"), [(40, 150, True), (200, 512, False)])
def test_every_format_at_any_number_of_rows(
    fmt: Format, outputs: int, inputs: int, bias: bool, tmp_path: Path, without_tiles: Path
) -> None:
    weights = layer(fmt, outputs, inputs, bias)
    path = write(tmp_path / "layer.onnx", weights, TARGET.backend)
    x = normal(max(ROWS), inputs)
    y = run(path, x)
    seen = quantize_activation(torch.from_numpy(x), 8, fmt.group_size).numpy()
    assert weights.quantized is not None
    values = weights.quantized.dequantize().numpy()
    added = () if weights.bias is None else (weights.bias,)
    expected = seen.astype(np.float64) @ values.astype(np.float64).T + sum(added)
    # Per group a sum's conversion, a product of two scales and one with the sum: three roundings more.
    assert (np.abs(y - expected) <= rounding.of_products(seen, values, *added, further=3)).all()
    for rows in ROWS:
        assert np.array_equal(run(path, x[:rows], threads=2), y[:rows]), (
            "a row depends on those beside it, or on threads"
        )
        assert np.array_equal(run(path, x[:rows], lib=without_tiles), y[:rows]), "vectors and tiles differ"
    found = find_backend(TARGET.backend).read_back(path, path, {weights.layer.name: weights.layer}, {}, tmp_path)
    assert found.layers[weights.layer.name].format == canonical(fmt, inputs)


@needs_vnni
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.group_size], ids=str)
def test_numbers_are_those_of_matmulnbits(fmt: Format, tmp_path: Path) -> None:
    weights, x = layer(fmt, 48, 256, bias=True), normal(17, 256)
    ours = run(write(tmp_path / "ours.onnx", weights, TARGET.backend), x)
    theirs = run(write(tmp_path / "theirs.onnx", weights, "onnxruntime"), x)
    assert weights.quantized is not None and weights.bias is not None
    allowed = 2 * rounding.of_products(x, weights.quantized.dequantize().numpy(), weights.bias, further=3)
    assert (np.abs(ours - theirs) <= allowed).all()


@needs_vnni
@pytest.mark.parametrize("damage", [np.nan, np.inf])
@pytest.mark.parametrize("fmt", ["w4a8_g32", "w8a8"])
def test_what_is_not_finite_stays_so(fmt: str, damage: float, tmp_path: Path) -> None:
    path = write(tmp_path / "layer.onnx", layer(Format.parse(fmt), 16, 64, bias=False), TARGET.backend)
    x = normal(6, 64)
    x[2, 40] = damage
    y = run(path, x)
    assert not np.isfinite(y[2]).any() and np.isfinite(np.delete(y, 2, 0)).all()
    assert not np.isfinite(run(path, x[2:3])).any()


def backend_for(*formats: Format) -> str:
    """What `build` takes for a small plan of these formats."""
    return find_target("cpu").fastest_here(Workload(frozenset(formats), weights=10**6))[0].backend


def test_a_processor_without_the_instructions_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Old Faithful\nflags\t\t: fpu avx2 avx512f avx512bw\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(
        ArtefactError, match=r"Old Faithful lacks avx512dq, avx512vl, avx512_vnni; .*--backend onnxruntime$"
    ):
        library.library()
    assert backend_for(Format(4, 8, 64)) == "onnxruntime"


@needs_vnni
def test_a_missing_or_failing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert backend_for(Format(4, 8, 64)) == "onnxruntime"
    with pytest.raises(ArtefactError, match=r"no-such-compiler is not found; install g\+\+ 11 or later"):
        library.library()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ArtefactError, match=r"false cannot compile its kernels \(status 1\)"):
        library.library()
    assert list((tmp_path / "vla_policy").iterdir()) == []


@needs_vnni
def test_build_takes_these_kernels_for_plans_with_rounded_activations() -> None:
    assert backend_for(Format(16, 16), Format(4, 8, 64)) == "onnxruntime_vnni"
    assert backend_for(Format(16, 16), Format(4, 16, 64)) == "onnxruntime"
    assert find_target("cpu").legal() == TARGET.legal(), "the same formats, so a plan may be built for either"
