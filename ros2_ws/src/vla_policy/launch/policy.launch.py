"""The policy node with the image transport's profile.

    ros2 launch vla_policy policy.launch.py engine_path:=ENGINE contract:=CONTRACT.yaml

Arguments that are given win over `params_file`; those that are not leave it alone. The node starts disabled (dry run)
unless told otherwise; call ~/enable to move. A node that was started again after a crash is always disabled.
"""

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchContext, LaunchDescription
from vla_policy.core.parameter_file import require_node
from vla_policy.launching import common_arguments, described, existing_file, image_transport, namespace

PARAMETERS = {
    "engine_path": (str, "folder of the engine that serves"),
    "unnorm_key": (str, "which of the policy's statistics to use"),
    "autostart": (bool, "configure and activate without a lifecycle manager"),
    "use_sim_time": (bool, "follow /clock"),
    "lossless": (bool, "answer every frame in order"),
    "enabled": (bool, "allow motion from the start"),
    "check_sources": (str, "demand of the inputs: none, graph or message"),
}
_TRUE, _RESPAWN_DELAY_S = ("true", "1"), 2.0


def _node(context: LaunchContext) -> list[Node]:
    value = context.launch_configurations
    respawn = value["respawn"].lower() in _TRUE
    kinds = {"contract": str} | {name: kind for name, (kind, _) in PARAMETERS.items()}
    given = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in kinds.items() if value[name]
    }
    if respawn and value["enabled"].lower() in _TRUE:
        raise RuntimeError("respawn and enabled together would move the robot by itself after a crash; choose one")
    if respawn:
        given["enabled"] = False  # whatever params_file says
    settings = existing_file(context, "params_file")
    require_node(settings, f"{namespace(context)}/{value['node_name']}")
    return [
        Node(
            package="vla_policy",
            executable="policy_node",
            name=value["node_name"],
            namespace=namespace(context),
            output="screen",
            parameters=[settings, given],
            arguments=["--ros-args", "--log-level", value["log_level"]],
            additional_env=image_transport(),
            respawn=respawn,
            respawn_delay=_RESPAWN_DELAY_S,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    return described(
        *common_arguments(),
        DeclareLaunchArgument(
            "params_file",
            default_value=PathJoinSubstitution([FindPackageShare("vla_policy"), "config", "policy.params.yaml"]),
            description="parameters of the node",
        ),
        DeclareLaunchArgument("node_name", default_value="policy_node", description="name of the node"),
        DeclareLaunchArgument(
            "respawn",
            default_value="false",
            choices=["true", "false"],
            description="start the node again, disabled, when its process has died",
        ),
        *(
            DeclareLaunchArgument(name, default_value="", description=f"{description} (else as in params_file)")
            for name, (_, description) in PARAMETERS.items()
        ),
        OpaqueFunction(function=_node),
    )
