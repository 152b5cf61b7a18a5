"""Finished evaluations on disk: a killed sweep continues where it was, and never with other inputs.

The folder holds `signature.json`, `reference.safetensors`, `conventions.json`, codes that are worth keeping, and
`records.sqlite` with one record per layer, choice and state, so that whatever was evaluated counts for any batch size,
number of choices, layers or mode. The database is locked while a run is open: two runs never write one result.
"""

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from calibrator.conventions.check import Outcome
from calibrator.sensitivity.evidence import BOUNDARIES
from calibrator.sensitivity.proxy import FirstOrder
from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import UnitLosses
from calibrator.tensors import save_tensors
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import claim_folder, read_json, write_json
from vla_policy.core.formats import Choice
from vla_policy.core.outputs import FolderKind, atomic_path, remove_folder

_KIND = "sweep-journal"
_SIGNATURE, _REFERENCE, _RECORDS, _CODES = "signature.json", "reference.safetensors", "records.sqlite", "codes"
_CONVENTIONS = "conventions.json"
_PARTS = (_REFERENCE, _CONVENTIONS, f"{_RECORDS}*", f"{_CODES}/*/layers/*.safetensors")
_FOLDER = FolderKind(_KIND, _SIGNATURE, _PARTS)
_LOSSES, _FIRST_ORDER = "losses", "first_order"
_MEAN, _PEAK = "mean.", "peak."
_TABLE = (
    "CREATE TABLE IF NOT EXISTS {} (unit TEXT, choice TEXT, state INTEGER, numbers BLOB, "
    "PRIMARY KEY (unit, choice, state)) WITHOUT ROWID"
)


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
    """Records of one sweep, identified by the signature of everything its numbers depend on. Use it with `with`."""

    def __init__(self, folder: Path, signature: dict[str, Any], fresh: bool = False) -> None:
        """Opens or creates the journal. fresh: without what an earlier run left.

        Raises ArtefactError naming the difference when it is another sweep's, while another run has it open, and for a
        folder that is no journal.
        """
        self.folder = folder
        if fresh and (folder / _RECORDS).is_file():
            self._open().close()  # refuses while somebody uses it
        if fresh:
            remove_folder(folder, _FOLDER)
        changed = difference(claim_folder(folder, _FOLDER, {"signature": signature})["signature"], signature)
        if changed:
            raise ArtefactError(
                f"{folder}: holds an unfinished sweep of other inputs ({changed}); "
                f"restore them, choose another --out, or discard it with --no-resume"
            )
        self._records = self._open()

    def _open(self) -> sqlite3.Connection:
        """The database, locked for this process until it is closed."""
        path = self.folder / _RECORDS
        connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            for table in (_LOSSES, _FIRST_ORDER):
                connection.execute(_TABLE.format(table))
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            connection.close()
            if "locked" not in str(error):
                raise ArtefactError(f"{path}: cannot be written ({error}); choose another --out") from error
            raise ArtefactError(
                f"{self.folder}: another run is writing this result; wait for it, or choose another --out"
            ) from error
        except sqlite3.DatabaseError as error:
            connection.close()
            raise ArtefactError(f"{path}: damaged ({error}); discard the unfinished run with --no-resume") from error
        return connection

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._records.close()

    @property
    def codes(self) -> Path:
        """The folder of codes that are worth keeping; see `calibrator.codes.KeptCodes`."""
        return self.folder / _CODES

    def missing(self, unit: str, choice: Choice, samples: Iterable[int]) -> tuple[int, ...]:
        """Those of `samples` without a record of `unit` in this choice, in their order."""
        return self._missing(_LOSSES, unit, choice, samples, 1)

    def write(self, losses: UnitLosses) -> None:
        """Keeps a record of every choice and state, all or none."""
        self._write(
            _LOSSES,
            [
                (losses.unit, choice, sample, np.concatenate([array[row, column].ravel() for array in losses.arrays]))
                for row, choice in enumerate(losses.choices)
                for column, sample in enumerate(losses.samples)
            ],
        )

    def read(self, unit: str, choice: Choice, samples: tuple[int, ...]) -> UnitLosses:
        """Records that there are."""
        return UnitLosses.of_numbers(unit, choice, samples, self._read(_LOSSES, unit, choice, samples))

    def missing_first_order(
        self, unit: str, choice: Choice, samples: Iterable[int], evidence: bool
    ) -> tuple[int, ...]:
        """As `missing`, of first-order estimates, with those of the evidence or without."""
        return self._missing(_FIRST_ORDER, unit, choice, samples, 1 + evidence * len(BOUNDARIES))

    def write_first_order(
        self, found: dict[str, FirstOrder], choices: tuple[Choice, ...], samples: tuple[int, ...]
    ) -> None:
        """Estimates of layers by name in these choices on these states, all or none."""
        self._write(
            _FIRST_ORDER,
            [
                (unit, choice, sample, np.append(estimate.action[row, column], estimate.mass[row, column]))
                for unit, estimate in found.items()
                for row, choice in enumerate(choices)
                for column, sample in enumerate(samples)
            ],
        )

    def read_first_order(self, unit: str, choices: tuple[Choice, ...], samples: tuple[int, ...]) -> FirstOrder:
        """Estimates that there are."""
        numbers = np.stack([self._read(_FIRST_ORDER, unit, choice, samples) for choice in choices])
        return FirstOrder(numbers[..., 0], numbers[..., 1:])

    def write_reference(self, ref: Reference) -> None:
        with atomic_path(self.folder / _REFERENCE, None) as temporary:
            means = {f"{_MEAN}{name}": mean for name, mean in ref.means.items()}
            peaks = {f"{_PEAK}{name}": np.asarray(peak) for name, peak in ref.peaks.items()}
            arrays = {"decided": ref.decided, "strays": ref.strays, "spread": ref.spread}
            save_tensors(temporary, arrays | means | peaks, _KIND)

    def read_reference(self) -> Reference | None:
        """The reference of the earlier start, or None when it had not got that far."""
        path = self.folder / _REFERENCE
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path}: damaged or truncated ({error}); delete it and resume") from error
        means, peaks = (
            {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in (_MEAN, _PEAK)
        )
        largest = {name: float(peak) for name, peak in peaks.items()}
        return Reference(tensors["decided"], means, tensors["strays"], largest, tensors["spread"])

    def write_conventions(self, outcome: Outcome) -> None:
        write_json(self.folder / _CONVENTIONS, {"schema_version": 1, "kind": _KIND, **outcome.to_json()})

    def read_conventions(self) -> Outcome | None:
        """What the check found at the earlier start, or None when it had not got that far."""
        path = self.folder / _CONVENTIONS
        return Outcome.from_json(read_json(path, _KIND, 1)) if path.is_file() else None

    def discard(self) -> None:
        """Removes the journal."""
        self._records.close()
        remove_folder(self.folder, _FOLDER)

    def _missing(
        self, table: str, unit: str, choice: Choice, samples: Iterable[int], numbers: int
    ) -> tuple[int, ...]:
        """numbers: that a record has at least."""
        rows = self._query(f"SELECT state, length(numbers) FROM {table} WHERE unit = ? AND choice = ?", unit, choice)
        known = {state for state, length in rows if length >= 8 * numbers}
        return tuple(sample for sample in samples if sample not in known)

    def _read(self, table: str, unit: str, choice: Choice, samples: tuple[int, ...]) -> np.ndarray:
        """float64 [states, numbers]."""
        rows = self._query(f"SELECT state, numbers FROM {table} WHERE unit = ? AND choice = ?", unit, choice)
        known = {state: np.frombuffer(numbers, np.float64) for state, numbers in rows}
        return np.stack([known[sample] for sample in samples])

    def _query(self, statement: str, unit: str, choice: Choice) -> list[Any]:
        try:
            return self._records.execute(statement, (unit, str(choice))).fetchall()
        except sqlite3.DatabaseError as error:
            raise ArtefactError(
                f"{self.folder / _RECORDS}: damaged ({error}); discard the unfinished run with --no-resume"
            ) from error

    def _write(self, table: str, rows: list[tuple[str, Choice, int, np.ndarray]]) -> None:
        values = [(unit, str(choice), state, numbers.tobytes()) for unit, choice, state, numbers in rows]
        try:
            self._records.execute("BEGIN")
            self._records.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", values)
            self._records.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise ArtefactError(
                f"{self.folder / _RECORDS}: cannot be written ({error}); what was finished before is kept: free the "
                "disk and call the command again"
            ) from error
