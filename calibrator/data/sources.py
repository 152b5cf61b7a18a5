"""Whatever holds states: rosbag2 recordings, LeRobot and RLDS data sets, LIBERO's HDF5 files, episode files.

One bad part (a message, a step, an episode, a file of a folder) is left out and counted with an example.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calibrator.data import episodes, hdf5
from calibrator.data.bag import BagSource
from calibrator.data.layout import RecordLayout
from calibrator.data.lerobot import LeRobotSource, is_lerobot
from calibrator.data.records import Source
from calibrator.data.rlds import RldsSource, rlds_folders
from vla_policy.core.bag import is_bag
from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError

KINDS = "a rosbag2 folder, a LeRobot or RLDS data set, LIBERO HDF5 or episodes"


def open_sources(
    paths: Sequence[Path], contract: Contract | None, namespace: str, layout: RecordLayout
) -> list[Source]:
    """The sources in `paths`: one per bag, data set, HDF5 file, or folder of HDF5 files or episodes.

    Raises DataError for anything else, and for what layout or contract lack.
    """
    return [source for path in paths for source in _open(path, contract, namespace, layout)]


def _open(path: Path, contract: Contract | None, namespace: str, layout: RecordLayout) -> Sequence[Source]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {KINDS}")
    suffixes = {item.suffix for item in path.iterdir()} if path.is_dir() else set()
    if is_bag(path):
        if contract is None:
            raise DataError(f"{path}: a bag needs --contract, the YAML that maps its topics")
        if replace(layout, instruction="") != RecordLayout():
            raise DataError(f"{path}: a bag's cameras, states, rotation and crop are its contract's; say them there")
        return [BagSource(path, contract, namespace, layout.instruction)]
    if is_lerobot(path):
        return [LeRobotSource(path, layout)]
    if folders := rlds_folders(path) if path.is_dir() else []:
        return [RldsSource(folder, layout) for folder in folders]
    if path.suffix in hdf5.SUFFIXES or suffixes & set(hdf5.SUFFIXES):
        return [hdf5.Hdf5Source(path, layout)]
    if episodes.SUFFIX in suffixes:
        return [episodes.EpisodeSource(path, layout)]
    raise DataError(f"{path}: is neither {KINDS}")
