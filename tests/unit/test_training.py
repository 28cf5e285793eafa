"""Training: schedule, decay, distillation, precision, and runs that stop and go on as if they had not."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.errors import CheckpointError, DataError, SePruneError
from se_prune.evaluate import evaluate
from se_prune.gates.sites import find_sites
from se_prune.settings import TrainSettings
from se_prune.training import fit
from se_prune.training.losses import distillation_loss
from se_prune.training.optim import build_optimizer, learning_rate
from se_prune.training.precision import amp_dtype
from se_prune.training.state import STATE_FILE, Parts, Position, StateFile
from se_prune.training.teacher import Teacher
from tests.nets import DEPTHWISE, DepthwiseSE, ResidualSE
from tests.tiny import GREY, stripes

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
QUICK = TrainSettings(
    epochs=3, batch_size=24, lr=0.05, label_smoothing=0.0, flip=0.0, crop_padding=0, amp="off"
)
SGD = replace(QUICK, ema_decay=0.9, crop_padding=1, erase=0.5)
ADAMW = replace(SGD, optimizer="adamw", lr=0.01)


def net(seed=0):
    torch.manual_seed(seed)
    return DepthwiseSE()


def train(model, settings, **options):
    options = {"preprocessing": GREY, "device": CPU, **options}
    return fit(model, options.pop("split", stripes(96)), settings, **options)


def same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in ours.items())


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


# Distillation.


def test_distillation_is_zero_for_equal_outputs_and_shifted_ones():
    logits = torch.randn(7, 5)
    for temperature in (0.5, 1.0, 4.0):
        assert float(distillation_loss(logits, logits, temperature)) == pytest.approx(0.0, abs=1e-6)
        assert float(distillation_loss(logits + 3, logits, temperature)) == pytest.approx(0.0, abs=1e-5)
        assert float(distillation_loss(logits, -logits, temperature)) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_the_divergence_by_hand(temperature):
    student, teacher = [[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], [[0.0, 1.0, 1.0], [2.0, -2.0, 0.0]]
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q = [math.exp(v / temperature) for v in s]
        p = [math.exp(v / temperature) for v in t]
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    expected = total / 2 * temperature**2
    got = distillation_loss(torch.tensor(student).double(), torch.tensor(teacher).double(), temperature)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_a_student_follows_its_teacher_and_leaves_it_as_it_is():
    teacher = net(1)
    train(teacher, replace(QUICK, epochs=8))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    lies = replace_labels(stripes(96), torch.zeros(96, dtype=torch.long))
    student, sceptic = net(2), net(2)
    train(student, replace(QUICK, epochs=16, distill_weight=1.0), split=lies, teacher=teacher)
    train(sceptic, replace(QUICK, epochs=16, distill_weight=0.0), split=lies, teacher=teacher)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    right = [
        evaluate(model, stripes(60, seed=5), GREY, device=CPU).top1 for model in (teacher, student, sceptic)
    ]
    assert right[0] > 0.9
    assert right[1] > 0.9
    assert right[2] == pytest.approx(1 / 3, abs=0.1)  # the control: with the labels alone it learns the lies


def replace_labels(split, labels):
    return TensorImages(images=split.images, labels=labels)


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


# Stopping and going on.


def stopped(model, settings, folder, after, **options):
    """Train until the first step of the epoch `after`, as a killed run would."""

    def watch(log):
        if log.epoch == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, settings, resume=folder, on_step=watch, **options)


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [SGD, ADAMW, replace(SGD, ema_decay=0.0), replace(SGD, momentum=0.0), replace(SGD, clip_norm=0.5)],
    ids=["sgd", "adamw", "no average", "no momentum", "clipped"],
)
def test_a_run_that_goes_on_is_bit_for_bit_the_one_that_never_stopped(tmp_path, settings, after):
    whole, resumed = net(), net()
    expected = train(whole, settings)
    stopped(net(), settings, tmp_path, after)
    steps = []
    result = train(resumed, settings, resume=tmp_path, on_step=lambda log: steps.append(log.step))
    assert steps == list(range(4 * after + 1, 13))  # it did go on, and did not start again
    assert same(whole, resumed)
    assert result == expected


def test_a_distilled_run_goes_on_too(tmp_path):
    teacher, whole, resumed = net(7), net(), net()
    train(whole, SGD, teacher=teacher)
    stopped(net(), SGD, tmp_path, 2, teacher=teacher)
    train(resumed, SGD, teacher=teacher, resume=tmp_path)
    assert same(whole, resumed)


def test_the_average_counts_steps_over_epochs_and_stops(tmp_path, monkeypatch):
    counted = []
    update = ModelEmaV3.update

    def counting(self, model, step=None):
        counted.append(step)
        update(self, model, step=step)

    monkeypatch.setattr(ModelEmaV3, "update", counting)
    train(net(), SGD)
    assert counted == list(range(1, 13))
    stopped(net(), SGD, tmp_path, 1)
    counted.clear()
    train(net(), SGD, resume=tmp_path)
    assert counted == list(range(5, 13))


def test_a_finished_run_is_not_run_again(tmp_path):
    first, again = net(), net()
    train(first, SGD, resume=tmp_path)
    steps = []
    result = train(again, SGD, resume=tmp_path, on_step=steps.append)
    assert steps == []
    assert result.steps == 12
    assert same(first, again)


def test_a_state_left_by_an_interrupted_write_is_whole(tmp_path):
    stopped(net(), SGD, tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]


OTHER = {
    "seed": (SGD, {"seed": 1}),
    "rate": (replace(SGD, lr=0.06), {}),
    "epochs": (replace(SGD, epochs=4), {}),
    "images": (SGD, {"split": stripes(72)}),
    "teacher": (SGD, {"teacher": net(5)}),
}


@pytest.mark.parametrize(("settings", "options"), OTHER.values(), ids=OTHER)
def test_the_state_of_another_run_is_refused(tmp_path, settings, options):
    stopped(net(), SGD, tmp_path, 1)
    before = (tmp_path / STATE_FILE).read_bytes()
    model = net()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"belongs to a run with other settings; .*delete it to start again"
    ):
        train(model, settings, resume=tmp_path, **options)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_the_state_of_a_run_from_other_weights_is_refused(tmp_path):
    stopped(net(), SGD, tmp_path / "plain", 1)
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(net(3), SGD, resume=tmp_path / "plain")
    train(net(), SGD, resume=tmp_path / "plain")  # the control
    stopped(net(), SGD, tmp_path / "taught", 1, teacher=net(5))
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(net(), SGD, resume=tmp_path / "taught", teacher=net(6))
    train(net(), SGD, resume=tmp_path / "taught", teacher=net(5))


def test_the_state_of_another_network_is_refused(tmp_path):
    stopped(net(), SGD, tmp_path, 1)
    wider = DepthwiseSE(num_classes=4)
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(wider, SGD, resume=tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_state_is_refused(tmp_path, kept):
    stopped(net(), SGD, tmp_path, 1)
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        CheckpointError, match=r"training-state\.safetensors is damaged .*delete it to start again"
    ):
        train(net(), SGD, resume=tmp_path)
    path.write_bytes(whole)
    train(net(), SGD, resume=tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SePruneError, match=r"cannot make the folder .*file: File exists"):
        train(net(), SGD, resume=tmp_path / "file")


def parts_of(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Parts(modules={"model": model}, optimizer=optimizer, scaler=scaler, device=CPU)


def test_state_without_a_run(tmp_path):
    model = net()
    optimizer = build_optimizer(model, ADAMW, ())
    parts, at = (
        parts_of(model, optimizer),
        Position(epoch=2, step=3, loss=0.5, top1=0.1, loss_sum=0.1, best_top1=1 / 3),
    )
    state = StateFile(tmp_path, "me")
    assert state.load(parts).epoch == 0
    model(DEPTHWISE.images(4)).sum().backward()
    optimizer.step()
    state.save(at, parts)
    other = net(1)
    fresh = build_optimizer(other, ADAMW, ())
    assert StateFile(tmp_path, "me").load(parts_of(other, fresh)) == at
    assert same(model, other)
    mine, theirs = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    assert len(mine) == len(list(model.parameters()))
    for index, values in mine.items():
        assert values.keys() == theirs[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, theirs[index][key]) for key, value in values.items())


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
def test_a_run_on_cuda_goes_on(tmp_path):
    whole, resumed = net(), net()
    settings = replace(SGD, amp="off")
    train(whole, settings, device=CUDA)
    stopped(net(), settings, tmp_path, 2, device=CUDA)
    train(resumed, settings, device=CUDA, resume=tmp_path)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5)


@pytest.mark.gpu
def test_cuda_and_cpu_agree():
    model, split = net(), stripes(300, seed=5)
    train(model, QUICK)
    cpu = evaluate(model, split, GREY, device=CPU)
    cuda = evaluate(model, split, GREY, device=CUDA)
    assert cuda.loss == pytest.approx(cpu.loss, rel=1e-3)
    agreement = sum(a == b for a, b in zip(cpu.predictions, cuda.predictions, strict=True))
    assert agreement >= 297


# The teacher, asked beforehand.


class Counted(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x):
        self.asked += len(x)
        return self.model(x)


MIRRORED = replace(QUICK, epochs=5, flip=0.5, distill_weight=1.0)


def test_a_teacher_is_asked_once_per_form_of_an_image():
    teacher = Counted(net(3))
    train(net(), MIRRORED, teacher=teacher)
    assert teacher.asked == 2 * 96


@pytest.mark.parametrize("change", [{"crop_padding": 1}, {"erase": 0.5}, {"epochs": 2}])
def test_a_teacher_is_asked_each_time_where_answers_do_not_repeat(change):
    teacher, settings = Counted(net(3)), replace(MIRRORED, **change)
    train(net(), settings, teacher=teacher)
    assert teacher.asked == settings.epochs * 96


def test_known_answers_are_the_networks_own(monkeypatch):
    known, each_time = net(), net()
    train(known, MIRRORED, teacher=net(3))
    monkeypatch.setattr(Teacher, "prepare", lambda *_: None)
    train(each_time, MIRRORED, teacher=net(3))
    for name, value in known.state_dict().items():
        torch.testing.assert_close(value, each_time.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_run_with_known_answers_goes_on_bit_for_bit(tmp_path):
    whole, resumed = net(), net()
    train(whole, MIRRORED, teacher=net(3))
    stopped(net(), MIRRORED, tmp_path, 2, teacher=net(3))
    train(resumed, MIRRORED, teacher=net(3), resume=tmp_path)
    assert same(whole, resumed)


def test_an_unknown_image_is_asked_about():
    teacher, split = Counted(net(3).eval()), stripes(96)
    known = Teacher(teacher, torch.contiguous_format)
    known.prepare(split, MIRRORED, GREY)
    before, other = teacher.asked, torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(known(other), teacher.model(other))
    assert teacher.asked == before + 4
