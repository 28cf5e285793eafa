"""Concatenations and splits in torch-pruning's graph, by the sizes and the parts that autograd recorded.

torch-pruning takes the n-th reader of a split for the reader of its n-th part, which is wrong where a part is read
twice or out of order, and guesses the widths of a concatenation from the layers around it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex

from se_prune.fixed import filter_of, width_lists
from se_prune.gates.trace import Frame, module_stack

SPLITS: tuple[Any, ...] = (
    torch.split,
    torch.Tensor.split,
    torch.split_with_sizes,
    torch.Tensor.split_with_sizes,
)
CONVOLUTIONS: tuple[Any, ...] = (
    nn.functional.conv1d,
    nn.functional.conv2d,
    nn.functional.conv3d,
    torch.convolution,
)
#: What autograd keeps of a split into fixed widths, and of a convolution: the module that called it.
FIXED, CALLER = "se_prune fixed", "se_prune caller"


class Part:
    """An index mapping from a part at [start, end) to the whole, or back."""

    def __init__(self, start: int, end: int, *, back: bool) -> None:
        self.start, self.end, self.back = start, end, back

    def __call__(self, indices: Any) -> Any:
        """Map torch-pruning's pairs of an index and its root's; from the whole, those outside are left out."""
        if not self.back:
            return [_HybridIndex(idx=i.idx + self.start, root_idx=i.root_idx) for i in indices]
        return [
            _HybridIndex(idx=i.idx - self.start, root_idx=i.root_idx)
            for i in indices
            if self.start <= i.idx < self.end
        ]


def map_joints(nodes: Iterable[Any]) -> None:
    """Put every concatenation and split along the channels on exact mappings."""
    for node in nodes:
        if node.type == ops.OPTYPE.CONCAT and _along_channels(node.grad_fn):
            _map_concat(node)
        elif node.type == ops.OPTYPE.SPLIT and _along_channels(node.grad_fn):
            _map_split(node)


class _Marks(TorchFunctionMode):
    """Marks splits that are given the widths of their parts, and convolutions; `chunk` counts anew."""

    def __init__(self, model: nn.Module, stack: list[Frame]) -> None:
        super().__init__()
        self.modules, self.stack = dict(model.named_modules()), stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SPLITS and result[0].grad_fn is not None:
            result[0].grad_fn.metadata[FIXED] = self.modules[self.stack[-1].name]
        if func in CONVOLUTIONS and result.grad_fn is not None:
            result.grad_fn.metadata[CALLER] = self.modules[self.stack[-1].name]
        return result


@contextlib.contextmanager
def marks(model: nn.Module) -> Iterator[None]:
    """Note in autograd's graph of a forward pass which modules split maps and which convolve."""
    stack = [Frame("", 0)]
    with module_stack(model, stack), _Marks(model, stack):
        yield


def fixed_filter(node: Any) -> nn.Module | None:
    """Return the module whose fixed filter a node is, None for any other node."""
    function = node.grad_fn
    if isinstance(node.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or function is None:
        return None
    caller: nn.Module | None = function.metadata.get(CALLER)
    return caller if caller is not None and filter_of(caller) is not None else None


def follows(node: Any) -> bool:
    """Say whether a node is a split by a list of widths that its module can set anew after a cut."""
    sizes, caller = split_sizes(node), node.grad_fn.metadata.get(FIXED) if node.grad_fn is not None else None
    return (
        sizes is not None
        and caller is not None
        and any(
            tuple(getattr(module, name)) == sizes for module, name in width_lists(caller) if module is caller
        )
    )


def refusal(node: Any) -> str | None:
    """Say why channels that a node reads cannot leave: by fixed bounds, or each mixed with others."""
    if getattr(node.module, "mixed", False):
        return "a gate's convolution along the channels mixes each with its neighbours"
    if getattr(node.module, "unfollowed", False):
        return "torch-pruning does not follow a reshape of its channels"
    if split_sizes(node) is not None and FIXED in node.grad_fn.metadata and not follows(node):
        return "a split into fixed widths reads its channels"
    if _convolves(node) and fixed_filter(node) is None:
        return "a convolution whose weights are no layer's own reads its channels"
    if node.type == ops.OPTYPE.SLICE and _along_channels(node.grad_fn):
        function = node.grad_fn
        width = function._saved_self_sym_sizes[1]
        if function._saved_start > 0 or function._saved_end < width or function._saved_step > 1:
            return "a slice of fixed bounds reads its channels"
    return None


def _convolves(node: Any) -> bool:
    """Say whether a node is a convolution that no layer made."""
    layer = isinstance(node.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not layer and node.grad_fn is not None and node.grad_fn.name().startswith("ConvolutionBackward")


def split_sizes(node: Any) -> tuple[int, ...] | None:
    """Return the widths of a split's parts along the channels, None for any other node."""
    if node.type != ops.OPTYPE.SPLIT or not _along_channels(node.grad_fn):
        return None
    return tuple(part.shape[1] for part in node.grad_fn._input_metadata)


def _along_channels(function: Any) -> bool:
    rank = len(function._input_metadata[0].shape) if function is not None else 0
    dim = getattr(function, "_saved_dim", None)
    return dim is not None and rank > 1 and (dim - (1 << 64) + rank if dim >= 1 << 63 else dim) == 1


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


def _map_concat(node: Any) -> None:
    sources = [(function, output) for function, output in node.grad_fn.next_functions if function is not None]
    if len(sources) != len(node.inputs):
        return
    node.enable_index_mapping = False
    widths = [function._input_metadata[output].shape[1] for function, output in sources]
    node.module.concat_sizes, bounds = widths, _bounds(widths)
    for source in dict.fromkeys(node.inputs):
        own = [bound for given, bound in zip(node.inputs, bounds, strict=True) if given is source]
        _set(source, node, own, slot=1, back=False)
        _set(node, source, own, slot=1, back=True)


def _map_split(node: Any) -> None:
    node.enable_index_mapping = False
    bounds = _bounds([part.shape[1] for part in node.grad_fn._input_metadata])
    for reader in dict.fromkeys(node.outputs):
        read = [output for function, output in reader.grad_fn.next_functions if function == node.grad_fn]
        own = [bounds[output] for output in read]
        _set(node, reader, own, slot=0, back=True)
        _set(reader, node, own, slot=0, back=False)


def _set(start: Any, end: Any, parts: Sequence[tuple[int, int]], *, slot: int, back: bool) -> None:
    """Give the dependencies from one node to another a part each, in order."""
    edges = [dep for dep in start.dependencies if dep.target is end]
    for dep, (first, last) in zip(edges, parts, strict=False):
        dep.index_mapping[slot] = Part(first, last, back=back)
