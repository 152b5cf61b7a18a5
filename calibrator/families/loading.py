"""Strict loading and saving of policies in the published layout: config.json, safetensors (sharded or not)."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calibrator.families.model import OpenVLA
from calibrator.families.oft import OpenVLAOFT
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.files import atomic_folder, read_json
from vla_policy.core.policy_config import PolicyConfig, TowerSpec

_INDEX = "model.safetensors.index.json"
_TOWERS = ("featurizer", "fused_featurizer")


def dead_tensors(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors that inference never reads; a checkpoint may lack them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tower, spec in zip(_TOWERS, config.towers, strict=True):
        prefix = f"vision_backbone.{tower}."
        shapes |= {prefix + name: shape for name, shape in _dead_tower_tensors(spec).items()}
    if config.chunk is not None:
        shapes["language_model.lm_head.weight"] = (config.text.vocab_size, config.text.hidden_size)
    return shapes


def _dead_tower_tensors(spec: TowerSpec) -> dict[str, tuple[int, ...]]:
    width, hidden = spec.width, spec.mlp_width
    block = f"blocks.{spec.depth - 1}."
    layers = {
        f"{block}attn.qkv": (3 * width, width),
        f"{block}attn.proj": (width, width),
        f"{block}mlp.fc1": (hidden, width),
        f"{block}mlp.fc2": (width, hidden),
    }
    norms = [f"{block}norm1", f"{block}norm2", "norm"]
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.kind == "dinov2":
        shapes |= {f"{block}{scale}.scale_factor": (width,) for scale in ("ls1", "ls2")}
    else:
        pool = "attn_pool."
        layers |= {
            f"{pool}q": (width, width),
            f"{pool}kv": (2 * width, width),
            f"{pool}proj": (width, width),
            f"{pool}mlp.fc1": (hidden, width),
            f"{pool}mlp.fc2": (width, hidden),
        }
        norms.append(f"{pool}norm")
        shapes[f"{pool}latent"] = (1, 1, width)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def empty_policy(config: PolicyConfig) -> OpenVLA:
    """The policy's modules without memory (meta device): shapes and names only."""
    with torch.device("meta"):
        return (OpenVLA if config.chunk is None else OpenVLAOFT)(config).eval()


def load_policy(folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> OpenVLA:
    """The policy in `folder`, in eval mode, without gradients for its weights.

    Raises ArtefactError for a missing or damaged file and PolicyError naming a missing, unexpected or wrongly shaped
    tensor, or a device that is not there.
    """
    folder = Path(folder)
    check_device(device)
    config = PolicyConfig.load(folder)
    policy = empty_policy(config)
    state: dict[str, Tensor] = {}
    for name, tensor in _checked_tensors(folder, policy, config):
        state[name] = tensor.to(device=device, dtype=dtype)
    return fill_policy(policy, state, device)


def check_device(device: str) -> None:
    """Raises PolicyError for a device that torch does not know or this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PolicyError(f"device {device!r} cannot be used ({reason}); is there such a device here?") from error


def fill_policy(policy: OpenVLA, state: dict[str, Tensor], device: str) -> OpenVLA:
    """The modules of `empty_policy` with their weights, which are on `device`; no gradients for them."""
    policy.load_state_dict(state, strict=True, assign=True)
    # Rotary frequencies are computed, not stored, so the meta device has lost them.
    model = policy.language_model.model
    model.rotary_emb = LlamaRotaryEmbedding(policy.language_model.config).to(device)
    return policy.requires_grad_(False)


def _checked_tensors(folder: Path, policy: nn.Module, config: PolicyConfig) -> Iterator[tuple[str, Tensor]]:
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    dead = dead_tensors(config)
    seen: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 (safe_open is no mapping)
                    shape = tuple(stream.get_slice(name).get_shape())
                    wanted = expected.get(name, dead.get(name))
                    if wanted is None:
                        raise PolicyError(f"{path}: tensor {name!r} does not belong to the architecture of config.json")
                    if shape != wanted:
                        raise PolicyError(f"{path}: tensor {name!r} has shape {list(shape)}, expected {list(wanted)}")
                    if name in expected:
                        seen.add(name)
                        yield name, stream.get_tensor(name)
        except SafetensorError as error:
            raise ArtefactError(f"{path}: damaged or truncated ({error}); copy it again") from error
    missing = sorted(set(expected) - seen)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PolicyError(f"{folder}: tensor {missing[0]!r}{more} missing; the checkpoint is incomplete")


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: those of the index if there is one. Raises ArtefactError for a lack."""
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ArtefactError(f"{folder / absent[0]}: missing shard (listed in {_INDEX}); copy it again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtefactError(f"{folder}: no *.safetensors file; is this a policy folder?")
    return files


def save_policy(policy: OpenVLA, folder: Path | str, tokenizer: Path, extra: dict[str, Any] | None = None) -> None:
    """Writes the policy in the published layout, weights in bfloat16 as published; `extra` updates config.json."""
    with atomic_folder(folder) as temporary:
        weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in policy.state_dict().items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(policy.config.raw | (extra or {}), indent=1) + "\n")
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
