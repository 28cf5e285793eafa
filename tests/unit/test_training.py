"""The training loop: what it learns and keeps, when it refuses, its precision and its device."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from se_prune.data.batches import TensorImages
from se_prune.errors import DataError, SePruneError
from se_prune.evaluate import evaluate
from se_prune.settings import TrainSettings
from se_prune.training.precision import amp_dtype
from se_prune.training.state import STATE_FILE
from tests.nets import DepthwiseSE
from tests.tiny import GREY, stripes
from tests.training import CPU, CUDA, QUICK, SGD, net, same, train

# The loop.


def test_the_loss_falls_and_the_problem_is_learned():
    model, seen = net(), []
    result = train(model, replace(QUICK, epochs=8), on_step=seen.append)
    last = {log.epoch: log for log in seen}
    assert last[0].loss > 2 * last[7].loss
    assert result.loss == last[7].loss
    assert result.train_top1 == last[7].top1 > 0.95
    assert evaluate(model, stripes(60, seed=5), GREY, device=CPU).top1 > 0.95
    assert [log.step for log in seen] == list(range(1, 33))
    assert {log.total_steps for log in seen} == {32}
    assert result.steps == 32
    assert [log.images for log in seen[:5]] == [24, 48, 72, 96, 24]
    assert not model.training


def test_the_same_seed_gives_the_same_network():
    models = [net(), net(), net()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(model, SGD, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_the_layout_in_memory_does_not_matter():
    models = [net(), net()]
    for model, layout in zip(models, (True, False), strict=True):
        train(model, replace(QUICK, channels_last=layout))
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-4)
    assert all(p.is_contiguous() for p in models[0].parameters())


def test_the_average_of_the_weights_is_what_is_kept():
    averaged, forgetful, last = net(), net(), net()
    train(averaged, SGD)
    train(forgetful, replace(SGD, ema_decay=1e-12))
    train(last, replace(SGD, ema_decay=0.0))
    assert distance(averaged, last) > 1e-3
    assert distance(forgetful, last) < 1e-6


def distance(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((b - a).detach().abs().max()) for a, b in pairs)


def test_gradients_are_clipped():
    free, clipped = net(), net()
    train(free, replace(QUICK, epochs=1, lr=1.0, warmup=0.0))
    train(
        clipped, replace(QUICK, epochs=1, lr=1.0, warmup=0.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-6)
    )
    start = net()
    assert distance(start, free) > 1e-2
    assert 0 < distance(start, clipped) <= 4e-6 * 1.01


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_is_applied(smoothing):
    settings, seen = replace(QUICK, epochs=1, batch_size=96, label_smoothing=smoothing), []
    train(net(), settings, on_step=seen.append)
    ((images, labels),) = stripes(96).training_batches(settings, GREY, seed=0, epoch=0)
    with torch.no_grad():
        logits = net().train()(images)
    rows = F.log_softmax(logits, 1)
    right = rows[torch.arange(96), labels].mean()
    expected = -(1 - smoothing) * right - smoothing * rows.mean()
    assert seen[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_few_images_still_make_a_step():
    result = train(net(), replace(QUICK, epochs=2, batch_size=500), split=stripes(9))
    assert result.steps == 2


def test_no_images():
    with pytest.raises(DataError, match="no training images; check --data"):
        train(net(), QUICK, split=stripes(0))


@pytest.mark.parametrize(
    "settings",
    [
        replace(QUICK, lr=1e30),
        replace(QUICK, lr=float("nan"), epochs=1, batch_size=96),
        replace(QUICK, lr=1e30, ema_decay=0.5),
    ],
)
def test_a_training_that_diverges_is_stopped(settings, tmp_path):
    with pytest.raises(
        SePruneError, match=r"the training diverged .*lower the learning rate \(--lr\)"
    ) as caught:
        train(net(), settings, resume=tmp_path)
    assert type(caught.value) is SePruneError
    assert not (tmp_path / STATE_FILE).exists()
    train(net(), replace(settings, lr=0.01), resume=tmp_path)  # the control
    assert (tmp_path / STATE_FILE).exists()


def test_images_that_are_not_numbers():
    class Bad(TensorImages):
        def training_batches(self, settings, preprocessing, *, seed, epoch):
            yield torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.long)

    with pytest.raises(SePruneError, match="diverged"):
        train(net(), QUICK, split=Bad(images=torch.zeros(4, 1, 8, 8), labels=torch.zeros(4)))


# Precision.

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("amp", "device", "bf16", "expected"),
    [
        ("off", "cpu", True, None),
        ("off", "cuda", True, None),
        ("auto", "cpu", True, BF16),
        ("auto", "cpu", False, None),
        ("auto", "mps", True, None),
        ("auto", "cuda", True, BF16),
        ("auto", "cuda", False, FP16),
        ("bf16", "cpu", False, BF16),
        ("bf16", "cuda", False, BF16),
        ("fp16", "cpu", True, FP16),
        ("fp16", "cuda", True, FP16),
    ],
)
def test_the_type_of_mixed_precision(monkeypatch, amp, device, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "amx_bf16": bf16}, raising=False
    )
    assert amp_dtype(TrainSettings(amp=amp), SimpleNamespace(type=device)) is expected


def test_mixed_precision_is_used_and_learns():
    types = set()

    class Watched(DepthwiseSE):
        def forward(self, x):
            out = super().forward(x)
            types.add(out.dtype)
            return out

    model = Watched()
    result = train(model, replace(QUICK, epochs=6, amp="bf16"))
    assert types == {BF16}
    assert result.train_top1 > 0.9
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    types.clear()
    train(Watched(), replace(QUICK, amp="off"))
    assert types == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["auto", "bf16", "fp16", "off"])
def test_training_on_cuda(amp):
    model = net()
    result = train(model, replace(QUICK, epochs=8, amp=amp), device=CUDA)
    assert result.train_top1 > 0.9
    assert {p.device for p in model.parameters()} == {CPU}
    assert evaluate(model, stripes(60, seed=5), GREY, device=CPU).top1 > 0.9


@pytest.mark.gpu
def test_cuda_and_cpu_agree():
    model, split = net(), stripes(300, seed=5)
    train(model, QUICK)
    cpu = evaluate(model, split, GREY, device=CPU)
    cuda = evaluate(model, split, GREY, device=CUDA)
    assert cuda.loss == pytest.approx(cpu.loss, rel=1e-3)
    agreement = sum(a == b for a, b in zip(cpu.predictions, cuda.predictions, strict=True))
    assert agreement >= 297
