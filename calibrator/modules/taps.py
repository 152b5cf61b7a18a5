"""What goes into layers and what comes out, with the graph that a pass leaves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def taps(layers: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """Inside the block, forward passes fill two dicts with their graph's tensors: inputs and outputs by layer."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = []
    for name, module in layers.items():

        def enter(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> Tensor:
            # An alias of its own: what arrives there is this layer's gradient alone, even if others share the input.
            inputs[name].append(args[0].view_as(args[0]))
            return inputs[name][-1]

        def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            outputs[name].append(output)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def token_rows(x: Tensor, states: int) -> Tensor:
    """Layer output as [B, tokens of all images, channels]."""
    rows = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    return rows.reshape(states, -1, rows.shape[-1])
