"""A program: what a manifest may say of it, and how calls are fed and timed."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla_policy.core.errors import ArtefactError
from vla_policy.core.program import Call, GraphSpec, Program, Range, TensorSpec, check_program, profiles

X = TensorSpec("x", "float32", (1, "n"), "numbers")
PAST = TensorSpec("past", "float16", (1, "p", 2), "kept")
SUM = TensorSpec("sum", "float32", (1,), "their sum")
PRESENT = TensorSpec("present", "float16", (1, "q", 2), "to keep")
GRAPHS = {
    "counter": GraphSpec("counter.onnx", (X, PAST), (SUM, PRESENT)),
    "fixed": GraphSpec("fixed.onnx", (TensorSpec("y", "int64", (3,), "numbers"),), (SUM,)),
}
ANY = {"n": Range(0, 2, 9), "p": Range(0, 2, 9), "q": Range(0, 4, 18)}
CALLS = {
    "start": Call("counter", ANY | {"p": Range.fixed(0)}, {"present": "past"}),
    "again": Call("counter", ANY, {"present": "past"}),
    "look": Call("fixed", {}, {}),
}


class FakeSession:
    """Remembers what it was asked for; answers with names."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], set[str]]] = []

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        self.asked.append((call, dict(feeds), set(keep)))
        return {spec.name: f"{call}'s {spec.name}" for spec in GRAPHS[CALLS[call].graph].outputs}


def test_what_is_carried_comes_back_under_the_name_that_it_is_fed_by() -> None:
    session = FakeSession()
    program = Program(GRAPHS, CALLS, session)
    values, carried = program.run("start", {"x": np.array([[1, 2]])})
    assert (values, carried) == ({"sum": "start's sum"}, {"past": "start's present"})
    program.run("again", {"x": np.array([[3.0]])} | carried)
    (start, first, keep), (again, second, _) = session.asked
    assert (start, again, keep) == ("start", "again", {"present"})
    assert first["x"].dtype == np.float32 and second["past"] == "start's present"
    assert first["past"].shape == (1, 0, 2) and first["past"].dtype == np.float16
    assert [call for call, milliseconds in program.laps if milliseconds > 0] == ["start", "again"]


def test_a_call_takes_its_inputs_and_no_others() -> None:
    program = Program(GRAPHS, CALLS, FakeSession())
    with pytest.raises(ArtefactError, match="call look: input y is not fed"):
        program.run("look", {})
    with pytest.raises(ArtefactError, match="call look: the engine takes no x, z"):
        program.run("look", {"y": np.zeros(3), "x": np.zeros(1), "z": np.zeros(1)})


def test_a_graph_is_optimised_for_each_call_whose_sizes_vary() -> None:
    assert [profile.call for profile in profiles("counter", GRAPHS, CALLS)] == ["again", "start"]
    assert profiles("fixed", GRAPHS, CALLS) == []


def test_a_call_has_a_profile_for_each_step_of_its_length() -> None:
    sizes = {"n": Range.in_quarters(0, 2, 30, 128), "p": Range.in_quarters(256, 2, 30, 128), "q": Range.fixed(7)}
    calls = {"again": Call("counter", sizes, {}), "look": CALLS["look"]}
    found = profiles("counter", GRAPHS, calls)
    assert [(one.sizes["n"].largest, one.sizes["p"].smallest, one.sizes["q"].typical) for one in found] == [
        (32, 288, 7), (64, 320, 7), (96, 352, 7), (128, 384, 7),
    ]  # fmt: skip
    assert sizes["p"] == Range(258, 286, 384, (288, 320, 352, 384))
    assert Range.in_quarters(0, 1, 5, 50).steps == (16, 32, 40, 50)


def test_what_is_kept_at_its_place_and_what_the_session_counts_need_not_be_fed() -> None:
    cache = TensorSpec("past", "float16", (1, 9, 2), "kept")
    counts = (TensorSpec("count", "int64", (1,), "rows"), TensorSpec("position", "int64", (1,), "rows"))
    new = TensorSpec("new", "float16", (1, "n", 2), "to keep")
    graphs = {"counter": GraphSpec("counter.onnx", (X, cache, *counts), (SUM, new))}
    call = Call("counter", {"n": Range.fixed(3)}, {}, {"new": "past"})
    check_program(graphs, {"again": call})

    class Session(FakeSession):
        def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
            assert {name: feeds[name] for name in ("past", "count", "position")} == dict.fromkeys(feeds.keys() - {"x"})
            assert set(keep) == {"new"}
            return {"sum": 6.0, "new": "a handle"}

    values, kept = Program(graphs, {"again": call}, Session()).run("again", {"x": np.array([[1, 2, 3]])})
    assert (values, kept) == ({"sum": 6.0}, {"past": "a handle"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call("absent", {}, {}), "call new runs graph 'absent', which the engine does not have"),
        (Call("counter", {"n": Range.fixed(1)}, {}), r"sizes of \['n'\], graph counter has the dimensions \['n', 'p',"),
        (Call("counter", ANY, {"sum": "nothing"}), r"call new carries \['nothing'\], which no graph gives or takes"),
        (Call("counter", ANY, {}, {"nothing": "past"}), r"call new carries \['nothing'\], which no graph gives"),
        (
            Call("counter", ANY | {"n": Range(0, 1, 2, (1, 2)), "p": Range(0, 1, 3, (1, 2, 3))}, {}),
            "call new has sizes of unequally many steps",
        ),
        (Call("counter", ANY, {"nothing": "past"}), r"call new carries \['nothing'\], which no graph gives or takes"),
    ],
)
def test_a_program_that_its_graphs_cannot_run_is_refused(call: Call, message: str) -> None:
    check_program(GRAPHS, CALLS | {"same": replace(CALLS["again"])})
    with pytest.raises(ArtefactError, match=message):
        check_program(GRAPHS, CALLS | {"new": call})
