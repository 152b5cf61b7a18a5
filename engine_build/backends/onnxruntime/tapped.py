"""Sessions that show values inside their graphs."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from engine_build.backends.base import Seen
from vla_policy.core.backends.onnxruntime.session import OnnxRuntimeSession, open_session
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import TensorSpec


class TappedSession(OnnxRuntimeSession):
    """The runner's session on graphs that have further outputs. taps, seen: see `Backend.open_tapped`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        taps: Mapping[str, Collection[str]],
        seen: Seen,
        library: Path | None,
    ) -> None:
        self._taps, self._seen = taps, seen
        self._inside: dict[str, list[str]] = {}  # by the graph's file: what is neither input nor output already
        graphs = {}
        for name, spec in manifest.graphs.items():
            known = {end.name for end in (*spec.inputs, *spec.outputs)}
            inside = self._inside[spec.file] = [tap for tap in taps.get(name, ()) if tap not in known]
            graphs[name] = replace(spec, outputs=(*spec.outputs, *(TensorSpec(tap, "", (), "") for tap in inside)))
        super().__init__(folder, replace(manifest, graphs=graphs), library=library)

    def _open(self, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        model = onnx.load(str(path), load_external_data=False)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._inside[path.name])
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return open_session(path, options, model.SerializeToString())

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        results = super().run(call, feeds, keep)
        graph = self._program[call].graph
        ends = {**feeds, **results}
        for name in self._inside[self._graphs[graph].file]:
            del results[name]
        for name in self._taps.get(graph, ()):
            value = ends[name]
            self._seen(graph, name, value.numpy() if isinstance(value, ort.OrtValue) else value)
        return results
