"""A short film of what the camera saw, for looking at failures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_policy.core.errors import DataError
from vla_policy.core.outputs import atomic_path


def write_video(path: Path, frames: Sequence[np.ndarray], frames_per_second: float = 10.0) -> None:
    """Writes `frames` (uint8 [H, W, 3], equal and even sizes) as H.264 MP4, atomically; replaces an earlier film.

    Raises DataError without frames. Needs imageio-ffmpeg, which comes with the simulator extras.
    """
    import imageio_ffmpeg

    if not frames:
        raise DataError(f"{path}: no frames to write")
    height, width = frames[0].shape[:2]
    with atomic_path(path, None) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=frames_per_second,
            codec="libx264",
            macro_block_size=2,
            output_params=["-f", "mp4", "-crf", "28", "-threads", "1"],
            ffmpeg_log_level="error",
        )
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
