"""The policy node with the image transport's profile.

    ros2 launch vla_policy policy.launch.py engine_path:=ENGINE contract:=CONTRACT.yaml

Arguments that are given win over `params_file`; those that are not leave it alone. The node starts disabled (dry run)
unless told otherwise; call ~/enable to move.
"""

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchContext, LaunchDescription

PARAMETERS = {
    "engine_path": (str, "folder of the engine that serves"),
    "unnorm_key": (str, "which of the policy's statistics to use"),
    "use_sim_time": (bool, "follow /clock"),
    "lossless": (bool, "answer every frame in order"),
    "enabled": (bool, "allow motion from the start"),
    "check_sources": (str, "demand of the inputs: none, graph or message"),
}


def _node(context: LaunchContext) -> list[Node]:
    kinds = {"contract": str} | {name: kind for name, (kind, _) in PARAMETERS.items()}
    given = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, kind in kinds.items()
        if LaunchConfiguration(name).perform(context)
    }
    return [
        Node(
            package="vla_policy",
            executable="policy_node",
            name=LaunchConfiguration("node_name"),
            namespace=LaunchConfiguration("namespace"),
            output="screen",
            parameters=[LaunchConfiguration("params_file"), given],
            arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
        )
    ]


def generate_launch_description() -> LaunchDescription:
    share = FindPackageShare("vla_policy")
    return LaunchDescription(
        [
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "common.launch.py"]))
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value=PathJoinSubstitution([share, "config", "policy.params.yaml"]),
                description="parameters of the node",
            ),
            DeclareLaunchArgument("node_name", default_value="policy_node", description="name of the node"),
            *(
                DeclareLaunchArgument(name, default_value="", description=f"{description} (else as in params_file)")
                for name, (_, description) in PARAMETERS.items()
            ),
            OpaqueFunction(function=_node),
        ]
    )
