"""What the torch policy decides of some states, for engines to be compared with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calibrator.data.calibration import load_calibration
from calibrator.families import TorchActor
from engine_build.golden import Expected
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

_SYNTHETIC_PIXELS = (256, 256, 3)
_INSTRUCTION = "pick up the object and place it in the basket"


def reference_states(
    config: PolicyConfig, unnorm_key: str, calibration: Path | None, samples: int, seed: int
) -> list[Observation]:
    """States spread over the calibration set, or, without one, random images and in-range random states."""
    if calibration is not None:
        states = load_calibration(calibration)
        chosen = np.unique(np.linspace(0, len(states) - 1, min(samples, len(states))).round().astype(int))
        return [states.observation(int(index)) for index in chosen]
    generator = np.random.default_rng(seed)

    def image() -> np.ndarray:
        return generator.integers(0, 256, _SYNTHETIC_PIXELS, dtype=np.uint8)

    proprio = config.stats(unnorm_key).proprio
    return [
        Observation(
            image(),
            _INSTRUCTION,
            generator.uniform(proprio.low, proprio.high).astype(np.float32) if proprio else None,
            tuple(image() for _ in range(config.num_images - 1)),
        )
        for _ in range(samples)
    ]


def source_of(calibration: Path | None, seed: int) -> str:
    """Where `reference_states` are from, in words."""
    return "calibration set" if calibration else f"random images, seed {seed}"


def expected_of(actor: TorchActor, states: Sequence[Observation], title: str) -> tuple[Expected, ...]:
    """What the policy decides of each state, and its scores along that."""
    found = []
    for state in tqdm(states, desc=title, unit="state", disable=None):
        decision = actor.act(state)
        found.append(Expected(decision, *actor.scores_and_stray(state, decision.tokens)))
    return tuple(found)
