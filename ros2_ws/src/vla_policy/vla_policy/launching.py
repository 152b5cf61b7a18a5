"""What the launch files share: arguments that are checked, the image transport's profile, and nothing that leaks.

Only launch files import this; it needs `launch` and `launch_ros`, as every ROS installation has them.
"""

import difflib
import os
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    DeclareLaunchArgument,
    OpaqueFunction,
    PopLaunchConfigurations,
    PushLaunchConfigurations,
)
from launch.launch_context import LaunchContext
from launch.launch_description import LaunchDescription
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.some_substitutions_type import SomeSubstitutionsType

_PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
_LAUNCH_S_OWN = ("launch-prefix", "launch-prefix-filter")


def common_arguments(contract: SomeSubstitutionsType = "") -> list[DeclareLaunchArgument]:
    """contract: the default of that argument."""
    return [
        DeclareLaunchArgument(
            "contract",
            default_value=contract,
            description="YAML that maps topics to the policy's inputs and actions to commands",
        ),
        DeclareLaunchArgument("namespace", default_value="", description="namespace of nodes and relative topics"),
        DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
    ]


def described(*entities: LaunchDescriptionEntity) -> LaunchDescription:
    """A launch file of `entities`, whose arguments stay its own: what includes it finds its configurations as before.

    Started by `ros2 launch`, it refuses arguments that it does not have.
    """
    check = OpaqueFunction(function=_refuse_unknown_arguments)
    return LaunchDescription([check, PushLaunchConfigurations(), *entities, PopLaunchConfigurations()])


def _refuse_unknown_arguments(context: LaunchContext) -> None:
    given = [name for name, separator, _ in (text.partition(":=") for text in context.argv) if separator]
    if set(context.launch_configurations) - set(given):
        return  # another launch file includes this one, and the command line's arguments are that one's
    source = PythonLaunchDescriptionSource(context.locals.current_launch_file_path)
    known = [argument.name for argument in source.get_launch_description(context).get_launch_arguments()]
    for name in given:
        if name not in (*known, *_LAUNCH_S_OWN):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(known))}"
            raise RuntimeError(f"launch argument {name!r} is unknown; {hint}")


def namespace(context: LaunchContext) -> str:
    """The argument `namespace` with or without its slashes: absolute, or empty."""
    name = context.launch_configurations["namespace"].strip("/")
    return f"/{name}" if name else ""


def existing_file(context: LaunchContext, argument: str) -> str:
    """The argument's value. Raises RuntimeError where it is no file."""
    path = context.launch_configurations[argument]
    if not Path(path).is_file():
        raise RuntimeError(f"launch argument {argument}: {path!r} is no file")
    return path


def image_transport() -> dict[str, str]:
    """Environment of a process that handles images: this package's Fast DDS profile, unless the user has one."""
    if any(os.environ.get(variable) for variable in _PROFILE_VARIABLES):
        return {}
    profile = Path(get_package_share_directory("vla_policy")) / "config" / "fastdds_large_images.xml"
    return dict.fromkeys(_PROFILE_VARIABLES[1:], str(profile))
