"""A policy family of three folders in `tests/toy`, known while these are where families are looked for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

FOLDERS = {
    "vla_policy.core.families": "robot",
    "calibrator.families": "calibrator",
    "engine_build.families": "engine_build",
}
_HERE = Path(__file__).parent / "toy"
_STATISTICS = {
    "action": {"min": [-0.5] * 3, "max": [0.5] * 3},
    "proprio": {"names": ["x", "gripper_width"], "min": [-1.0, 0.0], "max": [1.0, 0.1]},
}
_CONFIG = {"model_type": "toy", "width": 32, "side": 4, "norm_stats": {"toy": _STATISTICS}}


@contextmanager
def registered(*packages: str) -> Iterator[None]:
    """Inside the block, each of the packages finds the family's folder beside its own."""
    paths = [(import_module(package).__path__, str(_HERE / FOLDERS[package])) for package in packages]
    for path, folder in paths:
        path.append(folder)
    try:
        yield
    finally:
        for path, folder in paths:
            path.remove(folder)


def toy_policy_folder(folder: Path) -> Path:
    """Writes a random toy policy as somebody might publish it."""
    import torch
    from safetensors.torch import save_file

    from calibrator.families import find_family
    from vla_policy.core.policy_config import PolicyConfig

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    torch.manual_seed(0)
    config = PolicyConfig.load(folder)
    tensors = find_family(config).build(config).state_dict() | {"trained_with": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def engine_of(policy: Path, calibration: Path, folder: Path) -> Path:
    """Scores, plan and engine in `folder`, by the commands of a user; returns the engine's folder."""
    from calibrator.__main__ import main as calibrator
    from engine_build.__main__ import main as engine_build

    scores, plan, engine = (folder / name for name in ("sensitivity.json", "plan.json", "engine"))
    given = ["--policy", str(policy), "--calibration", str(calibration)]
    choices = ["--choices", "w2a16_g32", "w4a16_g32", "w8a16_g32"]
    assert calibrator(["sensitivity", *given, *choices, "--out", str(scores)]) == 0
    budget = ["--average-bits", "4", "--target", "cpu"]
    assert calibrator(["allocate", "--sensitivity", str(scores), *budget, "--out", str(plan)]) == 0
    built = ["--policy", str(policy), "--plan", str(plan), "--target", "cpu", "--out", str(engine)]
    assert engine_build(["build", *built]) == 0
    return engine
