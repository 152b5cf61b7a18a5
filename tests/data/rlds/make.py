"""Makes the RLDS folder beside this file with the real tensorflow_datasets: `python make.py OUT`.

Its features are those of OpenVLA's modified_libero_rlds; images are JPEG there, PNG here, so that they can be compared.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

LENGTHS = (5, 7, 4)
TASKS = ("pick up the cup", "open the drawer", "push the button")


def picture(camera: int, episode: int, step: int) -> np.ndarray:
    """uint8 [32, 32, 3], reproducible."""
    return np.random.default_rng([camera, episode, step]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def numbers(episode: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [8] and [7]: state and action."""
    generator = np.random.default_rng([episode, step])
    return generator.normal(size=8).astype(np.float32), generator.uniform(-1, 1, 7).astype(np.float32)


class LiberoFixture(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        image = tfds.features.Image(shape=(32, 32, 3), dtype=np.uint8, encoding_format="png")
        observation = {
            "image": image,
            "wrist_image": image,
            "state": tfds.features.Tensor(shape=(8,), dtype=np.float32),
            "joint_state": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        }
        step = {
            "observation": tfds.features.FeaturesDict(observation),
            "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
            "discount": tfds.features.Scalar(dtype=np.float32),
            "reward": tfds.features.Scalar(dtype=np.float32),
            "is_first": tfds.features.Scalar(dtype=np.bool_),
            "is_last": tfds.features.Scalar(dtype=np.bool_),
            "is_terminal": tfds.features.Scalar(dtype=np.bool_),
            "language_instruction": tfds.features.Text(),
        }
        metadata = tfds.features.FeaturesDict({"file_path": tfds.features.Text()})
        features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, Any]]:
        for episode, length in enumerate(LENGTHS):
            steps = []
            for step in range(length):
                state, action = numbers(episode, step)
                observation = {"image": picture(0, episode, step), "wrist_image": picture(1, episode, step)}
                observation |= {"state": state, "joint_state": np.zeros(7, np.float32)}
                flags = {"is_first": step == 0, "is_last": step == length - 1, "is_terminal": step == length - 1}
                steps.append(
                    {
                        "observation": observation,
                        "action": action,
                        "discount": 1.0,
                        "reward": float(step == length - 1),
                        **flags,
                        "language_instruction": TASKS[episode],
                    }
                )
            yield str(episode), {"steps": steps, "episode_metadata": {"file_path": f"{episode}.hdf5"}}


if __name__ == "__main__":
    LiberoFixture(data_dir=sys.argv[1]).download_and_prepare()
