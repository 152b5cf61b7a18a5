"""A bag's contract topics over DDS, as they were recorded.

    ros2 launch vla_policy replay.launch.py bag:=BAG contract:=CONTRACT.yaml served:=SERVED_BAG

Starts publishing when every topic has a subscriber, and shuts the launch down when all frames are answered.
"""

from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription
from vla_policy.launching import common_arguments, described, image_transport, namespace

PARAMETERS = {
    "bag_namespace": (str, "", "namespace of the topics in the bag"),
    "instruction": (str, "", "task in words before the first one that the bag tells"),
    "rate": (float, "1.0", "times recorded speed; 0: as fast as answers"),
    "publish_clock": (bool, "true", "publish /clock from the recording"),
    "served": (str, "", "bag to write the decisions to"),
    "summary": (str, "", "JSON file for the counts"),
}


def _node(context: LaunchContext) -> list[Node]:
    kinds = {"bag": str, "contract": str} | {name: kind for name, (kind, _, _) in PARAMETERS.items()}
    return [
        Node(
            package="vla_policy",
            executable="replay_node",
            name="replay_node",
            namespace=namespace(context),
            output="screen",
            parameters=[
                {name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in kinds.items()}
            ],
            arguments=["--ros-args", "--log-level", context.launch_configurations["log_level"]],
            additional_env=image_transport(),
            on_exit=Shutdown(reason="the replay has ended"),
        )
    ]


def generate_launch_description() -> LaunchDescription:
    return described(
        *common_arguments(),
        DeclareLaunchArgument("bag", description="rosbag2 folder, .mcap or .db3 file"),
        *(
            DeclareLaunchArgument(name, default_value=default, description=description)
            for name, (_, default, description) in PARAMETERS.items()
        ),
        OpaqueFunction(function=_node),
    )
