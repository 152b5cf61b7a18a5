"""Which runs are one method, the spread over calibration states, and the drawing of a section with forty runs."""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
from PIL import ImageFont
from scipy.stats import binomtest

from calibrator.sensitivity.table import Signal
from evaluation.actors import Size
from evaluation.results import Episode, RolloutResult
from evaluation.tables import Row, Section, read_config, render
from evaluation.tables.arms import ChannelSignal, Control
from evaluation.tables.curves import curves_of
from evaluation.tables.figure import draw

_SVG = "{http://www.w3.org/2000/svg}"
_BITS = (2.25, 2.5, 2.75, 3, 3.5, 4)
_HEAD = """
sections:
  - name: s
    title: Some tasks
    benchmark: metaworld
    policy: policy
    trials: 20
    calibration: {sources: [episodes], samples: 8, choices: [w2a16_g64, w4a16_g64]}
    runs:
      - {name: bf16}
"""


def _read(folder: Path, *runs: str) -> Section:
    path = folder / "table.yaml"
    path.write_text(_HEAD + "".join(f"      - {{{run}}}\n" for run in runs))
    (section,) = read_config(path)
    return section


def _rows(counts: Mapping[str, tuple[int, int, float]]) -> dict[str, Row]:
    """By the run's name: successes, episodes, megabytes."""

    def row(wins: int, trials: int, megabytes: float) -> Row:
        episodes = tuple(Episode("task", trial, trial < wins, 1, 1.0, "") for trial in range(trials))
        return Row(RolloutResult({}, episodes), Size(8_000_000, 32_000_000, round(1e6 * megabytes)))

    return {f"s-{name}": row(*numbers) for name, numbers in counts.items()}


def test_a_method_is_what_weights_are_made_by_whatever_the_name(tmp_path: Path) -> None:
    section = _read(
        tmp_path,
        "name: z, average_bits: 2.5",
        "name: a, average_bits: 3, states_seed: 4",
        "name: b, average_bits: 3",
        "name: c, average_bits: 3, beta: 0",
        'name: d, average_bits: 2.5, choices: ["w2a16_g64:gptq", "w4a16_g64:gptq"]',
        "name: e, average_bits: 3, method: gptq",
        "name: f, average_bits: 3, signal: channels, keep: []",
        "name: g, uniform: w4a16_g64",
        "name: h, uniform: w3a16_g64",
        'name: i, uniform: "w3a16_g64:gptq"',
        "name: j, uniform: w4a8_g64",
        "name: k, uniform: w4a16",
        "name: l, uniform: w4a16_g64, transform: smoothquant",
        "name: m, control: blind",
    )
    found = {curve.label: [[run.name for run in size] for size in curve.sizes] for curve in curves_of(section.runs)}
    assert list(found.items()) == [
        ("plan by evidence", [["z"], ["a", "b"]]),
        ("uniform mse (h)", [["h"], ["g"]]),
        ("bf16", [["bf16"]]),
        ("plan by evidence, α 0.75, β 0", [["c"]]),
        ("plan by evidence, gptq", [["d"]]),
        ("plan by evidence, then gptq", [["e"]]),
        ("QVLA, optimum", [["f"]]),
        ("uniform gptq", [["i"]]),
        ("uniform mse, 8-bit activations", [["j"]]),
        ("uniform mse (k)", [["k"]]),
        ("uniform mse, smoothquant", [["l"]]),
        ("m", [["m"]]),
    ]


def test_every_signal_has_a_label_of_its_own(tmp_path: Path) -> None:
    signals = [*get_args(Signal), *get_args(Control), *get_args(ChannelSignal)]
    runs = [f"name: {signal}, average_bits: 3, signal: {signal}" for signal in signals]
    labels = [curve.label for curve in curves_of(_read(tmp_path, *runs).runs[1:])]
    assert len(set(labels)) == len(signals) and not any("(" in label for label in labels)


def test_runs_that_differ_in_their_states_are_one_line(tmp_path: Path) -> None:
    """On the initial states that all three have: the first ten, of which they won 10, 7 and 4."""
    runs = [f"name: r{seed}, average_bits: 3, states_seed: {seed}" for seed in (0, 1, 2)]
    counts = {"bf16": (20, 20, 16.0), "r0": (13, 20, 3.0), "r1": (7, 10, 3.0), "r2": (4, 15, 3.0)}
    text = render([_read(tmp_path, *runs)], _rows(counts))
    assert "| r0 | 0, 1, 2 | 40.0 to 100.0 % of 10 |" in text
    assert "calibration states" not in render([_read(tmp_path, runs[0])], _rows(counts))


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Section, dict[str, Row]]:
    """Forty runs: three methods at six sizes with equal bytes, one of them with other states too, and twenty single."""
    runs, counts = [], {"bf16": (190, 200, 16.0)}
    for (step, bits), signal in itertools.product(enumerate(_BITS), ("evidence", "proxy", "random")):
        runs.append(f"name: {signal}-{bits}-with-a-long-name, average_bits: {bits}, signal: {signal}")
        counts[f"{signal}-{bits}-with-a-long-name"] = (120 + 10 * step, 200, bits + 0.25)
    runs.append("name: other-states, average_bits: 3, states_seed: 9")
    counts["other-states"] = (140, 200, 3.25)
    for number in range(20):
        runs.append(f"name: single-{number}, average_bits: 3, alpha: {(number + 1) / 50}")
        counts[f"single-{number}"] = (5 * number, 200, 3.25)
    return _read(tmp_path_factory.mktemp("crowded"), *runs), _rows(counts)


def test_the_drawing_has_a_curve_of_every_method_with_several_sizes(crowded: tuple[Section, dict[str, Row]]) -> None:
    section, rows = crowded
    root = ElementTree.fromstring(draw(section, rows))
    texts: dict[str, ElementTree.Element] = {}
    for text in root.iter(f"{_SVG}text"):
        texts.setdefault(text.text or "", text)  # the curves' ticks stand before those below
    labels = ["plan by evidence", "plan by action, first order", "plan at random"]
    assert set(labels) <= texts.keys()
    curves = [line for line in root.iter(f"{_SVG}polyline") if len(line.get("points", "").split()) == 6]
    assert len(curves) == 3 and len({curve.get("class") for curve in curves}) == 3
    # Two ticks of the logarithmic axis say where bytes lie; the middle one of the three curves is not moved aside.
    (left, right) = (float(texts[tick].get("x", "")) for tick in ("3", "4"))
    (low, high) = (float(texts[tick].get("y", "")) - 4 for tick in ("60", "90"))
    for curve, aside in zip(curves, (-5, 0, 5), strict=True):
        places = [tuple(map(float, point.split(","))) for point in curve.get("points", "").split()]
        for (x, y), bits, wins in zip(places, _BITS, range(120, 171, 10), strict=True):
            share = math.log((bits + 0.25) / 3) / math.log(4 / 3)
            assert x == pytest.approx(left + share * (right - left) + aside, abs=0.1)
            assert y == pytest.approx(low + (wins / 2 - 60) / 30 * (high - low), abs=0.1)


def test_every_run_has_its_interval_and_its_counts(crowded: tuple[Section, dict[str, Row]]) -> None:
    section, rows = crowded
    root = ElementTree.fromstring(draw(section, rows))
    lines = {float(text.get("y", "")): text.text for text in root.iter(f"{_SVG}text") if text.get("class") == "key"
             and float(text.get("x", "")) == 24}  # fmt: skip
    assert len(lines) == 40 and set(lines.values()) == {run.name for run in section.runs}
    below = [text for text in root.iter(f"{_SVG}text") if float(text.get("y", "")) > max(lines)]
    (left, right) = (float(text.get("x", "")) for text in below if text.text in ("0", "100"))
    bars = {float(bar.get("y1", "")) + 4: bar for bar in root.iter(f"{_SVG}line")
            if "interval" in bar.get("class", "") and bar.get("y1") == bar.get("y2")}  # fmt: skip
    titles = [title.text for title in root.iter(f"{_SVG}title")]
    for line, name in lines.items():
        result = rows[f"s-{name}"].result
        told = f"{result.successes}/200, {rows[f's-{name}'].size.stored_bytes / 1e6:.2f} MB"
        assert any(text.text == told and float(text.get("y", "")) == line for text in root.iter(f"{_SVG}text"))
        assert f"{name}: {told}" in titles
        expected = binomtest(result.successes, 200).proportion_ci(0.95, method="wilson")
        ends = [float(bars[line].get(end, "")) for end in ("x1", "x2")]
        assert [(end - left) / (right - left) for end in ends] == pytest.approx([expected.low, expected.high], abs=2e-4)
    assert sum("hollow" in mark.get("class", "") for mark in root.iter()) == 1


def test_no_label_lies_on_another_and_none_leaves_the_drawing(crowded: tuple[Section, dict[str, Row]]) -> None:
    """Widths of Pillow's own sans serif, a fifth wider: browsers' fonts differ by less."""
    root = ElementTree.fromstring(draw(*crowded))
    width, height = map(float, root.get("viewBox", "").split()[2:])
    font = ImageFont.load_default(12)
    boxes = []
    for text in root.iter(f"{_SVG}text"):
        x, y = float(text.get("x", "")), float(text.get("y", ""))
        long = 1.2 * font.getlength(text.text or "")
        start = x - long * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor", "start")]
        boxes.append((start, y - 10, start + long, y + 3, text.text))
    assert all(left >= 0 and top >= 0 and right <= width and bottom <= height for left, top, right, bottom, _ in boxes)
    for first, second in itertools.combinations(boxes, 2):
        apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
        assert apart, (first[4], second[4])


def test_every_colour_stands_out_on_both_backgrounds(crowded: tuple[Section, dict[str, Row]]) -> None:
    """WCAG 2.1: at least 3 : 1 for graphics, 4.5 : 1 for text."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(first: str, second: str) -> float:
        low, high = sorted((luminance(first), luminance(second)))
        return (high + 0.05) / (low + 0.05)

    light, dark = draw(*crowded).split("prefers-color-scheme: dark")
    for theme in (light, dark):
        (paper,), (ink,) = (re.findall(rule, theme) for rule in (r"\.paper \{ fill: #(\w+)", r"text \{ fill: #(\w+)"))
        colours = re.findall(r"\.c\d \{ stroke: #(\w+)", theme)
        assert len(set(colours)) == 8 and contrast(ink, paper) > 4.5
        assert min(contrast(colour, paper) for colour in colours) > 3


def test_a_section_whose_methods_have_one_size_has_no_curves(tmp_path: Path) -> None:
    section = _read(tmp_path, "name: alike, uniform: w4a16_g64")
    root = ElementTree.fromstring(draw(section, _rows({"bf16": (9, 10, 16.0), "alike": (8, 10, 4.0)})))
    assert not list(root.iter(f"{_SVG}polyline"))
    assert {"4 bits", "reference"} <= {text.text for text in root.iter(f"{_SVG}text")}
    alone = ElementTree.fromstring(draw(section, _rows({"bf16": (0, 10, 16.0)})))
    assert {"bf16", "0/10, 16.00 MB"} <= {text.text for text in alone.iter(f"{_SVG}text")}
