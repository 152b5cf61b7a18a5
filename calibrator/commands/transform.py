"""`transform`: policy -> a policy that is easier to round."""

import argparse
from pathlib import Path

from calibrator.commands import options


def add(parser: argparse.ArgumentParser) -> None:
    options.add_policy(parser)
    options.add_calibration(parser)
    parser.add_argument(
        "--method",
        metavar="RECIPE",
        default="smoothquant",
        help="e.g. 'smoothquant(strength=0.7)', 'awq(bits=3,group=64)' or, for pi0.5, 'quantvla(weight_bits=4)'",
    )
    options.add_unnorm_key(parser)
    parser.add_argument("--out", type=Path, required=True, help="policy folder to write")


def run(args: argparse.Namespace) -> int:
    from calibrator.transform import TransformRequest, transform

    request = TransformRequest(args.policy, args.calibration, args.out, args.method, args.unnorm_key)
    print(f"{args.out}: {args.method}: {transform(request)}")
    return 0
