"""The simulated LIBERO robot driven by a policy node, in simulated time. Needs the workstation packages (evaluation).

    ros2 launch vla_deploy sim_policy.launch.py engine_path:=ENGINE \\
      tasks:="[pick_up_the_butter_and_place_it_in_the_basket]"

Takes the arguments of policy.launch.py too (`--show-args` lists them); only the defaults that differ are declared here.
"""

from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    Shutdown,
)
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchContext, LaunchDescription
from vla_policy.launching import common_arguments, described, image_transport, namespace

ROBOT = {
    "suite": ("libero_object", "LIBERO suite"),
    "tasks": ("['']", "task names; ['']: all of the suite"),
    "trials": ("[0]", "official initial states"),
    "max_steps": ("0", "control steps after which an episode ends; 0: as the suite says"),
    "lockstep": ("true", "simulated time waits for decisions"),
}


def _robot(context: LaunchContext) -> list[ExecuteProcess]:
    value = context.launch_configurations
    command = ["python3", "-m", "evaluation.robot", "--ros-args", "--log-level", value["log_level"]]
    if name := namespace(context):
        command += ["-r", f"__ns:={name}"]
    for parameter in ("contract", *ROBOT):
        command += ["-p", f"{parameter}:={value[parameter]}"]
    ended = Shutdown(reason="every episode is over")
    return [ExecuteProcess(cmd=command, output="screen", additional_env=image_transport(), on_exit=ended)]


def generate_launch_description() -> LaunchDescription:
    share = FindPackageShare("vla_policy")
    return described(
        *common_arguments(contract=PathJoinSubstitution([share, "config", "libero.yaml"])),
        DeclareLaunchArgument(
            "params_file",
            default_value=PathJoinSubstitution([share, "config", "simulation.params.yaml"]),
            description="parameters of the policy node",
        ),
        DeclareLaunchArgument("use_sim_time", default_value="true", description="follow the simulation's clock"),
        DeclareLaunchArgument("enabled", default_value="true", description="let the policy move the robot"),
        DeclareLaunchArgument("check_sources", default_value="graph", description="demand of the inputs"),
        *(
            DeclareLaunchArgument(name, default_value=default, description=description)
            for name, (default, description) in ROBOT.items()
        ),
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "policy.launch.py"]))
        ),
        OpaqueFunction(function=_robot),
    )
