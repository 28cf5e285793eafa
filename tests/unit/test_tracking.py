"""The log of a training and its trackers, which are stood for by fakes where they are not installed."""

import sys
from types import SimpleNamespace

import pytest

from se_prune.errors import UsageError
from se_prune.settings import TrainSettings
from se_prune.training.loop import StepLog
from se_prune.training.tracking import COLUMNS, following


def log(step, epoch=0, **changes):
    fields = {"loss": 1 / step, "top1": 0.5, "images": 8 * step, "lr": 0.1, "images_per_second": 123.0}
    return StepLog(epoch=epoch, step=step, total_steps=9, **{"logged": True, **fields, **changes})


def follow(folder, steps, *track, fail=None):
    """Follow a training that makes `steps`, and then fails where an error is given."""
    settings = TrainSettings(track=track)
    with following(settings, folder / "net.training.csv", name="net", state=folder / "state") as tell:
        for step in steps:
            tell(step)
        if fail is not None:
            raise fail


def rows(folder):
    lines = (folder / "net.training.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    return [dict(zip(COLUMNS, line.split(","), strict=True)) for line in lines[1:]]


def test_the_log_has_a_row_for_every_step_that_is_logged(tmp_path):
    follow(tmp_path, [log(1), log(2, logged=False), log(3), log(3, held_out=0.75)])
    first, third, held = rows(tmp_path)
    assert first == {
        "step": "1", "epoch": "1", "lr": "0.1", "loss": "1", "top1": "0.5", "images_per_second": "123",
        "held_out_top1": "",
    }  # fmt: skip
    assert (third["step"], third["loss"]) == ("3", "0.333333")
    assert (held["step"], held["held_out_top1"], held["loss"]) == ("3", "0.75", "")


def test_a_training_that_goes_on_takes_back_rows_of_steps_that_it_makes_again(tmp_path):
    follow(tmp_path, [log(1), log(2), log(3)])
    path = tmp_path / "net.training.csv"
    path.write_text(path.read_text() + "4,1,0.1")  # a kill in the middle of a row
    follow(tmp_path, [log(3, loss=7.0), log(4)])
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("1", "1"), ("2", "0.5"), ("3", "7"), ("4", "0.25"),
    ]  # fmt: skip
    follow(tmp_path, [])  # a finished training, opened again
    assert len(rows(tmp_path)) == 4
    follow(tmp_path, [log(1)])
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "wandb"])
def test_a_tracker_that_is_missing_names_its_extra_before_any_work(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(tracker, tracker), None)
    with pytest.raises(UsageError, match=rf"{tracker} is not installed; .*'se-prune\[{tracker}\]'"):
        follow(tmp_path, [log(1)], tracker)
    assert not (tmp_path / "net.training.csv").exists()


class Calls(list):
    def taking(self, name, result=None):
        """Return a function that notes its call."""

        def call(*args, **kwargs):
            self.append((name, args, kwargs))
            return result

        return call

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self if called == name]


VALUES = {"epoch": 1.0, "lr": 0.1, "loss": 0.5, "top1": 0.5, "images_per_second": 123.0}


def test_tensorboard(tmp_path, monkeypatch):
    calls = Calls()
    writer = SimpleNamespace(add_scalar=calls.taking("scalar"), close=calls.taking("close"))
    fake = SimpleNamespace(SummaryWriter=calls.taking("open", writer))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    follow(tmp_path, [log(2), log(3, logged=False)], "tensorboard")
    assert calls.of("open") == [((str(tmp_path / "net.training.tensorboard"),), {"purge_step": 2})]
    assert calls.of("scalar") == [((name, value, 2), {}) for name, value in VALUES.items()]
    assert len(calls.of("close")) == 1


@pytest.mark.parametrize("fail", [None, KeyboardInterrupt])
def test_mlflow(tmp_path, monkeypatch, fail):
    calls = Calls()
    run = SimpleNamespace(info=SimpleNamespace(run_id="seven"))
    fake = SimpleNamespace(
        start_run=calls.taking("start", run),
        log_params=calls.taking("params"),
        log_metrics=calls.taking("metrics"),
        end_run=calls.taking("end"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    if fail is None:
        follow(tmp_path, [log(1), log(2)], "mlflow")
    else:
        with pytest.raises(fail):
            follow(tmp_path, [log(1), log(2)], "mlflow", fail=fail)
    assert calls.of("start") == [((), {"run_id": None, "run_name": "net"})]
    assert calls.of("params")[0][0][0]["lr"] == 0.1
    assert calls.of("metrics")[1] == ((VALUES,), {"step": 2})
    assert calls.of("end") == [(("FINISHED" if fail is None else "KILLED",), {})]
    follow(tmp_path, [log(3)], "mlflow")
    assert calls.of("start")[1] == ((), {"run_id": "seven", "run_name": None})  # the same run goes on
    assert len(calls.of("params")) == 1
    follow(tmp_path, [log(1)], "mlflow")
    assert calls.of("start")[2] == ((), {"run_id": None, "run_name": "net"})  # another training


@pytest.mark.parametrize("fail", [None, KeyboardInterrupt])
def test_wandb(tmp_path, monkeypatch, fail):
    calls = Calls()
    run = SimpleNamespace(id="abc", log=calls.taking("log"), finish=calls.taking("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=calls.taking("init", run)))
    if fail is None:
        follow(tmp_path, [log(1), log(2)], "wandb", "wandb")  # named twice, told once
    else:
        with pytest.raises(fail):
            follow(tmp_path, [log(1), log(2)], "wandb", fail=fail)
    ((_, first),) = calls.of("init")
    assert {key: first[key] for key in ("project", "name", "id", "resume")} == {
        "project": "se-prune", "name": "net", "id": None, "resume": "allow",
    }  # fmt: skip
    assert calls.of("log")[1] == ((VALUES,), {"step": 2})
    assert calls.of("finish") == [((), {"exit_code": 0 if fail is None else 1})]
    follow(tmp_path, [log(3)], "wandb")
    assert calls.of("init")[1][1]["id"] == "abc"


def test_a_real_tensorboard_reads_what_was_told(tmp_path):
    pytest.importorskip("tensorboard")
    follow(tmp_path, [log(1), log(2)], "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "net.training.tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
