"""TensorRT-RTX: TensorRT's engines, ahead of time, on a machine without their GPU. It takes no plugins."""

from engine_build.backends.base import deferred
from engine_build.backends.tensorrt import TensorRt
from engine_build.backends.tensorrt.builder import Module

_MODULE = Module("tensorrt_rtx", "pip install tensorrt-rtx-cu13==1.7.1.116", ahead=True)
BACKEND = TensorRt(_MODULE, deferred("engine_build.backends.tensorrt.linear", "linear"))
