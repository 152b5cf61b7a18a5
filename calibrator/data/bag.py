"""rosbag2 recordings as calibration states, read through the topic contract that the node uses."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from calibrator.data.commands import Commands
from calibrator.data.layout import RecordLayout
from calibrator.data.records import Record, SourceIndex, Trajectory
from vla_policy.core.bag import read_frames
from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError
from vla_policy.core.files import sha256_file, sha256_folder
from vla_policy.core.left_out import Tally
from vla_policy.core.observe import observe
from vla_policy.core.synchroniser import Dropped, DropReason, Frame


class BagSource:
    """A recording, cut into the synchroniser's episodes. Its layout is the contract's.

    instruction: the task of frames before the first one that the bag holds.
    """

    def __init__(self, path: Path, contract: Contract, namespace: str = "", instruction: str = "") -> None:
        self.path = str(path)
        self._contract = contract
        self._namespace = namespace
        self._instruction = instruction

    def index(self) -> SourceIndex:
        """Every frame once. A frame whose image cannot be decoded counts in its episode but cannot be chosen."""
        lengths: Counter[str] = Counter()
        usable: dict[str, list[int]] = {}
        tally = Tally()
        for item in self._frames():
            if isinstance(item, Dropped):
                advice = "; give it with --instruction" if item.reason is DropReason.NO_INSTRUCTION else ""
                tally.add(item.topic, item.reason.value, item.detail + advice)
                continue
            name = _episode(item)
            lengths[name] = max(lengths[name], item.step + 1)
            try:
                observe(item, self._contract)
            except DataError as error:
                tally.add(self._contract.primary.topic, DropReason.UNDECODABLE.value, str(error))
                continue
            usable.setdefault(name, []).append(item.step)
        found = [Trajectory(name, lengths[name], tuple(steps)) for name, steps in usable.items()]
        return SourceIndex(tuple(found), tally.found)

    def read(self, wanted: Mapping[str, frozenset[int]]) -> Iterator[Record]:
        commands = Commands.read(Path(self.path), self._contract, self._namespace)
        frames = (item for item in self._frames() if isinstance(item, Frame))
        for frame, following in pairwise(chain(frames, (None,))):
            assert frame is not None  # only the last is followed by none
            if frame.step not in wanted.get(_episode(frame), ()):
                continue
            action = None
            if commands is not None and following is not None and following.episode == frame.episode:
                action = commands.between(frame.received_ns, following.received_ns)
            yield Record(_episode(frame), frame.step, observe(frame, self._contract), action)

    def describe(self) -> dict[str, Any]:
        path = Path(self.path)
        digest = sha256_folder(path) if path.is_dir() else sha256_file(path)
        return {
            "kind": "bag",
            "path": path.name,
            "sha256": digest,
            "contract_sha256": self._contract.sha256,
            "layout": RecordLayout.of_contract(self._contract).to_json() | {"instruction": self._instruction},
        }

    def _frames(self) -> Iterator[Frame | Dropped]:
        return read_frames(self.path, self._contract, self._namespace, self._instruction)


def _episode(frame: Frame) -> str:
    return f"episode_{frame.episode}"
