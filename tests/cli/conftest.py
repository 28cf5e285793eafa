"""Data and files on which the commands are run; made once for all test files."""

import contextlib
from pathlib import Path

import pytest
import timm
import torch

from se_prune.checkpoint import open_model
from tests.calls import NET, document
from tests.tiny import fashion_folder, png_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with data; the fixtures below add the files of analyze and apply, and checkpoints of others."""
    folder = tmp_path_factory.mktemp("cli")
    with contextlib.chdir(folder):
        fashion_folder(Path("data"), 300, 120)
        png_folder(Path("two"))
        Path("empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def place(folder):
    """The folder, which is the working folder of every test that asks for it."""
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture(scope="session")
def first_analysed(folder):
    with contextlib.chdir(folder):
        return document(f"analyze {NET} --data data -o stats.safetensors")


@pytest.fixture(scope="session")
def first_applied(folder, first_analysed):
    line = f"apply {NET} --data data --stats stats.safetensors --macs 0.5 -o cut.safetensors"
    with contextlib.chdir(folder):
        return document(line)


@pytest.fixture
def analysed(place, first_analysed):
    return first_analysed


@pytest.fixture
def applied(place, first_applied):
    return first_applied


@pytest.fixture(scope="session")
def first_theirs(folder):
    """Checkpoints of others: a plain one with its average beside, and one that fits two architectures."""
    state = open_model("zoo:se_resnet20", pretrained=True).module.state_dict()
    average = {key: value * 2 if key == "fc.bias" else value for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, folder / "theirs.pth")
    torch.save(timm.create_model("mobilenetv3_small_100").state_dict(), folder / "twofold.pth")


@pytest.fixture
def theirs(place, first_theirs): ...
