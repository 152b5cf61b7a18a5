"""Forward and backward passes that a quantized layer shares with full precision.

A policy is a chain: two towers, the vision boundary, projector, decoder blocks, head. When one layer is quantized,
everything before it is the full-precision pass and everything after it is not. A `Trunk` is the full-precision pass
of one batch, kept with its graph from the vision boundary on. `signals` starts at the block that holds the quantized
layer, and sends the gradient that arrives there down the trunk's graph to the earlier boundaries. No gradient is
taken with respect to weights, and none goes below the vision boundary.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrator.families import Decisions, Inputs, OpenVLA, OpenVLAOFT, live_units
from calibrator.families.vision import VisionTower, by_image, fuse
from calibrator.sensitivity.evidence import BOUNDARIES
from vla_policy.core.errors import PolicyError
from vla_policy.core.policy_config import PolicyConfig

_TOWERS = ("featurizer", "fused_featurizer")
_PATCH_EMBED = -1
# Pattern of a layer's name, part and index; a group of the pattern takes precedence.
_PLACES: tuple[tuple[re.Pattern[str], str, int], ...] = (
    (re.compile(r"vision_backbone\.(?P<part>featurizer|fused_featurizer)\.patch_embed\."), "", _PATCH_EMBED),
    (re.compile(r"vision_backbone\.(?P<part>featurizer|fused_featurizer)\.blocks\.(?P<index>\d+)\."), "", 0),
    (re.compile(r"projector\."), "projector", 0),
    (re.compile(r"proprio_projector\."), "state", 0),
    (re.compile(r"language_model\.model\.layers\.(?P<index>\d+)\."), "layers", 0),
    (re.compile(r"language_model\.lm_head$|action_head\.model\."), "head", 0),
)


@dataclass(frozen=True)
class Place:
    """The block of the chain that holds a layer, and its index.

    part: a tower's name, "projector", "state" (OpenVLA-OFT's state projector, beside the chain), "layers" or "head".
    """

    part: str
    index: int


def place_of(unit: str) -> Place:
    """Where the layer called `unit` sits. Raises PolicyError for a layer that is not on the path to the action."""
    for pattern, part, index in _PLACES:
        if match := pattern.match(unit):
            found = match.groupdict()
            return Place(found.get("part", part), int(found.get("index", index)))
    raise PolicyError(f"layer {unit!r} is not on the path from image to action")


def token_counts(config: PolicyConfig, unit: str, prompt_tokens: float, decided: int) -> dict[float, int]:
    """How often a layer runs for one decision of so many values, by the number of tokens that pass through it.

    A tower sees all images' patches with its prefix tokens, the projector the patches, the decoder the whole sequence
    once and then a token per value that is still to be decided; OpenVLA-OFT decides in one pass, with an empty token
    per value and its head on one row per step of the chunk. Raises PolicyError as `place_of`.
    """
    place = place_of(unit)
    if place.part in _TOWERS:
        tower = config.towers[_TOWERS.index(place.part)]
        prefix = tower.prefix_tokens if place.index != _PATCH_EMBED else 0
        return {config.num_images * (tower.num_patches + prefix): 1}
    if place.part == "projector":
        return {config.num_patches: 1}
    if place.part == "state":
        return {1: 1}
    prompt = config.num_patches + prompt_tokens
    if config.chunk is not None:
        return {config.chunk if place.part == "head" else config.use_proprio + prompt + decided + 1: 1}
    return {1: decided} if place.part == "head" else {prompt: 1, 1: decided - 1}


def tokens_per_decision(config: PolicyConfig, unit: str, prompt_tokens: float, decided: int) -> float:
    """How many tokens pass through a layer for one decision, all its runs together."""
    return sum(tokens * times for tokens, times in token_counts(config, unit, prompt_tokens, decided).items())


def macs_per_decision(policy: OpenVLA, prompt_tokens: float, decided: int) -> dict[str, int]:
    """Multiply-accumulates of every live layer for one decision: weights times the tokens that pass."""
    return {
        unit.name: round(unit.params * tokens_per_decision(policy.config, unit.name, prompt_tokens, decided))
        for unit in live_units(policy)
    }


@dataclass(frozen=True)
class Batch:
    """Calibration states of equal prompt length.

    samples: their indices in the calibration set. decided: [B, D], y* of Eq. (2): the full-precision decision.
    """

    samples: tuple[int, ...]
    inputs: Inputs
    decided: Tensor
    decisions: Decisions

    def objective(self, output: Tensor) -> Tensor:
        """J of Eq. (2), float32 [B], of a policy's output for these states."""
        return self.decisions.objective(output, self.decided)


@dataclass(frozen=True)
class Signals:
    """What a pass gives: per boundary H and dJ/dH [B, tokens, channels]; J [B]; the policy's output, float32."""

    hidden: dict[str, Tensor]
    gradients: dict[str, Tensor]
    objective: Tensor
    output: Tensor


@dataclass(frozen=True)
class Run:
    """One forward pass: H per boundary that it went through, the input of every block, and the output, float32."""

    boundaries: dict[str, Tensor]
    entries: dict[Place, Tensor]
    output: Tensor


def tower_of(policy: OpenVLA, name: str) -> VisionTower:
    """The vision tower called "featurizer" or "fused_featurizer"."""
    backbone = policy.vision_backbone
    return backbone.featurizer if name == "featurizer" else backbone.fused_featurizer


def last_block(policy: OpenVLA) -> int:
    """Index of the last decoder block, whose input is the default language boundary."""
    return len(policy.language_model.model.layers) - 1


def _run(policy: OpenVLA, batch: Batch, start: Place, x: Tensor, language_block: int) -> Run:
    """The chain from `start` to the output; `x` is that block's input."""
    model = policy.language_model.model
    boundaries: dict[str, Tensor] = {}
    entries: dict[Place, Tensor] = {start: x}
    if start.part == "projector":
        boundaries["vision"] = x
        boundaries["projector"] = x = policy.projector(x)
        x = policy.sequence(batch.inputs, x, batch.decided)
    if start.part != "head":
        rotary = model.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
        first = start.index if start.part == "layers" else 0
        for index in range(first, len(model.layers)):
            entries[Place("layers", index)] = x
            if index == language_block:
                boundaries["language"] = x
            x = model.layers[index](x, position_embeddings=rotary)
        x = policy.predicting(model.norm(x), batch.decided)
        entries[Place("head", 0)] = x
    boundaries["head"] = x
    return Run(boundaries, entries, policy.readout(x))


def run_from_vision(policy: OpenVLA, batch: Batch, vision: Tensor, language_block: int) -> Run:
    """The chain from the fused vision features [B, patches, channels] to the output."""
    return _run(policy, batch, Place("projector", 0), vision, language_block)


class Trunk:
    """The full-precision pass of one batch: inputs of every block, and the graph from the vision boundary to J."""

    def __init__(self, policy: OpenVLA, batch: Batch, language_block: int, differentiable: bool = True) -> None:
        self.batch = batch
        self.language_block = language_block
        with torch.no_grad():
            images = by_image(batch.inputs.pixel_values)
            channels = dict(zip(_TOWERS, images.split(3, dim=1), strict=True))
            self.tower_inputs = {
                tower: _tower_inputs(policy, tower, pixel_values) for tower, pixel_values in channels.items()
            }
            outputs = {tower: inputs[-1] for tower, inputs in self.tower_inputs.items()}
            vision = _fused(policy, batch, outputs)
        with torch.set_grad_enabled(differentiable):
            vision.requires_grad_(differentiable)
            self.run = run_from_vision(policy, batch, vision, language_block)

    def signals(self) -> Signals:
        """The full-precision signals, by one backward pass through the graph."""
        with torch.enable_grad():
            objective = self.batch.objective(self.run.output)
            boundaries = self.run.boundaries
            found = torch.autograd.grad(objective.sum(), list(boundaries.values()), retain_graph=True)
        hidden = {name: tensor.detach() for name, tensor in boundaries.items()}
        gradients = dict(zip(boundaries, found, strict=True))
        return Signals(hidden, gradients, objective.detach(), self.run.output.detach())


def _tower_inputs(policy: OpenVLA, tower: str, pixel_values: Tensor) -> list[Tensor]:
    """The pixels, the input of every block, and the last block's output."""
    module = tower_of(policy, tower)
    x = module.tokens(pixel_values)
    inputs = [pixel_values, x]
    for block in module.blocks:
        x = block(x)
        inputs.append(x)
    return inputs


def _fused(policy: OpenVLA, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
    """The vision boundary, from the towers' last outputs."""
    patches = [outputs[tower][:, tower_of(policy, tower).spec.prefix_tokens :] for tower in _TOWERS]
    return fuse(patches, len(batch.inputs.pixel_values))


def _changed_vision(policy: OpenVLA, trunk: Trunk, start: Place) -> Tensor:
    """The vision boundary when a layer of one tower is quantized; the other tower keeps its features."""
    module = tower_of(policy, start.part)
    with torch.no_grad():
        if start.index == _PATCH_EMBED:
            x, first = module.tokens(trunk.tower_inputs[start.part][0]), 0
        else:
            x, first = trunk.tower_inputs[start.part][start.index + 1], start.index
        for block in module.blocks[first:]:
            x = block(x)
        outputs = {tower: inputs[-1] for tower, inputs in trunk.tower_inputs.items()} | {start.part: x}
        return _fused(policy, trunk.batch, outputs)


def _changed_state(policy: OpenVLA, trunk: Trunk) -> Tensor:
    """The decoder's input when a layer of the state's projector is quantized: one embedding, after the patches."""
    state = trunk.batch.inputs.state
    assert isinstance(policy, OpenVLAOFT) and state is not None
    with torch.no_grad():
        x = trunk.run.entries[Place("layers", 0)].detach().clone()
        place = 1 + policy.config.num_patches
        x[:, place : place + 1] = policy.state_embedding(state)
    return x


def signals(policy: OpenVLA, trunk: Trunk, start: Place) -> Signals:
    """Activations and gradients at the four boundaries with the policy as it is now.

    `start`: the block that holds the only layer that differs from full precision. With an unchanged policy, any
    `start` gives the full-precision signals.
    """
    if start.part in _TOWERS:
        x, start = _changed_vision(policy, trunk, start), Place("projector", 0)
    elif start.part == "state":
        x, start = _changed_state(policy, trunk), Place("layers", 0)
    else:
        x = trunk.run.entries[start].detach()
    with torch.enable_grad():
        x.requires_grad_()
        run = _run(policy, trunk.batch, start, x, trunk.language_block)
        objective = trunk.batch.objective(run.output)
        arriving, *rest = torch.autograd.grad(objective.sum(), [x, *run.boundaries.values()])
    gradients = dict(zip(run.boundaries, rest, strict=True))
    earlier = [name for name in BOUNDARIES if name not in run.boundaries]
    if earlier:
        reached = torch.autograd.grad(
            trunk.run.entries[start],
            [trunk.run.boundaries[name] for name in earlier],
            arriving,
            retain_graph=True,
        )
        gradients |= dict(zip(earlier, reached, strict=True))
    hidden = {name: run.boundaries.get(name, trunk.run.boundaries[name]).detach() for name in BOUNDARIES}
    return Signals(hidden, gradients, objective.detach(), run.output.detach())
