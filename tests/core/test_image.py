"""Preprocessing against the published processor's numbers; wrong images are named."""

import numpy as np
import pytest
from golden import golden_image, golden_numbers

from vla_policy.core.errors import DataError
from vla_policy.core.image import centre_crop, rotate_180
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prismatic.pixels import pixel_values, preprocess

GOLDEN = golden_numbers()
CONFIG = PolicyConfig.from_dict(GOLDEN["config"], "config.json")


def test_preprocessing_matches_the_published_processor() -> None:
    pixels = preprocess(golden_image(1), CONFIG)
    assert pixels.dtype == np.float32
    # Elementwise float32 on both sides; the deviation is a sum of 300,000 in pairs, off by log2 of that times 6e-8.
    np.testing.assert_allclose(pixels.ravel()[:8], GOLDEN["pixel_values"]["first8"], rtol=1e-5)
    np.testing.assert_allclose(pixels.ravel()[-8:], GOLDEN["pixel_values"]["last8"], rtol=1e-5)
    assert pixels.std() == pytest.approx(GOLDEN["pixel_values"]["std"], rel=1e-5)


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]"),
        (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \[8, 8, 4\]"),
        ([[0]], "list"),
    ],
)
def test_an_image_of_the_wrong_type_is_named(image: np.ndarray, got: str) -> None:
    with pytest.raises(DataError, match=f"expected uint8 RGB of shape .* got {got}"):
        preprocess(image, CONFIG)


def test_several_images_follow_each_other_by_channels() -> None:
    left, right = golden_image(1), golden_image(2)[:100]
    both = pixel_values((left, right), PolicyConfig.from_dict(GOLDEN["config"] | {"num_images_in_input": 2}, "c"))
    np.testing.assert_array_equal(both[:6], preprocess(left, CONFIG))
    np.testing.assert_array_equal(both[6:], preprocess(right, CONFIG))
    np.testing.assert_array_equal(pixel_values([left], CONFIG), preprocess(left, CONFIG))
    with pytest.raises(DataError, match="the policy looks at 1, got 2"):
        pixel_values((left, right), CONFIG)


def test_rotation_and_crop() -> None:
    image = golden_image(2)
    np.testing.assert_array_equal(rotate_180(image), np.rot90(image, 2))
    np.testing.assert_array_equal(centre_crop(image, 1.0), image)
    flat = np.full((40, 60, 3), 7, np.uint8)
    flat[0] = flat[-1] = 255  # a crop of 0.9 of the area cuts 2.6 % of each side: the outermost row of 40
    assert centre_crop(flat, 0.9).mean() < flat.mean()
    with pytest.raises(DataError, match=r"area must lie in \(0, 1\]"):
        centre_crop(image, 0)
