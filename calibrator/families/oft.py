"""OpenVLA-OFT: one pass over [BOS][patches][state][prompt][empty actions][EOS] decides a chunk of continuous actions.

All positions see each other. A head of its own reads the states that, in a causal model, would predict the action
tokens, K of them for each of the chunk's control steps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrator.families.model import Inputs, OpenVLA
from calibrator.families.vision import Mlp
from vla_policy.core.actions import finite
from vla_policy.core.policy_config import PolicyConfig

EOS = 2
"""The id that ends every sequence; with attention to both sides it counts."""

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


class OpenVLAOFT(OpenVLA):
    """The policy. Attribute paths equal the published tensor names, those of the head and the state's projector under
    `action_head` and `proprio_projector`."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        assert config.chunk is not None
        width = config.text.hidden_size
        self.language_model.lm_head = nn.Identity()  # the checkpoint has one; it never runs
        for layer in self.language_model.model.layers:
            layer.self_attn.is_causal = False
        self.action_head = ActionHead(width, config.chunk, config.action_dim)
        if config.use_proprio:
            self.proprio_projector = Mlp(config.state_dim, width, width)

    def hidden(self, embeddings: Tensor, cache: object = None) -> Tensor:
        """Final-norm states [B, T, hidden]. Block by block: transformers' own loop would mask what comes later."""
        model = self.language_model.model
        rotary = model.rotary_emb(embeddings, torch.arange(embeddings.shape[1], device=embeddings.device)[None])
        for layer in model.layers:
            embeddings = layer(embeddings, position_embeddings=rotary)
        return model.norm(embeddings)

    def sequence(self, inputs: Inputs, patches: Tensor, decided: Tensor) -> Tensor:
        """Embeddings [B, P + S + L + D + 1, hidden]; of the decision [B, D] only its size matters."""
        words = self.language_model.model.embed_tokens(inputs.input_ids)
        end = self.language_model.model.embed_tokens(inputs.input_ids.new_full((len(words), 1), EOS))
        state = [self.state_embedding(inputs.state)] if inputs.state is not None else []
        empty = words.new_zeros(len(words), decided.shape[1], words.shape[2])
        return torch.cat([words[:, :1], patches, *state, words[:, 1:], empty, end], dim=1)

    def state_embedding(self, state: Tensor) -> Tensor:
        """[B, 1, hidden]: the embedding that follows the patches."""
        return self.proprio_projector(state)[:, None]

    def predicting(self, hidden: Tensor, decided: Tensor) -> Tensor:
        """As if the empty actions were predicted from what precedes them: one position earlier each."""
        return hidden[:, -decided.shape[1] - 2 : -2]

    def readout(self, states: Tensor) -> Tensor:
        """Normalised actions, float32 [B, H K]."""
        return self.action_head(states).float().flatten(1)

    @torch.no_grad()
    def decide(self, inputs: Inputs, size: int) -> Tensor:
        """Normalised actions, float32 [B, size]. Raises EngineError unless they are finite."""
        empty = inputs.input_ids.new_zeros(len(inputs.input_ids), size)
        embeddings = self.sequence(inputs, self.patches(inputs.pixel_values), empty)
        decided = self.readout(self.predicting(self.hidden(embeddings), empty))
        finite(decided.cpu().numpy(), "torch policy: normalised actions")
        return decided
