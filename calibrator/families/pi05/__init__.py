"""pi0.5: a chunk of continuous actions, integrated from noise."""

from calibrator.families.base import Family
from calibrator.families.pi05.decisions import FlowDecisions
from calibrator.families.pi05.model import PREFIX, Pi05
from vla_policy.core.flow.config import FlowConfig


def dead_tensors(config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors that inference never reads."""
    text, expert = config.text, config.expert
    last = f"{PREFIX}.layers.{text.num_hidden_layers - 1}"
    return {
        "paligemma_with_expert.gemma_expert.lm_head.weight": (config.vocab_size, expert.hidden_size),
        f"{last}.self_attn.q_proj.weight": (text.query_width, text.hidden_size),
        f"{last}.self_attn.o_proj.weight": (text.hidden_size, text.query_width),
        f"{last}.mlp.gate_proj.weight": (text.intermediate_size, text.hidden_size),
        f"{last}.mlp.up_proj.weight": (text.intermediate_size, text.hidden_size),
        f"{last}.mlp.down_proj.weight": (text.hidden_size, text.intermediate_size),
        f"{last}.post_attention_layernorm.weight": (text.hidden_size,),
        f"{PREFIX}.norm.weight": (text.hidden_size,),
    }


FAMILY = Family(build=Pi05, dead_tensors=dead_tensors, decisions=FlowDecisions.of)
