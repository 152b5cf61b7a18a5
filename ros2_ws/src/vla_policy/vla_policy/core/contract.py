"""The topic contract: which ROS topics carry a policy's inputs, and what its actions mean on the robot.

One YAML file is shared by the node, the replay and the calibrator's bag reader, so that the same messages become the
same observations everywhere. Names, units and order live here and nowhere else; `config/libero.yaml` is an example.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from vla_policy.core.errors import ContractError
from vla_policy.core.files import sha256_file
from vla_policy.core.yaml_fields import Fields

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
JOINT_STATE = "sensor_msgs/msg/JointState"
POSE_STAMPED = "geometry_msgs/msg/PoseStamped"
STRING = "std_msgs/msg/String"

JOINT_FIELDS = ("position", "velocity", "effort")
POSE_FIELDS = (
    *(f"position.{axis}" for axis in "xyz"),
    *(f"orientation.{axis}" for axis in "xyzw"),
    *(f"axis_angle.{axis}" for axis in "xyz"),  # the orientation as unit axis times angle, rad
)
TWIST_FIELDS = tuple(f"{part}.{axis}" for part in ("linear", "angular") for axis in "xyz")
COMMANDS = ("twist", "joint_trajectory")
GRIPPER = "gripper"
FLOATS = "std_msgs/msg/Float64MultiArray"
GRIPPER_ACTION = "control_msgs/action/GripperCommand"
OTHER_PUBLISHERS = ("disarm", "hold", "ignore")
_TOPIC_NAME = re.compile(r"(~/|/)?[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)


@dataclass(frozen=True)
class TopicQos:
    """Quality of service that a subscription asks for."""

    reliability: str
    durability: str
    depth: int


@dataclass(frozen=True)
class CameraTopic:
    """One camera. `rotate_180` and `crop_area` are applied before the policy's own resizing."""

    name: str
    topic: str
    type: str
    rotate_180: bool
    crop_area: float
    width: int | None
    height: int | None
    qos: TopicQos

    @property
    def key(self) -> str:
        """What the source is called."""
        return self.topic


@dataclass(frozen=True)
class StateValue:
    """One entry of the policy's state vector: `field` of the message, of joint `joint` where it has joints."""

    name: str
    joint: str | None
    field: str
    unit: str


@dataclass(frozen=True)
class StateTopic:
    """One source of state values, in the order in which they enter the vector.

    `shared`: other entries take other joints from the same topic, on which several nodes publish. Each entry is a
    source of its own: it has its own samples, and must be fresh.
    """

    topic: str
    type: str
    values: tuple[StateValue, ...]
    qos: TopicQos
    shared: bool = False

    @property
    def joints(self) -> frozenset[str]:
        return frozenset(value.joint for value in self.values if value.joint is not None)

    @property
    def key(self) -> str:
        """What the source is called: its topic, and its values where they tell it from others."""
        return f"{self.topic} ({', '.join(value.name for value in self.values)})" if self.shared else self.topic


@dataclass(frozen=True)
class InstructionTopic:
    """Where the task in words arrives; text above `max_length` characters is refused."""

    topic: str
    type: str
    max_length: int
    qos: TopicQos

    @property
    def key(self) -> str:
        """What the source is called."""
        return self.topic


@dataclass(frozen=True)
class Synchronisation:
    """How messages of several topics become observations, and those episodes (see `core.synchroniser`)."""

    slop_ms: float
    wait_ms: float
    episode_gap_s: float


@dataclass(frozen=True)
class ActionDimension:
    """What one action value means: command = scale * value + offset, in `unit`, kept within lower to upper.

    `target` is a twist field, a joint name, or "gripper". A velocity's limit is the same to both sides. `slew` bounds
    the change per second; None leaves it free, which position control does not allow.
    """

    name: str
    target: str
    unit: str
    scale: float
    offset: float
    lower: float
    upper: float
    slew: float | None


@dataclass(frozen=True)
class WorkspaceAxis:
    """One side of the box that velocity control may not leave: `state` (a name of the contract's states, m) is what
    the twist field `target` moves, and stays within lower to upper."""

    target: str
    state: str
    lower: float
    upper: float


@dataclass(frozen=True)
class GripperCommand:
    """A gripper dimension is a choice: above `threshold` the fingers go to `above_m`, else to `below_m`, in metres.

    topic: of the messages, one for each control step, or the action's name, which gets a goal when the choice changes.
    hysteresis: by how much, in the value's unit, it must pass the threshold to change the choice. max_effort_n: of an
    action's goals, in N.
    """

    topic: str
    type: str
    threshold: float
    hysteresis: float
    above_m: float
    below_m: float
    max_effort_n: float

    def above(self, value: float, before: bool | None) -> bool:
        """The choice for `value`; before: the choice so far, None where there was none."""
        margin = 0.0 if before is None else -self.hysteresis if before else self.hysteresis
        return value > self.threshold + margin


@dataclass(frozen=True)
class ActionContract:
    """The robot's command interface.

    chunk_rows: how many actions of a chunk may be carried out, 0: all. Those behind, which a policy foresees less well,
        are then never used, however late the next chunk is.
    hold_commands: how many holds end a motion before the node falls silent, 0: as many as the hold lasts.
    other_publishers: what it means that another node publishes on a command topic: `disarm` holds, and motion needs a
        new start; `hold` holds as long as it is there; `ignore` only tells.
    controller_timeout_s: after so long without a command the robot's own controller stops the robot; nothing else does
    when this process dies.
    """

    command: str
    topic: str
    frame_id: str
    control_rate_hz: float
    chunk_rows: int
    hold_commands: int
    other_publishers: str
    controller_timeout_s: float
    dimensions: tuple[ActionDimension, ...]
    workspace: tuple[WorkspaceAxis, ...]
    gripper: GripperCommand | None

    @property
    def control_period_ns(self) -> int:
        return round(1e9 / self.control_rate_hz)


@dataclass(frozen=True)
class Contract:
    """Everything that maps ROS messages to observations and actions to commands."""

    path: str
    sha256: str
    cameras: tuple[CameraTopic, ...]
    states: tuple[StateTopic, ...]
    instruction: InstructionTopic
    synchronisation: Synchronisation
    action: ActionContract

    @property
    def primary(self) -> CameraTopic:
        """The camera whose frames are the observations' instants."""
        return self.cameras[0]

    @property
    def sources(self) -> "tuple[CameraTopic | StateTopic | InstructionTopic, ...]":
        """Every topic that the policy listens to; the instruction first, so that it is handled first."""
        return (self.instruction, *self.states, *self.cameras)

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(value.name for source in self.states for value in source.values)

    @property
    def input_types(self) -> dict[str, str]:
        """Message type by topic, for every topic that the policy listens to."""
        return {source.topic: source.type for source in self.sources}


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
