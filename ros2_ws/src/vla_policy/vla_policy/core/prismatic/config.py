"""`config.json` of a policy on a Prismatic model, in the published OpenVLA layout, as types.

Optional keys let policies of the same architecture be described without a fork of the code: `vision_towers` (the sizes
that the published models imply by `timm_model_ids`), `state_in_prompt` (the robot state as bin tokens after "Out:"),
`steps_per_action` (control steps for which an action is held) and, by OpenVLA-OFT's names, `num_images_in_input`
(images per decision; their patches follow each other) and `action_proprio_normalization_type` (which statistics are -1
and 1). The published OpenVLA checkpoints have none of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from vla_policy.core.errors import PolicyError
from vla_policy.core.files import read_json
from vla_policy.core.policy_config import (
    Normalization,
    PolicyConfig,
    count,
    flag,
    mapping,
    parse_statistics,
    refuse_unless,
)

# Keys that change what a policy computes, in config.json or its text_config, and the values that are implemented. A key
# that is absent or null is the published models' default, which is one of these.
Config = TypeVar("Config", bound="PrismaticConfig")  # typing.Self is newer than Ubuntu 22.04's Python
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


@dataclass(frozen=True, kw_only=True)
class PrismaticConfig(PolicyConfig):
    """A Prismatic policy's architecture and tokens. normalization: which of its statistics `norm_stats` holds."""

    towers: tuple[TowerSpec, TowerSpec]
    text: TextSpec
    pad_to_multiple_of: int
    n_action_bins: int
    state_in_prompt: bool
    normalization: Normalization

    @property
    def token_vocab(self) -> int:
        """Size of the tokenizer's vocabulary: the embedding without its padding rows."""
        return self.text.vocab_size - self.pad_to_multiple_of

    @property
    def action_tokens(self) -> range:
        """The ids that stand for actions: the vocabulary's last."""
        return range(self.token_vocab - self.n_action_bins, self.token_vocab)

    @property
    def num_patches(self) -> int:
        """Of all images together: the positions that follow BOS."""
        return self.num_images * self.towers[0].num_patches

    @property
    def vision_dim(self) -> int:
        return self.towers[0].width + self.towers[1].width

    @classmethod
    def parsed(
        cls: type[Config],
        raw: dict[str, Any],
        source: str,
        normalization: Normalization,
        horizon: int = 1,
        takes_state: bool = False,
        **own: Any,
    ) -> Config:
        """`raw` as such a configuration; `source` names it in errors.

        horizon: actions of one decision. takes_state: whether the policy takes the state other than in its prompt.
        own: the fields that a family adds.

        Raises PolicyError naming the key that is missing or wrong.
        """
        try:
            _check_supported(raw, source)
            towers = _towers(raw, source)
            text = _text(mapping(raw.get("text_config", {}), f"{source}: text_config"), source)
            state_in_prompt = flag(raw, "state_in_prompt", source)
            takes_state = takes_state or state_in_prompt
            config = cls(
                towers=towers,
                text=text,
                pad_to_multiple_of=count(raw, "pad_to_multiple_of", source) or 64,
                n_action_bins=count(raw, "n_action_bins", source, least=2) or 256,
                state_in_prompt=state_in_prompt,
                normalization=normalization,
                norm_stats=parse_statistics(raw["norm_stats"], normalization, takes_state, source),
                num_images=count(raw, "num_images_in_input", source) or 1,
                image_size=towers[0].image_size,
                takes_state=takes_state,
                horizon=horizon,
                steps_per_action=count(raw, "steps_per_action", source) or 1,
                raw=raw,
                **own,
            )
        except KeyError as error:
            raise PolicyError(f"{source}: key {error} is missing; is this an OpenVLA checkpoint?") from error
        except (TypeError, ValueError) as error:
            raise PolicyError(f"{source}: {error}") from error
        if config.token_vocab <= config.n_action_bins:
            raise PolicyError(
                f"{source}: text_config: vocab_size: {text.vocab_size} has no room for {config.n_action_bins} action "
                f"tokens before {config.pad_to_multiple_of} rows of padding"
            )
        _check_bins(config, source)
        return config


def check_preprocessor(config: PrismaticConfig, folder: Path) -> None:
    """Raises PolicyError where the checkpoint's own preprocessor, if it has one, makes other numbers of an image."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    raw = read_json(path)
    expected = {
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, tower.image_size, tower.image_size] for tower in config.towers],
        "interpolations": ["bicubic"] * len(config.towers),
        "means": [list(tower.mean) for tower in config.towers],
        "stds": [list(tower.std) for tower in config.towers],
        "tvf_do_letterbox": False,
        "use_fused_vision_backbone": True,
    }
    for key, value in expected.items():
        refuse_unless(raw.get(key) in (None, value), f"{path}: {key}", raw.get(key), (value,))


def _check_bins(config: PrismaticConfig, source: str) -> None:
    """Raises PolicyError for a state in the prompt that never varied: it has no bins."""
    for key, stats in config.norm_stats.items() if config.state_in_prompt else ():
        assert stats.proprio is not None  # `parse_statistics`
        scaled = zip(stats.proprio.low, stats.proprio.high, stats.proprio.mask, strict=True)
        if any(mask and low == high for low, high, mask in scaled):
            raise PolicyError(f"{source}: norm_stats.{key}.proprio: low and high must differ where a state has bins")


def _check_supported(raw: Mapping[str, Any], source: str) -> None:
    """Raises PolicyError for a key whose value would compute something else than this code does."""
    text = mapping(raw.get("text_config", {}), f"{source}: text_config")
    for section, values in (("", raw), ("text_config.", text)):
        for key, supported in _SUPPORTED.items():
            got = values.get(key)
            refuse_unless(got in (None, *supported), f"{source}: {section}{key}", got, supported)
    kind = text.get("model_type", "llama")
    refuse_unless(kind == "llama", f"{source}: text_config.model_type", kind, ("llama",))


def _text(raw: Mapping[str, Any], source: str) -> TextSpec:
    given = {name: raw[name] for name in TextSpec.__dataclass_fields__ if raw.get(name) is not None}
    given |= _rope_theta(raw, source)
    for field in fields(TextSpec):
        if field.type is int:
            count(given, field.name, f"{source}: text_config")
        elif not _positive(number := given.get(field.name, 1.0)):
            raise PolicyError(f"{source}: text_config: {field.name}: expected a number above 0, got {number!r}")
    text = TextSpec(**({"num_key_value_heads": given.get("num_attention_heads", 32)} | given))
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise PolicyError(
            f"{source}: text_config: hidden_size {text.hidden_size}, num_attention_heads {text.num_attention_heads} "
            f"and num_key_value_heads {text.num_key_value_heads} do not divide each other"
        )
    head_dim = raw.get("head_dim")
    refuse_unless(head_dim in (None, text.head_dim), f"{source}: text_config.head_dim", head_dim, (text.head_dim,))
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
        refuse_unless(plain, f"{source}: text_config.{key}", rope, ({"rope_type": "default"},))
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
    return found


def _positive(number: Any) -> bool:
    return type(number) in (int, float) and 0 < number < math.inf


def _tower(raw: Any, source: str) -> TowerSpec:
    for name in (field.name for field in fields(TowerSpec) if field.type is int):
        count(mapping(raw, source), name, source, least={"registers": 0, "depth": 2}.get(name, 1))
    tower = TowerSpec(**raw)
    if tower.image_size % tower.patch_size or tower.width % tower.heads:
        raise PolicyError(f"{source}: patches must fill the image and heads the width: {raw}")
    return tower


def _towers(raw: Mapping[str, Any], source: str) -> tuple[TowerSpec, TowerSpec]:
    if "vision_towers" in raw:
        towers = [_tower(tower, f"{source}: vision_towers[{at}]") for at, tower in enumerate(raw["vision_towers"])]
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
    refuse_unless(raw.get("image_sizes") in (None, sizes), f"{source}: image_sizes", raw.get("image_sizes"), (sizes,))
    return towers[0], towers[1]
