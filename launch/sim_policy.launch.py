"""The simulated LIBERO robot driven by a policy node, in simulated time. Needs the workstation packages (evaluation).

ros2 launch vla_deploy sim_policy.launch.py engine_path:=ENGINE tasks:="[pick_up_the_butter_and_place_it_in_the_basket]"
"""

from launch.actions import DeclareLaunchArgument, ExecuteProcess, IncludeLaunchDescription, Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    share = FindPackageShare("vla_policy")
    shared = {name: LaunchConfiguration(name) for name in ("contract", "namespace", "log_level")}
    return LaunchDescription(
        [
            DeclareLaunchArgument("engine_path", description="folder of the engine that serves"),
            DeclareLaunchArgument(
                "contract",
                default_value=PathJoinSubstitution([share, "config", "libero.yaml"]),
                description="YAML that maps topics to the policy's inputs and actions to commands",
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of nodes and topics"),
            DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
            DeclareLaunchArgument("suite", default_value="libero_object", description="LIBERO suite"),
            DeclareLaunchArgument("tasks", default_value="['']", description="task names; ['']: all of the suite"),
            DeclareLaunchArgument("trials", default_value="[0]", description="official initial states"),
            DeclareLaunchArgument("lockstep", default_value="true", description="simulated time waits for decisions"),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "policy.launch.py"])),
                launch_arguments={
                    **shared,
                    "engine_path": LaunchConfiguration("engine_path"),
                    "params_file": PathJoinSubstitution([share, "config", "simulation.params.yaml"]),
                    "use_sim_time": "true",
                    "enabled": "true",
                    "check_sources": "graph",
                }.items(),
            ),
            ExecuteProcess(
                cmd=[
                    "python3",
                    "-m",
                    "evaluation.robot",
                    "--ros-args",
                    "-r",
                    ["__ns:=/", LaunchConfiguration("namespace")],
                    "-p",
                    ["contract:=", LaunchConfiguration("contract")],
                    "-p",
                    ["suite:=", LaunchConfiguration("suite")],
                    "-p",
                    ["tasks:=", LaunchConfiguration("tasks")],
                    "-p",
                    ["trials:=", LaunchConfiguration("trials")],
                    "-p",
                    ["lockstep:=", LaunchConfiguration("lockstep")],
                ],
                output="screen",
                on_exit=Shutdown(reason="every episode is over"),
            ),
        ]
    )
