"""What a choice is called on the page."""

from collections.abc import Iterable
from dataclasses import dataclass

from vla_policy.core.formats import Choice


@dataclass(frozen=True)
class Labels:
    """Formats by name; with their recipe only where the table has several."""

    with_recipe: bool

    @staticmethod
    def of(choices: Iterable[Choice]) -> "Labels":
        return Labels(len({choice.recipe for choice in choices if choice.recipe is not None}) > 1)

    def __call__(self, choice: Choice) -> str:
        return str(choice if self.with_recipe else choice.format)
