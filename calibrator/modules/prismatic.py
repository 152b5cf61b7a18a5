"""Prismatic VLMs: two vision towers, a projector and a Llama decoder, whatever decides behind it."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import LlamaModel

from calibrator.modules.chain import Chain, Runs, Segment
from calibrator.modules.llama import block_input, block_segments, existing_block
from calibrator.modules.policy import Policy
from calibrator.modules.vision import Projector, VisionBackbone, dead_tower_tensors
from vla_policy.core.prismatic.config import PrismaticConfig


class Prismatic(Policy):
    """The published names of what all of them have. Their inputs are `pixel_values` [B, 6 N, S, S] of N images and
    `PROMPT`, int64 [B, L]."""

    config: PrismaticConfig

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__(config)
        self.vision_backbone = VisionBackbone(config.towers, config.num_images)
        self.projector = Projector(config.vision_dim, config.text.hidden_size)

    @property
    def decoder(self) -> LlamaModel:
        """`language_model.model`."""
        raise NotImplementedError

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Projected patch embeddings: [B, 6 N, S, S] of N images -> [B, N P, hidden]."""
        return self.projector(self.vision_backbone(pixel_values))

    def chain_of(
        self,
        sequence: Segment,
        states: Segment,
        head: Segment,
        decoder_runs: Callable[[float, int], tuple[Runs, ...]],
        language_block: int | None,
        beside: Sequence[Segment] = (),
    ) -> Chain:
        """The chain with what differs between families.

        sequence: the decoder's input, from `projector`. states: the head's input, from `after_decoder`. head: the
        policy's output. decoder_runs: of the decoder's layers for one decision. beside: segments of which only
        `sequence` reads.
        """
        block = existing_block(self.decoder, language_block)
        projector = self.projector.segment("projector", self.config.num_patches)
        blocks = block_segments(self.decoder, "language_model.model", decoder_runs)
        side = self.config.image_size // self.config.towers[0].patch_size
        return Chain(
            preamble=(*self.vision_backbone.segments("vision_backbone"), *beside),
            trunk=(projector, sequence, *blocks, states, head),
            boundaries={
                "vision": "vision",
                "projector": projector.name,
                "language": block_input(block),
                "head": states.name,
            },
            language_block=block,
            image_grid=(self.config.num_images * side, side),
        )

    @property
    def after_decoder(self) -> str:
        """The value that leaves the decoder's last block."""
        return block_input(len(self.decoder.layers))


def dead_tensors(config: PrismaticConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors that inference never reads."""
    return dead_tower_tensors("vision_backbone", config.towers)
