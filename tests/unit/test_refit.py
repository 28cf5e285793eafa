"""Repair by least squares: against lstsq, where nothing need be lost, and where it must refuse."""

import copy

import pytest
import torch
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.errors import DataError
from se_prune.gates import moments
from se_prune.records import Preprocessing
from se_prune.surgery import fit
from se_prune.surgery import refit as module_under_test
from se_prune.surgery.cut import cut
from se_prune.surgery.refit import refit
from se_prune.surgery.repair import recalibrate_bn
from tests.built import built, random_plan
from tests.coupled import without

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(input_size=(2, 6, 6), mean=(0.5, 0.5), std=(0.25, 0.25))


class Plain(nn.Module):
    """Two convolutions and a linear layer; `bn` puts a BN after the second, which then has no bias."""

    def __init__(self, *, bn=False):
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3)
        self.b = nn.Conv2d(6, 5, 3, padding=1, stride=2, bias=not bn)
        self.norm = nn.BatchNorm2d(5) if bn else nn.Identity()
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = self.norm(self.b(self.a(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


class Twice(nn.Module):
    """A convolution that runs twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.b(self.b(self.a(x).relu()).relu()).mean((2, 3)))


def images(n=60, seed=4):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 2, 6, 6), dtype=torch.uint8, generator=generator)
    return TensorImages(images=pixels, labels=torch.zeros(n, dtype=torch.long))


def batch(split):
    return next(iter(split.batches(len(split), PREPROCESSING)))[0]


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain().eval()


@pytest.fixture
def normed():
    torch.manual_seed(0)
    model = Plain(bn=True)
    with torch.no_grad():
        model(batch(images()))
    return model.eval()


def run(model, removed, split, **options):
    found, plan, small = without(model, removed)
    before = copy.deepcopy(small)
    fits = refit(model, small, found, plan, split=split, preprocessing=PREPROCESSING, device=CPU, **options)
    return before, small, fits


def test_a_channel_that_others_can_stand_for_costs_nothing(plain, monkeypatch):
    monkeypatch.setattr(fit, "RIDGE", 1e-9)
    with torch.no_grad():  # channel 5 is half of channel 2
        plain.a.weight[5], plain.a.bias[5] = plain.a.weight[2] / 2, plain.a.bias[2] / 2
    before, after, fits = run(plain, (5,), images())
    x = batch(images(20, seed=9))
    wanted = plain(x)
    assert (before(x) - wanted).abs().max() > 1e-2
    torch.testing.assert_close(after(x), wanted, rtol=0, atol=1e-4)
    assert [fit.layer for fit in fits] == ["b"]
    assert fits[0].error_after < 1e-8 < fits[0].error_before


@torch.no_grad()
def test_the_fit_is_that_of_lstsq(plain, monkeypatch):
    monkeypatch.setattr(fit, "RIDGE", 1e-12)
    split = images()
    _, after, fits = run(plain, (0, 3), split)
    x, fitting = batch(split), torch.arange(60) % 5 != 4
    kept = [1, 2, 4, 5]
    inputs = plain.a(x).relu()
    patches = nn.functional.unfold(inputs[:, kept], 3, padding=1, stride=2)
    target = plain.b(inputs).flatten(2)

    def rows(chosen):
        read = patches[chosen].transpose(1, 2).flatten(0, 1).double()
        return torch.cat([read, torch.ones(len(read), 1)], 1), target[chosen].transpose(1, 2).flatten(
            0, 1
        ).double()

    solution = torch.linalg.lstsq(*rows(fitting)).solution
    torch.testing.assert_close(after.b.weight.flatten(1).double().T, solution[:-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(after.b.bias.double(), solution[-1], rtol=0, atol=1e-5)
    read, wanted = rows(~fitting)
    error = (read @ solution - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert fits[0].error_after == pytest.approx(float(error), rel=1e-4)


@torch.no_grad()
def test_a_bn_takes_the_constant(normed, monkeypatch):
    monkeypatch.setattr(fit, "RIDGE", 1e-12)
    before, after, fits = run(normed, (0, 3), images())
    assert fits[0].kept
    assert not torch.equal(after.norm.running_mean, before.norm.running_mean)
    x = batch(images())[torch.arange(60) % 5 != 4]
    wanted = normed.norm(normed.b(normed.a(x).relu()))
    made = after.norm(after.b(after.a(x).relu()))
    # with a constant among the inputs the residual has mean 0
    torch.testing.assert_close(made.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["plain", "normed"])
def test_a_fit_that_does_not_carry_over_is_refused(model, request):
    """Images that are fitted are dark but for one pixel; those held out are noise."""
    dense = request.getfixturevalue(model)
    split = images(10)
    split.images[torch.arange(10) % 5 != 4] //= 64
    split.images[torch.arange(10) % 5 != 4, :, 2, 2] = 255
    before, after, fits = run(dense, (0, 3), split)
    refused = [fit for fit in fits if not fit.kept]
    assert [fit.layer for fit in refused] == ["b"]
    assert refused[0].error_after >= refused[0].error_before
    assert torch.equal(after.b.weight, before.b.weight)


def test_layers_that_lost_no_input_and_the_dense_network_stay(plain):
    kept = copy.deepcopy(plain.state_dict())
    before, after, fits = run(plain, (1,), images())
    assert {fit.layer for fit in fits} == {"b"}
    assert torch.equal(after.a.weight, before.a.weight)
    assert torch.equal(after.fc.weight, before.fc.weight)
    assert all(torch.equal(value, kept[name]) for name, value in plain.state_dict().items())


class Grouped(nn.Module):
    """A grouped convolution between two others; channels i and i + 3 of `a` leave together."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).mean((2, 3)))


def test_each_group_of_a_convolution_is_fitted_by_itself(monkeypatch):
    monkeypatch.setattr(fit, "RIDGE", 1e-9)
    torch.manual_seed(0)
    model = Grouped().eval()
    with torch.no_grad():  # in either group channel 2 is half of channel 0
        for i, twin in ((2, 0), (5, 3)):
            model.a.weight[i], model.a.bias[i] = model.a.weight[twin] / 2, model.a.bias[twin] / 2
    before, after, fits = run(model, (2, 5), images())
    x = batch(images(20, seed=9))
    assert after.b.weight.shape == (4, 2, 3, 3)
    assert (before(x) - model(x)).abs().max() > 1e-2
    torch.testing.assert_close(after(x), model(x), rtol=0, atol=1e-4)
    assert [fit.layer for fit in fits] == ["b"]


def test_a_module_that_runs_twice_keeps_its_weights():
    torch.manual_seed(0)
    before, after, fits = run(Twice().eval(), (1, 4), images())
    assert all(fit.layer != "b" for fit in fits)
    assert torch.equal(after.b.weight, before.b.weight)


def test_the_batch_size_and_the_chunks_do_not_matter(plain, monkeypatch):
    _, whole, _ = run(plain, (0, 3), images())
    monkeypatch.setattr(moments, "PATCH_ELEMENTS", 1)
    _, parts, _ = run(plain, (0, 3), images(), batch_size=7)
    torch.testing.assert_close(parts.b.weight, whole.b.weight, rtol=0, atol=1e-5)


def test_fewer_images_where_responses_would_take_too_much(plain, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module_under_test, "SPILL_BYTES", 3 * 10 * (80 + 3 * 288)
    )  # three batches: layer b, images twice put down
    run(plain, (0, 3), images(), batch_size=10, on_images=seen.append)
    assert sum(seen) == 2 * 30


def test_too_few_images(plain):
    with pytest.raises(DataError, match="needs 5 images"):
        run(plain, (0,), images(4))


def noise(network, n, seed):
    shape = (n, *network.preprocessing.input_size)
    generator = torch.Generator().manual_seed(seed)
    return TensorImages(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        labels=torch.zeros(n, dtype=torch.long),
    )


@pytest.mark.parametrize("name", ["residual", "depthwise", "functional", "zoo:se_resnet20"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@torch.no_grad()
def test_new_images_come_out_closer_to_the_dense_network(name, sparsity):
    """The dense network's BN statistics are those of the images, as of a trained network."""
    network = built(name)
    plan = random_plan(network, "sparsity", sparsity)
    images, fresh = noise(network, 200, 3), noise(network, 100, 5)
    dense = copy.deepcopy(network.model)
    recalibrate_bn(dense, images, network.preprocessing, device=CPU)
    x = next(iter(fresh.batches(100, network.preprocessing)))[0]
    wanted = dense(x)
    small = cut(dense, network.example, plan)
    recalibrated = copy.deepcopy(small)
    recalibrate_bn(recalibrated, images, network.preprocessing, device=CPU)
    refit(
        dense,
        small,
        network.couplings,
        plan,
        split=images,
        preprocessing=network.preprocessing,
        device=CPU,
    )
    assert (small(x) - wanted).square().mean() < 0.9 * (recalibrated(x) - wanted).square().mean()


class Shared(nn.Module):
    """The output of `b` is read by a BN and by an addition: no constant of it may go into the BN."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3, bias=False)
        self.norm, self.fc = nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.b(self.a(x).relu())
        return self.fc((self.norm(x) + x).mean((2, 3)))


def test_a_bn_that_is_not_the_only_reader_takes_nothing():
    torch.manual_seed(0)
    before, after, fits = run(Shared().eval(), (0, 3), images())
    assert [fit.layer for fit in fits if fit.kept] == ["b"]
    assert torch.equal(after.norm.running_mean, before.norm.running_mean)
