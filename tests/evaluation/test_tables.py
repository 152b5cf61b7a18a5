"""Comparisons whose weights are made by the runs that ask for them."""

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from fake_source import FakeSource
from pi05_policy import tiny_pi05_folder
from tiny import tiny_policy_folder

from calibrator.allocation.plan import Plan
from calibrator.families import TorchActor, live_units, load_policy
from calibrator.quantizers import parse_choice, parse_choices
from calibrator.quantizers.store import Store
from calibrator.sensitivity.table import Sensitivity
from evaluation.actors import ActorSpec
from evaluation.statistics import holm
from evaluation.tables import read_config
from evaluation.tables.arms import Arm, ChannelSignal, Control, Materials, controlled, places, prepare
from vla_policy.core.errors import ArtefactError, BudgetError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL
from vla_policy.core.observation import Observation

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    folder = tmp_path_factory.mktemp("materials")
    policy = tiny_policy_folder(folder / "policy")
    return Materials(policy, (folder,), 4, parse_choices(["w2a16_g8", "w4a16_g8"]))


@pytest.fixture(scope="module")
def out(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that three arms need, made once."""
    folder = tmp_path_factory.mktemp("arms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.tables.arms.open_sources", lambda *_: [FakeSource((5, 4))])
        prepare(materials, Arm(average_bits=3.0), folder, "evidence")
        prepare(materials, Arm(average_bits=3.0, method="gptq"), folder, "compensated")
        prepare(materials, Arm(average_bits=3.0, signal="random"), folder, "random")
    return folder


def test_an_arm_s_weights_are_its_plan_s(out: Path, materials: Materials) -> None:
    plan = Plan.load(out / "evidence.plan.json")
    store = Store.open(out / "evidence.weights")
    assert dict(store.identity.choices) == dict(plan.assignment)
    assert plan.average_bits <= 3.0 and plan.gap < 1e-12
    assert len(Counter(str(choice) for choice in plan.assignment.values())) > 1
    methods = {choice.recipe.method for choice in Store.open(out / "compensated.weights").identity.choices.values()
               if choice.recipe}  # fmt: skip
    assert methods == {"gptq"}
    # The table is measured once for all arms of the same states.
    assert [path.name for path in sorted(out.glob("table-*.json"))] == ["table-0.json"]


def test_choices_of_an_arm_s_own_are_scored_and_packed(
    out: Path, materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.tables.arms.open_sources", lambda *_: [FakeSource((5, 4))])
    choices = parse_choices(["w2a16_g8:gptq", "w4a16_g8:gptq"])
    prepare(materials, Arm(average_bits=3.0, choices=choices), out, "own")
    plan = Plan.load(out / "own.plan.json")
    assert set(plan.assignment.values()) <= {*choices, FULL}
    assert dict(Store.open(out / "own.weights").identity.choices) == dict(plan.assignment)
    (scored,) = (Sensitivity.load(path) for path in out.glob("*.table-0.json"))
    assert set(choices) <= set(scored.choices)
    assert Sensitivity.load(out / "table-0.json").choices != scored.choices


def test_plan_and_store_give_the_same_actor(out: Path, materials: Materials) -> None:
    by_plan = ActorSpec("policy", materials.policy, plan=out / "evidence.plan.json")
    by_store = ActorSpec("policy", materials.policy, weights=out / "evidence.weights")
    state = Observation(np.full((32, 32, 3), 99, np.uint8), "open the drawer", np.zeros(2, np.float32))
    first, second = by_plan.load(), by_store.load()
    assert isinstance(first, TorchActor) and isinstance(second, TorchActor)
    tokens = first.act(state).tokens
    np.testing.assert_array_equal(first.scores(state, tokens), second.scores(state, tokens))
    assert by_plan.size() == by_store.size()
    assert "plan" in by_plan.settings() and "weights" in by_store.settings()
    assert by_plan.settings() != by_store.settings() != ActorSpec("policy", materials.policy).settings()


def test_bytes_are_codes_and_scales_and_16_bits_elsewhere(out: Path, materials: Materials) -> None:
    plain = ActorSpec("policy", materials.policy)
    weights = plain.size().stored_bytes // 2
    assert (plain.size().weights, plain.size().average_bits) == (weights, 16.0)
    # 4 bits and, for every 8 of them, a scale of 16: all of the tiny policy's widths but 588 are multiples of 8.
    rounded = replace(plain, uniform=parse_choice("w4a16_g8"))
    assert rounded.size().stored_bytes == pytest.approx(weights * (4 + 2) / 8, rel=0.01)
    assert rounded.size().average_bits == 4.0
    plan = Plan.load(out / "evidence.plan.json")
    planned = replace(plain, plan=out / "evidence.plan.json").size()
    assert 8 * planned.stored_bytes == plan.size.weight_bits + plan.size.scale_bits
    assert planned.average_bits == pytest.approx(plan.average_bits, abs=1e-12)


def test_a_budget_in_bytes_is_what_the_table_shows(
    out: Path, materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scales, and with what is kept at 16 bits."""
    monkeypatch.setattr("evaluation.tables.arms.open_sources", lambda *_: [FakeSource((5, 4))])
    limit = ActorSpec("policy", materials.policy).size().stored_bytes * 0.5
    prepare(materials, Arm(stored_mb=limit / 1e6), out, "bytes")
    stored = ActorSpec("policy", materials.policy, weights=out / "bytes.weights").size().stored_bytes
    assert 0.97 * limit < stored <= limit, "the tiny policy's layers are up to 3 % of it"


def test_the_plan_of_equal_bytes_is_as_large_as_quantvla_s_layout() -> None:
    """From the shapes: a float16 scale for 64 inputs, an order in int32, matrices of 64 x 64 in float16."""
    (section,) = read_config(ROOT / "benchmarks/quantvla.yaml")
    arms = {run.name: run.arm for run in section.runs if run.arm}
    stored = 0
    for unit in live_units(load_policy(section.runs[0].rollout.actor.folder)):
        pin = next((pin for pin in arms["quantvla"].pins if fnmatchcase(unit.name, pin.glob)), None)
        if pin is None or pin.choice == FULL:
            stored += 2 * unit.inputs * unit.outputs
        else:
            assert pin.choice == parse_choice("w4a8_g64") and unit.inputs % 64 == 0
            stored += unit.inputs * unit.outputs * (1 / 2 + 2 / 64) + 4 * unit.inputs + 2 * 64 * unit.inputs
    assert arms["evidence-equal-bytes"].stored_mb == pytest.approx(stored / 1e6, rel=0.001)


def test_weights_of_another_policy_are_refused(out: Path, tmp_path: Path) -> None:
    other = tiny_policy_folder(tmp_path / "other", seed=1)
    with pytest.raises(ArtefactError, match="made for the policy with sha256"):
        ActorSpec("policy", other, weights=out / "evidence.weights").load()
    with pytest.raises(ArtefactError, match="made for the policy with sha256"):
        ActorSpec("policy", other, plan=out / "evidence.plan.json").load()


def test_controls_know_nothing_of_the_policy(out: Path) -> None:
    table = Sensitivity.load(out / "table-0.json")
    low, high = parse_choices(["w2a16_g8", "w4a16_g8"])
    for signal in get_args(Control):
        other = controlled(table, Arm(average_bits=3.0, signal=signal, seed=3))
        parts: dict[str, set[float]] = {}
        for unit in other.units:
            assert unit.omega[low] == pytest.approx(16 * unit.omega[high])
            parts.setdefault(unit.group, set()).add(round(unit.omega[low] / unit.params * 16, 9))
        assert all(len(priorities) == 1 for priorities in parts.values())
        order = [priorities.pop() for priorities in parts.values()]
        assert (order == sorted(order, reverse=True)) == (signal == "depth")
        assert len(set(order)) == len(order)


def test_qvla_s_arms_share_one_table_and_differ_in_the_solver(
    materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.tables.arms.open_sources", lambda *_: [FakeSource((5, 4))])
    stores = {}
    for signal in get_args(ChannelSignal):
        arm = Arm(average_bits=6.0, signal=signal, keep=("head",))
        prepare(materials, arm, tmp_path, signal)
        _, weights = places(materials, arm, tmp_path, signal)
        stores[signal] = Store.open(weights)
        assert stores[signal].identity.rows.bits
        ActorSpec("policy", materials.policy, weights=weights).load()
    assert [path.name for path in tmp_path.glob("channels-[0-9].json")] == ["channels-0.json"]
    best, greedy = (Plan.load(tmp_path / f"{signal}.plan.json") for signal in stores)
    assert best.objective < greedy.objective and max(best.average_bits, greedy.average_bits) <= 6.0


def test_a_budget_out_of_reach_is_named(materials: Materials, out: Path) -> None:
    with pytest.raises(BudgetError, match="average bits"):
        prepare(materials, Arm(average_bits=1.0), out, "impossible")
    assert not (out / "impossible.plan.json").exists()


def test_an_arm_may_transform_the_policy_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its codes are those of the transformed policy, which is the one that is rolled out."""
    monkeypatch.setattr("evaluation.tables.arms.open_sources", lambda *_: [FakeSource((5, 4))])
    plain = Materials(tiny_pi05_folder(tmp_path / "policy"), (tmp_path,), 6, parse_choices(["w4a8_g32"]))
    arm = Arm(uniform=parse_choice("w4a8_g32"), transform="quantvla(weight_bits=2,group=32)")
    prepare(plain, arm, tmp_path / "arms", "corrected")
    policy, weights = places(plain, arm, tmp_path / "arms", "corrected")
    assert policy == tmp_path / "arms" / "quantvla-weight-bits-2-group-32-states-0"
    before, after = (load_policy(folder).state_dict() for folder in (plain.policy, policy))
    changed = {name.split(".")[-2] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"q_proj", "o_proj"}
    assert Store.open(weights).identity.parents["policy"] == sha256_policy(policy)
    ActorSpec("policy", policy, weights=weights).load()
    before = (policy / "config.json").stat().st_mtime_ns
    finer = replace(arm, uniform=parse_choice("w4a16_g32"))
    prepare(plain, finer, tmp_path / "arms", "finer")
    again, other = places(plain, finer, tmp_path / "arms", "finer")
    assert again == policy and (policy / "config.json").stat().st_mtime_ns == before
    assert Store.open(other).identity.parents["policy"] == sha256_policy(policy)


_CONFIG = """
sections:
  - name: mw
    title: Meta-World
    benchmark: metaworld
    policy: policies/metaworld
    trials: 3
    calibration: {sources: [episodes], samples: 8, choices: [w2a16_g64, w4a16_g64]}
    compare: [[evidence, gptq]]
    runs:
      - {name: bf16}
      - {name: alike, uniform: w4a16_g64}
      - {name: gptq, uniform: "w3a16_g64:gptq"}
      - {name: evidence, average_bits: 3.0, pins: ["*.lm_head=w4a16_g64"], states_seed: 2}
      - {name: smoothed, uniform: w4a16_g64, transform: "smoothquant(strength=0.5)"}
"""


def test_arms_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(_CONFIG)
    (section,) = read_config(path)
    assert section.pairs == (("evidence", "gptq"),)
    assert section.materials is not None and section.materials.sources == (tmp_path / "episodes",)
    plain, alike, gptq, evidence, smoothed = section.runs
    # Rounding that looks at no inputs needs no store.
    assert plain.arm is None and alike.arm is None
    assert isinstance(alike.rollout.actor, ActorSpec)
    assert alike.rollout.actor.uniform == parse_choice("w4a16_g64")
    assert gptq.arm == Arm(uniform=parse_choice("w3a16_g64:gptq"))
    assert evidence.arm is not None and (evidence.arm.average_bits, evidence.arm.seed) == (3.0, 2)
    # Its policy is made here, so its codes are, too.
    assert smoothed.arm == Arm(uniform=parse_choice("w4a16_g64"), transform="smoothquant")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("average_bits: 3.0", "signal: action", r"key 'pins' needs 'uniform', 'average_bits' or 'stored_mb' beside"),
        ("uniform: w4a16_g64}", "uniform: w4a16_g64, alpha: 1}", r"runs\[1\]: key 'alpha' belongs to a plan"),
        ("average_bits: 3.0", "average_bits: 3.0, stored_mb: 2", "'average_bits' and 'stored_mb' are two budgets"),
        ("uniform: w4a16_g64}", "uniform: w4a16_g64, stored_mb: 2}", r"runs\[1\]: key 'stored_mb' belongs to a plan"),
        ('average_bits: 3.0, pins: ["*.lm_head=w4a16_g64"]', "stored_mb: 2, signal: channels", "'stored_mb' belongs"),
        ("average_bits: 3.0", "average_bits: 3.0, signal: channels", "key 'pins' belongs to a plan of layers"),
        ("average_bits: 3.0", "average_bits: 3.0, keep: [head]", "key 'keep' belongs to the signals channels and"),
        ('pins: ["*.lm_head=w4a16_g64"]', "signal: channels, keep: [hat]", r"runs\[3\].keep: 'hat' is unknown"),
        ("average_bits: 3.0", "average_bits: 3.0, signal: luck", r"runs\[3\].signal: 'luck' is unknown"),
        ("{name: bf16}", "{name: bf16, engine: e, uniform: w4a16_g64}", "an engine has its formats built in"),
        ("[[evidence, gptq]]", "[[evidence, awq]]", r"compare\[0\]: expected the names of two runs"),
        ("name: alike", "name: bf16", "two runs are called 'bf16'"),
        ("samples: 8, ", "", r"calibration: key 'samples' is missing"),
        ("choices: [w2a16_g64", "choices: [w5a16_g64", r"calibration.choices: 5-bit codes"),
        ('"smoothquant(strength=0.5)"', "smoothing", r"runs\[4\]: transform 'smoothing' is unknown; choose one of"),
    ],
)
def test_a_wrong_arm_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "table.yaml"
    assert old in _CONFIG
    path.write_text(_CONFIG.replace(old, new))
    with pytest.raises(ArtefactError, match=message):
        read_config(path)


def test_arms_without_states_to_measure_on_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    path.write_text("\n".join(line for line in _CONFIG.splitlines() if "calibration" not in line))
    with pytest.raises(ArtefactError, match="run 'gptq' has its weights made, which needs the key 'calibration'"):
        read_config(path)


def test_holm_s_correction_by_hand() -> None:
    """Of 0.01, 0.04, 0.03, 0.005: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
