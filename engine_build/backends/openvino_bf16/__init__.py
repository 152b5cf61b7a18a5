"""OpenVINO with bfloat16 activations."""

from engine_build.backends.openvino import OpenVino
from vla_policy.core.backends.openvino import Precision

BACKEND = OpenVino(Precision.BFLOAT16, tolerance=0.1, float_error=0.05)
