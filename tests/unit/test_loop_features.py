"""What the loop can do beside the plain step: mixing, accumulation, held-out images, features of the teacher."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_prune.artifact import Network
from se_prune.data.batches import augment
from se_prune.errors import DataError, UsageError
from se_prune.gates.sites import find_sites
from se_prune.pipeline import apply_plan, plan, structure
from se_prune.pipeline.features import match_features
from se_prune.records import ArchSpec, ArtifactHeader, Budget
from se_prune.settings import TrainSettings
from se_prune.training import loop
from se_prune.training.losses import FeatureLoss, FeatureMatch, label_loss
from se_prune.training.mixing import Mixing
from se_prune.training.optim import learning_rate
from se_prune.training.stopping import hold_out, top1
from tests.nets import DEPTHWISE
from tests.tiny import GREY, stripes
from tests.training import CPU, net, train

QUICK = TrainSettings(epochs=2, batch_size=24, lr=0.05, flip=0.0, crop_padding=0, amp="off")


def test_one_cycle_rises_and_falls_between_torchs_shares():
    settings = TrainSettings(lr=0.5, warmup=0.25, schedule="onecycle")
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert 0.02 < rates[0] < rates[12] < rates[24] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.5 / 25 / 1e4)
    assert all(a > b for a, b in itertools.pairwise(rates[25:]))


def test_mixed_labels_hold_the_smoothing_once():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    settings = TrainSettings(mixup=1.0, mix_prob=0.0, label_smoothing=0.2)  # nothing is mixed: one label each
    _, targets = Mixing(settings, 3, 0)(torch.zeros(6, 1, 4, 4), labels, 0)
    assert float(label_loss(logits, targets, 0.2)) == pytest.approx(
        float(F.cross_entropy(logits, labels, label_smoothing=0.2)), rel=1e-6
    )


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_alike_and_by_the_batch_alone(key):
    mixing = Mixing(TrainSettings(label_smoothing=0.0, **{key: 1.0}), 2, seed=3)
    labels = torch.tensor([0, 0, 1, 1])
    images = labels.float().view(4, 1, 1, 1).expand(4, 1, 16, 16)  # the share of ones is that of class 1
    before = np.random.get_state()[1].copy()
    first, targets = mixing(images.clone(), labels, 5)
    assert torch.allclose(first.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    assert 0 < float(targets[0, 1]) < 1
    assert torch.equal(first, mixing(images.clone(), labels, 5)[0])
    assert not torch.equal(first, mixing(images.clone(), labels, 6)[0])
    assert (np.random.get_state()[1] == before).all()


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(UsageError, match="a batch has 23 images; choose an even batch_size"):
        train(net(), replace(QUICK, mixup=0.2, batch_size=23))
    assert train(net(), replace(QUICK, mixup=0.2)).steps == 8


def test_accumulated_batches_are_one_large_batch():
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    whole, parts, other = plain(), plain(), plain()
    assert train(whole, QUICK).steps == 8
    assert train(parts, replace(QUICK, batch_size=8, accumulate=3)).steps == 8
    train(other, replace(QUICK, batch_size=8))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(
        not torch.allclose(a, b, atol=1e-3)
        for a, b in zip(whole.parameters(), other.parameters(), strict=True)
    )


def test_images_are_held_out_of_every_class():
    rest, held = hold_out(stripes(96), 0.25, 0)
    assert (len(rest), len(held)) == (72, 24)
    assert torch.bincount(held.labels).tolist() == [8, 8, 8]
    assert torch.equal(held.images, hold_out(stripes(96), 0.25, 0)[1].images)
    assert not torch.equal(held.images, hold_out(stripes(96), 0.25, 1)[1].images)
    with pytest.raises(DataError, match="holds out 0 of 96"):
        hold_out(stripes(96), 0.001, 0)


def test_training_stops_early_and_keeps_the_best_epoch(monkeypatch):
    marks, kept = iter([0.3, 0.6, 0.5, 0.6, 0.9]), []

    def measured(model, *_):
        kept.append({key: value.clone() for key, value in model.state_dict().items()})
        return next(marks)

    monkeypatch.setattr(loop, "top1", measured)
    settings = replace(QUICK, epochs=9, held_out=0.25, patience=2, keep="best")
    model = net()
    result = train(model, settings)
    assert (result.held_out_top1, result.best_epoch, len(kept), result.steps) == (0.6, 1, 4, 12)
    assert all(torch.equal(value, kept[1][key]) for key, value in model.state_dict().items())
    marks = iter([0.3, 0.6, 0.5, 0.6, 0.9])
    train(last := net(), replace(settings, keep="last"))
    assert all(torch.equal(value, kept[-1][key]) for key, value in last.state_dict().items())


def test_top1_of_held_out_images_leaves_the_mode():
    model = net()
    train(model, replace(QUICK, epochs=8))
    model.train()
    assert top1(model, stripes(30, seed=5), GREY, CPU) > 0.9
    assert model.training


def test_randaugment_is_fixed_by_the_generator_and_wants_colours():
    images, settings = stripes(6).images, TrainSettings(rand_augment=2, flip=0.0, crop_padding=0)

    def made(seed):
        return augment(images, settings, torch.Generator().manual_seed(seed))

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    with pytest.raises(UsageError, match="these have 4 channels"):
        augment(images.expand(-1, 4, -1, -1), settings, torch.Generator())


def test_the_feature_loss_is_the_relative_distance_on_kept_channels():
    teacher, student, images = net(1).eval(), net(2).eval(), DEPTHWISE.images(4)
    sites = find_sites(teacher, images[:1])
    kept = {site.name: torch.arange(site.channels) for site in sites}
    loss = FeatureLoss(FeatureMatch(student=sites, teacher=sites, kept=kept), CPU)
    with loss.watching(teacher, teacher):
        teacher(images)
        assert float(loss().detach()) == 0.0
    with loss.watching(student, teacher):
        student(images), teacher(images)
        mine, theirs = ({k: v.detach() for k, v in part.items()} for part in (loss.mine, loss.theirs))
        gaps = [float((mine[n] - theirs[n]).square().sum() / theirs[n].square().sum()) for n in kept]
        assert float(loss().detach()) == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
        assert min(gaps) > 0


def test_features_need_the_dense_network():
    with pytest.raises(UsageError, match="distill_features needs the dense network; give it with --teacher"):
        train(net(), replace(QUICK, distill_features=1.0))


def test_features_are_matched_by_the_plan_that_cut_the_network():
    header = ArtifactHeader(arch=ArchSpec(ref="mine:net"), preprocessing=GREY)
    dense = Network(module=net(3).eval(), header=header)
    found = structure(dense)
    chosen = plan(dense, found, Budget(kind="macs", value=0.6), criterion="l1", device=CPU, repair="none")
    cut = apply_plan(dense, found, chosen, device=CPU, repair="none").network
    match = match_features(cut, dense)
    widths = {site.name: site.channels for site in find_sites(cut.module, DEPTHWISE.images(1))}
    assert {name: len(index) for name, index in match.kept.items()} == widths
    assert any(len(match.kept[site.name]) < site.channels for site in found.sites)
    for site in found.sites:  # the BN weights before each gate are those of the channels that the match names
        layer = f"{site.name.rpartition('.')[0]}"
        whole, part = (dict(n.module.get_submodule(layer).named_modules()) for n in (dense, cut))
        weights = [(whole[k].weight, part[k].weight) for k in whole if k and hasattr(whole[k], "weight")]
        same = [
            torch.equal(a[match.kept[site.name]], b)
            for a, b in weights
            if a.shape[1:] == b.shape[1:] and len(a) == site.channels
        ]
        assert any(same)
    other = Network(module=net(4).eval(), header=header)
    with pytest.raises(UsageError, match="its plan keeps"):
        match_features(Network(module=cut.module, header=header), other)
