"""The first decisions of an engine, before it serves."""

import time

import numpy as np

from vla_policy.core.contract import Contract
from vla_policy.core.errors import ArtefactError
from vla_policy.core.instruction import normalised
from vla_policy.core.observation import Actor, Observation

_DECISIONS = 3


def pause(actor: Actor, contract: Contract, decision_ms: float) -> str | None:
    """What to say of an engine that takes longer than a chunk lasts: the robot stands still in between."""
    rows = contract.action.chunk_rows or actor.config.executed
    lasts_ms = rows * actor.config.steps_per_action * contract.action.control_period_ns / 1e6
    if decision_ms <= lasts_ms:
        return None
    return (
        f"a decision takes {decision_ms:.0f} ms, what it plans lasts {lasts_ms:.0f} ms (rows carried out: {rows}): the "
        "robot will stand still in between; carry out more rows or choose a smaller plan"
    )


def warm_up(actor: Actor, contract: Contract, deadline_s: float, instruction: str) -> float:
    """Median milliseconds of a decision on black images and zeros.

    instruction: the one to begin with; where it is empty, any.

    Raises ArtefactError when a decision misses the deadline, DataError for an instruction that the policy refuses,
    EngineError as `act`.
    """
    size = actor.config.image_size
    names = contract.state_names
    state = np.zeros(len(names), np.float32) if names else None
    image, *further = [np.zeros((size, size, 3), np.uint8)] * actor.config.num_images
    observation = Observation(image, normalised(instruction) or "warm up", state, tuple(further))
    times_ms = []
    for _ in range(_DECISIONS):
        begun = time.perf_counter()
        actor.act(observation)
        times_ms.append((time.perf_counter() - begun) * 1e3)
    median_ms = float(np.median(times_ms))
    if median_ms > deadline_s * 1e3:
        raise ArtefactError(
            f"engine: a warm-up decision took {median_ms:.1f} ms, above inference_deadline "
            f"{deadline_s * 1e3:.1f} ms; choose a smaller plan or raise the deadline"
        )
    return median_ms
