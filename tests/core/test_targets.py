"""The table of legal formats: lookups, reasons, nearest legal format."""

import re

import pytest

from vla_policy.core.backends import backend_names, find_backend
from vla_policy.core.backends.base import LayerKind, parse_version
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format, Rounding
from vla_policy.core.targets import TARGETS, find_target


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_every_target_runs_16_bits_and_its_own_formats(target) -> None:  # type: ignore[no-untyped-def]
    assert Format(16, 16) in target.legal()
    for fmt in target.legal():
        assert target.why_not(fmt) is None
        assert target.nearest(fmt) == fmt


@pytest.mark.parametrize("backend", backend_names())
def test_a_format_s_activations_are_rounded_by_one_rule_whatever_the_layer(backend: str) -> None:
    found: dict[Format, set[Rounding]] = {}
    for version in ((1, 31), (10, 3), (10, 13), (11, 4, 1), (2026, 4)):
        for rule in find_backend(backend).rules(version):
            for fmt in rule.formats():
                found.setdefault(fmt, set()).add(rule.rounding)
    assert all(len(rules) == 1 for rules in found.values())


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


def formats(target: str, kind: LayerKind = "linear") -> set[str]:
    return {str(fmt) for fmt in find_target(target).legal(kind)}


def test_formats_are_those_of_the_release() -> None:
    """TensorRT's own are INT8 and INT4 in blocks of 64 or 128; our kernels are for the decoder and the head."""
    own = {"w16a16", "w8a16", "w8a8", "w4a16_g64", "w4a16_g128"}
    ours = {f"{bare}{group}" for bare in ("w2a16", "w4a8", "w4a16") for group in ("", "_g32", "_g64", "_g128")}
    for name in ("orin-jp6", "orin-jp7", "thor-jp7", "h100"):
        assert formats(name) == formats(name, "head") == own | ours
        assert formats(name, "encoder") == formats(name, "patch_embed") == own
    rtx = {f"{bare}{group}" for bare in ("w2a16", "w4a16") for group in ("", "_g32", "_g64", "_g128")}
    assert formats("a100") == {"w16a16", "w8a16", "w8a8"} | rtx


@pytest.mark.parametrize(
    ("target", "wanted", "why", "nearest"),
    [
        ("thor-jp7", "w4a16_g256", r"runs w4a16 with .*, one scale per row, groups of 32 only", "w4a16_g128"),
    ],
)  # fmt: skip
def test_what_a_release_lacks_is_refused_with_the_reason(target: str, wanted: str, why: str, nearest: str) -> None:
    there, fmt = find_target(target), Format.parse(wanted)
    assert re.search(why, str(there.why_not(fmt)))
    assert str(there.nearest(fmt)) == nearest


def test_a_later_version_has_its_own_formats_and_an_earlier_one_is_refused() -> None:
    with pytest.raises(ArtefactError, match=r"has tensorrt 11\.4\.1 or later, installed is 10\.3\.0; .* orin-jp6"):
        find_target("orin-jp7").on("tensorrt", (10, 3, 0))


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
