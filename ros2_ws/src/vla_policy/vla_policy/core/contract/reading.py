"""Reads a contract's YAML file into its types; every mistake is named by file and key."""

import re
from dataclasses import replace
from pathlib import Path

from vla_policy.core.contract.types import (
    COMMANDS,
    COMPRESSED_IMAGE,
    FLOATS,
    GRIPPER,
    GRIPPER_ACTION,
    IMAGE,
    JOINT_FIELDS,
    JOINT_STATE,
    OTHER_PUBLISHERS,
    POSE_FIELDS,
    POSE_STAMPED,
    STRING,
    TWIST_FIELDS,
    ActionContract,
    ActionDimension,
    CameraTopic,
    Contract,
    GripperCommand,
    InstructionTopic,
    StateTopic,
    StateValue,
    Synchronisation,
    TopicQos,
    WorkspaceAxis,
)
from vla_policy.core.errors import ContractError
from vla_policy.core.files import sha256_file
from vla_policy.core.yaml_fields import Fields

_TOPIC_NAME = re.compile(r"(~/|/)?[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)


def load_contract(path: Path | str) -> Contract:
    """Reads a contract. Raises ContractError naming the file, the key, what was got and what is allowed."""
    fields = Fields.load(path, "contract")
    contract = Contract(
        path=str(path),
        sha256=sha256_file(path),
        cameras=tuple(_camera(item) for item in fields.sequence("cameras")),
        states=_states(fields),
        instruction=_instruction(fields.mapping("instruction")),
        synchronisation=_synchronisation(fields.mapping("synchronisation", {})),
        action=_action(fields.mapping("action")),
    )
    fields.end()
    if not contract.cameras:
        raise ContractError(f"{path}: cameras: expected at least one")
    if contract.action.command == "joint_trajectory" and JOINT_STATE not in (item.type for item in contract.states):
        raise ContractError(f"{path}: joint_trajectory starts from the measured joints; add a {JOINT_STATE} to states")
    strange = [axis.state for axis in contract.action.workspace if axis.state not in contract.state_names]
    if strange:
        known = ", ".join(contract.state_names) or "none"
        raise ContractError(f"{path}: action: workspace: state {strange[0]!r} is not a name of states; known: {known}")
    state_topics = dict.fromkeys(state.topic for state in contract.states)  # may have several entries
    for what, names in (
        ("topic", [contract.instruction.topic, *state_topics, *(camera.topic for camera in contract.cameras)]),
        ("camera name", [camera.name for camera in contract.cameras]),
        ("state name", list(contract.state_names)),
        ("action target", [dimension.target for dimension in contract.action.dimensions]),
    ):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ContractError(f"{path}: {what} {repeated[0]!r} is used twice; each must be unique")
    return contract


def _qos(fields: Fields, reliability: str, depth: int) -> TopicQos:
    inner = fields.mapping("qos", {})
    qos = TopicQos(
        reliability=inner.choice("reliability", ("best_effort", "reliable"), reliability),
        durability=inner.choice("durability", ("volatile", "transient_local"), "volatile"),
        depth=inner.take("depth", int, depth),
    )
    if qos.depth < 1:
        raise ContractError(f"{inner.where}: depth: expected at least 1, got {qos.depth}")
    inner.end()
    return qos


def _topic(fields: Fields) -> str:
    topic = fields.take("topic", str)
    if not _TOPIC_NAME.fullmatch(topic):
        raise ContractError(f"{fields.where}: topic: expected a ROS topic name, got {topic!r}")
    return topic


def _camera(fields: Fields) -> CameraTopic:
    camera = CameraTopic(
        name=fields.take("name", str),
        topic=_topic(fields),
        type=fields.choice("type", (IMAGE, COMPRESSED_IMAGE)),
        rotate_180=fields.take("rotate_180", bool, False),
        crop_area=fields.positive("crop_area", 1.0),
        width=fields.take("width", int, None),
        height=fields.take("height", int, None),
        qos=_qos(fields, "best_effort", 5),
    )
    if camera.crop_area > 1:
        raise ContractError(f"{fields.where}: crop_area: expected a part in (0, 1], got {camera.crop_area}")
    fields.end()
    return camera


def _states(fields: Fields) -> tuple[StateTopic, ...]:
    """The entries under `states`. Several of one topic take its joint states apart, which several nodes publish."""
    states = tuple(_state(item) for item in fields.sequence("states", []))
    by_topic: dict[str, list[StateTopic]] = {}
    for state in states:
        by_topic.setdefault(state.topic, []).append(state)
    for topic, entries in by_topic.items():
        where = f"{fields.where}: states: topic {topic!r} is used {len(entries)} times"
        if len(entries) > 1 and {entry.type for entry in entries} != {JOINT_STATE}:
            raise ContractError(f"{where}; only entries of type {JOINT_STATE} can share a topic, by their joints")
        if len({entry.qos for entry in entries}) > 1:
            raise ContractError(f"{where} with different qos; a topic has one subscription: give each entry the same")
    return tuple(replace(state, shared=len(by_topic[state.topic]) > 1) for state in states)


def _state(fields: Fields) -> StateTopic:
    topic, kind = _topic(fields), fields.choice("type", (JOINT_STATE, POSE_STAMPED))
    values = tuple(_state_value(item, kind) for item in fields.sequence("values"))
    if not values:
        raise ContractError(f"{fields.where}: values: expected at least one")
    state = StateTopic(topic, kind, values, _qos(fields, "best_effort", 50))
    fields.end()
    return state


def _state_value(fields: Fields, kind: str) -> StateValue:
    has_joints = kind == JOINT_STATE
    value = StateValue(
        name=fields.take("name", str),
        joint=fields.take("joint", str) if has_joints else None,
        field=fields.choice("field", JOINT_FIELDS if has_joints else POSE_FIELDS),
        unit=fields.take("unit", str),
    )
    fields.end()
    return value


def _instruction(fields: Fields) -> InstructionTopic:
    instruction = InstructionTopic(
        topic=_topic(fields),
        type=fields.choice("type", (STRING,), STRING),
        max_length=fields.take("max_length", int, 500),
        qos=_qos(fields, "reliable", 10),
    )
    fields.end()
    return instruction


def _synchronisation(fields: Fields) -> Synchronisation:
    synchronisation = Synchronisation(
        fields.positive("slop_ms", 50.0), fields.positive("wait_ms", 100.0), fields.positive("episode_gap_s", 5.0)
    )
    fields.end()
    return synchronisation


def _action(fields: Fields) -> ActionContract:
    command = fields.choice("command", COMMANDS)
    dimensions = tuple(_dimension(item, command) for item in fields.sequence("dimensions"))
    if not dimensions:
        raise ContractError(f"{fields.where}: dimensions: expected at least one")
    has_gripper = any(dimension.target == GRIPPER for dimension in dimensions)
    action = ActionContract(
        command=command,
        topic=_topic(fields),
        frame_id=fields.take("frame_id", str, ""),
        control_rate_hz=fields.positive("control_rate_hz", 20.0),
        chunk_rows=fields.take("chunk_rows", int, 0),
        hold_commands=fields.take("hold_commands", int, 4),
        other_publishers=fields.choice("other_publishers", OTHER_PUBLISHERS, "disarm"),
        controller_timeout_s=fields.positive("controller_timeout_s"),
        dimensions=dimensions,
        workspace=tuple(_axis(item, command, dimensions) for item in fields.sequence("workspace", [])),
        gripper=_gripper(fields.mapping("gripper")) if has_gripper else None,
    )
    fields.end()
    for name, count in (("hold_commands", action.hold_commands), ("chunk_rows", action.chunk_rows)):
        if count < 0:
            raise ContractError(f"{fields.where}: {name}: expected 0 or more, got {count}")
    if action.controller_timeout_s * 1e9 <= action.control_period_ns:
        raise ContractError(
            f"{fields.where}: controller_timeout_s: {action.controller_timeout_s:g} s is not above the control period "
            f"of {action.control_period_ns / 1e9:g} s; the robot would stop between two commands"
        )
    return action


def _axis(fields: Fields, command: str, dimensions: tuple[ActionDimension, ...]) -> WorkspaceAxis:
    target, (lower, upper) = fields.take("target", str), _range(fields)
    axis = WorkspaceAxis(target, fields.take("state", str), lower, upper)
    fields.end()
    if command != "twist" or target not in (item.target for item in dimensions) or not target.startswith("linear."):
        raise ContractError(
            f"{fields.where}: target: expected a linear twist field that the dimensions command, got {target!r}"
        )
    return axis


def _range(fields: Fields) -> tuple[float, float]:
    lower, upper = fields.finite("lower"), fields.finite("upper")
    if not lower < upper:
        raise ContractError(f"{fields.where}: lower {lower}, upper {upper}: expected lower below upper")
    return lower, upper


def _dimension(fields: Fields, command: str) -> ActionDimension:
    name, target = fields.take("name", str), fields.take("target", str)
    if command == "twist" and target not in (*TWIST_FIELDS, GRIPPER):
        raise ContractError(
            f"{fields.where}: target: expected one of {', '.join((*TWIST_FIELDS, GRIPPER))}, got {target!r}"
        )
    position = command == "joint_trajectory" and target != GRIPPER
    if position:
        lower, upper = _range(fields)
    else:
        upper = fields.positive("limit", 1.0)
        lower = -upper
    dimension = ActionDimension(
        name=name,
        target=target,
        unit=fields.take("unit", str),
        scale=fields.finite("scale", 1.0),
        offset=fields.finite("offset", 0.0),
        lower=lower,
        upper=upper,
        slew=fields.positive("slew") if position else fields.positive("slew", None),
    )
    fields.end()
    return dimension


def _gripper(fields: Fields) -> GripperCommand:
    topic, kind = _topic(fields), fields.choice("type", (FLOATS, GRIPPER_ACTION), FLOATS)
    gripper = GripperCommand(
        topic=topic,
        type=kind,
        threshold=fields.finite("threshold", 0.0),
        hysteresis=fields.finite("hysteresis", 0.0),
        above_m=fields.finite("above_m"),
        below_m=fields.finite("below_m"),
        max_effort_n=fields.positive("max_effort_n") if kind == GRIPPER_ACTION else 0.0,
    )
    fields.end()
    if gripper.hysteresis < 0:
        raise ContractError(f"{fields.where}: hysteresis: expected 0 or more, got {gripper.hysteresis}")
    if gripper.above_m == gripper.below_m:
        raise ContractError(f"{fields.where}: above_m and below_m are both {gripper.above_m}; the gripper never moves")
    return gripper
