"""What a small pi0.5 policy begins with: the small OpenVLA policy, as the published one begins with PaliGemma.

Its SigLIP tower becomes the tower, its Llama decoder the prefix and the expert, its words the prompt's. What has no
counterpart begins so that the rest goes on as before: the expert's rows begin as the decoder's last prompt token, and
the projector is the linear map that comes closest to the decoder's patches.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calibrator.families.openvla import OpenVLA
from calibrator.families.pi05 import Pi05
from calibrator.modules.gemma import Attention, Mlp
from vla_policy.core.errors import PolicyError
from vla_policy.core.prismatic.actions import value_to_tokens

_SILU_IN_GELU = 1.702
"""gelu(x) is about x sigmoid(1.702 x), so that silu(x) is about 1.702 gelu(x / 1.702)."""
_RIDGE = 1e-2
"""In units of the features' variance, which a norm has made about 1."""
_BIN = re.compile("▁(-?[0-9]+)")


def check_source(source: OpenVLA, policy: Pi05) -> None:
    """Raises PolicyError unless the sizes that are taken over are equal."""
    text, tower = source.config.text, source.config.towers[1]
    heads = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    wanted = {f"text_config.{name}": (getattr(text, name), getattr(policy.config.text, name)) for name in heads}
    wanted |= {f"expert_config.{name}": (getattr(text, name), getattr(policy.config.expert, name)) for name in heads}
    vision = policy.config.vision
    wanted |= {
        "image_size": (tower.image_size, vision.image_size),
        "patch_size": (tower.patch_size, vision.patch_size),
        "vision_config.num_hidden_layers": (tower.live_blocks, vision.num_hidden_layers),
        "vision_config.hidden_size": (tower.width, vision.hidden_size),
        "vision_config.num_attention_heads": (tower.heads, vision.num_attention_heads),
        "vision_config.intermediate_size": (tower.mlp_width, vision.intermediate_size),
    }
    for name, (has, needs) in wanted.items():
        if has != needs:
            raise PolicyError(f"--start: {name} is {has} there, {needs} here; what is taken over must have one size")


@torch.no_grad()
def transplant(source: OpenVLA, words: Path, policy: Pi05, tokenizer: Tokenizer, pixels: Tensor) -> None:
    """Overwrites the initial weights of `policy`.

    words: the source's tokenizer file. pixels: [B, 3, S, S] in [-1, 1], to fit the projector on. Raises PolicyError
    where the two do not fit each other.
    """
    check_source(source, policy)
    _tower(source, policy)
    decoder = source.decoder
    blocks: Any = zip(decoder.layers, policy.prefix.layers, policy.expert.layers, strict=True)
    for layer, prefix, expert in blocks:
        for block in (prefix, expert) if prefix.whole else (expert,):
            _attention(layer.self_attn, block.self_attn)
            _mlp(layer.mlp, block.mlp)
        if prefix.whole:
            prefix.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight - 1)
        else:
            for part in ("k_proj", "v_proj"):
                getattr(prefix.self_attn, part).weight.copy_(getattr(layer.self_attn, part).weight)
        prefix.input_layernorm.weight.copy_(layer.input_layernorm.weight - 1)
        _scale(expert.input_layernorm.dense, layer.input_layernorm.weight)
        _scale(expert.post_attention_layernorm.dense, layer.post_attention_layernorm.weight)
    _scale(policy.expert.norm.dense, decoder.norm.weight)
    embedding, old = decoder.embed_tokens.weight, Tokenizer.from_file(str(words))
    table = policy.paligemma_with_expert.paligemma.lm_head.weight
    table.copy_(_words(embedding, old, tokenizer, source.config.token_vocab) / policy.config.text.hidden_size**0.5)
    empty = embedding[old.token_to_id("▁")]
    policy.action_in_proj.bias.copy_(empty)
    nn.init.normal_(policy.action_in_proj.weight, std=float(empty.std()) * policy.config.width**-0.5)
    features = policy.vision(pixels).flatten(0, 1).double()
    wanted = source.patches(_source_pixels(source, pixels)).flatten(0, 1).double()
    from_mean, to_mean = features.mean(0), wanted.mean(0)
    centred = features - from_mean
    # Ridge: training multiplies in bfloat16, which large weights that cancel would not survive.
    ridge = _RIDGE * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (wanted - to_mean))
    linear = policy.paligemma_with_expert.paligemma.model.multi_modal_projector.linear
    linear.weight.copy_(fitted.T)
    linear.bias.copy_(to_mean - from_mean @ fitted)


def _source_pixels(source: OpenVLA, pixels: Tensor) -> Tensor:
    """[B, 6, S, S] for both of its towers, of pixels [B, 3, S, S] in [-1, 1]."""
    towers = [
        [torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std)] for tower in source.config.towers
    ]
    return torch.cat([((pixels + 1) / 2 - mean) / std for mean, std in towers], 1)


def _tower(source: OpenVLA, policy: Pi05) -> None:
    old, new = source.vision_backbone.fused_featurizer, policy.vision
    new.embeddings.patch_embedding.load_state_dict(old.patch_embed.proj.state_dict())
    new.embeddings.position_embedding.weight.copy_(old.pos_embed[0])
    blocks: Any = zip(new.encoder.layers, old.blocks, strict=True)
    for block, taken in blocks:
        block.layer_norm1.load_state_dict(taken.norm1.state_dict())
        block.layer_norm2.load_state_dict(taken.norm2.state_dict())
        block.mlp.load_state_dict(taken.mlp.state_dict())
        block.self_attn.out_proj.load_state_dict(taken.attn.proj.state_dict())
        parts = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        weights, biases = taken.attn.qkv.weight.chunk(3), taken.attn.qkv.bias.chunk(3)
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)


def _attention(old: Any, new: Attention) -> None:
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(new, part).weight.copy_(getattr(old, part).weight)


def _mlp(old: Any, new: Mlp) -> None:
    new.gate_proj.weight.copy_(old.gate_proj.weight / _SILU_IN_GELU)
    new.up_proj.weight.copy_(old.up_proj.weight * _SILU_IN_GELU)
    new.down_proj.weight.copy_(old.down_proj.weight)


def _scale(dense: nn.Linear, weight: Tensor) -> None:
    """The modulation is the norm's weight at every time."""
    dense.bias.copy_(torch.cat([weight - 1, torch.zeros_like(weight), torch.ones_like(weight)]))


def _words(embedding: Tensor, old: Tokenizer, new: Tokenizer, vocabulary: int) -> Tensor:
    """Embeddings of the new tokens: their own where the old tokenizer has them, the state's bins by what they stand
    for, the empty token where the prompt ends; noise of the same size for all others."""
    spread = float(embedding.std())
    table = torch.randn(new.get_vocab_size(), embedding.shape[1]) * spread
    last = new.encode("Action: ").ids[-1]
    for token, number in new.get_vocab().items():
        known = old.token_to_id({"<bos>": "<s>"}.get(token, token))
        if match := _BIN.fullmatch(token):
            value = np.asarray((int(match[1]) + 0.5) / 128 - 1)
            known = int(value_to_tokens(value, vocabulary, 256))
        if known is not None:
            table[number] = embedding[known]
    table[last] = embedding[old.token_to_id("▁")]
    return table
