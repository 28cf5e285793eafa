"""Least squares under a gate: every output weighted by its own gate, image by image."""

import pytest
import torch
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.gates.sites import find_sites
from se_prune.gates.tap import tap
from se_prune.records import Preprocessing
from se_prune.surgery import fit
from se_prune.surgery.refit import refit
from tests.coupled import without
from tests.nets import ConvSE

PREPROCESSING = Preprocessing(input_size=(2, 6, 6), mean=(0.5, 0.5), std=(0.25, 0.25))
KEPT = [1, 2, 4, 5]


class Gated(nn.Module):
    """Two convolutions and a gate, `between` them and it what the gated group's channels pass through."""

    def __init__(self, between, groups=1):
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3)
        self.b = nn.Conv2d(6, 4, 3, padding=1, groups=groups)
        self.between = between
        self.se, self.fc = ConvSE(4, 3), nn.Linear(4, 3)
        self._enliven()

    @torch.no_grad()
    def _enliven(self):
        """Let every gate differ from image to image: mean 0 and deviation 1 before the sigmoid."""
        expand, seen = self.se.expand, []
        handle = expand.register_forward_hook(lambda _, __, out: seen.append(out.flatten(1)))
        self(next(iter(images().batches(60, PREPROCESSING)))[0])
        handle.remove()
        expand.bias.copy_((expand.bias - seen[0].mean(0)) / seen[0].std(0))
        expand.weight /= seen[0].std(0).view(-1, 1, 1, 1)

    def forward(self, x):
        return self.fc(self.se(self.between(self.b(self.a(x).relu()))).mean((2, 3)))


def images(n=60, seed=4):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 2, 6, 6), dtype=torch.uint8, generator=generator)
    pixels //= torch.randint(1, 5, (n, 1, 1, 1), dtype=torch.uint8, generator=generator)
    return TensorImages(images=pixels, labels=torch.zeros(n, dtype=torch.long))


def fitted(model, *, folded=False):
    """Remove channels 0 and 3 of layer `a`, re-fit, and return the network."""
    sites = find_sites(model, torch.zeros(1, 2, 6, 6))
    assert [site.channels for site in sites] == [4]
    found, plan, small = without(model, (0, 3), fold=[sites[0].name] if folded else [])
    fits = refit(
        model,
        small,
        found,
        plan,
        split=images(),
        preprocessing=PREPROCESSING,
        device=torch.device("cpu"),
        sites=sites,
    )
    assert {fit.layer: fit.kept for fit in fits} == {"b": True}
    return small


@torch.no_grad()
def solution(model, choose):
    """Return the weights (O, I + 1) of lstsq with `choose(squared gates)` (N, O) as weights."""
    x = next(iter(images().batches(60, PREPROCESSING)))[0]
    gates = []
    with tap(model, find_sites(model, x[:1]), lambda _, __, s: gates.append(s.flatten(1))):
        model(x)
    assert gates[0].std(0).min() > 0.05
    fitting = torch.arange(60) % 5 != 4
    weights = choose(gates[0].double().square())[fitting].sqrt()
    features = model.a(x).relu()
    read = nn.functional.unfold(features[fitting][:, KEPT], 3, padding=1).mT.double()
    read = torch.cat([read, torch.ones(*read.shape[:2], 1)], 2)
    target = model.b(features)[fitting].flatten(2).mT.double()
    rows = []
    for output in range(4):
        own = weights[:, output, None]
        left, right = (read * own[..., None]).flatten(0, 1), (target[..., output] * own).flatten()
        rows.append(torch.linalg.lstsq(left, right[:, None]).solution[:, 0])
    return torch.stack(rows)


def check(small, wanted):
    got = torch.cat([small.b.weight.flatten(1), small.b.bias[:, None]], 1).double()
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(fit, "RIDGE", 1e-12)


@pytest.mark.parametrize(
    "between",
    [nn.Identity(), nn.Conv2d(4, 4, 3, padding=1, groups=4)],
    ids=["features", "depthwise between"],
)
def test_every_output_has_the_weights_of_its_gate(between):
    model = Gated(between)
    wanted = solution(model, lambda squares: squares)
    check(fitted(model), wanted)
    assert (solution(model, torch.ones_like) - wanted).abs().max() > 1e-3


def test_a_gate_that_is_folded_weights_nothing():
    model = Gated(nn.Identity())
    check(fitted(model, folded=True), solution(model, torch.ones_like))


def test_the_chunks_do_not_matter(monkeypatch):
    model = Gated(nn.Identity())
    monkeypatch.setattr(fit, "PATCH_ELEMENTS", 1)
    check(fitted(model), solution(model, lambda squares: squares))


def test_where_memory_is_short_the_outputs_share_the_mean_weight(monkeypatch):
    model = Gated(nn.Identity())
    monkeypatch.setattr(fit, "GATED_BYTES", 0)
    check(fitted(model), solution(model, lambda squares: squares.mean(1, keepdim=True).expand(-1, 4)))


def test_a_gate_that_is_shut_leaves_finite_weights():
    model = Gated(nn.Identity())
    with torch.no_grad():
        model.se.expand.weight[2], model.se.expand.bias[2] = 0, -200
    assert fitted(model).b.weight.isfinite().all()


def test_groups_of_a_convolution_keep_their_gates():
    """Both groups lose one of their three channels; outputs 0 and 1 read the first group, 2 and 3 the second."""
    model = Gated(nn.Identity(), groups=2)
    small = fitted(model)
    x = next(iter(images().batches(60, PREPROCESSING)))[0]
    gates = []
    with tap(model, find_sites(model, x[:1]), lambda _, __, s: gates.append(s.flatten(1))):
        model(x)
    fitting = torch.arange(60) % 5 != 4
    features = model.a(x).relu()
    for output in range(4):
        kept = KEPT[:2] if output < 2 else KEPT[2:]
        own = gates[0][fitting, output].double()[:, None]
        read = nn.functional.unfold(features[fitting][:, kept], 3, padding=1).mT.double()
        read = torch.cat([read, torch.ones(*read.shape[:2], 1)], 2) * own[..., None]
        target = model.b(features)[fitting, output].flatten(1).double() * own
        wanted = torch.linalg.lstsq(read.flatten(0, 1), target.flatten()[:, None]).solution[:, 0]
        got = torch.cat([small.b.weight[output].flatten(), small.b.bias[output, None]]).double()
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
