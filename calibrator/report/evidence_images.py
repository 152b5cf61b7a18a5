"""Evidence over the camera image in every choice: the cells of the paper's Fig. 1."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from calibrator.data.calibration import CalibrationSet
from calibrator.report.inputs import Maps
from calibrator.report.labels import Labels

_SMOOTH_PIXELS = 128
_COLOURS = np.asarray(
    [
        (0, 0, 4),
        (51, 16, 104),
        (136, 34, 106),
        (203, 65, 73),
        (241, 113, 31),
        (250, 190, 40),
        (252, 253, 191),
    ],
    np.float64,
)
_GAIN, _LOSS = np.asarray((255.0, 138.0, 30.0)), np.asarray((64.0, 150.0, 255.0))


@dataclass(frozen=True)
class Cell:
    """One map: its loss l^ev of Eq. (8), its total evidence over full precision's, and its overlays (data URIs).

    smooth, patches: shares of the map's evidence. change: share minus full precision's, per patch.
    """

    choice: str
    loss: float
    mass_ratio: float
    smooth: str
    patches: str
    change: str


@dataclass(frozen=True)
class Row:
    """One state: the number of its photo (None without a calibration set), where it is in its task, its cells."""

    photo: int | None
    instruction: str | None
    progress: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Block:
    """One quantized layer and its rows."""

    unit: str
    rows: tuple[Row, ...]


def evidence_blocks(maps: Maps, progress: np.ndarray, calibration: CalibrationSet | None) -> tuple[Block, ...]:
    """All maps. progress: float64 [N] of the calibration states.

    Every map is shown as shares of its own total, on one colour scale per row, so that colours show where evidence
    went; what became of its total is the cell's `mass_ratio`.
    """
    return tuple(
        Block(
            name,
            tuple(
                Row(
                    photo=state if calibration else None,
                    instruction=calibration.samples[sample].instruction if calibration else None,
                    progress=float(progress[sample]),
                    cells=_cells(maps, unit, state),
                )
                for state, sample in enumerate(maps.samples)
            ),
        )
        for unit, name in enumerate(maps.units)
    )


def _cells(maps: Maps, unit: int, state: int) -> tuple[Cell, ...]:
    evidence = maps.evidence[unit, state].astype(np.float64)
    totals = evidence.sum(1)
    shares = evidence / totals[:, None]
    peak, label = shares.max(), Labels.of(maps.choices)
    moved = shares - shares[0]
    largest = np.abs(moved).max() or 1.0
    return tuple(
        Cell(
            choice=label(choice),
            loss=float(maps.loss[unit, state, column]),
            mass_ratio=float(totals[column] / totals[0]),
            smooth=_overlay(_enlarged(shares[column].reshape(maps.grid)) / peak),
            patches=_overlay(shares[column].reshape(maps.grid) / peak),
            change=_change(moved[column].reshape(maps.grid) / largest),
        )
        for column, choice in enumerate(maps.choices)
    )


def _enlarged(grid: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(grid.astype(np.float32), mode="F")
    return np.asarray(picture.resize((_SMOOTH_PIXELS, _SMOOTH_PIXELS), Image.Resampling.BICUBIC), np.float64)


def _overlay(values: np.ndarray) -> str:
    """A transparent picture of `values` in [0, 1]; overshoot of the smoothing is cut."""
    levels = (np.clip(values, 0.0, 1.0) * 255).round().astype(np.uint8)
    place = np.linspace(0, len(_COLOURS) - 1, 256)
    palette = np.stack([np.interp(place, np.arange(len(_COLOURS)), channel) for channel in _COLOURS.T], 1)
    picture = Image.fromarray(levels, mode="P")
    picture.putpalette(palette.round().astype(np.uint8).tobytes())
    strength = np.linspace(0, 1, 256)
    alpha = (255 * (0.18 + 0.67 * strength**0.6)).round().astype(np.uint8)
    return _data_uri(picture, "PNG", transparency=alpha.tobytes())


def _change(values: np.ndarray) -> str:
    """Gains in orange and losses in blue, `values` in [-1, 1]; the stronger the more opaque."""
    colours = np.where(values[..., None] > 0, _GAIN, _LOSS)
    alpha = 255 * np.abs(values)[..., None] ** 0.6
    return _data_uri(Image.fromarray(np.concatenate([colours, alpha], -1).round().astype(np.uint8)), "PNG")


def photos(maps: Maps, calibration: CalibrationSet) -> tuple[str, ...]:
    """The camera images of the maps as data URIs; a row's `photo` counts them, so that each is embedded once.

    Several cameras' images stand one above the other, in the size of the first.
    """
    return tuple(_data_uri(_stacked(calibration.observation(sample).images), "PNG") for sample in maps.samples)


def _stacked(images: Sequence[np.ndarray]) -> Image.Image:
    height, width = images[0].shape[:2]
    pictures = [Image.fromarray(image).resize((width, height)) for image in images]
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))


def _data_uri(picture: Image.Image, kind: str, **options: object) -> str:
    stream = io.BytesIO()
    picture.save(stream, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
