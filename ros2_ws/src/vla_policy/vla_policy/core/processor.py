"""What this machine's processor is called, and what it can do."""

import platform
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """By its own name, e.g. "AMD EPYC 7B13"; by its architecture where it tells none."""
    return _field("model name") or platform.processor() or platform.machine()


def cpu_lacks(instructions: Collection[str]) -> list[str]:
    """Those of the instruction sets, by Linux's names, that the processor does not have."""
    has = (_field("flags") or _field("Features") or "").split()
    return [name for name in instructions if name not in has]


def _field(wanted: str) -> str | None:
    """Of the first core."""
    with suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == wanted:
                return value.strip()
    return None
