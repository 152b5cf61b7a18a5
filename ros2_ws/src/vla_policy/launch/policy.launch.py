"""The policy node with the image transport's profile.

    ros2 launch vla_policy policy.launch.py engine_path:=ENGINE contract:=CONTRACT.yaml

Values given as launch arguments win over `params_file`. The node starts disabled (dry run); call ~/enable to move.
"""

from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    config = PathJoinSubstitution([FindPackageShare("vla_policy"), "config"])
    return LaunchDescription(
        [
            DeclareLaunchArgument("engine_path", description="folder of the engine that serves"),
            DeclareLaunchArgument(
                "contract",
                default_value=PathJoinSubstitution([config, "libero.yaml"]),
                description="YAML that maps topics to the policy's inputs and actions to commands",
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value=PathJoinSubstitution([config, "policy.params.yaml"]),
                description="parameters of the node",
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of node and relative topics"),
            DeclareLaunchArgument("node_name", default_value="policy_node", description="name of the node"),
            DeclareLaunchArgument("use_sim_time", default_value="false", description="follow /clock"),
            DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
            DeclareLaunchArgument("lossless", default_value="false", description="answer every frame in order"),
            DeclareLaunchArgument("enabled", default_value="false", description="allow motion from the start"),
            DeclareLaunchArgument(
                "check_sources", default_value="message", description="demand of the inputs: none, graph or message"
            ),
            SetEnvironmentVariable(
                "FASTRTPS_DEFAULT_PROFILES_FILE", PathJoinSubstitution([config, "fastdds_large_images.xml"])
            ),
            Node(
                package="vla_policy",
                executable="policy_node",
                name=LaunchConfiguration("node_name"),
                namespace=LaunchConfiguration("namespace"),
                output="screen",
                parameters=[
                    LaunchConfiguration("params_file"),
                    {
                        "engine_path": LaunchConfiguration("engine_path"),
                        "contract": LaunchConfiguration("contract"),
                        "check_sources": LaunchConfiguration("check_sources"),
                        "use_sim_time": ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool),
                        "lossless": ParameterValue(LaunchConfiguration("lossless"), value_type=bool),
                        "enabled": ParameterValue(LaunchConfiguration("enabled"), value_type=bool),
                    },
                ],
                arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
            ),
        ]
    )
