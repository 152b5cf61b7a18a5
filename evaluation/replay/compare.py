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
    """A frame on which the two differ most. index, candidate_index: its row in the two answers.

    error: largest |difference| over the dimensions, of each in halves of the range that its limits leave.
    """

    index: int
    candidate_index: int
    episode: int
    step: int
    stamp_ns: int
    progress: float
    error: float
    dimension: str


@dataclass(frozen=True)
class Comparison:
    """Candidate against reference. Phases are cut where the reference's gripper changes its mind, first is phase 0.

    frames: that both answered, which alone are compared; only_reference, only_candidate: that one of them left out;
    neither: that both did. token_agreement: None where the engines decide no tokens.
    """

    frames: int
    only_reference: int
    only_candidate: int
    neither: int
    identical_frames: int
    token_agreement: float | None
    dimensions: tuple[DimensionError, ...]
    phases: tuple[int, ...]
    gripper_disagreement: float | None
    gripper_flips: tuple[int, int] | None
    worst: tuple[WorstFrame, ...]


def compare(reference: Answers, candidate: Answers, contract: ActionContract, bins: int, worst: int) -> Comparison:
    """Compares the frames that both answered. Raises DataError when there are none or the actions differ in shape."""
    left, right = _pairs(reference.stamp_ns, candidate.stamp_ns)
    if not len(left):
        raise DataError(f"{candidate.name} and {reference.name} answered no common frame")
    if reference.actions.shape[1] != candidate.actions.shape[1]:
        sizes = candidate.actions.shape[1], reference.actions.shape[1]
        raise DataError(f"{candidate.name} answers {sizes[0]} values per frame, {reference.name} {sizes[1]}")
    scales = np.asarray([abs(dimension.scale) for dimension in contract.dimensions])
    halves = np.asarray([(dimension.upper - dimension.lower) / 2 for dimension in contract.dimensions])
    difference = np.abs(candidate.actions[right] - reference.actions[left])
    error = difference.reshape(len(left), -1, len(scales)).max(axis=1) * scales
    episode = reference.episode[left]
    chosen = (
        _gripper(reference.actions[left], episode, contract),
        _gripper(candidate.actions[right], episode, contract),
    )
    phase = _phases(chosen[0], episode)
    binned = np.minimum((reference.progress[left] * bins).astype(int), bins - 1)
    same = reference.tokens[left] == candidate.tokens[right]
    return Comparison(
        frames=len(left),
        only_reference=len(reference.stamp_ns) - len(left),
        only_candidate=len(candidate.stamp_ns) - len(left),
        neither=len(reference.refused.keys() & candidate.refused.keys()),
        identical_frames=int((difference == 0).all(axis=1).sum()),
        token_agreement=float(same.mean()) if same.size else None,
        dimensions=tuple(
            DimensionError(
                name=dimension.name,
                unit=dimension.unit,
                mean=float(values.mean()),
                p95=float(np.percentile(values, 95)),
                maximum=float(values.max()),
                over_progress=_means(values, binned, bins),
                by_phase=_means(values, phase, int(phase.max()) + 1),
            )
            for values, dimension in zip(error.T, contract.dimensions, strict=True)
        ),
        phases=tuple(np.bincount(phase).tolist()),
        gripper_disagreement=None if chosen[0] is None else float((chosen[0] != chosen[1]).mean()),
        gripper_flips=None if chosen[0] is None else (_flips(chosen[0], episode), _flips(chosen[1], episode)),
        worst=_worst(reference, left, right, error / halves, contract, worst),
    )


def _worst(
    reference: Answers, left: np.ndarray, right: np.ndarray, error: np.ndarray, contract: ActionContract, count: int
) -> tuple[WorstFrame, ...]:
    """The `count` frames with the largest errors. left, right: rows of both answers. error: float64 [N, D], as parts of
    half of each dimension's range."""
    return tuple(
        WorstFrame(
            index=int(left[row]),
            candidate_index=int(right[row]),
            episode=int(reference.episode[left[row]]),
            step=int(reference.step[left[row]]),
            stamp_ns=int(reference.stamp_ns[left[row]]),
            progress=float(reference.progress[left[row]]),
            error=float(error[row].max()),
            dimension=contract.dimensions[int(error[row].argmax())].name,
        )
        for row in np.argsort(-error.max(axis=1), kind="stable")[:count]
    )


def _pairs(reference: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the frames that both hold, in the reference's order. A stamp that comes again is a frame of its own."""
    rows: dict[int, list[int]] = {}
    for row, stamp_ns in enumerate(candidate.tolist()):
        rows.setdefault(stamp_ns, []).append(row)
    waiting = {stamp_ns: iter(places) for stamp_ns, places in rows.items()}
    pairs = []
    for row, stamp_ns in enumerate(reference.tolist()):
        partner = next(waiting[stamp_ns], None) if stamp_ns in waiting else None
        if partner is not None:
            pairs.append((row, partner))
    left, right = np.asarray(pairs, np.int64).reshape(-1, 2).T
    return left, right


def _gripper(actions: np.ndarray, episode: np.ndarray, contract: ActionContract) -> np.ndarray | None:
    """bool [N]: the gripper's choice on each frame, with the contract's hysteresis within an episode."""
    column = next((index for index, item in enumerate(contract.dimensions) if item.target == GRIPPER), None)
    if column is None or contract.gripper is None:
        return None
    dimension = contract.dimensions[column]
    chosen: list[bool] = []
    for row, value in enumerate((actions[:, column] * dimension.scale + dimension.offset).tolist()):
        before = chosen[-1] if row and episode[row] == episode[row - 1] else None
        chosen.append(contract.gripper.above(value, before))
    return np.asarray(chosen)


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
