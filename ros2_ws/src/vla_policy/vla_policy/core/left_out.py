"""What could not be used, told so that it can be mended: where, why, how often, and one particular of each."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LeftOut:
    """How often something of one topic (or file, or dataset) was left out for one reason, and the first time's text."""

    where: str
    reason: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} {self.count} ({self.example})"


class Tally:
    """Counts what is left out."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], LeftOut] = {}

    def add(self, where: str, reason: str, example: str, count: int = 1) -> None:
        former = self._found.get((where, reason), LeftOut(where, reason, 0, example))
        self._found[where, reason] = replace(former, count=former.count + count)

    @property
    def found(self) -> tuple[LeftOut, ...]:
        """The most frequent first, of equal ones the one that was seen first: a cause stands before what it causes."""
        return tuple(sorted(self._found.values(), key=lambda item: -item.count))


def told(items: Iterable[LeftOut]) -> str:
    """All of them in one line."""
    return "; ".join(map(str, items)) or "nothing"
