"""`gate-obs`, `gate-fisher` and `gate-mean`: against what they stand for, computed the long way.

Shapes: N images, C channels, H×W positions.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_prune.gates.moments import collect_grams
from se_prune.scoring import obs, score
from se_prune.scoring.signal import describe
from tests.evidence import data, evidence, measured
from tests.nets import DEPTHWISE, RESIDUAL


class Chain(nn.Module):
    """A convolution with BN, one that reads it, and a classifier; `twin` makes channel 3 half of channel 1."""

    def __init__(self, *, twin=False, norm=True):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.fc = nn.Linear(4, 3)
        if twin:
            with torch.no_grad():
                self.a.weight[3], self.a.bias[3] = self.a.weight[1] / 2, self.a.bias[1] / 2

    def forward(self, x):
        return self.fc(self.norm(self.b(self.a(x).relu())).relu().mean((2, 3)))


def chain(**options):
    torch.manual_seed(3)
    model = Chain(**options)
    images = data((2, 6, 6), 3, n=60)
    with torch.no_grad():
        model(images.images)
        if isinstance(model.norm, nn.BatchNorm2d):
            model.norm.weight.copy_(torch.tensor([0.5, 1.5, 1.0, 0.2]))
    return evidence(model.eval(), (2, 6, 6), 3, images)


def lost(have, removed):
    """Return the loss without channels of `a` after the best re-fit of `b`, by `lstsq` on every patch."""
    model, images = have.model, torch.cat([x for x, _ in have.batches(None)])
    with torch.no_grad():
        patches = F.unfold(model.a(images).relu(), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        target = model.b(model.a(images).relu()).permute(0, 2, 3, 1).reshape(-1, 4).double()
    left = [i for i in range(54) if i // 9 not in removed]
    rows = torch.cat([patches[:, left], torch.ones(len(patches), 1).double()], 1)
    errors = (rows @ torch.linalg.lstsq(rows, target).solution - target).square().mean(0)
    if isinstance(model.norm, nn.Identity):
        gain, whole = torch.ones(4).double(), target_energy(have)
    else:
        gain = (model.norm.weight**2 / (model.norm.running_var + model.norm.eps)).detach().double()
        whole = float((model.norm.weight**2 + model.norm.bias**2).detach().sum())
    return float((gain * errors).sum()) / whole


def target_energy(have):
    """Return Σ E[(W·x)²] of layer `b`, its bias left out."""
    images = torch.cat([x for x, _ in have.batches(None)])
    with torch.no_grad():
        out = F.conv2d(have.model.a(images).relu(), have.model.b.weight, padding=1)
    return float(out.double().square().mean((0, 2, 3)).sum())


@pytest.mark.parametrize("norm", [True, False])
def test_obs_is_what_the_best_refit_does_not_bring_back(norm, monkeypatch):
    monkeypatch.setattr(obs, "RIDGE", 1e-9)
    have = chain(norm=norm)
    found = score("gate-obs", have).groups["a"]
    alone = [lost(have, {k}) for k in range(6)]
    first = min(range(6), key=lambda k: alone[k])
    assert found[first] == pytest.approx(alone[first], rel=1e-3)
    assert min(found) == found[first]
    both = {k: lost(have, {first, k}) for k in range(6) if k != first}
    second = min(both, key=lambda k: both[k])
    assert found[second] == pytest.approx(both[second] - alone[first], rel=1e-2)
    assert max(alone) > 1.2 * min(alone)


def test_obs_takes_one_of_two_that_say_the_same_and_not_both(monkeypatch):
    monkeypatch.setattr(obs, "RIDGE", 1e-6)
    found = score("gate-obs", chain(twin=True)).groups["a"]
    energy = score("gate-energy", chain(twin=True)).groups["a"]
    low, high = sorted((found[1], found[3]))
    assert low < 1e-3 * high
    assert low == min(found)
    assert min(energy[1], energy[3]) > 1e-2 * max(energy)


def test_obs_scores_rise_in_the_order_of_removal_whatever_the_step(monkeypatch):
    have = chain()
    one = score("gate-obs", have).groups["a"]
    monkeypatch.setattr(obs, "STEPS", 2)  # three of six at a time
    three = score("gate-obs", have).groups["a"]
    assert len(set(one)) > 3
    assert len(set(three)) == 2
    assert all(v >= 0 for v in (*one, *three))


def test_obs_falls_back_on_energy_where_a_consumer_has_no_rows(monkeypatch):
    have = chain()
    assert score("gate-obs", have).groups["a"] != score("gate-energy", have).groups["a"]
    monkeypatch.setattr(obs, "has_rows", lambda _: False)
    assert score("gate-obs", have).groups == score("gate-energy", have).groups


class GroupedChain(Chain):
    """As `Chain`, with a grouped convolution as the reader: channels i and i + 3 of `a` leave together."""

    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False)


def test_obs_of_channels_that_leave_together(monkeypatch):
    monkeypatch.setattr(obs, "RIDGE", 1e-9)
    torch.manual_seed(3)
    model, images = GroupedChain(), data((2, 6, 6), 3, n=60)
    with torch.no_grad():
        model(images.images)
    have = evidence(model.eval(), (2, 6, 6), 3, images)
    coupling = next(c for c in have.couplings if c.group.name == "a")
    assert coupling.group.tied == 2
    found = score("gate-obs", have).groups["a"]
    assert found[:3] == found[3:]
    # a grouped convolution is an ungrouped one whose other weights are zero; a re-fit may use each group's inputs only
    with torch.no_grad():
        patches = F.unfold(model.a(images.images).relu(), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        target = model.b(model.a(images.images).relu()).permute(0, 2, 3, 1).reshape(-1, 4).double()
        gain = (model.norm.weight**2 / (model.norm.running_var + model.norm.eps)).double()
        whole = float((model.norm.weight**2 + model.norm.bias**2).sum())
    alone = []
    for unit in range(3):
        total = 0.0
        for group in range(2):
            left = [i for i in range(27 * group, 27 * group + 27) if i // 9 % 3 != unit]
            rows = torch.cat([patches[:, left], torch.ones(len(patches), 1).double()], 1)
            mine = target[:, 2 * group : 2 * group + 2]
            errors = (rows @ torch.linalg.lstsq(rows, mine).solution - mine).square().mean(0)
            total += float((gain[2 * group : 2 * group + 2] * errors).sum()) / whole
        alone.append(total)
    first = alone.index(min(alone))
    assert found[first] * 2 == pytest.approx(alone[first], rel=1e-3)
    assert min(found) == found[first]


def test_obs_reads_no_more_images_than_it_says(monkeypatch):
    monkeypatch.setattr(obs, "IMAGES", 6)
    have, rows = chain(), []
    original = collect_grams

    def watched(model, layers):
        inside = original(model, layers)
        rows.append(inside)
        return inside

    monkeypatch.setattr(obs, "collect_grams", watched)
    signal = describe(have)
    grams = obs._grams(have, signal, [c for c in have.couplings if c.group.prunable])
    assert grams["b"][0, -1, -1] == 6 * 16
    assert len(rows) == 1


def test_fisher_is_the_squared_gradient_of_a_mask():
    have = chain()
    found = score("gate-fisher", have).groups["a"]
    model, total = have.model, torch.zeros(6, dtype=torch.float64)
    for images, labels in have.batches(None):
        for image, label in zip(images, labels, strict=True):
            mask = torch.ones(1, 6, 1, 1, requires_grad=True)
            maps = model.norm(model.b(model.a(image[None]).relu() * mask)).relu()
            loss = F.cross_entropy(model.fc(maps.mean((2, 3))), label[None])
            total += torch.autograd.grad(loss, mask)[0].flatten().double() ** 2
    assert found == pytest.approx((total / 60).tolist(), rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_fisher_of_a_stream_sums_its_readers_before_the_square():
    have = measured(RESIDUAL)
    stream = next(c for c in have.couplings if c.group.kind == "stream")
    readers = describe(have).consumers(stream)
    assert len(readers) > 1
    found = score("gate-fisher", have).groups[stream.group.name]
    assert len(set(found)) == len(found)
    assert min(found) > 0


def test_the_mean_gate_of_gated_channels():
    have = measured(DEPTHWISE)
    found = score("gate-mean", have)
    norm = score("l2", have).groups
    sums, gated = have.statistics.sums, {s.expand: s.name for s in have.sites}
    checked = 0
    for coupling in have.couplings:
        name = coupling.group.name
        site = next((gated[n] for n in coupling.layers("out") if n in gated), None)
        if not coupling.group.prunable:
            continue
        if site is None:
            assert found.groups[name] == norm[name]
        else:
            mean = sums[site].s.sum(0) / have.statistics.n
            assert found.groups[name] == pytest.approx(mean.tolist())
            checked += 1
    assert checked == 2
    assert not found.comparable
