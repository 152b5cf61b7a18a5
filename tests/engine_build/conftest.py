"""A mixed CPU engine of a random policy of odd sizes, built once."""

from pathlib import Path

import pytest
from ragged import build_engine


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `policy`, `plan.json` and `engine` in 2, 4, 8 and 16 bits."""
    folder = tmp_path_factory.mktemp("workshop")
    build_engine(folder, ["w2a16_g32", "w4a16_g32", "w8a16_g32", "w16a16"])
    return folder
