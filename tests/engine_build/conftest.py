"""A mixed CPU engine of a random policy of odd sizes, built once; and a machine with a stand-in for TensorRT 10."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ragged import build_engine


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `policy`, `plan.json` and `engine` in 2, 4, 8 and 16 bits."""
    folder = tmp_path_factory.mktemp("workshop")
    build_engine(folder, ["w2a16_g32", "w4a16_g32", "w8a16_g32", "w16a16"])
    return folder


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import tensorrt` finds the stand-in, in the processes that a build starts, too."""
    names = ("tensorrt", "tensorrt.plugin")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fake_tensorrt"))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in names:
        sys.modules.pop(name, None)
