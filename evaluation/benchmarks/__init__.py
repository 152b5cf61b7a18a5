"""Closed-loop benchmarks behind one interface (`base.BenchmarkEnv`)."""

import os

# MuJoCo picks its renderer when it is first imported, by whomever; without a display only EGL is reliable.
os.environ.setdefault("MUJOCO_GL", "egl")
