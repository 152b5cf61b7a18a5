"""`prove`: with ONNX Runtime for real; packed graphs compiled and shown by stand-ins for TensorRT and its GPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from choices import rtn
from ragged import KEY, write_plan

from engine_build.__main__ import main
from engine_build.build import Request, build
from engine_build.golden import GOLDEN, Golden
from engine_build.verify import verify
from engine_build.weights import layers_of
from vla_policy.core.bench import Bench
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file, sha256_policy
from vla_policy.core.formats import Format
from vla_policy.core.manifest import Manifest, file_records
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.processor import cpu_name
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target
from vla_policy.core.verification import Verification

REPEATS = ("--repeats", "2")


@pytest.fixture(scope="module")
def engines(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed CPU engine with golden states, and the 16-bit one."""
    folder, cpu = tmp_path_factory.mktemp("prove"), find_target("cpu")
    build(Request(workshop / "policy", cpu, folder / "mixed", plan=workshop / "plan.json", golden=3))
    build(Request(workshop / "policy", cpu, folder / "sixteen", uniform=rtn(Format(16, 16))))
    return folder


def command(engines: Path, out: Path, engine: str = "mixed") -> list[str]:
    return ["prove", str(engines / engine), "--against", str(engines / "sixteen"), "--target", "cpu",
            "--out", str(out), *REPEATS]  # fmt: skip


def test_golden_states_come_back_as_they_were(engines: Path) -> None:
    golden = Golden.load(engines / "mixed")
    assert (golden.source, golden.unnorm_key, len(golden.states)) == ("random images, seed 0", KEY, 3)
    golden.save(engines)
    again = Golden.load(engines)
    for ours, theirs in zip(golden.states, again.states, strict=True):
        assert ours.instruction == theirs.instruction
        np.testing.assert_array_equal(ours.image, theirs.image)
    for one, other in zip(golden.same + golden.full, again.same + again.full, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.decision.action, other.decision.action)
    # Quantized and full precision are two policies.
    assert not np.array_equal(golden.same[0].scores, golden.full[0].scores)
    (engines / GOLDEN).write_bytes((engines / GOLDEN).read_bytes()[:-9])
    with pytest.raises(ArtefactError, match=r"golden\.safetensors: damaged \(.*copy or build the engine again"):
        Golden.load(engines)


def test_an_engine_is_proven_without_torch_and_policy(engines: Path, tmp_path: Path) -> None:
    """The real command, in a process in which torch, transformers and cvxpy cannot be imported."""
    blocked = "import sys\nfor name in ('torch', 'transformers', 'cvxpy'): sys.modules[name] = None\n"
    run = f"{blocked}from engine_build.__main__ import main\nsys.exit(main({command(engines, tmp_path / 'proof')!r}))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Verification.load(tmp_path / "proof" / "verification.json")
    assert found.ran_on_target and found.reference is not None
    assert found.parents["engine"] == sha256_file(engines / "mixed" / "manifest.json")
    assert found.reference.processor == cpu_name() and found.reference.source == "golden states (random images, seed 0)"
    assert found.reference.same_formats.scores_error < 1e-4 and found.reference.same_formats.equal_tokens == 1.0
    assert found.reference.full_precision.scores_error > 0.01
    timed = Bench.load(tmp_path / "proof" / "bench.json")
    assert (timed.engine.engine, timed.reference.engine) == ("mixed", "sixteen")
    page = (tmp_path / "proof" / "proof.md").read_text()
    for title in ("engine: passed", "16-bit engine: passed", "single layers: not tried", "golden states: passed"):
        assert f"## {title}" in page
    assert "speed-up of a whole action" in page


def test_what_is_not_as_it_should_be_is_exit_code_1_and_in_the_report(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Golden.load(engines / "mixed")
    shifted = tuple(replace(one, scores=np.roll(one.scores, 1, axis=1)) for one in golden.same)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (engines / "mixed").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    replace(golden, same=shifted).save(broken)
    replace(Manifest.load(broken), files=file_records(broken)).write(broken)
    arguments = command(engines, tmp_path / "proof")
    arguments[1] = str(broken)
    assert main(arguments) == 1
    assert "FAILED golden states" in capsys.readouterr().out
    page = (tmp_path / "proof" / "proof.md").read_text()
    assert "## golden states: FAILED" in page and "logits differ from the torch policy with the same formats" in page
    assert Verification.load(tmp_path / "proof" / "verification.json").reference is None


@pytest.mark.parametrize(
    ("engine", "target", "message"),
    [
        ("sixteen", "cpu", r"sixteen/golden\.safetensors: no golden states; build the engine with `--golden 4"),
        ("mixed", "orin-jp7", r"mixed: for target cpu, not orin-jp7; name the target's engine"),
    ],
)
def test_where_nothing_can_be_begun_it_is_one_line(
    engines: Path, tmp_path: Path, engine: str, target: str, message: str
) -> None:
    arguments = command(engines, tmp_path / "proof", engine)
    arguments[arguments.index("cpu")] = target
    with pytest.raises(ArtefactError, match=message):
        main(arguments)
    assert not (tmp_path / "proof").exists()


def test_a_target_that_compiles_nothing_packs_nothing(workshop: Path, tmp_path: Path) -> None:
    request = Request(workshop / "policy", find_target("cpu"), tmp_path / "e", uniform=rtn(Format(8, 16)), pack=True)
    with pytest.raises(ArtefactError, match="target cpu with onnxruntime compiles nothing; build without --pack"):
        build(request)


# --- packed on a workstation, compiled on a device that is a stand-in -------------------------------------------------


def plugins_and_blocks(policy: Path, path: Path) -> Path:
    config = PolicyConfig.load(policy)
    formats = {"encoder": Format(8, 16), "patch_embed": Format(8, 16), "head": Format(16, 16)}
    plan = {
        name: rtn(formats.get(layer.kind) or (Format(4, 16, 64) if "mlp" in name else Format(2, 16, 32)))
        for name, layer in layers_of(config).items()
    }
    return write_plan(path, sha256_policy(policy), plan)


@pytest.fixture(scope="module")
def packed(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, orin = tmp_path_factory.mktemp("packed"), find_target("orin-jp7")
    plan = plugins_and_blocks(workshop / "policy", folder / "plan.json")
    build(Request(workshop / "policy", orin, folder / "mixed", plan=plan, golden=2, pack=True))
    build(Request(workshop / "policy", orin, folder / "sixteen", uniform=rtn(Format(16, 16)), pack=True))
    return folder


def test_packed_graphs_are_verified_where_the_policy_is_and_not_served(workshop: Path, packed: Path) -> None:
    """No TensorRT is needed to write them, and every byte is compared."""
    manifest = Manifest.load(packed / "mixed")
    assert manifest.packed and manifest.notes[-1].startswith("not compiled")
    found = verify(packed / "mixed", workshop / "policy", None)
    assert found.not_compared == "" and found.bytes > sum(unit.code_bytes for unit in manifest.units)
    with pytest.raises(ArtefactError, match=r"packed for NVIDIA Jetson AGX Orin, JetPack 7.*, not compiled yet; run"):
        load_engine(packed / "mixed")


@pytest.mark.usefixtures("device")
def test_packed_graphs_are_compiled_and_read_back_on_the_device(packed: Path, tmp_path: Path) -> None:
    """There is no GPU, so that nothing can be decided, and the proof says so."""
    arguments = ["prove", str(packed / "mixed"), "--against", str(packed / "sixteen"), "--out", str(tmp_path / "proof")]
    assert main([*arguments, *REPEATS]) == 1
    engine, before = Manifest.load(tmp_path / "proof" / "engine"), Manifest.load(packed / "mixed")
    assert not engine.packed and engine.backend_version == "11.4.1"
    assert engine.parents == before.parents and engine.notes[-1].startswith("compiled from packed graphs, manifest")
    assert {unit.realised for unit in engine.units} >= {"w2a16_g32", "w4a16_g64", "w8a16", "w16a16"}
    engine.check_files(tmp_path / "proof" / "engine")
    page = (tmp_path / "proof" / "proof.md").read_text()
    assert "## engine: passed" in page and "## golden states: FAILED" in page and "pycuda" in page
    content = json.loads((tmp_path / "proof" / "verification.json").read_text())
    assert content["ran_on_target"] is False and content["tensors"] > len(engine.units)
