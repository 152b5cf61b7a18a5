"""Bytes of pi0.5 and pi0 at their published size, from the published list of tensors, beside QuantVLA's 1.28 GB."""

import json
import re
from math import prod
from pathlib import Path

import pytest

from benchmarks.pi05_engine import account, by_shapes, parts, plan_of, published
from calibrator.quantizers import parse_choice

LISTS = json.loads((Path(__file__).parents[1] / "data/pi05_tensors.json").read_text())
CHOICE = parse_choice("w4a8_g128")
_BLOCK = r"\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$"


def published_weights(variant: str) -> dict[str, int]:
    """Numbers of every published tensor."""
    found = LISTS["pi05"]
    if variant == "pi0":
        found = {name: shape for name, shape in found.items() if name not in LISTS["only_in_pi05"]}
        found |= LISTS["only_in_pi0"]
    return {name: prod(shape) for name, shape in found.items()}


def total(weights: dict[str, int], pattern: str) -> int:
    return sum(number for name, number in weights.items() if re.search(pattern, name))


@pytest.mark.parametrize("variant", ["pi05", "pi0"])
def test_every_part_s_bytes_follow_from_the_published_tensors(variant: str) -> None:
    config, weights = published(variant), published_weights(variant)
    sizes = parts(by_shapes(config, plan_of(config, "quantvla", CHOICE)), config)
    unread = total(weights, r"language_model\.layers\.17\.(self_attn\.[qo]|mlp\.\w+)_proj\.weight$")
    assert unread == 109_051_904
    language = total(weights, rf"language_model{_BLOCK}") - unread
    attention, mlps = (total(weights, rf"gemma_expert.*{part}\.\w+_proj\.weight$") for part in ("self_attn", "mlp"))
    around = r"^(state_proj|action_(in|out)_proj|action_time_mlp_(in|out))\.weight$"
    plain = {
        "vision": r"vision_tower.*(_proj|fc[12]|patch_embedding)\.weight$",
        "projector": r"multi_modal_projector\.linear\.weight$",
        "around the expert": around,
        "prompt embedding": r"paligemma\.lm_head\.weight$",
    }
    for part, pattern in plain.items():
        number = total(weights, pattern)
        assert (sizes[part].weights, sizes[part].stored) == (number, 2 * number), part
    assert (sizes["expert, attention"].weights, sizes["expert, attention"].stored) == (attention, 2 * attention)
    for part, number in (("language", language), ("expert, MLPs", mlps)):
        # Codes of 4 bits, a float16 scale for 128 of them.
        assert (sizes[part].weights, sizes[part].stored) == (number, number // 2 + 2 * number // 128), part


def test_the_paper_s_figure_counts_language_model_and_expert_alone() -> None:
    """4.27 are GiB of their linear layers at 16 bits, dead ones too; embedding and vision are 1.88 GB more."""
    weights = published_weights("pi05")
    counted = total(weights, rf"(language_model|gemma_expert).*{_BLOCK}")
    kept = total(weights, r"gemma_expert.*self_attn\.\w+_proj\.weight$")
    full, small = 2 * counted, (counted - kept) / 2 + 2 * kept
    assert round(full / 2**30, 2) == 4.27 and small == pytest.approx(1.28e9, rel=0.01)
    config = published("pi05")
    sizes = parts(by_shapes(config, plan_of(config, "quantvla", CHOICE)), config)
    told = account(sizes, config, CHOICE, None)
    assert f"{counted:,} weights of language model and expert = 4.59 GB = 4.27 GiB at 16 bits, 1.27 GB" in told
    left_out = sum(sizes[part].stored for part in ("prompt embedding", "vision", "projector"))
    assert left_out == pytest.approx(1.88e9, rel=0.005)
    together = sum(size.stored for size in sizes.values()) + 4 * 37 * 3 * 1024 * 10  # and the table of 37 norms
    assert f"{together:,}" in told and together == pytest.approx(3.14e9, rel=0.001)
