"""TensorRT's w8a8, from the table to the engine: the fixed scales that were scored are those that run."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fake_source import FakeSource
from onnx import numpy_helper
from tiny import tiny_policy_folder

from calibrator.__main__ import main
from calibrator.data.calibration import collect
from calibrator.sensitivity.table import Sensitivity
from engine_build.build import Request, build
from evaluation.actors import ActorSpec
from vla_policy.core.errors import ArtefactError
from vla_policy.core.manifest import Manifest
from vla_policy.core.targets import find_target

ORIN = find_target("orin-jp7")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy`, `calibration`, `table.json`, and `plan.json` of it for a Jetson with 8-bit activations everywhere."""
    folder = tmp_path_factory.mktemp("fixed")
    tiny_policy_folder(folder / "policy")
    collect([FakeSource((3, 2))], folder / "calibration", count=2, seed=0)
    inputs = ["--policy", str(folder / "policy"), "--calibration", str(folder / "calibration")]
    table, plan = ["--out", str(folder / "table.json")], ["--out", str(folder / "plan.json")]
    assert main(["sensitivity", *inputs, *table, "--target", "orin-jp7", "--choices", "w8a8"]) == 0
    assert main(["allocate", "--sensitivity", table[1], *plan, "--target", "orin-jp7", "--average-bits", "8"]) == 0
    return folder


def test_the_engine_has_the_scales_that_were_scored_without_being_shown_states_again(
    planned: Path, tmp_path: Path
) -> None:
    table = Sensitivity.load(planned / "table.json")
    build(Request(planned / "policy", ORIN, tmp_path / "packed", plan=planned / "plan.json", pack=True))
    manifest = Manifest.load(tmp_path / "packed")
    assert manifest.input_peaks == dict(table.input_peaks) and len(manifest.input_peaks) == len(table.units)
    steps = {}
    for spec in manifest.graphs.values():
        graph = onnx.load(tmp_path / "packed" / spec.file).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "QuantizeLinear":
                steps[node.name.removesuffix(".input_codes")] = numpy_helper.to_array(stored[node.input[1]])
    assert steps == {name: np.float16(np.float32(peak / 127)) for name, peak in table.input_peaks.items()}


def test_codes_and_closed_loop_keep_the_plan_s_scales(planned: Path, tmp_path: Path) -> None:
    store = tmp_path / "weights"
    arguments = ["--policy", str(planned / "policy"), "--plan", str(planned / "plan.json"), "--out", str(store)]
    assert main(["quantize", *arguments]) == 0
    peaks = Sensitivity.load(planned / "table.json").input_peaks
    build(Request(planned / "policy", ORIN, tmp_path / "packed", weights=store, pack=True))
    assert Manifest.load(tmp_path / "packed").input_peaks == dict(peaks)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    name = "language_model.model.layers.1.mlp.up_proj"
    for spec in (
        ActorSpec("policy", planned / "policy", plan=planned / "plan.json"),
        ActorSpec("policy", planned / "policy", weights=store),
    ):
        layer, seen = spec.load().policy.get_submodule(name), list[np.ndarray]()  # type: ignore[attr-defined]
        layer.register_forward_pre_hook(lambda _, args, rows=seen: rows.append(args[0].numpy()))
        with torch.no_grad():
            layer(x)
        step = np.float16(peaks[name] / 127).astype(np.float32)
        np.testing.assert_allclose(seen[0], np.clip(np.rint(x.numpy() / step), -128, 127) * step, rtol=0, atol=1e-6)


def test_a_plan_without_scales_wants_states(planned: Path, tmp_path: Path) -> None:
    content = json.loads((planned / "plan.json").read_text())
    content["input_peaks"].popitem()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(content))
    request = Request(planned / "policy", ORIN, tmp_path / "packed", plan=plan, pack=True)
    with pytest.raises(ArtefactError, match=r"plan: 1 layers have 8-bit activations, .* name states .* --calibration"):
        build(request)
    with pytest.raises(ArtefactError, match="in w8a8: orin-jp7 rounds its input with one fixed scale, and its largest"):
        ActorSpec("policy", planned / "policy", plan=plan).load()
