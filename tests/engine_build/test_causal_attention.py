"""This project's attention to a growing cache against float64, ONNX Runtime's own, and itself."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from rounding import SINGLE
from vnni import needs_vnni

from engine_build.graph.builder import MICROSOFT, GraphBuilder
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.backends.onnxruntime_vnni import library

pytestmark = needs_vnni
SHAPES = [(6, 6, 32), (6, 2, 48), (2, 1, 16), (4, 4, 128)]
"""Heads, heads of keys and values, size of a head: 48 and 16 leave a single vector of two."""
CALLS = [(1, 0), (1, 80), (2, 5), (33, 7), (290, 0)]
"""Rows, and rows before."""
LONGEST = 320
Arrays = dict[str, np.ndarray]


def graph(path: Path, heads: int, shared: int, size: int, operator: str = "CausalAttention") -> Path:
    angles = np.arange(LONGEST)[:, None] * 10000.0 ** -(np.arange(0, size, 2) / size)
    shapes = {"query": heads * size, "key": shared * size, "value": shared * size}
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "rows", wide]) for name, wide in shapes.items()]
    kinds += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, shared, "past", size])
        for name in ("past_key", "past_value")
    ]
    inputs = [kind.name for kind in kinds]
    with GraphBuilder(path) as builder:
        tables = [builder.tensor(name, turn(angles), np.float32) for name, turn in (("cos", np.cos), ("sin", np.sin))]
        outputs, sizes = ["mixed", "keys", "values"], {"num_heads": heads, "kv_num_heads": shared}
        if operator == "CausalAttention":
            builder.nodes(operator, [*inputs, *tables], outputs, "attention", library.DOMAIN, **sizes)
        else:
            kinds.append(helper.make_tensor_value_info("last", TensorProto.INT32, [1]))
            kinds.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
            inputs += ["last", "total"]
            builder.nodes(operator, [*inputs, *tables], outputs, "attention", MICROSOFT, do_rotary=1, **sizes)
        builder.save(kinds, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs])
    return path


def feeds(heads: int, shared: int, size: int, rows: int, past: int) -> Arrays:
    generator = np.random.default_rng(rows + past)
    shapes = {
        "query": (1, rows, heads * size),
        "key": (1, rows, shared * size),
        "value": (1, rows, shared * size),
        "past_key": (1, shared, past, size),
        "past_value": (1, shared, past, size),
    }
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def run(path: Path, given: Arrays, threads: int = 1) -> list[np.ndarray]:
    results: list[np.ndarray] = open_session(path, session_options(threads, library.library())).run(None, given)
    return results


def turned(x: np.ndarray, heads: int, past: int) -> np.ndarray:
    """float64 [heads, rows, size] of [1, rows, heads * size], each pair (x_i, x_i+half) turned as a complex number."""
    split = x[0].astype(np.float64).reshape(len(x[0]), heads, -1)
    half = split.shape[2] // 2
    places = past + np.arange(len(split))
    turn = np.exp(1j * places[:, None] * 10000.0 ** -(np.arange(half) / half))[:, None]
    pairs = (split[..., :half] + 1j * split[..., half:]) * turn
    return np.concatenate([pairs.real, pairs.imag], -1).transpose(1, 0, 2)


def reference(given: Arrays, heads: int, shared: int, past: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The three results in float64, and what the mixture may differ by.

    With scores off by d, weights are by a factor of e^(2 d); sums of n products are by n units of the last place.
    """
    keys = np.concatenate([given["past_key"][0].astype(np.float64), turned(given["key"], shared, past)], 1)
    new = given["value"][0].reshape(len(given["value"][0]), shared, -1).transpose(1, 0, 2)
    values = np.concatenate([given["past_value"][0], new], 1).astype(np.float64)
    queries = turned(given["query"], heads, past)
    size, total = queries.shape[2], keys.shape[1]
    several = np.repeat(keys, heads // shared, 0), np.repeat(values, heads // shared, 0)
    scores = queries @ several[0].transpose(0, 2, 1) / size**0.5
    hidden = np.arange(total) > past + np.arange(queries.shape[1])[:, None]
    weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
    mixed = weights / weights.sum(-1, keepdims=True) @ several[1]
    longest = np.linalg.norm(queries, axis=-1).max() * np.linalg.norm(keys, axis=-1).max() / size**0.5
    allowed = np.abs(values).max() * SINGLE * (2 * (size + 8) * longest + total + 16)
    return mixed.transpose(1, 0, 2).reshape(1, -1, heads * size), keys[None], values[None], float(allowed)


@pytest.mark.parametrize(("heads", "shared", "size"), SHAPES)
def test_against_float64_and_a_row_is_the_same_beside_any_others(
    heads: int, shared: int, size: int, tmp_path: Path
) -> None:
    path = graph(tmp_path / "attention.onnx", heads, shared, size)
    for rows, past in CALLS:
        given = feeds(heads, shared, size, rows, past)
        found = run(path, given)
        mixed, keys, values, allowed = reference(given, heads, shared, past)
        assert np.abs(found[0] - mixed).max() <= allowed
        # A pair turned: two products, their sum, and the table's own rounding, of at most sqrt(2) times a number.
        assert np.abs(found[1] - keys).max() <= 4 * 2**0.5 * SINGLE * np.abs(keys).max()
        assert np.array_equal(found[2], values)
        assert all(map(np.array_equal, found, run(path, given, threads=2))), "it depends on threads"
        if rows > 1:
            before = run(path, {name: x if "past" in name else x[:, :-1] for name, x in given.items()})
            last = {name: x[:, -1:] for name, x in given.items() if "past" not in name}
            alone = run(path, last | {"past_key": before[1], "past_value": before[2]})
            assert np.array_equal(alone[0], found[0][:, -1:]), "a step differs from the same row of a prompt"
            assert np.array_equal(before[0], found[0][:, :-1]) and np.array_equal(alone[1], found[1])


def test_numbers_are_those_of_group_query_attention(tmp_path: Path) -> None:
    heads, shared, size = 6, 2, 32
    ours = graph(tmp_path / "ours.onnx", heads, shared, size)
    theirs = graph(tmp_path / "theirs.onnx", heads, shared, size, "GroupQueryAttention")
    for rows, past in ((33, 0), (1, 80)):
        given = feeds(heads, shared, size, rows, past)
        length = {"last": np.asarray([rows + past - 1], np.int32), "total": np.asarray(rows + past, np.int32)}
        allowed = reference(given, heads, shared, past)[3]
        for ours_, theirs_ in zip(run(ours, given), run(theirs, given | length), strict=True):
            assert np.abs(ours_ - theirs_).max() <= 2 * allowed


@pytest.mark.parametrize("damage", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "past_key", "past_value"])
def test_what_is_not_finite_stays_so(where: str, damage: float, tmp_path: Path) -> None:
    path = graph(tmp_path / "attention.onnx", 2, 2, 16)
    for rows in (1, 9):
        given = feeds(2, 2, 16, rows, 4)
        given[where].reshape(-1)[3] = damage
        assert not np.isfinite(run(path, given)[0]).all()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = graph(tmp_path / "attention.onnx", 2, 2, 16)
    with pytest.raises(Exception, match="CausalAttention: the sequence is longer than the tables of cosine and sine"):
        run(path, feeds(2, 2, 16, 2, LONGEST - 1))
    given = feeds(2, 2, 16, 2, 3)
    with pytest.raises(Exception, match="CausalAttention: queries, keys, values and cache do not fit"):
        run(path, given | {"key": given["key"][:, :1]})
    with pytest.raises(Exception, match="num_heads must be a multiple of kv_num_heads"):
        run(graph(tmp_path / "uneven.onnx", 3, 2, 16), feeds(3, 2, 16, 1, 0))
