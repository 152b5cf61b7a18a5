"""Verification: what it records, and that it notices any other byte, other arithmetic and other policies."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ragged import KEY, build_engine, write_policy
from rounding import NETWORK

from engine_build.__main__ import main
from engine_build.backends import find_backend
from engine_build.compiled import planned_bytes
from engine_build.graph.builder import GraphBuilder
from engine_build.graph.context import LinearWriter
from engine_build.numbers import tolerance_of
from engine_build.verify import States, verify
from engine_build.weights import LayerWeights
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file, sha256_policy
from vla_policy.core.manifest import Manifest, UnitRecord
from vla_policy.core.processor import cpu_name
from vla_policy.core.targets import find_target
from vla_policy.core.verification import Verification

STATES = States(None, samples=2)
FORMS = ("w2a16_g32", "w4a16_g32", "w4a16", "w8a16_g32", "w16a16", "w8a8", "w8a8_g32", "w4a8_g32", "w2a8_g64")


@pytest.fixture
def copied(workshop: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workshop / "engine", tmp_path / "engine"))


def rehash(engine: Path) -> None:
    """Makes the manifest's hashes and sizes those of the files as they are."""
    manifest = json.loads((engine / "manifest.json").read_text())
    for name in manifest["files"]:
        path = engine / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (engine / "manifest.json").write_text(json.dumps(manifest))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *sorted(folder.iterdir()))
    }


def test_the_outcome_is_an_artefact_of_its_own_and_the_engine_stays_as_it_is(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, policy, out = workshop / "engine", workshop / "policy", tmp_path / "verification.json"
    before = snapshot(engine)
    command = ["verify", str(engine), "--policy", str(policy), "--samples", "3", "--out", str(out)]
    assert main(command) == 0
    assert snapshot(engine) == before
    printed = capsys.readouterr().out
    found = Verification.load(out)
    assert found.summary in printed and f"on {cpu_name()}: 3 states; torch with the same formats" in printed
    assert found.parents == {"engine": sha256_file(engine / "manifest.json"), "policy": sha256_policy(policy)}
    assert found.bytes == sum(path.stat().st_size for path in engine.glob("*.onnx")) + sum(
        path.stat().st_size for path in engine.glob("*.data")
    )
    graphs = [onnx.load(str(path), load_external_data=False).graph for path in engine.glob("*.onnx")]
    assert found.tensors == sum(len(graph.initializer) for graph in graphs) and found.not_compared == ""
    content = json.loads(out.read_text())
    assert content["ran_on_target"] is True and content["processor"] == cpu_name()
    check = found.reference
    assert check is not None and check.layers is not None
    assert check.same_formats.scores_error < NETWORK and check.same_formats.equal_tokens == 1.0
    assert check.full_precision.scores_error > 0.01
    assert (check.source, check.statistics) == ("random images, seed 0", KEY)
    assert set(check.layers.formats) == {"w2a16_g32", "w4a16_g32", "w8a16_g32", "w16a16"}
    assert check.layers.between.error < NETWORK


def test_nothing_is_run_for_bytes_and_formats_alone(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_build.verify.load_engine", None)
    out = tmp_path / "verification.json"
    command = ["verify", str(workshop / "engine"), "--policy", str(workshop / "policy"), "--formats-only"]
    assert main([*command, "--out", str(out)]) == 0
    found = Verification.load(out)
    assert found.reference is None and "the engine was not run" in found.summary
    content = json.loads(out.read_text())
    assert content["ran_on_target"] is False and content["processor"] is None


def test_the_outcome_is_not_written_into_the_engine(workshop: Path) -> None:
    out = workshop / "engine" / "verification.json"
    with pytest.raises(ArtefactError, match="lies in the input"):
        main(["verify", str(workshop / "engine"), "--policy", str(workshop / "policy"), "--out", str(out)])
    assert not out.exists()


def test_another_policy_is_refused(copied: Path, tmp_path: Path) -> None:
    other = write_policy(tmp_path / "other", seed=1)
    with pytest.raises(ArtefactError, match=r"built from the policy .* name the engine's own policy"):
        verify(copied, other, None)


# --- bytes ------------------------------------------------------------------------------------------------------------


def tensors(engine: Path) -> Iterator[tuple[Path, onnx.ModelProto, onnx.TensorProto]]:
    """Every stored tensor, with its graph's file and model."""
    for path in sorted(engine.glob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            yield path, model, tensor


def alter(path: Path, model: onnx.ModelProto, tensor: onnx.TensorProto, bit: int = 1) -> None:
    """Flips one bit in the middle of a tensor, wherever that is stored."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    if external:
        with open(path.parent / external["location"], "r+b") as stream:
            place = int(external["offset"]) + int(external["length"]) // 2
            stream.seek(place)
            (byte,) = stream.read(1)
            stream.seek(place)
            stream.write(bytes([byte ^ bit]))
    else:
        content = bytearray(tensor.raw_data)
        content[len(content) // 2] ^= bit
        tensor.raw_data = bytes(content)
        path.write_bytes(model.SerializeToString(deterministic=True))


def test_one_bit_of_any_tensor_is_noticed(workshop: Path, copied: Path) -> None:
    """Codes, scales, 16-bit weights, norms, positions, embeddings, biases and constants: every one that is stored."""
    names = [tensor.name for _, _, tensor in tensors(copied)]
    kinds = ("codes", "scales", "weight", "norm1.weight", "pos_embed", "embed_tokens.weight", "bias", "scale_factor")
    assert all(any(name.endswith(kind) for name in names) for kind in (*kinds, "constant_0"))
    last = [name for name in names if name.endswith(".codes")][-1]
    alter(*next(found for found in tensors(copied) if found[2].name == last))
    rehash(copied)
    with pytest.raises(ArtefactError, match=rf"engine: {last} \(1 of [\d,]+ bytes\) not as policy and plan give them"):
        verify(copied, workshop / "policy", None)
    for index in range(len(names)):
        found = list(tensors(copied))[index]
        if found[2].name != last:
            alter(*found)
    rehash(copied)
    with pytest.raises(ArtefactError, match=rf" \(1 of [\d,]+ bytes\) and {len(names) - 1} more tensors not as"):
        verify(copied, workshop / "policy", None)


def change_a_node(engine: Path) -> None:
    model = onnx.load(str(engine / "decoder.onnx"), load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(one for one in attention.attribute if one.name == "do_rotary").i = 0
    (engine / "decoder.onnx").write_bytes(model.SerializeToString())


def append_bytes(engine: Path) -> None:
    with open(engine / "vision.data", "ab") as stream:
        stream.write(b"more")


def truncate(engine: Path) -> None:
    path = engine / "vision.data"
    path.write_bytes(path.read_bytes()[:-100])


def not_onnx(engine: Path) -> None:
    (engine / "vision.onnx").write_bytes(b"\xff" * 100)


def no_graph(engine: Path) -> None:
    (engine / "vision.onnx").write_bytes(b"")


def alter_a_kibibyte(engine: Path) -> None:
    """What passed when only whole decisions were compared, on a few states."""
    content = bytearray((engine / "decoder.data").read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 1024):
        content[place] ^= 0x11
    (engine / "decoder.data").write_bytes(content)


def another_tokenizer(engine: Path) -> None:
    path = engine / "tokenizer.json"
    path.write_text(path.read_text().replace("push", "pull"))


def another_range(engine: Path) -> None:
    """Every byte of the weights is right, and every action is half as large."""
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["policy_config"]["norm_stats"][KEY]["action"]["q99"] = [0.5, 1.0, 0.5]
    (engine / "manifest.json").write_text(json.dumps(manifest))


def another_input(engine: Path) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["graphs"]["vision"]["inputs"][0]["shape"][1] = 3
    (engine / "manifest.json").write_text(json.dumps(manifest))


def one_unit_less(engine: Path) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    del manifest["units"][0]
    (engine / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_node, r"the graph in decoder\.onnx \("),
        (append_bytes, r"vision\.data outside its tensors \(4 of 4 bytes\)"),
        (truncate, r"\(100 of .* bytes\)"),
        (not_onnx, r"vision\.onnx: not an ONNX model"),
        (no_graph, r"and \d+ more tensors not as policy and plan give them"),
        (alter_a_kibibyte, r"of .* bytes\).* not as policy and plan give them"),
        (another_tokenizer, r"tokenizer\.json: not the policy's"),
        (another_range, r"manifest\.json: policy_config is not the policy's"),
        (another_input, r"manifest\.json: graphs are not the engine's"),
        (one_unit_less, r"units are not the policy's layers, e\.g\. .*patch_embed\.proj"),
    ],
)
def test_everything_else_in_the_folder_is_compared_too(
    workshop: Path, copied: Path, change: Callable[[Path], None], message: str
) -> None:
    change(copied)
    rehash(copied)
    with pytest.raises(ArtefactError, match=message):
        verify(copied, workshop / "policy", None)


def test_a_manifest_that_claims_another_format_is_noticed(workshop: Path, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["units"][0]["realised"] = "w4a16_g32"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=r"patch_embed.proj is .*'w2a16_g32'.* the manifest says .*'w4a16_g32'"):
        verify(copied, workshop / "policy", None)
    manifest["units"][0]["planned"] = "w4a16_g32"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=r"patch_embed.proj.codes \(.* not as policy and plan give them"):
        verify(copied, workshop / "policy", None)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy` and `engine` with every form of a layer, those with 8-bit activations among them."""
    folder = tmp_path_factory.mktemp("rounded")
    build_engine(folder, list(FORMS), images=2)
    return folder


def test_8_bit_activations_loosen_no_other_layer(rounded: Path) -> None:
    found = verify(rounded / "engine", rounded / "policy", STATES).reference
    assert found is not None and found.layers is not None
    assert set(found.layers.formats) == set(FORMS)
    for name, worst in found.layers.formats.items():
        assert worst.allowed == (0.01 if "a8" in name else 1e-4), name
        assert worst.error <= worst.allowed / 5, name
    assert found.layers.between.error < NETWORK


def defective(monkeypatch: pytest.MonkeyPatch, is_hit: Callable[[LayerWeights], bool]) -> None:
    """An exporter that packs some layers' weights 2 % too large; the bytes are the same whenever it is asked."""

    def wrong(linear: LinearWriter, builder: GraphBuilder, x: str, weights: LayerWeights) -> str:
        if is_hit(weights):
            assert weights.quantized is not None
            scales = weights.quantized.scales * 1.02
            weights = replace(weights, quantized=replace(weights.quantized, scales=scales))
        return linear(builder, x, weights)

    for name in find_target("cpu").backends:  # which of them builds is the processor's matter
        backend = find_backend(name)
        plain = backend.dialect(())
        dialect = replace(plain, linear=partial(wrong, plain.linear))
        monkeypatch.setattr(backend, "dialect", lambda version, dialect=dialect: dialect)


@pytest.mark.parametrize("broken", ["w4a16_g32", "w8a8", "w4a8_g32"])
def test_a_layer_that_computes_otherwise_is_named_beside_8_bit_ones(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole decision stays within what 8-bit activations allow it."""
    hit = "language_model.model.layers.0.mlp.down_proj"
    formats = {"w4a16_g32": ["w8a8", broken], "w8a8": [broken], "w4a8_g32": [broken]}[broken]
    defective(monkeypatch, lambda weights: weights.layer.name == hit and str(weights.format) == broken)
    build_engine(tmp_path, formats)
    manifest = Manifest.load(tmp_path / "engine")
    assert next(unit.planned for unit in manifest.units if unit.name == hit) == broken
    assert tolerance_of(manifest) == 0.15
    message = rf"{hit}: its result \({broken}\) differs .* by 2\.\d\de-02 .*build it again"
    with pytest.raises(ArtefactError, match=message):
        verify(tmp_path / "engine", tmp_path / "policy", STATES)


def test_arithmetic_between_layers_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_build.graph.vision._NORM_EPS", 1e-2)
    build_engine(tmp_path, ["w8a8", "w4a16_g32"])
    with pytest.raises(ArtefactError, match=r"blocks\.0\.attn\.qkv: what comes to it differs from torch's"):
        verify(tmp_path / "engine", tmp_path / "policy", STATES)


def test_whole_decisions_are_compared(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not inside a pass: here, tokens that the engine reads from the wrong place."""
    from vla_policy.core.runner import Engine

    scores = Engine.scores
    monkeypatch.setattr(Engine, "scores", lambda self, state, decided: np.roll(scores(self, state, decided), 1, axis=1))
    with pytest.raises(ArtefactError, match="logits differ from the torch policy with the same formats"):
        verify(workshop / "engine", workshop / "policy", STATES)


@pytest.mark.parametrize("change", [{"tensors": None}, {"reference": {"states": 1}}])
def test_a_record_without_an_entry_is_refused(workshop: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    verify(workshop / "engine", workshop / "policy", None).save(tmp_path / "v.json")
    content = json.loads((tmp_path / "v.json").read_text()) | change
    content = {name: value for name, value in content.items() if value is not None}
    (tmp_path / "v.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="is missing or malformed; make it again with `engine_build verify --out`"):
        Verification.load(tmp_path / "v.json")


@pytest.mark.parametrize(
    ("planned", "inputs", "backend", "bytes_"),
    [
        ("w4a16_g32", 64, "onnxruntime", (320, 320)),
        ("w2a16_g32", 48, "onnxruntime", (120, 160)),
        ("w8a8", 50, "onnxruntime", (500, 500)),
        ("w16a16", 3, "tensorrt", (60, 60)),
        ("w2a16", 49, "tensorrt_rtx", (123, 125)),
        # Kernels of our own take 16 outputs and 128 inputs at a time.
        ("w2a16_g32", 48, "tensorrt", (120, 16 * 128 // 4)),
        ("w4a16_g32", 48, "tensorrt", (240, 16 * 128 // 2)),
        ("w4a8", 130, "tensorrt", (650, 16 * 256 // 2)),
    ],
)
def test_planned_bytes_count_codes_and_at_most_one_filling(
    planned: str, inputs: int, backend: str, bytes_: tuple[int, int]
) -> None:
    unit = UnitRecord("unit", "linear", "decoder", 10, inputs, planned, planned, "", 0, 0, None, None)
    assert planned_bytes(unit, find_backend(backend)) == bytes_
