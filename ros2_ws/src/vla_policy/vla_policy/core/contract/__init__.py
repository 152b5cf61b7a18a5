"""The topic contract: which ROS topics carry a policy's inputs, and what its actions mean on the robot.

One YAML file is shared by the node, the replay and the calibrator's bag reader, so that the same messages become the
same observations everywhere. Names, units and order live here and nowhere else; `config/libero.yaml` is an example.
"""

# ruff: noqa: F401 - what is imported here are the package's names

from vla_policy.core.contract.reading import load_contract
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
