"""`quantize`: policy + bit plan -> codes."""

import argparse
from collections import Counter
from pathlib import Path

from calibrator.commands import options


def add(parser: argparse.ArgumentParser) -> None:
    options.add_policy(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, help="plan.json made for this policy")
    what.add_argument("--uniform", metavar="CHOICE", help="every layer the same, e.g. w4a16_g64:mse")
    parser.add_argument("--method", metavar="RECIPE", help="rounding in place of the plan's, e.g. 'mse(steps=128)'")
    parser.add_argument("--calibration", type=Path, help="calibration set, for methods that look at a layer's input")
    options.add_unnorm_key(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the codes; a stopped run continues there")


def run(args: argparse.Namespace) -> int:
    from calibrator.quantize import QuantizeRequest, quantize
    from calibrator.quantizers import parse_choice

    uniform = parse_choice(args.uniform) if args.uniform else None
    states = args.calibration, args.unnorm_key
    store = quantize(QuantizeRequest(args.policy, args.out, args.plan, uniform, args.method, *states))
    counts = Counter(map(str, store.identity.choices.values()))
    print(f"{args.out}: " + ", ".join(f"{count} x {choice}" for choice, count in sorted(counts.items())))
    return 0
