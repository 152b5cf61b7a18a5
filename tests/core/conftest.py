"""What the tests of the policy server share."""

import pytest

from tests.core.server_bench import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()
