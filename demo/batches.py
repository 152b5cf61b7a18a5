"""Random augmented batches for training, made on the device that trains."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from demo.dataset import Demonstrations
from demo.recipe import Recipe
from vla_policy.core.prismatic.actions import ActionCodec
from vla_policy.core.prismatic.config import PrismaticConfig
from vla_policy.core.prismatic.prompt import PromptTokenizer

_CPU = torch.device("cpu")


class Batch(NamedTuple):
    """B images with R answers.

    pixels: [B, 6, S, S]. image: [R] into them. ids: [R, L], prompts padded at the right. lengths: [R], the prompts'.
    tokens: [R, K], the action. positions: [R, 6 or 11], standardised: of target and goal and, where the prompt does not
    tell it, the robot's state. where: [B, P, C], the share of each patch in where the target of each instruction is;
    all zero where the scene has none.
    """

    pixels: Tensor
    image: Tensor
    ids: Tensor
    lengths: Tensor
    tokens: Tensor
    positions: Tensor
    where: Tensor


@dataclass(frozen=True)
class Prompts:
    """Every instruction's prompt as ids [C, L], padded at the right, with `lengths` [C]; the state's places are open.

    low, high: float64 [S], where the state's bins begin and end; S is 0 for a policy that takes no state.

    The prompt is the robot's own (`PromptTokenizer`), taken apart once so that a batch is filled in without a loop.
    """

    ids: Tensor
    lengths: Tensor
    low: Tensor
    high: Tensor
    edges: Tensor
    token_vocab: int

    @staticmethod
    def of(tokenizer: PromptTokenizer, config: PrismaticConfig, key: str, instructions: tuple[str, ...]) -> "Prompts":
        proprio = config.stats(key).proprio
        limits = (proprio.low, proprio.high) if proprio is not None and config.state_in_prompt else ((), ())
        low, high = (torch.tensor(values, dtype=torch.float64) for values in limits)
        rows = [torch.from_numpy(tokenizer.encode(text, low.numpy())) for text in instructions]
        return Prompts(
            ids=nn.utils.rnn.pad_sequence(rows, batch_first=True),
            lengths=torch.tensor([len(row) for row in rows]),
            low=low,
            high=high,
            edges=torch.linspace(-1, 1, config.n_action_bins, dtype=torch.float64),
            token_vocab=config.token_vocab,
        )

    def to(self, device: torch.device) -> "Prompts":
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def encode(self, instruction: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [R, L] and their lengths [R] of instructions [R] (numbers) with states [R, S]."""
        ids, lengths = self.ids[instruction].clone(), self.lengths[instruction]
        values = (2 * (states.double() - self.low) / (self.high - self.low) - 1).clamp(-1, 1)
        count = states.shape[1]
        # The state's bins stand right before the empty token that ends the prompt.
        places = lengths[:, None] - 1 - count + torch.arange(count, device=ids.device)
        return ids.scatter_(1, places, self.token_vocab - torch.bucketize(values, self.edges, right=True)), lengths


class Batches:
    """Random augmented batches, a function of seed, step and kind of device alone: a resumed run sees the same ones.

    The data live on the device that trains, and batches are made there.
    """

    def __init__(
        self,
        data: Demonstrations,
        config: PrismaticConfig,
        folder: Path,
        recipe: Recipe,
        key: str,
        device: torch.device = _CPU,
    ) -> None:
        tokens = torch.from_numpy(ActionCodec.of(config, key).action_to_tokens(data.actions.numpy()))
        self.data, self.recipe, self.device, self.tokens = data.to(device), recipe, device, tokens.to(device)
        self.prompts = Prompts.of(PromptTokenizer(folder, config, key), config, key, data.instructions).to(device)
        self.positions = read_positions(self.data, config.state_in_prompt)
        self.states = self.data.states[:, : len(self.prompts.low)]
        self.answers = Answers(self.data, recipe.alternatives)
        self.state_span = (self.prompts.high - self.prompts.low).float()
        self.statistics = [
            torch.tensor([v for t in config.towers for v in getattr(t, n)], device=device) for n in ("mean", "std")
        ]
        self.weights = frame_weights(self.data)

    def __call__(self, step: int) -> Batch:
        """The batch of step `step`."""
        random = torch.Generator(self.device).manual_seed(self.recipe.seed * 1_000_003 + step)
        frames = torch.multinomial(self.weights, self.recipe.batch, replacement=True, generator=random)
        pixels, shift = self._augment(self.data.images[frames], random)
        side = self.recipe.image_size // self.recipe.patch_size
        where = patch_shares(self.data.seen_at[frames] - shift[:, None], side)
        answers, places = self.answers.of(frames, random)
        states = self.states[frames[places]]
        noise = torch.randn(states.shape, generator=random, device=self.device) * self.recipe.state_noise
        ids, lengths = self.prompts.encode(self.data.instruction[answers], states + noise * self.state_span)
        return Batch(pixels, places, ids, lengths, self.tokens[answers], self.positions[answers], where)

    def _augment(self, images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """`augmented`, then both normalisations."""
        jittered, shift = augmented(images, self.recipe.shift_pixels, random)
        means, deviations = (values.view(1, 6, 1, 1) for values in self.statistics)
        return (jittered.repeat(1, 2, 1, 1) - means) / deviations, shift


def read_positions(data: Demonstrations, state_in_prompt: bool) -> Tensor:
    """[M, 6 or 11], standardised: what the readout of positions has to say of each answer's target and goal and, unless
    the prompt tells it, of the robot."""
    positions = data.aux if state_in_prompt else torch.cat([data.aux, data.states[data.image]], 1)
    return (positions - positions.mean(0)) / (positions.std(0) + 1e-3)


class Answers:
    """The answers that a batch's frames are trained with: their own, and some to other instructions."""

    def __init__(self, data: Demonstrations, alternatives: int) -> None:
        self.data = data
        self.alternatives = alternatives if len(data.actions) > len(data) else 0
        self.after = torch.cat([data.own[1:], data.own.new_tensor([len(data.actions)])])

    def of(self, frames: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The frames' own answers, then others drawn from theirs; with each its place in `frames`."""
        own, places = self.data.own[frames], torch.arange(len(frames), device=frames.device)
        counts = self.after[frames] - own - 1
        if not self.alternatives or not counts.any():
            return own, places
        of_others = places.repeat_interleave(counts)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        nth = torch.arange(len(of_others), device=frames.device) - starts
        drawn = torch.randint(len(of_others), (self.alternatives,), generator=random, device=frames.device)
        others = of_others[drawn]
        return torch.cat([own, own[others] + 1 + nth[drawn]]), torch.cat([places, others])


def frame_weights(data: Demonstrations) -> Tensor:
    """How often each image is drawn: every instruction alike."""
    asked = data.instruction[data.own]
    return (1.0 / torch.bincount(asked, minlength=len(data.instructions)).double())[asked]


def augmented(images: Tensor, margin: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """float32 [B, 3, S, S] in [0, 1] of uint8 [B, S, S, 3]: shifted by up to `margin` pixels (edges repeated), with
    other brightness, contrast and colour.

    Also returns the shifts [B, 2] to the left and up, as a share of the image.
    """
    count, size, device = len(images), images.shape[1], images.device

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, generator=random, device=device) - 1

    shift = torch.randint(-margin, margin + 1, (count, 2), generator=random, device=device)
    columns, rows = ((torch.arange(size, device=device) + offset[:, None]).clamp(0, size - 1) for offset in shift.T)
    each = torch.arange(count, device=device)[:, None, None]
    shifted = images[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 255
    mean = shifted.mean((1, 2, 3), keepdim=True)
    contrasted = (shifted - mean) * (1 + 0.2 * uniform(1, 1, 1)) + mean
    return (contrasted * (1 + 0.1 * uniform(3, 1, 1)) + 0.1 * uniform(1, 1, 1)).clamp(0, 1), shift / size


def patch_shares(seen_at: Tensor, side: int) -> Tensor:
    """[B, C, 2] -> [B, side * side, C]: bilinear shares of the patches, row by row, whose centres surround each point.

    Points outside the image count at its edge; a NaN point gets all zeros.
    """
    known = seen_at.isfinite().all(-1)
    places = (seen_at.nan_to_num() * side - 0.5).clamp(0, side - 1)
    hats = (1 - (places[..., None] - torch.arange(side, device=places.device)).abs()).clamp_min(0)  # [B, C, 2, side]
    shares = hats[:, :, 1, :, None] * hats[:, :, 0, None, :] * known[..., None, None]
    return shares.flatten(2).transpose(1, 2)
