"""Channel groups, and everything else that torch-pruning does for us; the only file that imports it.

What is worked around here, each with a test in `tests/unit/test_channels.py`: its group objects are turned into
plain `Coupling` records; its Hessian importance keeps only the last gradient (`accumulate_grad` looks up names in a
dictionary of parameters), so squared gradients are summed here; importances that know nothing of a group return
None, where the group's L2 norm stands in; importances of a group of zeros are 0/0, where 0 stands in; groups in which
one channel takes another along (a map concatenated with a function of itself) are not told apart, so a probe does;
it follows a sum with a part of another map without end, so that its groups are bounded.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency.group import Group

from se_prune.artifact import CONV_TYPES, NORM_TYPES
from se_prune.errors import SurgeryError
from se_prune.gates.shuffles import shuffled_layers
from se_prune.gates.trace import trace
from se_prune.records import ChannelGroup, Coupling, GateSite, GroupKind, LayerSlice

#: A group with more members than this, and than the network has operations, is taken for one that never ends.
LEAST_MEMBERS = 200
OUT_FNS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
IN_FNS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
IMPORTANCES: dict[str, Callable[[], Any]] = {
    "random": tp.importance.RandomImportance,
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn-scale": tp.importance.BNScaleImportance,
    "fpgm": tp.importance.FPGMImportance,
    "lamp": tp.importance.LAMPImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
}


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


def _graph(model: nn.Module, example: torch.Tensor) -> Any:
    try:
        with _gradients(model):
            return tp.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
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
    """Raise where torch-pruning follows channels without end: sums with a part of another map (ReXNet)."""
    limit = max(LEAST_MEMBERS, len(graph.module2node))
    original = Group.add_dep

    def add(self: Any, dep: Any, idxs: Any) -> None:
        if len(self) > limit:
            raise _EndlessError({i.dep.target.module for i in self.items if i.dep.handler in OUT_FNS})
        original(self, dep, idxs)

    Group.add_dep = add
    try:
        yield
    finally:
        Group.add_dep = original


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


def _tp_groups(graph: Any, names: Mapping[nn.Module, str], gates: Collection[str]) -> Iterator[Found]:
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
            and _role(item.dep.target.module, item.dep.handler) == "out"
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


def couplings(model: nn.Module, example: torch.Tensor, sites: Sequence[GateSite]) -> tuple[Coupling, ...]:
    """Find the channel groups of a network.

    Args:
        model: The network; left as it is.
        example: Images (N, C, H, W) of its input size, on its device.
        sites: Its gate sites; they decide which groups are gated and which are hidden units.

    Raises:
        SurgeryError: torch-pruning cannot trace the network.
    """
    names = {module: name for name, module in model.named_modules()}
    graph = _graph(model, example)
    groups = list(_tp_groups(graph, names, _expands(sites)))
    endless = set().union(*(members for _, _, members in groups))
    order = {name: position for position, name in enumerate(names.values())}
    shuffled = shuffled_layers(trace(model, example))
    found = [
        _endless(names[root], graph.get_out_channels(root))
        if group is None or any(i.dep.target.module in endless for i in group if i.dep.handler in OUT_FNS)
        else _coupling(graph, group, names, sites, shuffled)
        for root, group, _ in groups
    ]
    return tuple(sorted(found, key=lambda c: order[c.group.name]))


def _endless(name: str, channels: int) -> Coupling:
    """Return the group of a layer that torch-pruning cannot follow; what else belongs to it is not known."""
    info = ChannelGroup(
        name=name,
        kind="inner",
        channels=channels,
        members=(name,),
        prunable=False,
        reason="torch-pruning follows its channels without end",
    )
    every = tuple(range(channels))
    return Coupling(group=info, slices=(LayerSlice(layer=name, role="out", index=every, root=every),))


def _expands(sites: Sequence[GateSite]) -> set[str]:
    return {site.expand for site in sites if site.expand is not None}


def _coupling(
    graph: Any,
    group: Any,
    names: Mapping[nn.Module, str],
    sites: Sequence[GateSite],
    shuffled: Collection[str],
) -> Coupling:
    slices: list[LayerSlice] = []
    reasons: list[str] = []
    modules: dict[str, nn.Module] = {}
    for item in group.items:
        module, handler = item.dep.target.module, item.dep.handler
        if isinstance(module, nn.Parameter):
            reasons.append("a bare parameter depends on it")
            continue
        if module not in names:
            continue
        role = _role(module, handler)
        if role is None:
            if any(True for _ in module.parameters(recurse=False)):
                reasons.append(f"{names[module]} is a {type(module).__name__}")
            continue
        modules[names[module]] = module
        root = [-1 if r is None else int(r) for r in item.root_idxs]
        slices.append(
            LayerSlice(layer=names[module], role=role, index=tuple(map(int, item.idxs)), root=tuple(root))
        )
    if any(piece.role == "out" and piece.layer in shuffled for piece in slices):
        reasons.append("a channel shuffle reorders its channels")
    channels = len(group[0].idxs)
    tied = _tied(channels, slices, modules)
    reasons += _refusals(slices, modules, channels, tied)
    if not reasons and not _independent(graph, group, names, slices, tied):
        reasons.append("some of its channels take others along")
    info = ChannelGroup(
        name=names[group[0].dep.target.module],
        kind=_kind(slices, sites),
        channels=channels,
        members=tuple(dict.fromkeys(s.layer for s in slices)),
        site=_site_of(slices, sites),
        prunable=not reasons,
        reason=reasons[0] if reasons else None,
        tied=tied,
    )
    return Coupling(group=info, slices=tuple(slices))


def _tied(channels: int, slices: Sequence[LayerSlice], modules: Mapping[str, nn.Module]) -> int:
    """Return how many channels leave together: a grouped convolution must lose as many of each of its groups."""
    units = channels
    for piece in slices:
        module = modules[piece.layer]
        if piece.role != "channelwise" and isinstance(module, CONV_TYPES) and module.groups > 1:
            units = math.gcd(units, len(piece.index) // module.groups)
    return channels // units


def _independent(
    graph: Any, group: Any, names: Mapping[nn.Module, str], slices: Sequence[LayerSlice], tied: int
) -> bool:
    """Say whether random halves of the channels touch exactly what the slices say of them.

    Where each channel takes another along, one half of n channels shows none of it with a chance of 2^(-n/2);
    few channels are therefore halved more often. What is missed here, `verify` refuses. Of channels that leave
    together (`tied`), all or none are taken.
    """
    root, channels = group[0].dep.target.module, len(group[0].idxs) // tied
    prune = graph.get_pruner_of_module(root).prune_out_channels
    generator = torch.Generator().manual_seed(0)
    for _ in range(max(1, 32 // channels) if channels > 1 else 0):
        units = torch.randperm(channels, generator=generator)[: channels // 2].tolist()
        half = [u + channels * i for u in units for i in range(tied)]
        found: dict[tuple[str, str], set[int]] = {}
        for item in graph.get_pruning_group(root, prune, sorted(half)).items:
            module = item.dep.target.module
            role = _role(module, item.dep.handler) if module in names else None
            if role is not None:
                found.setdefault((names[module], role), set()).update(map(int, item.idxs))
        if found != _touched(slices, set(half)):
            return False
    return True


def _touched(slices: Sequence[LayerSlice], roots: Collection[int]) -> dict[tuple[str, str], set[int]]:
    """Return the channels of every layer, by role, that belong to some channels of the group."""
    result: dict[tuple[str, str], set[int]] = {}
    for piece in slices:
        touched = {i for i, root in zip(piece.index, piece.root, strict=True) if root in roots}
        if touched:
            result.setdefault((piece.layer, piece.role), set()).update(touched)
    return result


def _role(module: nn.Module, handler: Any) -> Literal["out", "in", "channelwise"] | None:
    if isinstance(module, NORM_TYPES) or handler is tp.prune_depthwise_conv_out_channels:
        return "channelwise"
    if isinstance(module, CONV_TYPES) and module.groups == module.out_channels == module.in_channels > 1:
        return "channelwise"
    if handler in OUT_FNS:
        return "out"
    return "in" if handler in IN_FNS else None


def _refusals(
    slices: Sequence[LayerSlice], modules: Mapping[str, nn.Module], channels: int, tied: int
) -> list[str]:
    reasons = []
    if not any(s.role == "in" for s in slices):
        reasons.append("output layer")
    for piece in slices:
        module = modules[piece.layer]
        if isinstance(module, CONV_TYPES) and module.groups > 1 and piece.role != "channelwise":
            width = module.in_channels if piece.role == "in" else module.out_channels
            if piece.index != piece.root or len(piece.index) != width:
                reasons.append(f"{piece.layer} is a grouped convolution of a concatenation")
            elif tied == channels:
                reasons.append(f"the groups of {piece.layer} have one channel each")
        if -1 in piece.root:
            reasons.append(f"the channels of {piece.layer} do not map one to one")
    return reasons


def _kind(slices: Sequence[LayerSlice], sites: Sequence[GateSite]) -> GroupKind:
    made = {s.layer for s in slices if s.role == "out"}
    if made & {site.reduce for site in sites}:
        return "hidden"
    gates = {site.expand for site in sites}
    if len(made - gates) > 1:
        return "stream"
    return "gated" if made & gates else "inner"


def _site_of(slices: Sequence[LayerSlice], sites: Sequence[GateSite]) -> str | None:
    made = {s.layer for s in slices if s.role == "out"}
    owners = [site.name for site in sites if site.reduce in made or site.expand in made]
    return owners[0] if len(owners) == 1 else None


def importance(
    model: nn.Module,
    example: torch.Tensor,
    name: str,
    *,
    seed: int,
    wanted: Sequence[Coupling],
    sites: Sequence[GateSite],
) -> dict[str, tuple[float, ...]]:
    """Return one of torch-pruning's importances (a key of `IMPORTANCES`) per group that is wanted.

    Args:
        model: The network; for `taylor` its gradients, for `hessian` its mean squared gradients in `.grad`.
        example: Images (N, C, H, W) of its input size.
        name: Which importance.
        seed: For `random`.
        wanted: The groups to score.
        sites: The gate sites that `wanted` was found with.
    """
    names = {module: n for n, module in model.named_modules()}
    graph = _graph_keeping_gradients(model, example)
    chosen = {c.group.name for c in wanted}
    scores = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rule, fallback = IMPORTANCES[name](), IMPORTANCES["l2"]()
        for root, group, _ in _tp_groups(graph, names, _expands(sites)):
            key = names[root]
            if key in chosen and group is not None:
                value = rule(group)
                if value is None:
                    value = fallback(group)
                scores[key] = tuple(torch.nan_to_num(value.double(), nan=0.0).tolist())
    return scores


def _graph_keeping_gradients(model: nn.Module, example: torch.Tensor) -> Any:
    kept = {p: p.grad for p in model.parameters()}
    graph = _graph(model, example)
    for parameter, gradient in kept.items():
        parameter.grad = gradient
    return graph


def _check_channels(graph: Any, root: nn.Module | None, name: str, channels: Sequence[int]) -> None:
    if root not in graph.module2node or not isinstance(root, (*CONV_TYPES, nn.Linear)):
        raise SurgeryError(f"the plan cuts '{name}', which this network does not have; plan it again.")
    width = graph.get_out_channels(root)
    strange = [c for c in channels if not 0 <= c < width]
    if strange or len(set(channels)) < len(channels):
        raise SurgeryError(
            f"the plan cuts channels {strange or list(channels)} of '{name}', which has {width}; plan it again."
        )


def remove(model: nn.Module, example: torch.Tensor, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of `model` without the given channels of each group (by the group's name).

    Raises:
        SurgeryError: A group or a channel is unknown, or a group would lose all its channels.
    """
    result = copy.deepcopy(model)
    graph = _graph(result, example)
    modules = dict(result.named_modules())
    for name, channels in removed.items():
        if not channels:
            continue
        root = modules.get(name)
        _check_channels(graph, root, name, channels)
        prune = graph.get_pruner_of_module(root).prune_out_channels
        group = graph.get_pruning_group(root, prune, sorted(channels))
        if not graph.check_pruning_group(group):
            raise SurgeryError(f"the plan removes every channel of '{name}'; raise --min-channels.")
        group.prune()
    for parameter in result.parameters():
        parameter.grad = None
    return result
