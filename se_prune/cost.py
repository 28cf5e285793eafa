"""What a network costs: parameters, MACs by layer and by SE block, bytes on disk, measured latency.

MACs are those of convolutions and fully connected layers, one multiply-add = 1, as the paper counts them.
The elementwise work of the gates is counted beside them, and every other operation that ran is named with how
often. This is the only file that imports fvcore.

Shapes: one image (1, C, H, W); a gate is (1, C, 1, 1) or (1, C); positions are H·W, 1 for a vector.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_prune.errors import SePruneError
from se_prune.records import Cost, GateSite, Preprocessing

#: fvcore's handle: the inputs and outputs of a traced operation (`torch._C.Value`) to counts by name.
Handle = Callable[[Sequence[Any], Sequence[Any]], Counter[str]]

CONVOLUTIONS = ("aten::_convolution", "aten::_convolution_mode")
#: Matrix products, with which of their inputs are the rows and the weight.
PRODUCTS = {"aten::linear": (0, 1), "aten::addmm": (1, 2), "aten::mm": (0, 1), "aten::matmul": (0, 1)}
FC_KINDS = frozenset({*CONVOLUTIONS, *PRODUCTS})
MULTIPLIES = ("aten::mul", "aten::mul_", "aten::multiply", "aten::multiply_")
SQUEEZES = frozenset({"aten::mean", "aten::sum", "aten::adaptive_avg_pool2d", "aten::avg_pool2d"})
#: What a gate's activation may be written as, after the `expand` layer; one operation per gate value each.
ACTIVATIONS = frozenset(
    f"aten::{name}{suffix}"
    for name in ("sigmoid", "hardsigmoid", "hardtanh", "relu6", "clamp", "tanh", "add", "mul", "div")
    for suffix in ("", "_")
)
#: Operations that fvcore counts otherwise, or ignores as free; here they belong to the uncounted.
TALLIED = (
    "adaptive_avg_pool2d", "batch_norm", "bmm", "cat", "clamp", "clamp_", "constant_pad_nd", "einsum",
    "grid_sampler", "group_norm", "instance_norm", "layer_norm", "max", "relu", "relu_",
    "upsample_bilinear2d", "upsample_nearest2d",
)  # fmt: skip
#: Views that fvcore reports as operations.
VIEWS = ("aten::expand_as", "aten::view_as", "aten::alias")
EXPANSIONS = frozenset({"aten::expand", "aten::expand_as"})
WEIGHT_VIEWS = frozenset(
    f"aten::{name}" for name in ("t", "transpose", "permute", "view", "reshape", "detach")
)


def count_cost(model: nn.Module, preprocessing: Preprocessing, sites: Sequence[GateSite] = ()) -> Cost:
    """Count what one image of `preprocessing.input_size` costs; the model is left as it was.

    Args:
        model: Any network that can be traced; it is run once in eval mode, where it stands.
        preprocessing: Gives the input size (C, H, W).
        sites: The gate sites whose FC layers make `macs_se` and whose squeeze, activation and multiply make
            `macs_gate`. Without sites both are 0, and the gates' operations are among the uncounted.

    Returns:
        The cost; `per_layer` sums to `macs`. Products of two activations (attention) are no layer's MACs and
        stand in `uncounted`, as do copies (`cat`); views and reshapes are left out of everything.
    """
    expands = frozenset(site.expand for site in sites if site.expand is not None)
    counts = _traced_counts(model, preprocessing, expands)
    conv, linear = _under(counts, "conv"), _under(counts, "linear")
    per_layer = dict(conv + linear)
    gate_layers = {name for site in sites for name in site.layers}
    return Cost(
        params=count_params(model),
        macs=sum(per_layer.values()),
        macs_conv=sum(conv.values()),
        macs_linear=sum(linear.values()),
        macs_se=sum(per_layer.get(name, 0) for name in gate_layers),
        macs_gate=counts["gate"],
        input_size=preprocessing.input_size,
        per_layer=per_layer,
        uncounted=dict(sorted((_under(counts, "other") - _under(counts, "gated")).items())),
    )


def count_params(model: nn.Module) -> int:
    """Return the number of learnable parameters, frozen ones included; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_of(path: str | Path) -> int:
    """Return the size of a file, or of all files under a folder, in bytes.

    Raises:
        SePruneError: There is no such file.
    """
    target = Path(path)
    if not target.exists():
        raise SePruneError(f"{path} does not exist, so its size is not known; check the path.")
    files = [target] if target.is_file() else target.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _traced_counts(model: nn.Module, preprocessing: Preprocessing, expands: frozenset[str]) -> Counter[str]:
    """Return fvcore's counts by our own names, `KIND:NAME`, of one pass over one image."""
    parameter = next(model.parameters(), torch.zeros(()))
    example = torch.zeros(1, *preprocessing.input_size, dtype=parameter.dtype, device=parameter.device)
    with _eval_mode(model), torch.no_grad(), warnings.catch_warnings():
        # fvcore is built on torch.jit, which is deprecated and says so at import and at each trace.
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, (example,))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**_handles(_input_owners(model), expands))
        counts: Counter[str] = Counter(analysis.by_operator())
        for kind, times in analysis.unsupported_ops().items():
            counts[f"other:{_plain(kind)}"] += times
    return counts


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _under(counts: Counter[str], kind: str) -> Counter[str]:
    return Counter({key.partition(":")[2]: n for key, n in counts.items() if key.startswith(f"{kind}:")})


def _plain(kind: str) -> str:
    """Return the name of an operation without its namespace and without the mark of the in-place form."""
    return kind.rpartition("::")[2].removeprefix("PythonOp.").rstrip("_")


def _input_owners(model: nn.Module) -> list[str]:
    """Return the owner of each input of the traced graph: the image, then each tensor of the state."""
    owners, seen = [""], set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            owners.append(key.rpartition(".")[0])
    return owners


def _handles(owners: list[str], expands: frozenset[str]) -> dict[str, Handle | None]:
    handles: dict[str, Handle | None] = dict.fromkeys(VIEWS)
    handles |= {f"aten::{name}": _other(f"aten::{name}") for name in TALLIED}
    handles |= {kind: _convolution(owners) for kind in CONVOLUTIONS}
    handles |= {kind: _product(kind, owners) for kind in PRODUCTS}
    handles |= {kind: _multiply(kind, owners, expands) for kind in MULTIPLIES}
    return handles


def _other(kind: str) -> Handle:
    return lambda _inputs, _outputs: Counter({f"other:{_plain(kind)}": 1})


def _convolution(owners: list[str]) -> Handle:
    def count(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        from fvcore.nn.jit_handles import conv_flop_count

        # `padding="same"` is traced as `_convolution_mode`, unknown to fvcore; it is never transposed.
        transposed = bool(inputs[6].toIValue()) if len(inputs) > 7 else False
        shapes = (_shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0]))
        layer = _layer(outputs[0], inputs[1], owners)
        return Counter({f"conv:{layer}": conv_flop_count(*shapes, transposed)})

    return count


def _product(kind: str, owners: list[str]) -> Handle:
    rows, columns = PRODUCTS[kind]

    def count(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        weight = inputs[columns]
        if kind == "aten::matmul" and _unviewed(weight).node().kind() != "prim::Param":
            return Counter({"other:matmul": 1})
        macs = math.prod(_shape(outputs[0])) * _shape(inputs[rows])[-1]
        return Counter({f"linear:{_layer(outputs[0], weight, owners)}": macs})

    return count


def _multiply(kind: str, owners: list[str], expands: frozenset[str]) -> Handle:
    """Count a gate's multiply, and with it the activation and the squeeze that lead to it."""

    def count(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        result = Counter({f"other:{_plain(kind)}": 1})
        if _positions(outputs[0]) > 1:
            for operand in inputs[:2]:
                nodes = _gate_nodes(operand, owners, expands)
                if nodes:
                    result[f"gated:{_plain(kind)}"] += 1
                    result["gate"] += math.prod(_shape(outputs[0])) + sum(map(_elementwise, nodes))
                    result.update(f"gated:{_plain(node.kind())}" for node in nodes)
                    break
        return result

    return count


def _elementwise(node: Any) -> int:
    """Return one operation per value that a squeeze reads or an activation writes."""
    value = next(node.inputs()) if node.kind() in SQUEEZES else node.output()
    return math.prod(_shape(value))


def _gate_nodes(operand: Any, owners: list[str], expands: frozenset[str]) -> list[Any]:
    """Return the activation and squeeze operations behind a gate; empty if `operand` is no gate of ours."""
    value = operand
    while value.node().kind() in EXPANSIONS:
        value = next(value.node().inputs())
    after, ends = _walk_back([value], stop=FC_KINDS)
    if not any(_layer(end.output(), _operands(end)[1], owners) in expands for end in ends):
        return []
    before, _ = _walk_back([_operands(end)[0] for end in ends], stop=frozenset())
    return [n for n in after if n.kind() in ACTIVATIONS] + [n for n in before if n.kind() in SQUEEZES]


def _walk_back(values: list[Any], stop: frozenset[str]) -> tuple[list[Any], list[Any]]:
    """Walk back over values of one position each; return the operations seen, and those of a `stop` kind.

    The walk ends where a feature map begins, and goes through squeezes that pool one side after the other.
    """
    seen: dict[str, Any] = {}
    ends: dict[str, Any] = {}
    queue = [value for value in values if _inside_gate(value)]
    while queue:
        value = queue.pop()
        node, key = value.node(), value.debugName()
        if key in seen or key in ends:
            continue
        if node.kind() in stop:
            ends[key] = node
            continue
        seen[key] = node
        queue.extend(i for i in node.inputs() if _inside_gate(i))
    return list(seen.values()), list(ends.values())


def _inside_gate(value: Any) -> bool:
    if not value.isCompleteTensor() or value.node().kind() == "prim::Param":
        return False
    return _positions(value) == 1 or value.node().kind() in SQUEEZES


def _operands(node: Any) -> tuple[Any, Any]:
    """Return what a layer reads, and its weight."""
    inputs = list(node.inputs())
    rows, weight = PRODUCTS.get(node.kind(), (0, 1))
    return inputs[rows], inputs[weight]


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _positions(value: Any) -> int:
    return math.prod(_shape(value)[2:])


def _unviewed(value: Any) -> Any:
    while value.node().kind() in WEIGHT_VIEWS:
        value = next(value.node().inputs())
    return value


def _layer(output: Any, weight: Any, owners: list[str]) -> str:
    """Return the module that owns a weight; the module that is running where the weight is computed."""
    source = _unviewed(weight)
    if source.node().kind() == "prim::Param":
        return owners[int(source.offset())]
    return str(output.node().scopeName()).rpartition("/")[2]
