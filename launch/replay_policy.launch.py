"""Replays a bag through a policy node: both packages' own launch files, in lossless dry run.

ros2 launch vla_deploy replay_policy.launch.py bag:=BAG engine_path:=ENGINE contract:=CONTRACT.yaml
"""

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    share = FindPackageShare("vla_policy")
    shared = {name: LaunchConfiguration(name) for name in ("contract", "namespace", "log_level")}
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="rosbag2 folder, .mcap or .db3 file"),
            DeclareLaunchArgument("engine_path", description="folder of the engine that serves"),
            DeclareLaunchArgument(
                "contract",
                default_value=PathJoinSubstitution([share, "config", "libero.yaml"]),
                description="YAML that maps topics to the policy's inputs and actions to commands",
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of nodes and topics"),
            DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
            DeclareLaunchArgument(
                "rate", default_value="1.0", description="times recorded speed; 0: as fast as answers"
            ),
            DeclareLaunchArgument("served", default_value="", description="bag to write the decisions to"),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "policy.launch.py"])),
                launch_arguments={
                    **shared,
                    "engine_path": LaunchConfiguration("engine_path"),
                    "lossless": "true",
                    "use_sim_time": "true",
                    # The replay waits for the node's subscriptions before it publishes anything.
                    "check_sources": "none",
                }.items(),
            ),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "replay.launch.py"])),
                launch_arguments={
                    **shared,
                    "bag": LaunchConfiguration("bag"),
                    "rate": LaunchConfiguration("rate"),
                    "served": LaunchConfiguration("served"),
                }.items(),
            ),
        ]
    )
