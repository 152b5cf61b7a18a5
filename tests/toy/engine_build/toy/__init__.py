"""The toy policy's one graph."""

from types import MappingProxyType

from vla_policy.core.families.toy import ToyConfig

from engine_build.families.base import Tensors
from engine_build.graph.context import GraphContext
from vla_policy.core.program import Call, Sequences, TensorSpec


def toy(graph: GraphContext, config: ToyConfig) -> Tensors:
    b = graph.builder
    felt = graph.linear(b.reshape("state", 1, 1, config.state_dim), "feel")
    x = b.add(graph.linear(graph.linear("patches", "eye"), "bridge"), felt)
    for number in range(2):
        x = b.add(x, b.node("Tanh", [graph.linear(x, f"body.{number}")]))
    actions = b.node("Tanh", [graph.linear(b.slice(x, 0, config.horizon, 1), "hand")])
    b.rename(actions, "actions")
    inputs = [
        TensorSpec("patches", "float32", (1, config.side**2, config.patch_values), "colours in [0, 1]"),
        TensorSpec("state", "float32", (1, config.state_dim), "the robot's, normalised"),
    ]
    return inputs, [TensorSpec("actions", "float32", (1, config.horizon, config.action_dim), "normalised")]


class Toy:
    """The family."""

    graphs = MappingProxyType({"toy": toy})

    def program(self, config: ToyConfig, sequences: Sequences) -> dict[str, Call]:
        return {"decide": Call("toy", {}, {})}


FAMILY = Toy()
