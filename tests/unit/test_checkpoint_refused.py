"""Hostile, broken and mistaken files: what must not be opened as a model."""

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError
from tests.checkpoints import ARCH, saved, says, seven, trained


@pytest.fixture
def net():
    return trained()


@pytest.fixture
def artifact_file(tmp_path):
    return seven(tmp_path / "run.safetensors")


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


WRITERS = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "protocol 2": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    "protocol 4": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=4)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    "wrap", [lambda e: e, lambda e: {"state_dict": {"stem.weight": e}}, lambda e: {"args": e}]
)
def test_code_in_a_pickle_does_not_run(write, wrap, tmp_path):
    marker, path = tmp_path / "it-ran", tmp_path / "evil.pth"
    evil = wrap(Evil(f"touch '{marker}'"))
    write(evil, path)
    with pytest.raises(
        CheckpointError,
        match=says(path, "is a pickle that", "nothing of it was read", "torch.save(model.state_dict()"),
    ) as caught:
        open_model(str(path), arch=ARCH)
    named = "torch.save did not write" if write is WRITERS["protocol 4"] else "calls posix.system"
    assert named in str(caught.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))  # the control: an ordinary load does run it
    assert marker.exists()


@pytest.mark.parametrize("write", [WRITERS["zip"], WRITERS["legacy"]], ids=["zip", "legacy"])
def test_a_pickled_module_is_refused_with_the_way_out(write, tmp_path):
    write(nn.Conv2d(1, 1, 1), tmp_path / "net.pth")
    with pytest.raises(
        CheckpointError, match=says("torch.nn.modules.conv.Conv2d", "torch.save(model.state_dict()")
    ):
        open_model(str(tmp_path / "net.pth"), arch=ARCH)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint(kept, zipped, tmp_path, net):
    path = saved(tmp_path / "net.pth", net.state_dict(), _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        CheckpointError, match=says(path, "damaged or cut short", "copy or download it again")
    ):
        open_model(str(path), arch=ARCH)


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.99])
def test_a_truncated_artifact_asks_for_no_architecture(kept, artifact_file):
    whole = artifact_file.read_bytes()
    artifact_file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=says(artifact_file, "not a whole safetensors file", "again")):
        open_model(str(artifact_file))


def test_a_damaged_pickle_never_ends_in_a_traceback(tmp_path, net):
    path = saved(tmp_path / "net.pth", net.state_dict(), _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for position in range(0, 300, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        try:
            open_model(str(path), arch=ARCH)
        except CheckpointError:
            continue


def script(path):
    with zipfile.ZipFile(path, "w") as archive:  # torch.jit.save needs a deprecated call; this is its layout
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")


def loop(path):
    value = {}
    value["model"] = value
    torch.save(value, path)


NOT_WEIGHTS = {
    "empty": (lambda p: p.write_bytes(b""), ["is empty", "download it again"]),
    "text": (
        lambda p: p.write_text("hello, world\n"),
        ["text file", "'hello, world'", "download the file itself"],
    ),
    "web page": (lambda p: p.write_text("<!DOCTYPE html>\n<p>ä"), ["'<!DOCTYPE html>", "web page"]),
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), ["Git LFS pointer"]),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 9), ["no torch file", "download it again"]),
    "TorchScript": (script, ["TorchScript", "torch.save(model.state_dict()"]),
    "list": (lambda p: torch.save([1, 2], p), ["holds a list", "torch.save(model.state_dict()"]),
    "tensor": (lambda p: torch.save(torch.ones(2), p), ["holds a Tensor", "torch.save(model.state_dict()"]),
    "nothing": (lambda p: torch.save({}, p), ["holds nothing", "torch.save(model.state_dict()"]),
    "optimizer": (
        lambda p: torch.save({"optimizer": {"lr": 1}, "epoch": 2}, p),
        ["holds optimizer, epoch, but no weights", "torch.save(model.state_dict()"],
    ),
    "loop": (loop, ["holds model, but no weights", "torch.save(model.state_dict()"]),
}


@pytest.mark.parametrize(("write", "parts"), NOT_WEIGHTS.values(), ids=NOT_WEIGHTS)
def test_files_that_are_no_weights(write, parts, tmp_path):
    path = tmp_path / "net.pth"
    write(path)
    with pytest.raises(CheckpointError, match=says(path, *parts)) as caught:
        open_model(str(path), arch=ARCH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.safetensors", "net"])
def test_text_is_text_under_any_name(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=says(name, "is a text file that starts with '{}'")):
        open_model(str(tmp_path / name), arch=ARCH)


def with_tensor(net, tensor):
    return {**net.state_dict(), "blocks.0.bn1.running_var": tensor}


BAD_TENSORS = {
    "nan": (lambda: torch.tensor([1.0] * 5 + [float("nan")]), ["NaN or infinite", "earlier checkpoint"]),
    "inf": (lambda: torch.tensor([1.0] * 5 + [float("-inf")]), ["NaN or infinite", "earlier checkpoint"]),
    "meta": (lambda: torch.empty(6, device="meta"), ["no plain tensor", "torch.save(model.state_dict()"]),
    "sparse": (lambda: torch.ones(6).to_sparse(), ["no plain tensor", "torch.save(model.state_dict()"]),
    "expanded": (lambda: torch.ones(1).expand(10**12), ["more values than the file holds", "again"]),
}


@pytest.mark.parametrize(("make", "parts"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_named(make, parts, tmp_path, net):
    path = saved(tmp_path / "net.pth", with_tensor(net, make()))
    with pytest.raises(CheckpointError, match=says(path, "'blocks.0.bn1.running_var'", *parts)):
        open_model(str(path), arch=ARCH)


@pytest.mark.parametrize("name", ["nett.pth", "nowhere/net.pth", "sub/zoo", "se_resnet20.safetensors"])
def test_a_missing_file_is_no_architecture(name, tmp_path, net, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "net.pth", net.state_dict())
    with pytest.raises(
        CheckpointError, match=says(f"the file {name} does not exist", "check the path")
    ) as caught:
        open_model(name)
    assert ("did you mean 'net.pth'" in str(caught.value)) == (name == "nett.pth")


def test_a_folder_is_not_opened_unless_it_is_an_architecture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "se_resnet20"):
        (tmp_path / name).mkdir()
    for ref in ("runs", "./se_resnet20", str(tmp_path)):
        with pytest.raises(
            CheckpointError, match=says(f"{ref} is a folder", "name the checkpoint file in it")
        ):
            open_model(ref)
    assert open_model("se_resnet20").header.arch.ref == "zoo:se_resnet20"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path, net):
    path = saved(tmp_path / "net.pth", net.state_dict())
    path.chmod(0)
    with pytest.raises(CheckpointError, match=says(path, "cannot be read", "check its permissions")):
        open_model(str(path), arch=ARCH)
