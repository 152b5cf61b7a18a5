"""Both published layouts of pi0.5 and pi0 become one kind of policy folder; what does not fit is one line."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pi05_policy import KEY, PI0, tiny_config, tiny_pi05_folder
from safetensors.torch import load_file, save_file

from calibrator.__main__ import main
from calibrator.families import TorchActor, load_policy
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

STATS = tiny_config()["norm_stats"][KEY]
SIZES = {name: tiny_config()[name] for name in ("vision_config", "text_config", "expert_config", "vocab_size")}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pi05_folder(tmp_path_factory.mktemp("pi05") / "policy")


@pytest.fixture(scope="module")
def pi0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pi05_folder(tmp_path_factory.mktemp("pi0") / "policy", **PI0 | {"max_state_dim": 5})


def state_stats(names: Sequence[str] = ("q01", "q99")) -> dict[str, Any]:
    return {name: STATS["proprio"][name] for name in names}


def openpi(policy: Path, folder: Path, statistics: Sequence[str] = ("q01", "q99")) -> Path:
    """The policy as openpi's converter writes it."""
    folder.mkdir()
    shutil.copyfile(policy / "model.safetensors", folder / "model.safetensors")
    shutil.copyfile(policy / "tokenizer.json", folder / "tokenizer.json")
    raw = {"action_dim": 5, "action_horizon": 4, "paligemma_variant": "dummy", "precision": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw | SIZES))
    assets = folder / "assets" / "robot" / KEY
    assets.mkdir(parents=True)
    stats = {"norm_stats": {"state": state_stats(statistics), "actions": STATS["action"]}}
    (assets / "norm_stats.json").write_text(json.dumps(stats))
    return folder


def lerobot(policy: Path, folder: Path, prefix: str = "model.", statistics: Sequence[str] = ("q01", "q99")) -> Path:
    """The policy as lerobot saves it."""
    folder.mkdir()
    shutil.copyfile(policy / "tokenizer.json", folder / "tokenizer.json")
    tensors = {prefix + name: value for name, value in load_file(policy / "model.safetensors").items()}
    dead = f"{prefix}paligemma_with_expert.gemma_expert.lm_head.weight"
    save_file(tensors | {dead: torch.zeros(576, 64)}, folder / "model.safetensors")
    raw = {
        "type": "pi05", "chunk_size": 4, "n_action_steps": 2, "max_action_dim": 5, "num_inference_steps": 3,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
        "input_features": {
            "observation.images.base": {"type": "VISUAL", "shape": [3, 32, 32]},
            "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 32, 32]},
            "observation.state": {"type": "STATE", "shape": [2]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [3]}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw | SIZES))
    values = {f"action.{name}": value for name, value in STATS["action"].items()}
    values |= {f"observation.state.{name}": value for name, value in state_stats(statistics).items()}
    for side, kind in (("pre", "normalizer"), ("post", "unnormalizer")):
        file = f"policy_{side}processor_step_2_{kind}_processor.safetensors"
        save_file({name: torch.tensor(value) for name, value in values.items()}, folder / file)
        steps = [{"registry_name": "device_processor"}, {"registry_name": f"{kind}_processor", "state_file": file}]
        (folder / f"policy_{side}processor.json").write_text(json.dumps({"name": side, "steps": steps}))
    return folder


GIVEN = ["--state-names", "x", "gripper_width"]
OF_OPENPI = [*GIVEN, "--convention", "openpi", "--images", "1", "--executed", "2", "--normalization", "quantiles"]


def imported(checkpoint: Path, out: Path, *options: str) -> int:
    return main(["import-pi05", "--checkpoint", str(checkpoint), "--out", str(out), *options])


def refused(checkpoint: Path, out: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is said of a checkpoint of lerobot that is not imported, line by line; nothing is left."""
    assert imported(checkpoint, out, *options, "--convention", "lerobot") == 2
    assert not out.exists()
    return capsys.readouterr().err.strip().splitlines()


def test_an_openpi_checkpoint_decides_what_its_weights_decide(policy: Path, tmp_path: Path) -> None:
    assert imported(openpi(policy, tmp_path / "checkpoint"), tmp_path / "policy", *OF_OPENPI) == 0
    config = PolicyConfig.load(tmp_path / "policy")
    assert (config.horizon, config.executed, config.num_images, config.state_dim) == (4, 2, 1, 2)
    assert list(config.norm_stats) == [f"robot/{KEY}"]
    shutil.copyfile(policy / "noise.npy", tmp_path / "policy" / "noise.npy")
    raw = json.loads((tmp_path / "policy/config.json").read_text())
    (tmp_path / "policy/config.json").write_text(json.dumps(raw | {"num_inference_steps": 3}))
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    seen = Observation(image, "open the drawer", np.array([0.3, 0.02]))
    first, second = (TorchActor.load(folder).act(seen) for folder in (policy, tmp_path / "policy"))
    assert np.array_equal(first.action, second.action) and first.action.shape == (4, 3)


def test_the_bank_of_noises_is_drawn_from_a_seed(policy: Path, tmp_path: Path) -> None:
    checkpoint, banks = openpi(policy, tmp_path / "checkpoint"), []
    for number, seed in enumerate(("0", "0", "1")):
        out = tmp_path / f"policy{number}"
        assert imported(checkpoint, out, *OF_OPENPI, "--noise-seed", seed) == 0
        banks.append(np.load(out / "noise.npy"))
    assert np.array_equal(banks[0], banks[1]) and not np.array_equal(banks[0], banks[2])
    for bank in banks:
        assert bank.shape == (64, 4, 5) and bank.dtype == np.float32
        # Of 1280 numbers: four standard errors.
        assert abs(bank.mean()) < 4 / 1280**0.5 and abs(bank.std() - 1) < 4 / 2560**0.5
        assert len(np.unique(bank)) > 1270, "no entry is another's copy"


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_lerobot_checkpoint_loads_with_its_names_and_statistics(policy: Path, tmp_path: Path, prefix: str) -> None:
    checkpoint = lerobot(policy, tmp_path / "checkpoint", prefix)
    assert imported(checkpoint, tmp_path / "policy", *GIVEN, "--convention", "lerobot") == 0
    config = PolicyConfig.load(tmp_path / "policy")
    assert (config.horizon, config.executed, config.num_images) == (4, 2, 1)
    stats = config.stats(None)
    np.testing.assert_allclose(stats.action.high, STATS["action"]["q99"], rtol=1e-6)
    assert stats.proprio is not None and stats.proprio.names == ("x", "gripper_width")
    wanted, got = load_policy(policy).state_dict(), load_policy(tmp_path / "policy").state_dict()
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def changed(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (without("model.safetensors"), [], "model.safetensors: no such file"),
        (without("tokenizer.json"), [], "tokenizer.json: no such file; name PaliGemma's with --tokenizer"),
        (without("policy_postprocessor.json"), [], "policy_postprocessor.json: cannot be read"),
        (changed(type="pi0"), [], "type is 'pi0', expected 'pi05', as the weights are"),
        (changed(normalization_mapping={"STATE": "MEAN_STD"}), [], "STATE and ACTION are MEAN_STD and QUANTILES"),
        (changed(normalization_mapping={"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}), [], "both must be QUANTILES or"),
        (changed(normalization_mapping={"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}), [], "'mean' is missing"),
        (changed(max_action_dim=6), [], "action_in_proj.weight' has shape [64, 5], expected [64, 6]"),
        (changed(chunk_size=1), [], "n_action_steps: 2 of a chunk_size of 1 rows"),
        (changed(use_relative_actions=True), [], "use_relative_actions: True is not supported; only False is"),
        (lambda folder: None, ["--state-names", "x"], "a state of 2 values, --state-names gives 1"),
        (tensors(lambda t: t.pop("model.action_in_proj.bias")), [], "'action_in_proj.bias' missing"),
        (tensors(lambda t: t.update({"model.extra": torch.zeros(1)})), [], "'extra' does not belong to the"),
        (tensors(lambda t: t.update({"model.state_proj.bias": torch.zeros(64)})), [], "'state_proj.bias' does not"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    policy: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = lerobot(policy, tmp_path / "checkpoint")
    damage(checkpoint)
    assert message in refused(checkpoint, tmp_path / "out", *GIVEN, *options, capsys=capsys)[-1]


def test_only_openpi_s_code_leaves_the_state_out(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = lerobot(policy, tmp_path / "checkpoint")
    (error,) = refused(checkpoint, tmp_path / "out", capsys=capsys)
    assert "lerobot's code writes every pi0.5's state into the prompt" in error and "--state-names" in error
    assert imported(checkpoint, tmp_path / "out", "--convention", "openpi") == 0
    assert "; 1 images, no state; " in capsys.readouterr().out
    config = PolicyConfig.load(tmp_path / "out")
    assert not config.takes_state and config.stats(None).proprio is None


OF_BOTH = ("mean", "std")


def pi0_of_lerobot(policy: Path, folder: Path) -> Path:
    """Its type is another, and so is what a mapping means that is left out."""
    checkpoint = lerobot(policy, folder, statistics=OF_BOTH)
    changed(type="pi0", normalization_mapping={"VISUAL": "IDENTITY"}, max_state_dim=5)(checkpoint)
    return checkpoint


def pi0_of_openpi(policy: Path, folder: Path) -> Path:
    return openpi(policy, folder, OF_BOTH)


@pytest.mark.parametrize(
    ("publish", "options"),
    [
        (pi0_of_openpi, ["--convention", "openpi", "--images", "1", "--executed", "2", "--normalization", "mean_std"]),
        (pi0_of_lerobot, ["--convention", "openpi"]),
    ],
    ids=["openpi", "lerobot"],
)
def test_a_pi0_checkpoint_decides_what_its_weights_decide(
    pi0: Path,
    tmp_path: Path,
    publish: Callable[[Path, Path], Path],
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert imported(publish(pi0, tmp_path / "checkpoint"), tmp_path / "policy", *GIVEN, *options) == 0
    assert "pi0; chunks of 4 rows, 2 carried out, of 3 values; 1 images, a state of 2 values as a row before the" in (
        capsys.readouterr().out
    )
    raw = json.loads((tmp_path / "policy/config.json").read_text())
    assert (raw["variant"], raw["state_in_prompt"], raw["normalization"]) == ("pi0", False, "mean_std")
    shutil.copyfile(pi0 / "noise.npy", tmp_path / "policy" / "noise.npy")
    (tmp_path / "policy/config.json").write_text(json.dumps(raw | {"num_inference_steps": 3}))
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    seen = Observation(image, "open the drawer", np.array([0.3, 0.02]))
    first, second = (TorchActor.load(folder).act(seen) for folder in (pi0, tmp_path / "policy"))
    # lerobot's statistics are float32.
    np.testing.assert_allclose(first.action, second.action, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda folder: None, [], "this is pi0, which takes a state; name its values with --state-names"),
        (lambda folder: None, ["--state-names", "x"], "a state of 2 values, --state-names gives 1"),
        (changed(type="pi05"), GIVEN, "type is 'pi05', expected 'pi0', as the weights are"),
        (changed(max_state_dim=6), GIVEN, "state_proj.weight' has shape [64, 5], expected [64, 6]"),
        (changed(max_state_dim=1), GIVEN, "2 values of the state, max_state_dim is 1"),
        (changed(max_action_dim=2), GIVEN, "3 values of an action, max_action_dim is 2"),
        (changed(chunk_size=1), GIVEN, "n_action_steps: 2 of a chunk_size of 1 rows"),
        (changed(normalization_mapping={"STATE": "QUANTILES", "ACTION": "QUANTILES"}), GIVEN, "'q01' is missing"),
        (changed(use_delta_joint_actions_aloha=True), GIVEN, "use_delta_joint_actions_aloha: True is not supported"),
        (tensors(lambda t: t.pop("model.state_proj.bias")), GIVEN, "'state_proj.bias' missing"),
        (tensors(lambda t: t.update({"model.time_mlp_in.bias": torch.zeros(64)})), GIVEN, "does not belong to"),
        (
            tensors(lambda t: t.pop("model.action_time_mlp_in.weight")),
            GIVEN,
            "type is 'pi0', expected 'pi05', as the weights are",
        ),
    ],
)
def test_a_pi0_that_does_not_fit_is_one_line_and_leaves_nothing(
    pi0: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = pi0_of_lerobot(pi0, tmp_path / "checkpoint")
    damage(checkpoint)
    (error,) = refused(checkpoint, tmp_path / "out", *options, capsys=capsys)
    assert message in error


def test_an_openpi_checkpoint_does_not_tell_its_images(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = openpi(policy, tmp_path / "checkpoint")
    assert imported(checkpoint, tmp_path / "out", *GIVEN, "--convention", "openpi") == 2
    assert "does not tell its images; name it with --images" in capsys.readouterr().err
    shutil.rmtree(checkpoint / "assets")
    assert imported(checkpoint, tmp_path / "out", *OF_OPENPI) == 2
    assert "no assets/NAME/norm_stats.json" in capsys.readouterr().err
