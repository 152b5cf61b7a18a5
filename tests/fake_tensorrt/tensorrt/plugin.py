"""A stand-in for `tensorrt.plugin`: keeps what is registered, with concrete shapes in place of symbolic ones."""

import inspect
import os
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class ShapeExpr(int):
    """A size that is known. Only `constant_value` gives it as a number, as of TensorRT's expressions."""

    def constant_value(self) -> int:
        return int(self)

    def __mul__(self, other: int) -> "ShapeExpr":
        return type(self)(int(self) * int(other))

    def __add__(self, other: int) -> "ShapeExpr":
        return type(self)(int(self) + int(other))

    def __floordiv__(self, other: int) -> "ShapeExpr":
        return type(self)(int(self) // int(other))


class UnknownShapeExpr(ShapeExpr):
    """A size that is not known yet: TensorRT asks for the outputs' types before it knows any shape."""

    def constant_value(self) -> int:
        raise RuntimeError("Not accessible for fake ShapeExprs")


@dataclass
class TensorDesc:
    shape_expr: tuple[ShapeExpr, ...]
    dtype: Any


@dataclass
class KernelLaunchParams:
    grid_x: int = 1
    grid_y: int = 1
    grid_z: int = 1
    block_x: int = 1
    block_y: int = 1
    block_z: int = 1
    shared_mem: int = 0


@dataclass
class AutoTuneCombination:
    io_types: str
    layouts: str
    tactics: Iterable[int] = ()


@dataclass
class SymInt32:
    value: int


class SymIntExprs(list[Any]):
    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


@dataclass
class Plugin:
    describe: Callable[..., Any]
    tune: Callable[..., Any] | None = None
    launch: Callable[..., Any] | None = None

    @property
    def inputs(self) -> list[str]:
        return list(inspect.signature(self.describe).parameters)


REGISTRY: dict[str, Plugin] = {}


def from_shape_expr(shape_expr: Sequence[int], dtype: Any) -> TensorDesc:
    return TensorDesc(
        tuple(size if isinstance(size, ShapeExpr) else ShapeExpr(size) for size in shape_expr), dtype
    )


def cdiv(first: int, second: int) -> ShapeExpr:
    return ShapeExpr(-(-int(first) // int(second)))


def register(plugin_id: str) -> Callable[..., Any]:
    """As in TensorRT, annotations must be the classes themselves: they tell inputs from attributes."""

    def keep(describe: Callable[..., Any]) -> Callable[..., Any]:
        assert plugin_id not in REGISTRY
        signature = inspect.signature(describe)
        assert all(issubclass(parameter.annotation, TensorDesc) for parameter in signature.parameters.values())
        returned = signature.return_annotation
        assert all(issubclass(one, TensorDesc) for one in typing.get_args(returned) or (returned,))
        REGISTRY[plugin_id] = Plugin(describe)
        return describe

    return keep


def autotune(plugin_id: str) -> Callable[..., Any]:
    def keep(tune: Callable[..., Any]) -> Callable[..., Any]:
        plugin = REGISTRY[plugin_id]
        assert list(inspect.signature(tune).parameters) == [*plugin.inputs, "outputs"]
        plugin.tune = tune
        return tune

    return keep


def aot_impl(plugin_id: str) -> Callable[..., Any]:
    def keep(launch: Callable[..., Any]) -> Callable[..., Any]:
        plugin = REGISTRY[plugin_id]
        assert list(inspect.signature(launch).parameters) == [*plugin.inputs, "outputs", "tactic"]
        plugin.launch = launch
        return launch

    return keep


if os.environ.get("FAKE_TENSORRT", "").startswith("10.3"):
    del aot_impl  # which came with 10.9
