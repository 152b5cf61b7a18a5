"""Serves a bag over DDS and records the decisions; the policy node and the bag's publisher are separate processes.

    tools/with_ros python -m demo.serving --engine ENGINE --bag BAG --contract YAML --out served.json

The node is started with the command line that `ros2 launch` would generate for it, in a namespace of its own, as a dry
run: nothing can move.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rclpy
import yaml
from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image
from tqdm import tqdm
from vla_policy_interfaces.msg import ActionChunk

from evaluation.processes import running
from vla_policy.core import cli
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import IMAGE, CameraTopic, Contract, load_contract
from vla_policy.core.errors import VlaError
from vla_policy.core.files import claim_folder, sha256_file, sha256_folder, write_json
from vla_policy.core.outputs import FolderKind, check_file
from vla_policy.core.synchroniser import Frame

_KIND = "served"
_WORK = FolderKind("serving", "serving.json")
NAMESPACE = "/demo"
NODE = "policy"
_START_TIMEOUT_S = 60.0
_QUIET_TIMEOUT_S = 15.0
_QUEUE = 10_000


class ServingError(VlaError):
    """A node or a publisher that did not do what it was started for."""


@dataclass(frozen=True)
class Served:
    """One decision that arrived.

    actions_hex: the float64 values as `float.hex`, so that equal text means equal bits.
    latency_ms: the engine's time as the node measured it. response_ms: from the image's publication to the decision's
    arrival, both ways over DDS included, by DDS's own time stamps; None where the recorder missed the image.
    """

    stamp_ns: int
    sequence: int
    instruction: str
    tokens: tuple[int, ...]
    actions_hex: tuple[str, ...]
    latency_ms: float
    response_ms: float | None
    engine_id: str


@dataclass(frozen=True)
class Record:
    """What a session gave. `drops`: frames and messages not served, by reason, as the node's diagnostics count them."""

    decisions: tuple[Served, ...]
    expected: int
    drops: dict[str, int]
    diagnostics: dict[str, str]
    duration_s: float


class Recorder(Node):
    """Collects decisions, image arrivals and the node's diagnostics."""

    def __init__(self, camera: CameraTopic) -> None:
        super().__init__("recorder", namespace=NAMESPACE)
        self.decisions: dict[int, Served] = {}
        self.diagnostics: dict[str, str] = {}
        self.last_arrival_s = time.monotonic()
        self._published_ns: dict[int, int] = {}
        kind = Image if camera.type == IMAGE else CompressedImage
        # rclpy gives DDS's time stamps to callbacks of two arguments; its annotations do not say so.
        on_image: Any = self._on_image
        on_chunk: Any = self._on_chunk
        self.create_subscription(kind, camera.topic, on_image, qos_profile_sensor_data)
        self.create_subscription(ActionChunk, "action_chunk", on_chunk, QoSProfile(depth=_QUEUE))
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, QoSProfile(depth=10))

    def _on_image(self, message: Any, info: dict[str, int]) -> None:
        self._published_ns[_to_ns(message.header.stamp)] = info["source_timestamp"]

    def _on_chunk(self, message: Any, info: dict[str, int]) -> None:
        self.last_arrival_s = time.monotonic()
        stamp_ns = _to_ns(message.observation_stamp)
        published_ns = self._published_ns.get(stamp_ns)
        self.decisions[stamp_ns] = Served(
            stamp_ns=stamp_ns,
            sequence=message.sequence,
            instruction=message.instruction,
            tokens=tuple(int(token) for token in message.tokens),
            actions_hex=tuple(float(value).hex() for value in message.actions),
            latency_ms=message.latency_ms,
            response_ms=None if published_ns is None else (info["received_timestamp"] - published_ns) / 1e6,
            engine_id=message.engine_id,
        )

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            if status.name.startswith(f"{NAMESPACE}/{NODE}:"):
                self.diagnostics = {value.key: value.value for value in status.values}

    @property
    def settled(self) -> bool:
        """Whether the diagnostics are as new as the decisions."""
        return self.diagnostics.get("chunks") == str(len(self.decisions))


def last_words(log: Path) -> str:
    """The last line that a process wrote, preferring one that names an error; empty when it wrote nothing."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1]


def _to_ns(stamp: Any) -> int:
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def node_command(engine: Path, contract: Path, parameters: Path, use_sim_time: bool) -> list[str]:
    """Writes the parameter file and returns the command line of the node, as `launch` generates it."""
    values = {
        "engine_path": str(engine.resolve()),
        "contract": str(contract.resolve()),
        "lossless": True,
        "queue_size": _QUEUE,
        "check_sources": "none",
        "diagnostic_updater.period": 0.2,
        "use_sim_time": use_sim_time,
    }
    parameters.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}), encoding="utf-8")
    remaps = ["-r", f"__node:={NODE}", "-r", f"__ns:={NAMESPACE}"]
    return [_executable("policy_node"), "--ros-args", *remaps, "--params-file", str(parameters)]


def _executable(name: str) -> str:
    try:
        path = Path(get_package_prefix("vla_policy")) / "lib" / "vla_policy" / name
    except PackageNotFoundError as error:
        raise ServingError("ROS package vla_policy: not in AMENT_PREFIX_PATH; run `make build`, then this") from error
    if not path.is_file():
        raise ServingError(f"{path}: no such node; build the workspace again: make build")
    return str(path)


def serve(
    engine: Path, bag: Path, contract: Contract, publisher: Sequence[str], work: Path, use_sim_time: bool
) -> Record:
    """Runs node and publisher to the bag's end. Raises ServingError with the process's own last words.

    publisher: command that publishes the bag; with `use_sim_time` it publishes /clock as well.
    """
    expected = sum(isinstance(frame, Frame) for frame in read_frames(bag, contract))
    environment = {
        "ROS_DOMAIN_ID": os.environ.get("ROS_DOMAIN_ID", str(1 + os.getpid() % 100)),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST"),
    }
    os.environ.update(environment)
    started = time.monotonic()
    rclpy.init()
    recorder = Recorder(contract.primary)
    executor = SingleThreadedExecutor()
    executor.add_node(recorder)
    try:
        command = node_command(engine, Path(contract.path), work / "policy.params.yaml", use_sim_time)
        log = work / "policy_node.log"
        with running(command, log, environment) as node:
            waiter = _Waiter(executor, node, log)
            _change_state(recorder, waiter, Transition.TRANSITION_CONFIGURE, "configure")
            _change_state(recorder, waiter, Transition.TRANSITION_ACTIVATE, "activate")
            waiter.until(lambda: recorder.count_publishers("action_chunk") > 0, _START_TIMEOUT_S, "offer its decisions")
            _publish(recorder, waiter, publisher, work / "publisher.log", environment, expected)
            _change_state(recorder, waiter, Transition.TRANSITION_DEACTIVATE, "deactivate")
        decisions = tuple(sorted(recorder.decisions.values(), key=lambda decision: decision.sequence))
        drops = {
            key.removeprefix("drops "): int(value)
            for key, value in recorder.diagnostics.items()
            if key.startswith("drops ")
        }
        return Record(decisions, expected, drops, recorder.diagnostics, time.monotonic() - started)
    finally:
        executor.shutdown()
        recorder.destroy_node()
        rclpy.try_shutdown()


class _Waiter:
    """Spins until a condition holds, and fails at once when the node has died."""

    def __init__(self, executor: SingleThreadedExecutor, node: "subprocess.Popen[bytes]", log: Path) -> None:
        self._executor, self._node, self._log = executor, node, log

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._node.poll() is not None:
                raise ServingError(f"policy node ended ({self._node.returncode}) before it could {what}: {self.words}")
            if time.monotonic() > deadline:
                raise ServingError(f"policy node did not {what} within {timeout_s:g} s: {self.words}")
            self._executor.spin_once(timeout_sec=0.05)

    @property
    def words(self) -> str:
        return last_words(self._log) or f"no output in {self._log}"


def _change_state(recorder: Node, waiter: _Waiter, transition: int, what: str) -> None:
    client = recorder.create_client(ChangeState, f"{NAMESPACE}/{NODE}/change_state")
    waiter.until(client.service_is_ready, _START_TIMEOUT_S, "start")
    future = client.call_async(ChangeState.Request(transition=Transition(id=transition)))
    waiter.until(future.done, _START_TIMEOUT_S, what)
    result = future.result()
    if result is None or not result.success:
        raise ServingError(f"policy node refused to {what}: {waiter.words}")
    recorder.destroy_client(client)


def _publish(
    recorder: Recorder,
    waiter: _Waiter,
    publisher: Sequence[str],
    log: Path,
    environment: dict[str, str],
    expected: int,
) -> None:
    recorder.last_arrival_s = time.monotonic()
    with (
        running(publisher, log, environment) as process,
        tqdm(total=expected, unit="frame", desc="serving", disable=None) as bar,
    ):

        def finished() -> bool:
            if len(recorder.decisions) > bar.n:
                bar.update(len(recorder.decisions) - bar.n)
            if process.poll() not in (None, 0):
                raise ServingError(f"publisher {publisher[0]} ended ({process.returncode}): {last_words(log)}")
            quiet_s = time.monotonic() - recorder.last_arrival_s
            complete = len(recorder.decisions) >= expected and recorder.settled
            return process.poll() is not None and (complete or quiet_s > _QUIET_TIMEOUT_S)

        waiter.until(finished, 3600.0, "serve the whole bag")


def replay_command(bag: Path, contract: Path, rate: float) -> list[str]:
    """The command line of the replay node for this bag."""
    remaps = ["-r", f"__ns:={NAMESPACE}"]
    values = {"bag": str(bag.resolve()), "contract": str(contract.resolve()), "rate": repr(float(rate))}
    parameters = [item for name, value in values.items() for item in ("-p", f"{name}:={value}")]
    return [_executable("replay_node"), "--ros-args", *remaps, *parameters]


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the bag and writes the record."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=Path, required=True, help="engine folder")
    parser.add_argument("--bag", type=Path, required=True, help="rosbag2 folder or .mcap file")
    parser.add_argument("--contract", type=Path, required=True, help="YAML that maps topics")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rate", type=float, default=1.0, help="times recorded speed (default: %(default)s)")
    parser.add_argument("--publisher", nargs=argparse.REMAINDER, help="command that publishes the bag instead, last")
    arguments = parser.parse_args(argv)
    contract = load_contract(arguments.contract)
    publisher = arguments.publisher or replay_command(arguments.bag, arguments.contract, arguments.rate)
    check_file(arguments.out, _KIND, [arguments.engine, arguments.bag, arguments.contract])
    work = arguments.out.with_name(f"{arguments.out.stem}.run")
    claim_folder(work, _WORK)
    use_sim_time = not arguments.publisher
    record = serve(arguments.engine, arguments.bag, contract, publisher, work, use_sim_time)
    parents = {
        "engine": sha256_file(arguments.engine / "manifest.json"),
        "contract": contract.sha256,
        "bag": sha256_folder(arguments.bag) if arguments.bag.is_dir() else sha256_file(arguments.bag),
    }
    write_json(arguments.out, {"schema_version": 1, "kind": _KIND, "parents": parents, **asdict(record)})
    served = len(record.decisions)
    print(f"served {served} of {record.expected} frames; drops: {record.drops or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
