"""Channel shuffles (ShuffleNet, Zhang et al. 2018) in torch-pruning's graph, which takes them for elementwise.

A shuffle of g groups views (N, C, H, W) as (N, g, C/g, H, W), transposes and views back: channel j·C/g + k goes to
place k·g + j. A narrower network's shuffle does the same to the channels that stay where the g channels of every k,
whose places k·g, …, k·g + g - 1 follow each other, leave together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import shape_infer

#: What autograd calls a transpose, and views that may stand behind it.
TRANSPOSES = ("TransposeBackward", "PermuteBackward")
VIEWS = ("CloneBackward", "ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward")


class Shuffle:
    """An index mapping from a map to its shuffle, or back; `outer` groups of `inner` channels."""

    def __init__(self, outer: int, inner: int, *, back: bool) -> None:
        self.outer, self.inner, self.back = outer, inner, back

    def __call__(self, indices: Any) -> Any:
        """Map torch-pruning's pairs of an index and its root's."""
        rows, columns = (self.inner, self.outer) if self.back else (self.outer, self.inner)
        return [
            _HybridIndex(idx=i.idx % columns * rows + i.idx // columns, root_idx=i.root_idx) for i in indices
        ]


def plain_views(graph: Any) -> None:
    """Let the views of shuffles pass for elementwise: torch-pruning takes them for flattenings, or divides by zero."""
    for node in graph.module2node.values():
        if _shape_behind(node) is not None:
            for view in (*node.inputs, *_behind(node)):
                if _named(view, VIEWS):
                    view.type = ops.OPTYPE.ELEMENTWISE


def map_shuffles(graph: Any) -> None:
    """Teach a dependency graph where its shuffles put every channel; a node of one then counts behind it."""
    for node in graph.module2node.values():
        factors = _factors(graph, node)
        if factors is None:
            continue
        node.module.shuffle = factors[0]
        for source in node.inputs:
            for start, end, back in ((source, node, False), (node, source, True)):
                for dep in start.dependencies:
                    if dep.target is end:
                        dep.index_mapping[0] = Shuffle(*factors, back=back)


def shuffle_of(module: object) -> int | None:
    """Return the groups of the shuffle that a node of the graph is, None for any other."""
    groups: int | None = (
        getattr(module, "shuffle", None) if type(module).__name__ == "_ElementWiseOp" else None
    )
    return groups


def _factors(graph: Any, node: Any) -> tuple[int, int] | None:
    """Return g and C/g of a shuffle, None for any other node."""
    if _named(node, ("ChannelShuffleBackward",)):
        groups = node.grad_fn._saved_groups
        channels = shape_infer.infer_out_channels_recursively(graph, node.inputs[0], [0])
        return None if not channels else (groups, channels // groups)
    shape = _shape_behind(node)
    return None if shape is None else (shape[2], shape[1])


def _shape_behind(node: Any) -> tuple[int, ...] | None:
    """Return what the views behind a shuffle's transpose take, (N, C/g, g, H, W), None for any other node."""
    if not _named(node, TRANSPOSES):
        return None
    shape = next(filter(None, map(_shape_before, _behind(node))), None)
    return shape if shape is not None and _swaps(node.grad_fn, len(shape)) else None


def _named(node: Any, names: tuple[str, ...]) -> bool:
    return node.grad_fn is not None and node.grad_fn.name().startswith(names)


def _behind(node: Any) -> Iterator[Any]:
    """Yield the views that follow a transpose directly."""
    for following in node.outputs:
        if _named(following, VIEWS):
            yield following
            yield from _behind(following)


def _shape_before(node: Any) -> tuple[int, ...] | None:
    """Return the five sizes of what a view takes, None where it takes anything else."""
    shape = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
    return tuple(shape) if len(shape) == 5 else None


def _swaps(function: Any, dimensions: int) -> bool:
    """Say whether a transpose or a permutation swaps the dimensions 1 and 2 alone."""
    order = list(range(dimensions))
    if hasattr(function, "_saved_dims"):
        order = [_signed(d) % dimensions for d in function._saved_dims]
    else:
        first, second = (_signed(d) % dimensions for d in (function._saved_dim0, function._saved_dim1))
        order[first], order[second] = order[second], order[first]
    return order == [0, 2, 1, *range(3, dimensions)]


def _signed(value: int) -> int:
    """Return a dimension as it was given: autograd keeps negative ones modulo 2^64."""
    return value - (1 << 64) if value >= 1 << 63 else value
