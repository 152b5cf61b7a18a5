"""Frames to observations, and the refusal of contracts that a policy cannot use."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.core import ros_messages as msgs
from tests.core.events import single
from vla_policy.core.contract import load_contract
from vla_policy.core.errors import ContractError, DataError, PolicyError
from vla_policy.core.observe import check_contract, observe
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.ros_image import CompressedImage
from vla_policy.core.synchroniser import Frame, Synchroniser

ROOT = Path(__file__).parents[2]
CONTRACT = load_contract(ROOT / "ros2_ws/src/vla_policy/config/libero.yaml")
CONFIG = PolicyConfig.load(ROOT / "demo/policies/libero_object")
WRIST = replace(CONTRACT.primary, name="wrist", topic="wrist/image_raw/compressed")
TWO_CAMERAS = replace(CONTRACT, cameras=(CONTRACT.primary, WRIST))
STAMP_NS = 10**12


def two_camera_frame() -> Frame:
    """The wrist camera shows 200, the first camera 10, 5 ms apart."""
    synchroniser = Synchroniser(TWO_CAMERAS)
    images = [
        (WRIST.topic, STAMP_NS + 5_000_000, np.full((4, 4, 3), 200, np.uint8)),
        (CONTRACT.primary.topic, STAMP_NS, np.full((4, 4, 3), 10, np.uint8)),
    ]
    messages = [(CONTRACT.instruction.topic, msgs.text("go"))]
    messages += [(CONTRACT.states[0].topic, msgs.joints(STAMP_NS, [0, 0, 0, 0.04]))]
    messages += [(topic, msgs.compressed(stamp_ns, image)) for topic, stamp_ns, image in images]
    events = [single(TWO_CAMERAS, topic, message, STAMP_NS) for topic, message in messages]
    (frame,) = [result for event in events for result in synchroniser.push(event)]
    assert isinstance(frame, Frame)
    return frame


def test_a_frame_holds_every_camera_in_the_contract_s_order() -> None:
    frame = two_camera_frame()
    assert [int(image.decode().mean()) for image in frame.images] == [10, 200]
    assert frame.skew_ns == 5_000_000


def test_the_camera_is_turned_and_cropped_as_the_contract_says() -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    contract = replace(CONTRACT, cameras=(replace(CONTRACT.primary, rotate_180=True),))
    frame = replace(two_camera_frame(), images=(to_image(upright),))
    np.testing.assert_array_equal(observe(frame, contract).image, upright[::-1])
    np.testing.assert_array_equal(observe(frame, CONTRACT).image, upright)


def to_image(pixels: np.ndarray):
    event = single(CONTRACT, CONTRACT.primary.topic, msgs.compressed(STAMP_NS, pixels), STAMP_NS)
    return event.payload


def test_every_camera_is_seen_in_the_contract_s_order_as_it_says() -> None:
    turned = replace(TWO_CAMERAS, cameras=(CONTRACT.primary, replace(WRIST, rotate_180=True)))
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    seen = observe(replace(two_camera_frame(), images=(to_image(upright), to_image(upright))), turned)
    np.testing.assert_array_equal(seen.images, [upright, upright[::-1]])
    assert observe(two_camera_frame(), TWO_CAMERAS).further[0].mean() == 200


def test_an_image_that_cannot_be_decoded_names_its_camera() -> None:
    frame = two_camera_frame()
    with pytest.raises(DataError, match=r"wrist/image_raw/compressed: compressed image .* not a whole JPEG or PNG"):
        observe(replace(frame, images=(frame.images[0], CompressedImage("png", memoryview(b"no")))), TWO_CAMERAS)


def test_as_many_cameras_as_the_policy_takes_images() -> None:
    check_contract(CONTRACT, CONFIG)
    check_contract(TWO_CAMERAS, replace(CONFIG, num_images=2))
    with pytest.raises(ContractError, match=r"the policy takes 1, the contract gives 2 \(agentview, wrist\)"):
        check_contract(TWO_CAMERAS, CONFIG)
    with pytest.raises(ContractError, match=r"the policy takes 2, the contract gives 1 \(agentview\)"):
        check_contract(CONTRACT, replace(CONFIG, num_images=2))


def test_a_policy_s_number_of_images_is_read_and_checked() -> None:
    assert PolicyConfig.from_dict(CONFIG.raw | {"num_images_in_input": 2}, "c").num_patches == 2 * CONFIG.num_patches
    with pytest.raises(PolicyError, match="num_images_in_input: expected an integer of at least 1, got 0"):
        PolicyConfig.from_dict(CONFIG.raw | {"num_images_in_input": 0}, "c")


def test_states_and_actions_that_are_not_the_policy_s_are_refused() -> None:
    swapped = replace(CONTRACT.states[0], values=CONTRACT.states[0].values[::-1])
    with pytest.raises(ContractError, match="the policy takes the states x, y, z, gripper_width"):
        check_contract(replace(CONTRACT, states=(swapped,)), CONFIG)
    action = replace(CONTRACT.action, dimensions=CONTRACT.action.dimensions[:-1])
    with pytest.raises(ContractError, match="actions have 7 values; the contract names 6"):
        check_contract(replace(CONTRACT, action=action), CONFIG)
    chunks = replace(CONTRACT, action=replace(CONTRACT.action, chunk_rows=8))
    check_contract(chunks, replace(CONFIG, horizon=8))
    with pytest.raises(ContractError, match="chunk_rows: the policy decides 7 actions at once, the contract carries"):
        check_contract(chunks, replace(CONFIG, horizon=7))
