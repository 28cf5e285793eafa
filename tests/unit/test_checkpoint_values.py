"""Files of weights whose values no network has, and archives that point outside of themselves."""

import io
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError
from tests.checkpoints import ARCH, equal, saved, says, trained


@pytest.fixture
def net():
    return trained()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_are_no_floats_are_refused(dtype, whole, tmp_path, net):
    state = {k: v.to(dtype) if whole or v.ndim == 4 else v for k, v in net.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "net.safetensors")
    kind = str(dtype).removeprefix("torch.")
    for path in (tmp_path / "net.safetensors", saved(tmp_path / "net.pth", state)):
        with pytest.raises(CheckpointError, match=says(path, f"of type {kind}", "open the float checkpoint")):
            open_model(str(path), arch=ARCH)


def test_a_counter_of_another_type_is_no_matter(tmp_path, net):
    state = {k: v.to(torch.int32) if k.endswith("tracked") else v for k, v in net.state_dict().items()}
    assert any(value.dtype == torch.int32 for value in state.values())
    assert equal(open_model(str(saved(tmp_path / "net.pth", state)), arch=ARCH).module, net)


def test_a_negative_variance_is_refused(tmp_path, net):
    state = {**net.state_dict(), "blocks.0.bn1.running_var": -net.state_dict()["blocks.0.bn1.running_var"]}
    path = saved(tmp_path / "net.pth", state)
    with pytest.raises(CheckpointError, match=says(path, "'blocks.0.bn1.running_var' is negative", "again")):
        open_model(str(path), arch=ARCH)


@pytest.mark.parametrize(
    "name", ["../net.pth", "a/../../net.pth", "/net.pth", "..\\net.pth", "../beside.txt"]
)
def test_an_archive_with_a_path_outside_is_refused(name, tmp_path, net):
    content = io.BytesIO()
    torch.save(net.state_dict(), content)
    path = tmp_path / "folder" / "net.zip"
    path.parent.mkdir()

    def write(other):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net.pth", content.getvalue())
            archive.writestr(other, b"beside")

    write("beside..txt")
    assert equal(open_model(str(path), arch=ARCH).module, net)
    write(name)
    with pytest.raises(
        CheckpointError, match=says("net.zip holds", "a path outside", "nothing of it was read")
    ):
        open_model(str(path), arch=ARCH)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["net.zip"]
