"""What a policy family gives the build: its graphs, and the calls that a decision makes of them."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from engine_build.graph.context import GraphContext
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import Call, Sequences, TensorSpec

Config = TypeVar("Config", bound=PolicyConfig, contravariant=True)
Tensors = tuple[list[TensorSpec], list[TensorSpec]]
"""Inputs and outputs of a graph."""


class Family(Protocol[Config]):
    """A policy family; its folder exports it as `FAMILY`.

    graphs: by name, what writes each graph, from the checkpoint's tensors.
    """

    @property
    def graphs(self) -> Mapping[str, Callable[[GraphContext, Config], Tensors]]: ...

    def program(self, config: Config, sequences: Sequences) -> dict[str, Call]:
        """The calls by name: graphs, sizes of their named dimensions, and what is carried from one to the next.

        sequences: the form in which the graphs were written.
        """
        ...
