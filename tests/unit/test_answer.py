"""Fisher information of the answer: against the divergence that noise on a layer's outputs really makes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_prune.scoring import answer, gradients, score
from se_prune.scoring.answer import TEMPERATURE, answer_scores, answered
from se_prune.scoring.energy import energy_scores
from se_prune.scoring.obs import obs_scores
from se_prune.scoring.signal import describe
from tests.evidence import data, evidence, measured
from tests.nets import ALL


class Gated(nn.Module):
    """A gated convolution behind a stem, and a classifier; the activations may write over what they read."""

    def __init__(self, *, inplace=False, frozen_stem=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.act, self.frozen_stem = nn.ReLU(inplace=inplace), frozen_stem
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_stem):
            x = self.act(self.a(x))
        u = self.b(x)
        s = self.expand(self.act(self.reduce(u.mean((2, 3), keepdim=True)))).sigmoid()
        return 6 * self.fc(self.act(u * s).mean((2, 3)))


def gated(**options):
    torch.manual_seed(3)
    images = data((2, 6, 6), 3, n=20)
    have = evidence(Gated(**options).eval(), (2, 6, 6), 3, images)
    return dataclasses.replace(have, batches=lambda limit: images.first(limit).batches(20))


def found_by(have):
    signal = describe(have)
    return answered(have, signal, {"a", "b", "expand", "fc"})


def test_what_an_output_is_worth_is_the_divergence_that_noise_on_it_makes(monkeypatch):
    draws, size = 200, 0.02
    have = gated()
    worth = torch.zeros(4, dtype=torch.float64)
    for seed in range(draws):
        monkeypatch.setattr(answer, "SEED", seed)
        worth += found_by(have).gain("b") / draws
    images = torch.cat([x for x, _ in have.batches(None)]).repeat(draws, 1, 1, 1).double()
    model = have.model.double()
    with torch.no_grad():
        clean = (model(images) / TEMPERATURE).log_softmax(1)
    noise = torch.Generator().manual_seed(9)
    for channel in range(4):

        def moved(_, __, output, channel=channel):
            extra = torch.zeros_like(output)
            extra[:, channel] = size * torch.randn(output[:, channel].shape, generator=noise).double()
            return output + extra

        handle = model.b.register_forward_hook(moved)
        with torch.no_grad():
            noisy = (model(images) / TEMPERATURE).log_softmax(1)
        handle.remove()
        divergence = float(F.kl_div(noisy, clean, log_target=True, reduction="batchmean"))
        predicted = float(worth[channel]) / 20 * size**2 / (2 * TEMPERATURE**2)
        assert predicted == pytest.approx(divergence, rel=0.1)
    assert max(worth) > 1.5 * min(worth)


def test_the_whole_answer_is_the_variance_of_its_logits():
    have = gated()
    found = found_by(have)
    with torch.no_grad():
        logits = have.model(torch.cat([x for x, _ in have.batches(None)])).double()
    total = 0.0
    for row in logits:
        p = (row / TEMPERATURE).softmax(0)
        total += float((p * row.square()).sum() - (p * row).sum().square())
    assert found.whole("b") == found.whole("fc") == pytest.approx(total)


def test_an_activation_that_writes_over_a_layers_output_changes_nothing():
    plain, written = found_by(gated()), found_by(gated(inplace=True))
    assert set(plain.information) == {"a", "b", "expand", "fc"}
    for name, value in plain.information.items():
        assert written.information[name].tolist() == pytest.approx(value.tolist())


def test_images_in_parts_and_other_labels_change_nothing(monkeypatch):
    have = gated()
    whole = found_by(have)
    monkeypatch.setattr(gradients, "PIXELS", 3 * 36)
    wrong = dataclasses.replace(have, batches=lambda limit: ((x, y * 0) for x, y in have.batches(limit)))
    parted = found_by(wrong)
    assert parted.total == pytest.approx(whole.total)
    for name, value in whole.information.items():
        assert parted.information[name].tolist() == pytest.approx(value.tolist(), rel=1e-4)
    assert all(p.grad is None for p in have.model.parameters())


def test_large_images_are_fewer(monkeypatch):
    asked = []
    have = gated()

    def batches(limit):
        asked.append(limit)
        return have.batches(limit)

    found_by(dataclasses.replace(have, batches=batches))
    monkeypatch.setattr(answer, "ALL_PIXELS", 7 * 36 + 5)
    found_by(dataclasses.replace(have, batches=batches))
    assert asked == [512, 7]


def test_layers_that_no_gradient_reaches_count_as_parts_of_the_signal():
    have = gated(frozen_stem=True)
    signal, found = describe(have), found_by(have)
    assert not found.information
    for name in ("a", "b"):
        assert found.gain(name).equal(signal.gain(name))
        assert found.whole(name) == signal.whole(name)


def test_a_network_that_answers_alike_whatever_it_sees_is_scored_by_its_signal():
    have = gated()
    with torch.no_grad():
        have.model.fc.weight.zero_()
        have.model.fc.bias.zero_()
    assert not found_by(have).information
    assert min(score("excitation", have).groups["a"]) > 0


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
def test_excitation_knows_which_repair_follows(facts):
    have = measured(facts)
    signal, wanted = describe(have), [c for c in have.couplings if c.group.prunable]
    energy = energy_scores(signal, wanted)
    layers = {piece.layer for coupling in wanted for piece in signal.consumers(coupling)}
    found = answered(have, signal, layers)
    assert set(found.information) == layers
    residual = obs_scores(have, found, wanted)
    assert residual == answer_scores(have, signal, wanted)
    for name, values in score("excitation", have).groups.items():
        expected = [(max(a, 0) * b) ** 0.5 for a, b in zip(residual[name], energy[name], strict=True)]
        assert values == pytest.approx(expected)
        assert min(values) >= 0
    assert residual != obs_scores(have, signal, wanted)
    for repair in ("bn", "none"):
        have.repair, have.batches = repair, None
        assert score("excitation", have).groups == energy
