"""`python -m evaluation contract`: a contract drafted from a bag's topics, types and messages, for a person to finish.

What the messages say is filled in: topics, types, joints, quality of service, rates. What they do not say, as units,
limits, or how the robot's controller behaves, is a marked blank, which no command accepts.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from vla_policy.core.bag import carries, open_bag
from vla_policy.core.bag_files import Channel
from vla_policy.core.contract import (
    COMPRESSED_IMAGE,
    FLOATS,
    IMAGE,
    JOINT_STATE,
    POSE_FIELDS,
    POSE_STAMPED,
    STRING,
    TWIST_FIELDS,
)
from vla_policy.core.errors import ContractError, DataError, VlaError
from vla_policy.core.outputs import atomic_path, check_file
from vla_policy.core.recording import offered_qos
from vla_policy.core.ros_image import CompressedImage, RawImage
from vla_policy.core.yaml_fields import BLANK

TWIST, TRAJECTORY = "geometry_msgs/msg/TwistStamped", "trajectory_msgs/msg/JointTrajectory"
_CAMERAS = (IMAGE, COMPRESSED_IMAGE)
_USED = (*_CAMERAS, JOINT_STATE, POSE_STAMPED, STRING, TWIST, TRAJECTORY, FLOATS)
_LOOK = 200
"""Messages of each topic that are looked into; the others are counted."""
_DULL = {"image", "image_raw", "image_rect", "compressed", "raw"}


def add_contract(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.description = (
        f"Drafts a contract from what a bag holds. Fill in every {BLANK}, delete what the policy does not take, and "
        "every command takes the file. Exit code 0: drafted; 2: bad input."
    )
    parser.add_argument("bag", type=Path, help="rosbag2 folder, .mcap or .db3 file")
    parser.add_argument("--out", type=Path, help="YAML file to write, which must not exist (default: standard output)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        check_file(arguments.out, "contract", [arguments.bag])
    text = draft(arguments.bag)
    if arguments.out is None:
        print(text, end="")
        return 0
    with atomic_path(arguments.out, "contract") as path:
        path.write_text(text, encoding="utf-8")
    blanks = sum(line.count(BLANK) for line in text.splitlines() if not line.lstrip().startswith("#"))
    print(f"{arguments.out}: {blanks} blanks to fill in")
    return 0


@dataclass
class _Topic:
    """What is known of a topic of one type. heard: its first messages, decoded."""

    name: str
    type: str
    qos: str
    times_ns: list[int] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        rate = f", {self.rate_hz:.3g} Hz" if self.rate_hz else ""
        return f"{len(self.times_ns)} messages{rate}{self._unstamped}"

    @property
    def rate_hz(self) -> float:
        """By the median distance: pauses between episodes do not count. Zero where nothing tells it."""
        gaps = [after - before for before, after in pairwise(self.times_ns)]
        middle = median(gaps) if gaps else 0
        return 1e9 / middle if middle > 0 else 0.0

    @property
    def _unstamped(self) -> str:
        stamps = [item.header.stamp for item in self.heard if hasattr(item, "header")]
        zero = any(stamp.sec == 0 and stamp.nanosec == 0 for stamp in stamps)
        return "; NOT STAMPED: the publisher must stamp its messages" if zero else ""


def draft(bag: Path) -> str:
    """The contract's text. Raises ContractError for a bag that cannot be read or holds no camera."""
    topics, others = _look(bag)
    by_type = {kind: [topic for topic in topics if topic.type == kind] for kind in _USED}
    cameras = [topic for topic in topics if topic.type in _CAMERAS]
    if not cameras:
        held = ", ".join(f"{topic.name} ({topic.type})" for topic in (*topics, *others)) or "nothing"
        raise ContractError(f"{bag}: no camera topic ({' or '.join(_CAMERAS)}); the bag holds {held}")
    lines = [
        f"# Drafted from {bag.name}. What its messages say is filled in. Fill in every {BLANK},",
        "# and delete what the policy does not take. The package vla_policy's config/libero.yaml explains each key.",
        *(f"# Not of a type that a contract uses: {topic.name} ({topic.type}, {topic})" for topic in others),
        "kind: contract",
        "schema_version: 1",
        "",
        "# In the order in which the policy takes its images; the first one's frames are the instants of decisions.",
        "cameras:",
        *(line for topic in cameras for line in _camera(topic)),
        "",
        "# In the order of the policy's state vector, under its own names; delete values that it does not take.",
        *_states((*by_type[JOINT_STATE], *by_type[POSE_STAMPED])),
        "",
        *_instruction(by_type[STRING]),
        "",
        "synchronisation: # how far a state may be from the image, and how long a frame waits for it",
        "  slop_ms: 50",
        "  wait_ms: 100",
        "",
        *_action(by_type[TWIST], by_type[TRAJECTORY], by_type[FLOATS]),
    ]
    return "\n".join(lines) + "\n"


def _look(bag: Path) -> tuple[list[_Topic], list[_Topic]]:
    """The bag's topics that a contract can use, and the others."""
    topics: dict[tuple[str, str], _Topic] = {}
    with open_bag(bag) as opened:
        by_channel: dict[Channel, _Topic] = {}
        for channel in opened.channels:
            key = (channel.topic, channel.type)
            by_channel[channel] = topics.setdefault(key, _Topic(channel.topic, channel.type, channel.qos))
        used = {channel for channel, topic in by_channel.items() if any(carries(channel, kind) for kind in _USED)}
        for message in tqdm(opened.messages(by_channel), desc=f"read {bag.name}", unit="message"):
            topic = by_channel[message.channel]
            topic.times_ns.append(message.time_ns)
            if message.channel in used and len(topic.heard) < _LOOK:
                try:
                    topic.heard.append(opened.decode(message))
                except DataError:
                    continue  # one that is damaged says nothing
    known = {(channel.topic, channel.type) for channel in used}
    told = [topic for topic in topics.values() if topic.heard and (topic.name, topic.type) in known]
    return told, [topic for topic in topics.values() if topic not in told]


def _name(topic: str) -> str:
    """A name from a topic's, without what every topic of its kind ends with."""
    parts = [part for part in topic.split("/") if part]
    return "_".join(part for part in parts if part not in _DULL) or "_".join(parts)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _qos(topic: _Topic, reliable: bool) -> list[str]:
    """What the recorded publisher offers, where the contract's default asks for something else."""
    offers, kept = offered_qos(topic.qos)
    asked = ["reliability: best_effort"] if reliable and not offers else []
    asked += ["durability: transient_local"] if kept else []
    return [f"qos: {{{', '.join(asked)}}}"] if asked else []


def _camera(topic: _Topic) -> list[str]:
    message = topic.heard[0]
    try:
        if topic.type == IMAGE:
            what = f"{message.width}x{message.height} {message.encoding}"
            RawImage(message.height, message.width, message.encoding, message.step, memoryview(message.data)).decode()
        else:
            image = CompressedImage(message.format, memoryview(message.data)).decode()
            what = f"{image.shape[1]}x{image.shape[0]}, {message.format}"
    except VlaError as error:
        what = f"NOT A PICTURE, delete it: {error}"
    return [
        f"  - name: {_name(topic.name)} # {topic}, {what}",
        f"    topic: {topic.name}",
        f"    type: {topic.type}",
        *(f"    {line}" for line in _qos(topic, reliable=False)),
    ]


def _states(topics: Iterable[_Topic]) -> list[str]:
    entries: list[str] = []
    for topic in topics:
        for title, values in _joint_entries(topic) if topic.type == JOINT_STATE else _pose_entries(topic):
            entries += [
                f"  - topic: {topic.name} # {topic}{title}",
                f"    type: {topic.type}",
                *(f"    {line}" for line in _qos(topic, reliable=False)),
                "    values:",
                *(f"      {line}" for line in values),
            ]
    return ["states:", *entries] if entries else ["states: [] # the bag holds no joint state and no pose"]


def _joint_entries(topic: _Topic) -> Iterator[tuple[str, list[str]]]:
    """One entry for each publisher: those of one topic are told apart by their joints."""
    sets = list(dict.fromkeys(frozenset(message.name) for message in topic.heard))
    apart = all(not one & other for place, one in enumerate(sets) for other in sets[:place])
    if not apart:
        common, every = frozenset.intersection(*sets), frozenset.union(*sets)
        left = ", ".join(sorted(every - common))
        yield f"; only some messages name {left}", list(_joint_values(topic, common))
        return
    for joints in sets:
        yield "; one of several publishers" if len(sets) > 1 else "", list(_joint_values(topic, joints))


def _joint_values(topic: _Topic, joints: frozenset[str]) -> Iterator[str]:
    naming = [message for message in topic.heard if joints <= set(message.name)]
    for joint in (name for name in naming[0].name if name in joints):
        for kind in ("position", "velocity", "effort"):
            found = [
                float(values[place])
                for message in naming
                if (place := list(message.name).index(joint)) < len(values := getattr(message, kind))
            ]
            if found:
                name = joint if kind == "position" else f"{joint}_{kind}"
                value = f"{{name: {_quoted(name)}, joint: {_quoted(joint)}, field: {kind}, unit: {BLANK}}}"
                # Positions are what most policies take; the rest is there to be chosen.
                yield f"{'- ' if kind == 'position' else '# - '}{value} # {_span(found)}"


def _pose_entries(topic: _Topic) -> Iterator[tuple[str, list[str]]]:
    """Metres and radians are what the message's definition says."""
    prefix = _name(topic.name)
    values = []
    for name in POSE_FIELDS:
        unit = {"position": "m", "orientation": '"1"', "axis_angle": "rad"}[name.split(".")[0]]
        chosen = "# - " if name.startswith("orientation") else "- "
        values.append(f"{chosen}{{name: {prefix}_{name.replace('.', '_')}, field: {name}, unit: {unit}}}")
    yield "; in words of both, quaternion and axis times angle: take one", values


def _instruction(topics: list[_Topic]) -> list[str]:
    """Whether a text is the task, no bag says."""
    if not topics:
        return ["instruction: # the bag tells no task; replay it with --instruction", f"  topic: {BLANK}"]
    said = []
    for topic in topics:
        offered = "".join(f", and needs {line}" for line in _qos(topic, reliable=True))
        said.append(f"  #   {topic.name}: {topic}, the first {_quoted(str(topic.heard[0].data))[:100]}{offered}")
    return ["instruction: # the topic that tells the task; the bag's texts:", *said, f"  topic: {BLANK}"]


def _action(twists: list[_Topic], trajectories: list[_Topic], floats: list[_Topic]) -> list[str]:
    commands = [*twists, *trajectories]
    found = [f"  #   {topic.name} ({topic.type}, {topic})" for topic in commands]
    lines = ["action:", *(["  # Which of the bag's commands the policy gives:", *found] if len(commands) > 1 else [])]
    single = commands[0] if len(commands) == 1 else None
    if single is None:
        lines += [f"  command: {BLANK} # twist or joint_trajectory", f"  topic: {BLANK}"]
    else:
        lines += [f"  command: {'twist' if single.type == TWIST else 'joint_trajectory'}", f"  topic: {single.name}"]
        lines += [f"  frame_id: {_quoted(single.heard[0].header.frame_id)}"] if single.type == TWIST else []
    rate = f"{single.rate_hz:.3g} # as in the bag" if single is not None and single.rate_hz else BLANK
    return [
        *lines,
        f"  control_rate_hz: {rate}",
        f"  controller_timeout_s: {BLANK} # the robot's own controller stops it after so long without a command",
        "  dimensions: # in the order of the policy's action; value times scale plus offset is the command, in unit",
        *(f"    {line}" for line in _dimensions(single)),
        '    # - {name: gripper, target: gripper, unit: "1", limit: 1.0}',
        "  # gripper: # with a dimension `gripper`: a topic of std_msgs/msg/Float64MultiArray, or an action",
        *(f"  #   the bag's {topic.name} holds {_floats(topic)}" for topic in floats),
        f"  #   {{topic: {BLANK}, threshold: {BLANK}, above_m: {BLANK}, below_m: {BLANK}}}".replace(BLANK, "..."),
    ]


def _dimensions(command: _Topic | None) -> Iterator[str]:
    if command is None:
        yield f"- {{name: {BLANK}, target: {BLANK}, unit: {BLANK}, scale: {BLANK}}} # and limits: see libero.yaml"
    elif command.type == TWIST:
        for target in TWIST_FIELDS:
            part, axis = target.split(".")
            values = [float(getattr(getattr(message.twist, part), axis)) for message in command.heard]
            unit = "m/s" if part == "linear" else "rad/s"
            blanks = f"scale: {BLANK}, limit: {BLANK}, slew: {BLANK}"
            yield f"- {{name: {part}_{axis}, target: {target}, unit: {unit}, {blanks}}} # {_span(values)}"
    else:
        for place, joint in enumerate(command.heard[0].joint_names):
            points = [point for message in command.heard for point in message.points if len(point.positions) > place]
            blanks = ", ".join(f"{key}: {BLANK}" for key in ("unit", "scale", "lower", "upper", "slew"))
            span = _span([float(point.positions[place]) for point in points])
            yield f"- {{name: {_quoted(joint)}, target: {_quoted(joint)}, {blanks}}} # {span}"


def _floats(topic: _Topic) -> str:
    return _span([float(value) for message in topic.heard for value in message.data])


def _span(values: list[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g} in the bag" if values else "never set in the bag"
