"""Training that stops and goes on as if it had not, and the file that keeps its state."""

from dataclasses import replace

import pytest
import torch
from timm.utils import ModelEmaV3

from se_prune.errors import CheckpointError, SePruneError
from se_prune.training.optim import build_optimizer
from se_prune.training.state import STATE_FILE, Parts, Position, StateFile
from tests.nets import DEPTHWISE, DepthwiseSE
from tests.tiny import stripes
from tests.training import ADAMW, CPU, CUDA, SGD, net, same, stopped, train


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


@pytest.mark.gpu
def test_a_run_on_cuda_goes_on(tmp_path):
    whole, resumed = net(), net()
    settings = replace(SGD, amp="off")
    train(whole, settings, device=CUDA)
    stopped(net(), settings, tmp_path, 2, device=CUDA)
    train(resumed, settings, device=CUDA, resume=tmp_path)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5)
