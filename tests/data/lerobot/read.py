"""Reads a data set with the real lerobot package and compares it with its parquet table: `python read.py SET`."""

import sys
import types
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402


def main(root: Path) -> None:
    data = LeRobotDataset("local/read", root=root)
    rows = pq.read_table(root / "data/chunk-000/file-000.parquet").to_pylist()
    assert len(data) == len(rows) == data.meta.total_frames
    for item, row in zip((data[index] for index in range(len(data))), rows, strict=True):
        assert set(item) == {*row, "task"}
        for name, value in row.items():
            got = item[name].numpy()
            if isinstance(value, dict):
                picture = np.asarray(Image.open(BytesIO(value["bytes"])))
                np.testing.assert_array_equal(np.rint(got.transpose(1, 2, 0) * 255).astype(np.uint8), picture)
            else:
                np.testing.assert_array_equal(np.ravel(got), np.ravel(np.asarray(value, got.dtype)))
    print(f"{root}: {len(data)} frames of {data.num_episodes} episodes with {sorted(item)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
