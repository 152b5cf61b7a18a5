"""Trains a demo policy by imitation: `python -m demo.train --data episodes/ --out demo/policies/NAME`.

Targets are the expert's actions as bins, smoothed over neighbouring bins. Beside the answer to its own instruction an
image may have answers to others; they share the vision towers' pass over it. Two auxiliary readouts, used in training
only, teach the policy where to look: the patches say where in the image every known object is, and the prompt's last
position says where object and goal (and, unless the prompt tells it, the hand) are in space. The exponential average of
the weights is what is saved, in the published OpenVLA layout.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from calibrator.families import Policy
from calibrator.families.loading import load_policy, save_policy
from calibrator.families.openvla import OpenVLA
from calibrator.tensors import disk_errors
from demo.batches import Batch, Batches
from demo.dataset import Demonstrations, load_demonstrations, percentiles
from demo.recipe import Recipe
from demo.tokenizer import ACTION_BINS, save_tokenizer
from evaluation.benchmarks.libero import STATE_NAMES
from vla_policy.core import cli
from vla_policy.core.errors import ArtefactError, DataError
from vla_policy.core.families.openvla import FAMILY
from vla_policy.core.files import claim_folder, sha256_policy
from vla_policy.core.outputs import FolderKind, atomic_path, check_folder
from vla_policy.core.policy_config import POLICY
from vla_policy.core.prismatic.config import PrismaticConfig

_CPU = torch.device("cpu")
_WORK = FolderKind("training", "training.json")
# On CPUs the fused attention's backward pass takes half of all time; at these lengths plain products do not.
_ATTENTION = {"cpu": [SDPBackend.MATH], "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]}


def policy_config(data: Demonstrations, recipe: Recipe, key: str, steps_per_action: int, vocab: int) -> PrismaticConfig:
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
        "state_in_prompt": recipe.state_in_prompt,
        "steps_per_action": steps_per_action,
        "norm_stats": {
            key: {
                # The gripper command is -1 or 1 and is not scaled, as in OpenVLA.
                "action": {"q01": action_q01, "q99": action_q99, "mask": [True] * (len(action_q01) - 1) + [False]},
                "proprio": {"names": list(STATE_NAMES), "q01": state_q01, "q99": state_q99},
                "num_trajectories": data.episodes,
                "num_transitions": len(data),
            }
        },
    }
    return FAMILY.config(raw, "config.json")


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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, so that they are worth having."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def soft_targets(tokens: Tensor, first: int, sigma: float) -> Tensor:
    """[B, K, 256]: a normal distribution over the action bins, centred on the label."""
    distance = torch.arange(ACTION_BINS, device=tokens.device) - (tokens - first)[..., None]
    return torch.softmax(-0.5 * (distance / sigma) ** 2, dim=-1)


class Readouts(nn.Module):
    """What training reads besides actions: `search` the objects in the patches, `position` in the prompt's end."""

    def __init__(self, width: int, instructions: int, positions: int) -> None:
        super().__init__()
        self.search = nn.Linear(width, instructions)
        self.position = nn.Linear(width, positions)


def loss(policy: OpenVLA, readouts: Readouts, batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy over the whole vocabulary at the K predicting positions, plus the auxiliary errors."""
    count = batch.tokens.shape[1]
    # The action tokens go right after each prompt; whatever padding follows is never attended to.
    rows, following = torch.arange(len(batch.ids), device=batch.ids.device)[:, None], batch.lengths[:, None]
    following = following + torch.arange(count, device=batch.ids.device)
    sequence = functional.pad(batch.ids, (0, count - 1))
    sequence[rows, following[:, :-1]] = batch.tokens[:, :-1]
    patches = policy.patches(batch.pixels)
    hidden = policy.hidden(policy.embed(sequence, patches[batch.image]))
    states = hidden[rows, policy.config.num_patches + following - 1]
    log_probabilities = policy.language_model.lm_head(states).float().log_softmax(-1)
    first = policy.config.token_vocab - ACTION_BINS
    targets = soft_targets(batch.tokens, first, recipe.target_sigma_bins)
    action = -(targets * log_probabilities[..., first : policy.config.token_vocab]).sum(-1).mean()
    position = functional.smooth_l1_loss(readouts.position(states[:, 0]).float(), batch.positions)
    found = readouts.search(patches).float().log_softmax(1)
    search = -(batch.where * found).sum() / batch.where.sum()
    picked = log_probabilities[..., first : policy.config.token_vocab].argmax(-1) + first
    error = (picked - batch.tokens).abs().float().mean()
    return action + recipe.position_weight * position + recipe.search_weight * search, {
        "action": action.detach(),
        "position": position.detach(),
        "search": search.detach(),
        "bins": error,
    }


Loss = Callable[[Any, Readouts, Any, Any], tuple[Tensor, dict[str, Tensor]]]


class Run:
    """Model, readouts, optimiser and averaged weights, saved and restored together."""

    def __init__(
        self,
        policy: Policy,
        readouts: Readouts,
        recipe: Recipe,
        loss: Loss,
        checkpoint: Path,
        device: torch.device = _CPU,
    ) -> None:
        """loss: of policy, readouts, batch and recipe; with it, figures for people."""
        self.policy, self.recipe, self.checkpoint, self.device = policy.to(device), recipe, checkpoint, device
        self.loss, self.readouts = loss, readouts.to(device)
        self.modules = nn.ModuleDict({"policy": policy, "readouts": self.readouts})
        self.parameters = dict(self.modules.named_parameters())
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        plain = [p for p in self.parameters.values() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.reduced = multiplies_bfloat16(device)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0

    def learning_rate(self) -> float:
        """Linear warm-up, a plateau, then a linear fall to 2 % of the peak over the last part."""
        recipe = self.recipe
        warm = (self.step + 1) / recipe.warmup_steps
        fall = (recipe.steps - self.step) / (recipe.fall_fraction * recipe.steps)
        return recipe.learning_rate * max(0.02, min(1.0, warm, fall))

    def advance(self, batch: Any) -> dict[str, Tensor]:
        """One optimiser step; returns the losses, on the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        arithmetic = torch.autocast(self.device.type, torch.bfloat16, enabled=self.reduced)
        with arithmetic, sdpa_kernel(_ATTENTION[self.device.type]):
            total, figures = self.loss(self.policy, self.readouts, batch, self.recipe)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(self.parameters.values()), None)
        return figures

    def save(self) -> None:
        """Writes the checkpoint atomically."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average.{n}": p for n, p in self.average.items()}
        for name, parameter in self.parameters.items():
            for slot, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{slot}.{name}"] = value
        with atomic_path(self.checkpoint, None) as temporary, disk_errors():
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
        tensors = load_file(self.checkpoint, device=str(self.device))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                self.optimiser.state[parameter] = {
                    slot: tensors[f"optimiser.{slot}.{name}"] for slot in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step = int(metadata["step"])

    def averaged_policy(self) -> Policy:
        """The policy with the averaged weights."""
        averaged = type(self.policy)(self.policy.config).to(self.device)
        state = {n.removeprefix("policy."): t for n, t in self.average.items() if n.startswith("policy.")}
        averaged.load_state_dict(state, strict=True)
        return averaged


def compile_blocks(policy: OpenVLA) -> None:
    """Compiles the transformer blocks in place: equal ones share their code, so this takes seconds, not minutes."""
    towers = (policy.vision_backbone.featurizer, policy.vision_backbone.fused_featurizer)
    for block in [b for tower in towers for b in tower.blocks] + list(policy.language_model.model.layers):
        block.compile(dynamic=False)


def fresh_policy(data: Demonstrations, recipe: Recipe, key: str, steps_per_action: int, tokenizer: Path) -> OpenVLA:
    """An untrained policy for `data`; writes its tokenizer."""
    vocab = save_tokenizer(data.instructions, tokenizer)
    torch.manual_seed(recipe.seed)
    policy = OpenVLA(policy_config(data, recipe, key, steps_per_action, vocab))
    initialise(policy)
    return policy


def continued_policy(initial: Path, recipe: Recipe, tokenizer: Path) -> OpenVLA:
    """The policy in `initial`, with or without the state in its prompt as the recipe says; copies its tokenizer."""
    trained = load_policy(initial)
    shutil.copyfile(initial / "tokenizer.json", tokenizer)
    raw = trained.config.raw | {"state_in_prompt": recipe.state_in_prompt}
    policy = OpenVLA(FAMILY.config(raw, str(initial / "config.json")))
    policy.load_state_dict(trained.state_dict(), strict=True)
    return policy


def train(
    data_folders: list[Path],
    out: Path,
    key: str,
    steps_per_action: int,
    recipe: Recipe,
    device: torch.device = _CPU,
    initial: Path | None = None,
) -> None:
    """Trains on all episodes in `data_folders` and writes the policy folder `out`; resumes from `out`.work.

    initial: a policy whose weights, statistics and tokenizer training starts from, e.g. after its own rollouts were
    labelled (DAgger).
    """
    work = out.with_name(out.name + ".work")
    check_folder(out, POLICY, [*data_folders, initial])
    claim_folder(work, _WORK, inputs=[*data_folders, initial])
    data = load_demonstrations(data_folders)
    tokenizer = work / "tokenizer.json"
    if initial is None:
        policy = fresh_policy(data, recipe, key, steps_per_action, tokenizer)
    else:
        policy = continued_policy(initial, recipe, tokenizer)
    batches = Batches(data, policy.config, work, recipe, key, device)
    readouts = Readouts(recipe.width, len(data.instructions), batches.positions.shape[1])
    run = Run(policy, readouts, recipe, loss, work / "checkpoint.safetensors", device)
    run.restore()
    compile_blocks(policy)  # needs a C++ compiler
    print(
        f"{data.episodes} episodes, {len(data)} decisions, {len(data.instructions)} tasks; "
        f"step {run.step} of {recipe.steps}"
    )
    started = time.monotonic()
    first = run.step
    final = advance_to_end(run, batches)
    record = asdict(recipe) | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "arithmetic": "bfloat16" if run.reduced else "float32",
        "seconds": round(time.monotonic() - started),
        "steps_in_these_seconds": run.step - first,
        "initial": None if initial is None else sha256_policy(initial),
        "final": final,
    }
    save_policy(run.averaged_policy(), out, work, {"training": record})
    print(f"wrote {out}")


def advance_to_end(run: Run, batches: Callable[[int], Any]) -> dict[str, float]:
    """The remaining steps, with a checkpoint now and then; returns the mean losses of the last ones."""
    recent: list[dict[str, Tensor]] = []

    def means() -> dict[str, float]:
        return {name: float(torch.stack([r[name] for r in recent]).mean()) for name in recent[0]} if recent else {}

    with tqdm(total=run.recipe.steps, initial=run.step, unit="step", mininterval=5) as progress:
        while run.step < run.recipe.steps:
            recent = [*recent[-49:], run.advance(batches(run.step))]
            progress.update()
            if run.step % 50 == 0:
                progress.set_postfix({name: f"{value:.3f}" for name, value in means().items()}, refresh=False)
            if run.step % 100 == 0:
                run.save()
    run.save()
    return means()


def training_parser(prog: str, description: str | None, usual: Recipe) -> argparse.ArgumentParser:
    """The options that every training has. usual: whose settings are the defaults."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with episode files")
    parser.add_argument("--out", type=Path, required=True, help="policy folder to write; OUT.work holds the checkpoint")
    parser.add_argument("--key", required=True, help="name of the statistics in norm_stats, e.g. libero_object")
    parser.add_argument(
        "--steps-per-action", type=int, required=True, help="simulator steps for which an action is held"
    )
    parser.add_argument("--initial", type=Path, metavar="POLICY_DIR", help="policy to start from instead of afresh")
    parser.add_argument("--samples", type=int, default=usual.samples, help="images seen in all")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=f"further settings, by default {', '.join(f'{k}={v}' for k, v in asdict(usual).items())}",
    )
    parser.add_argument("--seed", type=int, default=usual.seed)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = training_parser("python -m demo.train", __doc__, Recipe())
    parser.add_argument("--device", type=torch.device, default=_CPU, help="cpu or cuda")
    arguments = parser.parse_args(argv)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no GPU here")
    recipe = Recipe(samples=arguments.samples, seed=arguments.seed).but(arguments.set)
    train(
        arguments.data,
        arguments.out,
        arguments.key,
        arguments.steps_per_action,
        recipe,
        arguments.device,
        arguments.initial,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
