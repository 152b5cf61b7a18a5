"""The policy node's process with a FakeEngine in place of a built one; everything else is the product.

The folder `engine_path` holds `fake.json` beside a manifest.json: latency_s, action ("echo", a list, a list of lists),
fail_after, fail_load, images, steps. It is read again before every decision: a test can change it while the node runs.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from vla_policy.core.errors import ArtefactError
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import ActionStats, NormStats, PolicyConfig, ProprioStats
from vla_policy.nodes.policy_node import main

STATES = ("x", "y", "z", "gripper_width", "gripper_velocity")


def fake_config(images: int = 1, steps: int = 4, rows: int = 1) -> PolicyConfig:
    action = ActionStats((-1.0,) * 7, (1.0,) * 7, (True,) * 7)
    proprio = ProprioStats(STATES, (-1.0,) * 5, (1.0,) * 5, (True,) * 5)
    stats = {"fake": NormStats(action, proprio)}
    return PolicyConfig(
        norm_stats=stats,
        num_images=images,
        image_size=112,
        takes_state=True,
        horizon=rows,
        steps_per_action=steps,
        raw={},
    )


class FakeEngine:
    """Acts as `fake.json` says; "echo" gives the state, the images' mean and the instruction's length."""

    unnorm_key = "fake"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._decisions = 0
        settings = json.loads((folder / "fake.json").read_text())
        action = settings.get("action", "echo")
        rows = len(action) if isinstance(action[0], list) else 1
        self.config = fake_config(settings.get("images", 1), settings.get("steps", 4), rows)

    def check_instruction(self, instruction: str) -> None:
        """Every one is a task."""

    def act(self, observation: Observation) -> Decision:
        settings = json.loads((self._folder / "fake.json").read_text())
        time.sleep(settings.get("latency_s", 0.0))
        self._decisions += 1
        if 0 < settings.get("fail_after", 0) < self._decisions:
            raise RuntimeError("the fake engine fails as told")
        action = settings.get("action", "echo")
        values = echo(observation) if action == "echo" else np.asarray(action, np.float64)
        return Decision(np.arange(values.size, dtype=np.int64), values)


def echo(observation: Observation) -> np.ndarray:
    """float64 [7], different for every observation."""
    assert observation.state is not None
    brightness = np.mean([(place + 1) * image.mean() for place, image in enumerate(observation.images)])
    features = [brightness / 255, len(observation.instruction) / 1000]
    return np.asarray([*observation.state.astype(np.float64), *features])


def load_fake(folder: Path, unnorm_key: str | None, threads: int | None) -> FakeEngine:
    if not (folder / "manifest.json").is_file():
        raise ArtefactError(f"{folder}: no manifest.json; it is not an engine folder")
    if json.loads((folder / "fake.json").read_text()).get("fail_load"):
        raise RuntimeError("the fake engine's runtime raises as told")
    return FakeEngine(folder)


if __name__ == "__main__":
    sys.exit(main(load_engine=load_fake))
