"""Opening an ONNX classifier as a torch network: read without trust, converted, compared with onnxruntime.

onnx2torch 1.5.15 was tried first. It needs weights as initializers (PaddlePaddle writes Constant nodes) and has no
ReduceMean of opset 18 (our own exports have), fvcore fails on the modules that it makes, and no file can hold them
without pickle.
"""

from se_prune.onnx_file.opening import open_onnx

__all__ = ["open_onnx"]
