"""Graphs of ONNX Runtime engines are written as they shall run: it has nothing left to choose by processor."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from pi05_policy import PI0, tiny_pi05_folder
from ragged import write_policy
from tiny import tiny_policy_folder

from calibrator.quantizers import parse_choice
from engine_build.build import Request, build
from vla_policy.core.backends.onnxruntime.session import session_options
from vla_policy.core.targets import find_target

HIGHEST = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def operators(graph: Path, options: ort.SessionOptions, optimised: Path) -> Counter[str]:
    options.optimized_model_filepath = str(optimised)
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(optimised), load_external_data=False).graph.node)


@pytest.mark.parametrize("choice", ["w16a16", "w8a16", "w4a16_g32", "w4a8_g32", "w8a8"])
@pytest.mark.parametrize(
    "policy",
    [
        write_policy,
        lambda folder: tiny_policy_folder(folder, chunk=4),
        tiny_pi05_folder,
        lambda folder: tiny_pi05_folder(folder, **PI0),
    ],
    ids=["openvla", "openvla_oft", "pi05", "pi0"],
)
def test_the_highest_level_finds_no_other_operators(
    policy: Callable[[Path], Path], choice: str, tmp_path: Path
) -> None:
    request = Request(
        policy(tmp_path / "policy"), find_target("cpu"), tmp_path / "engine",
        uniform=parse_choice(choice), backend="onnxruntime",
    )  # fmt: skip
    for spec in build(request).graphs.values():
        graph, highest = tmp_path / "engine" / spec.file, session_options(1)
        highest.graph_optimization_level = HIGHEST
        ours = operators(graph, session_options(1), tmp_path / "ours.onnx")
        assert ours == operators(graph, highest, tmp_path / "highest.onnx")
