"""Trains a demo policy by imitation: `python -m demo.train --data episodes/ --out demo/policies/NAME`.

Targets are the expert's actions as bins, smoothed over neighbouring bins. Beside the answer to its own instruction an
image may have answers to others; they share the vision towers' pass over it. Two auxiliary readouts, used in training
only, teach the policy where to look: the patches say where in the image every known object is, and the prompt's last
position says where object and goal are in space. The exponential average of the weights is what is saved, in the
published OpenVLA layout.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from calibrator.policy.loading import save_policy
from calibrator.policy.model import OpenVLA
from demo.dataset import Demonstrations, load_demonstrations, percentiles
from demo.tokenizer import ACTION_BINS, save_tokenizer
from vla_policy.core import cli
from vla_policy.core.actions import ActionCodec
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import atomic_path
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prompt import PromptTokenizer

_STATE_NAMES = ["x", "y", "z", "gripper_width", "gripper_velocity"]


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the training, so that a checkpoint of another recipe is refused."""

    seed: int = 0
    samples: int = 160_000
    batch: int = 64
    alternatives: int = 64
    learning_rate: float = 8e-4
    weight_decay: float = 0.05
    warmup_steps: int = 150
    fall_fraction: float = 0.35
    ema_decay: float = 0.998
    target_sigma_bins: float = 2.0
    position_weight: float = 0.5
    search_weight: float = 0.3
    shift_pixels: int = 3
    state_noise: float = 0.01
    width: int = 192
    layers: int = 4
    image_size: int = 112
    patch_size: int = 16

    @property
    def steps(self) -> int:
        return self.samples // self.batch


def policy_config(data: Demonstrations, recipe: Recipe, key: str, steps_per_action: int, vocab: int) -> PolicyConfig:
    """The config.json of the policy to train, with statistics of `data`."""
    action_q01, action_q99 = percentiles(data.actions)
    state_q01, state_q99 = percentiles(data.states)
    # A state that hardly moves (an unused gripper) still needs a range to be binned in: a millimetre.
    state_q99 = [max(high, low + 1e-3) for low, high in zip(state_q01, state_q99, strict=True)]
    heads = recipe.width // 32
    tower = {
        "image_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "width": recipe.width,
        "depth": recipe.layers + 1,
        "heads": heads,
        "mlp_width": 4 * recipe.width,
    }
    text = {
        "model_type": "llama",
        "hidden_size": recipe.width,
        "intermediate_size": 8 * recipe.width // 3,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab + 64,
    }
    raw: dict[str, Any] = {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [recipe.image_size, recipe.image_size],
        "n_action_bins": ACTION_BINS,
        "pad_to_multiple_of": 64,
        "text_config": text,
        "use_fused_vision_backbone": True,
        "vision_towers": [{"kind": "dinov2", "registers": 4, **tower}, {"kind": "siglip", "registers": 0, **tower}],
        "state_in_prompt": True,
        "steps_per_action": steps_per_action,
        "norm_stats": {
            key: {
                # The gripper command is -1 or 1 and is not scaled, as in OpenVLA.
                "action": {"q01": action_q01, "q99": action_q99, "mask": [True] * (len(action_q01) - 1) + [False]},
                "proprio": {"names": _STATE_NAMES, "q01": state_q01, "q99": state_q99},
                "num_trajectories": data.episodes,
                "num_transitions": len(data),
            }
        },
    }
    return PolicyConfig.from_dict(raw, "config.json")


def initialise(policy: OpenVLA) -> None:
    """Truncated normal weights; bin embeddings that vary smoothly from bin to bin."""
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else 0.05)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for tower in (policy.vision_backbone.featurizer, policy.vision_backbone.fused_featurizer):
        nn.init.trunc_normal_(tower.pos_embed, std=0.2)
    featurizer = policy.vision_backbone.featurizer
    nn.init.trunc_normal_(featurizer.cls_token, std=0.02)
    nn.init.trunc_normal_(featurizer.reg_token, std=0.02)
    embedding = policy.language_model.model.embed_tokens.weight
    nn.init.normal_(embedding, std=0.02)
    width = embedding.shape[1]
    first = policy.config.token_vocab - ACTION_BINS
    frequencies = torch.rand(width) * 12 * math.pi
    positions = torch.linspace(0, 1, ACTION_BINS)[:, None]
    with torch.no_grad():
        embedding[first : first + ACTION_BINS] = 0.05 * torch.cos(positions * frequencies + torch.rand(width) * 6.28)


class Batch(NamedTuple):
    """B images with R answers.

    pixels: [B, 6, S, S]. image: [R] into them. ids: [R, L], prompts padded at the right. lengths: [R], the prompts'.
    tokens: [R, K], the action. aux: [R, 6], standardised. where: [B, P, C], the share of each patch in where the target
    of each instruction is; all zero where the scene has none.
    """

    pixels: Tensor
    image: Tensor
    ids: Tensor
    lengths: Tensor
    tokens: Tensor
    aux: Tensor
    where: Tensor


class Batches:
    """Random augmented batches, a function of seed and step alone so that a resumed run sees the same ones."""

    def __init__(self, data: Demonstrations, config: PolicyConfig, folder: Path, recipe: Recipe, key: str) -> None:
        self.data, self.config, self.recipe = data, config, recipe
        self.tokenizer = PromptTokenizer(folder, config, key)
        self.codec = ActionCodec.of(config, key)
        self.tokens = torch.from_numpy(self.codec.action_to_tokens(data.actions.numpy()))
        self.aux_mean, self.aux_std = data.aux.mean(0), data.aux.std(0) + 1e-3
        self.alternatives = recipe.alternatives if len(data.actions) > len(data) else 0
        self.after = torch.cat([data.own[1:], torch.tensor([len(data.actions)])])
        proprio = config.stats(key).proprio
        assert proprio is not None, "demo policies take the state"
        self.state_span = torch.tensor(proprio.q99) - torch.tensor(proprio.q01)
        self.statistics = [torch.tensor([v for t in config.towers for v in getattr(t, n)]) for n in ("mean", "std")]
        asked = data.instruction[data.own]
        self.weights = (1.0 / torch.bincount(asked, minlength=len(data.instructions)).double())[asked]
        # One sequence length for all batches: compiled code is specialised for it.
        self.length = max(len(self.tokenizer.encode(text, data.states[0].numpy())) for text in data.instructions)

    def __call__(self, step: int) -> Batch:
        """The batch of step `step`."""
        random = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        frames = torch.multinomial(self.weights, self.recipe.batch, replacement=True, generator=random)
        pixels, shift = self._augment(self.data.images[frames], random)
        side = self.recipe.image_size // self.recipe.patch_size
        where = patch_shares(self.data.seen_at[frames] - shift[:, None], side)
        answers, places = self._answers(frames, random)
        noise = torch.randn(len(answers), len(_STATE_NAMES), generator=random) * self.recipe.state_noise
        states = (self.data.states[frames[places]] + noise * self.state_span).numpy()
        prompts = [
            self.tokenizer.encode(self.data.instructions[instruction], state)
            for instruction, state in zip(self.data.instruction[answers].tolist(), states, strict=True)
        ]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.from_numpy(prompt)
        aux = (self.data.aux[answers] - self.aux_mean) / self.aux_std
        return Batch(pixels, places, ids, lengths, self.tokens[answers], aux, where)

    def _answers(self, frames: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The frames' own answers, then others drawn from theirs; with each its place in `frames`."""
        own, places = self.data.own[frames], torch.arange(len(frames))
        counts = self.after[frames] - own - 1
        if not self.alternatives or not counts.any():
            return own, places
        of_others = places.repeat_interleave(counts)
        nth = torch.arange(len(of_others)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        drawn = torch.randint(len(of_others), (self.alternatives,), generator=random)
        others = of_others[drawn]
        return torch.cat([own, own[others] + 1 + nth[drawn]]), torch.cat([places, others])

    def _augment(self, images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Shifts by a few pixels (edges repeated), brightness, contrast and colour, then both normalisations.

        Also returns the shifts [B, 2] to the left and up, as a share of the image.
        """
        size, margin, count = images.shape[1], self.recipe.shift_pixels, len(images)
        padded = functional.pad(images.permute(0, 3, 1, 2).float() / 255, [margin] * 4, mode="replicate")
        offsets = torch.randint(0, 2 * margin + 1, (count, 2), generator=random)
        shifted = torch.stack(
            [image[:, y : y + size, x : x + size] for image, (x, y) in zip(padded, offsets.tolist(), strict=True)]
        )
        mean = shifted.mean((1, 2, 3), keepdim=True)
        contrast = 1 + 0.2 * (2 * torch.rand(count, 1, 1, 1, generator=random) - 1)
        colour = 1 + 0.1 * (2 * torch.rand(count, 3, 1, 1, generator=random) - 1)
        brightness = 0.1 * (2 * torch.rand(count, 1, 1, 1, generator=random) - 1)
        jittered = (((shifted - mean) * contrast + mean) * colour + brightness).clamp(0, 1)
        means, deviations = (values.view(1, 6, 1, 1) for values in self.statistics)
        return (jittered.repeat(1, 2, 1, 1) - means) / deviations, (offsets - margin) / size


def patch_shares(seen_at: Tensor, side: int) -> Tensor:
    """[B, C, 2] -> [B, side * side, C]: bilinear shares of the patches, row by row, whose centres surround each point.

    Points outside the image count at its edge; a NaN point gets all zeros.
    """
    known = seen_at.isfinite().all(-1)
    places = (seen_at.nan_to_num() * side - 0.5).clamp(0, side - 1)
    hats = (1 - (places[..., None] - torch.arange(side)).abs()).clamp_min(0)  # [B, C, 2, side]
    shares = hats[:, :, 1, :, None] * hats[:, :, 0, None, :] * known[..., None, None]
    return shares.flatten(2).transpose(1, 2)


def soft_targets(tokens: Tensor, first: int, sigma: float) -> Tensor:
    """[B, K, 256]: a normal distribution over the action bins, centred on the label."""
    distance = torch.arange(ACTION_BINS) - (tokens - first)[..., None]
    return torch.softmax(-0.5 * (distance / sigma) ** 2, dim=-1)


class Readouts(nn.Module):
    """What training reads besides actions: `search` the objects in the patches, `position` in the prompt's end."""

    def __init__(self, width: int, instructions: int) -> None:
        super().__init__()
        self.search = nn.Linear(width, instructions)
        self.position = nn.Linear(width, 6)


def loss(policy: OpenVLA, readouts: Readouts, batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy over the whole vocabulary at the K predicting positions, plus the auxiliary errors."""
    count = batch.tokens.shape[1]
    # The action tokens go right after each prompt; whatever padding follows is never attended to.
    rows = torch.arange(len(batch.ids))[:, None]
    sequence = functional.pad(batch.ids, (0, count - 1))
    sequence[rows, batch.lengths[:, None] + torch.arange(count - 1)] = batch.tokens[:, :-1]
    patches = policy.patches(batch.pixels)
    hidden = policy.hidden(policy.embed(sequence, patches[batch.image]))
    predicting = policy.config.num_patches + batch.lengths[:, None] - 1 + torch.arange(count)
    states = hidden[rows, predicting]
    log_probabilities = policy.language_model.lm_head(states).float().log_softmax(-1)
    first = policy.config.token_vocab - ACTION_BINS
    targets = soft_targets(batch.tokens, first, recipe.target_sigma_bins)
    action = -(targets * log_probabilities[..., first : policy.config.token_vocab]).sum(-1).mean()
    position = functional.smooth_l1_loss(readouts.position(states[:, 0]).float(), batch.aux)
    found = readouts.search(patches).float().log_softmax(1)
    search = -(batch.where * found).sum() / batch.where.sum()
    picked = log_probabilities[..., first : policy.config.token_vocab].argmax(-1) + first
    error = (picked - batch.tokens).abs().float().mean()
    return action + recipe.position_weight * position + recipe.search_weight * search, {
        "action": action.item(),
        "position": position.item(),
        "search": search.item(),
        "bins": error.item(),
    }


class Run:
    """Model, readouts, optimiser and averaged weights, saved and restored together."""

    def __init__(self, policy: OpenVLA, recipe: Recipe, instructions: int, checkpoint: Path) -> None:
        self.policy, self.recipe, self.checkpoint = policy, recipe, checkpoint
        self.readouts = Readouts(recipe.width, instructions)
        self.modules = nn.ModuleDict({"policy": policy, "readouts": self.readouts})
        self.parameters = dict(self.modules.named_parameters())
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        plain = [p for p in self.parameters.values() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
        )
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0

    def learning_rate(self) -> float:
        """Linear warm-up, a plateau, then a linear fall to 2 % of the peak over the last part."""
        recipe = self.recipe
        warm = (self.step + 1) / recipe.warmup_steps
        fall = (recipe.steps - self.step) / (recipe.fall_fraction * recipe.steps)
        return recipe.learning_rate * max(0.02, min(1.0, warm, fall))

    def advance(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        # On CPUs the fused attention's backward pass takes half of all time; at these lengths plain products do not.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            total, figures = loss(self.policy, self.readouts, batch, self.recipe)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
        return figures

    def save(self) -> None:
        """Writes the checkpoint atomically."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average.{n}": p for n, p in self.average.items()}
        for name, parameter in self.parameters.items():
            for slot, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{slot}.{name}"] = value
        with atomic_path(self.checkpoint) as temporary:
            save_file(tensors, temporary, metadata={"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))})

    def restore(self) -> None:
        """Continues from the checkpoint if there is one; only the number of samples may have changed since.

        Raises ArtefactError if another recipe made it.
        """
        if not self.checkpoint.is_file():
            return
        with safe_open(self.checkpoint, framework="pt") as stream:
            metadata = stream.metadata()
        saved, wanted = json.loads(metadata["recipe"]), asdict(self.recipe)
        fixed = [name for name in wanted if name != "samples"]
        differing = [f"{name} {saved.get(name)} -> {wanted[name]}" for name in fixed if saved.get(name) != wanted[name]]
        if differing:
            raise ArtefactError(
                f"{self.checkpoint}: made with another recipe ({', '.join(differing)}); remove it or undo"
            )
        tensors = load_file(self.checkpoint)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                self.optimiser.state[parameter] = {
                    slot: tensors[f"optimiser.{slot}.{name}"] for slot in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step = int(metadata["step"])

    def averaged_policy(self) -> OpenVLA:
        """The policy with the averaged weights."""
        averaged = OpenVLA(self.policy.config)
        state = {n.removeprefix("policy."): t for n, t in self.average.items() if n.startswith("policy.")}
        averaged.load_state_dict(state, strict=True)
        return averaged


def train(data_folders: list[Path], out: Path, key: str, steps_per_action: int, recipe: Recipe) -> None:
    """Trains on all episodes in `data_folders` and writes the policy folder `out`; resumes from `out`.work."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    data = load_demonstrations(data_folders)
    vocab = save_tokenizer(data.instructions, work / "tokenizer.json")
    config = policy_config(data, recipe, key, steps_per_action, vocab)
    torch.manual_seed(recipe.seed)
    policy = OpenVLA(config)
    initialise(policy)
    run = Run(policy, recipe, len(data.instructions), work / "checkpoint.safetensors")
    run.restore()
    for module in (policy.vision_backbone, policy.projector, policy.language_model.model):
        module.compile(dynamic=False)  # 1.5 times the samples per second on one core; needs a C++ compiler
    batches = Batches(data, config, work, recipe, key)
    print(
        f"{data.episodes} episodes, {len(data)} decisions, {len(data.instructions)} tasks; "
        f"step {run.step} of {recipe.steps}"
    )
    started = time.monotonic()
    recent: list[dict[str, float]] = []
    progress = tqdm(total=recipe.steps, initial=run.step, unit="step", mininterval=5)
    while run.step < recipe.steps:
        recent = [*recent[-49:], run.advance(batches(run.step))]
        progress.update()
        if run.step % 50 == 0:
            progress.set_postfix(
                {name: f"{np.mean([r[name] for r in recent]):.3f}" for name in recent[0]}, refresh=False
            )
        if run.step % 250 == 0:
            run.save()
    run.save()
    record = asdict(recipe) | {
        "seconds_this_session": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "final": {name: float(np.mean([r[name] for r in recent])) for name in recent[0]} if recent else {},
    }
    save_policy(run.averaged_policy(), out, work / "tokenizer.json", {"training": record})
    print(f"wrote {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with episode files")
    parser.add_argument("--out", type=Path, required=True, help="policy folder to write; OUT.work holds the checkpoint")
    parser.add_argument("--key", required=True, help="name of the statistics in norm_stats, e.g. libero_object")
    parser.add_argument(
        "--steps-per-action", type=int, required=True, help="simulator steps for which an action is held"
    )
    parser.add_argument("--samples", type=int, default=Recipe.samples, help="training samples seen in all")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args(argv)
    recipe = Recipe(samples=arguments.samples, seed=arguments.seed)
    train(arguments.data, arguments.out, arguments.key, arguments.steps_per_action, recipe)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
