"""What of a record a policy sees, in the same words for every kind of source, and the layouts of published sets."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError
from vla_policy.core.image import centre_crop, rotate_180

Colours = Literal["rgb", "bgr"]
Gripper = Literal["same", "opposite"]
_PART = re.compile(r"(?P<feature>[^\[\]]+)(?:\[(?P<picks>[^\[\]]+)\])?")


@dataclass(frozen=True)
class RecordLayout:
    """Names are the source's own: features of LeRobot and RLDS, datasets within an HDF5 demonstration, topics of a bag.

    cameras: in the policy's order; empty: the only one there is.
    state: parts that are joined in this order, each a feature or some of its values, `observation.state[x,y,z]`,
        `obs/ee_states[0:3]`; None: what the format itself calls the state, empty: no state.
    action: what was recorded as carried out; None: what the format itself calls so, if it is there.
    task: the feature that holds the task in words; None: where the format keeps it.
    instruction: the task where a record tells none.
    rotation: degrees by which stored images are turned for the policy, one for all cameras or one each; None: nobody
        said.
    crop_area: the centre that is kept, part of the area in (0, 1], likewise.
    colours: the order in which images are stored.
    gripper: whether a larger recorded value means the same as a larger value of the policy, or the opposite.
    """

    cameras: tuple[str, ...] = ()
    state: tuple[str, ...] | None = None
    action: str | None = None
    task: str | None = None
    instruction: str = ""
    rotation: tuple[int, ...] | None = None
    crop_area: tuple[float, ...] = (1.0,)
    colours: Colours = "rgb"
    gripper: Gripper = "same"

    def view(self, image: np.ndarray, camera: int) -> np.ndarray:
        """uint8 [H, W, 3] as the policy sees it, of what is stored for the camera of this number."""
        image = np.ascontiguousarray(image[..., ::-1]) if self.colours == "bgr" else image
        assert self.rotation is not None  # `settled`
        image = rotate_180(image) if _of(self.rotation, camera) else image
        area = _of(self.crop_area, camera)
        return centre_crop(image, area) if area < 1 else image

    def settled(self, where: str, held: "Held") -> "RecordLayout":
        """The layout with what the source itself says in place of what was left open.

        Raises DataError for what neither says, and for names that the source does not have.
        """
        cameras = self.cameras or held.cameras
        if not self.cameras and len(cameras) != 1:
            got = f"{len(cameras)} cameras ({', '.join(cameras)})" if cameras else "no camera"
            raise DataError(f"{where}: it holds {got}; name the policy's, in its order, with --camera")
        rotation = self.rotation or held.rotation
        if rotation is None:
            raise DataError(
                f"{where}: nothing in it tells which way up its images are; say --rotate 180 if they are stored upside "
                "down, as LIBERO's are, else --rotate 0"
            )
        for name, values in (("--rotate", rotation), ("--crop-area", self.crop_area)):
            if len(values) not in (1, len(cameras)):
                raise DataError(f"{name}: {len(values)} values for {len(cameras)} cameras; give one, or one each")
        state = held.state if self.state is None else self.state
        layout = replace(self, cameras=cameras, rotation=rotation, state=state, action=self.action or held.action)
        for what, names, known in (
            ("camera", cameras, held.cameras),
            ("state", [part.feature for part in layout.parts], held.vectors),
            ("action", [layout.action] if layout.action else [], held.vectors),
            ("task", [layout.task] if layout.task else [], held.texts),
        ):
            for name in names:
                if name not in known:
                    raise DataError(f"{where}: no {what} {name!r}; it holds {', '.join(known) or 'none'}")
        return layout

    def joined(
        self, vectors: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]] | None = None
    ) -> np.ndarray | None:
        """float32 [S]: the state of one record, whose numbers are `vectors` [1, n] by feature; None for no state.

        names: of a feature's n values, where the source has some. Raises DataError for a value that is not there.
        """
        if not self.parts:
            return None
        rows = [part.take(vectors[part.feature], (names or {}).get(part.feature, ())) for part in self.parts]
        return np.concatenate(rows, axis=1)[0].astype(np.float32)

    @property
    def parts(self) -> "tuple[Part, ...]":
        return tuple(map(Part.parse, self.state or ()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def named(preset: str | None, **given: Any) -> "RecordLayout":
        """The preset (None: nothing is said) with what is given, not None, in place of its parts.

        Raises DataError for an unknown preset and values that are none.
        """
        if preset is not None and preset not in PRESETS:
            raise DataError(f"--layout {preset!r}: no such preset; known are {', '.join(PRESETS)}")
        told: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
        layout = replace(PRESETS[preset] if preset else RecordLayout(), **told)
        strange = [area for area in layout.crop_area if not 0 < area <= 1]
        if strange:
            raise DataError(f"--crop-area {strange[0]:g}: expected a part in (0, 1]")
        for text in layout.state or ():
            Part.parse(text)
        return layout

    @staticmethod
    def of_contract(contract: Contract) -> "RecordLayout":
        """What a topic contract says of a bag, in these words."""
        return RecordLayout(
            cameras=tuple(camera.topic for camera in contract.cameras),
            state=contract.state_names,
            task=contract.instruction.topic,
            rotation=tuple(180 if camera.rotate_180 else 0 for camera in contract.cameras),
            crop_area=tuple(camera.crop_area for camera in contract.cameras),
        )


@dataclass(frozen=True)
class Held:
    """What a source says of itself: names of images, numbers [T, n] and texts, and what its format calls by what."""

    cameras: tuple[str, ...]
    vectors: Sequence[str]
    texts: Sequence[str] = ()
    state: tuple[str, ...] = ()
    action: str | None = None
    rotation: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Part:
    """One part of the state: a feature, and which of its values by number, name or range; all of them without."""

    feature: str
    picks: tuple[str, ...] = field(default=())

    @staticmethod
    def parse(text: str) -> "Part":
        """Raises DataError for text of another form."""
        found = _PART.fullmatch(text.strip())
        if found is None:
            raise DataError(f"state {text!r}: expected FEATURE or FEATURE[values], e.g. observation.state[0:6]")
        picks = found["picks"]
        return Part(found["feature"], tuple(pick.strip() for pick in picks.split(",")) if picks else ())

    def take(self, values: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
        """[T, s] of the feature's values [T, n]. names: of the n values, where the source has some.

        Raises DataError for a value that is not there.
        """
        rows = values.reshape(len(values), -1)
        if not self.picks:
            return rows
        return rows[:, [place for pick in self.picks for place in self._places(pick, rows.shape[1], names)]]

    def _places(self, pick: str, size: int, names: Sequence[str]) -> Sequence[int]:
        if list(names).count(pick) == 1:
            return [list(names).index(pick)]
        first, _, last = pick.partition(":")
        if first.isdecimal() and (last.isdecimal() or pick == first):
            chosen = range(int(first), int(last) if last else int(first) + 1)
            if chosen and chosen[-1] < size:
                return chosen
        known = f"named {', '.join(names)}" if names else "without names"
        raise DataError(f"{self.feature}: no one value {pick!r}; it has {size}, {known}")


def _of(values: Sequence[Any], camera: int) -> Any:
    return values[camera] if len(values) > 1 else values[0]


_EXPORTED = RecordLayout(
    cameras=("observation.images.image", "observation.images.image2"),
    state=("observation.state",),
    action="action",
    rotation=(0,),
)
_SIMULATED = RecordLayout(
    cameras=("obs/agentview_rgb", "obs/eye_in_hand_rgb"),
    state=("obs/ee_states", "obs/gripper_states"),
    action="actions",
    rotation=(180,),
    gripper="opposite",
)
PRESETS: Mapping[str, RecordLayout] = {
    "lerobot/libero": _EXPORTED,
    "HuggingFaceVLA/libero": _EXPORTED,
    "physical-intelligence/libero": RecordLayout(
        cameras=("image", "wrist_image"), state=("state",), action="actions", rotation=(0,)
    ),
    "modified_libero_rlds": RecordLayout(
        cameras=("observation/image", "observation/wrist_image"),
        state=("observation/state",),
        action="action",
        task="language_instruction",
        rotation=(0,),
        gripper="opposite",
    ),
    "libero-hdf5": _SIMULATED,
    "regenerated-libero-hdf5": _SIMULATED,
}
"""Layouts of published sets. The simulator's images are upside down and its gripper closes at 1; OpenVLA's conversion
turned the images (what was exported from it is upright), and its training turned the gripper so that 1 opens."""
