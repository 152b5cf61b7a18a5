"""The policy as ONNX graphs, written straight from the checkpoint's tensors: exact formats, same input same bytes."""
