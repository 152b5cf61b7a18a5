"""What a rounding method is, what it may know of a layer, and who has a layer's codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, runtime_checkable

from torch import Tensor

from calibrator.quantizers.weights import QuantizedWeight
from vla_policy.core.formats import Choice, Format, Parameter


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer's input looked like over a calibration set, in full precision.

    tokens: how many there were. peaks, means: float32 [in], largest and mean |x| per channel. second_moment: float64
    [in, in], mean of x x^T over the tokens. rows: float32 [n, in], some inputs as they are, half of them those with the
    largest values. Both None where nobody asked for them. For a method that needs guided inputs, tokens weigh in the
    second moment what `calibrator.data.guidance` says, else all the same.
    """

    tokens: int
    peaks: Tensor
    means: Tensor
    second_moment: Tensor | None = None
    rows: Tensor | None = None

    @property
    def peak(self) -> float:
        """The largest |x| of all."""
        return float(self.peaks.max())


class Needs(Enum):
    """What codes depend on beside the weight: nothing, the layer's inputs, or these with weights by the decision."""

    NOTHING = auto()
    INPUTS = auto()
    GUIDED_INPUTS = auto()


class WeightQuantizer(Protocol):
    """A rounding method: `QUANTIZER` of a module in `calibrator.quantizers.methods`, called as the module.

    version: goes up whenever some weight gets other codes than before. defaults: every parameter with its usual value.
    """

    @property
    def version(self) -> int: ...

    @property
    def defaults(self) -> Mapping[str, Parameter]: ...

    @property
    def needs(self) -> Needs: ...

    def quantize(
        self, weight: Tensor, fmt: Format, parameters: Mapping[str, Parameter], statistics: LayerStatistics | None
    ) -> QuantizedWeight:
        """Codes and scales of a finite weight [out, ...]. parameters: all of `defaults`, some with other values."""
        ...


@runtime_checkable
class TurnsInputs(Protocol):
    """A rounding method whose layers have an input operator; see `turning`."""

    def operator_bits(self, inputs: int, parameters: Mapping[str, Parameter]) -> int:
        """What the operator of a layer with so many inputs takes. parameters: as in `WeightQuantizer.quantize`."""
        ...


class Codes(Protocol):
    """Who has the codes of a policy's layers: they are computed, or read from a store."""

    def of(self, unit: str, weight: Tensor, choice: Choice) -> QuantizedWeight:
        """The codes of a layer in a choice below 16 bits."""
        ...
