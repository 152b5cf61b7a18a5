"""What the figures compute, against independent computations."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from fake_artefacts import BINS, CHOICES, FakeArtefacts
from scipy.stats import spearmanr

from calibrator.allocation.options import build_groups
from calibrator.allocation.plan import Plan
from calibrator.report.artefacts import Frontier, FrontierPoint, ReferenceDecisions, ServedDecision, ServedRun
from calibrator.report.charts_engine import as_planned
from calibrator.report.charts_layers import layer_chart, rank_correlation
from calibrator.report.charts_served import action_error
from calibrator.report.charts_time import heat_chart, phase_bands
from calibrator.report.evidence_images import evidence_blocks
from calibrator.report.inputs import Inputs
from calibrator.report.numbers import byte_unit, in_bytes, significant
from calibrator.report.plan_facts import exchanges, plan_facts
from calibrator.report.svg import Scale, Svg, log_scale
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.table import Objective
from vla_policy.core.contract import load_contract
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.manifest import UnitRecord


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs.load(FakeArtefacts.write(tmp_path_factory.mktemp("report"), seed=3).paths)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (1234.5, "1,234"),
        (0.00123456, "0.00123"),
        (0.000123456, "1.23×10⁻⁴"),
        (1.5e7, "1.50×10⁷"),
        (-0.5, "−0.500"),
        (float("nan"), "not finite"),
    ],
)
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text


def test_bytes() -> None:
    assert in_bytes(15_100_000_000) == "15.1 GB"
    assert in_bytes(4_425_171, 4) == "4.425 MB"
    assert in_bytes(18_432) == "18.4 kB"
    assert in_bytes(0) == "0 B"
    assert byte_unit(2e6) == (1e6, "MB")


def test_scales() -> None:
    line = Scale(0.0, 10.0, 100.0, 200.0)
    assert [line(0), line(5), line(10)] == [100, 150, 200]
    assert line.ticks(5) == [0, 2, 4, 6, 8, 10]
    log = Scale(1e-3, 1.0, 300.0, 0.0, log=True)
    assert log(1e-3) == pytest.approx(300) and log(1e-2) == pytest.approx(200) and log(0.0) == pytest.approx(300)
    assert log.ticks() == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert Scale(0.03, 0.4, 0.0, 1.0, log=True).ticks() == pytest.approx([0.05, 0.1, 0.2])
    assert Scale(2.04, 6.8, 0.0, 1.0, log=True).ticks() == pytest.approx([3, 4, 5, 6])
    assert Scale(2.04, 3.6, 0.0, 1.0, log=True).ticks() == pytest.approx([2.2, 2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6])
    assert Scale(210, 290, 0.0, 1.0, log=True).ticks() == pytest.approx([220, 240, 260, 280])
    wide = log_scale([0.0, 1e-12, 1.0], 0.0, 1.0)
    assert wide.low == pytest.approx(1.4e-6)


def test_drawing_escapes_text() -> None:
    svg = Svg(10, 10, 'a "label" <x>')
    svg.text(1.0, 2.0, "<b>&", "tick", tip='"tip"')
    drawn = svg.render()
    assert (
        "&lt;b&gt;&amp;" in drawn and "<b>" not in drawn and "<x>" not in drawn and 'data-tip="&#34;tip&#34;"' in drawn
    )


def test_rank_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, 40).astype(float), generator.integers(0, 5, 40).astype(float)
    assert rank_correlation(first.tolist(), second.tolist()) == pytest.approx(spearmanr(first, second).statistic)
    assert np.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))


def test_phase_bands_by_loops(inputs: Inputs) -> None:
    losses, row = inputs.losses, 1
    for index, band in enumerate(phase_bands(losses, row, BINS)):
        assert band.boundary == BOUNDARIES[index]
        for phase in range(BINS):
            states = [state for state in range(len(losses["phase"])) if losses["phase"][state] == phase]
            values = [float(np.mean([float(unit[row, state, index]) for unit in losses["loss"]])) for state in states]
            if not values:
                assert np.isnan(band.mean[phase])
                continue
            mean = sum(values) / len(values)
            assert band.mean[phase] == pytest.approx(mean, rel=1e-6)
            deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
            assert band.deviation[phase] == pytest.approx(deviation, rel=1e-6, abs=1e-9)


def test_heat_map_marks_omega_tau(inputs: Inputs) -> None:
    """The largest phase that is drawn is the Omega_tau of the artefact."""
    units, four = inputs.sensitivity.units, CHOICES[1]
    drawn = str(heat_chart(units, inputs.losses, 1, BINS, four, "four", count=3))
    for unit in sorted(units, key=lambda unit: -unit.omega[four])[:3]:
        assert f"{unit.name}\nphase" in drawn
        assert f"Ω {significant(unit.omega_tau[four])}" in drawn
    assert drawn.count('class="worst"') == 3


def test_layer_chart_marks_the_choice(inputs: Inputs) -> None:
    assert inputs.plan is not None
    drawn = str(layer_chart(inputs.sensitivity.units, CHOICES, inputs.plan))
    planned = list(inputs.plan.assignment.values())
    assert drawn.count('class="ring"') == sum(choice != FULL for choice in planned)
    assert drawn.count('class="kept"') == planned.count(FULL)
    assert 'class="ring"' not in str(layer_chart(inputs.sensitivity.units, CHOICES, None))


def test_evidence_maps_show_shares(inputs: Inputs) -> None:
    assert inputs.maps is not None
    blocks = evidence_blocks(inputs.maps, inputs.losses["progress"], inputs.calibration)
    assert [block.unit for block in blocks] == list(inputs.maps.units)
    for unit, block in enumerate(blocks):
        for state, row in enumerate(block.rows):
            assert row.progress == inputs.losses["progress"][inputs.maps.samples[state]]
            assert [cell.choice for cell in row.cells] == ["w16a16", "w8a16_g64", "w4a16_g64", "w2a16_g64"]
            for width, cell in enumerate(row.cells):
                totals = inputs.maps.evidence[unit, state].astype(np.float64).sum(1)
                assert cell.loss == inputs.maps.loss[unit, state, width]
                assert cell.mass_ratio == pytest.approx(totals[width] / totals[0])
    without = evidence_blocks(inputs.maps, inputs.losses["progress"], None)
    assert without[0].rows[0].photo is None


def test_plan_facts_by_loops(inputs: Inputs) -> None:
    plan, sensitivity = inputs.plan, inputs.sensitivity
    assert plan is not None
    facts = plan_facts(plan, sensitivity)

    def objective(assignment: Mapping[str, Choice]) -> float:
        return sum(
            0.75 * unit.omega[assignment[unit.name]] + 0.25 * unit.omega_tau[assignment[unit.name]]
            for unit in sensitivity.units
        )

    chosen = dict(plan.assignment)
    assert objective(chosen) == pytest.approx(plan.objective)
    above = {group.name for group in build_groups(sensitivity, Objective()) if chosen[group.units[0]] != CHOICES[0]}
    assert {item.group for item in facts.protections} == above
    for item in facts.protections:
        demoted = chosen | {name: item.lower for name in item.units}
        assert objective(demoted) - objective(chosen) == pytest.approx(item.damage)
        assert not item.pinned
    labels = {item.label for item in facts.protections}
    assert "layers.0.self_attn.q_proj, k_proj" in labels and "lm_head" in labels, labels
    assert sum(stage.size_bytes for stage in facts.stages) * 8 == plan.size.weight_bits + plan.size.scale_bits
    for row, choice in zip(facts.alternatives[-4:], (FULL, *CHOICES[::-1]), strict=True):
        assert row.name == f"every layer {choice.format}" and row.average_bits == choice.format.weight_bits
        assert row.objective == pytest.approx(objective(dict.fromkeys(chosen, choice)))


def test_pinned_groups_are_said_to_be_pinned(inputs: Inputs) -> None:
    plan = inputs.plan
    assert plan is not None
    pinned = Plan(
        **{**plan.__dict__, "details": {**plan.details, "pins": ["policy.projector.*=w16a16"]}},
    )
    facts = plan_facts(pinned, inputs.sensitivity)
    for item in facts.protections:
        assert item.pinned == (item.stage == "projector")


def test_exchange_takes_the_best_plan_that_fits(inputs: Inputs) -> None:
    assert inputs.plan is not None
    size_bits = inputs.plan.size.total_bits
    points = [
        FrontierPoint(size_bits + 8 * extra, 4.0, inputs.plan.objective * 1000 / (1000 + extra), None)
        for extra in (-900, 0, 900, 1900, 2500)
    ]
    found = exchanges(Frontier(tuple(points), "", "evidence"), inputs.plan, 1000.0)
    assert [(item.extra_bytes, item.size_bytes - size_bits / 8) for item in found] == [(1000, 900), (2000, 1900)]


@pytest.mark.parametrize(
    ("planned", "realised", "inputs", "same"),
    [
        ("w4a16_g64", "w4a16_g64", 128, True),
        ("w4a16_g64", "w4a16", 64, True),
        ("w4a16_g64", "w4a16", 128, False),
        ("w4a16_g64", "w8a16", 64, False),
    ],
)
def test_as_planned(planned: str, realised: str, inputs: int, same: bool) -> None:
    unit = UnitRecord("layer", "linear", "decoder", 8, inputs, planned, realised, "", 1, 1, None, None)
    assert as_planned(unit) == same


def test_action_dimensions_are_named_by_the_contract() -> None:
    contract = load_contract(Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml")
    names = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
    for steps, expected in ((1, names), (2, (*(f"{n} [0]" for n in names), *(f"{n} [1]" for n in names)))):
        one = ServedDecision(1, "", (1,), (0.5,) * 7 * steps, 1.0, None)
        errors = action_error(ServedRun((one,), 1, {}, 1.0, ""), ReferenceDecisions({1: one}, ""), contract)
        assert errors is not None and errors.names == expected


def test_action_error_pairs_by_stamp() -> None:
    def decided(stamp_ns: int, *action: float) -> ServedDecision:
        return ServedDecision(stamp_ns, "", (int(action[0]),), action, 1.0, None)

    served = ServedRun((decided(5, 1.0, 2.0), decided(2_000_000_005, 3.0, 4.0), decided(9, 0.0, 0.0)), 3, {}, 1.0, "")
    reference = ReferenceDecisions({5: decided(5, 1.5, 2.0), 2_000_000_005: decided(2_000_000_005, 3.0, 1.0)}, "")
    errors = action_error(served, reference, None)
    assert errors is not None
    assert errors.time_s.tolist() == [0.0, 2.0]
    assert errors.error.tolist() == [[-0.5, 0.0], [0.0, 3.0]]
    assert errors.equal_decisions == 1.0
    assert errors.names == ("dimension 0", "dimension 1")
    assert action_error(served, ReferenceDecisions({}, ""), None) is None
