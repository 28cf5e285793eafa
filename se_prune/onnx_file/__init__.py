"""Opening an ONNX classifier as a torch network: read without trust, converted, compared with onnxruntime."""

from se_prune.onnx_file.opening import open_onnx

__all__ = ["open_onnx"]
