"""Whether ONNX Runtime's one operator for a residual sum and its norm beats the two nodes that engines have.

    python benchmarks/residual_norm.py [--threads 1]

Chains of 16 residual sums with a root-mean-square norm after each: Add and SimplifiedLayerNormalization, against
SkipSimplifiedLayerNormalization, in turns, under the session settings of engines. Medians per sum and norm, and how far
the results are apart.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from engine_build.graph.builder import MICROSOFT, GraphBuilder
from vla_policy.core.backends.onnxruntime.session import open_session, session_options
from vla_policy.core.cli import run

_PAIRS = 16
_EPSILON = 1e-5
_SIZES = {(54, 192): 400, (1, 192): 400, (290, 4096): 16, (1, 4096): 400}
"""Rows and width, of the small policy's prompt and step and OpenVLA-7B's, and how often each is run."""


def chain(path: Path, width: int, joined: bool) -> Path:
    """A graph of x, y [rows, width] float32 whose output `out` is the sum of all norms."""
    with GraphBuilder(path) as b:
        weight = b.constant(np.random.default_rng(0).random(width), np.float32)
        x, norms = "x", []
        for index in range(_PAIRS):
            if joined:
                values = b.nodes(
                    "SkipSimplifiedLayerNormalization", [x, "y", weight], 4, f"pair{index}", MICROSOFT, epsilon=_EPSILON
                )
                norm, x = values[0], values[3]
            else:
                x = b.add(x, "y")
                norm = b.node("SimplifiedLayerNormalization", [x, weight], f"norm{index}", axis=-1, epsilon=_EPSILON)
            norms.append(norm)
        b.rename(b.node("Sum", norms), "out")
        shape: list[str | int | None] = ["rows", width]
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
        b.save(inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)])
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of each session (default %(default)s)")
    args = parser.parse_args(arguments)
    generator = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        for (rows, width), repeats in _SIZES.items():
            given = {name: generator.standard_normal((rows, width), np.float32) for name in ("x", "y")}
            chains = [chain(Path(folder) / f"{width}-{joined}.onnx", width, joined) for joined in (False, True)]
            sessions = [open_session(path, session_options(args.threads)) for path in chains]
            taken = np.empty((repeats, 2))
            for repeat in range(-2, repeats):  # the first two warm up
                for which, session in enumerate(sessions):
                    begin = time.perf_counter()
                    session.run(None, given)
                    if repeat >= 0:
                        taken[repeat, which] = time.perf_counter() - begin
            two, one = np.median(taken, axis=0) / _PAIRS * 1e6
            left, right = (session.run(None, given)[0] for session in sessions)
            apart = np.abs(left - right).max() / np.abs(left).max()
            print(f"{rows} x {width}: two nodes {two:.2f} us, one {one:.2f} us ({one / two:.2f}), {apart:.1e} apart")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
