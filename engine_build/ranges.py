"""Largest inputs of layers over a calibration set: the fixed activation scales that TensorRT's INT8 layers need."""

from collections.abc import Sequence
from pathlib import Path

from calibrator.data.calibration import load_calibration
from calibrator.data.statistics import input_statistics
from calibrator.families import TorchActor


def input_peaks(
    policy_folder: Path, calibration: Path, names: Sequence[str], unnorm_key: str | None = None
) -> dict[str, float]:
    """max |x| of every named layer's input while the full-precision policy decides each calibration state.

    unnorm_key: of the statistics that normalise a state. Raises as `input_statistics`.
    """
    actor, states = TorchActor.load(policy_folder, unnorm_key), load_calibration(calibration)
    statistics = input_statistics(actor, states, names, str(calibration))
    return {name: one.peak for name, one in statistics.items()}
