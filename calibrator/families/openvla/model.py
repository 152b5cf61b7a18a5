"""OpenVLA: action tokens decided one after another by the Llama decoder behind vision backbone and projector."""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel

from calibrator.modules.chain import DECIDED, PAD, PROMPT, Chain, Layers, Runs, Segment
from calibrator.modules.llama import SEQUENCE, keep_rotary_frequencies, llama_config
from calibrator.modules.policy import Inputs
from calibrator.modules.prismatic import Prismatic
from vla_policy.core.observation import finite
from vla_policy.core.prismatic.config import PrismaticConfig


class OpenVLA(Prismatic):
    """The policy.

    A sequence is [BOS][patches][prompt][action tokens]. Along the chain shorter ones of a batch end with padding, which
    causal attention never looks at; `decide` takes prompts of one length.
    """

    pads_prompts = True

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__(config)
        self.language_model = LlamaForCausalLM(llama_config(config.text))
        keep_rotary_frequencies(self.language_model.model)

    @property
    def decoder(self) -> LlamaModel:
        return self.language_model.model

    def embed(self, input_ids: Tensor, patches: Tensor) -> Tensor:
        """Input embeddings [B, L + P, hidden]: the patches follow BOS."""
        words = self.language_model.model.embed_tokens(input_ids)
        return torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)

    def hidden(self, embeddings: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Final-norm hidden states [B, T, hidden]; `cache` is read and extended if given."""
        output = self.language_model.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state

    @torch.no_grad()
    def decide(self, inputs: Inputs, size: int) -> Tensor:
        """Greedy action tokens, int64 [B, size], with a key/value cache.

        Restricting the choice to the action tokens changes nothing for a trained policy and keeps a damaged one from
        producing words. Raises EngineError unless all their logits are finite.
        """
        first = self.config.token_vocab - self.config.n_action_bins
        cache = DynamicCache(config=self.language_model.config)
        embeddings = self.embed(inputs[PROMPT], self.patches(inputs["pixel_values"]))
        chosen: list[Tensor] = []
        scores: list[Tensor] = []
        for _ in range(size):
            logits = self.language_model.lm_head(self.hidden(embeddings, cache)[:, -1])
            scores.append(logits[:, first : self.config.token_vocab])
            chosen.append(first + scores[-1].argmax(-1))
            embeddings = self.language_model.model.embed_tokens(chosen[-1])[:, None]
        finite(torch.stack(scores).float().cpu().numpy(), "torch policy: logits of the action tokens")
        return torch.stack(chosen, dim=1)

    def chain(self, language_block: int | None = None) -> Chain:
        """One pass that scores the action tokens `decided` [B, K]; its output are the logits, float32 [B, K, vocab]."""
        model = self.decoder

        def sequence(patches: Tensor, input_ids: Tensor, decided: Tensor) -> Tensor:
            """What was decided follows each prompt's own end; padding is word 0."""
            given = decided[:, :-1]
            words = torch.cat([input_ids.clamp_min(0), torch.zeros_like(given)], dim=1)
            return self.embed(words.scatter(1, _behind(input_ids, given), given), patches)

        def states(x: Tensor, decided: Tensor, input_ids: Tensor) -> Tensor:
            """What predicts `decided`."""
            place = self.config.num_patches - 1 + _behind(input_ids, decided)
            return model.norm(x.gather(1, place[..., None].expand(-1, -1, x.shape[2])))

        def logits(states: Tensor) -> Tensor:
            return self.language_model.lm_head(states).float()

        def decoder_runs(prompt_tokens: float, decided: int) -> tuple[Runs, ...]:
            """The sequence once, then a token for each that is still to be decided."""
            return Runs(self.config.num_patches + prompt_tokens), Runs(1, decided - 1)

        head = Layers(
            "language_model.lm_head", "lm_head", "head", "head", lambda _, decided: (Runs(1, decided),),
            rows=self.config.action_tokens,
        )  # fmt: skip
        return self.chain_of(
            Segment(SEQUENCE, ("projector", PROMPT, DECIDED), sequence),
            Segment("states", (self.after_decoder, DECIDED, PROMPT), states),
            Segment("logits", ("states",), logits, (head,)),
            decoder_runs,
            language_block,
        )


def _behind(input_ids: Tensor, decided: Tensor) -> Tensor:
    """Places right behind each prompt [B, L], as many as were decided [B, K]: int64 [B, K]."""
    ends = (input_ids != PAD).sum(1, keepdim=True)
    return ends + torch.arange(decided.shape[1], device=ends.device)
