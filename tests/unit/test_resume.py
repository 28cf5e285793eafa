"""Runs that are stopped at any step, and end as if they had not been."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.errors import CheckpointError, Interrupted
from se_prune.gates.sites import find_sites
from se_prune.settings import TrainSettings
from se_prune.training import fit, state
from se_prune.training.losses import FeatureMatch
from se_prune.training.state import STATE_FILE, remove_state, state_beside
from tests.nets import DEPTHWISE, DepthwiseSE
from tests.tiny import GREY, stripes

CPU = torch.device("cpu")
PLAIN = TrainSettings(epochs=3, batch_size=24, lr=0.05, flip=0.0, crop_padding=1, amp="off", ema_decay=0.9)
SETTINGS = {
    "plain": PLAIN,
    "adamw": replace(PLAIN, optimizer="adamw", lr=0.01, ema_decay=0.0),
    "mixed": replace(PLAIN, mixup=0.4, cutmix=1.0, erase=0.5),
    "accumulated": replace(PLAIN, batch_size=8, accumulate=5, ema_bn_images=48),
    "augmented": replace(PLAIN, rand_augment=2, schedule="onecycle"),
    "held out": replace(PLAIN, held_out=0.25, keep="best", patience=2, epochs=5),
    "fp16": replace(PLAIN, amp="fp16", epochs=2),
    "features": replace(PLAIN, distill_features=1.0),
}


class Dropping(DepthwiseSE):
    """Drops half of its outputs at random while it trains."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def net(seed=0, cls=DepthwiseSE):
    torch.manual_seed(seed)
    return cls()


def trained_net():
    """Return a teacher: without training its features are next to nothing, and no distance is small beside them."""
    model = net(5)
    fit(model, stripes(96), replace(PLAIN, epochs=2, ema_decay=0.0), preprocessing=GREY, device=CPU)
    return model


def match():
    sites = find_sites(net().eval(), DEPTHWISE.images())
    return FeatureMatch(
        student=sites, teacher=sites, kept={site.name: torch.arange(site.channels) for site in sites}
    )


def train(settings, cls=DepthwiseSE, **options):
    """Train a new network; return it with the result and the steps that were run."""
    model, steps = net(cls=cls), []

    def on_step(log):
        if log.held_out is None:
            steps.append(log.step)
        if log.step == options.get("dies_at"):
            raise Killed

    teacher = {"teacher": trained_net(), "features": match()} if settings.distill_features else {}
    result = fit(
        model,
        options.get("split", stripes(96)),
        settings,
        preprocessing=GREY,
        device=CPU,
        resume=options.get("resume"),
        on_step=options.get("on_step", on_step),
        **teacher,
    )
    return model, result, steps


class Killed(Exception):  # noqa: N818
    """Stands for SIGKILL: nothing is saved on the way out."""


def same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) for key, value in ours.items()
    )


@pytest.fixture
def each_step(monkeypatch):
    """Save after every step."""
    monkeypatch.setattr(state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(state, "SAVE_SHARE", float("inf"))


@pytest.mark.parametrize(
    ("settings", "cls"),
    [*((settings, DepthwiseSE) for settings in SETTINGS.values()), (PLAIN, Dropping)],
    ids=[*SETTINGS, "dropout"],
)
def test_a_run_killed_at_any_step_ends_with_the_same_bits(tmp_path, each_step, settings, cls):
    whole, expected, steps = train(settings, cls)
    assert steps == list(range(1, len(steps) + 1))
    for dies_at in (2, 6, 7):
        with pytest.raises(Killed):
            train(settings, cls, resume=tmp_path, dies_at=dies_at)
        torch.rand(3)  # whatever else happens to the global generator does not matter
    model, result, rest = train(settings, cls, resume=tmp_path)
    assert rest[0] == 7  # the step that died was made again, and no other
    assert same(whole, model)
    assert result == expected
    assert result.train_top1 == expected.train_top1 > 0
    again, result, rest = train(settings, cls, resume=tmp_path)
    assert rest == []
    assert same(whole, again)
    assert result == expected


def test_dropout_does_draw_from_the_generator():
    first, _, _ = train(PLAIN, Dropping)
    second, _, _ = train(PLAIN, DepthwiseSE)
    assert not same(first, second)


def test_within_an_epoch_the_state_is_saved_now_and_then(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        train(PLAIN, resume=tmp_path / "rarely", dies_at=3)
    assert not (tmp_path / "rarely" / STATE_FILE).exists()
    monkeypatch.setattr(state, "SAVE_SECONDS", 0.0)
    with pytest.raises(Killed):
        train(PLAIN, resume=tmp_path / "often", dies_at=3)
    assert (tmp_path / "often" / STATE_FILE).exists()
    monkeypatch.setattr(state, "SAVE_SHARE", 1e-9)  # the first save took too large a share of the time
    with pytest.raises(Killed):
        train(PLAIN, resume=tmp_path / "slowly", dies_at=3)
    assert train(PLAIN, resume=tmp_path / "slowly")[2][0] == 2


@pytest.fixture
def listening():
    """A shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    whole, expected, _ = train(PLAIN)

    def press(log):
        if log.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped after step 6 of 12; .* same command goes on") as caught:
        train(PLAIN, resume=tmp_path, on_step=press)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    model, result, steps = train(PLAIN, resume=tmp_path)
    assert steps == list(range(7, 13))
    assert same(whole, model)
    assert result == expected


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("resume", [True, False])
def test_ctrl_c_twice_or_without_a_state_stops_at_once(tmp_path, resume):
    def press(log):
        for _ in range(2 if resume else 1):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(PLAIN, resume=tmp_path if resume else None, on_step=press)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_in_the_last_step_of_an_epoch(tmp_path):
    def press(log):
        if log.step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after step 8 of 12"):
        train(PLAIN, resume=tmp_path, on_step=press)
    assert train(PLAIN, resume=tmp_path)[2] == [9, 10, 11, 12]


@pytest.mark.usefixtures("listening")
def test_loaders_that_ctrl_c_ended_are_no_error(tmp_path, each_step):
    class Ended(TensorImages):
        def training_batches(self, settings, preprocessing, *, seed, epoch):
            batches = TensorImages.training_batches(self, settings, preprocessing, seed=seed, epoch=epoch)
            yield next(batches)
            if pressed:
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    good, pressed = stripes(96), [True]
    split = Ended(images=good.images, labels=good.labels)
    with pytest.raises(Interrupted, match="stopped after step 1 of 12"):
        train(PLAIN, resume=tmp_path / "a", split=split)
    assert train(PLAIN, resume=tmp_path / "a")[2][0] == 2
    pressed.clear()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # the control
        train(PLAIN, resume=tmp_path / "b", split=split)


def test_other_labels_are_another_run(tmp_path, each_step):
    with pytest.raises(Killed):
        train(PLAIN, resume=tmp_path, dies_at=2)
    good = stripes(96)
    other = TensorImages(images=good.images, labels=good.labels.flip(0))
    with pytest.raises(CheckpointError, match=r"another|other settings; .*--no-resume"):
        train(PLAIN, resume=tmp_path, split=other)
    train(replace(PLAIN, track=("wandb",)), resume=tmp_path)  # where it is followed does not matter


def test_a_state_is_removed_with_what_a_kill_left_and_nothing_else(tmp_path):
    folder = state_beside(tmp_path / "small.safetensors")
    assert folder == tmp_path / "small.safetensors.state"
    remove_state(folder)
    folder.mkdir()
    (folder / STATE_FILE).write_bytes(b"x")
    (folder / f".{STATE_FILE}.abcdefgh.safetensors").write_bytes(b"x")
    (folder / "mine.txt").write_text("x")
    remove_state(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    remove_state(folder)
    assert not folder.exists()
