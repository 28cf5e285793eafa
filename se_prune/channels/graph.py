"""torch-pruning's dependency graph of a network, and the groups in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import ops
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.group import Group

from se_prune.artifact import CONV_TYPES, NORM_TYPES
from se_prune.channels.joints import map_joints, marks
from se_prune.channels.shuffles import map_shuffles, plain_views
from se_prune.errors import SurgeryError
from se_prune.records import GateSite

Role = Literal["out", "in", "channelwise"]
#: A group with more members than this, and than the network has operations, is taken for one that never ends.
LEAST_MEMBERS = 200
OUT_FNS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
IN_FNS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


@contextlib.contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Let torch-pruning trace: gradients on, eval mode, and everything back as it was afterwards."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(True)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        _forget_gradients(model)


def _forget_gradients(model: nn.Module) -> None:
    """Take what modules computed and kept for later (attention biases) out of autograd's graph: else none is copied."""
    for module in model.modules():
        for held in (vars(module), *(v for v in vars(module).values() if isinstance(v, dict))):
            for key, value in held.items():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    held[key] = value.detach()


def _free_mixers(module2node: Mapping[Any, Any]) -> None:
    """Take convolutions of one channel, along the channels (ECA), out of every dependency; mark their neighbours.

    torch-pruning takes the channels for features of that one, and follows them in ever longer lists.
    """
    mixers = {
        node for module, node in module2node.items() if isinstance(module, nn.Conv1d) and _is_mixer(module)
    }
    for mixer in mixers:
        _plain_behind(mixer)
        for neighbour in (*mixer.inputs, *mixer.outputs):
            neighbour.module.mixed = True
    for node in module2node.values():
        node.dependencies = [] if node in mixers else [d for d in node.dependencies if d.target not in mixers]


def _plain_behind(node: Any) -> None:
    """Let the first views behind a node pass for elementwise: what they lay out anew are channels already."""
    for following in node.outputs:
        if following.type == ops.OPTYPE.RESHAPE:
            following.type = ops.OPTYPE.ELEMENTWISE
        elif following.type == ops.OPTYPE.ELEMENTWISE and "Mul" not in following.grad_fn.name():
            _plain_behind(following)


def _is_mixer(module: nn.Conv1d) -> bool:
    return module.in_channels == module.out_channels == 1


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """torch-pruning's graph, with views that are no flattenings made known before it looks at shapes; mapped once."""

    def _build_dependency(self, module2node: Any) -> None:
        super()._build_dependency(module2node)
        plain_views(self)
        map_joints(module2node.values())
        _free_mixers(module2node)

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Sequence[int]) -> Any:
        """Return a group by the mappings that the graph has; torch-pruning would guess them anew every time."""
        update = index_mapping.update_index_mapping
        index_mapping.update_index_mapping = lambda _: None
        try:
            return super().get_pruning_group(module, pruning_fn, idxs)
        finally:
            index_mapping.update_index_mapping = update


@contextlib.contextmanager
def _marked_reshapes() -> Iterator[None]:
    """Mark the reshapes on which torch-pruning divides by zero (attention), where it would give up the network."""
    original = index_mapping.update_reshape_index_mapping

    def update(graph: Any, node: Any) -> None:
        try:
            original(graph, node)
        except ZeroDivisionError:
            node.module.unfollowed = True

    index_mapping.update_reshape_index_mapping = update
    try:
        yield
    finally:
        index_mapping.update_reshape_index_mapping = original


def build_graph(model: nn.Module, example: torch.Tensor) -> Any:
    """Return torch-pruning's dependency graph.

    Raises:
        SurgeryError: torch-pruning cannot trace the network.
    """
    try:
        with _gradients(model), marks(model), _marked_reshapes():
            graph = _Graph().build_dependency(model, example_inputs=example, verbose=False)
            map_shuffles(graph)
            return graph
    except Exception as error:
        raise SurgeryError(
            f"torch-pruning cannot trace this network ({type(error).__name__}: {str(error)[:200]}); "
            "it cannot be cut."
        ) from error


class _EndlessError(Exception):
    """A group has more members than the network has operations; `members` are the layers that make it so far."""

    def __init__(self, members: set[Any]) -> None:
        super().__init__()
        self.members = members


#: The first layer of a group, and the group; or None, and the layers that make one which has no end.
Found = tuple[nn.Module, Any | None, set[Any]]


@contextlib.contextmanager
def _bounded(graph: Any) -> Iterator[None]:
    """Raise where torch-pruning follows channels without end.

    It does in sums with a part of another map (ReXNet), and where it takes the reshapes of attention for flattenings,
    so that every channel has more and more places; no flattening has more than the widest layer reads.
    """
    layers: list[Any] = [m for m in graph.module2node if isinstance(m, (*CONV_TYPES, nn.Linear))]
    widest = max((getattr(m, "in_features", None) or m.in_channels for m in layers), default=0)
    limit = max(LEAST_MEMBERS, len(graph.module2node))
    original, flatten = Group.add_dep, index_mapping._FlattenIndexMapping.__call__
    growing: list[Any] = []

    def end() -> _EndlessError:
        items = growing[-1].items if growing else []
        return _EndlessError({i.dep.target.module for i in items if i.dep.handler in OUT_FNS})

    def add(self: Any, dep: Any, idxs: Any) -> None:
        growing[:] = [self]
        if len(self) > limit:
            raise end()
        original(self, dep, idxs)

    def spread(self: Any, idxs: Any) -> Any:
        result = flatten(self, idxs)
        if len(result) > widest:
            raise end()
        return result

    Group.add_dep, index_mapping._FlattenIndexMapping.__call__ = add, spread
    try:
        yield
    finally:
        Group.add_dep, index_mapping._FlattenIndexMapping.__call__ = original, flatten


def _every_group(graph: Any) -> Iterator[Found]:
    visited: set[nn.Module] = set()
    for module in list(graph.module2node):
        if not isinstance(module, (*CONV_TYPES, nn.Linear)) or module in visited:
            continue
        prune, channels = (
            graph.get_pruner_of_module(module).prune_out_channels,
            graph.get_out_channels(module),
        )
        visited.add(module)
        try:
            with _bounded(graph):
                group = graph.get_pruning_group(module, prune, list(range(channels)))
        except _EndlessError as error:
            yield module, None, error.members
            continue
        visited.update(
            item.dep.target.module
            for item in group.items
            if graph.is_out_channel_pruning_fn(item.dep.handler)
        )
        yield module, group, set()


def found_groups(graph: Any, names: Mapping[nn.Module, str], gates: Collection[str]) -> Iterator[Found]:
    """Yield every group with the first layer (in the model's order) that really makes its channels."""
    order = {module: position for position, module in enumerate(names)}
    for first, group, members in _every_group(graph):
        if group is None:
            yield first, None, members
            continue
        makers = [
            item.dep.target.module
            for item in group.items
            if item.dep.handler in OUT_FNS
            and item.dep.target.module in names
            and role_of(item.dep.target.module, item.dep.handler) == "out"
            and names[item.dep.target.module] not in gates
        ]
        root = min(makers, key=order.__getitem__, default=group[0].dep.target.module)
        if root is not group[0].dep.target.module:
            prune = graph.get_pruner_of_module(root).prune_out_channels
            channels = graph.get_out_channels(root)
            if channels == len(group[0].idxs):
                yield root, graph.get_pruning_group(root, prune, list(range(channels))), set()
                continue
        yield group[0].dep.target.module, group, set()


def role_of(module: nn.Module, handler: Any) -> Role | None:
    """Say what a layer does in a group, by the function that would prune it; None where it has no channels."""
    if isinstance(module, NORM_TYPES) or handler is tp.prune_depthwise_conv_out_channels:
        return "channelwise"
    if isinstance(module, CONV_TYPES) and module.groups == module.out_channels == module.in_channels > 1:
        return "channelwise"
    if handler in OUT_FNS:
        return "out"
    return "in" if handler in IN_FNS else None


def expands(sites: Sequence[GateSite]) -> set[str]:
    """Return the layers that make the gates of sites."""
    return {site.expand for site in sites if site.expand is not None}
