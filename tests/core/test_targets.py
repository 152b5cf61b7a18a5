"""The table of legal formats: lookups, reasons, nearest legal format."""

import pytest

from vla_policy.core.backends import backend_names, find_backend
from vla_policy.core.backends.base import parse_version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format
from vla_policy.core.targets import TARGETS, find_target


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_every_target_runs_16_bits_and_its_own_formats(target) -> None:  # type: ignore[no-untyped-def]
    assert Format(16, 16) in target.legal()
    for fmt in target.legal():
        assert target.why_not(fmt) is None
        assert target.nearest(fmt) == fmt


def test_reasons_say_what_is_lacking() -> None:
    cpu = find_target("cpu")
    assert cpu.why_not(Format(4, 4, 64)) == "no kernel multiplies 4-bit activations here"
    assert "groups of 32" in str(cpu.why_not(Format(4, 8, 512)))
    assert "no kernel runs w6a6" in str(cpu.why_not(Format(6, 6)))


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [("w4a4_g64", "w4a8_g64"), ("w3a16_g64", "w4a16_g64"), ("w4a16_g512", "w4a16_g256"), ("w2a8", "w2a8_g128")],
)
def test_nearest_loses_nothing_and_costs_least(wanted: str, nearest: str) -> None:
    assert str(find_target("cpu").nearest(Format.parse(wanted))) == nearest


def test_formats_are_those_of_the_version_that_is_there() -> None:
    """JetPack 6 stays on TensorRT 10.3, which embeds no compiled kernels."""
    orin = find_target("orin")
    older = orin.on("tensorrt", (10, 3))
    assert orin.why_not(Format(2, 16, 64)) is None and older.why_not(Format(4, 16, 64)) is None
    assert older.why_not(Format(2, 16, 64)) == "no kernel runs w2a16 on a linear layer with tensorrt 10.3"
    assert older.nearest(Format(2, 16, 64)) == Format(4, 16, 64)


@pytest.mark.parametrize(
    ("text", "version"), [("10.13.0", (10, 13, 0)), ("1.31.1+cpu", (1, 31, 1)), ("10.9.0.34rc1", (10, 9, 0, 34))]
)
def test_versions_are_their_leading_numbers(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


def test_backends_are_found_by_name() -> None:
    assert all(find_backend(name).name == name for name in backend_names())
    with pytest.raises(ArtefactError, match="backend 'abacus' is unknown; choose one of: onnxruntime, "):
        find_backend("abacus")


def test_unknown_targets_are_named() -> None:
    with pytest.raises(ArtefactError, match="target 'gpu' is unknown; choose one of: cpu"):
        find_target("gpu")
