"""Frames of a film by their time: only what stands between a chosen frame and the key frame before it is decoded."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from vla_policy.core.errors import DataError


def frames_at(path: Path, times_s: Sequence[float], tolerance_s: float) -> Iterator[np.ndarray]:
    """uint8 RGB [H, W, 3] of the frame nearest to each of the ascending `times_s`.

    Raises DataError where the file cannot be decoded, or has no frame within `tolerance_s`.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: holds no film; copy it again")
            stream = container.streams.video[0]
            for time_s in times_s:
                yield _nearest(container, stream, time_s, tolerance_s, path).to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be decoded ({error.strerror or error}); copy it again") from error


def _nearest(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    time_s: float,
    tolerance_s: float,
    path: Path,
) -> av.VideoFrame:
    assert stream.time_base is not None  # of every stream that a file holds
    container.seek(round(time_s / float(stream.time_base)), stream=stream)
    best: av.VideoFrame | None = None
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        if best is None or best.time is None or abs(frame.time - time_s) < abs(best.time - time_s):
            best = frame
        if frame.time >= time_s:
            break
    if best is None or best.time is None or abs(best.time - time_s) > tolerance_s:
        nearest = "it has none" if best is None else f"the nearest is at {best.time:.4f} s"
        raise DataError(f"{path}: no frame at {time_s:.4f} s, {nearest}; the film is shorter than its episode")
    return best
