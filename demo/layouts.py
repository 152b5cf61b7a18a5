"""Object placements of LIBERO-Object for training: never the official ones that policies are scored on."""

from typing import Literal

import numpy as np

from evaluation.experts.libero import GRASPS, PALM_ABOVE_HAND_M, Grasp
from vla_policy.core.errors import DataError

Layout = Literal["near", "wide"]
BASKET = "basket_1"

_NEAR_JITTER_M = 0.008
_WIDE_JITTER_M = 0.045
_BASKET_JITTER_M = np.array([0.03, 0.02])
_YAW_JITTER_RAD = 0.12
_OBJECT_GAP_M = 0.095
_BASKET_GAP_M = 0.155
_PALM_M = np.array([0.075, 0.15])
_ROBOT_BASE_XY_M = np.array([-0.6, 0.0])
_REACH_M = 0.745
_TRIES = 5000

Positions = dict[str, np.ndarray]


def draw_layout(official: Positions, target: str, layout: Layout, rng: np.random.Generator) -> Positions:
    """New positions [x, y, z] in metres for every object of `official`, z kept.

    near: every object within 8 mm of its official place. wide: places permuted among the objects, several centimetres
    of jitter, the basket moved too, with room for the gripper about `target`. Raises DataError when none fits.
    """
    if layout == "near":
        return {name: _shifted(place, _NEAR_JITTER_M, rng) for name, place in official.items()}
    objects = [name for name in official if name != BASKET]
    for _ in range(_TRIES):
        slots = rng.permutation(len(objects))
        jitter = rng.uniform(0.01, _WIDE_JITTER_M)
        drawn = {BASKET: _shifted(official[BASKET], _BASKET_JITTER_M, rng)}
        for name, slot in zip(objects, slots, strict=True):
            place = _shifted(official[objects[slot]], jitter, rng)
            drawn[name] = np.array([*place[:2], official[name][2]])
        if _fits(drawn, target):
            return drawn
    raise DataError(f"no collision-free layout for {target} in {_TRIES} tries")


def draw_yaw_rad(rng: np.random.Generator) -> float:
    """A small turn about the vertical that still lets the gripper close."""
    return float(rng.uniform(-_YAW_JITTER_RAD, _YAW_JITTER_RAD))


def within_reach(place: np.ndarray) -> bool:
    """False where the arm would have to stretch so far that it gets stuck."""
    return bool(np.hypot(*(place[:2] - _ROBOT_BASE_XY_M)) <= _REACH_M)


def category(name: str) -> str:
    """`alphabet_soup` for the instance `alphabet_soup_1`."""
    return name.rsplit("_", 1)[0]


def task_for(kind: str) -> str:
    """The LIBERO-Object task that asks for an object of this category."""
    return f"pick_up_the_{kind}_and_place_it_in_the_basket"


def grasp_of(name: str) -> Grasp:
    """How the expert holds the object instance `name`."""
    return GRASPS[category(name)]


def _fits(places: Positions, target: str) -> bool:
    if not within_reach(places[target]):
        return False
    names = list(places)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            gap = np.hypot(*(places[first] - places[second])[:2])
            if gap < (_BASKET_GAP_M if BASKET in (first, second) else _OBJECT_GAP_M):
                return False
    palm_z = places[target][2] + grasp_of(target).height_m + PALM_ABOVE_HAND_M
    for name in names:
        if name in (BASKET, target) or 2 * grasp_of(name).below_m < palm_z - 0.005:
            continue
        if (np.abs(places[name] - places[target])[:2] < _PALM_M).all():
            return False
    return True


def _shifted(place: np.ndarray, jitter_m: float | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return place + np.array([*rng.uniform(-1.0, 1.0, 2) * jitter_m, 0.0])
