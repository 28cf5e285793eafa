"""What gate statistics say, of gates made by hand: specificity, saturation, what folding loses, the advice."""

import math

import pytest
import torch

from se_prune.gates.summary import cheapest_within, fold_constants, fold_loss, specificity, summarise
from tests.measured import column, made


def test_specificity_is_zero_where_the_classes_agree():
    (row,) = summarise(made([column(0.25, 0.75, 0.25, 0.75)], [0, 0, 1, 1]))
    assert row.class_specificity == 0
    assert row.std_images == 0.25


def test_specificity_is_one_where_the_gate_is_a_function_of_the_class():
    (row,) = summarise(made([column(0.25, 0.25, 0.75, 0.75)], [0, 0, 1, 1]))
    assert row.class_specificity == 1
    assert row.std_images == 0.25


def test_specificity_between_is_the_share_of_variance():
    statistics = made([column(0.0, 0.5, 0.5, 1.0)], [0, 0, 1, 1])
    between, total = specificity(statistics.sums["site0"], statistics.counts)
    # Class means 1/4 and 3/4: between-class variance 1/16; the variance over all is 1/8.
    assert (between.item(), total.item()) == (1 / 16, 1 / 8)
    assert summarise(statistics)[0].class_specificity == 0.5


def test_specificity_weighs_classes_by_their_images_and_skips_those_unseen():
    statistics = made([column(1.0, 0.0, 0.0, 0.0)], [0, 1, 1, 1], classes=5)
    between, total = specificity(statistics.sums["site0"], statistics.counts)
    assert between.item() == pytest.approx(3 / 16)
    assert total.item() == pytest.approx(3 / 16)


def test_specificity_of_a_gate_that_never_moves_is_zero():
    (row,) = summarise(made([torch.full((6, 3), 0.3)], [0, 0, 0, 1, 1, 1]))
    assert row.class_specificity == pytest.approx(0, abs=1e-6)
    assert row.std_images < 1e-7


def test_saturation_is_the_share_near_zero_and_one():
    rows = summarise(
        made(
            [column(0.01, 0.99, 0.5, 0.4), column(0.0, 1.0, 0.02, 0.98), column(0.1, 0.9, 0.5, 0.6)],
            [0, 0, 1, 1],
        )
    )
    assert [row.saturated for row in rows] == [0.5, 1.0, 0.0]
    assert rows[0].mean == pytest.approx(1.9 / 4)


def random_site(seed, n=12, channels=5):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, channels, 2, 2, generator=generator)
    u *= torch.rand(n, channels, 1, 1, generator=generator) * 3
    return u, torch.rand(n, channels, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_fold_loss_is_the_least_that_any_constant_loses(seed):
    u, s = random_site(seed)
    sums = made([s], [0, 1] * 6, u).sums["site0"]
    energy = u.double().square().mean((2, 3))
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
    lost = ((s.double()[..., None] - grid) ** 2 * energy[..., None]).sum(0)  # (C, grid)
    least, where = lost.min(1)
    whole = (s.double() ** 2 * energy).sum()
    assert fold_loss(sums) == pytest.approx(float(least.sum() / whole), rel=1e-4)
    assert fold_loss(sums) <= float(least.sum() / whole) * (1 + 1e-6)
    assert torch.allclose(fold_constants(sums), grid[where], atol=1 / 4000)
    assert fold_loss(sums) > 0.05
    # The mean gate is another constant, and a worse one.
    mean = ((s.double() - s.double().mean(0)) ** 2 * energy).sum() / whole
    assert fold_loss(sums) < float(mean)


def test_folding_a_constant_gate_loses_nothing():
    u, _ = random_site(0)
    values = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    sums = made([values.expand(12, 5)], [0, 1] * 6, u).sums["site0"]
    assert fold_loss(sums) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(fold_constants(sums), values.double(), atol=1e-7)


def test_channels_without_any_energy_fold_to_their_mean_gate():
    u, s = random_site(1)
    u[:, 2] = 0
    sums = made([s], [0, 1] * 6, u).sums["site0"]
    assert float(fold_constants(sums)[2]) == pytest.approx(float(s[:, 2].double().mean()))
    assert math.isfinite(fold_loss(sums))
    nothing = made([s], [0, 1] * 6, torch.zeros_like(u)).sums["site0"]
    assert fold_loss(nothing) == 0


def test_sites_are_advised_to_be_folded_as_long_as_their_losses_add_up_to_little():
    live, dead = column(0.1, 0.9, 0.2, 0.8), column(0.5, 0.5001, 0.5, 0.5001)
    statistics = made([live, dead, dead], [0, 0, 1, 1])
    assert [row.advice for row in summarise(statistics)] == ["keep", "fold", "fold"]
    assert [row.logit_shift for row in summarise(statistics)] == [None] * 3
    names = [site.name for site in statistics.sites]
    # the shift of the logits, where it was measured, decides: 0.003 + 0.001 is below 0.005, with 0.0011 it is not
    for last, advice in ((0.003, ["fold", "keep", "fold"]), (0.0051, ["fold", "keep", "keep"])):
        statistics.shifts = dict(zip(names, (0.001, 0.0052, last), strict=True))
        rows = summarise(statistics)
        assert [row.advice for row in rows] == advice
        assert [row.predicted_loss for row in rows] == [0.001, 0.0052, last]
    assert cheapest_within({"a": 0.3, "b": 0.1, "c": 0.2}, 0.31) == ("b", "c")
    assert cheapest_within({"a": 0.3, "b": 0.1, "c": 0.2}, 0.1) == ()
