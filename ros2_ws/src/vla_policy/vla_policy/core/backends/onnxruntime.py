"""Executes an engine's graphs with ONNX Runtime on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from vla_policy.core.errors import ArtefactError, EngineError
from vla_policy.core.manifest import Manifest

# 4 would let ONNX Runtime round the activations of 16-bit-activation layers to int8 behind the plan's back.
_ACCURACY_LEVEL = ("session.qdq_matmulnbits_accuracy_level", "1")
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


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """The settings under which an engine's formats were read back; the runner must use the same."""
    options = ort.SessionOptions()
    options.add_session_config_entry(*_ACCURACY_LEVEL)
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


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A CPU session. Raises ArtefactError, in one line, when ONNX Runtime refuses the file."""
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _REFUSALS as error:
        raise ArtefactError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({_reason(error)}); build it again"
        ) from error


class OnnxRuntimeBackend:
    """Two sessions, vision and decoder, on one copy of the weights; the cache stays inside ONNX Runtime."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        if _minor(manifest.backend_version) != _minor(ort.__version__):
            raise ArtefactError(
                f"{folder}: formats were proven with onnxruntime {manifest.backend_version}, installed is "
                f"{ort.__version__}; install that version or build the engine again"
            )
        text = manifest.config.text
        self._hidden = text.hidden_size
        self._empty = np.zeros((1, text.num_key_value_heads, 0, text.head_dim), np.float32)
        self._vision = open_session(folder / manifest.graphs["vision"].file, session_options(threads))
        self._decoder = open_session(folder / manifest.graphs["decoder"].file, session_options(threads))
        self._past = [spec.name for spec in manifest.graphs["decoder"].inputs if spec.name.startswith("past_")]
        self._outputs = [spec.name for spec in manifest.graphs["decoder"].outputs]
        self._cache: list[ort.OrtValue] = []

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        with _running():
            patches: np.ndarray = self._vision.run(None, {"pixel_values": pixel_values})[0]
        return patches

    def prefill(self, input_ids: np.ndarray, patches: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        empty = ort.OrtValue.ortvalue_from_numpy(self._empty)
        self._cache = [empty] * len(self._past)
        return self._run(input_ids, patches, state)

    def step(self, token: int) -> np.ndarray:
        return self._run(np.asarray([[token]], np.int64), np.zeros((1, 0, self._hidden), np.float32))

    def _run(self, input_ids: np.ndarray, patches: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(input_ids),
            "patches": ort.OrtValue.ortvalue_from_numpy(patches),
            **dict(zip(self._past, self._cache, strict=True)),
        }
        if state is not None:
            feeds["state"] = ort.OrtValue.ortvalue_from_numpy(state)
        with _running():
            result, *self._cache = self._decoder.run_with_ort_values(self._outputs, feeds)
        values: np.ndarray = result.numpy()[0]
        return values


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
