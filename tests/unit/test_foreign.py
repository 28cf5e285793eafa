"""What foreign files hold beside and around their weights, and files that no weights are read from."""

import argparse
import datetime
import gzip
import io
import json
import logging
import pickle
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from se_prune import foreign
from se_prune.artifact import Network
from se_prune.artifact import save as save_artifact
from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError, UsageError
from se_prune.pipeline import run_recipe
from se_prune.recipe import read_run
from se_prune.records import ArchSpec, ArtifactHeader
from tests.nets import RESIDUAL, ResidualSE
from tests.unit.test_checkpoint import ARCH, equal, prefixed, saved, says


@pytest.fixture
def state():
    return dict(ResidualSE().state_dict())


def opened(path, **options):
    return open_model(str(path), arch=ARCH, **options).module


def holds(module, state):
    return all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


def bytes_of(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


# Values beside the weights.

BESIDE = {
    "NumPy scalar": np.float64(0.93),
    "NumPy array": np.ones(3),
    "options": argparse.Namespace(best=np.float32(1.5), out=Path("runs/1")),
    "path": Path("runs/1"),
    "date": datetime.datetime(2024, 1, 2, 3, 4),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", BESIDE.values(), ids=BESIDE)
def test_what_scripts_save_beside_the_weights_is_dropped(value, zipped, tmp_path, state):
    path = saved(tmp_path / "a.pth", {"best": value, "model": state}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):  # the control: torch alone refuses it
        torch.load(path, weights_only=True)
    assert holds(opened(path), state)


def test_a_dropped_value_calls_nothing_of_its_own(tmp_path, state):
    class Cheat:
        def __reduce__(self):
            return np.dtype, ("no such type",)

    path = saved(tmp_path / "a.pth", {"best": Cheat(), "model": state})
    assert holds(opened(path), state)
    with pytest.raises(TypeError):  # the control: numpy would have been asked
        pickle.loads(pickle.dumps(Cheat()))


# Names before and beside the weights.

PREFIXES = ["module.", "_orig_mod.", "backbone.", "model._orig_mod.", "model.module.net."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_all_names_begin_with_is_taken_off(prefix, tmp_path, state):
    assert holds(opened(saved(tmp_path / "a.pth", {"state_dict": prefixed(state, prefix)})), state)


def test_what_only_some_names_begin_with_stays(tmp_path, state):
    mixed = {("backbone." if key.startswith("stem") else "") + key: value for key, value in state.items()}
    with pytest.raises(
        CheckpointError, match=says("missing (stem.weight", "unexpected (backbone.stem.weight")
    ):
        opened(saved(tmp_path / "a.pth", mixed))


def test_counters_beside_the_weights_are_dropped(tmp_path, state):
    counters = {"total_ops": torch.zeros(1), "blocks.0.total_params": torch.zeros(1)}
    assert holds(opened(saved(tmp_path / "a.pth", {**state, **counters})), state)
    with pytest.raises(CheckpointError, match=says("1 unexpected (blocks.0.total)")):
        opened(saved(tmp_path / "a.pth", {**state, "blocks.0.total": torch.zeros(1)}))


# Averaged weights.


def averages(state):
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize("key", foreign.AVERAGES)
def test_the_average_is_taken_when_asked(key, tmp_path, state, caplog):
    path = saved(tmp_path / "a.pth", {"model": state, key: prefixed(averages(state), "module."), "epoch": 3})
    network = open_model(str(path), arch=ARCH, ema=True)
    assert holds(network.module, averages(state))
    assert network.header.history[0].details["weights"] == "average"
    assert caplog.messages == []
    network = open_model(str(path), arch=ARCH)
    assert holds(network.module, state)
    assert "weights" not in network.header.history[0].details
    (message,) = caplog.messages
    assert "holds averaged weights as well; --ema" in message


def test_a_file_of_an_average_alone(tmp_path, state, caplog):
    swa = {**prefixed(state, "module."), "n_averaged": torch.tensor(5)}
    for value in (swa, {"model_ema": state}):
        path = saved(tmp_path / "a.pth", value)
        assert holds(opened(path, ema=True), state)
        assert caplog.messages == []
        assert holds(opened(path), state)
        assert "holds averaged weights alone" in caplog.messages[0]
        caplog.clear()


def test_ema_where_there_is_no_average(tmp_path, state):
    path = saved(tmp_path / "a.pth", {"state_dict": state})
    with pytest.raises(CheckpointError, match=says(path, "no averaged weights", "leave --ema out")):
        opened(path, ema=True)
    with pytest.raises(UsageError, match=says("--ema goes with a checkpoint", "zoo:se_resnet20")):
        open_model("zoo:se_resnet20", ema=True)
    header = ArtifactHeader(arch=ArchSpec(ref=ARCH), preprocessing=RESIDUAL.preprocessing)
    save_artifact(tmp_path / "a.safetensors", Network(module=ResidualSE(), header=header))
    with pytest.raises(UsageError, match=says("--ema goes with a checkpoint", "a.safetensors")):
        opened(tmp_path / "a.safetensors", ema=True)


def test_ema_of_a_recipe_reaches_the_file(tmp_path):
    text = '[model]\nref = "a.pth"\n{}\n[apply]\nmacs = 0.5\n'
    for line, asked in (("ema = true", True), ("", False)):
        (tmp_path / "run.toml").write_text('data = "fashion-mnist"\n' + text.format(line))
        with (
            mock.patch("se_prune.pipeline.run.open_model", side_effect=ZeroDivisionError) as opening,
            pytest.raises(ZeroDivisionError),
        ):
            run_recipe(read_run(tmp_path / "run.toml"), tmp_path / "out", command="", device="cpu")
        assert opening.call_args.kwargs["ema"] is asked


# Architecture names that a file states.

STATED = {
    "beside": {"arch": "seresnet50", "state_dict": {}},
    "options": {"args": argparse.Namespace(model="timm/seresnet50.ra_in1k"), "state_dict": {}},
    "table": {"hyper_parameters": {"model_name": "seresnet50"}, "state_dict": {}},
}


@pytest.mark.parametrize("value", STATED.values(), ids=STATED)
def test_names_that_a_file_states(value, tmp_path, state):
    path = saved(tmp_path / "a.pth", {**value, "state_dict": state})
    assert foreign.read_weights(path, foreign.read_start(path)).stated == {"seresnet50"}


@pytest.mark.parametrize(
    ("text", "names"),
    [(json.dumps({"architecture": "seresnet50"}), {"seresnet50"}), ("[" * 10**5, set()), ("[]", set())],
)
def test_names_that_the_file_beside_states(text, names, tmp_path, state):
    (tmp_path / "config.json").write_text(text)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    assert foreign.read_weights(path, foreign.read_start(path)).stated == names


# Archives.


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["a.pth.zip", "a.pth"])
@pytest.mark.parametrize("inner", ["net.pth", "net.safetensors", "old.pth"])
def test_a_checkpoint_in_an_archive(name, inner, tmp_path, state):
    write = {"net.pth": bytes_of, "net.safetensors": save}.get(
        inner, lambda value: bytes_of(value, _use_new_zipfile_serialization=False)
    )
    beside = {"readme.txt": b"hello", "__MACOSX/._net.pth": b"x", "folder/": b""}
    path = zipped(tmp_path / name, {f"folder/{inner}": write(state), **beside})
    network = open_model(str(path), arch=ARCH)
    assert holds(network.module, state)
    assert network.header.history[0].details["file"] == name


def test_a_name_that_ends_in_zip_is_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=says("seresnet50.pth.zip does not exist")):
        open_model("seresnet50.pth.zip")


# Files that no weights are read from.


def bomb(path):
    zipped(path, {"net.pth": bytes(120 * 2**20)})


def swollen(path):
    """As torch writes it, but with its storage deflated to a thousandth."""
    with zipfile.ZipFile(io.BytesIO(bytes_of({"w": torch.zeros(30 * 2**20)}))) as archive:
        zipped(path, {name: archive.read(name) for name in archive.namelist()})


def broken_member(path):
    zipped(path, {"net.pth": bytes(1000)})
    whole = bytearray(path.read_bytes())
    whole[42:46] = b"\xff" * 4
    path.write_bytes(whole)


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(Path(__file__), "net.pth")


def nested(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype, once
        tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"w": tensor}, path)


def header_of(length, text=b"{}"):
    return lambda path: path.write_bytes(struct.pack("<Q", length) + text)


INTEGERS = {"ids": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool)}
REFUSED = {
    "zip of two": (
        lambda p: zipped(p, {"a.pth": b"1", "b.pth": b"2"}),
        ["zip archive of a.pth, b.pth", "unpack it"],
    ),
    "zip of none": (lambda p: zipped(p, {"readme.md": b"1"}), ["zip archive of readme.md", "unpack it"]),
    "empty zip": (lambda p: zipped(p, {}), ["zip archive of nothing"]),
    "zip of an empty file": (lambda p: zipped(p, {"a.pth": b""}), ["holds an empty a.pth", "again"]),
    "zip of a page": (lambda p: zipped(p, {"a.pth": b"<html>"}), ["/a.pth is a text file", "<html>"]),
    "zip in a zip": (
        lambda p: zipped(p, {"a.pt": zipped(p, {"b.pt": b"\0"}).read_bytes()}),
        ["/a.pt is a zip archive of b.pt", "unpack it"],
    ),
    "zip bomb": (bomb, ["claims to unpack to 126 MB", "nothing of it was read", "source you trust"]),
    "torch bomb": (swollen, ["claims to unpack to 126 MB", "nothing of it was read"]),
    "broken member": (broken_member, ["damaged or cut short", "again"]),
    "control characters": (lambda p: zipped(p, {"\x1b[2J\n.md": b"1"}), ["zip archive of ?[2J?.md"]),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 99)), ["packed with gzip; unpack it"]),
    "tar": (tar, ["packed with tar; unpack it"]),
    "safetensors, huge header": (header_of(2**62), ["not a whole safetensors file", "again"]),
    "safetensors, cut header": (header_of(100), ["not a whole safetensors file", "again"]),
    "safetensors, header of nonsense": (header_of(4, b"{]]}"), ["not a whole safetensors file", "again"]),
    "integers": (lambda p: torch.save(INTEGERS, p), ["'ids' is of type int64", "open the float checkpoint"]),
    "nested dictionaries": (lambda p: torch.save({"a": {"b": {"c": 1}}}, p), ["holds a, but no weights"]),
    "zeros": (
        lambda p: torch.save({"a": torch.zeros(2, 2), "b": torch.ones(2)}, p),
        ["no weight other than zero", "open another"],
    ),
    "no values": (lambda p: torch.save({"a": torch.zeros(0, 3)}, p), ["no weight other than zero"]),
    "nested tensor": (nested, ["'w' is no plain tensor", "torch.save(model.state_dict()"]),
    "a program": (
        lambda p: zipped(p, {"net/constants.pkl": b"", "net/data.pkl": b""}),
        ["TorchScript program", "runs code", "torch.save(model.state_dict()"],
    ),
}


@pytest.mark.parametrize("arch", [ARCH, None])
@pytest.mark.parametrize(("write", "parts"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(write, parts, arch, tmp_path):
    path = tmp_path / "net.pth"
    write(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=says(path, *parts)) as caught:
        open_model(str(path), arch=arch)
    message = str(caught.value)
    assert message.isprintable()  # one line, and nothing that moves a cursor
    assert message.endswith(".")
    assert len(message) < 400
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net.pth"]


def test_a_file_whose_reading_is_refused(tmp_path, state, monkeypatch):
    path = saved(tmp_path / "net.pth", state)
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(CheckpointError, match=says(path, "cannot be read (denied)", "check its permissions")):
        opened(path)


def test_floats_of_eight_bits_are_looked_into(tmp_path, state):
    small = {key: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for key, value in state.items()}
    path = saved(tmp_path / "net.pth", small)
    assert holds(opened(path), {key: value.float() for key, value in small.items() if value.ndim > 1})
    small["stem.weight"] = torch.full_like(state["stem.weight"], float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=says("'stem.weight' holds NaN")):
        opened(saved(tmp_path / "net.pth", small))


def test_a_whole_file_of_the_same_form_opens(tmp_path, state):
    """The control of all refusals: what they refuse is not the form."""
    zero_class = {**state, "fc.weight": torch.zeros_like(state["fc.weight"])}
    path = zipped(
        tmp_path / "net.pth", {"a.pth": bytes_of({"state_dict": zero_class, "ids": torch.arange(3)})}
    )
    assert holds(opened(path), zero_class)
    assert equal(opened(path), opened(path))
    assert logging.getLogger("se_prune").level == logging.NOTSET
