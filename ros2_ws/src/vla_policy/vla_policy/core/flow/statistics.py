"""State and action statistics of flow-matching policies: quantiles or mean and standard deviation, never clipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla_policy.core.errors import DataError, PolicyError
from vla_policy.core.flow.conventions import Convention
from vla_policy.core.policy_config import ActionStats, NormStats, ProprioStats, mapping, numbers

NormalizationMode = Literal["quantiles", "mean_std"]
NORMALIZATIONS: dict[str, NormalizationMode] = {"quantiles": "quantiles", "mean_std": "mean_std"}
_NEEDED: dict[NormalizationMode, tuple[str, str]] = {"quantiles": ("q01", "q99"), "mean_std": ("mean", "std")}
_ZERO_RANGE = 1e-8


@dataclass(frozen=True)
class Scaling:
    """To normalised values, (x - centre) / divisor, and back, y factor + centre: [K], in the convention's dtype."""

    centre: np.ndarray
    divisor: np.ndarray
    factor: np.ndarray

    @staticmethod
    def of(low: Any, high: Any, mode: NormalizationMode, convention: Convention) -> "Scaling":
        """low, high: what the normalised -1 and 1 stand for, as `parse_flow_statistics` gives it."""
        below, above = np.asarray(low, np.float64), np.asarray(high, np.float64)
        half, dtype = (above - below) / 2, np.dtype(convention.dtype)
        if mode == "mean_std":
            parts = ((below + above) / 2, half + convention.forward_epsilon, half + convention.backward_epsilon)
            return Scaling(*(part.astype(dtype) for part in parts))
        if convention.quantile_epsilon is None:
            half = np.where(half == 0, _ZERO_RANGE / 2, half)
        else:
            half = half + convention.quantile_epsilon / 2
        return Scaling((below + half).astype(dtype), half.astype(dtype), half.astype(dtype))

    def normalised(self, values: np.ndarray) -> np.ndarray:
        return (np.asarray(values, self.centre.dtype) - self.centre) / self.divisor

    def restored(self, values: np.ndarray) -> np.ndarray:
        """float64, in the actions' units."""
        return np.asarray(values, np.float64) * self.factor + self.centre


def normalised_state(state: np.ndarray | None, proprio: ProprioStats, scaling: Scaling) -> np.ndarray:
    """[S]. Raises DataError for a state that is missing, of another length or not finite."""
    names = proprio.names
    if state is None or np.shape(state) != (len(names),) or not np.isfinite(state).all():
        raise DataError(f"state: expected {len(names)} finite values {list(names)}, got {state}")
    return scaling.normalised(state)


def state_row(state: np.ndarray, width: int) -> np.ndarray:
    """float32 [1, 1, width]: a normalised state as the network takes it, filled up with zeros."""
    return np.pad(state, (0, width - len(state))).astype(np.float32)[None, None]


def parse_flow_statistics(raw: Any, mode: NormalizationMode, takes_state: bool, source: str) -> dict[str, NormStats]:
    """The statistics of every data set; `low` and `high` are what -1 and 1 stand for, exactly: q01 and q99, or a
    standard deviation around the mean. Raises PolicyError for those that do not fit each other or the policy."""
    found = {
        key: _one(mapping(value, f"{source}: norm_stats.{key}"), mode, takes_state, f"{source}: norm_stats.{key}")
        for key, value in mapping(raw, f"{source}: norm_stats").items()
    }
    if not found:
        raise PolicyError(f"{source}: norm_stats is empty; without statistics no action has a unit")
    states = {len(stats.proprio.names) for stats in found.values() if stats.proprio}
    if len(states) > 1:
        raise PolicyError(f"{source}: norm_stats: states of {sorted(states)} values; a policy takes one length")
    return found


def _one(raw: Mapping[str, Any], mode: NormalizationMode, takes_state: bool, source: str) -> NormStats:
    if "action" not in raw:
        raise PolicyError(f"{source}: 'action' is missing")
    action = mapping(raw["action"], f"{source}.action")
    low, high = _limits(action, mode, f"{source}.action")
    mean, std = (numbers(action, name, f"{source}.action") if name in action else None for name in ("mean", "std"))
    if len({len(values) for values in (low, mean, std) if values is not None}) != 1:
        raise PolicyError(f"{source}.action: limits, mean and std have different lengths")
    stats = ActionStats(low, high, (True,) * len(low), mean, std)
    if not takes_state:
        return NormStats(stats, None)
    proprio = mapping(raw.get("proprio", {}), f"{source}.proprio")
    if not isinstance(proprio.get("names"), list):
        raise PolicyError(f"{source}: the policy takes a state, but norm_stats has no proprio with names")
    names, limits = tuple(map(str, proprio["names"])), _limits(proprio, mode, f"{source}.proprio")
    if len(names) != len(limits[0]):
        raise PolicyError(f"{source}.proprio: {len(names)} names for {len(limits[0])} values")
    return NormStats(stats, ProprioStats(names, *limits, (True,) * len(names)))


def _limits(
    raw: Mapping[str, Any], mode: NormalizationMode, source: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for name in _NEEDED[mode]:
        if name not in raw:
            has = ", ".join(sorted(raw)) or "nothing"
            raise PolicyError(f"{source}: {name!r} is missing, which {mode!r} normalises by; it has {has}")
    first, second = (numbers(raw, name, source) for name in _NEEDED[mode])
    if len(first) != len(second) or not first:
        raise PolicyError(f"{source}: {' and '.join(_NEEDED[mode])} have different lengths, or none")
    if mode == "quantiles":
        if any(below > above for below, above in zip(first, second, strict=True)):
            raise PolicyError(f"{source}: q01 {list(first)} is above q99 {list(second)}")
        return first, second
    if any(deviation < 0 for deviation in second):
        raise PolicyError(f"{source}: std {list(second)} is below zero")
    pairs = list(zip(first, second, strict=True))
    return tuple(mean - std for mean, std in pairs), tuple(mean + std for mean, std in pairs)
