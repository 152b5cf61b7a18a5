"""What a layer's stored tensors give for an input, in NumPy: the numbers that an engine's layer is compared with.

Codes and scales are read out of the graph as it was written, in each of the forms of `linear` and `linear_plugin`, so
that neither the policy nor torch is needed. Sums are float32.
"""

import functools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from engine_build.backends.base import RUN, SLAB, Layer
from engine_build.backends.tensorrt.readback import stored_bytes
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format

_TOP = np.float32(127)


class StoredGraph:
    """A graph's tensors, read when they are wanted."""

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def of(path: Path) -> "StoredGraph":
        """The graph at `path`, opened once."""
        return StoredGraph(path)

    def __init__(self, path: Path) -> None:
        self._path = path
        graph = onnx.load(str(path), load_external_data=False).graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = {node.name: node for node in graph.node}

    def result(self, layer: Layer, fmt: Format, x: np.ndarray) -> np.ndarray:
        """float32 [tokens, out] of x [tokens, in], bias added. Raises ArtefactError for a layer that is not there."""
        weight = self._weight(layer, fmt)
        y: np.ndarray = self._rounded(layer, fmt, x.astype(np.float32)) @ weight
        return y + self._array(f"{layer.name}.bias").astype(np.float32) if f"{layer.name}.bias" in self._tensors else y

    def _rounded(self, layer: Layer, fmt: Format, x: np.ndarray) -> np.ndarray:
        """Activations as the layer multiplies them: rounded with a fixed scale by Q/DQ, or per token by a plugin."""
        if fmt.activation_bits == 16:
            return x
        node = self._nodes.get(f"{layer.name}.input_codes")
        if node is not None and node.op_type == "QuantizeLinear":
            step = np.float32(self._array(node.input[1]))
            return np.clip(np.rint(x / step), -128, 127) * step
        peaks = np.abs(x).max(1, keepdims=True)
        steps = np.where(peaks > 0, peaks / _TOP, np.float32(1))
        return np.clip(np.rint(x / steps), -127, 127) * steps

    def _weight(self, layer: Layer, fmt: Format) -> np.ndarray:
        """float32 [in, out]."""
        name = layer.name
        if fmt.weight_bits == 16:
            return self._array(f"{name}.weight").astype(np.float32)
        codes, scales = self._tensor(f"{name}.codes"), self._array(f"{name}.scales").astype(np.float32)
        if codes.data_type == TensorProto.INT32:
            return _of_slabs(self._array(f"{name}.codes"), scales, layer, fmt)
        if fmt.weight_bits == 8:
            return self._array(f"{name}.codes").astype(np.float32) * scales
        if fmt.weight_bits != 4:
            raise ArtefactError(f"{name}: {fmt} is not read without its policy; compare it with `verify`")
        rows, columns = codes.dims
        values = _signed(stored_bytes(self._path, codes), 4)[: rows * columns].reshape(len(scales), -1, columns)
        whole: np.ndarray = (values * scales[:, None, :]).reshape(rows, columns)
        return whole[: layer.inputs]

    def _tensor(self, name: str) -> onnx.TensorProto:
        if name not in self._tensors:
            raise ArtefactError(f"{self._path}: holds no {name}; build the engine again")
        return self._tensors[name]

    def _array(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        if not tensor.external_data:
            return numpy_helper.to_array(tensor)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        return stored_bytes(self._path, tensor).view(dtype).reshape(tensor.dims)


def _signed(content: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 2 or 4 bits as int8, the first in the lowest bits of a byte."""
    lanes = [(content << np.uint8(8 - bits - shift)).view(np.int8) >> (8 - bits) for shift in range(0, 8, bits)]
    return np.stack(lanes, axis=-1).reshape(-1)


def _of_slabs(words: np.ndarray, scales: np.ndarray, layer: Layer, fmt: Format) -> np.ndarray:
    """float32 [in, out] of what `pack_runs` and `pack_scales` have put in order; see there."""
    bits, slabs = fmt.weight_bits, len(words) // SLAB
    codes = _signed(words.reshape(-1).view(np.uint8), bits)
    order: tuple[int, ...]
    if bits == 2:
        ordered, order = codes.reshape(slabs, -1, 8, 4, 2, 2, 2, 2, 4), (0, 3, 2, 6, 1, 4, 8, 5, 7)
    else:
        ordered, order = codes.reshape(slabs, -1, 2, 8, 4, 4, 4, 2), (0, 3, 1, 2, 5, 4, 7, 6)
    rows = ordered.transpose(np.argsort(order)).reshape(slabs * SLAB, -1, RUN).reshape(slabs * SLAB, -1)
    by_row = scales.reshape(slabs, scales.shape[1], SLAB // 2, 2).transpose(0, 3, 2, 1).reshape(len(words), -1)
    whole: np.ndarray = rows * by_row.repeat(rows.shape[1] // by_row.shape[1], 1)
    return whole[: layer.outputs, : layer.inputs].T
