"""`sensitivity`: policy + calibration set -> scores of every layer in every choice."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from calibrator.commands import options

if TYPE_CHECKING:
    from calibrator.sensitivity.table import Sensitivity
    from vla_policy.core.formats import Choice

_WEIGHT_ONLY = ("w2a16", "w4a16", "w8a16")
_WITH_ACTIVATIONS = ("w2a8", "w4a8", "w8a8")


def add(parser: argparse.ArgumentParser) -> None:
    options.add_policy(parser)
    options.add_calibration(parser)
    parser.add_argument("--out", type=Path, required=True, help="sensitivity.json to write")
    parser.add_argument(
        "--choices",
        nargs="+",
        metavar="CHOICE",
        help="what every layer is measured in: bits of weights and activations, inputs per weight scale (none: one "
        "scale per output channel), rounding method, e.g. w16a16 w8a8 w4a8_g32 w4a16_g64:gptq; w16a16 is the "
        "reference and always offered; default: w2a16_g64 w4a16_g64 w8a16_g64, of a --target those that it runs, 8-bit "
        "activations too. Formats without a kernel can be measured and are marked so; with ONNX Runtime 2 and 8 bits "
        "save memory, not time, unless activations have 8 bits",
    )
    parser.add_argument("--target", help="machine whose kernels say how activations are rounded; default: per token")
    parser.add_argument("--units", nargs="+", default=["*"], help="only layers whose names match these globs")
    options.add_unnorm_key(parser)
    options.add_accept(parser)
    _add_scores(parser.add_argument_group("scores", "what an evaluation becomes; equations are Mix-QVLA's"))
    _add_screening(parser.add_argument_group("fewer evaluations"))
    _add_run(parser.add_argument_group("run", "where and how it runs"))


def _add_scores(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--kappa", type=float, default=0.1, help="temperature of the soft bottleneck, Eq. (9)")
    group.add_argument(
        "--lambda", dest="attribution_weight", type=float, default=1.0, help="weight of attribution, Eq. (8)"
    )
    group.add_argument(
        "--bins",
        type=int,
        default=5,
        help="phases of a trajectory, Eq. (12): Omega_tau is the largest of their means, so each wants some 6 states "
        "or one state sets it; 5 give 32 states that",
    )
    group.add_argument("--epsilon", type=float, default=1e-12, help="added to evidence in Eqs. (6), (7)")
    group.add_argument(
        "--language-block",
        type=int,
        help="decoder block whose input is a boundary; default: the last, of pi0 and pi0.5 the middle one",
    )


def _add_screening(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mode",
        choices=("exact", "screened"),
        default="exact",
        help="screened: exact only where a plan of --targets is undecided, corrected first-order scores elsewhere; "
        "allocate then takes these budgets only",
    )
    group.add_argument("--targets", type=float, nargs="+", default=[3.0, 4.0, 6.0], help="screened: average bits")
    group.add_argument("--cap", type=float, default=0.1, help="screened: largest part of all exact evaluations")
    group.add_argument(
        "--first-order",
        action="store_true",
        help="also estimate the action error to first order, for allocate --signal proxy; screened does in any case",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="how weights are held; bfloat16 takes half the memory and about a quarter more time, and loses nothing of "
        "a checkpoint in bfloat16: activations, gradients and losses are float32 either way",
    )
    options.add_device(group)
    group.add_argument("--batch-size", type=int, default=16, help="states per pass")
    group.add_argument("--threads", type=int, help="torch threads; default 1 below 0.1 B parameters, all cores above")
    group.add_argument("--executor", choices=("local", "ray"), default="local")
    group.add_argument("--ray-address", help="address of a running Ray cluster; default: one on this machine")
    group.add_argument("--cpus-per-task", type=int, default=1, help="CPU cores of a Ray task")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue an unfinished run and keep a finished one; --no-resume discards both",
    )


def run(args: argparse.Namespace) -> int:
    from calibrator.sensitivity.measure import measure
    from calibrator.sensitivity.run import RunOptions
    from calibrator.sensitivity.scores import ScoreSettings
    from calibrator.sensitivity.screening import ScreenSettings
    from calibrator.sensitivity.sweep import SweepSettings, SweepSpec
    from vla_policy.core.formats import FULL

    choices = tuple(choice for choice in choices_to_measure(args) if choice != FULL)
    settings = SweepSettings(choices, args.language_block, args.epsilon, args.dtype, args.unnorm_key, args.target)
    spec = SweepSpec(str(args.policy), str(args.calibration), settings, args.batch_size, args.device)
    screen = ScreenSettings(tuple(args.targets), args.cap)
    how = RunOptions(
        executor=args.executor,
        ray_address=args.ray_address,
        cpus_per_task=args.cpus_per_task,
        resume=args.resume,
        unit_globs=tuple(args.units),
        screen=screen if args.mode == "screened" else None,
        first_order=args.first_order,
        threads=args.threads,
        accept_conventions=args.accept_conventions,
    )
    result = measure(spec, args.out, ScoreSettings(args.kappa, args.attribution_weight, args.bins), how)
    low = result.choices[0]
    worst = sorted(result.units, key=lambda unit: -unit.omega[low])[:3]
    print(f"{args.out}: {len(result.units)} layers in {', '.join(map(str, settings.choices))}")
    print(f"most fragile in {low}: " + ", ".join(f"{unit.name} {unit.omega[low]:.3f}" for unit in worst))
    for note in _notes(result):
        print(note)
    return 0


def _notes(result: "Sensitivity") -> Iterator[str]:
    """What a reader of the scores should know."""
    yield f"note: {result.meta['conventions']['summary']}"
    if facts := result.screened:
        yield (
            f"screened: {facts['evaluations']} of {facts['exhaustive_evaluations']} evaluations, the other scores are "
            f"estimates; {facts['reason']}"
        )
    for choice, reason in result.meta["no_kernel"].items():
        yield f"note: {choice} has no kernel ({reason}); an engine cannot have it"
    if below := result.meta["below_floor"]:
        count = sum(len(entry["choices"]) for entry in below)
        yield f"note: {count} scores are not above the noise floor, {result.noise_floor:.2g}: nothing was seen there"
    if result.random_spread is not None:
        low = result.choices[0]
        yield (
            f"note: other random numbers alone change the action by {result.random_spread:.2g} (action error); "
            f"{len(result.below_spread(low))} of {len(result.units)} layers in {low} change it less"
        )
    if strays := result.meta["stray_states"]:
        yield f"note: in {strays} of the states the policy prefers a token that is no action"
    if result.meta["inversions"]:
        count = len(result.meta["inversions"])
        yield f"note: {count} times the more precise of two choices scored worse; use more states if it matters"


def choices_to_measure(args: argparse.Namespace) -> tuple["Choice", ...]:
    """What was asked for, or what is usually worth measuring."""
    from calibrator.quantizers import parse_choices
    from vla_policy.core.targets import find_target

    target = find_target(args.target) if args.target else None
    if args.choices or target is None:
        return parse_choices(args.choices or [f"{bare}_g64" for bare in _WEIGHT_ONLY])
    legal = {str(fmt) for fmt in target.legal()}
    wanted = [[f"{bare}_g64", bare] for bare in (*_WEIGHT_ONLY, *_WITH_ACTIVATIONS)]
    return parse_choices([name for names in wanted for name in [n for n in names if n in legal][:1]])
