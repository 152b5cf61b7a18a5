"""Finished layers on disk: a killed sweep continues where it was, and never with other inputs.

The folder holds `signature.json`, `reference.safetensors` and one file per finished task (a layer in some choices on
some states), each written whole under a temporary name and renamed; a file that exists is complete.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import UnitLosses
from calibrator.tensors import save_tensors
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import claim_folder
from vla_policy.core.formats import Choice
from vla_policy.core.outputs import FolderKind, atomic_path, remove_folder

_KIND = "sweep-journal"
_SIGNATURE, _REFERENCE, _UNITS = "signature.json", "reference.safetensors", "units"
_FOLDER = FolderKind(_KIND, _SIGNATURE, (_REFERENCE, f"{_UNITS}/*.safetensors"))
_ARRAYS = ("mass", "attribution", "action_error", "likelihood")


def difference(before: dict[str, Any], now: dict[str, Any], path: str = "") -> str | None:
    """The first entry that differs between two signatures, as text; None when they are equal."""
    for key in sorted(before.keys() | now.keys()):
        old, new = (_by_place(side.get(key)) for side in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            if found := difference(old, new, f"{path}{key}."):
                return found
        elif old != new:
            return f"{path}{key} was {_shown(old)}, is now {_shown(new)}"
    return None


def _by_place(value: Any) -> Any:
    """A list of objects as an object, so that the entry that differs is found in it."""
    objects = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    return {str(place): entry for place, entry in enumerate(value)} if objects else value


def _shown(value: Any) -> str:
    """A value for a message of one line: long lists by their number of entries and a digest."""
    text = str(value)
    if len(text) <= 80:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{len(value)} entries ({digest})" if isinstance(value, list) else f"{text[:60]}..."


class Journal:
    """Records of one sweep, identified by the signature of everything its numbers depend on."""

    def __init__(self, folder: Path, signature: dict[str, Any]) -> None:
        """Opens or creates the journal.

        Raises ArtefactError naming the difference when it is another sweep's, and for a folder that is no journal.
        """
        self.folder = folder
        self.signature = signature
        changed = difference(claim_folder(folder, _FOLDER, {"signature": signature})["signature"], signature)
        if changed:
            raise ArtefactError(
                f"{folder}: holds an unfinished sweep of other inputs ({changed}); "
                f"restore them, choose another --out, or discard it with --no-resume"
            )

    def lacks(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> bool:
        """Whether there is no record of `unit` in these choices on these states."""
        return not self._path(unit, choices, samples).is_file()

    def write(self, losses: UnitLosses) -> None:
        tensors = {name: getattr(losses, name) for name in _ARRAYS}
        with atomic_path(self._path(losses.unit, losses.choices, losses.samples), None) as temporary:
            save_tensors(temporary, tensors, _KIND)

    def read(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> UnitLosses:
        """A record. Raises ArtefactError when it is damaged."""
        return UnitLosses(unit, choices, samples, **_load(self._path(unit, choices, samples)))

    def write_reference(self, ref: Reference) -> None:
        with atomic_path(self.folder / _REFERENCE, None) as temporary:
            means = {f"mean.{name}": mean for name, mean in ref.means.items()}
            save_tensors(temporary, {"decided": ref.decided, "strays": ref.strays} | means, _KIND)

    def read_reference(self) -> Reference | None:
        """The reference of the earlier start, or None when it had not got that far."""
        path = self.folder / _REFERENCE
        if not path.is_file():
            return None
        tensors = _load(path)
        means = {name.removeprefix("mean."): value for name, value in tensors.items() if name.startswith("mean.")}
        return Reference(tensors["decided"], means, tensors["strays"])

    @staticmethod
    def discard(folder: Path) -> None:
        """Removes a journal, if there is one. Raises ArtefactError for a folder that is none."""
        remove_folder(folder, _FOLDER)

    def _path(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> Path:
        which = f"{' '.join(map(str, choices))} {samples}"
        return self.folder / _UNITS / f"{unit}@{hashlib.sha256(which.encode()).hexdigest()[:16]}.safetensors"


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path}: damaged or truncated ({error}); delete it and resume") from error
