"""`config.json` of a policy in the published OpenVLA layout, as types.

Optional keys let other policies of the same architecture be described without a fork of the code: `vision_towers` (the
sizes that the published models imply by `timm_model_ids`), `state_in_prompt` (the robot state as bin tokens after
"Out:"), `steps_per_action` (control steps for which an action is held) and, by OpenVLA-OFT's names,
`num_images_in_input` (images per decision; their patches follow each other), `num_actions_chunk` (an L1 head decides so
many actions in one pass, instead of tokens one after another), `use_proprio` (the robot state as an embedding after
the patches) and `action_proprio_normalization_type` (which statistics are -1 and 1). The published OpenVLA checkpoints
have none of them.

A key that changes the arithmetic has the one value that is implemented here, or the configuration is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_policy.core.errors import DataError, PolicyError
from vla_policy.core.files import STATISTICS, read_json
from vla_policy.core.outputs import FolderKind

POLICY = FolderKind("policy", "config.json", ("tokenizer.json", "*.safetensors", "model.safetensors.index.json"))
"""Policy folders that were written here; a published one does not say so, and is never replaced."""

SPAN_EPSILON = 1e-8
"""OpenVLA-OFT adds it to the span between low and high where it normalises and un-normalises."""

Normalization = Literal["bounds", "bounds_q99"]
"""OpenVLA-OFT's words for what -1 and 1 stand for: minimum and maximum, or 1st and 99th percentile."""

NORMALIZATION_KEY = "action_proprio_normalization_type"
_LIMITS: dict[Normalization, tuple[str, str]] = {"bounds": ("min", "max"), "bounds_q99": ("q01", "q99")}

# Keys that change what a policy computes, in config.json or its text_config, and the values that are implemented. A key
# that is absent or null is the published models' default, which is one of these.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "arch_specifier": ("no-align+fused-gelu-mlp", "fused-gelu-mlp"),
    "image_resize_strategy": ("resize-naive",),
    "timm_override_act_layers": ([None, None],),
    "use_diffusion": (False,),
    "use_film": (False,),
    "use_fused_vision_backbone": (True,),
    # Others are asked in other words: OpenVLA v0.1 is Vicuna's, in its chat form.
    "llm_backbone_id": ("llama2-7b-pure", "llama2-13b-pure"),
    "quantization_config": (),
    # What Llama reads besides TextSpec's fields.
    "attention_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (),
    "tie_word_embeddings": (False,),
}

# DINOv2's statistics are bf16-rounded in the published checkpoints' preprocessor; SigLIP's are exact.
_PIXEL_STATISTICS = {
    "dinov2": ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class TowerSpec:
    """One vision transformer. OpenVLA reads the block before the last, so `live_blocks` = depth - 1 run."""

    kind: Literal["dinov2", "siglip"]
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    registers: int

    @property
    def live_blocks(self) -> int:
        return self.depth - 1

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens before the patches; they have no position embedding."""
        return 1 + self.registers if self.kind == "dinov2" else 0

    @property
    def mean(self) -> tuple[float, float, float]:
        return _PIXEL_STATISTICS[self.kind][0]

    @property
    def std(self) -> tuple[float, float, float]:
        return _PIXEL_STATISTICS[self.kind][1]


_PUBLISHED_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": TowerSpec("dinov2", 224, 14, 1024, 24, 16, 4096, 4),
    "vit_so400m_patch14_siglip_224": TowerSpec("siglip", 224, 14, 1152, 27, 16, 4304, 0),
}


@dataclass(frozen=True)
class TextSpec:
    """The Llama decoder; `vocab_size` includes the padding rows. Defaults are Llama-2 7B's."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    vocab_size: int = 32064
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ActionStats:
    """What -1 and 1 stand for per action dimension; where `mask` is False the value is used as it is.

    mean, std: of the training actions, None where the checkpoint does not tell.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def dim(self) -> int:
        """Values of an action."""
        return len(self.low)


@dataclass(frozen=True)
class ProprioStats:
    """Names (with SI units implied) of the robot state's entries, and what -1 and 1 stand for where `mask` is set."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]

    def normalised(self, state: np.ndarray | None, epsilon: float = SPAN_EPSILON) -> np.ndarray:
        """float64 [S] in [-1, 1]. Raises DataError for a state that is missing, of another length or not finite.

        epsilon: added to the span between low and high.
        """
        if state is None or np.shape(state) != (len(self.low),) or not np.isfinite(state).all():
            raise DataError(f"state: expected {len(self.low)} finite values {list(self.names)}, got {state}")
        values, low, high = np.asarray(state, np.float64), np.asarray(self.low), np.asarray(self.high)
        span = np.where(self.mask, high - low + epsilon, 1.0)
        return np.clip(np.where(self.mask, 2 * (values - low) / span - 1, values), -1.0, 1.0)


@dataclass(frozen=True)
class NormStats:
    """Normalisation statistics of one data set."""

    action: ActionStats
    proprio: ProprioStats | None


@dataclass(frozen=True)
class PolicyConfig:
    """A policy's architecture, tokens and statistics.

    chunk: actions that one pass decides, None for a policy that decides token after token. normalization: which of the
    data sets' statistics `norm_stats` holds.
    """

    towers: tuple[TowerSpec, TowerSpec]
    text: TextSpec
    pad_to_multiple_of: int
    n_action_bins: int
    norm_stats: dict[str, NormStats]
    state_in_prompt: bool
    steps_per_action: int
    raw: dict[str, Any]
    num_images: int = 1
    chunk: int | None = None
    use_proprio: bool = False
    normalization: Normalization = "bounds_q99"

    @property
    def takes_state(self) -> bool:
        """Whether a decision needs the robot's state."""
        return self.state_in_prompt or self.use_proprio

    @property
    def action_dim(self) -> int:
        """Values of an action of a policy that decides chunks; the same in all its statistics."""
        (dim,) = {stats.action.dim for stats in self.norm_stats.values()}
        return dim

    @property
    def state_dim(self) -> int:
        """Values of the state of a policy that takes it; the same in all its statistics."""
        (dim,) = {len(stats.proprio.names) for stats in self.norm_stats.values() if stats.proprio}
        return dim

    @property
    def token_vocab(self) -> int:
        """Size of the tokenizer's vocabulary: the embedding without its padding rows."""
        return self.text.vocab_size - self.pad_to_multiple_of

    @property
    def image_size(self) -> int:
        return self.towers[0].image_size

    @property
    def num_patches(self) -> int:
        """Of all images together: the positions that follow BOS."""
        return self.num_images * self.towers[0].num_patches

    @property
    def vision_dim(self) -> int:
        return self.towers[0].width + self.towers[1].width

    def unnorm_key(self, key: str | None) -> str:
        """`key` if it exists, or the only one there is. Raises PolicyError naming the choices."""
        choices = ", ".join(sorted(self.norm_stats))
        if key is None:
            if len(self.norm_stats) > 1:
                raise PolicyError(
                    f"the policy has statistics of {len(self.norm_stats)} data sets and none was named; "
                    f"choose an unnorm_key: {choices}"
                )
            (key,) = self.norm_stats
        if key not in self.norm_stats:
            raise PolicyError(f"unnorm_key {key!r} is not in the policy's norm_stats; choose one of: {choices}")
        return key

    def stats(self, key: str | None) -> NormStats:
        """The statistics called `key`; see `unnorm_key`."""
        return self.norm_stats[self.unnorm_key(key)]

    @staticmethod
    def load(folder: Path | str) -> "PolicyConfig":
        """Reads the folder's configuration as OpenVLA's own loader does. Raises PolicyError naming what is wrong."""
        folder = Path(folder)
        config = PolicyConfig.from_dict(read_raw(folder), str(folder / "config.json"))
        _check_preprocessor(folder / "preprocessor_config.json", config.towers)
        return config

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str) -> "PolicyConfig":
        """Parses the content of a `config.json`; `source` names it in errors."""
        if raw.get("model_type") not in ("openvla", "openvla_oft"):
            raise PolicyError(f"{source}: model_type is {raw.get('model_type')!r}, expected 'openvla' or 'openvla_oft'")
        if (raw["model_type"] == "openvla_oft") != ("num_actions_chunk" in raw):
            raise PolicyError(
                f"{source}: only a policy of model_type 'openvla_oft' has num_actions_chunk, and has it always; "
                "import the checkpoint again with `python -m calibrator import-oft`"
            )
        try:
            _check_supported(raw, source)
            towers = _towers(raw, source)
            chunk = _count(raw, "num_actions_chunk", source)
            normalization = _normalization(raw, chunk, source)
            config = PolicyConfig(
                towers=towers,
                text=_text(_mapping(raw.get("text_config", {}), f"{source}: text_config"), source),
                pad_to_multiple_of=int(raw.get("pad_to_multiple_of", 64)),
                n_action_bins=int(raw.get("n_action_bins", 256)),
                norm_stats={
                    key: _norm_stats(value, normalization, f"{source}: norm_stats.{key}")
                    for key, value in _mapping(raw["norm_stats"], f"{source}: norm_stats").items()
                },
                state_in_prompt=bool(raw.get("state_in_prompt", False)),
                steps_per_action=int(raw.get("steps_per_action", 1)),
                raw=raw,
                num_images=_count(raw, "num_images_in_input", source) or 1,
                chunk=chunk,
                use_proprio=bool(raw.get("use_proprio", False)),
                normalization=normalization,
            )
        except KeyError as error:
            raise PolicyError(f"{source}: key {error} is missing; is this an OpenVLA checkpoint?") from error
        except (TypeError, ValueError) as error:
            raise PolicyError(f"{source}: {error}") from error
        _check_statistics(config, source)
        return config


def read_raw(folder: Path) -> dict[str, Any]:
    """The content of `folder/config.json`. As in OpenVLA's own loader, the statistics that fine-tuning writes beside it
    replace those of the base policy in it."""
    raw = read_json(folder / "config.json")
    if (folder / STATISTICS).is_file():
        raw["norm_stats"] = read_json(folder / STATISTICS)
    return raw


def _check_supported(raw: Mapping[str, Any], source: str) -> None:
    """Raises PolicyError for a key whose value would compute something else than this code does."""
    text = _mapping(raw.get("text_config", {}), f"{source}: text_config")
    for section, values in (("", raw), ("text_config.", text)):
        for key, supported in _SUPPORTED.items():
            got = values.get(key)
            _refuse_unless(got in (None, *supported), f"{source}: {section}{key}", got, supported)
    kind = text.get("model_type", "llama")
    _refuse_unless(kind == "llama", f"{source}: text_config.model_type", kind, ("llama",))


def _refuse_unless(holds: bool, key: str, got: Any, supported: tuple[Any, ...]) -> None:
    if not holds:
        only = f"only {' or '.join(map(repr, supported))} is" if supported else "leave it out"
        raise PolicyError(f"{key}: {got!r} is not supported; {only}")


def _text(raw: Mapping[str, Any], source: str) -> TextSpec:
    given = {name: raw[name] for name in TextSpec.__dataclass_fields__ if raw.get(name) is not None}
    given |= _rope_theta(raw, source)
    text = TextSpec(**({"num_key_value_heads": given.get("num_attention_heads", 32)} | given))
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise PolicyError(
            f"{source}: text_config: hidden_size {text.hidden_size}, num_attention_heads {text.num_attention_heads} "
            f"and num_key_value_heads {text.num_key_value_heads} do not divide each other"
        )
    head_dim = raw.get("head_dim")
    _refuse_unless(head_dim in (None, text.head_dim), f"{source}: text_config.head_dim", head_dim, (text.head_dim,))
    return text


def _rope_theta(raw: Mapping[str, Any], source: str) -> dict[str, float]:
    """The base of the rotary positions where later versions of transformers write it, if it is written there.

    Raises PolicyError for positions that are stretched or partly turned.
    """
    found: dict[str, float] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        plain = isinstance(rope, Mapping) and set(rope) <= {"rope_type", "type", "rope_theta"}
        plain = plain and {rope.get("rope_type", "default"), rope.get("type", "default")} == {"default"}
        _refuse_unless(plain, f"{source}: text_config.{key}", rope, ({"rope_type": "default"},))
        if "rope_theta" in rope:
            found["rope_theta"] = float(rope["rope_theta"])
    return found


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PolicyError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def _count(raw: Mapping[str, Any], name: str, source: str) -> int | None:
    number = raw.get(name)
    if number is not None and (not isinstance(number, int) or number < 1):
        raise PolicyError(f"{source}: {name}: expected an integer of at least 1, got {number!r}")
    return number


def _towers(raw: Mapping[str, Any], source: str) -> tuple[TowerSpec, TowerSpec]:
    if "vision_towers" in raw:
        towers = [TowerSpec(**tower) for tower in raw["vision_towers"]]
    else:
        unknown = [name for name in raw["timm_model_ids"] if name not in _PUBLISHED_TOWERS]
        if unknown:
            raise PolicyError(
                f"{source}: vision tower {unknown[0]!r} is unknown; known: {', '.join(_PUBLISHED_TOWERS)}"
            )
        towers = [_PUBLISHED_TOWERS[name] for name in raw["timm_model_ids"]]
    if [tower.kind for tower in towers] != ["dinov2", "siglip"]:
        raise PolicyError(f"{source}: expected the fused towers dinov2 and siglip, got {[t.kind for t in towers]}")
    if len({(tower.image_size, tower.num_patches) for tower in towers}) != 1:
        raise PolicyError(f"{source}: the two towers must share image size and number of patches to be fused")
    sizes = [tower.image_size for tower in towers]
    _refuse_unless(raw.get("image_sizes") in (None, sizes), f"{source}: image_sizes", raw.get("image_sizes"), (sizes,))
    return towers[0], towers[1]


def _check_preprocessor(path: Path, towers: tuple[TowerSpec, TowerSpec]) -> None:
    """Raises PolicyError where the checkpoint's own preprocessor, if it has one, makes other numbers of an image."""
    if not path.is_file():
        return
    raw = read_json(path)
    expected = {
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, tower.image_size, tower.image_size] for tower in towers],
        "interpolations": ["bicubic"] * len(towers),
        "means": [list(tower.mean) for tower in towers],
        "stds": [list(tower.std) for tower in towers],
        "tvf_do_letterbox": False,
        "use_fused_vision_backbone": True,
    }
    for key, value in expected.items():
        _refuse_unless(raw.get(key) in (None, value), f"{path}: {key}", raw.get(key), (value,))


def _normalization(raw: Mapping[str, Any], chunk: int | None, source: str) -> Normalization:
    """OpenVLA's own code knows percentiles only; OpenVLA-OFT's takes either, and its files do not tell which."""
    given = raw.get(NORMALIZATION_KEY)
    if given is None and chunk is None:
        return "bounds_q99"
    for normalization in _LIMITS:
        if given == normalization:
            return normalization
    raise PolicyError(
        f"{source}: {NORMALIZATION_KEY}: expected 'bounds' (-1 and 1 are min and max) or 'bounds_q99' (q01 and q99), "
        f"got {given!r}; `calibrator import-oft --normalization` records it"
    )


def _norm_stats(raw: Any, normalization: Normalization, source: str) -> NormStats:
    action = _mapping(_mapping(raw, source)["action"], f"{source}.action")
    low, high, mask = _limits(action, normalization, f"{source}.action")
    mean, std = (_numbers(action, name, f"{source}.action") if name in action else None for name in ("mean", "std"))
    if len({len(values) for values in (low, mean, std) if values is not None}) != 1:
        raise PolicyError(f"{source}.action: limits, mean and std have different lengths")
    stats = ActionStats(low, high, mask, mean, std)
    proprio = raw.get("proprio")
    if not proprio or "names" not in proprio:  # the published statistics hold an unnamed proprio that OpenVLA ignores
        return NormStats(stats, None)
    names = tuple(map(str, proprio["names"]))
    limits = _limits(proprio, normalization, f"{source}.proprio")
    if len(names) != len(limits[0]):
        raise PolicyError(f"{source}.proprio: {len(names)} names for {len(limits[0])} values")
    return NormStats(stats, ProprioStats(names, *limits))


def _limits(
    raw: Mapping[str, Any], normalization: Normalization, source: str
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[bool, ...]]:
    """low, high and mask."""
    names = _LIMITS[normalization]
    for name in names:
        if name not in raw:
            has = ", ".join(sorted(raw)) or "nothing"
            raise PolicyError(f"{source}: {name!r} is missing, which {normalization!r} normalises by; it has {has}")
    low, high = (_numbers(raw, name, source) for name in names)
    mask = tuple(map(bool, raw.get("mask", [True] * len(low))))
    if not len(low) == len(high) == len(mask) or not low:
        raise PolicyError(f"{source}: {names[0]}, {names[1]} and mask have different lengths, or none")
    if any(below > above for below, above in zip(low, high, strict=True)):
        raise PolicyError(f"{source}: {names[0]} {list(low)} is above {names[1]} {list(high)}")
    return low, high, mask


def _numbers(raw: Mapping[str, Any], name: str, source: str) -> tuple[float, ...]:
    try:
        values = tuple(map(float, raw[name]))
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{source}.{name}: expected a list of numbers, got {raw[name]!r}") from error
    if not all(map(math.isfinite, values)):
        raise PolicyError(f"{source}.{name}: {list(values)} are not all finite")
    return values


def _check_statistics(config: PolicyConfig, source: str) -> None:
    """Raises PolicyError for statistics that do not fit the architecture."""
    if not config.norm_stats:
        raise PolicyError(f"{source}: norm_stats is empty; without statistics no action has a unit")
    if config.chunk is not None and len({stats.action.dim for stats in config.norm_stats.values()}) > 1:
        raise PolicyError(f"{source}: norm_stats: an action head gives actions of one length, the statistics differ")
    if not config.takes_state:
        return
    sizes = set()
    for key, stats in config.norm_stats.items():
        if stats.proprio is None:
            raise PolicyError(f"{source}: the policy takes a state, but norm_stats.{key} has no named proprio")
        scaled = zip(stats.proprio.low, stats.proprio.high, stats.proprio.mask, strict=True)
        if config.state_in_prompt and any(mask and low == high for low, high, mask in scaled):
            raise PolicyError(f"{source}: norm_stats.{key}.proprio: low and high must differ where a state has bins")
        sizes.add(len(stats.proprio.names))
    if len(sizes) > 1:
        raise PolicyError(f"{source}: norm_stats: states of {sorted(sizes)} values; a policy takes one length")
