"""The numeric probe that every session begins with: it sees each way in which ONNX Runtime may compute otherwise."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from ragged import KEY, build_engine

from engine_build.backends.onnxruntime.linear import linear
from engine_build.backends.onnxruntime.probe import write_probe
from engine_build.graph.builder import GraphBuilder
from vla_policy.core.backends.onnxruntime.probe import FILE, check_arithmetic
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file
from vla_policy.core.formats import FULL_PRECISION, Format
from vla_policy.core.manifest import FileRecord, Manifest
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target


def write(folder: Path, formats: Sequence[Format]) -> None:
    with GraphBuilder(folder / FILE) as builder:
        write_probe(linear, builder, formats)


def session(folder: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(folder / FILE))


def change_level(path: Path, level: int) -> None:
    """As if the processor had no kernel for MatMulNBits' level."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    path.write_bytes(model.SerializeToString())


def test_every_format_passes_where_it_was_built(tmp_path: Path) -> None:
    write(tmp_path, [fmt for fmt in find_target("cpu").legal() if fmt != FULL_PRECISION])
    check_arithmetic(tmp_path, session(tmp_path))


def test_activations_that_must_not_be_rounded_are_seen(tmp_path: Path) -> None:
    write(tmp_path, [Format(4, 16, 32)])
    change_level(tmp_path / FILE, 4)
    with pytest.raises(ArtefactError, match=r"computes w4a16_g32 .* planned: .* built for another version"):
        check_arithmetic(tmp_path, session(tmp_path))


@pytest.mark.parametrize("fmt", ["w2a8_g64", "w4a8_g32", "w8a8_g128"])
def test_activations_that_must_be_rounded_are_seen(fmt: str, tmp_path: Path) -> None:
    write(tmp_path, [Format.parse(fmt)])
    change_level(tmp_path / FILE, 1)
    with pytest.raises(ArtefactError, match=f"computes {fmt} with 1 rows otherwise"):
        check_arithmetic(tmp_path, session(tmp_path))


def test_an_engine_is_not_run_where_its_probe_fails(tmp_path: Path) -> None:
    build_engine(tmp_path, ["w4a8_g32"], backend="onnxruntime")
    folder = tmp_path / "engine"
    load_engine(folder, KEY)
    change_level(folder / FILE, 1)
    manifest = Manifest.load(folder)
    manifest.files[FILE] = FileRecord(sha256_file(folder / FILE), (folder / FILE).stat().st_size)
    manifest.write(folder)
    with pytest.raises(ArtefactError, match="computes w4a8_g32 with 1 rows otherwise"):
        load_engine(folder, KEY)
