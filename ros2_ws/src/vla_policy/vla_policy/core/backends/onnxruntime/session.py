"""Executes an engine's graphs with ONNX Runtime on the CPU."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from vla_policy.core.backends.base import check_version
from vla_policy.core.backends.onnxruntime.probe import FILE, check_arithmetic
from vla_policy.core.errors import ArtefactError, EngineError
from vla_policy.core.manifest import Manifest
from vla_policy.core.processor import cpu_name

_SILENT = 3
_REFUSALS = (  # ONNX Runtime's exceptions share no base of their own
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def session_options(threads: int | None = None, library: Path | None = None) -> ort.SessionOptions:
    """The settings under which an engine's formats were read back; the runner must use the same.

    Graphs are written with the operators that shall run, and what ONNX Runtime still does to them, widen stored 16-bit
    numbers, fold constants and join neighbours, is the same on every processor: the level that would choose layouts by
    processor is off. Threads wait busily inside a call only, so that the pools of an engine's graphs share the cores.

    library: of custom operators.
    """
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = _SILENT
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@contextmanager
def _running() -> Iterator[None]:
    """Raises EngineError, in one line, when ONNX Runtime cannot run a graph that it has loaded."""
    try:
        yield
    except _REFUSALS as error:
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot run the engine ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def open_session(path: Path, options: ort.SessionOptions, graph: bytes | None = None) -> ort.InferenceSession:
    """A CPU session. Raises ArtefactError, in one line, when ONNX Runtime refuses the file.

    graph: to be run instead of the file's own; `options` then say where its tensors are.
    """
    try:
        return ort.InferenceSession(str(path) if graph is None else graph, options, providers=["CPUExecutionProvider"])
    except _REFUSALS as error:
        raise ArtefactError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({_reason(error)}); build it again"
        ) from error


class OnnxRuntimeSession:
    """A session per graph; what is kept stays an OrtValue."""

    def __init__(
        self, folder: Path, manifest: Manifest, threads: int | None = None, library: Path | None = None
    ) -> None:
        check_version(folder, manifest, "onnxruntime", ort.__version__)
        if FILE in manifest.files:
            check_arithmetic(folder, open_session(folder / FILE, session_options(threads, library)))
        self.processor = cpu_name()
        self._program, self._graphs = manifest.program, manifest.graphs
        self._sessions = {
            name: self._open(folder / graph.file, session_options(threads, library))
            for name, graph in self._graphs.items()
        }

    def _open(self, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        return open_session(path, options)

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        graph = self._program[call].graph
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in feeds.items()
        }
        names = [spec.name for spec in self._graphs[graph].outputs]
        with _running():
            results = self._sessions[graph].run_with_ort_values(names, values)
        return {name: value if name in keep else value.numpy() for name, value in zip(names, results, strict=True)}
