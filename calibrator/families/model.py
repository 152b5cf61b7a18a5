"""OpenVLA: vision backbone, projector, Llama decoder; greedy decisions and their teacher-forced likelihood."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from calibrator.families.vision import Projector, VisionBackbone
from vla_policy.core.actions import finite
from vla_policy.core.policy_config import PolicyConfig, TextSpec


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


@dataclass(frozen=True)
class Inputs:
    """What B states of equal prompt length give a policy.

    pixel_values: [B, 6 N, S, S] of N images. input_ids: int64 [B, L]. state: [B, S], normalised, of a policy that takes
    it as an embedding; None otherwise.
    """

    pixel_values: Tensor
    input_ids: Tensor
    state: Tensor | None = None


class OpenVLA(nn.Module):
    """The policy. Attribute paths equal the published tensor names.

    A sequence is [BOS][patches][prompt][action tokens]. Sequences of one batch have the same length; shorter ones may
    be padded at the right end, which causal attention never looks at.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config.towers)
        self.projector = Projector(config.vision_dim, config.text.hidden_size)
        self.language_model = LlamaForCausalLM(llama_config(config.text))

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Projected patch embeddings: [B, 6 N, S, S] of N images -> [B, N P, hidden]."""
        return self.projector(self.vision_backbone(pixel_values))

    def embed(self, input_ids: Tensor, patches: Tensor) -> Tensor:
        """Input embeddings [B, L + P, hidden]: the patches follow BOS."""
        words = self.language_model.model.embed_tokens(input_ids)
        return torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)

    def hidden(self, embeddings: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Final-norm hidden states [B, T, hidden]; `cache` is read and extended if given."""
        output = self.language_model.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state

    def action_logits(self, pixel_values: Tensor, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced logits [B, K, vocab] at the K positions that predict the action `tokens` [B, K]."""
        embeddings = self.sequence(Inputs(pixel_values, input_ids), self.patches(pixel_values), tokens)
        return self.readout(self.predicting(self.hidden(embeddings), tokens))

    def sequence(self, inputs: Inputs, patches: Tensor, decided: Tensor) -> Tensor:
        """Embeddings [B, T, hidden] of the one pass that scores what was decided, tokens [B, K]."""
        return self.embed(torch.cat([inputs.input_ids, decided[:, :-1]], dim=1), patches)

    def predicting(self, hidden: Tensor, decided: Tensor) -> Tensor:
        """The head's input: of final-norm states [B, T, hidden], those that predict `decided` [B, D]."""
        return hidden[:, -decided.shape[1] :]

    def readout(self, states: Tensor) -> Tensor:
        """The policy's output for `predicting` states: logits [B, K, vocab], float32."""
        return self.language_model.lm_head(states).float()

    def decide(self, inputs: Inputs, size: int) -> Tensor:
        """The greedy decision: action tokens, int64 [B, size]. Raises EngineError where the output is not finite."""
        return self.generate(inputs.pixel_values, inputs.input_ids, size)

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, count: int) -> Tensor:
        """Greedy ids [B, count] among the action tokens, with a key/value cache.

        Restricting the choice to the action tokens changes nothing for a trained policy and keeps a damaged one from
        producing words. Raises EngineError unless all their logits are finite.
        """
        first = self.config.token_vocab - self.config.n_action_bins
        cache = DynamicCache(config=self.language_model.config)
        embeddings = self.embed(input_ids, self.patches(pixel_values))
        chosen: list[Tensor] = []
        scores: list[Tensor] = []
        for _ in range(count):
            logits = self.language_model.lm_head(self.hidden(embeddings, cache)[:, -1])
            scores.append(logits[:, first : self.config.token_vocab])
            chosen.append(first + scores[-1].argmax(-1))
            embeddings = self.language_model.model.embed_tokens(chosen[-1])[:, None]
        finite(torch.stack(scores).float().cpu().numpy(), "torch policy: logits of the action tokens")
        return torch.stack(chosen, dim=1)
