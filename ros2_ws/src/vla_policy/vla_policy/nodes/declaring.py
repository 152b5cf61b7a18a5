"""Parameters of a node: each declared once, with what it means, its range or choices, and whether it may change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from vla_policy.core.errors import ContractError
from vla_policy.core.yaml_fields import meant

_ROS_OWN = ("qos_overrides.", "start_type_description_service")
Value = bool | int | float | str | list[int] | list[str]


@dataclass(frozen=True)
class Declared:
    """One parameter. limits: of a number, both included. choices: of a text. fixed: read once, when the node starts.

    ROS has no empty list of texts; one empty text in it stands for none.
    """

    default: Value
    description: str
    limits: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    fixed: bool = False


def declare(node: Node, parameters: Mapping[str, Declared]) -> None:
    """Declares every parameter; a value of another type or outside its range is refused by ROS itself.

    The node was made with `automatically_declare_parameters_from_overrides`, so that what command line and parameter
    files give can be seen. Raises ContractError for a name that nearly is one of `parameters`; any other one, which may
    be meant for another node, is warned of.
    """
    given = set(node.get_parameters_by_prefix("")) - {"use_sim_time"}
    for name in sorted(given - set(parameters)):
        if name.startswith(_ROS_OWN):
            continue
        if hint := meant(name, parameters):
            raise ContractError(f"parameter {name!r} is unknown{hint}")
        node.get_logger().warning(f"parameter {name!r} is unknown and has no effect")
        node.undeclare_parameter(name)
    for name, parameter in parameters.items():
        if name in given:  # declared by its value alone, without type and range
            node.undeclare_parameter(name)
        node.declare_parameter(name, parameter.default, _descriptor(parameter))


def read(node: Node, parameters: Mapping[str, Declared]) -> dict[str, Any]:
    """The current values by name. Raises ContractError for a choice that does not exist."""
    values = {name: node.get_parameter(name).value for name in parameters}
    for name, parameter in parameters.items():
        if parameter.default == [""]:
            values[name] = [text for text in values[name] if text]
        if parameter.choices and values[name] not in parameter.choices:
            allowed = ", ".join(parameter.choices)
            raise ContractError(f"parameter {name}: expected one of {allowed}, got {values[name]!r}")
    return values


def _descriptor(parameter: Declared) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(description=parameter.description, read_only=parameter.fixed)
    if parameter.choices:
        descriptor.additional_constraints = f"one of {', '.join(parameter.choices)}"
    if parameter.limits is not None and isinstance(parameter.default, float):
        lower, upper = parameter.limits
        descriptor.floating_point_range = [FloatingPointRange(from_value=lower, to_value=upper)]
    elif parameter.limits is not None:
        lower, upper = (int(limit) for limit in parameter.limits)
        descriptor.integer_range = [IntegerRange(from_value=lower, to_value=upper)]
    return descriptor
