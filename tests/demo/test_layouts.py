"""Training layouts keep their distances, and the expert's decisions follow what it sees."""

import numpy as np
import pytest

from demo.layouts import BASKET, draw_layout
from evaluation.experts.libero import LiberoObjectExpert
from vla_policy.core.errors import DataError

OFFICIAL = {
    "milk_1": np.array([-0.12, -0.24, 0.07]),
    "butter_1": np.array([0.05, -0.10, 0.01]),
    "ketchup_1": np.array([-0.15, 0.06, 0.07]),
    "tomato_sauce_1": np.array([0.10, -0.20, 0.04]),
    "orange_juice_1": np.array([0.15, 0.03, 0.07]),
    "alphabet_soup_1": np.array([-0.20, -0.08, 0.04]),
    BASKET: np.array([0.0, 0.26, 0.0]),
}


def test_near_layouts_stay_near_but_never_official() -> None:
    places = draw_layout(OFFICIAL, "butter_1", "near", np.random.default_rng(0))
    moved = [np.abs(places[name] - OFFICIAL[name]) for name in OFFICIAL]
    assert max(shift.max() for shift in moved) < 0.0081
    assert min(shift[:2].max() for shift in moved) > 0


@pytest.mark.parametrize("target", ["butter_1", "milk_1"])
def test_wide_layouts_leave_room_and_visit_every_slot(target: str) -> None:
    nearest = set()
    for seed in range(60):
        places = draw_layout(OFFICIAL, target, "wide", np.random.default_rng(seed))
        others = [name for name in places if name != target]
        gaps = [np.hypot(*(places[name] - places[target])[:2]) for name in others]
        assert min(gaps) > 0.09
        assert places[target][2] == OFFICIAL[target][2]
        slots = [name for name in OFFICIAL if name != BASKET]
        nearest.add(min(slots, key=lambda name: float(np.hypot(*(OFFICIAL[name] - places[target])[:2]))))
    assert len(nearest) >= 5


def test_an_impossible_layout_is_reported() -> None:
    crowded = {name: np.array([0.0, 0.0, 0.05]) for name in OFFICIAL if name != BASKET}
    with pytest.raises(DataError, match="no collision-free layout for milk_1"):
        draw_layout(crowded | {BASKET: OFFICIAL[BASKET]}, "milk_1", "wide", np.random.default_rng(0))


def test_the_expert_goes_down_closes_lifts_crosses_and_lets_go() -> None:
    expert, target, basket = LiberoObjectExpert("butter"), np.array([0.05, -0.1, 0.01]), np.array([0.0, 0.26, 0.0])
    grasp = target + [-0.005, 0.0, 0.003]

    def act(hand: np.ndarray, width: float, velocity: float = 0.0, thing: np.ndarray = target) -> np.ndarray:
        return expert.act(np.array([*hand, width, velocity]), thing, basket)

    far = act(np.array([-0.15, 0.0, 0.25]), 0.08)
    assert far[0] > 0 > far[1] and far[6] == -1
    above = act(grasp + [0, 0, 0.1], 0.08)
    assert above[2] == -1 and above[6] == -1
    assert act(grasp, 0.08).tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert act(grasp, 0.06, velocity=-0.2).tolist() == [0, 0, 0, 0, 0, 0, 1]  # fingers still moving
    lift = act(grasp, 0.04)
    assert lift[2] == 1 and lift[6] == 1 and lift[1] == 0
    high = np.array([0.05, -0.1, 0.25])
    across = act(high, 0.04, thing=high - [0, 0, 0.003])
    assert across[1] == 1 and across[6] == 1
    over = np.array([0.01, 0.26, 0.22])
    assert act(over, 0.04, thing=over - [0, 0, 0.003])[6] == -1


def test_an_unknown_object_has_no_grasp() -> None:
    with pytest.raises(DataError, match="no grasp is known for 'wine'"):
        LiberoObjectExpert("wine")
