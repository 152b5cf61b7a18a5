"""package.xml against its schema, where ROS brings the linter."""

from pathlib import Path

import pytest


def test_package_xml() -> None:
    linter = pytest.importorskip("ament_xmllint.main", reason="ament_xmllint comes with a ROS installation")
    assert linter.main(argv=[str(Path(__file__).parents[1] / "package.xml")]) == 0
