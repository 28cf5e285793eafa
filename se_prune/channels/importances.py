"""torch-pruning's importances, per channel group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from se_prune.channels.graph import build_graph, expands, found_groups
from se_prune.records import Coupling, GateSite


class _FPGM(tp.importance.FPGMImportance):  # type: ignore[misc]
    """torch-pruning's, which fails on the inputs of grouped convolutions: here these do not count."""

    def __call__(self, group: Any) -> Any:
        return super().__call__(
            [
                item
                for item in group
                if item.dep.pruning_fn != tp.prune_conv_in_channels or item.dep.layer.groups == 1
            ]
        )


IMPORTANCES: dict[str, Callable[[], Any]] = {
    "random": tp.importance.RandomImportance,
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn-scale": tp.importance.BNScaleImportance,
    "fpgm": _FPGM,
    "lamp": tp.importance.LAMPImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
}


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
        for root, group, _ in found_groups(graph, names, expands(sites)):
            key = names[root]
            if key in chosen and group is not None:
                value = rule(group)
                if value is None:
                    value = fallback(group)
                scores[key] = tuple(torch.nan_to_num(value.double(), nan=0.0).tolist())
    return scores


def _graph_keeping_gradients(model: nn.Module, example: torch.Tensor) -> Any:
    kept = {p: p.grad for p in model.parameters()}
    graph = build_graph(model, example)
    for parameter, gradient in kept.items():
        parameter.grad = gradient
    return graph
