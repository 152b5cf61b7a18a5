"""A memoryless scripted expert for LIBERO-Object: pick an object, carry it over the basket's rim, let go.

It decides from what a policy can see: where object and basket are, where the hand is, how wide the gripper is open
and whether it still moves. So a policy without memory can imitate it.
"""

from dataclasses import dataclass

import numpy as np

from vla_policy.core.errors import DataError

PALM_ABOVE_HAND_M = 0.034

_OPEN, _CLOSE = -1.0, 1.0

# A held action of 1.0 moves the hand by 4.5 cm, a good third of it through the action before: more gain overshoots.
_GAIN_PER_M = 12.0
_HOVER_M = 0.22
_FUNNEL_RADIUS_M = 0.008
_FUNNEL_SLOPE = 4.0
_GRASP_RADIUS_M = 0.012
_HELD_RADIUS_M = 0.025
_OPEN_WIDTH_M = 0.073
_MISSED_WIDTH_M = 0.028
_AT_REST_M_S = 0.02
_RIM_ABOVE_BASKET_M = 0.146
_RIM_MARGIN_M = 0.035
_RELEASE_RADIUS_M = 0.03


@dataclass(frozen=True)
class Grasp:
    """Where the hand closes, from the object's centre, and how far the object reaches below its centre; metres."""

    height_m: float
    below_m: float
    aside_x_m: float = -0.005


# The palm is close above the hand's reference point, so tall objects are held near their top. Cream cheese and tomato
# sauce lie beside a taller neighbour in the official layout; held off their centre, they leave room for the palm.
GRASPS = {
    "alphabet_soup": Grasp(0.010, 0.038),
    "cream_cheese": Grasp(0.003, 0.009, aside_x_m=-0.015),
    "salad_dressing": Grasp(0.047, 0.073),
    "bbq_sauce": Grasp(0.024, 0.055),
    "ketchup": Grasp(0.047, 0.072),
    "tomato_sauce": Grasp(0.010, 0.038, aside_x_m=-0.008),
    "butter": Grasp(0.003, 0.009),
    "milk": Grasp(0.037, 0.070),
    "chocolate_pudding": Grasp(0.003, 0.013),
    "orange_juice": Grasp(0.037, 0.070),
}


def hand_is_open(state: np.ndarray) -> bool:
    """True while the gripper of `state` [x, y, z, gripper width, gripper velocity] is open."""
    return float(state[3]) >= _OPEN_WIDTH_M


class LiberoObjectExpert:
    """The expert for one object, by its LIBERO category (`GRASPS`)."""

    def __init__(self, category: str) -> None:
        if category not in GRASPS:
            raise DataError(f"no grasp is known for {category!r}; choose from: {', '.join(GRASPS)}")
        self._grasp = GRASPS[category]

    def act(self, state: np.ndarray, target: np.ndarray, basket: np.ndarray) -> np.ndarray:
        """float64 [7] in the simulator's convention, each held for four control steps.

        state: [x, y, z, gripper width, gripper velocity]. target, basket: positions, metres.
        """
        hand, width, velocity = np.asarray(state[:3], float), float(state[3]), float(state[4])
        error = np.asarray(target, float) + [self._grasp.aside_x_m, 0, self._grasp.height_m] - hand
        aside = float(np.hypot(*error[:2]))
        closing = not hand_is_open(state)
        radius = _HELD_RADIUS_M if closing else _GRASP_RADIUS_M
        if width > _MISSED_WIDTH_M and aside < radius and abs(error[2]) < radius:
            to_basket = np.asarray(basket, float) - hand
            if np.hypot(*to_basket[:2]) < _RELEASE_RADIUS_M:
                return _action(np.zeros(3), _OPEN)
            if closing and abs(velocity) < _AT_REST_M_S:
                return self._carry(to_basket)
            return _action(np.zeros(3), _CLOSE)
        return self._approach(error, aside, width)

    def _approach(self, error: np.ndarray, aside: float, width: float) -> np.ndarray:
        """Down a funnel onto the object, the gripper open before it arrives."""
        above = _FUNNEL_SLOPE * max(0.0, aside - _FUNNEL_RADIUS_M) + 2.0 * max(0.0, _OPEN_WIDTH_M - width)
        ceiling = max(0.0, _HOVER_M - self._grasp.height_m - self._grasp.below_m)
        return _action(error + [0, 0, min(above, ceiling)], _OPEN)

    def _carry(self, to_basket: np.ndarray) -> np.ndarray:
        """Up until the object clears the rim, then across; towards the robot at once, as a stretched arm gets stuck."""
        rise = to_basket[2] + _RIM_ABOVE_BASKET_M + _RIM_MARGIN_M + self._grasp.height_m + self._grasp.below_m
        across = np.clip(1.0 - rise / 0.05, 0.0, 1.0)
        inward = max(across, 0.6) if to_basket[0] < 0 else across
        return _action(np.array([to_basket[0] * inward, to_basket[1] * across, rise]), _CLOSE)


def _action(displacement_m: np.ndarray, gripper: float) -> np.ndarray:
    scaled = np.asarray(displacement_m, float) * _GAIN_PER_M
    scaled[:2] /= max(1.0, float(np.abs(scaled[:2]).max()))  # keeps the heading
    return np.array([*np.clip(scaled, -1.0, 1.0), 0.0, 0.0, 0.0, gripper])
