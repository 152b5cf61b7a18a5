"""`collect`: recordings and data sets -> calibration set."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calibrator.commands import options
from calibrator.commands.check import conventions
from vla_policy.core.instruction import normalised

if TYPE_CHECKING:
    from calibrator.data.calibration import CalibrationSet


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        help="rosbag2 recordings, LeRobot (v3.0, v2.1) or RLDS data sets, LIBERO HDF5, folders of demo.collect",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the calibration set")
    parser.add_argument(
        "--samples", type=int, default=32, help="number of states; 32 give each of sensitivity's 5 phases some 6"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice")
    parser.add_argument("--contract", type=Path, help="topic contract (YAML), needed for bags; it is their layout")
    parser.add_argument("--namespace", default="", help="ROS namespace of the bag's relative topics")
    _add_layout(parser)
    group = parser.add_argument_group("check", "with a policy, its decisions on the states against recorded actions")
    options.add_policy(group, required=False)
    options.add_unnorm_key(group)
    options.add_accept(group)


def _add_layout(parser: argparse.ArgumentParser) -> None:
    """What of a record the policy sees; nothing given means what the source itself says."""
    group = parser.add_argument_group("layout", "what of a record the policy sees, in the source's own names")
    group.add_argument("--layout", metavar="PRESET", help="a published set's; what is given besides replaces its parts")
    group.add_argument("--camera", nargs="+", help="images, in the policy's order")
    group.add_argument(
        "--state", nargs="*", help="parts of the state, joined in this order, e.g. 'observation.state[0:6]'"
    )
    group.add_argument("--action", help="recorded actions, which the policy's own are checked against")
    group.add_argument("--task", help="text that holds the task")
    group.add_argument("--instruction", type=normalised, help="task, where a record tells none")
    group.add_argument(
        "--rotate", nargs="+", type=int, choices=(0, 180), help="degrees by which stored images are turned, one or each"
    )
    group.add_argument(
        "--crop-area", nargs="+", type=float, metavar="PART", help="centre that is kept, part in (0, 1], one or each"
    )
    group.add_argument("--colours", choices=("rgb", "bgr"), help="order of stored colours")
    group.add_argument(
        "--gripper", choices=("same", "opposite"), help="sense of the recorded gripper, against the policy's"
    )


def run(args: argparse.Namespace) -> int:
    from calibrator.data.calibration import CALIBRATION, collect
    from calibrator.data.layout import RecordLayout
    from calibrator.data.sources import open_sources
    from vla_policy.core.contract import load_contract
    from vla_policy.core.left_out import LeftOut, told
    from vla_policy.core.outputs import check_folder

    check_folder(args.out, CALIBRATION, [*args.sources, args.contract])
    contract = load_contract(args.contract) if args.contract else None
    layout = RecordLayout.named(
        args.layout,
        cameras=args.camera,
        state=args.state,
        action=args.action,
        task=args.task,
        instruction=args.instruction,
        rotation=args.rotate,
        crop_area=args.crop_area,
        colours=args.colours,
        gripper=args.gripper,
    )
    sources = open_sources(args.sources, contract, args.namespace, layout)

    def judge(states: "CalibrationSet") -> None:
        print(conventions(args, states))

    content = collect(sources, args.out, args.samples, args.seed, judge if args.policy else None)
    for source in content["sources"]:
        reasons = told(LeftOut(**item) for item in source["left_out"])
        print(f"{source['path']}: {source['trajectories']} trajectories; left out: {reasons}")
        for note in source["notes"]:
            print(f"note: {note}")
    print(f"{args.out}: {len(content['samples'])} states")
    return 0
