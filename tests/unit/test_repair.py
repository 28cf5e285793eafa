"""Repair: BN statistics re-estimated on images, by hand."""

import copy

import pytest
import torch
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.errors import DataError
from se_prune.records import Preprocessing
from se_prune.surgery.repair import divergence, recalibrate_bn, recalibrate_where_nearer

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(input_size=(2, 5, 5), mean=(0.5, 0.4), std=(0.25, 0.5))


class Small(nn.Module):
    """Two convolutions, each with a BN, of momenta that are not torch's default."""

    def __init__(self, positions=True):
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3)
        self.b, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)
        self.fc, self.bn3 = nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.bn2(self.b(self.bn1(self.a(x)).relu())).relu()
        return self.bn3(self.fc(x.flatten(1)))


def images(n):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (n, 2, 5, 5), dtype=torch.uint8, generator=generator)
    return TensorImages(images=pixels, labels=torch.zeros(n, dtype=torch.long))


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}


def recalibrate(model, n=10, **options):
    return recalibrate_bn(model, images(n), PREPROCESSING, device=CPU, **options)


@torch.no_grad()
def by_hand(model, n, batch_size):
    """Return the mean and the unbiased variance of every BN's input, averaged over batches.

    Within a batch each BN uses the batch's own statistics, and the next layer sees what comes of that.
    """
    found = {name: [] for name in norms(model)}
    x = (images(n).images.float() / 255 - torch.tensor(PREPROCESSING.mean).view(1, -1, 1, 1)) / torch.tensor(
        PREPROCESSING.std
    ).view(1, -1, 1, 1)

    def norm(name, z):
        module, dims = norms(model)[name], [d for d in range(z.ndim) if d != 1]
        found[name].append((z.mean(dims), z.var(dims, unbiased=True)))
        shape = (1, -1) + (1,) * (z.ndim - 2)
        centred = (z - z.mean(dims, keepdim=True)) / (z.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return centred * module.weight.view(shape) + module.bias.view(shape)

    for part in x.split(batch_size):
        if len(part) > 1:
            z = norm("bn2", model.b(norm("bn1", model.a(part)).relu())).relu()
            norm("bn3", model.fc(z.flatten(1)))
    return {
        name: tuple(torch.stack(values).mean(0) for values in zip(*pairs, strict=True))
        for name, pairs in found.items()
    }


def randomised():
    model = Small()
    with torch.no_grad():
        for norm in norms(model).values():
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.running_mean.fill_(7)
            norm.running_var.fill_(50)
    return model


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (11, 4), (9, 4), (12, 250), (2, 2)])
def test_statistics_are_the_average_over_batches(n, batch_size):
    """Batches of 4, 4, 3 count the same; the last one of (9, 4) has one image, and is left out."""
    model = randomised()
    expected = by_hand(model, n, batch_size)
    assert recalibrate(model, n, batch_size=batch_size) == 3
    for name, norm in norms(model).items():
        mean, variance = expected[name]
        assert torch.allclose(norm.running_mean, mean, atol=1e-5), name
        assert torch.allclose(norm.running_var, variance, rtol=1e-4, atol=1e-6), name


def test_one_batch_makes_training_and_eval_mode_agree_on_it():
    model = randomised()
    (batch,) = (b for b, _ in images(12).batches(12, PREPROCESSING))
    before = model.eval()(batch)
    recalibrate(model, 12)
    after = model.bn1(model.a(batch))
    assert torch.allclose(after.mean((0, 2, 3)), model.bn1.bias, atol=1e-4)
    assert not torch.allclose(before, model(batch), atol=0.1)


def test_weights_stay_and_modes_and_momenta_come_back():
    model = randomised().train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert recalibrate(model) == 3
    assert not any(m.training for m in model.modules())
    assert [norm.momentum for norm in norms(model).values()] == [0.3, None, 0.1]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_result_does_not_depend_on_what_was_there():
    first, second = randomised(), randomised()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.bn1.running_mean.fill_(-100)
        second.bn2.num_batches_tracked.fill_(99)
    for model in (first, second):
        recalibrate(model)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_everything_but_bn_runs_in_eval_mode():
    model = randomised().train()
    model.bn1 = nn.Sequential(model.bn1, nn.Dropout(0.5))
    seen = []
    model.bn1[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    model.bn1[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    recalibrate(model)
    assert seen == [True, False]


def test_an_exception_gives_back_modes_and_momenta():
    model = randomised()

    def fail(*_):
        raise ZeroDivisionError

    handle = model.fc.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        recalibrate(model)
    assert not any(m.training for m in model.modules())
    assert [norm.momentum for norm in norms(model).values()] == [0.3, None, 0.1]
    handle.remove()
    assert recalibrate(model) == 3


def test_a_network_without_bn_has_nothing_to_set():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)).train()
    seen = []
    assert recalibrate(model, on_batch=seen.append) == 0
    assert seen == []


def test_norms_that_track_nothing_are_left_alone():
    model = randomised()
    model.bn1 = nn.BatchNorm2d(3, track_running_stats=False)
    assert recalibrate(model) == 2
    assert model.bn1.running_mean is None
    assert model.bn1.momentum == 0.1


def test_progress_counts_every_image():
    seen = []
    recalibrate(randomised(), 9, batch_size=4, on_batch=seen.append)
    assert seen == [4, 4, 1]


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (1, 4), (9, 1)])
def test_too_few_images_are_refused_before_anything_is_lost(n, batch_size):
    model = randomised()
    with pytest.raises(DataError, match=f"batches of 2 images or more, got {n}; check --data"):
        recalibrate(model, n, batch_size=batch_size)
    assert torch.equal(model.bn1.running_mean, torch.full((3,), 7.0))
    recalibrate(model, 2)
    assert not torch.equal(model.bn1.running_mean, torch.full((3,), 7.0))


# Kept only where the outputs come nearer.


def calibrated():
    """Return a network whose BN statistics are those of the images, with outputs that differ between them."""
    model = Small().eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.7
    recalibrate_bn(model, images(60), PREPROCESSING, device=CPU)
    return model


def nearer(dense, model):
    images_seen = []
    result = recalibrate_where_nearer(
        dense, model, images(60), images(15), PREPROCESSING, device=CPU, on_batch=images_seen.append
    )
    assert sum(images_seen) == 60
    return result


def test_statistics_are_kept_where_the_outputs_come_nearer():
    dense = calibrated()
    model = copy.deepcopy(dense)
    for norm in norms(model).values():
        norm.running_mean.add_(0.5)
    count, before, after = nearer(dense, model)
    assert count == 3
    assert after < 1e-6 < before
    assert torch.allclose(model.bn1.running_mean, dense.bn1.running_mean)


def test_statistics_are_taken_back_bit_for_bit_where_they_do_not():
    dense = calibrated()
    for norm in norms(dense).values():  # as if it had been trained on other images
        norm.running_var.mul_(4)
    model = copy.deepcopy(dense)
    model.fc.weight.data.mul_(1.01)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    count, before, after = nearer(dense, model)
    assert count == 0
    assert before < after
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    recalibrate_bn(model, images(60), PREPROCESSING, device=CPU)  # the control: asked for, they are set
    assert not torch.equal(model.bn1.running_var, wanted["bn1.running_var"])


def test_a_network_without_bn_has_nothing_to_recalibrate():
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2))
    assert recalibrate_where_nearer(model, model, images(4), images(2), PREPROCESSING, device=CPU) == (
        0,
        0.0,
        0.0,
    )


@torch.no_grad()
def test_divergence_is_the_mean_kl_divergence():
    dense, model = calibrated(), calibrated()
    model.fc.bias.data.add_(torch.tensor([0.5, -0.5]))
    ((x, _),) = images(9).batches(9, PREPROCESSING)
    p, q = dense(x).softmax(1), model(x).softmax(1)
    by_hand = float((p * (p / q).log()).sum(1).mean())
    assert divergence(dense, model, images(9), PREPROCESSING, device=CPU) == pytest.approx(by_hand, rel=1e-4)
    assert by_hand > 1e-3
    assert divergence(dense, dense, images(9), PREPROCESSING, device=CPU) == pytest.approx(0, abs=1e-6)
