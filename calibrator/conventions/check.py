"""The check: a policy or its engine decides recorded states as they are, and as they would be under other conventions.

What is tried: images turned by 180 degrees, mirrored, upside down, with red and blue exchanged, cameras in the other
order; the state's values in the order that the statistics speak for; the policy's other statistics; the action's values
in the order, and with the signs, that fit best; the gripper in the other sense.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from calibrator.conventions.deciders import Decider
from calibrator.conventions.fit import Recording, clearly_better, correlation, runs_the_other_way
from calibrator.data.calibration import CalibrationSet
from vla_policy.core.errors import DataError
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

AS_RECORDED = "as recorded"
GRIPPER = "gripper: opposite"
_POOR, _SPAN = 0.3, 1e-6
STATES = 32
"""States that are tried, evenly over the set: enough for the classic mistakes, which change most actions."""

Change = Callable[[np.ndarray], np.ndarray]
VIEWS: Mapping[str, tuple[Change, str]] = {
    "images turned by 180 degrees": (lambda image: image[::-1, ::-1], "collect again with the other --rotate"),
    "images mirrored": (lambda image: image[:, ::-1], "mirror the images where they come from"),
    "images upside down": (lambda image: image[::-1], "flip the images where they come from"),
    "red and blue exchanged": (lambda image: image[..., ::-1], "collect again with --colours bgr"),
}
_ORDER, _SIGNS = "action values in another order", "action values with other signs"
_CAMERAS, _STATE = "cameras in reverse order", "state values in another order"


@dataclass(frozen=True)
class Trial:
    """One convention and how its decisions fit. remedy: what to do if it is the right one; better: clearly."""

    name: str
    remedy: str
    error: float
    correlation: float
    agreement: float | None
    better: bool


@dataclass(frozen=True)
class Outcome:
    """What the check found. dimensions: per action value {error, spread, correlation, gripper} as recorded.

    unchecked: why nothing could be compared, empty where it was. accepted: the user went on with what fits worse.
    """

    states: int
    unnorm_key: str
    dimensions: tuple[dict[str, Any], ...] = ()
    trials: tuple[Trial, ...] = ()
    unchecked: str = ""
    accepted: bool = False

    @property
    def best(self) -> Trial | None:
        """Of the conventions that fit clearly better than the recorded one the nearest; None where there is none."""
        return min((one for one in self.trials if one.better), key=lambda one: (one.error, one.name), default=None)

    @property
    def summary(self) -> str:
        """In one line."""
        if self.unchecked:
            return f"conventions not checked: {self.unchecked}"
        now = self.trials[0]
        agreement = "" if now.agreement is None else f", gripper {100 * now.agreement:.0f} %"
        text = f"conventions checked on {self.states} recorded states: correlation {now.correlation:.2f}{agreement}"
        if self.best:
            kept = "; kept as they are on request" if self.accepted else ""
            return f"{text}; {self.best.name} fits clearly better ({self.best.correlation:.2f}){kept}"
        if now.correlation < _POOR:
            return f"{text}; the recorded actions fit in no convention: are they of another kind than the policy's?"
        return f"{text}, no other convention fits better"

    def require(self, accept: bool, flag: str) -> "Outcome":
        """The outcome, with `accept` as what was decided. Raises DataError where another convention fits clearly better
        and that was not accepted by `flag`."""
        if self.best and not accept:
            now = self.trials[0]
            gripper = self.best.name == GRIPPER
            before, after = (
                (now.agreement, self.best.agreement) if gripper else (now.correlation, self.best.correlation)
            )
            measure = "agreement with the recorded gripper" if gripper else "correlation with the recorded actions"
            raise DataError(
                f"conventions: {self.best.name} fits clearly better ({measure} {before:.2f} as recorded, {after:.2f} "
                f"so, {self.states} states): {self.best.remedy}, or go on with {flag}"
            )
        return replace(self, accepted=self.best is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "states": self.states,
            "unnorm_key": self.unnorm_key,
            "dimensions": list(self.dimensions),
            "trials": [vars(trial) for trial in self.trials],
            "unchecked": self.unchecked,
            "accepted": self.accepted,
            "summary": self.summary,
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Outcome":
        return Outcome(
            states=raw["states"],
            unnorm_key=raw["unnorm_key"],
            dimensions=tuple(raw["dimensions"]),
            trials=tuple(Trial(**trial) for trial in raw["trials"]),
            unchecked=raw["unchecked"],
            accepted=raw["accepted"],
        )


def check(decider: Decider, calibration: CalibrationSet, unnorm_key: str | None) -> Outcome:
    """Tries the conventions on up to `STATES` states. A set without recorded actions is told as unchecked."""
    key = decider.config.unnorm_key(unnorm_key)
    stats = decider.config.stats(key).action
    actions = calibration.actions
    if actions is None:
        return Outcome(0, key, unchecked="the states have no recorded actions")
    if actions.shape[1] != stats.dim:
        text = f"recorded actions have {actions.shape[1]} values, the policy's {stats.dim}"
        return Outcome(0, key, unchecked=text)
    told = np.flatnonzero(np.isfinite(actions).all(1))
    chosen = told[np.unique(np.linspace(0, len(told) - 1, min(STATES, len(told))).round().astype(int))]
    runner = _Runner(decider, [calibration.observation(index) for index in chosen], key)
    recording = Recording.of(actions[chosen], np.asarray(stats.low), np.asarray(stats.high), np.asarray(stats.mask))
    opposite = np.asarray([calibration.grippers[index] == "opposite" for index in chosen])
    decided = runner.decided(AS_RECORDED)
    now = recording.fit(decided, opposite)
    trials = [Trial(AS_RECORDED, "", now.error, now.correlation, now.agreement, False)]
    tried = [*_seen_otherwise(runner), *_felt_otherwise(runner), *_other_statistics(runner)]
    tried += _other_values(decided, recording)
    for name, remedy, actions_so in tried:
        fit = recording.fit(actions_so, opposite)
        trials.append(Trial(name, remedy, fit.error, fit.correlation, fit.agreement, clearly_better(fit, now)))
    if now.agreement is not None:
        turned = recording.fit(decided, ~opposite)
        better = runs_the_other_way(now.agreement, len(chosen))
        remedy = "the recording's gripper runs the other way: collect again with the other --gripper"
        trials.append(Trial(GRIPPER, remedy, now.error, now.correlation, turned.agreement, better))
    dimensions = tuple(vars(one) for one in now.dimensions)
    return Outcome(len(chosen), key, dimensions, tuple(trials))


@dataclass(frozen=True)
class _Runner:
    """Decisions on the same states under different conventions."""

    decider: Decider
    observations: list[Observation]
    key: str

    @property
    def config(self) -> PolicyConfig:
        return self.decider.config

    def decided(
        self, name: str, change: Callable[[Observation], Observation] = lambda one: one, key: str | None = None
    ) -> np.ndarray:
        """float64 [N, K]: the first action of every decision. key: of other statistics."""
        changed = [change(one) for one in self.observations]
        found: dict[int, np.ndarray] = {}
        bar = tqdm(total=len(changed), desc=f"conventions: {name}", unit="state", disable=None, leave=False)
        with bar:
            for index, action in self.decider.first_actions(changed, key or self.key):
                found[index] = action
                bar.update()
        return np.stack([found[index] for index in range(len(changed))]).astype(np.float64)


def _seen_otherwise(runner: _Runner) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, remedy, decided) for images under other conventions."""
    for name, (change, remedy) in VIEWS.items():

        def changed(one: Observation, change: Change = change) -> Observation:
            image, *further = (np.ascontiguousarray(change(image)) for image in one.images)
            return replace(one, image=image, further=tuple(further))

        yield name, remedy, runner.decided(name, changed)
    if runner.config.num_images > 1:

        def reversed_order(one: Observation) -> Observation:
            image, *further = one.images[::-1]
            return replace(one, image=image, further=tuple(further))

        remedy = "collect again with the cameras in the policy's order"
        yield _CAMERAS, remedy, runner.decided(_CAMERAS, reversed_order)


def _felt_otherwise(runner: _Runner) -> Iterator[tuple[str, str, np.ndarray]]:
    """For the order of the state's values in which their ranges are nearest to those of the policy's statistics."""
    proprio = runner.config.stats(runner.key).proprio
    states = [one.state for one in runner.observations if one.state is not None]
    if not runner.config.takes_state or proprio is None or len(states) < len(runner.observations):
        return
    rows, low, high = np.stack(states), np.asarray(proprio.low), np.asarray(proprio.high)
    apart = np.abs(rows.min(0)[None] - low[:, None]) + np.abs(rows.max(0)[None] - high[:, None])
    order = linear_sum_assignment(apart / np.maximum(high - low, _SPAN)[:, None])[1]
    if (order == np.arange(len(order))).all():
        return

    def reordered(one: Observation) -> Observation:
        return replace(one, state=None if one.state is None else one.state[order])

    given = ", ".join(proprio.names)
    yield _STATE, f"collect again with --state in the policy's order ({given})", runner.decided(_STATE, reordered)


def _other_statistics(runner: _Runner) -> Iterator[tuple[str, str, np.ndarray]]:
    """For the policy's other statistics whose actions, and states where it takes any, are as many."""
    config = runner.config
    size = config.stats(runner.key).action.dim
    names = len(config.state_names(runner.key))
    for key, stats in config.norm_stats.items():
        if key == runner.key or stats.action.dim != size or len(config.state_names(key)) != names:
            continue
        if stats == config.stats(runner.key):
            continue
        name = f"statistics of {key}"
        yield name, f"use --unnorm-key {key}", runner.decided(name, key=key)


def _other_values(decided: np.ndarray, recording: Recording) -> Iterator[tuple[str, str, np.ndarray]]:
    """For the order and the signs of the moving dimensions that correlate best with the recorded ones."""
    moving = np.flatnonzero(recording.spread > 0)
    table = np.asarray([[correlation(decided[:, j], recording.actions[:, k]) or 0.0 for j in moving] for k in moving])
    if not table.size:
        return
    order = moving[linear_sum_assignment(-table)[1]]
    if (order != moving).any():
        swapped = decided.copy()
        swapped[:, moving] = decided[:, order]
        places = ", ".join(str(k) for k in order)
        yield _ORDER, f"record the actions in the policy's order (its values {places} come first)", swapped
    negative = moving[np.diag(table) < 0]
    if negative.size:
        turned = decided.copy()
        turned[:, negative] *= -1
        places = ", ".join(str(k) for k in negative)
        yield _SIGNS, f"values {places} run the other way: mend their sign where they were recorded", turned
