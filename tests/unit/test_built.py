"""The networks on which surgery is proven: lively, and not so wild that rounding shows."""

import torch
from torch import nn

from se_prune.records import Preprocessing
from tests.built import calm, lively

SEES = Preprocessing(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        return x + self.bn(self.conv(x)).relu()


@torch.no_grad()
def sizes(model):
    """Return the mean square of what every BN passes on, for two images."""
    found = []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_hook(lambda *a: found.append(a[2].square().mean())) for m in norms]
    model(torch.randn(2, *SEES.input_size, generator=torch.Generator().manual_seed(1)))
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_signals_do_not_grow_with_depth():
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 1), *(Residual() for _ in range(30))), SEES)
    wild = sizes(model)
    calm(model, SEES)
    quiet = sizes(model)
    assert float(wild[-5:].mean() / wild[:5].mean()) > 5 > float(quiet[-5:].mean() / quiet[:5].mean())
    assert float(quiet.min()) > 0.3
    assert not any(m._forward_hooks for m in model.modules())
