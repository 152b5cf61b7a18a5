"""A bag's contract topics over DDS, as they were recorded.

    ros2 launch vla_policy replay.launch.py bag:=BAG contract:=CONTRACT.yaml served:=SERVED_BAG

Starts publishing when every topic has a subscriber, and shuts the launch down when all frames are answered.
"""

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

PARAMETERS = {
    "bag_namespace": (str, "", "namespace of the topics in the bag"),
    "instruction": (str, "", "task in words before the first one that the bag tells"),
    "rate": (float, "1.0", "times recorded speed; 0: as fast as answers"),
    "publish_clock": (bool, "true", "publish /clock from the recording"),
    "served": (str, "", "bag to write the decisions to"),
    "summary": (str, "", "JSON file for the counts"),
}


def generate_launch_description() -> LaunchDescription:
    share = FindPackageShare("vla_policy")
    kinds = {"bag": str, "contract": str} | {name: kind for name, (kind, _, _) in PARAMETERS.items()}
    return LaunchDescription(
        [
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "common.launch.py"]))
            ),
            DeclareLaunchArgument("bag", description="rosbag2 folder, .mcap or .db3 file"),
            *(
                DeclareLaunchArgument(name, default_value=default, description=description)
                for name, (_, default, description) in PARAMETERS.items()
            ),
            Node(
                package="vla_policy",
                executable="replay_node",
                name="replay_node",
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                parameters=[
                    {name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in kinds.items()}
                ],
                arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
                on_exit=Shutdown(reason="the replay has ended"),
            ),
        ]
    )
