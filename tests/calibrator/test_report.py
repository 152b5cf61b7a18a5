"""The page says what the artefacts say, names where it comes from, needs no network, and trusts no text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_artefacts import CHOICES, CONVENTIONS, FRAMES, INSTRUCTION, FakeArtefacts, Table, fake_shapes

import calibrator.report.page
from calibrator.__main__ import main
from calibrator.allocation.plan import Plan
from calibrator.allocation.planning import Limits, Planner, PlanRequest
from calibrator.quantizers import parse_choices
from calibrator.quantizers.weights import WEIGHT_BITS
from calibrator.report.inputs import Inputs, Paths
from calibrator.report.page import render
from calibrator.sensitivity.table import Sensitivity, UnitShape
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import read_json, write_json
from vla_policy.core.formats import Choice
from vla_policy.core.verification import Verification

_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0, "%": 0.01}
_SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_VOID = {"meta", "img", "input", "br", "link", "hr"}


@dataclass
class Element:
    """A node of the parsed page."""

    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    def walk(self) -> Iterator["Element"]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def find(self, tag: str, cls: str | None = None) -> list["Element"]:
        return [
            node
            for node in self.walk()
            if node.tag == tag and (cls is None or cls in node.attributes.get("class", "").split())
        ]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class _Parser(HTMLParser):
    """Builds the tree and refuses elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(node)
        if tag not in _VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, text: str) -> None:
        self._open[-1].children.append(text)


def parse(page: str) -> Element:
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser._open == [parser.root], "unclosed elements"
    return parser.root


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> FakeArtefacts:
    return FakeArtefacts.write(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(artefacts: FakeArtefacts) -> str:
    return render(Inputs.load(artefacts.paths))


@pytest.fixture(scope="module")
def tree(page: str) -> Element:
    return parse(page)


def alone(artefacts: FakeArtefacts, option: str, path: Path) -> Paths:
    """The scores and one other artefact."""
    given: dict[str, Any] = {option: path}
    return Paths(artefacts.paths.sensitivity, **given)


def shown_number(text: str) -> tuple[float, float]:
    """The number that a text shows and half a unit of its last digit, read without the report's own code."""
    match = re.fullmatch(r"([\d.,]+)(?:×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?(?: ?(GB|MB|kB|B|%))?", text.strip())
    assert match, text
    digits = match[1].replace(",", "")
    scale = 10.0 ** int((match[2] or "⁰").translate(_SUPERSCRIPT)) * _UNITS.get(match[3], 1.0)
    decimals = len(digits.partition(".")[2])
    return float(digits) * scale, 0.5 * 10.0**-decimals * scale


def test_every_number_shown_is_the_value_in_its_markup(tree: Element) -> None:
    numbers = tree.find("data")
    assert len(numbers) > 150
    for node in numbers:
        shown, half = shown_number(node.text.removeprefix("−"))
        assert abs(shown - abs(float(node.attributes["value"]))) <= half * 1.0001, node.text


def test_needs_no_network(page: str, tree: Element) -> None:
    for node in tree.walk():
        for name in ("src", "href", "xlink:href", "action", "data"):
            link = node.attributes.get(name, "#")
            assert link.startswith(("#", "data:image/png;base64,")), link
        assert node.tag not in ("link", "iframe", "object", "embed")
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert not re.search(r"url\((?!data:image/png;base64,)|fetch\(|XMLHttpRequest|WebSocket", page)
    assert page.count("url(data:image/png") == 3, "each camera image is embedded once"


def test_foreign_text_is_escaped(page: str, tree: Element) -> None:
    assert "alert('x')" not in page
    assert "<b>cup</b>" not in page
    assert any(INSTRUCTION in node.text for node in tree.find("p"))
    assert any(node.text == "queue <full>" for node in tree.find("td"))
    assert len(tree.find("script")) == 1


def test_headline_equals_the_artefacts(artefacts: FakeArtefacts, tree: Element) -> None:
    plan, sensitivity = Plan.load(artefacts.paths.plan or ""), Sensitivity.load(artefacts.paths.sensitivity)
    tiles = {tile.find("p", "label")[0].text: tile for tile in tree.find("div", "tile")}

    def values(label: str) -> list[float]:
        return [float(node.attributes["value"]) for node in tiles[label].find("data")]

    assert values("Average precision") == [plan.average_bits, 4.5]
    params = sum(unit.inputs * unit.outputs for unit in sensitivity.units)
    full_bytes, size_bytes = 2.0 * (params + 5000), plan.size.total_bits / 8
    assert values("Size of the policy") == [size_bytes, full_bytes, pytest.approx(full_bytes / size_bytes)]
    assert values("Objective, Eq. (14)") == [plan.objective]
    assert values("One action") == [21.5, pytest.approx(21.5 * 1.7)]
    assert f"{FRAMES - 2} of {FRAMES}" in tiles["Served over ROS 2"].text
    assert "2 dropped" in tiles["Served over ROS 2"].text
    success = tiles["Success, engine mixed"]
    assert [float(node.attributes["value"]) for node in success.find("data")] == [0.75, 0.3006, 0.9544]


def test_layer_figures_equal_the_artefact(artefacts: FakeArtefacts, tree: Element) -> None:
    sensitivity, plan = Sensitivity.load(artefacts.paths.sensitivity), Plan.load(artefacts.paths.plan or "")
    section = next(node for node in tree.find("section") if node.attributes.get("id") == "layers")
    tips = [node.attributes["data-tip"] for node in section.find("rect", "hit")]
    assert len(tips) == len(sensitivity.units)
    for unit, tip in zip(sensitivity.units, tips, strict=True):
        lines = tip.split("\n")
        assert lines[0] == unit.name
        assert lines[-1].split() == ["plan", str(plan.assignment[unit.name])]
        for choice in CHOICES:
            line = next(line for line in lines if f"in {choice.format}" in line)
            shown, half = shown_number(line.split("  ")[1])
            assert abs(shown - unit.omega[choice]) <= half * 1.0001
    ranked = sorted(sensitivity.units, key=lambda unit: -unit.omega[CHOICES[1]])
    rows = section.find("table")[0].find("tr")[1:]
    assert len(rows) == min(20, len(ranked))
    for row, unit in zip(rows, ranked, strict=False):
        assert row.find("code")[0].attributes["title"] == unit.name
        values = [float(node.attributes["value"]) for node in row.find("data")]
        scores = [unit.omega[choice] for choice in CHOICES]
        assert values == [unit.params, *scores, unit.omega_tau[CHOICES[1]], unit.action_mse[CHOICES[1]]]


def test_layers_and_parts_are_called_as_the_table_says(artefacts: FakeArtefacts, tree: Element) -> None:
    """A tensor's name is only what appears beside its label."""
    units = {unit.name: unit for unit in Sensitivity.load(artefacts.paths.sensitivity).units}
    labelled = [node for node in tree.find("code") if node.attributes.get("title") in units]
    assert labelled and all(node.text == units[node.attributes["title"]].label for node in labelled)
    bands = {node.text for node in tree.find("text", "tick")}
    assert {unit.track for unit in units.values()} <= bands


def test_served_figures_equal_the_artefacts(artefacts: FakeArtefacts, tree: Element) -> None:
    section = next(node for node in tree.find("section") if node.attributes.get("id") == "served")
    values = [float(node.attributes["value"]) for node in section.find("data")]
    served = {d["stamp_ns"]: d["tokens"] for d in read_json(artefacts.folder / "served.json")["decisions"]}
    exact = {d["stamp_ns"]: d["tokens"] for d in read_json(artefacts.folder / "decisions.json")["decisions"]}
    equal = sum(tokens == exact[stamp] for stamp, tokens in served.items()) / len(served)
    assert 0 < equal < 1
    # 10 + i ms and 12 + 2 i ms for i in 0..37; numpy's linear quantiles.
    expected = [10 + 18.5, 10 + 0.99 * 37, 12 + 37, 12 + 2 * 0.99 * 37]
    assert values == pytest.approx([equal, *expected])
    assert f"{FRAMES - 2} of {FRAMES - 2} served actions equal" in section.text


def test_conventions_are_a_picture_of_the_table(artefacts: FakeArtefacts, tree: Element) -> None:
    section = next(node for node in tree.find("section") if node.attributes.get("id") == "conventions")
    texts = [node.text for node in section.find("text")]
    for trial in CONVENTIONS.trials:
        assert trial.name in texts
    better = next(node for node in section.find("text") if node.text == "images <turned>")
    assert "strong" in better.attributes["class"] and better.attributes["data-tip"] == "turn them"
    assert {"0.750", "-0.25", "50 %", "0.250", "0.96"} <= set(texts)
    bars = [float(node.attributes["width"]) for node in section.find("rect")]
    correlations = bars[1], bars[4]
    assert bars[0] == pytest.approx(3 * bars[3], abs=0.1)  # pixels are rounded to 0.01
    assert correlations[1] == pytest.approx(0.96 / 0.25 * correlations[0], rel=1e-3)
    assert "kept as they are on request" in section.text and len(section.find("tr")) == 3


def test_every_figure_names_its_sources(tree: Element, artefacts: FakeArtefacts) -> None:
    figures = tree.find("figure")
    assert len(figures) >= 9
    for figure in figures:
        sources = figure.find("p", "source")
        assert len(sources) == 1
        hashes = [n for n in sources[0].find("code") if re.fullmatch(r"sha256 [0-9a-f]{64}", n.attributes["title"])]
        commands = [node for node in sources[0].find("code") if node.attributes["title"].startswith("python -m ")]
        assert hashes and len(hashes) == len(commands)


def test_only_the_scores_are_required(artefacts: FakeArtefacts) -> None:
    tree = parse(render(Inputs.load(Paths(artefacts.paths.sensitivity))))
    assert [node.attributes["id"] for node in tree.find("section")] == [
        "headline",
        "evidence",
        "layers",
        "time",
        "conventions",
        "sources",
    ]
    table = tree.find("table")[-1].text
    options = (
        "--plan --frontier --calibration --engine --reference-engine --bench --served --decisions --parity --rollout"
    )
    for option in options.split():
        assert option in table
    assert "python -m engine_build bench" in table


def test_the_verification_is_told_with_the_processor(artefacts: FakeArtefacts, tree: Element) -> None:
    section = next(node for node in tree.find("section") if node.attributes.get("id") == "engine")
    assert "verified on A CPU <b>&</b>" in section.text
    assert "Verification: 120 tensors, 987,654 bytes, are exactly what policy and plan give." in section.text
    assert "8 states; <i>equal</i>" in section.text
    save = replace(Verification.load(artefacts.folder / "verification.json"), reference=None).save
    unrun = artefacts.folder / "unrun.json"
    save(unrun)
    page = parse(render(Inputs.load(replace(artefacts.paths, verification=unrun))))
    assert "bytes verified, not run" in page.text and "the engine was not run" in page.text


def test_full_page_misses_nothing(tree: Element) -> None:
    assert "Not on this page" not in tree.text
    ids = [node.attributes["id"] for node in tree.find("section")]
    assert ids == ["headline", "evidence", "layers", "time", "plan", "engine", "served", "conventions", "sources"]
    anchors = [node.attributes["href"] for node in tree.find("a")]
    assert anchors == [f"#{name}" for name in ids[1:]]


@pytest.mark.parametrize("option", ["plan", "frontier", "verification", "bench", "served", "decisions", "parity"])
def test_a_truncated_artefact_is_named(artefacts: FakeArtefacts, tmp_path: Path, option: str) -> None:
    broken = tmp_path / f"{option}.json"
    broken.write_text((artefacts.folder / f"{option}.json").read_text()[:-40])
    with pytest.raises(ArtefactError, match=f"{option}.json: not valid JSON"):
        Inputs.load(alone(artefacts, option, broken))


@pytest.mark.parametrize(
    ("option", "entry"),
    [("plan", "solver"), ("frontier", "points"), ("bench", "machine"), ("served", "drops"), ("decisions", "decisions")],
)
def test_a_missing_entry_is_named(artefacts: FakeArtefacts, tmp_path: Path, option: str, entry: str) -> None:
    content = read_json(artefacts.folder / f"{option}.json")
    del content[entry]
    write_json(tmp_path / f"{option}.json", content)
    with pytest.raises(ArtefactError, match=f"{option}.json: entry '{entry}' is missing"):
        Inputs.load(alone(artefacts, option, tmp_path / f"{option}.json"))


def test_artefacts_of_another_run_are_refused(artefacts: FakeArtefacts, tmp_path: Path) -> None:
    other = FakeArtefacts.write(tmp_path, seed=1)
    for option, what in (("plan", "sensitivity"), ("frontier", "sensitivity"), ("engine", "plan"), ("bench", "plan")):
        given = replace(artefacts.paths, **{option: getattr(other.paths, option)})
        with pytest.raises(ArtefactError, match=f"was made with the {what}"):
            Inputs.load(given)


@pytest.mark.parametrize(
    ("file", "side", "what"),
    [
        ("bench", "engine", "the engine"),
        ("bench", "references", "the 16-bit engine"),
        ("decisions", "parents", "the 16-bit engine"),
        ("verification", "parents", "the engine"),
    ],
)
def test_figures_of_other_engines_are_refused(
    artefacts: FakeArtefacts, tmp_path: Path, file: str, side: str, what: str
) -> None:
    content = read_json(artefacts.folder / f"{file}.json")
    for place in content[side] if side == "references" else [content[side]]:
        place["engine" if side == "parents" else "sha256"] = "f" * 64
    write_json(tmp_path / f"{file}.json", content)
    with pytest.raises(ArtefactError, match=f"{file}.json: was made with {what} ffffffffffff"):
        Inputs.load(replace(artefacts.paths, **{file: tmp_path / f"{file}.json"}))


def test_a_rollout_of_another_engine_is_refused(artefacts: FakeArtefacts, tmp_path: Path) -> None:
    content = read_json(artefacts.paths.rollouts[0])
    content["settings"]["actor"]["sha256"] = "f" * 64
    write_json(tmp_path / "rollout.json", content)
    with pytest.raises(ArtefactError, match=r"rollout\.json: was made with the engine ffffffffffff"):
        Inputs.load(replace(artefacts.paths, rollouts=(tmp_path / "rollout.json",)))


W2, W4, W8 = CHOICES
OTHERS = parse_choices(("w2a16_g64", "w3a16_g64", "w8a16_g64"))


def _every_fourth(shape: UnitShape, choice: Choice) -> bool:
    return choice == W2 or shape.macs // 1000 % 4 == 0


_TWO_STAGES = tuple(shape for shape in fake_shapes() if shape.stage in ("head", "projector"))


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(Table(screened=_every_fourth), id="as a pilot leaves it"),
        pytest.param(Table(screened=lambda shape, choice: shape.stage != "head" or choice == W2), id="a stage"),
        pytest.param(Table(screened=lambda shape, choice: choice == W2), id="the choice shown first"),
        pytest.param(Table(screened=lambda shape, choice: choice != W2), id="the narrowest choice"),
        pytest.param(Table(screened=lambda shape, choice: shape.stage == "language"), id="all stages but one"),
        pytest.param(Table(screened=lambda shape, choice: False), id="everything"),
        pytest.param(Table(screened=lambda shape, choice: True), id="only states"),
        pytest.param(Table(choices=OTHERS, screened=_every_fourth), id="other choices"),
        pytest.param(Table(choices=OTHERS), id="nothing, other choices"),
        pytest.param(Table(shapes=_TWO_STAGES, screened=lambda shape, choice: shape.stage == "head"), id="two stages"),
        pytest.param(Table(shapes=_TWO_STAGES[:1], screened=lambda shape, choice: choice == W8), id="one layer"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_was_not_evaluated_is_said_and_nothing_else_is_lost(tmp_path: Path, table: Table) -> None:
    """Screening leaves out layers, choices and states, --units leaves out layers, --choices may leave out 4 bits."""
    tree = parse(render(Inputs.load(FakeArtefacts.write(tmp_path, table=table).paths)))
    words = " ".join(tree.text.split())
    shown = W4 if W4 in table.choices else W2
    ask = table.screened or (lambda shape, choice: True)
    known = {(shape.name, choice) for shape in table.shapes for choice in table.choices if ask(shape, choice)}
    at_shown = sum(choice == shown for _, choice in known)
    assert ("not evaluated" in words) == (len(known) < len(table.shapes) * 3)
    partly = f"Screening evaluated {at_shown} of {len(table.shapes)} layers in {shown.format}"
    assert (partly in words) == (at_shown < len(table.shapes))
    evaluations = f"120 of {len(table.shapes) * 3 * 12} evaluations"
    assert (evaluations in words and "(cap on <evaluations> reached)" in words) == (table.screened is not None)
    layers = next(node for node in tree.find("section") if node.attributes.get("id") == "layers")
    for row in layers.find("table")[0].find("tr")[1:]:
        name, error = row.find("code")[0].attributes["title"], row.find("td")[7]
        assert (error.text == "not evaluated") == ((name, shown) not in known), name
    drawings = {svg.attributes["aria-label"]: svg for svg in tree.find("svg")}
    for choice in table.choices:
        fmt = choice.format
        scatter = drawings[f"Evidence sensitivity against action error, {fmt}"]
        dots = {node.attributes["data-tip"].split("\n")[0] for node in scatter.find("circle")}
        assert dots == {name for name, one in known if one == choice}
        count = len(table.shapes) - len(dots)
        assert (f"{count} of {len(table.shapes)} layers not evaluated" in scatter.text) == (count > 0)
        bars = drawings[f"Loss at each boundary and action error by quantized stage, {fmt}"]
        without = {s.stage for s in table.shapes} - {s.stage for s in table.shapes if (s.name, choice) in known}
        assert bars.text.count("not evaluated") == 2 * len(without)
        heat = drawings[f"Sensitivity of the {len(table.shapes)} most fragile layers over the task, {fmt}"]
        assert heat.text.count("not evaluated") == count
        tips = [node.attributes.get("data-tip", "") for node in heat.walk()]
        assert any("was evaluated" in tip for tip in tips) == bool(dots), "of two or twelve states in ten phases"


def test_a_screened_table_is_never_called_certain(tmp_path: Path) -> None:
    """Not in the headline, and not where the plan is explained; of an exhaustive one it is said."""
    for name, table in (("screened", Table(screened=_every_fourth)), ("exhaustive", Table())):
        (tmp_path / name).mkdir()
        page = parse(render(Inputs.load(FakeArtefacts.write(tmp_path / name, table=table).paths)))
        words = " ".join(page.text.split())
        assert ("certified optimum" in words) == (name == "exhaustive")
        assert ("optimum of a screened table, most of whose scores are estimates" in words) == (name == "screened")
        assert ("No bound is known of what such a plan loses" in words) == (name == "screened")


def test_a_plan_that_keeps_everything_is_shown(artefacts: FakeArtefacts, tmp_path: Path) -> None:
    """Its objective is 0, of which nothing is a part."""
    sensitivity = Sensitivity.load(artefacts.paths.sensitivity)
    Planner.of(sensitivity, PlanRequest(Limits(average_bits=16.0))).plan().save(tmp_path / "all.json")
    paths = replace(alone(artefacts, "plan", tmp_path / "all.json"), frontier=artefacts.paths.frontier)
    words = " ".join(parse(render(Inputs.load(paths))).text.split())
    assert "in w8a16_g64 it alone would be the whole objective" in words


def test_every_width_that_can_be_measured_has_its_colours() -> None:
    style = (Path(calibrator.report.page.__file__).parent / "templates" / "style.css").read_text()
    for bits in (*WEIGHT_BITS, 16):
        for rule in (f".b{bits} {{", f".on-b{bits} {{"):
            assert rule in style
        assert style.count(f"--b{bits}:") == style.count(f"--on{bits}:") == 2, "a light and a dark theme"


def test_command_line(artefacts: FakeArtefacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert main(["report", "--sensitivity", str(tmp_path / "none.json"), "--out", str(out)]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
    assert not out.exists() and list(tmp_path.iterdir()) == []
    paths = artefacts.paths
    given = ["--sensitivity", str(paths.sensitivity), "--plan", str(paths.plan), "--rollout", str(paths.rollouts[0])]
    assert main(["report", *given, "--out", str(out)]) == 0
    assert "opens without a network" in capsys.readouterr().out
    assert [node.attributes["id"] for node in parse(out.read_text()).find("section")][-2:] == ["conventions", "sources"]
