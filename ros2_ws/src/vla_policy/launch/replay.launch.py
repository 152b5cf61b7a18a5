"""A bag's contract topics over DDS, as they were recorded.

    ros2 launch vla_policy replay.launch.py bag:=BAG contract:=CONTRACT.yaml served:=SERVED_BAG

Starts publishing when every topic has a subscriber, and shuts the launch down when all frames are answered.
"""

from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    config = PathJoinSubstitution([FindPackageShare("vla_policy"), "config"])
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="rosbag2 folder, .mcap or .db3 file"),
            DeclareLaunchArgument(
                "contract",
                default_value=PathJoinSubstitution([config, "libero.yaml"]),
                description="YAML that maps topics to the policy's inputs",
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of the published topics"),
            DeclareLaunchArgument("bag_namespace", default_value="", description="namespace of the topics in the bag"),
            DeclareLaunchArgument(
                "rate", default_value="1.0", description="times recorded speed; 0: as fast as answers"
            ),
            DeclareLaunchArgument(
                "publish_clock", default_value="true", description="publish /clock from the recording"
            ),
            DeclareLaunchArgument("served", default_value="", description="bag to write the decisions to"),
            DeclareLaunchArgument("summary", default_value="", description="JSON file for the counts"),
            DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
            SetEnvironmentVariable(
                "FASTRTPS_DEFAULT_PROFILES_FILE", PathJoinSubstitution([config, "fastdds_large_images.xml"])
            ),
            Node(
                package="vla_policy",
                executable="replay_node",
                name="replay_node",
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                parameters=[
                    {
                        "bag": LaunchConfiguration("bag"),
                        "contract": LaunchConfiguration("contract"),
                        "bag_namespace": LaunchConfiguration("bag_namespace"),
                        "served": LaunchConfiguration("served"),
                        "summary": LaunchConfiguration("summary"),
                        "rate": ParameterValue(LaunchConfiguration("rate"), value_type=float),
                        "publish_clock": ParameterValue(LaunchConfiguration("publish_clock"), value_type=bool),
                    }
                ],
                arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
                on_exit=Shutdown(reason="the replay has ended"),
            ),
        ]
    )
