"""ATen operations by what they do to a map."""

from __future__ import annotations

FC_OPS = frozenset({"convolution", "addmm", "mm", "bmm", "linear", "conv1d", "conv2d"})
#: Operations on each value by itself (in eval mode, a BN is one): what comes out is still the same map.
ELEMENTWISE = frozenset(
    {
        "abs", "add", "alias", "batch_norm", "celu", "clamp", "clamp_max", "clamp_min", "clone",
        "contiguous", "cudnn_batch_norm", "detach", "div", "dropout", "elu", "erf", "exp", "expand", "gelu",
        "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p",
        "log_sigmoid_forward", "maximum", "minimum", "miopen_batch_norm", "mish", "mul",
        "native_batch_norm", "_native_batch_norm_legit_no_training", "native_dropout", "neg", "pow",
        "prelu", "_prelu_kernel", "reciprocal", "relu", "relu6", "_reshape_alias", "rsqrt", "rsub", "selu",
        "sigmoid", "silu", "softplus", "sqrt", "square", "sub", "tanh", "threshold", "_to_copy",
        "_unsafe_view", "view",
    }
)  # fmt: skip
#: Operations that only lay the same values out anew.
VIEWS = frozenset(
    {
        "alias", "as_strided", "clone", "contiguous", "detach", "flatten", "permute", "_reshape_alias", "reshape",
        "squeeze", "t", "transpose", "unsqueeze", "_unsafe_view", "view",
    }
)  # fmt: skip
#: Operations that repeat a value over positions.
BROADCASTS = frozenset(
    {"expand", "repeat", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d",
     "upsample_bicubic2d"}
)  # fmt: skip
#: Squeezes, by what they are called in a record.
POOLS = {
    "mean": "avg", "sum": "avg", "_adaptive_avg_pool2d": "avg", "adaptive_avg_pool2d": "avg", "avg_pool2d": "avg",
    "_adaptive_avg_pool3d": "avg", "amax": "max", "max": "max", "adaptive_max_pool2d": "max",
    "max_pool2d_with_indices": "max", "max_pool2d": "max", "amin": "min", "std": "std", "var": "std",
    "linalg_vector_norm": "norm",
}  # fmt: skip
SOFTMAX = frozenset({"_softmax", "softmax", "_safe_softmax"})


def base(op: str) -> str:
    """Return the name of an operation without the mark of its in-place form."""
    return op.removesuffix("_")
