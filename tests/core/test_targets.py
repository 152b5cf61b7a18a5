"""The table of legal formats: lookups, reasons, nearest legal format."""

import pytest

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


def test_unknown_targets_are_named() -> None:
    with pytest.raises(ArtefactError, match="target 'gpu' is unknown; choose one of: cpu"):
        find_target("gpu")
