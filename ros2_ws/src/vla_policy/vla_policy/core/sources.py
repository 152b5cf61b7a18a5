"""What was last heard of each source, what it measured, and what is wrong with it: cameras and states alike."""

from collections.abc import Sequence

import numpy as np

from vla_policy.core.contract import Contract
from vla_policy.core.events import Event
from vla_policy.core.ros_image import CompressedImage, RawImage
from vla_policy.core.safety import FreezeDetector, HoldReason, Room

_NEVER_NS = -(1 << 62)


class SourceMonitor:
    """Sees every event once. Times in seconds: see `ServerSettings`. Not thread-safe: its owner locks."""

    def __init__(
        self, contract: Contract, source_timeout_s: float, future_tolerance_s: float, freeze_timeout_s: float
    ) -> None:
        self._contract = contract
        self._timeout_ns, self._tolerance_ns = source_timeout_s * 1e9, future_tolerance_s * 1e9
        freeze_timeout_ns = round(freeze_timeout_s * 1e9)
        self._freezes = {camera.topic: FreezeDetector(freeze_timeout_ns) for camera in contract.cameras}
        self._names = {state.key: [value.name for value in state.values] for state in contract.states}
        self._last_stamp_ns: dict[str, int] = {}
        self._positions: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    def see(self, event: Event) -> None:
        self._last_stamp_ns[event.source] = event.stamp_ns
        if isinstance(event.payload, RawImage | CompressedImage):
            self._freezes[event.source].see(event.payload.checksum(), event.stamp_ns)
        if event.positions is not None:
            self._positions = self._positions | dict(event.positions)
        if isinstance(event.payload, np.ndarray):
            self._measured |= zip(self._names[event.source], event.payload.tolist(), strict=True)

    def faults(self, now_ns: int) -> dict[str, HoldReason]:
        """What is wrong with a camera or state, by source."""
        faults = {}
        for source in (*self._freezes, *self._names):
            camera = self._freezes.get(source)
            age_ns = now_ns - self._last_stamp_ns.get(source, _NEVER_NS)
            if age_ns > self._timeout_ns:
                faults[source] = HoldReason.STALE_STATE if camera is None else HoldReason.STALE_CAMERA
            elif age_ns < -self._tolerance_ns:
                faults[source] = HoldReason.FUTURE_STAMP
            elif camera is not None and camera.frozen:
                faults[source] = HoldReason.FROZEN_CAMERA
        return faults

    def ages_ms(self, now_ns: int) -> dict[str, float | None]:
        """Milliseconds since each source's last stamp; None before its first message."""
        stamps = {source.key: self._last_stamp_ns.get(source.key) for source in self._contract.sources}
        return {key: (now_ns - stamp_ns) / 1e6 if stamp_ns else None for key, stamp_ns in stamps.items()}

    def positions(self, joints: Sequence[str]) -> np.ndarray | None:
        """float64: where the joints were measured last; None while one of them never was."""
        known = [self._positions.get(joint, np.nan) for joint in joints]
        return np.asarray(known) if np.isfinite(known).all() else None

    def room(self, targets: Sequence[str], now_ns: int) -> Room | None:
        """What the contract's workspace leaves: the arm moves on for a period, and has moved since it was measured."""
        action = self._contract.action
        if not action.workspace:
            return None
        sources = {name: key for key, names in self._names.items() for name in names}
        oldest_ns = min(self._last_stamp_ns[sources[axis.state]] for axis in action.workspace)
        reach_ns = action.control_period_ns + max(0, now_ns - oldest_ns)
        return Room.of(targets, action.workspace, self._measured, reach_ns / 1e9)
