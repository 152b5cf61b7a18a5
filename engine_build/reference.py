"""An engine's decisions beside the torch policy's: the states that both see, and how far apart they are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calibrator.data.calibration import load_calibration
from calibrator.families import TorchActor
from vla_policy.core.observation import Observation
from vla_policy.core.runner import Engine
from vla_policy.core.verification import Decisions

_SYNTHETIC_PIXELS = (256, 256, 3)
_INSTRUCTION = "pick up the object and place it in the basket"


def reference_states(engine: Engine, calibration: Path | None, samples: int, seed: int) -> list[Observation]:
    """States spread over the calibration set, or, without one, random images and in-range random states."""
    if calibration is not None:
        states = load_calibration(calibration)
        chosen = np.unique(np.linspace(0, len(states) - 1, min(samples, len(states))).round().astype(int))
        return [states.observation(int(index)) for index in chosen]
    generator = np.random.default_rng(seed)

    def image() -> np.ndarray:
        return generator.integers(0, 256, _SYNTHETIC_PIXELS, dtype=np.uint8)

    proprio = engine.config.stats(engine.unnorm_key).proprio
    return [
        Observation(
            image(),
            _INSTRUCTION,
            generator.uniform(proprio.low, proprio.high).astype(np.float32) if proprio else None,
            tuple(image() for _ in range(engine.config.num_images - 1)),
        )
        for _ in range(samples)
    ]


def compare(engine: Engine, actor: TorchActor, states: Sequence[Observation], title: str) -> Decisions:
    """Along the torch policy's decision for the scores, each deciding freely for tokens and actions."""
    errors, largest, cosines, equal, actions, strays = [], [], [], [], [], 0
    for state in tqdm(states, desc=title, unit="state", disable=None):
        expected, got = actor.act(state), engine.act(state)
        reference, stray = actor.scores_and_stray(state, expected.tokens)
        strays += stray
        difference = engine.scores(state, expected) - reference
        errors.append(float(np.sqrt((difference**2).mean()) / reference.std()))
        largest.append(float(np.abs(difference).max()))
        cosines.append(_smallest_cosine(reference, reference + difference))
        equal += [got.tokens == expected.tokens] if expected.tokens.size else []
        actions.append(float(np.abs(got.action - expected.action).max()))
    return Decisions(
        scores_error=max(errors),
        scores_max_abs=max(largest),
        cosine=min(cosines),
        equal_tokens=float(np.mean(equal)) if equal else None,
        equal_decisions=float(np.mean([row.all() for row in equal])) if equal else None,
        action_max_abs=max(actions),
        stray_states=strays,
    )


def _smallest_cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(1, keepdims=True), right - right.mean(1, keepdims=True)
    return float(((left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))).min())
