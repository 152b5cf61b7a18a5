"""What every launch file of this package has in common: its arguments, and the image transport's profile."""

from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable
from launch.substitutions import PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    profile = PathJoinSubstitution([FindPackageShare("vla_policy"), "config", "fastdds_large_images.xml"])
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "contract",
                default_value="",
                description="YAML that maps topics to the policy's inputs and actions to commands",
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of nodes and relative topics"),
            DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
            SetEnvironmentVariable("FASTRTPS_DEFAULT_PROFILES_FILE", profile),
        ]
    )
