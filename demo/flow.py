"""Trains the small pi0.5 policy by flow matching: `python -m demo.flow --data episodes/ --out POLICY_DIR --key NAME`.

A chunk's first row is the expert's action now, its later rows those of the next decisions; after the answer to an
instruction that was not carried out nothing is known, so only its first row counts. Every answer is seen with several
noises and times, which share its pass through the prefix. The readouts of `demo.train` teach where to look.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional

from calibrator.families.loading import load_policy, save_policy
from calibrator.families.openvla import OpenVLA
from calibrator.families.pi05 import Pi05
from calibrator.families.pi05.noise import draw_bank
from calibrator.modules.gemma import rotation
from demo.batches import Answers, augmented, frame_weights, patch_shares, read_positions
from demo.dataset import Demonstrations, load_demonstrations, percentiles
from demo.recipe import FlowRecipe
from demo.train import Readouts, Run, advance_to_end, training_parser
from demo.transplant import transplant
from evaluation.benchmarks.libero import STATE_NAMES
from vla_policy.core import cli
from vla_policy.core.errors import DataError, PolicyError
from vla_policy.core.families.pi05 import FAMILY, scaling_of
from vla_policy.core.files import claim_folder, sha256_policy
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.flow.noise import NOISE
from vla_policy.core.flow.prompt import FlowPrompt
from vla_policy.core.outputs import FolderKind, check_folder
from vla_policy.core.policy_config import POLICY, ProprioStats

_WORK = FolderKind("training", "training.json")
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = 1024
_MASKED = -2.3819763e38
_FITTED = 256
"""Images that the projector is fitted on."""


def save_tokenizer(instructions: Sequence[str], path: Path) -> Tokenizer:
    """A tokenizer of Gemma's form: byte-fallback BPE, a blank is "▁", BOS first. Every state bin is one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=_WORDS, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False)
    words = [f"▁{word}" for text in sorted(set(instructions)) for word in text.split()]
    numbers = [f"▁{number}" for number in range(-1, 256)]
    tokenizer.train_from_iterator([*words, *numbers * 20, "Task:", ",", "▁State:", ";", "\n", "Action:▁"], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in _SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    missing = _WORDS - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<unused_{index}>", normalized=False) for index in range(missing)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.save(str(path))
    return tokenizer


def policy_config(
    data: Demonstrations, recipe: FlowRecipe, key: str, steps_per_action: int, proprio: ProprioStats | None = None
) -> FlowConfig:
    """The config.json of the policy to train, with statistics of `data`. proprio: the state's where they are known."""

    def statistics(values: Tensor) -> dict[str, list[float]]:
        low, high = percentiles(values)
        high = [max(upper, lower + 1e-3) for lower, upper in zip(low, high, strict=True)]
        array = values.double()
        return {"q01": low, "q99": high, "mean": array.mean(0).tolist(), "std": array.std(0).tolist()}

    state = statistics(data.states)
    if proprio is not None:
        state |= {"q01": list(proprio.low), "q99": list(proprio.high)}
    decoder = {
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.width // 32,
        "num_key_value_heads": recipe.width // 32,
        "head_dim": 32,
    }
    raw: dict[str, Any] = {
        "model_type": "pi05",
        "convention": "openpi",
        "normalization": "quantiles",
        "vision_config": {
            "image_size": recipe.image_size,
            "patch_size": recipe.patch_size,
            "hidden_size": recipe.width,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.width // 32,
            "intermediate_size": 4 * recipe.width,
        },
        "text_config": _decoder(recipe.width, decoder),
        "expert_config": _decoder(recipe.expert_width, decoder),
        "vocab_size": _WORDS,
        "chunk_size": recipe.horizon,
        "n_action_steps": recipe.executed,
        "max_action_dim": data.actions.shape[1],
        "num_inference_steps": recipe.denoising_steps,
        "tokenizer_max_length": 64,
        "state_in_prompt": recipe.state_in_prompt,
        "steps_per_action": steps_per_action,
        "norm_stats": {
            key: {
                "action": statistics(data.actions),
                "proprio": {"names": list(STATE_NAMES), **state},
                "num_trajectories": data.episodes,
                "num_transitions": len(data),
            }
        },
    }
    return FAMILY.config(raw, "config.json")


def _decoder(width: int, shared: dict[str, int]) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": 8 * width // 3, **shared}


@torch.no_grad()
def initialise(policy: Pi05, tokenizer: Tokenizer) -> None:
    """Truncated normal weights; bins' embeddings that vary smoothly; gates that are open."""
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else 0.05)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in policy.named_modules():
        if name.endswith("norm.dense") and isinstance(module, nn.Linear):
            module.bias[-policy.config.expert.hidden_size :] = 1.0
    nn.init.trunc_normal_(policy.vision.embeddings.position_embedding.weight, std=0.2)
    for layer in (policy.action_in_proj, policy.time_mlp_in, policy.time_mlp_out):
        nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    words = policy.paligemma_with_expert.paligemma.lm_head.weight
    width = words.shape[1]
    nn.init.normal_(words, std=0.5 * width**-0.5)
    waves, phases = torch.rand(width) * 12 * np.pi, torch.rand(width) * 2 * np.pi
    for number in range(256):
        token = tokenizer.token_to_id(f"▁{number}")
        assert token is not None, "every bin is one token"
        words[token] = width**-0.5 * torch.cos(number / 255 * waves + phases)


class FlowBatch(NamedTuple):
    """B images with R answers, each with D noises and times.

    pixels: [B, 3, S, S]. image: [R] into them. ids: [R, L], padded at the right; lengths: [R]. chunk: [R, H, A],
    normalised; known: [R, H], 1 where a row is. noise: [R, D, H, A]; times: [R, D]. positions, where: as `Batch`.
    """

    pixels: Tensor
    image: Tensor
    ids: Tensor
    lengths: Tensor
    chunk: Tensor
    known: Tensor
    noise: Tensor
    times: Tensor
    positions: Tensor
    where: Tensor


class FlowBatches:
    """Random augmented batches, a function of seed and step alone."""

    def __init__(self, data: Demonstrations, config: FlowConfig, folder: Path, recipe: FlowRecipe, key: str) -> None:
        stats = config.stats(key)
        self.data, self.recipe = data, recipe
        self.prompt = FlowPrompt(folder / "tokenizer.json", config)
        self.state = None if stats.proprio is None else scaling_of(stats.proprio, config)
        chunks, self.known = chunks_of(data, recipe.horizon)
        self.chunks = torch.from_numpy(scaling_of(stats.action, config).normalised(chunks.numpy())).float()
        self.positions = read_positions(data, config.state_in_prompt)
        self.answers, self.weights = Answers(data, recipe.alternatives), frame_weights(data)
        # All batches have prompts of one length, so that the blocks are compiled once.
        zero = None if stats.proprio is None else np.zeros(len(stats.proprio.names))
        self.longest = max(len(self.prompt.encode(text, zero)) for text in data.instructions)

    def __call__(self, step: int) -> FlowBatch:
        """The batch of step `step`."""
        recipe, random = self.recipe, torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        frames = torch.multinomial(self.weights, recipe.batch, replacement=True, generator=random)
        images, shift = augmented(self.data.images[frames], recipe.shift_pixels, random)
        side = recipe.image_size // recipe.patch_size
        answers, places = self.answers.of(frames, random)
        ids, lengths = self._prompts(answers, frames[places], random)
        chunk = self.chunks[answers]
        # Beta(1.5, 1) by its inverse distribution function, as the generator must decide.
        uniform = torch.rand(len(answers), recipe.draws, generator=random)
        return FlowBatch(
            pixels=2 * images - 1,
            image=places,
            ids=ids,
            lengths=lengths,
            chunk=chunk,
            known=self.known[answers],
            noise=torch.randn(len(answers), recipe.draws, *chunk.shape[1:], generator=random),
            times=0.001 + 0.999 * uniform ** (2 / 3),
            positions=self.positions[answers],
            where=patch_shares(self.data.seen_at[frames] - shift[:, None], side),
        )

    def _prompts(self, answers: Tensor, frames: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        texts = [self.data.instructions[number] for number in self.data.instruction[answers].tolist()]
        told: Sequence[np.ndarray | None] = [None] * len(texts)
        if self.state is not None:
            states = torch.from_numpy(self.state.normalised(self.data.states[frames].numpy()))
            states = states + 2 * self.recipe.state_noise * torch.randn(states.shape, generator=random)
            told = list(states.numpy().clip(-1, 1))
        rows = [torch.from_numpy(self.prompt.encode(*pair)) for pair in zip(texts, told, strict=True)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return functional.pad(ids, (0, self.longest - ids.shape[1])), torch.tensor([len(row) for row in rows])


def chunks_of(data: Demonstrations, horizon: int) -> tuple[Tensor, Tensor]:
    """[M, H, K] and, 1 where a row is known, [M, H]: each answer and, of an image's own, those of the next images."""
    chunks = data.actions[:, None].repeat(1, horizon, 1)
    known = torch.zeros(len(data.actions), horizon)
    known[:, 0] = 1
    frames = torch.arange(len(data))
    for row in range(1, horizon):
        later = (frames + row).clamp(max=len(data) - 1)
        same = (data.episode[later] == data.episode[frames]) & (frames + row < len(data))
        # Behind an episode's end its last action stands, and counts for nothing.
        chunks[data.own, row] = torch.where(same[:, None], data.actions[data.own[later]], chunks[data.own, row - 1])
        known[data.own, row] = same.float()
    return chunks, known


def loss(policy: Pi05, readouts: Readouts, batch: FlowBatch, recipe: FlowRecipe) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error of the velocity, noise minus actions, over the known rows, plus the auxiliary errors."""
    patches = policy.project(policy.vision(batch.pixels))
    x = policy.embed(patches[batch.image], batch.ids)
    count = patches.shape[1]
    valid = torch.arange(x.shape[1]) < (count + batch.lengths)[:, None]
    mask = torch.where(valid, 0.0, _MASKED)[:, None, None]
    entering, cache = policy.read(x, mask.to(x.dtype))
    draws, (rows, horizon, width) = recipe.draws, batch.chunk.shape
    times = batch.times.flatten()
    share = batch.times[..., None, None]
    noisy = (share * batch.noise + (1 - share) * batch.chunk[:, None]).flatten(0, 1)
    turn = rotation((count + batch.lengths)[:, None] + torch.arange(horizon), policy.config.expert.head_dim)
    repeated = tuple((k.repeat_interleave(draws, 0), v.repeat_interleave(draws, 0)) for k, v in cache)
    seen = functional.pad(mask, (0, horizon)).repeat_interleave(draws, 0)
    states = policy.states(
        noisy, policy.modulations(times), repeated, turn.repeat_interleave(draws, 1), seen.to(x.dtype)
    )
    velocity = policy.action_out_proj(states).float().view(rows, draws, horizon, width)
    error = (velocity - (batch.noise - batch.chunk[:, None])).square().mean(-1)
    flow = (error * batch.known[:, None]).sum() / (draws * batch.known.sum())
    last = entering[-1][torch.arange(rows), count + batch.lengths - 1]
    position = functional.smooth_l1_loss(readouts.position(last).float(), batch.positions)
    found = readouts.search(patches).float().log_softmax(1)
    search = -(batch.where * found).sum() / batch.where.sum()
    return flow + recipe.position_weight * position + recipe.search_weight * search, {
        "flow": flow.detach(),
        "position": position.detach(),
        "search": search.detach(),
    }


def train(
    data_folders: list[Path],
    out: Path,
    key: str,
    steps_per_action: int,
    recipe: FlowRecipe,
    initial: Path | None = None,
    start: Path | None = None,
) -> None:
    """Trains on all episodes in `data_folders` and writes the policy folder `out`; resumes from `out`.work.

    initial: a policy whose weights, statistics and tokenizer training starts from. start: an OpenVLA policy of
    `demo.train` that training starts from instead (`demo.transplant`).
    """
    work = out.with_name(out.name + ".work")
    check_folder(out, POLICY, [*data_folders, initial, start])
    claim_folder(work, _WORK, inputs=[*data_folders, initial, start])
    data = load_demonstrations(data_folders)
    torch.manual_seed(recipe.seed)
    policy = _new(data, work, key, steps_per_action, recipe, start) if initial is None else _trained(initial, work)
    batches = FlowBatches(data, policy.config, work, recipe, key)
    readouts = Readouts(recipe.width, len(data.instructions), batches.positions.shape[1])
    run = Run(policy, readouts, recipe, loss, work / "checkpoint.safetensors")
    run.restore()
    for block in (*policy.vision.encoder.layers, *policy.prefix.layers, *policy.expert.layers):
        block.compile(dynamic=False)
    size = sum(parameter.numel() for parameter in policy.parameters())
    print(
        f"{size:,} parameters; {data.episodes} episodes, {len(data)} decisions, {len(data.instructions)} tasks; "
        f"step {run.step} of {recipe.steps}",
        flush=True,
    )
    started, first = time.monotonic(), run.step
    final = advance_to_end(run, batches)
    record = asdict(recipe) | {
        "device": f"{torch.get_num_threads()} threads",
        "arithmetic": "bfloat16" if run.reduced else "float32",
        "seconds": round(time.monotonic() - started),
        "steps_in_these_seconds": run.step - first,
        "initial": None if initial is None else sha256_policy(initial),
        "start": None if start is None else sha256_policy(start),
        "final": final,
    }
    write(run, out, work, record)
    print(f"wrote {out}")


def _new(
    data: Demonstrations, work: Path, key: str, steps_per_action: int, recipe: FlowRecipe, start: Path | None
) -> Pi05:
    """A policy of random weights, or of those of an OpenVLA policy; `work` gets its tokenizer."""
    source = None if start is None else load_policy(start)
    if source is not None and not isinstance(source, OpenVLA):
        raise PolicyError(f"{start}: a policy of the family {source.config.raw['model_type']!r}; expected 'openvla'")
    tokenizer = save_tokenizer(data.instructions, work / "tokenizer.json")
    proprio = None if source is None else source.config.stats(key).proprio
    policy = Pi05(policy_config(data, recipe, key, steps_per_action, proprio))
    initialise(policy, tokenizer)
    if source is not None and start is not None:
        shown = data.images[torch.linspace(0, len(data) - 1, _FITTED).long()]
        transplant(source, start / "tokenizer.json", policy, tokenizer, shown.permute(0, 3, 1, 2) / 127.5 - 1)
    return policy


def _trained(initial: Path, work: Path) -> Pi05:
    """A policy that was trained before; `work` gets its tokenizer."""
    trained = load_policy(initial)
    if not isinstance(trained, Pi05):
        raise PolicyError(f"{initial}: a policy of the family {trained.config.raw['model_type']!r}; expected 'pi05'")
    shutil.copyfile(initial / "tokenizer.json", work / "tokenizer.json")
    policy = Pi05(trained.config)
    policy.load_state_dict(trained.state_dict(), strict=True)
    return policy


def write(run: Run, out: Path, work: Path, record: dict[str, Any]) -> None:
    """The averaged weights as a policy folder."""
    averaged = run.averaged_policy()
    assert isinstance(averaged, Pi05)
    np.save(work / NOISE, draw_bank(averaged.config))
    save_policy(averaged, out, work, {"training": record})


def main(argv: list[str] | None = None) -> int:
    parser = training_parser("python -m demo.flow", __doc__, FlowRecipe())
    parser.add_argument(
        "--start",
        type=Path,
        metavar="OPENVLA_DIR",
        help="policy of demo.train whose tower and decoder training takes over",
    )
    given = parser.parse_args(argv)
    if given.start is not None and given.initial is not None:
        raise DataError("--start and --initial: each says what training begins with; give one")
    recipe = FlowRecipe(samples=given.samples, seed=given.seed).but(given.set)
    train(given.data, given.out, given.key, given.steps_per_action, recipe, given.initial, given.start)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
