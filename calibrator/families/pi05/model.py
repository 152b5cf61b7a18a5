"""pi0.5 and pi0: SigLIP and a Gemma prefix, and a Gemma expert that turns noise into an action chunk in N steps.

They differ in how time and state reach the expert. pi0.5: the time modulates its norms (adaRMS), the state is words of
the prompt or nothing. pi0: the time joins every noisy action in a small network, and the state is a row of its own
before them, which does not see them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrator.families.pi05.time import EXPERT, embedding, modulations
from calibrator.modules.chain import PROMPT, Chain, Layers, Runs, Segment
from calibrator.modules.gemma import FUSED, Attention, ExpertStack, GemmaStack, modulation, rotation
from calibrator.modules.policy import Inputs, Policy
from calibrator.modules.siglip import SiglipModel, SiglipTower
from vla_policy.core.errors import PolicyError
from vla_policy.core.families.pi05 import STATE
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.flow.noise import load_bank
from vla_policy.core.observation import finite

PALIGEMMA = "paligemma_with_expert.paligemma.model"
VISION = f"{PALIGEMMA}.vision_tower.vision_model"
PROJECTOR = f"{PALIGEMMA}.multi_modal_projector.linear"
PREFIX = f"{PALIGEMMA}.language_model"
EMBEDDING = "paligemma_with_expert.paligemma.lm_head"
"""Published under this name: the prompt's embedding is tied to the head that words would be read from."""

_REDRAWN = 4
"""Noises that each state is decided with besides its own, to tell what the draw alone changes."""

Cache = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [B, kv heads, T, d] of every layer."""


class _Projector(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision.hidden_size, config.text.hidden_size)


class _PaliGemmaModel(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.vision_tower = SiglipTower(config.vision)
        self.multi_modal_projector = _Projector(config)
        self.language_model = GemmaStack(config.text)


class _PaliGemma(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.model = _PaliGemmaModel(config)
        self.lm_head = nn.Embedding(config.vocab_size, config.text.hidden_size)


class _Expert(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.model = ExpertStack(config.expert, config.adaptive)


class _PaliGemmaWithExpert(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.paligemma = _PaliGemma(config)
        self.gemma_expert = _Expert(config)


class Pi05(Policy):
    """The policy. Its inputs are `pixel_values` [B, 3 N, S, S] of N images, `PROMPT`, int64 [B, L], `noise` [B, H, A]
    and, of pi0, `STATE` [B, 1, S], normalised. Attribute paths equal openpi's published tensor names."""

    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        width = config.expert.hidden_size
        self.paligemma_with_expert = _PaliGemmaWithExpert(config)
        self.action_in_proj = nn.Linear(config.width, width)
        self.action_out_proj = nn.Linear(width, config.width)
        if config.adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.state_width, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    @property
    def vision(self) -> SiglipModel:
        return self.paligemma_with_expert.paligemma.model.vision_tower.vision_model

    @property
    def prefix(self) -> GemmaStack:
        return self.paligemma_with_expert.paligemma.model.language_model

    @property
    def expert(self) -> ExpertStack:
        return self.paligemma_with_expert.gemma_expert.model

    def project(self, features: Tensor) -> Tensor:
        """Image embeddings [B, N P, hidden]; unlike words they are not scaled."""
        return self.paligemma_with_expert.paligemma.model.multi_modal_projector.linear(features)

    def embed(self, patches: Tensor, input_ids: Tensor) -> Tensor:
        """[B, N P + L, hidden]: image embeddings, then the prompt's words times the root of their width."""
        words = self.paligemma_with_expert.paligemma.lm_head(input_ids) * self.config.text.hidden_size**0.5
        return torch.cat([patches, words.to(patches.dtype)], 1)

    def read(self, x: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], Cache]:
        """What enters each block of the prefix, and all keys and values. mask: added to attention's scores."""
        turn = rotation(torch.arange(x.shape[1], device=x.device), self.config.text.head_dim)
        entering, cache = [], []
        for block in self.prefix.layers:
            entering.append(x)
            after, key, value = block(x, turn, mask)
            cache.append((key, value))
            x = x if after is None else after
        return entering, tuple(cache)

    def modulations(self, times: Tensor) -> Tensor:
        """[M, norms, 3, width] at times [M], of a policy whose norms are modulated."""
        return modulations(self.get_parameter, times, self.config)

    def timed(self, times: Tensor) -> Tensor:
        """What depends on the times [M] alone: `modulations`, or the time's embedding [M, width]."""
        return self.modulations(times) if self.config.adaptive else embedding(times, self.config)

    def suffix(self, noisy: Tensor, table: Tensor, state: Tensor | None = None) -> Tensor:
        """What enters the expert: a row for each noisy action [B, H, A], behind the state's where it has one.

        table: see `timed`. state: [B, 1, S], normalised.
        """
        x = self.action_in_proj(noisy)
        if state is None:
            return x
        time = table.to(x.dtype)[:, None].expand(*x.shape[:2], -1)
        joined = functional.silu(self.action_time_mlp_in(torch.cat([x, time], -1)))
        return torch.cat([self.state_proj(state), self.action_time_mlp_out(joined)], 1)

    def states(
        self,
        noisy: Tensor,
        table: Tensor,
        cache: Cache,
        turn: Tensor,
        mask: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        """The expert's final states of the actions [B, H, width]. noisy, table, state: see `suffix`. turn: of the
        suffix's positions, which follow the prefix's. mask: added to attention's scores."""
        x = self.suffix(noisy, table, state)
        for number, block in enumerate(self.expert.layers):
            rows = table[:, 2 * number : 2 * number + 2] if self.config.adaptive else None
            x = block(x, turn, cache[number], rows, mask)
        last = modulation(self.expert.norm, table[:, -1] if self.config.adaptive else None)
        return last.normed(x[:, -noisy.shape[1] :])

    def hidden(self, prefix: int, x: Tensor) -> Tensor | None:
        """The mask of a suffix behind `prefix` positions, in x's type: the state's row sees no action.

        [1, 1, heads of one key T, prefix + T]; None where every row sees all.
        """
        if self.config.adaptive:
            return None
        rows, spec = self.config.suffix, self.config.expert
        mask = x.new_zeros(rows, prefix + rows)
        mask[0, prefix + 1 :] = -torch.inf
        return mask.repeat(spec.num_attention_heads // spec.num_key_value_heads, 1)[None, None]

    def times(self, device: torch.device) -> Tensor:
        """float32 [N]: where a decision evaluates the velocity."""
        steps = self.config.num_inference_steps
        return torch.from_numpy(self.config.convention.times(steps)).to(device)

    def integrated(self, noise: Tensor, cache: Cache, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All steps from noise to actions: the final states of all steps [B, N, H, width], and the actions [B, H, A].

        x_{t + dt} = x_t + dt v(x_t, t), dt = -1/N.
        """
        length = cache[0][0].shape[2]
        places = torch.arange(length, length + self.config.suffix, device=noise.device)
        turn, mask = rotation(places, self.config.expert.head_dim), self.hidden(length, noise)
        states, x = [], noise
        for row in self.timed(self.times(noise.device)).split(1):
            states.append(self.states(x, row, cache, turn, mask, state))
            x = self._moved(x, states[-1])
        return torch.stack(states, 1), x

    def _moved(self, x: Tensor, states: Tensor) -> Tensor:
        """One step along the velocity that is read from `states`."""
        return x - self.action_out_proj(states) / self.config.num_inference_steps

    def action_attention(self) -> Mapping[str, Attention]:
        named = self.expert.named_modules(prefix=EXPERT)
        return {path: module for path, module in named if isinstance(module, Attention)}

    def redrawn(self, inputs: Inputs, folder: Path) -> list[Inputs]:
        """With each of the bank's first noises, the same for all states."""
        noise = inputs["noise"]
        first = torch.from_numpy(load_bank(folder, self.config)[:_REDRAWN]).to(noise)
        return [{**inputs, "noise": one.expand_as(noise)} for one in first]

    @torch.no_grad()
    def decide(self, inputs: Inputs, size: int) -> Tensor:
        """Normalised actions, float32 [B, size]. Raises EngineError unless they are finite."""
        chain = self.chain()
        decided = chain.run(inputs)[chain.output]
        finite(decided.cpu().numpy(), "torch policy: normalised actions")
        return decided

    def chain(self, language_block: int | None = None) -> Chain:
        """The pass that decides; its output are the robot's own dimensions of the actions, float32 [B, H K].

        The boundary inside the prefix is the input of its middle block unless it is named: the last one's reaches the
        action through keys and values only. The actions are linear in the expert's final states of all steps.
        """
        config = self.config
        depth = config.text.num_hidden_layers
        block = depth // 2 if language_block is None else language_block
        if not 0 <= block < depth:
            raise PolicyError(f"language block {block} does not exist; the policy has blocks 0 to {depth - 1}")
        reading = [segment for number in range(depth) for segment in self._block_segments(number)]
        cache = Segment("cache", tuple(f"cache.{number}" for number in range(depth)), lambda *all: torch.stack(all))
        side = config.image_size // config.vision.patch_size
        read = ("cache", "noise") if config.adaptive else ("cache", "noise", STATE)
        return Chain(
            preamble=tuple(self.vision.segments(VISION, config.num_images)),
            trunk=(
                Segment("projector", ("vision",), self.project, (_layers(PROJECTOR, "projector", self._patch_runs),)),
                Segment(_entering(0), ("projector", PROMPT), self.embed),
                Segment("rotation", (_entering(0),), self._rotation),
                *reading,
                cache,
                Segment("states", read, self._states, self._expert_layers()),
                Segment("actions", ("states", "noise"), self._actions),
            ),
            boundaries={
                "vision": "vision",
                "projector": "projector",
                "language": _entering(block),
                "head": "states",
            },
            language_block=block,
            image_grid=(config.num_images * side, side),
        )

    def _rotation(self, x: Tensor) -> Tensor:
        return rotation(torch.arange(x.shape[1], device=x.device), self.config.text.head_dim)

    def _block_segments(self, number: int) -> list[Segment]:
        """A block's result [B, T, hidden + 2 keys], and its two parts: what enters the next block, and what the expert
        reads."""
        block, hidden = self.prefix.layers[number], self.config.text.hidden_size

        def run(x: Tensor, turn: Tensor) -> Tensor:
            after, *cached = block(x, turn)
            flat = [part.transpose(1, 2).flatten(2) for part in cached]
            return torch.cat(flat if after is None else [after, *flat], -1)

        def keys_values(result: Tensor) -> Tensor:
            """[2, B, kv heads, T, d]."""
            flat = result[..., -2 * self.config.text.key_width :]
            return flat.unflatten(2, (2, -1, self.config.text.head_dim)).permute(2, 0, 3, 1, 4)

        name = f"prefix.{number}"
        path = f"layers.{number}"
        mine = Layers(f"{PREFIX}.{path}", path, "language", "language", self._prefix_runs, FUSED)
        found = [
            Segment(name, (_entering(number), "rotation"), run, (mine,)),
            Segment(f"cache.{number}", (name,), keys_values),
        ]
        if block.whole:
            found.append(Segment(_entering(number + 1), (name,), lambda result: result[..., :hidden]))
        return found

    def _states(self, cache: Tensor, noise: Tensor, state: Tensor | None = None) -> Tensor:
        """[B, N H, width]."""
        layers = tuple((layer[0], layer[1]) for layer in cache)
        return self.integrated(noise, layers, state)[0].flatten(1, 2)

    def _actions(self, states: Tensor, noise: Tensor) -> Tensor:
        x = noise
        for step in states.unflatten(1, (self.config.num_inference_steps, -1)).unbind(1):
            x = self._moved(x, step)
        return x[..., : self.config.action_dim].float().flatten(1)

    def _expert_layers(self) -> tuple[Layers, ...]:
        config = self.config

        def runs_of(rows: int) -> Callable[[float, int], tuple[Runs, ...]]:
            return lambda prompt_tokens, decided: (Runs(rows, config.num_inference_steps),)

        def kept(name: str, rows: int = config.horizon) -> Layers:
            return Layers(name, name, "head", "head", runs_of(rows), kept=True)

        every = runs_of(config.suffix)
        blocks = [
            Layers(f"{EXPERT}.layers.{number}.{part}", f"expert.{number}.{part}", "language", "expert", every, fused)
            for number in range(config.expert.num_hidden_layers)
            for part, fused in (("self_attn", _inside("self_attn")), ("mlp", _inside("mlp")))
        ]
        joined = (kept("state_proj", 1), kept("action_time_mlp_in"), kept("action_time_mlp_out"))
        return (kept("action_in_proj"), *(() if config.adaptive else joined), *blocks, kept("action_out_proj"))

    def _patch_runs(self, prompt_tokens: float, decided: int) -> tuple[Runs, ...]:
        return (Runs(self.config.num_patches),)

    def _prefix_runs(self, prompt_tokens: float, decided: int) -> tuple[Runs, ...]:
        return (Runs(self.config.num_patches + prompt_tokens),)


def _entering(block: int) -> str:
    """The value that enters a block of the prefix."""
    return f"entering.{block}"


def _inside(part: str) -> dict[str, str]:
    """`FUSED` by paths from `part` on."""
    prefix = f"{part}."
    found = {path: name for path, name in FUSED.items() if path.startswith(prefix)}
    return {path.removeprefix(prefix): name.removeprefix(prefix) for path, name in found.items()}


def _layers(path: str, label: str, runs: Callable[[float, int], tuple[Runs, ...]]) -> Layers:
    return Layers(path, label, "projector", "projector", runs)
