"""Surgery and its proof: the cut network equals its masked twin, with constants for the gates that are folded."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from se_prune import channels
from se_prune.computed import computes_weights
from se_prune.errors import SurgeryError
from se_prune.gates.tap import constant_gates, tap
from se_prune.records import Coupling, GateSite, Plan
from se_prune.surgery.fold import fold, kept_constants, planned_constants

#: Largest difference, relative to the largest output, that float64 rounding explains.
TOLERANCE = 1e-9


def cut(model: nn.Module, example: torch.Tensor, plan: Plan) -> nn.Module:
    """Return a copy of the dense network without the channels of the plan.

    Raises:
        SurgeryError: The plan belongs to another network.
    """
    return channels.remove(model, example, {group.name: group.removed for group in plan.groups})


@torch.no_grad()
def masked(model: nn.Module, couplings: Sequence[Coupling], plan: Plan) -> nn.Module:
    """Return a copy of the dense network with the plan's channels zeroed where they are made.

    Convolution rows, biases, BN scale and shift of a removed channel are zeroed, so that every consumer
    reads zeros (a BN without scale and shift loses its running mean); nothing that reads the channel is
    touched. Hidden units are also zeroed in `expand`, since an activation of 0 need not be 0.
    """
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    by_name = {coupling.group.name: coupling for coupling in couplings}
    for group in plan.groups:
        gone = set(group.removed)
        if not gone:
            continue
        for piece in by_name[group.name].slices:
            rows = [i for i, root in zip(piece.index, piece.root, strict=True) if root in gone]
            module = modules[piece.layer]
            if piece.role != "in":
                for tensor in (module.weight, module.bias, getattr(module, "running_mean", None)):
                    if isinstance(tensor, torch.Tensor):
                        tensor[rows] = 0
            elif group.kind == "hidden":
                assert isinstance(module.weight, torch.Tensor)
                module.weight[:, rows] = 0
    return twin


@torch.no_grad()
def difference(first: nn.Module, second: nn.Module, images: torch.Tensor) -> float:
    """Return the largest absolute difference of two networks' outputs in float64, eval mode.

    Args:
        first: A network; left as it is.
        second: Another with outputs of the same shape; left as it is.
        images: (N, C, H, W), any dtype.
    """
    outputs = [_outputs(_in_float64(network), images) for network in (first, second)]
    return float((outputs[0] - outputs[1]).abs().max())


def _in_float64(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).cpu().double().eval()


def _outputs(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = network(images.detach().cpu().double())
    return result


def _exact(dense: nn.Module, cut_network: nn.Module, plan: Plan, images: torch.Tensor) -> nn.Module:
    """Return a cut network in float64.

    Weights that its dense network computes are rounded where a plain convolution holds them, so that the dense network
    is cut once more in float64; the given one must be what that is, rounded.

    Raises:
        SurgeryError: It is not.
    """
    small = _in_float64(cut_network)
    modules = dict(cut_network.named_modules())
    if not any(
        computes_weights(m) and not computes_weights(modules[n])
        for n, m in dense.named_modules()
        if n in modules
    ):
        return small
    exact = cut(_in_float64(dense), images[:1].detach().cpu().double(), plan)
    state = small.state_dict()
    for name, value in exact.state_dict().items():
        if value.shape != state[name].shape or not torch.allclose(value, state[name], rtol=1e-4, atol=1e-5):
            raise SurgeryError(
                f"the tensor '{name}' of the cut network is not what the plan makes of it; please report it."
            )
    return exact


@torch.no_grad()
def verify(
    dense: nn.Module,
    cut_network: nn.Module,
    couplings: Sequence[Coupling],
    plan: Plan,
    images: torch.Tensor,
    *,
    sites: Sequence[GateSite] = (),
) -> float:
    """Compare a cut network, folded as the plan says, with its masked twin; return the largest difference.

    Args:
        dense: The network before the cut.
        cut_network: The network after it, with its gates and before any repair; it is folded here, in float64.
        couplings: The channel groups of `dense`.
        plan: What was removed and what is folded.
        images: (N, C, H, W), any dtype.
        sites: The gate sites of `dense`; needed where the plan folds any.

    Raises:
        SurgeryError: They differ by more than float64 rounding, the output is not finite, the cut network does not
            run, or a gate cannot be folded.
    """
    twin, small = _in_float64(masked(dense, couplings, plan)), _exact(dense, cut_network, plan, images)
    with tap(twin, sites, constant_gates(planned_constants(plan))):
        expected = _outputs(twin, images)
    try:
        small, _ = fold(small, images.cpu(), kept_constants(plan, sites, couplings))
        gap = float((expected - _outputs(small, images)).abs().max())
    except RuntimeError as error:
        raise SurgeryError(
            f"the cut network does not run ({str(error)[:200]}); nothing was written. Its channels are coupled in "
            "a way that torch-pruning does not follow; please report the architecture."
        ) from error
    scale = float(expected.abs().max())
    if not gap <= TOLERANCE * scale:
        raise SurgeryError(
            f"the cut network differs from its masked twin by {gap:.2e} (outputs up to {scale:.2e}); nothing was "
            "written. This is a defect of ours: please report the architecture and the plan (--dry-run --json)."
        )
    return gap
