"""Rolling statistics for diagnostics: percentiles of the last samples, and rates over the last seconds."""

from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Percentiles:
    """Of the window's samples; all NaN when there are none."""

    count: int
    p50: float
    p99: float
    maximum: float


class RollingWindow:
    """The last `size` samples of a quantity; constant memory however long the node runs."""

    def __init__(self, size: int = 1000) -> None:
        self._samples: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        self._samples.append(value)

    def percentiles(self) -> Percentiles:
        if not self._samples:
            return Percentiles(0, float("nan"), float("nan"), float("nan"))
        values = np.asarray(self._samples)
        return Percentiles(len(values), *(float(value) for value in np.percentile(values, (50, 99, 100))))


class RateCounter:
    """Events per second over the last `window_ns`."""

    def __init__(self, window_ns: int = 5 * 10**9) -> None:
        self._window_ns = window_ns
        self._times: deque[int] = deque(maxlen=10_000)

    def add(self, now_ns: int) -> None:
        self._times.append(now_ns)

    def rate_hz(self, now_ns: int) -> float:
        """Zero when nothing happened lately; a clock that was set back starts the count anew."""
        while self._times and not 0 <= now_ns - self._times[0] <= self._window_ns:
            self._times.popleft()
        if len(self._times) < 2:
            return 0.0
        span_ns = max(now_ns, self._times[-1]) - self._times[0]
        return len(self._times) / (span_ns / 1e9) if span_ns > 0 else 0.0
