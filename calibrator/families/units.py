"""The layers that a plan may quantize: every linear and convolution layer that really runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from calibrator.families.base import Policy
from calibrator.modules.chain import Layers, Runs, Stage
from vla_policy.core.backends.base import LayerKind


@dataclass(frozen=True)
class Unit:
    """One quantizable layer: its tensor name without `.weight`, its module, and where it belongs.

    group: layers of one group share a format. segment: the one of the chain that holds it. label, track: the layer and
    its part of the stage as charts name them. runs: for one decision, from the number of prompt tokens and of decided
    values. rows: of the weight, those that a decision reads and an engine holds. kept: at 16 bits unless somebody asks.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    stage: Stage
    group: str
    segment: str
    label: str
    track: str
    runs: Callable[[float, int], tuple[Runs, ...]]
    rows: range
    kept: bool

    @property
    def kind(self) -> LayerKind:
        """What matters to the formats that a target runs."""
        if self.stage == "head":
            return "head"
        if isinstance(self.module, nn.Conv2d):
            return "patch_embed"
        return "linear" if self.stage == "language" else "encoder"

    @property
    def outputs(self) -> int:
        return len(self.rows)

    @property
    def inputs(self) -> int:
        return self.module.weight.numel() // len(self.module.weight)

    @property
    def params(self) -> int:
        """Number of weights in `rows`, without the bias."""
        return self.outputs * self.inputs

    def tokens(self, prompt_tokens: float, decided: int) -> float:
        """Rows that pass through the layer for one decision, all its runs together."""
        return sum(run.tokens * run.times for run in self.runs(prompt_tokens, decided))


def live_units(policy: Policy) -> list[Unit]:
    """All live linear and convolution layers in the order in which they run."""
    return [
        unit
        for segment in policy.chain().segments
        for layers in segment.layers
        for unit in _units(segment.name, layers, policy.get_submodule(layers.path))
    ]


def _units(segment: str, layers: Layers, parent: nn.Module) -> Iterator[Unit]:
    for path, module in parent.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield Unit(
                name=_joined(layers.path, path),
                module=module,
                stage=layers.stage,
                group=_joined(layers.path, layers.fused.get(path, path)),
                segment=segment,
                label=_joined(layers.label, path),
                track=layers.track,
                runs=layers.runs,
                rows=layers.rows or range(len(module.weight)),
                kept=layers.kept,
            )


def _joined(parent: str, path: str) -> str:
    return f"{parent}.{path}" if path else parent
