"""A policy as its engine computes it: some layers' weights in codes, their inputs rounded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from calibrator.quantizers.activations import PER_TOKEN, InputScale, InputScales, quantize_input
from calibrator.quantizers.base import Codes
from calibrator.quantizers.compute import Computed
from calibrator.quantizers.rows import WHOLE, Part, RowBits
from vla_policy.core.errors import ArtefactError, PolicyError
from vla_policy.core.formats import FULL_PRECISION, Choice


def computes_in(policy: nn.Module) -> torch.dtype:
    """The widest type of its parameters; matrices may be held in a narrower one (`families.load_policy`)."""
    return max((parameter.dtype for parameter in policy.parameters()), key=lambda dtype: dtype.itemsize)


def find_layer(policy: nn.Module, unit: str) -> nn.Linear | nn.Conv2d:
    """The linear or convolution layer called `unit`. Raises PolicyError naming what is there instead."""
    try:
        module = policy.get_submodule(unit)
    except AttributeError as error:
        raise PolicyError(f"policy has no layer {unit!r}; the plan belongs to another policy") from error
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise PolicyError(f"{unit!r} is a {type(module).__name__}; only linear and convolution layers are quantized")
    return module


def _apply(policy: nn.Module, unit: str, choice: Choice, codes: Codes, scale: InputScale) -> Callable[[], None]:
    """Puts one layer into its choice; returns what takes that back, bit for bit."""
    module = find_layer(policy, unit)
    original, fmt = module.weight.data, choice.format
    operator, hook = None, None
    if choice.recipe is not None:
        coded = codes.of(unit, original, choice)
        module.weight.data, operator = coded.dequantize().to(computes_in(policy)), coded.operator
    if operator is not None or fmt.activation_bits < FULL_PRECISION.activation_bits:
        hook = module.register_forward_pre_hook(
            lambda layer, args: (quantize_input(layer, args[0], fmt, scale, operator), *args[1:])
        )

    def restore() -> None:
        module.weight.data = original
        if hook is not None:
            hook.remove()

    return restore


@contextmanager
def quantized(
    policy: nn.Module,
    unit: str,
    choice: Choice,
    codes: Codes | None = None,
    scale: InputScale = PER_TOKEN,
) -> Iterator[None]:
    """Runs the block with one layer in `choice` and everything else as it was; restored bit for bit, even on errors.

    Weights of 16 bits are left alone, and so are activations of 16 bits. codes: computed unless somebody has them.
    scale: of activations below 16 bits.
    """
    restore = _apply(policy, unit, choice, codes or Computed(), scale)
    try:
        yield
    finally:
        restore()


def quantize_policy(
    policy: nn.Module,
    assignment: Mapping[str, Choice],
    codes: Codes | None = None,
    scales: InputScales | None = None,
    rows: RowBits = WHOLE,
) -> None:
    """Quantizes the named layers for good, in place; the simulated twin of the engine that the plan gives.

    scales: of activations below 16 bits, None for per token. rows: of layers of which the assignment names parts.
    Raises ArtefactError for a fixed scale that is not known.
    """
    codes, found = codes or Computed(), scales or InputScales()
    for unit, choice in assignment.items():
        if unit not in rows.parts:
            _apply(policy, unit, choice, codes, found.of(unit, choice.format))
    for layer in rows.bits:
        _apply_parts(policy, layer, rows.of(layer), assignment, codes)


def _apply_parts(
    policy: nn.Module, layer: str, parts: Sequence[Part], assignment: Mapping[str, Choice], codes: Codes
) -> None:
    """Every part's rows by its own codes, and zeros where a row is absent."""
    module = find_layer(policy, layer)
    original = module.weight.data
    changed = torch.zeros_like(original, dtype=computes_in(policy))
    for part in parts:
        rows, choice = original[part.rows], assignment[part.name]
        found = rows
        if choice.recipe is not None:
            coded = codes.of(part.name, rows, choice)
            if coded.operator is not None:
                raise ArtefactError(f"{part.name} in {choice}: a layer with several widths has one input for all rows")
            found = coded.dequantize()
        changed[part.rows] = found.to(changed.dtype)
    module.weight.data = changed
