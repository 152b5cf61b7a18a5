"""The artefact of QVLA's sensitivities: what each width of every output channel does to the action."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from calibrator.sensitivity.measured import Measured
from calibrator.sensitivity.table import UnitShape
from calibrator.tensors import save_tensors
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import named_file, read_json, sha256_file, write_json
from vla_policy.core.formats import Choice
from vla_policy.core.outputs import atomic_path

KIND = "channels"
TENSORS = "channel-scores"
SCHEMA_VERSION = 1
_FIRST_ORDER, _EXACT = "first_order", "exact"


@dataclass(frozen=True)
class ChannelLayer:
    """A layer's channels. first: the first output channel that a decision reads; `rows`: all that its weight has.

    first_order, exact: float64 [widths, outputs], QVLA's Eqs. (6) and (4), the mean over the states, of 0 bits and of
    each choice; NaN where nothing was evaluated exactly.
    """

    shape: UnitShape
    first: int
    rows: int
    first_order: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class ChannelTable(Measured):
    """`channels.json` as a type. choices: one per width above 0 bits, the least precise first. meta: the file's other
    entries."""

    layers: tuple[ChannelLayer, ...]
    choices: tuple[Choice, ...]
    meta: Mapping[str, Any]
    path: str
    sha256: str

    @property
    def factors(self) -> np.ndarray:
        """float64 [widths]: the median of what an exact score is of its first-order estimate; 1 where none is known.

        The estimate is a product of norms, so an upper bound of the linear effect. Channels that were evaluated and
        those that were not are made comparable by it; the paper does not say how it does that.
        """
        exact = np.concatenate([layer.exact for layer in self.layers], 1)
        estimate = np.concatenate([layer.first_order for layer in self.layers], 1)
        known = np.isfinite(exact) & (estimate > 0)
        rows = zip(exact, estimate, known, strict=True)
        return np.array([np.median(one[ok] / of[ok]) if ok.any() else 1.0 for one, of, ok in rows])

    def scores(self, layer: ChannelLayer) -> np.ndarray:
        """float64 [widths, outputs]: exact where it was evaluated, else the estimate times its width's factor."""
        estimated = layer.first_order * self.factors[:, None]
        return np.where(np.isfinite(layer.exact), layer.exact, estimated)

    @staticmethod
    def load(path: Path | str) -> "ChannelTable":
        """Raises ArtefactError when the file or its scores are missing, damaged or of another kind or version."""
        raw = read_json(path, KIND, SCHEMA_VERSION)
        try:
            entry = raw["files"]["scores"]
            beside = named_file(Path(path).parent, entry["name"])
            if sha256_file(beside) != entry["sha256"]:
                raise ArtefactError(f"{beside}: not the file that {path} was written with; measure again")
            scores = load_file(beside)
            layers = tuple(
                ChannelLayer(
                    UnitShape(**one["shape"]),
                    one["first"],
                    one["rows"],
                    scores[f"{_FIRST_ORDER}.{one['shape']['name']}"],
                    scores[f"{_EXACT}.{one['shape']['name']}"],
                )
                for one in raw["layers"]
            )
            choices = tuple(map(Choice.from_json, raw["choices"]))
            meta = {key: value for key, value in raw.items() if key != "layers"}
            return ChannelTable(layers, choices, meta, str(path), sha256_file(path))
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"{path}: entry {error} is missing or malformed; measure again") from error
        except SafetensorError as error:
            raise ArtefactError(f"{path}: its scores are damaged or truncated ({error}); measure again") from error


def scores_path(out: Path) -> Path:
    """Where the arrays of the table at `out` go."""
    return out.with_suffix(".safetensors")


def save(out: Path, layers: list[ChannelLayer], content: Mapping[str, Any]) -> ChannelTable:
    """Writes the scores, then the JSON that names their hash."""
    tensors = {f"{_FIRST_ORDER}.{layer.shape.name}": layer.first_order for layer in layers}
    tensors |= {f"{_EXACT}.{layer.shape.name}": layer.exact for layer in layers}
    with atomic_path(scores_path(out), TENSORS) as temporary:
        save_tensors(temporary, tensors, TENSORS)
    files = {"scores": {"name": scores_path(out).name, "sha256": sha256_file(scores_path(out))}}
    entries = [{"shape": vars(layer.shape), "first": layer.first, "rows": layer.rows} for layer in layers]
    head = {"schema_version": SCHEMA_VERSION, "kind": KIND}
    write_json(out, {**head, **content, "files": files, "layers": entries})
    return ChannelTable.load(out)
