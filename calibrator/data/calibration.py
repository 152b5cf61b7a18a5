"""The calibration set: states chosen evenly over trajectories and their progress. Independent of any policy.

`calibration.json` names every state and what was left out; `samples.safetensors` holds `image_<index>` uint8
[H, W, 3] per state and, if the sources give them, `states` float32 [N, S] and the recorded `actions` float32 [N, K].
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tqdm import tqdm

from calibrator.data.layout import Gripper
from calibrator.data.records import Source, SourceIndex, Trajectory
from calibrator.tensors import save_tensors
from vla_policy.core.errors import ArtefactError, DataError
from vla_policy.core.files import read_json, sha256_file, sha256_folder, write_json
from vla_policy.core.left_out import told
from vla_policy.core.observation import Observation
from vla_policy.core.outputs import FolderKind, atomic_folder

KIND = "calibration"
_INDEX, _TENSORS = "calibration.json", "samples.safetensors"
CALIBRATION = FolderKind(KIND, _INDEX, (_TENSORS,))


def progress(step: int, length: int) -> float:
    """rho of Eq. (11) in [0, 1]; a trajectory of one state is at 0."""
    return step / (length - 1) if length > 1 else 0.0


@dataclass(frozen=True)
class Sample:
    """One calibration state z_i: where it comes from, its timestep tau and its trajectory's length T."""

    source: int
    trajectory: str
    step: int
    length: int
    instruction: str

    @property
    def progress(self) -> float:
        """rho of Mix-QVLA Eq. (11)."""
        return progress(self.step, self.length)


@dataclass(frozen=True)
class CalibrationSet:
    """States with their images (uint8 [H, W, 3], sizes may differ) and robot states (float32 [S] or None).

    images: of the first camera. further: of the others, per state. actions: float32 [N, K], what was recorded as
    carried out, NaN for a state without, None for a set without; grippers: per state, in which sense its gripper was
    recorded.
    """

    samples: tuple[Sample, ...]
    images: tuple[np.ndarray, ...]
    further: tuple[tuple[np.ndarray, ...], ...]
    states: tuple[np.ndarray | None, ...]
    actions: np.ndarray | None
    grippers: tuple[Gripper, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def progress(self) -> np.ndarray:
        """float64 [N]: every state's progress in its trajectory."""
        return np.asarray([sample.progress for sample in self.samples])

    @property
    def trajectories(self) -> int:
        return len({(sample.source, sample.trajectory) for sample in self.samples})

    def observation(self, index: int) -> Observation:
        """State `index` as a policy sees it."""
        return Observation(self.images[index], self.samples[index].instruction, self.states[index], self.further[index])


def choose_states(trajectories: list[Trajectory], count: int, seed: int) -> list[tuple[int, int]]:
    """`count` (trajectory index, step) pairs, evenly over trajectories and, across all of them, over progress.

    Trajectories share the count as equally as their usable states allow; each one's states are spread over its
    length with an offset that differs by trajectory, so that a few states per trajectory still cover all phases.
    `count` is at least 1, and at most what they hold.
    """
    generator = np.random.default_rng(seed)
    quotas = _quotas([len(trajectory.steps) for trajectory in trajectories], count, generator)
    holders = [index for index, quota in enumerate(quotas) if quota]
    offsets = (generator.permutation(len(holders)) + generator.random(len(holders))) / len(holders)
    chosen: list[tuple[int, int]] = []
    for index, offset in zip(holders, offsets, strict=True):
        steps, quota = list(trajectories[index].steps), quotas[index]
        for place in range(quota):
            target = (place + offset) / quota * (trajectories[index].length - 1)
            # The nearest usable step that is still free.
            step = min(steps, key=lambda candidate: (abs(candidate - target), candidate))
            steps.remove(step)
            chosen.append((index, step))
    return sorted(chosen)


def _quotas(sizes: list[int], count: int, generator: np.random.Generator) -> list[int]:
    """How many states each trajectory gives: an equal level, capped by what it has; the remainder to random ones."""
    level = 0
    while sum(min(size, level + 1) for size in sizes) <= count and level < max(sizes):
        level += 1
    quotas = [min(size, level) for size in sizes]
    more = [index for index, size in enumerate(sizes) if size > level]
    for index in generator.permutation(more)[: count - sum(quotas)]:
        quotas[index] += 1
    return quotas


def collect(
    sources: list[Source], out: Path, count: int, seed: int, judge: Callable[["CalibrationSet"], None] | None = None
) -> dict[str, Any]:
    """Chooses and writes a calibration set; returns what `calibration.json` holds.

    judge: looks at the set before it stands in its place. Raises DataError when too few states are usable, and as
    `judge`; nothing is written then.
    """
    if count < 1:
        raise DataError(f"{count} states were asked for; --samples must be at least 1")
    indices = [source.index() for source in sources]
    _check_usable(sources, indices, count)
    pool = [(number, trajectory) for number, index in enumerate(indices) for trajectory in index.trajectories]
    chosen = choose_states([trajectory for _, trajectory in pool], count, seed)
    wanted: list[dict[str, set[int]]] = [{} for _ in sources]
    for position, step in chosen:
        number, trajectory = pool[position]
        wanted[number].setdefault(trajectory.name, set()).add(step)
    lengths = {(number, trajectory.name): trajectory.length for number, trajectory in pool}
    samples, cameras, tensors = _read(sources, wanted, lengths)
    content: dict[str, Any] = {
        "schema_version": 1,
        "kind": KIND,
        "seed": seed,
        "images_per_state": cameras,
        "sources": [
            source.describe()
            | {
                "trajectories": len(index.trajectories),
                "left_out": [asdict(item) for item in index.left_out],
                "notes": list(index.notes),
            }
            for source, index in zip(sources, indices, strict=True)
        ],
        "samples": [asdict(sample) | {"progress": sample.progress} for sample in samples],
    }
    with atomic_folder(out, CALIBRATION) as folder:
        save_tensors(folder / _TENSORS, tensors, KIND)
        content["tensors_sha256"] = sha256_file(folder / _TENSORS)
        write_json(folder / _INDEX, content)
        if judge is not None:
            judge(load_calibration(folder))
    return content


def _read(
    sources: list[Source], wanted: list[dict[str, set[int]]], lengths: dict[tuple[int, str], int]
) -> tuple[list[Sample], int, dict[str, np.ndarray]]:
    """The states of the `wanted` steps, by source and trajectory, how many images each has, and all tensors by name."""
    samples: list[Sample] = []
    tensors: dict[str, np.ndarray] = {}
    states: list[np.ndarray | None] = []
    actions: list[np.ndarray | None] = []
    cameras: set[int] = set()
    count = sum(len(steps) for of_source in wanted for steps in of_source.values())
    with tqdm(total=count, desc="states", unit="state", disable=None) as bar:
        for number, source in enumerate(sources):
            for record in source.read({name: frozenset(steps) for name, steps in wanted[number].items()}):
                bar.update()
                name, observation = record.trajectory, record.observation
                for camera, image in enumerate(observation.images):
                    tensors[_image_name(len(samples), camera)] = np.ascontiguousarray(image)
                cameras.add(len(observation.images))
                samples.append(Sample(number, name, record.step, lengths[number, name], observation.instruction))
                states.append(observation.state)
                actions.append(record.action)
    if len(samples) != count:
        raise DataError(f"{count} states were chosen but {len(samples)} could be read; did a source change meanwhile?")
    if len(cameras) != 1:
        raise DataError(f"sources give different numbers of images ({cameras}); collect them into separate sets")
    return samples, cameras.pop(), tensors | _stacked("states", states) | _stacked("actions", _filled(actions))


def _check_usable(sources: list[Source], indices: list[SourceIndex], count: int) -> None:
    """Raises DataError, with everything that was left out, where too little remains."""
    usable = sum(len(trajectory.steps) for index in indices for trajectory in index.trajectories)
    if usable >= count:
        return
    reasons = [
        f"{source.path} left out {told(index.left_out)}"
        for source, index in zip(sources, indices, strict=True)
        if index.left_out
    ]
    advice = f"lower --samples to {usable} or add recordings" if usable else "mend the first cause, or add recordings"
    because = f": {'. '.join(reasons)}" if reasons else f": {', '.join(source.path for source in sources)} holds none"
    raise DataError(f"{count} states were asked for, the sources hold {usable} usable ones{because}; {advice}")


def _image_name(state: int, camera: int) -> str:
    return f"image_{state}_{camera}" if camera else f"image_{state}"


def _filled(actions: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """The actions, NaN where some state has none; all None where no state has one."""
    known = next((action for action in actions if action is not None), None)
    return [np.full_like(known, np.nan) if known is not None and one is None else one for one in actions]


def _stacked(what: str, rows: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    sizes = {None if row is None else len(row) for row in rows}
    if len(sizes) != 1:
        raise DataError(f"sources give {what} of different lengths ({sizes}); collect them into separate sets")
    return {} if None in sizes else {what: np.stack([np.asarray(row, np.float32) for row in rows])}


def load_calibration(folder: Path | str) -> CalibrationSet:
    """Reads a calibration set. Raises ArtefactError when it is missing, damaged or not the one that was written."""
    folder = Path(folder)
    content = read_json(folder / _INDEX, KIND)
    path = folder / _TENSORS
    if sha256_file(path) != content["tensors_sha256"]:
        raise ArtefactError(f"{path}: not the file that {_INDEX} was written with; collect the set again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtefactError(f"{path}: damaged or truncated ({error}); collect the set again") from error
    fields = Sample.__dataclass_fields__
    samples = tuple(Sample(**{name: item[name] for name in fields}) for item in content["samples"])
    states = tensors.get("states")
    return CalibrationSet(
        samples=samples,
        images=tuple(tensors[_image_name(index, 0)] for index in range(len(samples))),
        further=tuple(
            tuple(tensors[_image_name(index, camera)] for camera in range(1, content["images_per_state"]))
            for index in range(len(samples))
        ),
        states=tuple(states[index] if states is not None else None for index in range(len(samples))),
        actions=tensors.get("actions"),
        grippers=tuple(
            content["sources"][sample.source].get("layout", {}).get("gripper", "same") for sample in samples
        ),
        sha256=sha256_folder(folder, (_INDEX, _TENSORS)),
    )
