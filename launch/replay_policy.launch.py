"""Replays a bag through a policy node: both packages' own launch files, in lossless dry run.

    ros2 launch vla_deploy replay_policy.launch.py bag:=BAG engine_path:=ENGINE contract:=CONTRACT.yaml

Takes the arguments of both (`--show-args` lists them); only the defaults that differ are declared here.
"""

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription
from vla_policy.launching import described


def generate_launch_description() -> LaunchDescription:
    share = FindPackageShare("vla_policy")
    return described(
        DeclareLaunchArgument("bag", description="rosbag2 folder, .mcap or .db3 file"),
        DeclareLaunchArgument("lossless", default_value="true", description="answer every frame in order"),
        DeclareLaunchArgument("use_sim_time", default_value="true", description="follow the recording's clock"),
        DeclareLaunchArgument(
            "check_sources",
            default_value="none",
            description="the replay waits for the node's subscriptions before it publishes anything",
        ),
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "policy.launch.py"]))
        ),
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "replay.launch.py"])),
            launch_arguments={"bag": LaunchConfiguration("bag")}.items(),
        ),
    )
