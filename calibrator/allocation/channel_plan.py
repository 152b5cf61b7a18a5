"""From the sensitivities of output channels and a budget to a plan whose layers are split by width: QVLA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from calibrator.allocation.channels import Channels, greedy, optimum
from calibrator.allocation.options import PLACE_BITS, added_bits
from calibrator.allocation.plan import Plan, PlanSize
from calibrator.modules.chain import Stage
from calibrator.quantizers.rows import RowBits
from calibrator.sensitivity.channel_table import ChannelLayer, ChannelTable
from vla_policy.core.errors import BudgetError
from vla_policy.core.formats import FULL, FULL_PRECISION, Choice

ChannelSolver = Literal["HIGHS", "GREEDY"]
PUBLISHED_KEEP: tuple[Stage, ...] = ("projector", "head")
_FULL_BITS = FULL_PRECISION.weight_bits


@dataclass(frozen=True)
class ChannelRequest:
    """What shapes a plan besides the table.

    keep: stages whose layers keep 16 bits, as published the projector and the head. prune: whether channels may be
    absent, of every layer all but the one that would be missed most: a layer without any would leave those before it
    without effect, whose scores and bits the plan counts. published: the average is over channels, each counting once,
    of the layers that are not kept, as in Eq. (7); otherwise over all weights, as every other plan's, so that equal
    averages are equal bytes of codes.
    """

    average_bits: float
    keep: tuple[Stage, ...] = PUBLISHED_KEEP
    solver: ChannelSolver = "HIGHS"
    prune: bool = True
    published: bool = False
    float_bits: int = 16


def plan_channels(table: ChannelTable, request: ChannelRequest) -> Plan:
    """Raises BudgetError for a budget that cannot be met."""
    chosen = [layer for layer in table.layers if layer.shape.stage not in request.keep]
    if not chosen:
        raise BudgetError(f"--keep {' '.join(request.keep)}: leaves no layer to choose widths for")
    channels, average = _channels(table, chosen, request), _average(table, chosen, request)
    by_greedy = greedy(channels, average)
    if request.solver == "GREEDY":
        picks, bound = by_greedy, 0.0
    else:
        picks, bound = optimum(channels, average)
    objective = channels.total(picks)
    assignment, rows = _assign(table, chosen, channels.bits[picks])
    code_bits, size = _size(table, assignment, rows, request.float_bits)
    greedy_score = channels.total(by_greedy)
    details: dict[str, Any] = {
        "parents": {
            "channels_sha256": table.sha256,
            "policy_sha256": table.policy_sha256,
            "calibration_sha256": table.calibration_sha256,
        },
        "conventions": table.conventions,
        "signal": "action error per output channel",
        "kept_stages": list(request.keep),
        "average_over": "channels that may be chosen" if request.published else "all weights",
        "average_bits_budget": request.average_bits,
        "channels_by_bits": {str(bits): int((channels.bits[picks] == bits).sum()) for bits in channels.bits},
        "exact_channels": table.meta["exact_channels"],
        "greedy": {
            "objective": greedy_score,
            "above_optimum": (greedy_score - objective) / objective if objective > 0 else 0.0,
        },
    }
    macs = {layer.shape.name: layer.shape.macs / layer.shape.outputs for layer in table.layers}
    return Plan(
        assignment=assignment,
        policy_sha256=table.policy_sha256,
        alpha=0.0,
        beta=0.0,
        objective=objective,
        bound=bound,
        gap=(objective - bound) / objective if objective > 0 else 0.0,
        solver=request.solver,
        average_bits=code_bits / sum(layer.shape.params for layer in table.layers),
        size=size,
        bitops=round(sum(bits * macs[name] * _FULL_BITS for name, bits in _row_bits(table, assignment, rows).items())),
        latency_ms=None,
        target="cpu",
        details=details,
        rows=rows,
    )


def _channels(table: ChannelTable, chosen: Sequence[ChannelLayer], request: ChannelRequest) -> Channels:
    """The widths from the most bits down; 16 bits are the reference, so that they do nothing."""
    bits = [0, *(choice.format.weight_bits for choice in table.choices), _FULL_BITS]
    scores = np.concatenate([_with_one_kept(table.scores(layer)) for layer in chosen], 1).T
    scores = np.concatenate([scores, np.zeros((len(scores), 1))], 1)
    sizes = np.repeat([layer.shape.inputs for layer in chosen], [layer.shape.outputs for layer in chosen])
    widths = slice(None) if request.prune else slice(1, None)
    size_of_each = np.ones_like(sizes) if request.published else sizes
    return Channels(np.array(bits[widths])[::-1], scores[:, widths][:, ::-1], size_of_each)


def _with_one_kept(scores: np.ndarray) -> np.ndarray:
    """A layer's scores [widths, channels], where the channel that loses most by its last step may not be absent."""
    kept = scores.copy()
    kept[0, np.argmax(scores[0] - scores[1])] = np.inf
    return kept


def _average(table: ChannelTable, chosen: Sequence[ChannelLayer], request: ChannelRequest) -> float:
    """What is left of the budget for the channels that are chosen."""
    if request.published:
        return request.average_bits
    every, mine = (sum(layer.shape.params for layer in layers) for layers in (table.layers, chosen))
    left = (request.average_bits * every - _FULL_BITS * (every - mine)) / mine
    width = min(choice.format.weight_bits for choice in table.choices)
    least = width * sum(layer.shape.inputs * (1 if request.prune else layer.shape.outputs) for layer in chosen)
    if left * mine < least:
        smallest = (least + _FULL_BITS * (every - mine)) / every
        kept = f" with {' and '.join(request.keep)} at 16 bits" if request.keep else ""
        raise BudgetError(f"average bits {request.average_bits:g} are below the least{kept}, {smallest:.3f}; raise it")
    return left


def _assign(
    table: ChannelTable, chosen: Sequence[ChannelLayer], picked: np.ndarray
) -> tuple[dict[str, Choice], RowBits]:
    """The choices by layer and part. A layer whose rows are all alike stays whole."""
    of_bits = {choice.format.weight_bits: choice for choice in table.choices} | {_FULL_BITS: FULL}
    assignment, split, place = {layer.shape.name: FULL for layer in table.layers}, {}, 0
    for layer in chosen:
        mine = picked[place : place + layer.shape.outputs]
        place += layer.shape.outputs
        if len(set(mine.tolist())) == 1 and mine[0]:
            assignment[layer.shape.name] = of_bits[int(mine[0])]
            continue
        bits = np.zeros(layer.rows, np.uint8)
        bits[layer.first : layer.first + layer.shape.outputs] = mine
        split[layer.shape.name] = bits
    rows = RowBits(split)
    units = rows.units(layer.shape.name for layer in table.layers)
    return {name: of_bits[rows.parts[name].bits] if name in rows.parts else assignment[name] for name in units}, rows


def _row_bits(table: ChannelTable, assignment: dict[str, Choice], rows: RowBits) -> dict[str, int]:
    """The sum of the bits of a layer's channels."""
    found = {}
    for layer in table.layers:
        name = layer.shape.name
        whole = rows.bits.get(name)
        bits = layer.shape.outputs * assignment[name].format.weight_bits if whole is None else int(whole.sum())
        found[name] = bits
    return found


def _size(
    table: ChannelTable, assignment: dict[str, Choice], rows: RowBits, float_bits: int
) -> tuple[int, PlanSize]:
    """Bits of codes, 16-bit weights counting 16, and the plan's size; the places of split layers' rows count as what is
    not quantized."""
    by_name = {layer.shape.name: layer.shape for layer in table.layers}
    code_bits = weight_bits = scale_bits = 0
    for name, choice in assignment.items():
        part = rows.parts.get(name)
        shape = by_name[part.layer if part else name]
        outputs = len(part.rows) if part else shape.outputs
        code_bits += outputs * shape.inputs * choice.format.weight_bits
        scale_bits += added_bits(outputs, shape.inputs, choice)
        weight_bits += outputs * shape.inputs * (float_bits if choice == FULL else choice.format.weight_bits)
    unquantized = table.meta["unquantized_params"] * float_bits
    unquantized += PLACE_BITS * sum(by_name[name].outputs for name in rows.bits)
    return code_bits, PlanSize(weight_bits, scale_bits, unquantized)
