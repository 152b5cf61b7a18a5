"""OpenVINO with bfloat16 activations, on processors that multiply them (AMX or AVX512-BF16)."""

from vla_policy.core.backends.openvino import OpenVino, Precision

BACKEND = OpenVino("openvino_bf16", Precision.BFLOAT16)
