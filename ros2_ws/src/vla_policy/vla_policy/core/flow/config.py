"""`config.json` of a flow-matching policy folder, as types: lerobot's names where lerobot has one.

Importing a checkpoint writes it from either published layout, neither of which tells everything. Sizes that are left
out are the published models'.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from vla_policy.core.errors import PolicyError
from vla_policy.core.flow.conventions import CONVENTIONS, Convention
from vla_policy.core.flow.statistics import NORMALIZATIONS, NormalizationMode, parse_flow_statistics
from vla_policy.core.policy_config import PolicyConfig, count, flag, mapping, refuse_unless

Config = TypeVar("Config", bound="FlowConfig")  # typing.Self is newer than Ubuntu 22.04's Python


@dataclass(frozen=True)
class SiglipSpec:
    """The vision tower; every block runs."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 4304

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class GemmaSpec:
    """A Gemma decoder. The prefix model and the expert share depth, heads and head size: they attend together."""

    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim


RMS_NORM_EPS = 1e-6
ROPE_THETA = 10000.0
_EXPERT = GemmaSpec(hidden_size=1024, intermediate_size=4096)
_SHARED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_PUBLISHED_VOCABULARY = 257152
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_relative_actions": (False,),
    "use_delta_joint_actions_aloha": (False,),
    "adapt_to_pi_aloha": (False,),
    "rtc_config": (),
    "quantization_config": (),
}
"""Keys that change the arithmetic, and the values that are implemented; a key may also be left out."""
Spec = TypeVar("Spec", SiglipSpec, GemmaSpec)


@dataclass(frozen=True, kw_only=True)
class FlowConfig(PolicyConfig):
    """A flow-matching policy.

    horizon: H, the rows of the chunk. n_action_steps: of these the rows that are carried out before the next look.
    width: A, values of a row inside the network, of which the robot's own come first. state_width: likewise of the
    state. num_inference_steps: N, evaluations of the velocity from noise to actions. min_period, max_period: of the
    time embedding. longest_prompt: ids. vocab_size: of the prompt's embedding. adaptive: whether the time modulates the
    expert's norms; otherwise it joins every action that enters the expert, and the state is a row before them.
    convention: whose preprocessing and arithmetic trained the policy. normalization: which statistics scale state and
    actions.
    """

    vision: SiglipSpec
    text: GemmaSpec
    expert: GemmaSpec
    vocab_size: int
    n_action_steps: int
    width: int
    state_width: int
    num_inference_steps: int
    min_period: float
    max_period: float
    longest_prompt: int
    adaptive: bool
    state_in_prompt: bool
    convention: Convention
    normalization: NormalizationMode

    @property
    def executed(self) -> int:
        return self.n_action_steps

    @property
    def num_patches(self) -> int:
        """Of all images together."""
        return self.num_images * self.vision.num_patches

    @property
    def suffix(self) -> int:
        """Rows of the expert: the chunk's, and the state's before them where it has one."""
        return self.horizon + (not self.adaptive)

    @classmethod
    def parsed(
        cls: type[Config], raw: dict[str, Any], source: str, *, adaptive: bool, longest_prompt: int
    ) -> Config:
        """`raw` as such a configuration; `source` names it in errors.

        longest_prompt: where `raw` tells none. Raises PolicyError naming the key that is missing or wrong.
        """
        for key, supported in SUPPORTED.items():
            refuse_unless(raw.get(key) in (None, *supported), f"{source}: {key}", raw.get(key), supported)
        vision = _spec(SiglipSpec(), raw, "vision_config", source)
        text, expert = _spec(GemmaSpec(), raw, "text_config", source), _spec(_EXPERT, raw, "expert_config", source)
        _check(vision, text, expert, source)
        in_prompt = flag(raw, "state_in_prompt", source)
        refuse_unless(adaptive or not in_prompt, f"{source}: state_in_prompt", in_prompt, (False,))
        takes_state = in_prompt or not adaptive
        convention = _named(raw, "convention", CONVENTIONS, source)
        normalization = _named(raw, "normalization", NORMALIZATIONS, source)
        horizon, width = _count(raw, "chunk_size", 50, source), _count(raw, "max_action_dim", 32, source)
        executed = _count(raw, "n_action_steps", horizon, source)
        if executed > horizon:
            raise PolicyError(f"{source}: n_action_steps: {executed} of a chunk_size of {horizon} rows")
        if "norm_stats" not in raw:
            raise PolicyError(f"{source}: norm_stats is missing; without statistics no action has a unit")
        config = cls(
            norm_stats=parse_flow_statistics(raw["norm_stats"], normalization, takes_state, source),
            num_images=_count(raw, "num_images_in_input", 1, source),
            image_size=vision.image_size,
            takes_state=takes_state,
            horizon=horizon,
            steps_per_action=_count(raw, "steps_per_action", 1, source),
            raw=raw,
            vision=vision,
            text=text,
            expert=expert,
            vocab_size=_count(raw, "vocab_size", _PUBLISHED_VOCABULARY, source),
            n_action_steps=executed,
            width=width,
            state_width=_count(raw, "max_state_dim", 32, source),
            num_inference_steps=_count(raw, "num_inference_steps", 10, source),
            min_period=_positive(raw, "min_period", 4e-3, source),
            max_period=_positive(raw, "max_period", 4.0, source),
            longest_prompt=_count(raw, "tokenizer_max_length", longest_prompt, source),
            adaptive=adaptive,
            state_in_prompt=in_prompt,
            convention=convention,
            normalization=normalization,
        )
        config._check_statistics(source)
        return config

    def _check_statistics(self, source: str) -> None:
        """Raises PolicyError for actions or states that the network has no room for."""
        sizes = {stats.action.dim for stats in self.norm_stats.values()}
        if len(sizes) > 1:
            raise PolicyError(f"{source}: norm_stats: one network gives actions of one length, not {sorted(sizes)}")
        if max(sizes) > self.width:
            raise PolicyError(f"{source}: norm_stats: {max(sizes)} values of an action, max_action_dim is {self.width}")
        if self.takes_state and self.state_dim > self.state_width:
            raise PolicyError(
                f"{source}: norm_stats: {self.state_dim} values of the state, max_state_dim is {self.state_width}"
            )


def _count(raw: Mapping[str, Any], name: str, default: int, source: str) -> int:
    found = count(raw, name, source)
    return default if found is None else found


def _positive(raw: Mapping[str, Any], name: str, default: float, source: str) -> float:
    number = raw.get(name, default)
    if type(number) not in (int, float) or not 0 < number < math.inf:
        raise PolicyError(f"{source}: {name}: expected a number above 0, got {number!r}")
    return float(number)


Value = TypeVar("Value")


def _named(raw: Mapping[str, Any], key: str, choices: Mapping[str, Value], source: str) -> Value:
    name = raw.get(key)
    if not isinstance(name, str) or name not in choices:
        raise PolicyError(
            f"{source}: {key}: expected {' or '.join(map(repr, choices))}, got {name!r}; import the checkpoint again"
        )
    return choices[name]


def _spec(default: Spec, raw: Mapping[str, Any], key: str, source: str) -> Spec:
    """The part of `raw` under `key`; sizes that it leaves out are the published ones."""
    given = mapping(raw.get(key, {}), f"{source}: {key}")
    known = [field.name for field in fields(default)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise PolicyError(f"{source}: {key}: {unknown[0]} is unknown; it may have {', '.join(known)}")
    return type(default)(**{name: _count(given, name, getattr(default, name), f"{source}: {key}") for name in known})


def _check(vision: SiglipSpec, text: GemmaSpec, expert: GemmaSpec, source: str) -> None:
    """Raises PolicyError for sizes that do not go together."""
    if vision.image_size % vision.patch_size or vision.hidden_size % vision.num_attention_heads:
        raise PolicyError(f"{source}: vision_config: patches must fill the image and heads the width")
    for name in _SHARED:
        if getattr(text, name) != getattr(expert, name):
            raise PolicyError(
                f"{source}: expert_config.{name} is {getattr(expert, name)}, text_config's {getattr(text, name)}; the "
                "expert attends the prefix's keys layer by layer"
            )
    if text.num_attention_heads % text.num_key_value_heads or text.head_dim % 2:
        raise PolicyError(f"{source}: text_config: key/value heads must divide the heads, and 2 the head_dim")
