"""TensorRT-RTX: TensorRT's engines, ahead of time, on a machine without their GPU. It takes no plugins."""

from engine_build.backends.tensorrt import TensorRt
from engine_build.backends.tensorrt.builder import Module
from engine_build.backends.tensorrt.linear import linear

BACKEND = TensorRt(Module("tensorrt_rtx", "pip install tensorrt-rtx-cu13==1.7.1.116", ahead=True), linear)
