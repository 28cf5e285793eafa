"""BN statistics over the whole batch, where several processes have a share of it each.

Shapes: N images of a share, C channels; moments are over images and positions. Those of the whole batch are exact,
since all shares are equally large. It works on the CPU too, which torch's own SyncBatchNorm does not, and leaves
the modules as they are: the function that every BN calls is replaced while the network runs.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from se_prune import distributed
from se_prune.settings import TrainSettings

#: `sync_bn = "auto"` shares statistics where a process has fewer images of a batch: those of so few are noisy.
FEW = 32
_SIGNATURE = inspect.signature(functional.batch_norm)


def shares_statistics(settings: TrainSettings, images: int) -> bool:
    """Say whether BN statistics are taken over the shares of all processes; `images` are there in all."""
    share = min(settings.batch_size, images) // distributed.size()
    few = share < FEW and not settings.compile
    return distributed.size() > 1 and (settings.sync_bn == "on" or (settings.sync_bn == "auto" and few))


class _Shared(torch.autograd.Function):
    """BN in training mode with the moments of all shares."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        moments = _moments(x).double()
        moments[1] += moments[0].square()
        distributed.average([moments])
        mean, variance = moments[0].float(), (moments[1] - moments[0].square()).float()
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.axes = eps, axes
        out = functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        # with x' = (x - mean) / deviation and means over all shares:
        # dL/dx = weight / deviation · (g - mean of g - x' · mean of g·x')
        x, weight, mean, variance = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.ndim - 2)
        g, inverse = gradients[0].float(), (variance + ctx.eps).rsqrt()
        of_bias = g.sum(ctx.axes)
        of_weight = ((g * x.float()).sum(ctx.axes) - mean * of_bias) * inverse
        means = torch.stack([of_bias, of_weight]) / (x.numel() // x.shape[1])
        distributed.average([means])
        scale = inverse if weight is None else inverse * weight.float()
        slope = -scale * means[1] * inverse
        offset = -scale * means[0] - slope * mean
        by_x = torch.addcmul(offset.view(shape), x.float(), slope.view(shape)).addcmul_(g, scale.view(shape))
        if weight is None:
            return by_x.to(x.dtype), None, None, None
        return by_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None


def _moments(x: torch.Tensor) -> torch.Tensor:
    """Return the mean and the variance of a share, biased, per channel (2, C), as BN itself takes them fastest."""
    count = x.numel() // x.shape[1]
    moments = torch.zeros(2, x.shape[1], device=x.device)
    if count == 1:
        moments[0] = x.flatten()
        return moments
    functional.batch_norm(x, moments[0], moments[1], training=True, momentum=1.0)
    moments[1] *= (count - 1) / count  # a running variance is unbiased
    return moments


class SharedStatistics(TorchFunctionMode):
    """While open, every BN in training mode takes the moments of the whole batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is functional.batch_norm:
            bound = _SIGNATURE.bind(*args, **given)
            bound.apply_defaults()
            if bound.arguments["training"]:
                return _of_whole(**bound.arguments)
        return func(*args, **given)


def _of_whole(
    *,
    input: torch.Tensor,  # noqa: A002 - the name that torch gives it
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    training: bool,
) -> torch.Tensor:
    assert training
    out, mean, variance = _Shared.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        count = distributed.size() * input.numel() // input.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * (count / max(1, count - 1))).to(running_var), momentum)
    return out  # type: ignore[no-any-return]


def statistics_of_whole(shared: bool) -> contextlib.AbstractContextManager[Any]:
    """Return what is to be open while the network runs."""
    return SharedStatistics() if shared else contextlib.nullcontext()
