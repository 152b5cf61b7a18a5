"""Two answers to the same frames, compared: per dimension, over progress, at phases, at the gripper."""

from dataclasses import dataclass

import numpy as np

from evaluation.replay.run import Answers
from vla_policy.core.contract import GRIPPER, ActionContract
from vla_policy.core.errors import DataError


@dataclass(frozen=True)
class DimensionError:
    """Absolute error of one action dimension in the command's unit, over all frames; of a chunk, its largest.

    over_progress: mean per bin of progress, NaN where a bin has no frame. by_phase: mean per phase.
    """

    name: str
    unit: str
    mean: float
    p95: float
    maximum: float
    over_progress: tuple[float, ...]
    by_phase: tuple[float, ...]


@dataclass(frozen=True)
class WorstFrame:
    """A frame on which the two differ most. `error`: largest |difference| / limit over the dimensions."""

    index: int
    episode: int
    step: int
    stamp_ns: int
    progress: float
    error: float
    dimension: str


@dataclass(frozen=True)
class Comparison:
    """Candidate against reference. Phases are cut where the reference's gripper changes its mind, first is phase 0.

    token_agreement: None where the engines decide no tokens.
    """

    frames: int
    identical_frames: int
    token_agreement: float | None
    dimensions: tuple[DimensionError, ...]
    phases: tuple[int, ...]
    gripper_disagreement: float | None
    gripper_flips: tuple[int, int] | None
    worst: tuple[WorstFrame, ...]


def compare(reference: Answers, candidate: Answers, contract: ActionContract, bins: int, worst: int) -> Comparison:
    """Compares the frames that both answered. Raises DataError when there are none or the actions differ in shape."""
    shared, left, right = np.intersect1d(reference.stamp_ns, candidate.stamp_ns, return_indices=True)
    if not len(shared):
        raise DataError(f"{candidate.name} and {reference.name} answered no common frame")
    if reference.actions.shape[1] != candidate.actions.shape[1]:
        sizes = candidate.actions.shape[1], reference.actions.shape[1]
        raise DataError(f"{candidate.name} answers {sizes[0]} values per frame, {reference.name} {sizes[1]}")
    scales = np.asarray([abs(dimension.scale) for dimension in contract.dimensions])
    limits = np.asarray([max(-dimension.lower, dimension.upper) for dimension in contract.dimensions])
    difference = np.abs(candidate.actions[right] - reference.actions[left])
    error = difference.reshape(len(shared), -1, len(scales)).max(axis=1) * scales
    progress = reference.progress[left]
    chosen = _gripper(reference.actions[left], contract), _gripper(candidate.actions[right], contract)
    episode = reference.episode[left]
    phase = _phases(chosen[0], episode)
    binned = np.minimum((progress * bins).astype(int), bins - 1)
    same = reference.tokens[left] == candidate.tokens[right]
    relative = error / limits
    order = np.argsort(-relative.max(axis=1), kind="stable")[:worst]
    return Comparison(
        frames=len(shared),
        identical_frames=int((error == 0).all(axis=1).sum()),
        token_agreement=float(same.mean()) if same.size else None,
        dimensions=tuple(
            DimensionError(
                name=dimension.name,
                unit=dimension.unit,
                mean=float(error[:, column].mean()),
                p95=float(np.percentile(error[:, column], 95)),
                maximum=float(error[:, column].max()),
                over_progress=_means(error[:, column], binned, bins),
                by_phase=_means(error[:, column], phase, int(phase.max()) + 1),
            )
            for column, dimension in enumerate(contract.dimensions)
        ),
        phases=tuple(np.bincount(phase).tolist()),
        gripper_disagreement=None if chosen[0] is None else float((chosen[0] != chosen[1]).mean()),
        gripper_flips=None if chosen[0] is None else (_flips(chosen[0], episode), _flips(chosen[1], episode)),
        worst=tuple(
            WorstFrame(
                index=int(left[row]),
                episode=int(episode[row]),
                step=int(reference.step[left[row]]),
                stamp_ns=int(shared[row]),
                progress=float(progress[row]),
                error=float(relative[row].max()),
                dimension=contract.dimensions[int(relative[row].argmax())].name,
            )
            for row in order
        ),
    )


def _gripper(actions: np.ndarray, contract: ActionContract) -> np.ndarray | None:
    column = next((index for index, item in enumerate(contract.dimensions) if item.target == GRIPPER), None)
    if column is None or contract.gripper is None:
        return None
    dimension = contract.dimensions[column]
    return actions[:, column] * dimension.scale + dimension.offset > contract.gripper.threshold


def _changes(chosen: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """bool [N]: where the gripper's choice differs from the frame before in the same episode."""
    return np.concatenate([[False], (chosen[1:] != chosen[:-1]) & (episode[1:] == episode[:-1])])


def _flips(chosen: np.ndarray | None, episode: np.ndarray) -> int:
    return 0 if chosen is None else int(_changes(chosen, episode).sum())


def _phases(chosen: np.ndarray | None, episode: np.ndarray) -> np.ndarray:
    """int64 [N]: how often the gripper has changed its mind in this episode so far."""
    if chosen is None:
        return np.zeros(len(episode), np.int64)
    total = np.cumsum(_changes(chosen, episode))
    first = np.concatenate([[0], np.flatnonzero(episode[1:] != episode[:-1]) + 1])
    start = np.repeat(total[first], np.diff(np.append(first, len(episode))))
    return total - start


def _means(values: np.ndarray, group: np.ndarray, count: int) -> tuple[float, ...]:
    numbers = np.bincount(group, minlength=count)
    sums = np.bincount(group, weights=values, minlength=count)
    return tuple(float(total / number) if number else float("nan") for total, number in zip(sums, numbers, strict=True))
