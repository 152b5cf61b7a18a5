"""A ROS world of its own for every test with real processes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ros.world import World


@pytest.fixture
def world() -> "Iterator[World]":
    from tests.ros.world import World, fresh_domain  # skips the test, not the folder, where there is no rclpy

    made = World(fresh_domain())
    yield made
    made.close()
