"""What the two architectures share: a builder, a checkpoint, the plan, and how a layer of a format is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import numpy_helper

from calibrator.families.loading import Tensors
from calibrator.quantizers import Codes
from calibrator.quantizers.rows import WHOLE, RowBits
from engine_build.graph.builder import GraphBuilder
from engine_build.graph.turning import turned
from engine_build.weights import Layer, LayerWeights, as_float32, layer_weights, part_of
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Choice
from vla_policy.core.program import Sequences

LinearWriter = Callable[[GraphBuilder, str, LayerWeights], str]
"""Writes one linear layer behind a value of the graph; returns the result's name."""

OnLayer = Callable[[Layer, str, str], None]


@dataclass(frozen=True)
class GraphContext:
    """Everything that writing a graph needs.

    layers: whole ones. rows: of those that are split. codes: of the layers' weights. on_layer: called with each layer,
    or part of one, once it is written, and with the names of its input and its result in the graph.
    input_peaks: largest |input| of layers whose activations get a fixed scale. fused, own_attention, sequences: see
    `Dialect`.
    """

    builder: GraphBuilder
    tensors: Tensors
    layers: Mapping[str, Layer]
    assignment: Mapping[str, Choice]
    codes: Codes
    write_linear: LinearWriter
    on_layer: OnLayer
    input_peaks: Mapping[str, float]
    fused: bool = False
    own_attention: str | None = None
    rows: RowBits = WHOLE
    sequences: Sequences = Sequences.FREE

    io_dtype = np.dtype(np.float32)

    def linear(self, x: str, name: str) -> str:
        """The layer called `name`, as planned, applied to `x` [1, tokens, in].

        A layer in parts has one product for each, and its outputs are then put back in order; an absent row gives its
        bias. Raises ArtefactError or PolicyError for weights that its format cannot hold.
        """
        layer = self.layers[name]
        if name not in self.rows.bits:
            return self._product(x, layer)
        parts = self.rows.of(name)
        columns = [self._product(x, part_of(layer, part)) for part in parts]
        order = [part.rows.numpy() for part in parts]
        kept = layer.rows or range(layer.outputs)
        absent = kept.start + np.flatnonzero(self.rows.bits[name][kept.start : kept.stop] == 0)
        if len(absent):
            columns.append(self._absent(x, layer, absent))
            order.append(absent)
        together = columns[0] if len(columns) == 1 else self.builder.concat(columns, -1, f"{name}.sorted")
        places = np.argsort(np.concatenate(order)).astype(np.int32)
        return self.builder.node("Gather", [together, self.builder.tensor(f"{name}.places", places)], name, axis=-1)

    def _absent(self, x: str, layer: Layer, rows: np.ndarray) -> str:
        """[1, tokens, rows]: what a layer gives without weights."""
        tokens = self.builder.slice(self.builder.node("Shape", [x]), 0, 2, 0)
        one = numpy_helper.from_array(np.zeros(1, self.builder.float_dtype))
        zeros = self.builder.node(
            "ConstantOfShape", [self.builder.concat([tokens, self.builder.ints(len(rows))], 0)], value=one
        )
        if not layer.bias:
            return zeros
        bias = as_float32(self.tensors.tensor(f"{layer.name}.bias"))[rows]
        return self.builder.add(zeros, self.builder.tensor(f"{layer.name}.absent.bias", bias, self.builder.float_dtype))

    def _product(self, x: str, layer: Layer) -> str:
        name = layer.name
        weights = layer_weights(self.tensors, layer, self.assignment[name], self.codes, self.input_peaks.get(name))
        most = float(np.finfo(self.builder.float_dtype).max)
        if weights.quantized is not None and weights.quantized.peak > most:
            raise ArtefactError(
                f"{name}: its weights reach {weights.quantized.peak:.3g}, not finite in the activations' "
                f"{np.dtype(self.builder.float_dtype)} (at most {most:.3g}); check the checkpoint"
            )
        operator = weights.quantized.operator if weights.quantized else None
        multiplied = x if operator is None else turned(self.builder, x, operator, name)
        result = self.write_linear(self.builder, multiplied, weights)
        self.on_layer(layer, x, result)
        return result

    def layer_norm(self, x: str, name: str, eps: float) -> str:
        """LayerNorm over the last axis with the checkpoint's weight and bias."""
        weight, bias = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self.builder.node("LayerNormalization", [x, weight, bias], name, axis=-1, epsilon=eps)

    def parameter(self, name: str, dtype: type | None = None) -> str:
        """A small tensor of the checkpoint (norm, position, bias), in the activations' type unless `dtype` is given."""
        values = as_float32(self.tensors.tensor(name))
        return self.builder.tensor(name, values, dtype or self.builder.float_dtype)
