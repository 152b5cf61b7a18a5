"""Makes the data sets beside this file with the real lerobot package: `python make.py OUT`.

lerobot 0.4.4 writes v3.0 (v3_av1, v3_h264, v3_images), lerobot 0.3.3 v2.1 (v21_av1, v21_images); which one is installed
decides. Its environment is its own (`pip install --no-deps lerobot==0.4.4`, torch, torchvision, datasets, av, ...).
"""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

# Compiled operators of torchvision, which lerobot never calls; they fit one build of torch only.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
import lerobot.datasets.lerobot_dataset as lerobot  # noqa: E402

FPS, SIZE = 10, 64
EPISODES = {"pick up the cup": 7, "open the drawer": 5, "push the button": 6}
STATE = ["x", "y", "z", "roll", "pitch", "yaw", "finger_left", "finger_right"]
ACTION = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def picture(camera: int, episode: int, step: int) -> np.ndarray:
    """uint8 [S, S, 3] that survives a lossy codec: four flat blocks, whose levels number camera, episode and step."""
    number = 100 * camera + 20 * episode + step
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    for block in range(4):
        level = 40 + 50 * (number // 4**block % 4)
        rows, columns = divmod(block, 2)
        image[rows * 32 : rows * 32 + 32, columns * 32 : columns * 32 + 32] = [level, 255 - level, 60 + 30 * block]
    return image


def frame(episode: int, step: int) -> dict[str, Any]:
    generator = np.random.default_rng([episode, step])
    return {
        "observation.images.image": picture(0, episode, step),
        "observation.images.wrist_image": picture(1, episode, step),
        "observation.state": generator.normal(size=8).astype(np.float32),
        "action": generator.uniform(-1, 1, 7).astype(np.float32),
    }


def make(root: Path, videos: bool, codec: str) -> None:
    kind = "video" if videos else "image"
    image = {"dtype": kind, "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.image": image,
        "observation.images.wrist_image": image,
        "observation.state": {"dtype": "float32", "shape": (8,), "names": STATE},
        "action": {"dtype": "float32", "shape": (7,), "names": ACTION},
    }
    original = lerobot.encode_video_frames

    def encode(*args: Any, **options: Any) -> None:
        original(*args, **options | {"vcodec": codec})

    lerobot.encode_video_frames = encode
    data = lerobot.LeRobotDataset.create(
        "local/fixture", FPS, features, root=root, robot_type="panda", use_videos=videos
    )
    for episode, (task, length) in enumerate(EPISODES.items()):
        for step in range(length):
            if lerobot.CODEBASE_VERSION == "v3.0":
                data.add_frame(frame(episode, step) | {"task": task})
            else:
                data.add_frame(frame(episode, step), task=task)
        data.save_episode()
    if lerobot.CODEBASE_VERSION == "v3.0":
        data.finalize()
    lerobot.encode_video_frames = original


def main(out: Path) -> None:
    version = {"v3.0": "v3", "v2.1": "v21"}[lerobot.CODEBASE_VERSION]
    make(out / f"{version}_av1", True, "libsvtav1")
    make(out / f"{version}_images", False, "")
    if version == "v3":
        make(out / f"{version}_h264", True, "h264")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
