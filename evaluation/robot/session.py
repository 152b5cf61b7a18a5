"""`python -m evaluation.robot.session`: the simulated robot, who drives it, and a recorder, as processes over DDS.

    tools/with_ros python -m evaluation.robot.session --engine ENGINE --tasks TASK TASK --trials 0 1
    tools/with_ros python -m evaluation.robot.session --engine ENGINE --bag demo/bag --replace

The same nodes and parameters as `ros2 launch vla_deploy sim_policy.launch.py`, where no launch is installed. A bag is
kept only when every episode succeeded. Exit code 0: all succeeded; 1: one failed; 2: bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from evaluation.processes import Value, end, ended_in_order, node_command, running, shared_file
from evaluation.robot import SUMMARY
from vla_policy.core import cli
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ArtefactError
from vla_policy.core.manifest import Manifest
from vla_policy.core.outputs import atomic_folder, check_file, check_folder, scratch_beside
from vla_policy.core.recording import BAG


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` and runs the episodes."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.robot.session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    driver = parser.add_mutually_exclusive_group(required=True)
    driver.add_argument("--engine", type=Path, help="engine folder of the policy that drives")
    driver.add_argument("--expert", action="store_true", help="the scripted expert drives (libero_object only)")
    parser.add_argument(
        "--unnorm-key", metavar="KEY", help="which of the policy's statistics to use (default: the only ones)"
    )
    parser.add_argument("--contract", type=Path, help="YAML that maps topics (default: the package's libero.yaml)")
    parser.add_argument("--suite", default="libero_object", help="LIBERO suite (default %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=[], help="task names (default: all of the suite)")
    parser.add_argument("--trials", nargs="+", type=int, default=[0], help="official initial states (default: 0)")
    parser.add_argument("--max-steps", type=int, default=0, help="control steps an episode; 0: as the suite says")
    parser.add_argument("--bag", type=Path, help="mcap bag of the contract's topics and the commands to write")
    parser.add_argument("--replace", action="store_true", help="a bag of that name may exist and is replaced")
    parser.add_argument("--summary", type=Path, help="JSON file for the episodes' outcomes")
    return cli.run(partial(_run, parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    contract = arguments.contract or shared_file("libero.yaml")
    bag: Path | None = arguments.bag
    if bag is not None and bag.exists() and not arguments.replace:
        raise ArtefactError(f"{bag}: exists already; add --replace or choose another name")
    inputs = [contract, arguments.engine]
    if bag is not None:
        check_folder(bag, BAG, inputs)
    if arguments.summary is not None:
        check_file(arguments.summary, SUMMARY, [*inputs, bag])
    if arguments.engine is not None:
        # What is no engine, or has no such statistics, is refused here, before the simulator waits for its policy.
        Manifest.load(arguments.engine).config.unnorm_key(arguments.unnorm_key)
    with ended_in_order(), ExitStack() as nodes:
        if arguments.engine is not None:
            nodes.enter_context(running(_policy(arguments.engine, arguments.unnorm_key, contract)))
        if bag is not None:
            recorded = nodes.enter_context(scratch_beside(bag)) / bag.name
            recorder = nodes.enter_context(running(_recorder(contract, recorded)))
        code = nodes.enter_context(running(_robot(arguments, contract))).wait()
        if code == 0 and bag is not None:
            if end(recorder) != 0:
                raise ArtefactError(f"{bag}: the recorder failed; its message is above")
            with atomic_folder(bag, BAG) as folder:
                recorded.replace(folder)
        elif bag is not None:
            print(f"{bag}: not written, as not every episode succeeded", file=sys.stderr)
        return code


def _policy(engine: Path, unnorm_key: str | None, contract: Path) -> list[str]:
    values: dict[str, Value] = {
        "engine_path": engine.resolve(),
        "unnorm_key": unnorm_key or "",
        "contract": contract.resolve(),
        "use_sim_time": True,
        "enabled": True,
        "check_sources": "graph",
    }
    return node_command("vla_policy.nodes.policy_node", values, shared_file("simulation.params.yaml"))


def _recorder(contract: Path, output: Path) -> list[str]:
    action = load_contract(contract).action
    commands = [action.topic] + ([] if action.gripper is None else [action.gripper.topic])
    values: dict[str, Value] = {"output": output.resolve(), "contract": contract.resolve(), "topics": commands}
    return node_command("vla_policy.nodes.record_node", values | {"use_sim_time": True})


def _robot(arguments: argparse.Namespace, contract: Path) -> list[str]:
    listeners = int(arguments.engine is not None) + int(arguments.bag is not None)
    values: dict[str, Value] = {
        "contract": contract.resolve(),
        "suite": arguments.suite,
        "trials": arguments.trials,
        "driver": "expert" if arguments.expert else "commands",
        "max_steps": arguments.max_steps,
        "min_subscribers": listeners,
    }
    if arguments.tasks:
        values["tasks"] = arguments.tasks
    if arguments.summary is not None:
        values["summary"] = arguments.summary.resolve()
    return node_command("evaluation.robot", values)


if __name__ == "__main__":
    sys.exit(main())
