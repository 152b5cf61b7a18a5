"""OpenVLA-OFT: one pass over [BOS][patches][state][prompt][empty actions][EOS] decides a chunk of continuous actions.

All positions see each other. A head of its own reads the states that, in a causal model, would predict the action
tokens, K of them for each of the chunk's H control steps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaModel

from calibrator.modules.chain import PROMPT, Chain, Layers, Runs, Segment
from calibrator.modules.llama import SEQUENCE, keep_rotary_frequencies, llama_config
from calibrator.modules.policy import Inputs
from calibrator.modules.prismatic import Prismatic
from calibrator.modules.vision import Mlp
from vla_policy.core.families.openvla_oft import EOS, OftConfig
from vla_policy.core.observation import finite
from vla_policy.core.prismatic.config import TextSpec

HEAD_BLOCKS = 2


class HeadBlock(nn.Module):
    """Pre-norm residual block of one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class HeadMlp(nn.Module):
    """[.., K hidden] -> [.., K]: the residual network of the L1 head."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(HeadBlock(width) for _ in range(HEAD_BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ActionHead(nn.Module):
    """Normalised actions of a chunk: states [B, H K, hidden] -> [B, H, K]."""

    def __init__(self, hidden_size: int, chunk: int, action_dim: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.model = HeadMlp(hidden_size * action_dim, hidden_size, action_dim)

    def forward(self, states: Tensor) -> Tensor:
        return self.model(states.reshape(len(states), self.chunk, -1))


class Decoder(nn.Module):
    """The Llama decoder under its published name; the checkpoint's language head never runs and is not built."""

    def __init__(self, text: TextSpec) -> None:
        super().__init__()
        self.model = LlamaModel(llama_config(text))
        keep_rotary_frequencies(self.model)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False


class OpenVLAOFT(Prismatic):
    """The policy. A policy that takes the robot's state has one more input: `state` [B, S], normalised.

    Attribute paths equal the published tensor names, those of the head and the state's projector under `action_head`
    and `proprio_projector`.
    """

    config: OftConfig

    def __init__(self, config: OftConfig) -> None:
        super().__init__(config)
        width = config.text.hidden_size
        self.language_model = Decoder(config.text)
        self.action_head = ActionHead(width, config.horizon, config.action_dim)
        if config.use_proprio:
            self.proprio_projector = Mlp(config.state_dim, width, width)

    @property
    def decoder(self) -> LlamaModel:
        return self.language_model.model

    @torch.no_grad()
    def decide(self, inputs: Inputs, size: int) -> Tensor:
        """Normalised actions, float32 [B, size]. Raises EngineError unless they are finite."""
        chain = self.chain()
        decided = chain.run(inputs)[chain.output]
        finite(decided.cpu().numpy(), "torch policy: normalised actions")
        return decided

    def chain(self, language_block: int | None = None) -> Chain:
        """The pass that decides; its output are normalised actions, float32 [B, H K]."""
        model, chunk = self.decoder, self.action_head.chunk
        size = chunk * self.config.action_dim

        def sequence(patches: Tensor, input_ids: Tensor, *state: Tensor) -> Tensor:
            words = model.embed_tokens(input_ids)
            end = model.embed_tokens(input_ids.new_full((len(words), 1), EOS))
            empty = words.new_zeros(len(words), size, words.shape[2])
            return torch.cat([words[:, :1], patches, *state, words[:, 1:], empty, end], dim=1)

        def states(x: Tensor) -> Tensor:
            """As if the empty actions were predicted from what precedes them: one position earlier each."""
            return model.norm(x)[:, -size - 2 : -2]

        def actions(states: Tensor) -> Tensor:
            return self.action_head(states).float().flatten(1)

        def decoder_runs(prompt_tokens: float, decided: int) -> tuple[Runs, ...]:
            return (Runs(self.config.num_patches + self.config.use_proprio + prompt_tokens + decided + 1),)

        state = [self._state_segment()] if self.config.use_proprio else []
        head = Layers("action_head", "action_head", "head", "head", lambda *_: (Runs(chunk),))
        return self.chain_of(
            Segment(SEQUENCE, ("projector", PROMPT, *(segment.name for segment in state)), sequence),
            Segment("states", (self.after_decoder,), states),
            Segment("actions", ("states",), actions, (head,)),
            decoder_runs,
            language_block,
            beside=state,
        )

    def _state_segment(self) -> Segment:
        """The state as one embedding, [B, 1, hidden]."""
        path = "proprio_projector"
        return Segment(
            "state_embedding",
            ("state",),
            lambda state: self.proprio_projector(state)[:, None],
            (Layers(path, path, "projector", "state projector", lambda *_: (Runs(1),)),),
        )
