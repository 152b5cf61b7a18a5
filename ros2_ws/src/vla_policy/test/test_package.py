"""What `colcon test` checks on the robot: the core imports without ROS and workstation packages; contracts load."""

import subprocess
import sys
from pathlib import Path

import yaml

PACKAGE = Path(__file__).parents[1]
FOREIGN = ("rclpy", "torch", "calibrator", "engine_build", "evaluation")


def test_the_core_imports_nothing_foreign() -> None:
    modules = sorted(f"vla_policy.core.{path.stem}" for path in (PACKAGE / "vla_policy/core").glob("*.py"))
    modules = [name for name in modules if "backend" not in name]  # imported when an engine of its kind is loaded
    code = f"import sys, {', '.join(modules)}; print([name for name in {FOREIGN} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_shipped_contract_loads() -> None:
    from vla_policy.core.contract import load_contract

    paths = sorted((PACKAGE / "config").glob("*.yaml"))
    contracts = [path for path in paths if yaml.safe_load(path.read_text()).get("kind") == "contract"]
    assert [load_contract(path).path for path in contracts]
