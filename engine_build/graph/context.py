"""What the two architectures share: a builder, a checkpoint, the plan, and how a layer of a format is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from calibrator.families.loading import Tensors
from calibrator.quantizers import Codes
from engine_build.graph.builder import GraphBuilder
from engine_build.weights import Layer, LayerWeights, as_float32, layer_weights
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Choice

LinearWriter = Callable[[GraphBuilder, str, LayerWeights], str]
"""Writes one linear layer behind a value of the graph; returns the result's name."""

OnLayer = Callable[[Layer, str, str], None]


@dataclass(frozen=True)
class GraphContext:
    """Everything that writing a graph needs.

    codes: of the layers' weights. on_layer: called with each layer once it is written, and with the names of its input
    and its result in the graph.
    input_peaks: largest |input| of layers whose activations get a fixed scale. fused: see `Dialect`.
    """

    builder: GraphBuilder
    tensors: Tensors
    layers: Mapping[str, Layer]
    assignment: Mapping[str, Choice]
    codes: Codes
    write_linear: LinearWriter
    on_layer: OnLayer
    input_peaks: Mapping[str, float]
    fused: bool

    io_dtype = np.dtype(np.float32)

    def linear(self, x: str, name: str) -> str:
        """The layer called `name`, as planned, applied to `x` [1, tokens, in].

        Raises ArtefactError or PolicyError for weights that its format cannot hold.
        """
        layer = self.layers[name]
        weights = layer_weights(self.tensors, layer, self.assignment[name], self.codes, self.input_peaks.get(name))
        most = float(np.finfo(self.builder.float_dtype).max)
        if weights.quantized is not None and weights.quantized.peak > most:
            raise ArtefactError(
                f"{name}: its weights reach {weights.quantized.peak:.3g}, not finite in the activations' "
                f"{np.dtype(self.builder.float_dtype)} (at most {most:.3g}); check the checkpoint"
            )
        result = self.write_linear(self.builder, x, weights)
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
