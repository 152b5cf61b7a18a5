"""A replay in the forms that other tools open: a LeRobot data set, and mcap topics for Foxglove."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_typestore

from evaluation.lerobot_set import SetRow, png, write_set
from evaluation.replay.run import Answers, Recording
from vla_policy.core.contract import COMPRESSED_IMAGE, JOINT_STATE, STRING, Contract
from vla_policy.core.observe import observe
from vla_policy.core.recording import BagWriter, recorded_qos
from vla_policy.core.ros_image import CompressedImage
from vla_policy.core.synchroniser import Frame

ACTION, REFERENCE = "action", "action.reference"
"""LeRobot's word for what is carried out, here the answer of the engine under test, and the reference's beside it."""
_TICK = "action.stamp_s"


@dataclass(frozen=True)
class Replay:
    """Whose frames, in which words, answered by whom."""

    recording: Recording
    contract: Contract
    candidate: Answers
    reference: Answers | None

    def frames(self) -> Iterator[tuple[Frame, np.ndarray, np.ndarray | None]]:
        """Every frame that all answered, with the first action of each answer, float64 [K]."""
        size = len(self.contract.action.dimensions)
        candidate, reference = (
            None if one is None else dict(zip(one.stamp_ns.tolist(), one.actions[:, :size], strict=True))
            for one in (self.candidate, self.reference)
        )
        assert candidate is not None
        for frame in self.recording.frames(self.contract):
            if not isinstance(frame, Frame) or frame.stamp_ns not in candidate:
                continue
            if reference is None:
                yield frame, candidate[frame.stamp_ns], None
            elif frame.stamp_ns in reference:
                yield frame, candidate[frame.stamp_ns], reference[frame.stamp_ns]

    @property
    def names(self) -> list[str]:
        return [dimension.name for dimension in self.contract.action.dimensions]


def write_lerobot(replay: Replay, out: Path, sources: dict[str, str]) -> int:
    """Writes observations as the policy saw them, with both actions, as a LeRobot v3.0 set; returns its frames.

    LeRobot's clock is even: its rate is the recording's median one, and each frame's own stamp, in seconds since its
    episode's first, is a column beside.
    """
    names: dict[str, Any] = {ACTION: replay.names, _TICK: ["stamp_s"]}
    names |= {REFERENCE: replay.names} if replay.reference is not None else {}
    states = replay.contract.state_names
    names |= {"observation.state": list(states)} if states else {}
    about = {"parents": sources, "candidate": replay.candidate.name}
    about |= {"reference": replay.reference.name} if replay.reference is not None else {}
    return write_set(out, _rows(replay), _rate(replay.candidate), names, "", about)


def _rows(replay: Replay) -> Iterator[SetRow]:
    starts: dict[int, int] = {}
    for frame, candidate, reference in replay.frames():
        seen = observe(frame, replay.contract)
        start = starts.setdefault(frame.episode, frame.stamp_ns)
        vectors = {ACTION: candidate, _TICK: np.asarray([(frame.stamp_ns - start) / 1e9])}
        vectors |= {REFERENCE: reference} if reference is not None else {}
        vectors |= {"observation.state": seen.state} if seen.state is not None else {}
        cameras = (f"observation.images.{camera.name}" for camera in replay.contract.cameras)
        yield SetRow(frame.episode, frame.instruction, dict(zip(cameras, seen.images, strict=True)), vectors)


def _rate(answers: Answers) -> int:
    """Frames per second within episodes, rounded as LeRobot wants it, at least 1."""
    within = np.diff(answers.stamp_ns)[np.diff(answers.episode) == 0]
    return max(1, round(1e9 / float(np.median(within)))) if within.size else 1


def write_mcap(replay: Replay, out: Path) -> int:
    """Writes the bag `out` of the camera images, the instruction, and both actions and their difference as named values
    (`sensor_msgs/JointState`), which Foxglove plots as they are; returns its frames."""
    store = get_typestore(Stores.ROS2_JAZZY)
    types = store.types
    time, header = types["builtin_interfaces/msg/Time"], types["std_msgs/msg/Header"]
    qos, count, said = recorded_qos(reliable=True, transient_local=False, depth=10), 0, None

    def stamped(stamp_ns: int) -> Any:
        return header(stamp=time(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9), frame_id="")

    with BagWriter(out) as bag:

        def put(topic: str, kind: str, stamp_ns: int, message: Any) -> None:
            bag.add_topic(topic, kind, qos)
            bag.write(topic, stamp_ns, bytes(store.serialize_cdr(message, kind)))

        for frame, candidate, reference in replay.frames():
            at = frame.stamp_ns
            for camera, encoded in zip(replay.contract.cameras, frame.images, strict=True):
                if isinstance(encoded, CompressedImage):
                    text, data = encoded.format, bytes(encoded.data)
                else:
                    text, data = "png", png(encoded.decode())
                image = types[COMPRESSED_IMAGE](header=stamped(at), format=text, data=np.frombuffer(data, np.uint8))
                put(f"/camera/{camera.name}/compressed", COMPRESSED_IMAGE, at, image)
            if frame.instruction != said:
                said = frame.instruction
                put("/instruction", STRING, at, types[STRING](data=said))
            values = {"candidate": candidate}
            values |= {"reference": reference, "difference": candidate - reference} if reference is not None else {}
            empty = np.zeros(0)
            for name, action in values.items():
                joints = types[JOINT_STATE](
                    header=stamped(at), name=replay.names, position=action, velocity=empty, effort=empty
                )
                put(f"/action/{name}", JOINT_STATE, at, joints)
            count += 1
    return count
