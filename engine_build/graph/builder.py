"""A small writer of ONNX graphs whose weights stream to one external file, so that no model ever has to fit twice."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vla_policy.core.errors import ArtefactError

_OPSET = 21
"""The first with 4-bit integers: older runtimes on robots read no later one."""
_LATER_TYPES: dict[int, int] = {TensorProto.INT2: 25, TensorProto.UINT2: 25}
_LATER_OPERATORS = {"RotaryEmbedding": 23, "TensorScatter": 24}
_INLINE_BYTES = 1024
_PAGE = 4096
_LINE = 64
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_NUMPY: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
_FLOATS = (*_NUMPY, TensorProto.BFLOAT16)


def _refuse_not_finite(name: str, data_type: int, content: bytes) -> None:
    """Every number that an engine holds passes here."""
    if data_type not in _FLOATS:
        return
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    if not np.isfinite(np.frombuffer(content, dtype)).all():
        raise ArtefactError(
            f"{name}: holds numbers that are not finite in {dtype}; the checkpoint is damaged, or its numbers are too "
            "large for an engine"
        )


class DataFile(Protocol):
    """Where a graph's long tensors go, one after another."""

    def write(self, content: bytes, /) -> int:
        """Appends."""
        ...

    def tell(self) -> int:
        """Bytes so far."""
        ...

    def flush(self) -> None:
        """Called once, behind the last byte."""
        ...

    def close(self) -> None:
        """Called in any case."""
        ...


class GraphBuilder:
    """Collects nodes and tensors of one graph. Use as a context manager: the data file is closed at the end.

    float_type: ONNX type of the activations, TensorProto.FLOAT or FLOAT16.
    """

    def __init__(self, path: Path, float_type: int = TensorProto.FLOAT) -> None:
        self.path = path
        self.float_type = float_type
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._domains: set[str] = set()
        self._shared: dict[tuple[str, str], list[str]] = {}
        self._data_path = path.with_suffix(".data")
        self._data = self._open_data(self._data_path)

    def __enter__(self) -> "GraphBuilder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def _open_data(self, path: Path) -> DataFile:
        return open(path, "wb")

    def _write_graph(self, content: bytes) -> None:
        self.path.write_bytes(content)

    @property
    def float_dtype(self) -> Any:
        """NumPy type of the activations."""
        return _NUMPY[self.float_type]

    def node(self, op: str, inputs: Sequence[str], name: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output; returns the output's name."""
        return self.nodes(op, inputs, 1, name, domain, **attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str],
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Adds a node with several outputs, so many or of these names; returns their names."""
        name = name or f"{op}_{len(self._nodes)}"
        if isinstance(outputs, int):
            outputs = [f"{name}:{index}" if index else name for index in range(outputs)]
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        if domain:
            self._domains.add(domain)
        return list(outputs)

    def maker(self, value: str) -> onnx.NodeProto:
        """The node that gives `value`; what is changed in it is written."""
        return next(node for node in reversed(self._nodes) if value in node.output)

    def shared(self, what: str, value: str, write: Callable[[], list[str]]) -> list[str]:
        """What `write` returned when `what` was first wanted of `value`: layers of one input share it."""
        if (what, value) not in self._shared:
            self._shared[what, value] = write()
        return self._shared[what, value]

    def rename(self, value: str, name: str) -> str:
        """`value` under the graph output's name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}_out"))
        return name

    def constant(self, values: Any, dtype: Any) -> str:
        """A small tensor inside the graph file; equal ones are stored once. Raises as `raw`."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            tensor = numpy_helper.from_array(array, name)
            _refuse_not_finite(name, tensor.data_type, tensor.raw_data)
            self._tensors.append(tensor)
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(values, np.int64)

    def scalar(self, value: float) -> str:
        """One number of the activations' type."""
        return self.constant(value, self.float_dtype)

    def tensor(self, name: str, array: np.ndarray, dtype: Any = None) -> str:
        """A tensor of a type that NumPy and ONNX share, converted to `dtype` if one is given. Raises as `raw`."""
        with np.errstate(over="ignore"):  # `raw` refuses what does not fit
            array = array if dtype is None else array.astype(dtype)
        return self.raw(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes())

    def raw(self, name: str, data_type: int, shape: Sequence[int], content: bytes) -> str:
        """A tensor of any ONNX type from its bytes; long ones go to the data file.

        Raises ArtefactError for floats that are not finite, whatever their width.
        """
        _refuse_not_finite(name, data_type, content)
        tensor = TensorProto(name=name, data_type=data_type, dims=list(shape))
        if len(content) < _INLINE_BYTES:
            tensor.raw_data = content
        else:
            start = self._write(content)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self._data_path.name), ("offset", start), ("length", len(content))):
                tensor.external_data.add(key=key, value=str(value))
        self._tensors.append(tensor)
        return name

    def _write(self, content: bytes) -> int:
        """Appends bytes, aligned so that they can be mapped into memory; returns the offset."""
        grain = _PAGE if len(content) >= _PAGE else _LINE
        self._data.write(bytes(-self._data.tell() % grain))
        start = self._data.tell()
        self._data.write(content)
        return start

    def save(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> None:
        """Writes the graph file, in the lowest operator set that can hold it; the data file is complete now."""
        graph = helper.make_graph(self._nodes, self.path.stem, list(inputs), list(outputs), self._tensors)
        types = [_LATER_TYPES.get(tensor.data_type, _OPSET) for tensor in self._tensors]
        operators = [_LATER_OPERATORS.get(node.op_type, _OPSET) for node in self._nodes if not node.domain]
        newest = helper.make_opsetid("", max([_OPSET, *types, *operators]))
        opsets = [newest, *(helper.make_opsetid(name, 1) for name in sorted(self._domains))]
        version = helper.find_min_ir_version_for([newest])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="engine_build")
        self._data.flush()
        self._write_graph(model.SerializeToString(deterministic=True))

    # Shorthands for the arithmetic that the architecture is made of.

    def add(self, left: str, right: str) -> str:
        return self.node("Add", [left, right])

    def mul(self, left: str, right: str) -> str:
        return self.node("Mul", [left, right])

    def matmul(self, left: str, right: str) -> str:
        return self.node("MatMul", [left, right])

    def as_activations(self, value: str) -> str:
        """`value`, float32, in the activations' type."""
        return value if self.float_type == TensorProto.FLOAT else self.cast(value, self.float_type)

    def concat(self, values: Sequence[str], axis: int, name: str | None = None) -> str:
        return self.node("Concat", values, name, axis=axis)

    def reshape(self, value: str, *shape: int) -> str:
        """0 keeps a dimension, -1 infers one."""
        return self.node("Reshape", [value, self.ints(*shape)])

    def transpose(self, value: str, *order: int) -> str:
        return self.node("Transpose", [value], perm=list(order))

    def slice(self, value: str, start: int, end: int, axis: int) -> str:
        return self.node("Slice", [value, self.ints(start), self.ints(end), self.ints(axis)])

    def cast(self, value: str, data_type: int, name: str | None = None) -> str:
        return self.node("Cast", [value], name, to=data_type)

    def microsoft(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node of ONNX Runtime's own operators."""
        return self.node(op, inputs, name, MICROSOFT, **attributes)
