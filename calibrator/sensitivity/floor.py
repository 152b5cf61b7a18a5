"""The noise floor of scores: what a layer loses by a change that is none.

With a layer's inputs in reverse order, x and W alike, the product is the same but for the rounding of its sums.
Whatever Eqs. (5) to (10) make of that is what they make of float32's rounding anywhere: a score below it says nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from calibrator.quantizers import find_layer


@contextmanager
def reordered(policy: nn.Module, unit: str) -> Iterator[None]:
    """Runs the block with the inputs (of a convolution: channels) of one layer in reverse order."""
    module = find_layer(policy, unit)
    original, axis = module.weight.data, 1 if isinstance(module, nn.Conv2d) else -1
    module.weight.data = original.flip(1)
    hook = module.register_forward_pre_hook(lambda _, args: (args[0].flip(axis), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
        module.weight.data = original
