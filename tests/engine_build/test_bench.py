"""Benchmarks: both engines in one run, memory of their own processes, and the cost table's sums."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ragged import write_policy
from safetensors.torch import load_file, save_file

from calibrator.allocation.plan import Plan, PlanSize
from engine_build import bench as benching
from engine_build import costs
from engine_build.__main__ import main
from engine_build.bench import bench
from engine_build.build import Request, build
from engine_build.planned import beside_plan, planned_latency
from engine_build.weights import layers_of
from vla_policy.core.bench import Bench, Quantiles
from vla_policy.core.errors import ArtefactError, EngineError
from vla_policy.core.files import sha256_file
from vla_policy.core.formats import FULL, Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.targets import find_target


@pytest.fixture(scope="module")
def reference(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "engine"
    build(Request(workshop / "policy", find_target("cpu"), out, uniform=FULL))
    return out


def test_bench_writes_figures_and_costs(
    workshop: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, table = tmp_path / "bench.json", tmp_path / "costs.json"
    arguments = [
        "bench",
        str(workshop / "engine"),
        "--against",
        str(reference),
        "--repeats",
        "3",
        "--out",
        str(figures),
    ]
    arguments += ["--out", str(figures), "--cost-table", str(table)]
    assert main([*arguments, "--formats", "w16a16", "w4a16_g32"]) == 0
    assert "speed-up of a whole action" in capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert content["parents"] == Manifest.load(workshop / "engine").parents
    assert content["engine"]["sha256"] == sha256_file(workshop / "engine" / "manifest.json")
    assert [one["sha256"] for one in content["references"]] == [sha256_file(reference / "manifest.json")]
    loaded = Bench.load(figures)
    assert list(loaded.engine.stages) == ["preprocess", "vision", "prefill", "step", "action"]
    for side in ("engine", "reference"):
        measured = getattr(loaded, side)
        assert measured.stages["action"].count == 3
        assert measured.stages["step"].count == 6
        assert measured.peak_bytes > measured.idle_bytes > 0
        assert measured.load_s > 0
    assert loaded.engine.disk_bytes < loaded.reference.disk_bytes
    units = json.loads(table.read_text())["units"]
    assert set(units) == set(layers_of(Manifest.load(reference).config))
    formats = {"w16a16", "w4a16_g32", *(unit.planned for unit in Manifest.load(workshop / "engine").units)}
    assert all(set(costs) == formats and min(costs.values()) > 0 for costs in units.values())


def test_an_engine_is_measured_beside_several_at_once(workshop: Path, reference: Path, tmp_path: Path) -> None:
    """Of several backends, say; the fastest is what a report compares with."""
    other = Path(shutil.copytree(reference, tmp_path / "other"))
    command = ["bench", str(workshop / "engine"), "--against", str(reference), str(other), "--repeats", "2"]
    assert main([*command, "--out", str(tmp_path / "bench.json")]) == 0
    loaded = Bench.load(tmp_path / "bench.json")
    assert [(one.engine, one.backend) for one in loaded.references] == [
        (reference.name, "onnxruntime"),
        ("other", "onnxruntime"),
    ]
    medians = [one.stages["action"].median_ms for one in loaded.references]
    assert loaded.reference.stages["action"].median_ms == min(medians)
    assert loaded.speedup == min(medians) / loaded.engine.stages["action"].median_ms


def test_a_layer_costs_its_prefill_and_every_decode_step(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(reference)
    monkeypatch.setattr(costs, "_milliseconds", lambda backend, seen, *rest: float(seen[2]))
    table = costs.cost_table(manifest, [Format(4, 16, 32)], threads=1, action_ms=1e6)
    assert table["scale"] == 1 and "no 16-bit engine of the same kernels" in table["unfitted"]
    units = table["units"]
    assert table["fixed_ms"] == 1e6 - sum(entry["w16a16"] for entry in units.values())
    patches, registers, steps = 16, 5, 2
    assert units["vision_backbone.featurizer.patch_embed.proj"]["w16a16"] == patches
    assert units["vision_backbone.featurizer.blocks.0.mlp.fc1"]["w16a16"] == patches + registers
    assert units["vision_backbone.fused_featurizer.blocks.0.mlp.fc1"]["w16a16"] == patches
    assert units["language_model.model.layers.0.mlp.up_proj"]["w16a16"] == patches + costs.PROMPT_TOKENS + steps
    assert units["language_model.lm_head"]["w16a16"] == 1 + steps


def test_a_cost_table_gives_both_whole_actions_as_they_were_measured(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that take twice as long alone as in the graph: the table says what they take there."""
    manifest = Manifest.load(workshop / "engine")
    monkeypatch.setattr(costs, "_milliseconds", lambda backend, seen, fmt, *rest: 2.0 * fmt.weight_bits * seen[0])
    planned = {unit.name: unit.planned for unit in manifest.units}
    inside = {
        name: sum(run.times for run in runs) * layer.outputs
        for (name, runs), layer in zip(
            costs.runs_per_action(manifest.config).items(), layers_of(manifest.config).values(), strict=True
        )
    }
    fixed = 1000.0
    action = fixed + sum(Format.parse(planned[name]).weight_bits * times for name, times in inside.items())
    full = fixed + sum(16 * times for times in inside.values())
    table = costs.cost_table(manifest, [], threads=1, action_ms=action, full_ms=full)
    assert (table["scale"], table["fixed_ms"]) == (pytest.approx(0.5), pytest.approx(fixed))
    units = table["units"]
    assert table["fixed_ms"] + sum(units[name]["w16a16"] for name in units) == pytest.approx(full)
    assert table["fixed_ms"] + sum(units[name][planned[name]] for name in units) == pytest.approx(action)
    assert table["unfitted"] is None
    table = costs.cost_table(manifest, [], threads=1, action_ms=action, full_ms=action - 1)
    assert table["scale"] == 1 and "whole actions differ by -1 ms" in table["unfitted"]


def test_the_16_bit_engine_of_a_cost_table_has_the_same_kernels(workshop: Path, reference: Path) -> None:
    result = bench(workshop / "engine", [reference], 1, 1)
    target, measured = find_target("cpu"), result.reference.stages["action"].median_ms
    for backend, expected in (
        ("onnxruntime", measured), ("onnxruntime_vnni", measured), ("openvino", None), ("openvino_bf16", None),
    ):  # fmt: skip
        of_backend = replace(result, engine=replace(result.engine, backend=backend))
        assert costs.full_action_ms(of_backend, target) == expected
    mixed = replace(result, references=(result.engine,))
    assert costs.full_action_ms(mixed, target) is None


def test_an_action_is_held_against_its_plan(workshop: Path, reference: Path, tmp_path: Path) -> None:
    size = PlanSize(0, 0, 0)
    plan = Plan({}, "p" * 64, 0.75, 0.25, 0.0, 0.0, 0.0, "HIGHS", 4.0, size, 0, None, "cpu")
    path = tmp_path / "plan.json"
    plan.save(path)
    with pytest.raises(ArtefactError, match="was not built from this plan"):
        planned_latency(path, {"plan": "0" * 64})
    with pytest.raises(ArtefactError, match="has no latency; allocate with --latency-table, or leave --plan out"):
        planned_latency(path, {"plan": sha256_file(path)})
    result = bench(workshop / "engine", [reference], 1, 1)
    measured = result.engine.stages["action"].median_ms
    replace(plan, latency_ms=measured / 1.25, details={"latency_threads": 2}).save(path)
    line = beside_plan(result, planned_latency(path, {"plan": sha256_file(path)}))
    assert line.endswith(f"planned {measured / 1.25:.2f} ms, +25.0 %; planned for 2 threads, measured with 1")


def test_engines_of_different_policies_are_not_compared(workshop: Path, reference: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(reference, tmp_path / "other"))
    content = json.loads((other / "manifest.json").read_text())
    content["parents"]["policy"] = "f" * 64
    (other / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="built from another policy"):
        bench(workshop / "engine", [other], 1, 1)


def test_a_damaged_engine_ends_the_run_with_its_own_message(workshop: Path, reference: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(reference, tmp_path / "damaged"))
    (damaged / "vision.data").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"vision.data: 0 bytes, expected"):
        bench(workshop / "engine", [damaged], 1, 1)


def test_quantiles_interpolate() -> None:
    quantiles = Quantiles.of([float(value) for value in range(101)])
    assert (quantiles.median_ms, quantiles.p90_ms, quantiles.p99_ms, quantiles.count) == (50, 90, 99, 101)


def test_an_engine_that_overflows_is_named(tmp_path: Path) -> None:
    """Its weights are finite; the error comes out of its process as one, with the folder."""
    path = write_policy(tmp_path / "policy") / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.lm_head.weight"].fill_(2e38)
    save_file(tensors, path, metadata={"format": "pt"})
    engine = tmp_path / "engine"
    build(Request(path.parent, find_target("cpu"), engine, uniform=FULL))
    with pytest.raises(EngineError, match=f"^{engine}: logits of the action tokens: 256 of 256 values are not finite"):
        bench(engine, [engine], repeats=1, threads=1)


def test_a_stronger_baseline_that_runs_here_is_named(
    workshop: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, result = find_target("cpu"), bench(workshop / "engine", [reference], 1, 1)

    class Installed:
        def version(self) -> str:
            return "2026.4.1"

    class Missing:
        def version(self) -> str:
            raise ArtefactError("no bfloat16 products")

    monkeypatch.setattr("engine_build.backends.find_backend", lambda name: Installed())
    (line,) = benching.baselines_missing(result, cpu)
    assert "build --uniform w16a16 --backend openvino_bf16" in line
    monkeypatch.setattr("engine_build.backends.find_backend", lambda name: Missing())
    assert benching.baselines_missing(result, cpu) == []
