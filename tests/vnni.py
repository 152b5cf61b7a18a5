"""What tests of the backend `onnxruntime_vnni` need of the processor."""

import pytest

from vla_policy.core.backends.onnxruntime_vnni import INSTRUCTIONS
from vla_policy.core.processor import cpu_lacks

_LACKING = cpu_lacks(INSTRUCTIONS)
needs_vnni = pytest.mark.skipif(bool(_LACKING), reason=f"processor lacks {_LACKING}")
