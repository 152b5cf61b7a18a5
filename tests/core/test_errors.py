"""Errors for the user are one line on every way out, whatever text a library brings into them."""

import pickle
from collections.abc import Callable

import pytest

from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError, ContractError, DataError, VlaError


@pytest.mark.parametrize("kind", [VlaError, ArtefactError, ContractError, DataError])
def test_a_message_stays_one_line(kind: type[VlaError], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise kind("bag: cannot be read (expected:\r\n   a number\n\n\tgot \u2028 'x'  ); copy it again\n")

    assert run(fail) == 2
    assert capsys.readouterr().err == "error: bag: cannot be read (expected: a number got 'x'  ); copy it again\n"


def test_an_error_crosses_processes() -> None:
    """As Ray's workers send theirs."""
    error = pickle.loads(pickle.dumps(DataError("a\nb")))
    assert (type(error), str(error)) == (DataError, "a b")


def test_a_defect_keeps_its_traceback() -> None:
    failing: Callable[[], int] = {}.popitem  # type: ignore[assignment]  # stands for any defect
    with pytest.raises(KeyError):
        run(failing)
