"""The command line of the report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vla_policy.core.outputs import atomic_path, check_file

KIND = "report"
_OPTIONS = (
    ("plan", "plan.json: adds the allocation and what it protects"),
    ("frontier", "frontier.json: adds what more or less memory would change"),
    ("calibration", "calibration set: adds the camera images under the evidence maps"),
    ("engine", "engine folder: adds its bytes and its planned and realised formats"),
    ("verification", "verification.json: adds what was proven of the engine, and where it ran"),
    ("reference-engine", "16-bit engine folder: adds its bytes beside"),
    ("bench", "bench.json: adds latency and memory of both engines"),
    ("served", "served.json: adds served actions, response times and drops"),
    ("decisions", "full-precision decisions on the same bag: adds the action error"),
    ("parity", "parity.json: adds whether served actions equal in-process ones"),
    ("contract", "topic contract (YAML) of the served bag: adds names of action dimensions"),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m calibrator report",
        description="One self-contained HTML page from the artefacts that are given; it needs no network.",
    )
    parser.add_argument("--sensitivity", type=Path, required=True, help="sensitivity.json, its tensors beside it")
    for name, text in _OPTIONS:
        parser.add_argument(f"--{name}", type=Path, help=text)
    parser.add_argument(
        "--rollout", dest="rollouts", type=Path, nargs="*", default=[], help="closed-loop results: adds success rates"
    )
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    return parser


def run_report(argv: Sequence[str]) -> int:
    """Reads, checks, renders and writes. Raises ArtefactError for an artefact that cannot be used."""
    options = vars(_parser().parse_args(argv))
    out: Path = options.pop("out")
    rollouts = tuple(options.pop("rollouts"))
    check_file(out, KIND, [*options.values(), *rollouts])
    # The calibrator's readers import torch, which --help need not wait for.
    from calibrator.report.inputs import Inputs, Paths
    from calibrator.report.page import render

    page = render(Inputs.load(Paths(**options, rollouts=rollouts)))
    with atomic_path(out, KIND) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{out}: {len(page.encode()) / 1e6:.2f} MB, opens without a network")
    return 0
