"""Strict loading and saving of policies in the published layout: config.json, safetensors (sharded or not).

Whole, or tensor by tensor: a 15 GB policy is quantized and exported in the memory of its largest layer.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from calibrator.families.base import find_family
from calibrator.modules.policy import Policy
from calibrator.tensors import disk_errors
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.files import named_file, read_json
from vla_policy.core.outputs import atomic_folder
from vla_policy.core.policy_config import POLICY, PolicyConfig

_INDEX = "model.safetensors.index.json"
LORA_ADAPTER = "lora_adapter"
_ADAPTERS = (LORA_ADAPTER, "adapter_config.json", "adapter_model.*")
# OpenVLA-OFT's form, `NAME--STEP_checkpoint.pt`, and what its loader would take for it.
_PICKLED_PARTS = "*checkpoint*.pt"


def empty_policy(config: PolicyConfig) -> Policy:
    """The policy's modules without memory for weights (meta device): shapes and names only."""
    with torch.device("meta"):
        return find_family(config).build(config).eval()


def load_policy(
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    matrices: torch.dtype | None = None,
) -> Policy:
    """The policy in `folder`, in eval mode, without gradients for its weights.

    matrices: how the weights of linear, convolution and embedding layers are held, where not as everything else.
    Raises ArtefactError for a missing or damaged file and PolicyError naming a missing, unexpected or wrongly shaped
    tensor, or a device that is not there.
    """
    folder = Path(folder)
    check_device(device)
    config = PolicyConfig.load(folder)
    policy = empty_policy(config)
    held = matrix_names(policy) if matrices is not None else frozenset()
    files = tensor_files(folder, config)
    state: dict[str, Tensor] = {}
    for path in sorted(set(files.values())):
        with open_weights(path) as stream:
            for name in (name for name, file in files.items() if file == path):
                wanted = matrices if name in held else dtype
                state[name] = stream.get_tensor(name).to(device=device, dtype=wanted)
    return fill_policy(policy, state, device)


def matrix_names(policy: Policy) -> frozenset[str]:
    """The weights of linear, convolution and embedding layers, nearly all of a policy's numbers."""
    kinds = nn.Linear, nn.Conv2d, nn.Embedding
    return frozenset(f"{name}.weight" for name, module in policy.named_modules() if isinstance(module, kinds))


def check_device(device: str) -> None:
    """Raises PolicyError for a device that torch does not know or this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PolicyError(f"device {device!r} cannot be used ({reason}); is there such a device here?") from error


def fill_policy(policy: Policy, state: dict[str, Tensor], device: str) -> Policy:
    """The modules of `empty_policy` with their weights, which are on `device`; no gradients for them."""
    policy.load_state_dict(state, strict=True, assign=True)
    return policy.to(device).requires_grad_(False)


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """The safetensors file at `path`. Raises ArtefactError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except SafetensorError as error:
        raise ArtefactError(f"{path}: damaged or truncated ({error}); copy it again") from error


def tensor_files(folder: Path, config: PolicyConfig) -> dict[str, Path]:
    """Which file holds each tensor that inference reads; raises as the functions that it calls."""
    return find_tensors(stored_shapes(weight_files(folder)), config, folder)


class Tensors(Protocol):
    """Tensors by the published names."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in the checkpoint's own type."""
        ...


class Checkpoint:
    """The safetensors of a policy folder; open it with `open_checkpoint`."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


@contextmanager
def open_checkpoint(folder: Path, config: PolicyConfig) -> Iterator[Checkpoint]:
    """The folder's tensors, all live ones present and of the configured shapes; raises as `tensor_files`."""
    files = tensor_files(folder, config)
    with ExitStack() as stack:
        streams = {path: stack.enter_context(open_weights(path)) for path in set(files.values())}
        yield Checkpoint({name: streams[path] for name, path in files.items()})


def stored_shapes(files: Iterable[Path]) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """File, name and shape of every tensor in safetensors files; only their headers are read."""
    for path in files:
        with open_weights(path) as stream:
            for name in stream.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield path, name, tuple(stream.get_slice(name).get_shape())


def find_tensors(
    stored: Iterable[tuple[Path, str, tuple[int, ...]]], config: PolicyConfig, folder: Path
) -> dict[str, Path]:
    """Of the stored tensors those that inference reads, and their files.

    Raises PolicyError naming a tensor that is missing, unexpected or wrongly shaped.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty_policy(config).state_dict().items()}
    dead = find_family(config).dead_tensors(config)
    found: dict[str, Path] = {}
    for path, name, shape in stored:
        wanted = expected.get(name, dead.get(name))
        if wanted is None:
            raise PolicyError(f"{path}: tensor {name!r} does not belong to the architecture of config.json")
        if shape != wanted:
            raise PolicyError(f"{path}: tensor {name!r} has shape {list(shape)}, expected {list(wanted)}")
        if name in expected:
            found[name] = path
    missing = sorted(set(expected) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PolicyError(f"{folder}: tensor {missing[0]!r}{more} missing; the checkpoint is incomplete")
    return found


def weight_files(folder: Path, used: Collection[Path] = ()) -> list[Path]:
    """The checkpoint's safetensors files: those of the index if there is one.

    used: further parts of the checkpoint that the caller takes. Raises ArtefactError for a file that is missing, and
    for a part beside the weights that would be left out: the policy was trained with it.
    """
    index = folder / _INDEX
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ArtefactError(f"{index}: no weight_map of tensors to file names; copy it again")
        listed = {named_file(folder, name).name for name in weight_map.values()}
        absent = sorted(listed - {path.name for path in files})
        if absent:
            raise ArtefactError(f"{folder / absent[0]}: missing shard (listed in {_INDEX}); copy it again")
        _refuse_parts([path for path in files if path.name not in listed], f"not listed in {_INDEX}")
        files = [path for path in files if path.name in listed]
    adapters = [path for name in _ADAPTERS for path in folder.glob(name)]
    _refuse_parts([path for path in adapters if path not in used], "merge the adapter into the weights, then remove it")
    parts = [path for path in sorted(folder.glob(_PICKLED_PARTS)) if path not in used]
    _refuse_parts(parts, "`import-oft` takes an L1 action head and a state projector; nothing takes others")
    if not files:
        raise ArtefactError(f"{folder}: no *.safetensors file; is this a policy folder?")
    return files


def _refuse_parts(parts: Sequence[Path], why: str) -> None:
    if parts:
        names = ", ".join(path.name for path in parts)
        raise ArtefactError(f"{parts[0].parent}: {names} would be left out of the policy ({why})")


def save_policy(policy: Policy, folder: Path | str, source: Path, extra: dict[str, Any] | None = None) -> None:
    """Writes the policy in the published layout, weights in bfloat16 as published; `extra` updates config.json.

    source: the folder with the other files that the family reads.
    """
    raw = policy.config.raw | (extra or {}) | {"kind": POLICY.name}
    with atomic_folder(folder, POLICY) as temporary:
        weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in policy.state_dict().items()}
        with disk_errors():
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        for name in policy.config.family.files:
            shutil.copyfile(source / name, temporary / name)
