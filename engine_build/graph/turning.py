"""Input operators in a graph: a gather and a product in blocks before a layer; see `calibrator.quantizers.turning`."""

import hashlib

import numpy as np

from calibrator.quantizers.turning import InputOperator, Turn
from engine_build.graph.builder import GraphBuilder


def turned(builder: GraphBuilder, x: str, operator: InputOperator, layer: str) -> str:
    """x [.., tokens, in] as the layer multiplies it. Layers of one input with one operator share what comes out."""
    digest = hashlib.sha256()
    for turn in operator.turns:
        digest.update(turn.order.numpy().tobytes() + turn.blocks.numpy().tobytes())

    def write() -> list[str]:
        value = x
        for number, turn in enumerate(operator.turns):
            value = _turn(builder, value, turn, f"{layer}.turns.{number}")
        return [value]

    return builder.shared(f"turned by {digest.hexdigest()}", x, write)[0]


def _turn(builder: GraphBuilder, x: str, turn: Turn, name: str) -> str:
    inputs, (matrices, size, _) = len(turn.order), turn.blocks.shape
    order = turn.order.numpy().astype(np.int32)
    if (order != np.arange(inputs)).any():
        x = builder.node("Gather", [x, builder.tensor(f"{name}.order", order)], axis=-1)
    count = inputs // size
    whole = x if count * size == inputs else builder.slice(x, 0, count * size, -1)
    stored = builder.tensor(f"{name}.blocks", turn.blocks.numpy()[0 if matrices == 1 else slice(None)], np.float16)
    blocks = stored if builder.float_dtype is np.float16 else builder.cast(stored, builder.float_type)
    parts = builder.reshape(whole, 0, 0, count, size)
    if matrices == 1:
        parts = builder.matmul(parts, blocks)
    else:
        parts = builder.transpose(builder.matmul(builder.transpose(parts, 0, 2, 1, 3), blocks), 0, 2, 1, 3)
    rows = builder.reshape(parts, 0, 0, count * size)
    return rows if whole == x else builder.concat([rows, builder.slice(x, count * size, inputs, -1)], -1)
