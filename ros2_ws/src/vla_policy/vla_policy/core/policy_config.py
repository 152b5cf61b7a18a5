"""What every policy's `config.json` tells: statistics, images, state, and how actions are held.

A policy family's own configuration is a subclass with what else it needs. A key that changes the arithmetic has a value
that is implemented here, or the configuration is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vla_policy.core.errors import DataError, PolicyError
from vla_policy.core.families import find_family
from vla_policy.core.files import STATISTICS, read_json
from vla_policy.core.outputs import FolderKind

_PARTS = ("tokenizer.json", "noise.npy", "*.safetensors", "model.safetensors.index.json")
POLICY = FolderKind("policy", "config.json", _PARTS)
"""Policy folders that were written here; a published one does not say so, and is never replaced."""

if TYPE_CHECKING:
    from vla_policy.core.families.base import Family

SPAN_EPSILON = 1e-8
"""OpenVLA-OFT adds it to the span between low and high where it normalises and un-normalises."""

Normalization = Literal["bounds", "bounds_q99"]
"""OpenVLA-OFT's words for what -1 and 1 stand for: minimum and maximum, or 1st and 99th percentile."""

NORMALIZATION_KEY = "action_proprio_normalization_type"
_LIMITS: dict[Normalization, tuple[str, str]] = {"bounds": ("min", "max"), "bounds_q99": ("q01", "q99")}


@dataclass(frozen=True)
class ActionStats:
    """What -1 and 1 stand for per action dimension; where `mask` is False the value is used as it is.

    mean, std: of the training actions, None where the checkpoint does not tell.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def dim(self) -> int:
        """Values of an action."""
        return len(self.low)


@dataclass(frozen=True)
class ProprioStats:
    """Names (with SI units implied) of the robot state's entries, and what -1 and 1 stand for where `mask` is set."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]

    def normalised(self, state: np.ndarray | None, epsilon: float = SPAN_EPSILON) -> np.ndarray:
        """float64 [S] in [-1, 1]. Raises DataError for a state that is missing, of another length or not finite.

        epsilon: added to the span between low and high.
        """
        if state is None or np.shape(state) != (len(self.low),) or not np.isfinite(state).all():
            raise DataError(f"state: expected {len(self.low)} finite values {list(self.names)}, got {state}")
        values, low, high = np.asarray(state, np.float64), np.asarray(self.low), np.asarray(self.high)
        span = np.where(self.mask, high - low + epsilon, 1.0)
        return np.clip(np.where(self.mask, 2 * (values - low) / span - 1, values), -1.0, 1.0)


@dataclass(frozen=True)
class NormStats:
    """Normalisation statistics of one data set."""

    action: ActionStats
    proprio: ProprioStats | None


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """A policy's configuration as everything outside its family sees it.

    num_images, image_size: images of one decision, and the pixels a side that each is resized to.
    takes_state: whether a decision needs the robot's state.
    horizon: actions that one decision gives, one after the other. steps_per_action: control steps that each is held.
    raw: the content of config.json.
    """

    norm_stats: dict[str, NormStats]
    num_images: int
    image_size: int
    takes_state: bool
    horizon: int
    steps_per_action: int
    raw: dict[str, Any]

    @property
    def family(self) -> "Family[Any]":
        """What knows the rest of the configuration."""
        return find_family(self.raw.get("model_type"), "config.json")

    @property
    def executed(self) -> int:
        """Of a decision's actions those that are carried out, by default, before the next look."""
        return self.horizon

    @property
    def action_dim(self) -> int:
        """Values of an action of a policy whose statistics all have as many."""
        (dim,) = {stats.action.dim for stats in self.norm_stats.values()}
        return dim

    @property
    def state_dim(self) -> int:
        """Values of the state of a policy that takes it; the same in all its statistics."""
        (dim,) = {len(stats.proprio.names) for stats in self.norm_stats.values() if stats.proprio}
        return dim

    def unnorm_key(self, key: str | None) -> str:
        """`key` if it exists, or the only one there is. Raises PolicyError naming the choices."""
        choices = ", ".join(sorted(self.norm_stats))
        if key is None:
            if len(self.norm_stats) > 1:
                raise PolicyError(
                    f"the policy has statistics of {len(self.norm_stats)} data sets and none was named; "
                    f"choose an unnorm_key: {choices}"
                )
            (key,) = self.norm_stats
        if key not in self.norm_stats:
            raise PolicyError(f"unnorm_key {key!r} is not in the policy's norm_stats; choose one of: {choices}")
        return key

    def stats(self, key: str | None) -> NormStats:
        """The statistics called `key`; see `unnorm_key`."""
        return self.norm_stats[self.unnorm_key(key)]

    def state_names(self, key: str | None) -> tuple[str, ...]:
        """The entries of the state that a decision takes, in order; see `unnorm_key`."""
        proprio = self.stats(key).proprio
        return proprio.names if self.takes_state and proprio else ()

    @staticmethod
    def load(folder: Path | str) -> "PolicyConfig":
        """Reads the folder's configuration as the family's own loader does. Raises PolicyError naming what is wrong."""
        folder = Path(folder)
        config = PolicyConfig.from_dict(read_raw(folder), str(folder / "config.json"))
        config.family.check_folder(config, folder)
        return config

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str) -> "PolicyConfig":
        """The content of a `config.json` as its family reads it; `source` names it in errors."""
        config: PolicyConfig = find_family(raw.get("model_type"), source).config(raw, source)
        return config


def read_raw(folder: Path) -> dict[str, Any]:
    """The content of `folder/config.json`. As in OpenVLA's own loader, the statistics that fine-tuning writes beside it
    replace those of the base policy in it."""
    raw = read_json(folder / "config.json")
    if (folder / STATISTICS).is_file():
        raw["norm_stats"] = read_json(folder / STATISTICS)
    return raw


def refuse_unless(holds: bool, key: str, got: Any, supported: tuple[Any, ...]) -> None:
    """Raises PolicyError naming the key, what it has and what it may have."""
    if not holds:
        only = f"only {' or '.join(map(repr, supported))} is" if supported else "leave it out"
        raise PolicyError(f"{key}: {got!r} is not supported; {only}")


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """`value`, a JSON object; PolicyError for anything else."""
    if not isinstance(value, Mapping):
        raise PolicyError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def count(raw: Mapping[str, Any], name: str, source: str, least: int = 1) -> int | None:
    """The integer of at least `least` under `name`, None where there is none; PolicyError for anything else."""
    number = raw.get(name)
    if number is not None and (type(number) is not int or number < least):
        raise PolicyError(f"{source}: {name}: expected an integer of at least {least}, got {number!r}")
    return number


def flag(raw: Mapping[str, Any], name: str, source: str) -> bool:
    """The boolean under `name`, False where there is none; PolicyError for anything else."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise PolicyError(f"{source}: {name}: expected true or false, got {value!r}")
    return bool(value)


def normalization_of(raw: Mapping[str, Any], default: Normalization | None, source: str) -> Normalization:
    """What the configuration states, else `default`; PolicyError where neither says it."""
    given = raw.get(NORMALIZATION_KEY)
    if given is None and default is not None:
        return default
    for normalization in _LIMITS:
        if given == normalization:
            return normalization
    raise PolicyError(
        f"{source}: {NORMALIZATION_KEY}: expected 'bounds' (-1 and 1 are min and max) or 'bounds_q99' (q01 and q99), "
        f"got {given!r}; `calibrator import-oft --normalization` records it"
    )


def parse_statistics(raw: Any, normalization: Normalization, takes_state: bool, source: str) -> dict[str, NormStats]:
    """The statistics of every data set. Raises PolicyError for those that do not fit each other or the policy."""
    statistics = {
        key: _norm_stats(value, normalization, f"{source}: norm_stats.{key}")
        for key, value in mapping(raw, f"{source}: norm_stats").items()
    }
    if not statistics:
        raise PolicyError(f"{source}: norm_stats is empty; without statistics no action has a unit")
    sizes = set()
    for key, stats in statistics.items() if takes_state else ():
        if stats.proprio is None:
            raise PolicyError(f"{source}: the policy takes a state, but norm_stats.{key} has no named proprio")
        sizes.add(len(stats.proprio.names))
    if len(sizes) > 1:
        raise PolicyError(f"{source}: norm_stats: states of {sorted(sizes)} values; a policy takes one length")
    return statistics


def _norm_stats(raw: Any, normalization: Normalization, source: str) -> NormStats:
    action = mapping(mapping(raw, source)["action"], f"{source}.action")
    low, high, mask = _limits(action, normalization, f"{source}.action")
    mean, std = (numbers(action, name, f"{source}.action") if name in action else None for name in ("mean", "std"))
    if len({len(values) for values in (low, mean, std) if values is not None}) != 1:
        raise PolicyError(f"{source}.action: limits, mean and std have different lengths")
    stats = ActionStats(low, high, mask, mean, std)
    proprio = raw.get("proprio")
    if not proprio or "names" not in proprio:  # the published statistics hold an unnamed proprio that OpenVLA ignores
        return NormStats(stats, None)
    names = tuple(map(str, proprio["names"]))
    limits = _limits(proprio, normalization, f"{source}.proprio")
    if len(names) != len(limits[0]):
        raise PolicyError(f"{source}.proprio: {len(names)} names for {len(limits[0])} values")
    return NormStats(stats, ProprioStats(names, *limits))


def _limits(
    raw: Mapping[str, Any], normalization: Normalization, source: str
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[bool, ...]]:
    """low, high and mask."""
    names = _LIMITS[normalization]
    for name in names:
        if name not in raw:
            has = ", ".join(sorted(raw)) or "nothing"
            raise PolicyError(f"{source}: {name!r} is missing, which {normalization!r} normalises by; it has {has}")
    low, high = (numbers(raw, name, source) for name in names)
    mask = tuple(raw.get("mask", [True] * len(low)))
    if not all(isinstance(value, bool) for value in mask):
        raise PolicyError(f"{source}.mask: expected a list of true and false, got {raw['mask']!r}")
    if not len(low) == len(high) == len(mask) or not low:
        raise PolicyError(f"{source}: {names[0]}, {names[1]} and mask have different lengths, or none")
    if any(below > above for below, above in zip(low, high, strict=True)):
        raise PolicyError(f"{source}: {names[0]} {list(low)} is above {names[1]} {list(high)}")
    return low, high, mask


def numbers(raw: Mapping[str, Any], name: str, source: str) -> tuple[float, ...]:
    """The finite numbers listed under `name`; PolicyError for anything else."""
    try:
        values = tuple(map(float, raw[name]))
    except (TypeError, ValueError, OverflowError) as error:
        raise PolicyError(f"{source}.{name}: expected a list of numbers, got {raw[name]!r}") from error
    if not all(map(math.isfinite, values)):
        raise PolicyError(f"{source}.{name}: {list(values)} are not all finite")
    return values
