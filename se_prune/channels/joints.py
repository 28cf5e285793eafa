"""Concatenations and splits in torch-pruning's graph, by the sizes and the parts that autograd recorded.

torch-pruning takes the n-th reader of a split for the reader of its n-th part, which is wrong where a part is read
twice or out of order, and guesses the widths of a concatenation from the layers around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex

SPLITS: tuple[Any, ...] = (
    torch.split,
    torch.Tensor.split,
    torch.split_with_sizes,
    torch.Tensor.split_with_sizes,
)
FIXED = "se_prune fixed"


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


class MarkSplits(TorchFunctionMode):
    """Marks splits that are given the widths of their parts, which a cut does not change; `chunk` counts anew."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SPLITS and result[0].grad_fn is not None:
            result[0].grad_fn.metadata[FIXED] = True
        return result


def refusal(node: Any) -> str | None:
    """Say why channels that a node reads cannot leave: by fixed bounds, or each mixed with others."""
    if getattr(node.module, "mixed", False):
        return "a gate's convolution along the channels mixes each with its neighbours"
    if node.type == ops.OPTYPE.SPLIT and _along_channels(node.grad_fn) and FIXED in node.grad_fn.metadata:
        return "a split into fixed widths reads its channels"
    if node.type == ops.OPTYPE.SLICE and _along_channels(node.grad_fn):
        function = node.grad_fn
        width = function._saved_self_sym_sizes[1]
        if function._saved_start > 0 or function._saved_end < width or function._saved_step > 1:
            return "a slice of fixed bounds reads its channels"
    return None


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
