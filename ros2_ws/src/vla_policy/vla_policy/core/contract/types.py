"""What a contract says: sources of the policy's inputs, how they become observations, and the robot's commands."""

from dataclasses import dataclass

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

    chunk_rows: how many actions of a chunk may be carried out, 0: as many as the policy says (all, unless it has a
        number of its own). Those behind, which a policy foresees less well, are never used, however late the next is.
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
