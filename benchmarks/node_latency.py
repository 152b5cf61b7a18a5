"""What the policy node adds to the engine's own time, and whether images arrive: 640x480 RGB at 30 Hz over DDS.

    tools/with_ros python benchmarks/node_latency.py --engine ENGINE [--seconds 20] [--only-profile]

Starts the node as launch does, publishes raw images and states from this process, and reads the node's diagnostics:
overhead is the time from the image's callback to the published action less the engine's (for this image, and for the
one before while it was still busy). Exit code 1 when the median exceeds --limit-ms or an observation is unaccounted
for.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from vla_policy_interfaces.msg import ActionChunk

from vla_policy.core import cli
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import write_json
from vla_policy.core.outputs import check_file

_KIND = "node-latency"
PACKAGE = Path(__file__).resolve().parents[1] / "ros2_ws/src/vla_policy"
PROFILE = PACKAGE / "config/fastdds_large_images.xml"
WIDTH, HEIGHT, RATE_HZ = 640, 480, 30.0
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Result:
    """Counts, and milliseconds. `accounted`: decisions and counted drops; `sent` unless some were lost unnoticed."""

    profile: bool
    sent: int
    decisions: int
    drops: dict[str, int]
    overhead_p50_ms: float
    overhead_p99_ms: float
    engine_p50_ms: float
    round_trip_p50_ms: float

    @property
    def arrived(self) -> int:
        return self.accounted - self.drops.get("lost_in_transport", 0)

    @property
    def accounted(self) -> int:
        return self.decisions + sum(self.drops.values())


class Camera(Node):
    """Publishes images and states; collects decisions and diagnostics."""

    def __init__(self, contract: Path) -> None:
        super().__init__("node_latency")
        loaded = load_contract(contract)
        self._joints = list(dict.fromkeys(value.joint for state in loaded.states for value in state.values))
        self.images = self.create_publisher(Image, loaded.primary.topic, qos_profile_sensor_data)
        self.states = self.create_publisher(JointState, loaded.states[0].topic, qos_profile_sensor_data)
        self.instruction = self.create_publisher(String, loaded.instruction.topic, QoSProfile(depth=1))
        self.round_trips_ms: list[float] = []
        self.diagnostics: dict[str, str] = {}
        self._sent_s: dict[int, float] = {}
        self._pictures = [np.random.default_rng(seed).integers(0, 256, WIDTH * HEIGHT * 3, np.uint8) for seed in (0, 1)]
        self.create_subscription(ActionChunk, "action_chunk", self._on_chunk, QoSProfile(depth=100))
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, QoSProfile(depth=10))

    def publish(self, index: int) -> None:
        """One state and one image of the same stamp."""
        stamp = self.get_clock().now().to_msg()
        state = JointState(name=self._joints, position=[0.01] * len(self._joints), velocity=[0.0] * len(self._joints))
        state.header.stamp = stamp
        image = Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH)
        image.header.stamp = stamp
        image.data = self._pictures[index % 2].tobytes()
        self._sent_s[stamp.sec * 10**9 + stamp.nanosec] = time.monotonic()
        self.states.publish(state)
        self.images.publish(image)

    def _on_chunk(self, chunk: ActionChunk) -> None:
        stamp_ns = chunk.observation_stamp.sec * 10**9 + chunk.observation_stamp.nanosec
        if stamp_ns in self._sent_s:
            self.round_trips_ms.append((time.monotonic() - self._sent_s[stamp_ns]) * 1e3)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.diagnostics = {value.key: value.value for value in status.values}


def raw_contract(source: Path, folder: Path) -> Path:
    """The given contract with its primary camera raw, so that the whole image crosses DDS."""
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    content["cameras"] = [{"name": "camera", "topic": "camera/image_raw", "type": "sensor_msgs/msg/Image"}]
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def measure(engine: Path, unnorm_key: str, contract: Path, seconds: float, threads: int, profile: bool) -> Result:
    """Runs the node against `seconds` of images."""
    if profile:
        os.environ["FASTRTPS_DEFAULT_PROFILES_FILE"] = str(PROFILE)
    else:
        os.environ.pop("FASTRTPS_DEFAULT_PROFILES_FILE", None)
    with tempfile.TemporaryDirectory() as folder:
        path = raw_contract(contract, Path(folder))
        command = [sys.executable, "-m", "vla_policy.nodes.policy_node", "--ros-args", "-p", f"engine_path:={engine}"]
        command += ["-p", f"contract:={path}", "-p", "autostart:=true", "-p", "check_sources:=none"]
        command += ["-p", f"unnorm_key:={json.dumps(unnorm_key)}"]
        command += [
            "-p",
            f"engine_threads:={threads}",
            "-p",
            "freeze_timeout:=0.0",
            "-p",
            "diagnostic_updater.period:=0.2",
        ]
        node = subprocess.Popen(command)
        rclpy.init()
        camera = Camera(path)
        executor = SingleThreadedExecutor()
        executor.add_node(camera)
        spinner = threading.Thread(target=executor.spin, daemon=True)
        spinner.start()
        try:
            return _run(camera, node, seconds, profile)
        finally:
            node.terminate()
            node.wait()
            executor.shutdown()
            spinner.join()
            camera.destroy_node()
            rclpy.try_shutdown()


def _run(camera: Camera, node: "subprocess.Popen[bytes]", seconds: float, profile: bool) -> Result:
    _await(lambda: camera.images.get_subscription_count() > 0, node, "subscribe")
    _await(lambda: camera.instruction.get_subscription_count() > 0, node, "subscribe")
    camera.instruction.publish(String(data="pick up the butter and place it in the basket"))
    _await(lambda: bool(camera.diagnostics.get("instruction")), node, "take the instruction")
    count = round(seconds * RATE_HZ)
    begun = time.monotonic()
    for index in range(count):
        time.sleep(max(0.0, begun + index / RATE_HZ - time.monotonic()))
        camera.publish(index)
    former = ""
    while former != (former := camera.diagnostics.get("chunks", "")) or not former:
        time.sleep(0.5)
    values = camera.diagnostics
    drops = {key.removeprefix("drops "): int(value) for key, value in values.items() if key.startswith("drops ")}
    decisions = int(values["chunks"])
    return Result(
        profile=profile,
        sent=count,
        decisions=decisions,
        drops=drops,
        overhead_p50_ms=float(values["overhead p50 (ms)"]),
        overhead_p99_ms=float(values["overhead p99 (ms)"]),
        engine_p50_ms=float(values["latency p50 (ms)"]),
        round_trip_p50_ms=float(np.median(camera.round_trips_ms)),
    )


def _await(condition: Callable[[], bool], node: "subprocess.Popen[bytes]", what: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not condition():
        if node.poll() is not None or time.monotonic() > deadline:
            raise ArtefactError(f"the policy node did not {what}; its log is above")
        time.sleep(0.05)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures with the shipped profile and, unless told otherwise, without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="engine folder")
    parser.add_argument(
        "--contract", type=Path, default=PACKAGE / "config/libero.yaml", help="YAML (default: LIBERO's)"
    )
    parser.add_argument("--unnorm-key", default="", help="which of the policy's statistics (default: the only ones)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each run (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="engine threads (default %(default)s)")
    parser.add_argument("--limit-ms", type=float, default=2.0, help="largest median overhead (default %(default)s)")
    parser.add_argument("--only-profile", action="store_true", help="leave out the run with the default transport")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    if arguments.out:
        check_file(arguments.out, _KIND, [arguments.engine, arguments.contract])
    results = []
    for profile in (True,) if arguments.only_profile else (True, False):
        served = arguments.engine, arguments.unnorm_key, arguments.contract
        result = measure(*served, arguments.seconds, arguments.threads, profile)
        results.append(result)
        print(
            f"{'shipped profile' if profile else 'default transport'}: {result.arrived} of {result.sent} images "
            f"arrived, {result.accounted} accounted for, {result.decisions} decisions, drops {result.drops or 'none'}; "
            f"overhead p50 {result.overhead_p50_ms:.2f} ms, p99 {result.overhead_p99_ms:.2f} ms; "
            f"engine p50 {result.engine_p50_ms:.2f} ms; publish to decision p50 {result.round_trip_p50_ms:.2f} ms"
        )
    if arguments.out:
        content = {"schema_version": 1, "kind": _KIND, "results": [asdict(result) for result in results]}
        write_json(arguments.out, content)
    first = results[0]
    return 0 if first.overhead_p50_ms <= arguments.limit_ms and first.accounted == first.sent else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
