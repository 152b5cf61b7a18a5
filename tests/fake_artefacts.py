"""One run's artefacts with made-up numbers, written by the real writers where these need no policy."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_config

from calibrator.allocation.plan import Plan
from calibrator.allocation.planning import Limits, Planner, PlanRequest, write_frontier
from calibrator.conventions.check import AS_RECORDED, GRIPPER, Outcome, Trial
from calibrator.data.calibration import collect, load_calibration
from calibrator.data.records import Record, SourceIndex, Trajectory
from calibrator.quantizers import parse_choices
from calibrator.report.inputs import Paths
from calibrator.sensitivity.scores import ScoreSettings, phase_of
from calibrator.sensitivity.sweep import UnitLosses
from calibrator.sensitivity.table import Estimate, Sensitivity, UnitShape, score_unit, stack_losses, write_tensors
from evaluation.results import Episode
from vla_policy.core.bench import Bench, EngineFigures, Quantiles
from vla_policy.core.files import sha256_file, sha256_folder, write_json
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.manifest import FileRecord, Manifest, UnitRecord
from vla_policy.core.observation import Observation
from vla_policy.core.verification import Decisions, Largest, Layers, Reference, Verification

POLICY_SHA256 = hashlib.sha256(b"policy").hexdigest()
INSTRUCTION = "put the <b>cup</b> & <script>alert('x')</script> away"
CHOICES = parse_choices(("w2a16_g64", "w4a16_g64", "w8a16_g64"))
FRAMES = 40
BINS = 10


def fake_shapes() -> list[UnitShape]:
    """Two small towers, a projector, two decoder blocks with fused groups, a head."""
    vision = [
        (f"{tower}.blocks.{block}.{layer}", "vision", f"vision: {track}", None)
        for tower, track in (("featurizer", "DINOv2"), ("fused_featurizer", "SigLIP"))
        for block in range(2)
        for layer in ("attn.qkv", "mlp.fc1")
    ]
    projector = [(f"projector.fc{number}", "projector", "projector", None) for number in (1, 2)]
    decoder = [
        (f"layers.{block}.{layer}", "language", "language", f"layers.{block}.{group}")
        for block in range(2)
        for layer, group in (
            ("self_attn.q_proj", "qkv"),
            ("self_attn.k_proj", "qkv"),
            ("self_attn.o_proj", "o_proj"),
            ("mlp.down_proj", "down_proj"),
        )
    ]
    head = [("lm_head", "head", "head", None)]
    return [
        UnitShape(
            name=f"policy.{label}",
            label=label,
            stage=stage,
            track=track,
            segment=stage,
            kind="head" if stage == "head" else "linear",
            group=group or label,
            inputs=128,
            outputs=64 + 64 * (index % 3),
            macs=1000 * (index + 1),
        )
        for index, (label, stage, track, group) in enumerate([*vision, *projector, *decoder, *head])
    ]


class FakeSource:
    """Three trajectories of random images under an instruction that is hostile to HTML."""

    path = "fake"

    def index(self) -> SourceIndex:
        return SourceIndex(tuple(Trajectory(f"episode_{n}", 9, tuple(range(9))) for n in range(3)), {})

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        for name, steps in wanted.items():
            for step in sorted(steps):
                image = np.random.default_rng(step).integers(0, 256, (24, 32, 3), dtype=np.uint8)
                yield Record(name, step, Observation(image, INSTRUCTION, None))

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake", "path": self.path}

CONVENTIONS = Outcome(
    states=32,
    unnorm_key="fake",
    dimensions=(
        {"error": 0.25, "spread": 0.5, "correlation": 0.875, "gripper": False},
        {"error": 0.125, "spread": 0.0, "correlation": None, "gripper": True},
    ),
    trials=(
        Trial(AS_RECORDED, "", 0.75, -0.25, 0.5, False),
        Trial("images <turned>", "turn them", 0.25, 0.96, None, True),
        Trial(GRIPPER, "", 0.75, -0.25, 0.5, False),
    ),
    accepted=True,
)


@dataclass(frozen=True)
class Table:
    """What the made-up sensitivity table is like.

    screened: whether a layer was evaluated in a choice, on two of the states; None for a table of an exact run, which
    evaluates every layer in every choice on every state.
    """

    choices: tuple[Choice, ...] = CHOICES
    shapes: Sequence[UnitShape] = field(default_factory=fake_shapes)
    screened: Callable[[UnitShape, Choice], bool] | None = None


@dataclass(frozen=True)
class FakeArtefacts:
    """A folder with everything that a report can be made from."""

    folder: Path

    @property
    def paths(self) -> Paths:
        at = self.folder
        return Paths(
            sensitivity=at / "sensitivity.json",
            plan=at / "plan.json",
            frontier=at / "frontier.json" if (at / "frontier.json").exists() else None,
            calibration=at / "calibration",
            engine=at / "mixed",
            verification=at / "verification.json",
            reference_engine=at / "reference",
            bench=at / "bench.json",
            served=at / "served.json",
            decisions=at / "decisions.json",
            parity=at / "parity.json",
            rollouts=(at / "rollout.json",),
        )

    @staticmethod
    def write(folder: Path, seed: int = 0, table: Table | None = None) -> "FakeArtefacts":
        generator = np.random.default_rng(seed)
        collect([FakeSource()], folder / "calibration", count=12, seed=0)
        sensitivity = _write_sensitivity(folder, generator, table or Table())
        _write_plan(folder, sensitivity)
        for name, uniform in (("mixed", None), ("reference", FULL)):
            _write_engine(folder, name, sensitivity, uniform)
        _verification(folder).save(folder / "verification.json")
        _bench(folder).save(folder / "bench.json")
        _write_served(folder, generator)
        write_json(folder / "rollout.json", _rollout(sha256_folder(folder / "mixed")))
        return FakeArtefacts(folder)


def _write_sensitivity(folder: Path, generator: np.random.Generator, table: Table) -> Sensitivity:
    calibration, scores, choices = load_calibration(folder / "calibration"), ScoreSettings(bins=BINS), table.choices
    samples = tuple(range(len(calibration)))
    phases = phase_of(calibration.progress, scores.bins)
    records, proxies, units = [], [], []
    for shape in table.shapes:
        strength = np.asarray([1.0, 0.1, 0.01])[:, None, None] * generator.lognormal(-1, 1)
        noise = generator.lognormal(0, 0.5, (len(choices), len(samples), 4))
        error = generator.lognormal(-6, 1, (len(choices), len(samples))) * (generator.random() < 0.7)
        drop = -generator.random((len(choices), len(samples)))
        record = UnitLosses(shape.name, choices, samples, strength * noise, 0.3 * strength * noise, error, drop)
        estimate = None
        if table.screened is not None:
            _forget(record, [table.screened(shape, choice) for choice in choices])
            estimate = Estimate(1.3 * strength[:, 0, 0], 2.0 * strength[:, 0, 0])
        proxy = generator.random((len(choices), len(samples)))
        records.append(record)
        proxies.append(proxy)
        units.append(score_unit(shape, record, proxy, phases, scores, estimate))
    maps = {
        "evidence": generator.random((2, 3, 4, 6)).astype(np.float32),
        "loss": generator.random((2, 3, 4)).astype(np.float32),
    }
    maps["loss"][..., 0] = 0.0
    files = {}
    losses = stack_losses(records, proxies, calibration.progress, scores)
    for key, arrays in (("losses", losses), ("maps", maps)):
        path = folder / f"{key}.safetensors"
        files[key] = {"name": path.name, "sha256": write_tensors(path, arrays, key)}
    content = {
        "schema_version": 3,
        "kind": "sensitivity",
        "mode": "exact" if table.screened is None else "screened",
        "exact_evaluations": 120,
        **({} if table.screened is None else {"screening": _SCREENING}),
        "random_spread": None,
        "noise_floor": {"omega": 1e-6, "samples": [0]},
        "below_floor": [],
        "no_kernel": {},
        "policy": {"id": "fake_policy", "sha256": POLICY_SHA256},
        "calibration": {"sha256": calibration.sha256, "samples": len(samples), "trajectories": 3},
        "choices": [choice.to_json() for choice in (*choices, FULL)],
        "conventions": CONVENTIONS.to_json(),
        "kappa": scores.kappa,
        "lambda": scores.attribution_weight,
        "bins": scores.bins,
        "language_block": 1,
        "dtype": "float32",
        "unquantized_params": 5000,
        "inversions": [],
        "files": files,
        "maps": {
            "boundary": "vision",
            "units": [units[0].name, units[-1].name],
            "samples": [1, 5, 9],
            "choices": [str(choice) for choice in (FULL, *choices[::-1])],
            "grid": [2, 3],
        },
        "units": [unit.to_json() for unit in units],
    }
    write_json(folder / "sensitivity.json", content)
    return Sensitivity.load(folder / "sensitivity.json")


_SCREENING = {
    "targets": [4.5],
    "alpha": 0.75,
    "beta": 0.25,
    "evaluations": 120,
    "exhaustive_evaluations": 1200,
    "reason": "cap on <evaluations> reached",
}


def _forget(record: UnitLosses, evaluated: Sequence[bool]) -> None:
    """Leaves two states of the choices that were evaluated, and none of the others, as screening does."""
    for array in (record.mass, record.attribution, record.action_error, record.likelihood):
        array[:, 2:] = np.nan
        array[~np.asarray(evaluated)] = np.nan


def _write_plan(folder: Path, sensitivity: Sensitivity) -> None:
    # A screened table serves no target that runs other formats than were measured.
    target = "cpu" if sensitivity.screened is None else None
    planner = Planner.of(sensitivity, PlanRequest(Limits(average_bits=4.5), target=target))
    planner.plan().save(folder / "plan.json")
    if sensitivity.screened is None:
        write_frontier(folder / "frontier.json", planner, 9)


def _write_engine(folder: Path, name: str, sensitivity: Sensitivity, uniform: Choice | None) -> None:
    assignment = Plan.load(folder / "plan.json").assignment
    units = []
    for unit in sensitivity.units:
        choice = uniform or assignment[unit.name]
        fmt, bits = str(choice.format), choice.format.weight_bits
        scales = 0 if bits == 16 else unit.outputs * (unit.inputs // 64) * 2
        codes = unit.params * bits // 8
        units.append(
            UnitRecord(
                name=unit.name,
                kind="linear",
                graph="decoder",
                outputs=unit.outputs,
                inputs=unit.inputs,
                planned=fmt,
                realised=fmt,
                arithmetic="float32 MatMul",
                code_bytes=codes,
                scale_bytes=scales,
                resident_bytes=None,
                recipe=choice.recipe,
            )
        )
    held = sum(unit.code_bytes + unit.scale_bytes for unit in units)
    parents = {"policy": POLICY_SHA256} | ({} if uniform else {"plan": sha256_file(folder / "plan.json")})
    manifest = Manifest(
        target="cpu",
        backend="onnxruntime",
        backend_version="1.31.0",
        builder_version="0.1.0",
        graphs={},
        program={},
        units=tuple(units),
        files={"decoder.data": FileRecord("0" * 64, held + 12345)},
        parents=parents,
        policy_config=tiny_config(448),
        other_bytes=12345,
    )
    manifest.write(folder / name)


def _verification(folder: Path) -> Verification:
    same, full = (Decisions(error, 10 * error, 1 - error, 1.0, 1.0, error, 0) for error in (1e-6, 0.1))
    layers = Layers({"w4a16_g64": Largest(1e-6, "projector.fc1", 1e-4)}, Largest(2e-6, "projector.fc2", 1e-4))
    summary = "8 states; <i>equal</i>"
    reference = Reference("A CPU <b>&</b>", 8, "calibration set", "libero", 1e-4, same, full, layers, summary)
    parents = {"engine": sha256_file(folder / "mixed" / "manifest.json"), "policy": POLICY_SHA256}
    return Verification("mixed", parents, 120, 987654, "", reference)


def _bench(folder: Path) -> Bench:
    def figures(name: str, factor: float) -> EngineFigures:
        stages = {"vision": 10.0, "prefill": 8.0, "step": 0.5, "action": 21.5}
        return EngineFigures(
            engine=name,
            backend="onnxruntime",
            sha256=sha256_file(folder / name / "manifest.json"),
            disk_bytes=round(1e6 * factor),
            average_bits=16 * factor / 4,
            load_s=0.25 * factor,
            idle_bytes=43_000_000,
            peak_bytes=round(60e6 + 2e6 * factor),
            stages={
                stage: Quantiles(ms * factor, 1.2 * ms * factor, 1.5 * ms * factor, 30) for stage, ms in stages.items()
            },
        )

    parents = {"policy": POLICY_SHA256, "plan": sha256_file(folder / "plan.json")}
    references = figures("reference", 1.7), replace(figures("reference", 1.9), backend="openvino_bf16")
    return Bench(figures("mixed", 1.0), references, 1, "x86_64, a CPU", parents)


def _write_served(folder: Path, generator: np.random.Generator) -> None:
    exact = generator.normal(size=(FRAMES, 3))
    moved = exact + 0.01 * generator.normal(size=exact.shape) * (generator.random((FRAMES, 1)) < 0.3)

    def decision(index: int, action: np.ndarray) -> dict[str, Any]:
        return {
            "stamp_ns": 10**18 + index * 50_000_000,
            "instruction": INSTRUCTION,
            "tokens": [int(value * 1000) for value in action],
            "actions_hex": [float(value).hex() for value in action],
        }

    served = [
        decision(index, moved[index])
        | {"sequence": index, "latency_ms": 10.0 + index, "response_ms": 12.0 + 2 * index, "engine_id": "e"}
        for index in range(FRAMES - 2)
    ]
    mixed, reference = (sha256_file(folder / name / "manifest.json") for name in ("mixed", "reference"))
    write_json(
        folder / "served.json",
        {
            "schema_version": 1,
            "kind": "served",
            "parents": {"engine": mixed},
            "decisions": served,
            "expected": FRAMES,
            "drops": {"queue <full>": 2},
            "diagnostics": {},
            "duration_s": 2.0,
        },
    )
    decisions = [decision(index, exact[index]) for index in range(FRAMES)]
    content = {"schema_version": 1, "kind": "decisions", "parents": {"engine": reference}, "decisions": decisions}
    write_json(folder / "decisions.json", content)
    parity = {"frames": FRAMES, "served": FRAMES - 2, "equal": FRAMES - 2}
    write_json(folder / "parity.json", {"schema_version": 1, "kind": "parity", **parity})


def _rollout(actor_sha256: str) -> dict[str, Any]:
    episodes = [asdict(Episode("lift", trial, trial != 1, 20, 12.0, "s")) for trial in range(4)]
    return {
        "schema_version": 2,
        "kind": "rollout",
        "settings": {
            "benchmark": "libero_object",
            "actor": {"kind": "engine", "name": "mixed", "uniform": None, "sha256": actor_sha256},
        },
        "total": {"successes": 3, "trials": 4, "rate": 0.75, "wilson95": [0.3006, 0.9544]},
        "episodes": episodes,
    }
