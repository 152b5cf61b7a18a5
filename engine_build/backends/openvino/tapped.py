"""Sessions that show values inside their graphs."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engine_build.backends.base import Seen
from vla_policy.core.backends.openvino import Precision
from vla_policy.core.backends.openvino.session import Kept, OpenVinoSession
from vla_policy.core.manifest import Manifest


class TappedSession(OpenVinoSession):
    """The runner's session on graphs that have further outputs. taps, seen: see `Backend.open_tapped`."""

    def __init__(
        self, folder: Path, manifest: Manifest, precision: Precision, taps: Mapping[str, Collection[str]], seen: Seen
    ) -> None:
        self._taps, self._seen = taps, seen
        self._inside = {}
        for name, spec in manifest.graphs.items():
            known = {end.name for end in (*spec.inputs, *spec.outputs)}
            self._inside[name] = [tap for tap in taps.get(name, ()) if tap not in known]
        super().__init__(folder, manifest, precision, shown=self._inside)

    def run(self, call: str, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        results = super().run(call, feeds, keep)
        graph = self._program[call].graph
        ends = {**feeds, **results}
        for name in self._inside[graph]:
            del results[name]
        for name in self._taps.get(graph, ()):
            value = ends[name]
            self._seen(graph, name, value.numpy() if isinstance(value, Kept) else value)
        return results
