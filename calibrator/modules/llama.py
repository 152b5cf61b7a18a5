"""The Llama decoder: transformers' modules, and its blocks as segments of a chain."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calibrator.modules.chain import Layers, Runs, Segment
from vla_policy.core.errors import PolicyError
from vla_policy.core.prismatic.config import TextSpec

_AFTER_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_AFTER_LAYERS = {"mlp.up_proj": ("mlp.down_proj",)}
_AFTER_VALUES = {"self_attn.v_proj": ("self_attn.o_proj",)}
"""Where no two heads share values: then a channel of the one is a channel of the other."""
_FUSED = {
    "self_attn.q_proj": "self_attn.qkv",
    "self_attn.k_proj": "self_attn.qkv",
    "self_attn.v_proj": "self_attn.qkv",
    "mlp.gate_proj": "mlp.gate_up",
    "mlp.up_proj": "mlp.gate_up",
}


def llama_config(text: TextSpec) -> LlamaConfig:
    """The decoder's configuration in transformers' terms."""
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def keep_rotary_frequencies(model: LlamaModel) -> None:
    """Rotary frequencies are computed, not stored: they are kept even where weights are only names and shapes."""
    with torch.device("cpu"):
        model.rotary_emb = LlamaRotaryEmbedding(model.config)


def existing_block(model: LlamaModel, block: int | None) -> int:
    """The number of a block, the last for None. Raises PolicyError where there is no such block."""
    last = len(model.layers) - 1
    if block is not None and not 0 <= block <= last:
        raise PolicyError(f"language block {block} does not exist; the policy has blocks 0 to {last}")
    return last if block is None else block


SEQUENCE = "sequence"
"""The value that holds the input embeddings, [B, T, hidden]."""


def block_input(block: int) -> str:
    """The value that enters a block; of one more than there are, what leaves the last one."""
    return SEQUENCE if block == 0 else f"language.{block - 1}"


def block_segments(model: LlamaModel, path: str, runs: Callable[[float, int], tuple[Runs, ...]]) -> list[Segment]:
    """From `SEQUENCE` to what leaves the last block. path: of `model` in the policy. runs: of every layer, for one
    decision."""

    def rotation(x: Tensor) -> Tensor:
        """Cosine and sine of every position, [2, 1, T, head size]."""
        return torch.stack(model.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None]))

    shared = model.config.num_key_value_heads < model.config.num_attention_heads
    after_layers = _AFTER_LAYERS | ({} if shared else _AFTER_VALUES)

    def run_of(number: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, rotation: model.layers[number](x, position_embeddings=tuple(rotation))

    def layers_of(number: int) -> Layers:
        block = f"layers.{number}"
        return Layers(f"{path}.{block}", block, "language", "language", runs, _FUSED, _AFTER_NORMS, after_layers)

    return [
        Segment("rotation", (SEQUENCE,), rotation),
        *(
            Segment(
                block_input(number + 1),
                (block_input(number), "rotation"),
                run_of(number),
                (layers_of(number),),
            )
            for number in range(len(model.layers))
        ),
    ]
