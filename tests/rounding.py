"""How far two right computations in floating point may lie apart, from the arithmetic and not from one processor.

A sum of n products, in any order, with or without fused multiply-add, lies within (n + 1) u sum |a_i| |b_i| of the
exact one, u being half the spacing of numbers at 1 (Higham, Accuracy and Stability of Numerical Algorithms, Sec. 3.1).
Processors differ by the order alone, so this bound holds on all of them. Through a whole network it would be useless:
errors nearly cancel, like steps of a random walk. There `NETWORK` lies between what rounding and what a defect does.
"""

import numpy as np

SINGLE, HALF, BFLOAT16 = 2.0**-24, 2.0**-11, 2.0**-9
"""u of float32, float16 and bfloat16."""

NETWORK = 2e-5
"""Of the outputs' largest magnitude, for the small policies of these tests in float32.

Some 20 layers in a row sum up 128 products each on average: sqrt(20 * 128) u = 3e-6 if errors add as a random walk;
seen are 1e-6. The least conspicuous layer rounded to 8 bits moves the outputs by 7e-5, most by 2e-3 and more.
`test_build` checks both sides.
"""


def of_products(x: np.ndarray, weight: np.ndarray, *added: np.ndarray | float, further: int = 0) -> np.ndarray:
    """Bound on the error of x weight^T + added in float32, [.., out].

    x: [.., in]. weight: [out, in]. further: roundings of each product beyond its own, as of a scale.
    """
    return (x.shape[-1] + len(added) + further) * SINGLE * magnitude(x, weight, *added)


def magnitude(x: np.ndarray, weight: np.ndarray, *added: np.ndarray | float) -> np.ndarray:
    """|x| |weight|^T + |added|, float64 [.., out]: what rounding errors are in proportion to."""
    total: np.ndarray = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    return total + sum(np.abs(value) for value in added)


def assert_clear(scores: np.ndarray, noise: float = NETWORK) -> None:
    """Asserts that the best of each row's `scores` [.., n] is the best on any processor, so that it may be compared.

    noise: by how much two right computations may differ in each score, of the scores' largest magnitude.
    """
    best = np.sort(scores, axis=-1)[..., -2:]
    gap = float((best[..., 1] - best[..., 0]).min())
    assert gap > 2 * noise * np.abs(scores).max(), f"a tie within rounding ({gap:.1e}): choose another seed"
