"""`config.json` of a policy in the published OpenVLA layout, as types.

Optional keys let other policies of the same architecture be described without a fork of the code: `vision_towers` (the
sizes that the published models imply by `timm_model_ids`), `state_in_prompt` (the robot state as bin tokens after
"Out:"), `steps_per_action` (control steps for which an action is held) and, by OpenVLA-OFT's names,
`num_images_in_input` (images per decision; their patches follow each other), `num_actions_chunk` (an L1 head decides so
many actions in one pass, instead of tokens one after another) and `use_proprio` (the robot state as an embedding after
the patches). The published OpenVLA checkpoints have none of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_policy.core.errors import DataError, PolicyError
from vla_policy.core.files import read_json

SPAN_EPSILON = 1e-8
"""OpenVLA-OFT adds it to the span between percentiles where it normalises and un-normalises."""

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
    """1st and 99th percentile per action dimension; where `mask` is False the value is used as it is.

    mean, std: of the training actions, None where the checkpoint does not tell.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ProprioStats:
    """Names (with SI units implied), 1st and 99th percentile of the robot state's entries."""

    names: tuple[str, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    def checked(self, state: np.ndarray | None) -> np.ndarray:
        """float64 [S]. Raises DataError for a state that is missing, of another length or not finite."""
        if state is None or np.shape(state) != (len(self.q01),) or not np.isfinite(state).all():
            raise DataError(f"state: expected {len(self.q01)} finite values {list(self.names)}, got {state}")
        return np.asarray(state, np.float64)

    def normalised(self, state: np.ndarray | None) -> np.ndarray:
        """float32 [S] in [-1, 1], as OpenVLA-OFT does it; raises as `checked`."""
        q01, q99 = np.asarray(self.q01), np.asarray(self.q99)
        values = 2 * (self.checked(state) - q01) / (q99 - q01 + SPAN_EPSILON) - 1
        return np.clip(values, -1.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class NormStats:
    """Normalisation statistics of one data set."""

    action: ActionStats
    proprio: ProprioStats | None


@dataclass(frozen=True)
class PolicyConfig:
    """A policy's architecture, tokens and statistics.

    chunk: actions that one pass decides, None for a policy that decides token after token.
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

    @property
    def takes_state(self) -> bool:
        """Whether a decision needs the robot's state."""
        return self.state_in_prompt or self.use_proprio

    @property
    def action_dim(self) -> int:
        """Values of an action; the same in all statistics."""
        return len(next(iter(self.norm_stats.values())).action.q01)

    @property
    def state_dim(self) -> int:
        """Values of the robot's state; the same in all statistics, 0 where none names it."""
        proprio = next(iter(self.norm_stats.values())).proprio
        return len(proprio.names) if proprio else 0

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
        if key is None and len(self.norm_stats) == 1:
            return next(iter(self.norm_stats))
        if key not in self.norm_stats:
            choices = ", ".join(sorted(self.norm_stats))
            raise PolicyError(f"unnorm_key {key!r} is not in the policy's norm_stats; choose one of: {choices}")
        return key

    def stats(self, key: str | None) -> NormStats:
        """The statistics called `key`; see `unnorm_key`."""
        return self.norm_stats[self.unnorm_key(key)]

    @staticmethod
    def load(folder: Path | str) -> "PolicyConfig":
        """Reads `folder/config.json`. Raises PolicyError naming the key that is missing or wrong."""
        path = Path(folder) / "config.json"
        return PolicyConfig.from_dict(read_json(path), str(path))

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str) -> "PolicyConfig":
        """Parses the content of a `config.json`; `source` names it in errors."""
        if raw.get("model_type") != "openvla":
            raise PolicyError(f"{source}: model_type is {raw.get('model_type')!r}, expected 'openvla'")
        if raw.get("image_resize_strategy", "resize-naive") != "resize-naive":
            raise PolicyError(
                f"{source}: image_resize_strategy {raw['image_resize_strategy']!r} is not supported; "
                "only 'resize-naive' is"
            )
        try:
            towers = _towers(raw, source)
            names = set(TextSpec.__dataclass_fields__)
            given = {name: value for name, value in raw.get("text_config", {}).items() if name in names}
            text = TextSpec(**({"num_key_value_heads": given.get("num_attention_heads", 32)} | given))
            norm_stats = {
                key: _norm_stats(value, f"{source}: norm_stats.{key}") for key, value in raw["norm_stats"].items()
            }
            if raw.get("use_proprio") and any(stats.proprio is None for stats in norm_stats.values()):
                raise PolicyError(f"{source}: use_proprio is set but norm_stats has no named proprio statistics")
            return PolicyConfig(
                towers=towers,
                text=text,
                pad_to_multiple_of=int(raw.get("pad_to_multiple_of", 64)),
                n_action_bins=int(raw.get("n_action_bins", 256)),
                norm_stats=norm_stats,
                state_in_prompt=bool(raw.get("state_in_prompt", False)),
                steps_per_action=int(raw.get("steps_per_action", 1)),
                raw=raw,
                num_images=_count(raw, "num_images_in_input", source) or 1,
                chunk=_count(raw, "num_actions_chunk", source),
                use_proprio=bool(raw.get("use_proprio", False)),
            )
        except KeyError as error:
            raise PolicyError(f"{source}: key {error} is missing; is this an OpenVLA checkpoint?") from error
        except TypeError as error:
            raise PolicyError(f"{source}: {error}") from error


def _count(raw: dict[str, Any], name: str, source: str) -> int | None:
    number = raw.get(name)
    if number is not None and (not isinstance(number, int) or number < 1):
        raise PolicyError(f"{source}: {name}: expected an integer of at least 1, got {number!r}")
    return number


def _towers(raw: dict[str, Any], source: str) -> tuple[TowerSpec, TowerSpec]:
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
    return towers[0], towers[1]


def _norm_stats(raw: dict[str, Any], source: str) -> NormStats:
    action = raw["action"]
    stats = ActionStats(
        q01=tuple(map(float, action["q01"])),
        q99=tuple(map(float, action["q99"])),
        mask=tuple(map(bool, action.get("mask", [True] * len(action["q01"])))),
        mean=tuple(map(float, action["mean"])) if "mean" in action else None,
        std=tuple(map(float, action["std"])) if "std" in action else None,
    )
    columns = (stats.q01, stats.q99, stats.mask, stats.mean, stats.std)
    if len({len(values) for values in columns if values is not None}) != 1:
        raise PolicyError(f"{source}.action: q01, q99, mask, mean and std have different lengths")
    proprio = raw.get("proprio")
    if not proprio or "names" not in proprio:  # the published statistics hold an unnamed proprio that OpenVLA ignores
        return NormStats(stats, None)
    return NormStats(
        stats,
        ProprioStats(tuple(proprio["names"]), tuple(map(float, proprio["q01"])), tuple(map(float, proprio["q99"]))),
    )
