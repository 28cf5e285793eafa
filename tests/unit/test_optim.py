"""The learning rate of every step, and the optimizer: its kind and what is decayed."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from se_prune.gates.sites import find_sites
from se_prune.settings import TrainSettings
from se_prune.training.optim import build_optimizer, learning_rate
from tests.nets import DEPTHWISE, DepthwiseSE, ResidualSE
from tests.training import QUICK, net, train

# The learning rate.


def test_the_schedule_warms_up_and_falls_to_zero():
    settings = TrainSettings(lr=0.4, warmup=0.1, schedule="cosine")
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[9] == rates[10] == pytest.approx(0.4)  # the last step of the warm-up, and the first after it
    assert rates[55] == pytest.approx(0.2)  # half of the way down
    assert rates[32] == pytest.approx(0.2 * (1 + math.cos(math.pi * 22 / 90)))
    assert rates[99] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_the_constant_schedule_and_no_warm_up():
    settings = TrainSettings(lr=0.4, warmup=0.1, schedule="constant")
    assert [learning_rate(settings, step, 100) for step in (0, 9, 10, 50, 99)] == pytest.approx(
        [0.04, 0.4, 0.4, 0.4, 0.4]
    )
    cold = replace(settings, warmup=0.0)
    assert learning_rate(cold, 0, 100) == 0.4
    assert learning_rate(replace(cold, schedule="cosine"), 0, 100) == 0.4


@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_the_schedule_of_very_short_runs(warmup):
    for total in (1, 2, 3):
        rates = [learning_rate(TrainSettings(lr=1.0, warmup=warmup), step, total) for step in range(total)]
        assert all(0 < rate <= 1 for rate in rates)


def test_every_step_gets_the_rate_of_the_schedule():
    seen = []

    class Watched(DepthwiseSE):
        def forward(self, x):
            seen.append(watched.copy())
            return super().forward(x)

    watched = []
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        watched.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        train(Watched(), QUICK)
    assert watched == pytest.approx([learning_rate(QUICK, index, 12) for index in range(12)])
    assert [len(w) for w in seen] == list(range(12))


# The optimizer.


def decays(model, settings, no_decay=()):
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, settings, no_decay)
    return {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_biases_norms_and_chosen_layers_are_not_decayed(optimizer):
    model = ResidualSE()
    settings = TrainSettings(optimizer=optimizer, weight_decay=0.1)
    found = decays(model, settings, {"blocks.0.se.reduce", "blocks.1.se.expand"})
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {name for name, decay in found.items() if decay == 0.1} == {
        "stem.weight",
        "fc.weight",
        "blocks.0.conv1.weight",
        "blocks.0.conv2.weight",
        "blocks.0.se.expand.weight",
        "blocks.1.conv1.weight",
        "blocks.1.conv2.weight",
        "blocks.1.se.reduce.weight",
    }
    assert set(found.values()) == {0.0, 0.1}


def test_the_layers_of_all_gates_are_found_by_their_sites():
    model = DepthwiseSE().eval()
    layers = {name for site in find_sites(model, DEPTHWISE.images()) for name in site.layers}
    assert layers == {f"blocks.{block}.se.fc.{layer}" for block in (0, 1) for layer in (0, 2)}
    assert not any(decays(model, TrainSettings(), layers)[f"{layer}.weight"] for layer in layers)
    assert all(decays(model, TrainSettings())[f"{layer}.weight"] for layer in layers)


def test_a_model_without_decayed_parameters():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert set(decays(model, TrainSettings()).values()) == {0.0}


def test_the_optimizers_are_the_ones_asked_for():
    sgd = build_optimizer(net(), TrainSettings(lr=0.3, momentum=0.8), ())
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.3, 0.8, True)
    plain = build_optimizer(net(), TrainSettings(momentum=0.0), ())
    assert not plain.defaults["nesterov"]
    assert isinstance(build_optimizer(net(), TrainSettings(optimizer="adamw"), ()), torch.optim.AdamW)
