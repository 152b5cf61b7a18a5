"""Whether ONNX Runtime multiplies on this processor as planned: a numeric probe of each format.

The probe is a graph of the engine, one small layer per format. Beside each result, named as the format, it gives what
must come, `FORMAT:expected`, and the largest difference, `FORMAT:allowed`.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from vla_policy.core.errors import ArtefactError
from vla_policy.core.processor import cpu_name

FILE = "probe.onnx"
GIVEN, EXPECTED, ALLOWED = "given", "expected", "allowed"


def check_arithmetic(folder: Path, session: ort.InferenceSession) -> None:
    """Raises ArtefactError naming the first format that is computed otherwise, for one row or for many."""
    names = [output.name for output in session.get_outputs()]
    many = dict(zip(names, session.run(names, {}), strict=True))
    one = dict(zip(names, session.run(names, {"x": many[GIVEN][:, :1]}), strict=True))
    for fmt in (name for name in names if f"{name}:{EXPECTED}" in many):
        for outputs in (one, many):
            rows = outputs[fmt].shape[1]
            expected, allowed = (many[f"{fmt}:{what}"][:, :rows] for what in (EXPECTED, ALLOWED))
            if not (np.abs(outputs[fmt] - expected) <= allowed).all():
                raise ArtefactError(
                    f"{folder}: on this processor, {cpu_name()}, ONNX Runtime {ort.__version__} computes {fmt} with "
                    f"{rows} rows otherwise than planned: a kernel is missing, or the engine was built for another "
                    "version of vla_policy; build it here, or with formats of 16-bit activations (engine_build build "
                    "--plan or --uniform)"
                )
