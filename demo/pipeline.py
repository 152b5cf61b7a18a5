"""The whole path on a recorded bag: calibration, sensitivity, bit plan, packed engine, ROS 2 node, report.

    make demo                       the demo policy and its bag
    make demo DEMO_ARGS="--average-bits 3.5 --out somewhere"

Every stage is the real one and resumes: a second run repeats only what its inputs, settings or code changed.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from calibrator.allocation.plan import KIND, SCHEMA_VERSION
from demo.stages import Stage, StageResult, run_stages
from engine_build.backends import find_backend
from engine_build.compiled import check_realised, planned_bytes
from vla_policy.core import cli
from vla_policy.core.bag import count_messages
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import claim_folder, read_json, write_json
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest
from vla_policy.core.observe import check_contract
from vla_policy.core.outputs import FolderKind
from vla_policy.core.policy_config import PolicyConfig

ROOT = Path(__file__).resolve().parents[1]
ROBOT = ROOT / "ros2_ws" / "src" / "vla_policy"
_CORE, _CALIBRATOR, _ENGINE = ROBOT / "vla_policy", ROOT / "calibrator", ROOT / "engine_build"
_REPLAY = ROOT / "evaluation" / "replay"
_REFERENCE_FORMAT = "w16a16"
_CHOICES = ("w2a8_g64", "w4a8_g64", "w8a8_g64")
"""With activations of 8 bits packed weights save time on a CPU, too."""
_FOLDER = FolderKind("demo", "demo.json")


@dataclass(frozen=True)
class Job:
    """What the pipeline works on. rate: replay speed as a multiple of the recorded one; samples: calibration states."""

    policy: Path
    bag: Path
    contract: Path
    out: Path
    average_bits: float
    samples: int
    seed: int
    rate: float
    repeats: int

    @property
    def engines(self) -> dict[str, Path]:
        return {"mixed": self.out / "engines" / "mixed", "reference": self.out / "engines" / "reference"}


def check_inputs(job: Job) -> None:
    """Raises before any work when the workspace is not there, or policy, bag and contract do not fit each other."""
    if importlib.util.find_spec("vla_policy_interfaces") is None:
        raise ArtefactError(
            "ROS package vla_policy_interfaces: not found; run `make demo`, or `make build` and then "
            "`tools/with_ros python -m demo.pipeline`"
        )
    contract = load_contract(job.contract)
    check_contract(contract, PolicyConfig.load(job.policy))
    empty = [topic for topic, count in count_messages(job.bag, contract).items() if count == 0]
    if empty:
        raise ArtefactError(f"{job.bag}: no message on {', '.join(empty)}; record the bag again")


def stages(job: Job) -> list[Stage]:
    """The chain; each stage calls the public command of the part that does the work."""
    calibration, sensitivity, plan = job.out / "calibration", job.out / "sensitivity.json", job.out / "plan.json"
    mixed, reference = job.engines["mixed"], job.engines["reference"]
    verification, verification16 = job.out / "verification.json", job.out / "verification-16-bit.json"
    frontier, bench, served = job.out / "frontier.json", job.out / "bench.json", job.out / "served.json"
    decisions, parity, report = job.out / "decisions.json", job.out / "parity.json", job.out / "report.html"
    serving = (ROOT / "demo" / "serving.py", ROOT / "demo" / "decisions.py")
    return [
        Stage(
            name="calibration",
            title="calibration set from the bag",
            parents=(job.bag, job.contract),
            settings={"samples": job.samples, "seed": job.seed},
            sources=(_CORE / "core", _CALIBRATOR),
            outputs=(calibration,),
            run=lambda: _calibrator(
                "collect", job.bag, "--contract", job.contract, "--out", calibration,
                "--samples", job.samples, "--seed", job.seed,
            ),
        ),
        Stage(
            name="sensitivity",
            title="task evidence and temporal sensitivity of every live layer in each choice",
            parents=(job.policy, calibration),
            settings={"choices": list(_CHOICES)},
            sources=(_CORE / "core", _CALIBRATOR),
            outputs=(sensitivity, job.out / "losses.safetensors", job.out / "maps.safetensors"),
            run=lambda: _measure(job.policy, calibration, sensitivity),
        ),
        Stage(
            name="plan",
            title=f"bit plan with {job.average_bits:g} bits on average",
            parents=(sensitivity,),
            settings={"average_bits": job.average_bits},
            sources=(_CORE / "core", _CALIBRATOR),
            outputs=(plan, frontier),
            run=lambda: _calibrator(
                "allocate", "--sensitivity", sensitivity, "--out", plan, "--average-bits", job.average_bits,
                "--target", "cpu", "--frontier", frontier,
            ),
        ),
        Stage(
            name="engines",
            title="mixed and 16-bit reference engine, built and verified",
            parents=(job.policy, plan, calibration),
            settings={"reference": _REFERENCE_FORMAT},
            sources=(_CORE / "core", _CALIBRATOR, _ENGINE),
            outputs=(mixed, reference, verification, verification16),
            run=lambda: _build_engines(job, plan, calibration, {"mixed": verification, "reference": verification16}),
        ),
        Stage(
            name="bench",
            title="latency and memory of both engines in turns",
            parents=(mixed, reference),
            settings={"repeats": job.repeats},
            sources=(_CORE / "core", _ENGINE),
            outputs=(bench,),
            run=lambda: _engine_build(
                "bench", mixed, "--against", reference, "--repeats", job.repeats, "--out", bench
            ),
        ),
        Stage(
            name="serving",
            title="the bag replayed over DDS to the ROS 2 node, its decisions recorded",
            parents=(mixed, job.bag, job.contract, *serving),
            settings={"rate": job.rate},
            sources=(_CORE, _REPLAY),
            outputs=(served, parity),
            run=lambda: _serve(job, served),
        ),
        Stage(
            name="decisions",
            title="full-precision decisions on the same frames",
            parents=(reference, job.bag, job.contract, ROOT / "demo" / "decisions.py"),
            settings={},
            sources=(_CORE / "core", _REPLAY),
            outputs=(decisions,),
            run=lambda: _decide(job, decisions),
        ),
        Stage(
            name="report",
            title="report",
            parents=(
                sensitivity, plan, frontier, calibration, mixed, verification, reference, bench, served, decisions,
                parity, _CALIBRATOR / "report" / "templates",
            ),
            settings={},
            sources=(_CORE / "core", _CALIBRATOR),
            outputs=(report,),
            run=lambda: _calibrator(
                "report", "--sensitivity", sensitivity, "--plan", plan, "--frontier", frontier,
                "--calibration", calibration, "--engine", mixed, "--verification", verification,
                "--reference-engine", reference, "--bench", bench,
                "--served", served, "--decisions", decisions, "--parity", parity,
                "--contract", job.contract, "--out", report,
            ),
        ),
    ]


def _calibrator(*arguments: object) -> None:
    from calibrator.__main__ import main

    _call(main, arguments)


def _engine_build(*arguments: object) -> None:
    from engine_build.__main__ import main

    _call(main, arguments)


def _call(main: Callable[[Sequence[str]], int], arguments: Sequence[object]) -> None:
    """Runs another part's command line; one that has already said what is wrong ends this one with its status."""
    status = main([str(argument) for argument in arguments])
    if status != 0:
        raise SystemExit(status)


def _measure(policy: Path, calibration: Path, out: Path) -> None:
    # The command keeps a finished table and refuses one of other inputs; here a table that still exists is outdated.
    out.unlink(missing_ok=True)
    _calibrator(
        "sensitivity", "--policy", policy, "--calibration", calibration, "--out", out, "--choices", *_CHOICES
    )


def _build_engines(job: Job, plan: Path, calibration: Path, verifications: Mapping[str, Path]) -> None:
    for name, formats in (("mixed", ("--plan", plan)), ("reference", ("--uniform", _REFERENCE_FORMAT))):
        folder = job.engines[name]
        _engine_build("build", "--policy", job.policy, *formats, "--target", "cpu", "--out", folder)
        given = ("--policy", job.policy, "--calibration", calibration)
        _engine_build("verify", folder, *given, "--out", verifications[name])
    print(packed_against_plan(job.engines["mixed"], plan))


def packed_against_plan(engine: Path, plan: Path) -> str:
    """The engine's weight bytes beside the plan's bits; what fills up ragged groups, and the scales' share, named.

    Raises ArtefactError when the engine's weights are not exactly those that the plan counts, or are packed in other
    bytes than their formats need.
    """
    manifest, planned = Manifest.load(engine), read_json(plan, KIND, SCHEMA_VERSION)
    bits = sum(unit.weights * Format.parse(unit.planned).weight_bits for unit in manifest.units)
    if bits != planned["weight_bits"]:
        raise ArtefactError(
            f"{engine}: {bits} bits of weights, {plan} plans {planned['weight_bits']}; build the engine again"
        )
    backend = find_backend(manifest.backend)
    check_realised(engine, manifest.units, backend)
    bare = sum(planned_bytes(unit, backend)[0] for unit in manifest.units)
    totals = manifest.totals()
    filling = f", {totals['code_bytes'] - bare:,} more fill up groups" if totals["code_bytes"] > bare else ""
    scales = 100 * totals["scale_bytes"] / totals["code_bytes"]
    return (
        f"packed: {bare:,} bytes of codes, as planned ({planned['average_bits']:.3f} bits on average){filling}; "
        f"scales add {totals['scale_bytes']:,} bytes ({scales:.1f} %)"
    )


def _decide(job: Job, out: Path) -> None:
    from demo.decisions import decide, write_decisions

    contract, engine = load_contract(job.contract), job.engines["reference"]
    write_decisions(out, engine, contract, decide(engine, job.bag, contract, "full precision"))


def _serve(job: Job, served: Path) -> None:
    from demo.decisions import check_parity

    command = [sys.executable, "-m", "demo.serving", "--rate", str(job.rate), "--out", str(served)]
    command += ["--engine", str(job.engines["mixed"]), "--bag", str(job.bag), "--contract", str(job.contract)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    parity = check_parity(served, job.engines["mixed"], job.bag, load_contract(job.contract))
    write_json(job.out / "parity.json", {"schema_version": 1, "kind": "parity", **asdict(parity)})
    print(
        f"{parity.served} of {parity.frames} frames served; {parity.equal} of {parity.served} equal the same engine "
        "called in this process, bit for bit"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chain; raises VlaError for what the user can mend."""
    job = _parse(argv)
    started = time.monotonic()
    check_inputs(job)
    claim_folder(job.out, _FOLDER, inputs=[job.policy, job.bag, job.contract])
    results = run_stages(stages(job), job.out)
    _summary(results, time.monotonic() - started)
    print(f"report: {(job.out / 'report.html').resolve()}")
    return 0


def _summary(results: Sequence[StageResult], duration_s: float) -> None:
    ran = [result for result in results if not result.skipped]
    print(f"{len(ran)} stages ran, {len(results) - len(ran)} were up to date, {duration_s:.1f} s in all")


def _parse(argv: Sequence[str] | None) -> Job:
    parser = argparse.ArgumentParser(
        prog="python -m demo.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    demo = ROOT / "demo"
    parser.add_argument("--policy", type=Path, default=demo / "policies" / "libero_object", help="policy folder")
    parser.add_argument("--bag", type=Path, default=demo / "bag", help="rosbag2 folder (default: the demo's)")
    parser.add_argument("--contract", type=Path, default=ROBOT / "config" / "libero.yaml", help="topic contract")
    parser.add_argument("--out", type=Path, default=demo / "out", help="folder for everything that is made")
    parser.add_argument("--average-bits", type=float, default=4.0, help="budget, bits per weight (default: 4.0)")
    parser.add_argument("--samples", type=int, default=32, help="calibration states (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of states (default: 0)")
    parser.add_argument("--rate", type=float, default=1.0, help="replay speed, times recorded (default: 1)")
    parser.add_argument("--repeats", type=int, default=30, help="decisions per engine in the bench (default: 30)")
    return Job(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli.run(main))
