"""What OpenVLA-7B's decoder products take at least on a GPU, by arithmetic: bytes over bandwidth, or sums over peak.

Bandwidth and dense tensor-core peaks are NVIDIA's data sheets': A100 SXM 80 GB; Jetson AGX Orin 64 GB at its full power
(MAXN). Nothing is measured here.
"""

import itertools
from dataclasses import dataclass

PREFILL = 290
"""Tokens of OpenVLA's prompt: BOS, 256 patches and the instruction."""

DECODER = ((4096, 4096), (11008, 4096), (4096, 11008))
"""Outputs and inputs of the decoder's products: attention, gate and up, down."""

JOINED = ((4096, 4096, 3), (11008, 4096, 2))
"""Those of one input, which are one launch: q, k and v, gate and up. Outputs of each, inputs, and how many they are."""

GROUP = 128
_SCALE = 2  # bytes


@dataclass(frozen=True)
class Machine:
    """gb_per_s: of its memory. tflops, tops: dense, float16 with float32 sums, and INT8."""

    name: str
    gb_per_s: float
    tflops: float
    tops: float


MACHINES = (Machine("A100 80 GB", 2039, 312, 624), Machine("AGX Orin 64 GB", 204.8, 42.5, 85))


@dataclass(frozen=True)
class Kind:
    """A product's numbers: bits of a weight, bytes of an activation, and whether integers are multiplied."""

    name: str
    weight_bits: int
    activation_bytes: int
    integers: bool


KINDS = (Kind("bf16", 16, 2, False), Kind("w2a16", 2, 2, False), Kind("w4a16", 4, 2, False), Kind("w4a8", 4, 1, True))


@dataclass(frozen=True)
class Bound:
    """Microseconds that moving and multiplying take at least; the larger is the bound."""

    memory_us: float
    compute_us: float

    @property
    def us(self) -> float:
        return max(self.memory_us, self.compute_us)


def bound(machine: Machine, kind: Kind, tokens: int, outputs: int, inputs: int) -> Bound:
    """Every byte is moved once: weights with a float16 scale per 128 inputs, activations, float16 results."""
    scales = outputs * inputs // GROUP * _SCALE if kind.weight_bits < 16 else 0
    moved = outputs * inputs * kind.weight_bits / 8 + scales
    moved += tokens * inputs * kind.activation_bytes + tokens * outputs * 2
    peak = machine.tops if kind.integers else machine.tflops
    return Bound(moved / machine.gb_per_s / 1e3, 2 * tokens * outputs * inputs / peak / 1e6)


def table() -> str:
    """Bounds of every shape, and how many times faster than bf16 a kernel at its bound is; `m` and `c`: by what."""
    lines = [f"{'at least, us (times faster than bf16)':40}" + "".join(f"{kind.name:>20}" for kind in KINDS)]
    shapes = (*DECODER, *((parts * outputs, inputs) for outputs, inputs, parts in JOINED))
    for machine, tokens, (outputs, inputs) in itertools.product(MACHINES, (1, PREFILL), shapes):
        bounds = [bound(machine, kind, tokens, outputs, inputs) for kind in KINDS]
        cells = [
            f"{one.us:.1f}{'m' if one.memory_us >= one.compute_us else 'c'} ({bounds[0].us / one.us:.2f})"
            for one in bounds
        ]
        case = f"{machine.name}, {tokens} x {outputs} x {inputs}"
        lines.append(f"{case:40}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
