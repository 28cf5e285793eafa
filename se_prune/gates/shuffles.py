"""Which layers' channels a channel shuffle reorders (ShuffleNet, Zhang et al. 2018): view, transpose, view.

Shapes: N images, C channels, H×W positions.
"""

from __future__ import annotations

from se_prune.gates.trace import Trace

SHUFFLES = frozenset({"transpose", "permute"})
MAKERS = frozenset({"convolution", "addmm", "mm", "linear"})


def shuffled_layers(record: Trace) -> set[str]:
    """Return the convolutions whose outputs, or sums or concatenations of them, are shuffled.

    A shuffle is a transpose of (N, a, b, H, W); attention transposes other shapes.
    """
    layers: set[str] = set()
    for index, node in enumerate(record.nodes):
        if node.op in SHUFFLES and len(node.shape) == 5 and node.inputs:
            layers |= _makers(record, index)
    return layers


def _makers(record: Trace, start: int) -> set[str]:
    found: set[str] = set()
    seen: set[int] = set()
    queue = [start]
    while queue:
        index = queue.pop()
        if index in seen:
            continue
        seen.add(index)
        node = record.nodes[index]
        if node.op in MAKERS:
            found.update(node.layers)
        else:
            queue.extend(node.inputs)
    return found
