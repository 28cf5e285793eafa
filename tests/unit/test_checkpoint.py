"""Opening models: what users have on disk."""

import argparse
import hashlib
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

from se_prune import artifact, checkpoint
from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError, UsageError
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing
from tests.checkpoints import ARCH, equal, saved, says, seven, trained
from tests.nets import DEPTHWISE, RESIDUAL, DepthwiseSE, ResidualSE


@pytest.fixture
def net():
    return trained()


@pytest.fixture
def artifact_file(tmp_path):
    return seven(tmp_path / "run.safetensors")


@pytest.mark.parametrize("ref", ["se_resnet20", "zoo:se_resnet20"])
def test_an_architecture_opens_with_random_weights(ref):
    network = open_model(ref)
    assert network.header.arch == ArchSpec(ref="zoo:se_resnet20")
    assert network.header.preprocessing.input_size == (1, 28, 28)
    (entry,) = network.header.history
    assert (entry.stage, entry.details) == ("opened", {"arch": "zoo:se_resnet20", "weights": "random"})
    assert not any(m.training for m in network.module.modules())
    assert network.module(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_an_architecture_in_other_sizes():
    network = open_model("timm:mobilenetv3_small_050", num_classes=3, in_channels=1)
    assert network.header.arch.kwargs == {"num_classes": 3, "in_channels": 1}
    assert network.header.preprocessing.input_size == (1, 224, 224)
    assert network.module(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


def test_a_users_factory_tells_its_channels_by_its_first_convolution():
    assert open_model("tests.nets:DepthwiseSE").header.preprocessing.input_size == (1, 224, 224)
    assert open_model("tests.nets:ResidualSE").header.preprocessing.input_size == (3, 224, 224)


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("se_resnet21", {}, says("'se_resnet21'", "did you mean", "se-prune archs")),
        ("zoo:se_resnet20", {"arch": "zoo:se_resnet32"}, says("--arch zoo:se_resnet32", "drop one")),
        ("zoo:se_resnet20", {"num_classes": 0}, says("num_classes must be at least 1", "0")),
        ("zoo:se_resnet20", {"in_channels": -2}, says("in_channels must be at least 1", "-2")),
    ],
)
def test_wrong_options_for_an_architecture(ref, options, message):
    with pytest.raises(UsageError, match=message):
        open_model(ref, **options)


@pytest.fixture
def weights(tmp_path, monkeypatch, artifact_file):
    folder = tmp_path / "weights"
    folder.mkdir()
    artifact_file.rename(folder / "se_resnet20.safetensors")
    monkeypatch.setattr(checkpoint, "WEIGHTS", folder)
    return folder


def test_bundled_weights(weights):
    network = open_model("se_resnet20", pretrained=True)
    assert network.header.classes == tuple("abcdefg")
    assert equal(network.module, artifact.load(weights / "se_resnet20.safetensors").module)
    assert open_model("se_resnet20", pretrained=True, num_classes=7).header.arch.kwargs == {"num_classes": 7}
    with pytest.raises(CheckpointError, match=says("7 classes, not 5", "leave num_classes out")):
        open_model("se_resnet20", pretrained=True, num_classes=5)


def test_weights_that_are_not_bundled(weights):
    with pytest.raises(
        UsageError, match=says("zoo:se_resnet32", "have them: zoo:se_resnet20", "se-prune train")
    ):
        open_model("zoo:se_resnet32", pretrained=True)


def test_timms_weights_are_asked_for(monkeypatch):
    asked = {}

    def create(name, **options):
        asked.update(options, name=name)
        return ResidualSE(num_classes=options["num_classes"], in_channels=options["in_chans"])

    monkeypatch.setattr(timm, "create_model", create)
    network = open_model("timm:seresnet50", pretrained=True, num_classes=3, in_channels=2)
    assert asked == {"name": "seresnet50", "pretrained": True, "num_classes": 3, "in_chans": 2}
    assert network.header.history[0].details["weights"] == "pretrained"


def test_torchvisions_weights_are_asked_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(models, "get_model", lambda name, **options: asked.update(options) or ResidualSE())
    open_model("torchvision:mobilenet_v3_small", pretrained=True)
    assert asked == {"weights": "DEFAULT"}


@pytest.mark.parametrize("ref", ["timm:seresnet50", "torchvision:mobilenet_v3_small"])
def test_a_failed_download_says_what_to_do(ref, monkeypatch):
    class UnreachableError(Exception):
        """As the hub's client raises it: of no class that we know."""

    def fail(*_, **__):
        raise UnreachableError("no route to host\nsecond line")

    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr(models, "get_model", fail)
    with pytest.raises(CheckpointError, match=says(ref, "no route to host", f"--arch {ref}")) as caught:
        open_model(ref, pretrained=True)
    assert "\n" not in str(caught.value)


def test_pretrained_where_there_is_no_such_thing(tmp_path, net):
    with pytest.raises(UsageError, match=says(ARCH, "give a checkpoint file with --arch")):
        open_model(ARCH, pretrained=True)
    path = saved(tmp_path / "net.pth", net.state_dict())
    with pytest.raises(UsageError, match=says(path, "leave --pretrained out")):
        open_model(str(path), arch=ARCH, pretrained=True)
    with pytest.raises(UsageError, match=says("num_classes", "7", "leave these options out")):
        open_model("torchvision:mobilenet_v3_small", pretrained=True, num_classes=7)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.pkl", "a.bin", "a.pth.tar", "a.ckpt", "weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_under_any_name(name, zipped, tmp_path, net):
    path = saved(tmp_path / name, net.state_dict(), _use_new_zipfile_serialization=zipped)
    network = open_model(str(path), arch=ARCH)
    assert equal(net, network.module)
    assert not any(m.training for m in network.module.modules())
    (entry,) = network.header.history
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (entry.stage, entry.details) == ("opened", {"file": name, "sha256": digest})
    assert (network.header.arch, network.header.classes) == (ArchSpec(ref=ARCH), ())


@pytest.mark.parametrize("name", ["a.safetensors", "pytorch_model.bin"])
def test_safetensors_under_any_name(name, tmp_path, net):
    save_file(net.state_dict(), tmp_path / name, metadata={"format": "pt"})
    assert equal(net, open_model(str(tmp_path / name), arch=ARCH).module)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "state_dict": lambda s, _: {"state_dict": s, "epoch": 3, "best": 0.9},
    "model and optimizer": lambda s, _: {"optimizer": {"state": {0: {"m": torch.ones(2)}}}, "model": s},
    "average beside": lambda s, bad: {"model_ema": bad, "state_dict_ema": bad, "model": s},
    "average alone": lambda s, _: {"model_ema": s, "epoch": 3},
    "nested": lambda s, _: {"model": {"state_dict": s}},
    "DataParallel": lambda s, _: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s, _: prefixed(s, "_orig_mod."),
    "both": lambda s, _: prefixed(s, "module._orig_mod."),
    "averaged model": lambda s, _: {**prefixed(s, "module."), "n_averaged": torch.tensor(5)},
    "options": lambda s, _: {"model": s, "args": argparse.Namespace(lr=0.1, arch="x")},
    "numbers beside": lambda s, _: {**s, "epoch": 3},
    "old": lambda s, _: {k: v for k, v in s.items() if "num_batches_tracked" not in k},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_training_scripts_wrap_around_weights(wrap, tmp_path, net):
    state = net.state_dict()
    bad = {key: torch.zeros_like(value) for key, value in state.items()}
    path = saved(tmp_path / "net.pth", wrap(dict(state), bad))
    module = open_model(str(path), arch=ARCH).module
    assert equal(net.stem, module.stem)
    assert torch.equal(net(RESIDUAL.images()), module(RESIDUAL.images()))


def test_a_submodule_called_module_keeps_its_name(tmp_path):
    state = {"module.conv.weight": torch.zeros(1)}
    assert checkpoint.renamed(state, ["module.conv.weight"]).keys() == state.keys()
    assert checkpoint.renamed(state, ["conv.weight"]).keys() == {"conv.weight"}


def test_half_precision_is_widened(tmp_path, net):
    path = saved(tmp_path / "net.pth", {k: v.half() for k, v in net.state_dict().items()})
    assert {p.dtype for p in open_model(str(path), arch=ARCH).module.parameters()} == {torch.float32}


def test_sizes_are_read_from_the_file(tmp_path):
    theirs = ResidualSE(num_classes=9, in_channels=2)
    path = str(saved(tmp_path / "net.pth", theirs.state_dict()))
    network = open_model(path, arch=ARCH)
    assert network.header.arch.kwargs == {"num_classes": 9, "in_channels": 2}
    assert network.header.preprocessing.input_size == (2, 224, 224)
    assert equal(theirs, network.module)
    assert open_model(path, arch=ARCH, num_classes=9, in_channels=2).header.arch == network.header.arch
    one_given = open_model(path, arch=ARCH, num_classes=9).header.arch
    assert one_given.kwargs == {"num_classes": 9, "in_channels": 2}
    with pytest.raises(CheckpointError, match=says(path, "9 classes, not 4", "leave num_classes out")):
        open_model(path, arch=ARCH, num_classes=4)
    with pytest.raises(CheckpointError, match=says(path, "2 input channels, not 3", "leave in_channels out")):
        open_model(path, arch=ARCH, in_channels=3)


def test_sizes_of_a_network_with_a_convolution_for_a_head(tmp_path):
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=6, in_chans=1)
    path = saved(tmp_path / "net.pth", theirs.state_dict())
    network = open_model(str(path), arch="mobilenetv3_small_050")
    assert network.header.arch == ArchSpec(
        ref="timm:mobilenetv3_small_050", kwargs={"num_classes": 6, "in_channels": 1}
    )
    assert equal(theirs, network.module)


def test_a_foreign_file_needs_an_architecture(tmp_path, net):
    path = saved(tmp_path / "net.pth", net.state_dict())
    with pytest.raises(UsageError, match=says(path, "add --arch", "se-prune archs")):
        open_model(str(path))
    with pytest.raises(UsageError, match=says("'se_resnt20'", "did you mean 'se_resnet20'")):
        open_model(str(path), arch="se_resnt20")


def test_the_wrong_architecture_lists_three_of_each(tmp_path, net):
    path = saved(tmp_path / "net.pth", net.state_dict())
    theirs, ours = set(net.state_dict()), DepthwiseSE().state_dict()
    missing = [k for k in ours if k not in theirs and "num_batches" not in k]
    unexpected = [k for k in net.state_dict() if k not in ours]
    with pytest.raises(CheckpointError) as caught:
        open_model(str(path), arch="tests.nets:DepthwiseSE")
    message = str(caught.value)
    assert f"{len(missing)} missing ({', '.join(missing[:3])} and {len(missing) - 3} more)" in message
    assert (
        f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])} and {len(unexpected) - 3} more)"
        in message
    )
    assert "stem.weight is (4, 3, 3, 3), expected (6, 3, 3, 3)" in message
    assert re.search(says(path, "does not fit tests.nets:DepthwiseSE", "check --arch"), message)


def test_one_missing_tensor_is_named_and_nothing_else(tmp_path, net):
    state = dict(net.state_dict())
    del state["blocks.1.conv2.weight"]
    path = saved(tmp_path / "net.pth", state)
    with pytest.raises(CheckpointError, match=says("1 missing (blocks.1.conv2.weight); check --arch")):
        open_model(str(path), arch=ARCH)


def test_an_artifact_needs_nothing(artifact_file):
    network = open_model(str(artifact_file))
    assert network.header == artifact.read_header(artifact_file)
    assert equal(network.module, artifact.load(artifact_file).module)
    again = open_model(str(artifact_file), arch="se_resnet20", num_classes=7, in_channels=1)
    assert again.header == network.header


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"arch": "se_resnet32"}, ["is a zoo:se_resnet20, not a zoo:se_resnet32", "leave --arch out"]),
        ({"num_classes": 10}, ["7 classes, not 10", "leave num_classes out"]),
        ({"in_channels": 3}, ["1 input channels, not 3", "leave in_channels out"]),
    ],
)
def test_options_that_disagree_with_an_artifact(options, parts, artifact_file):
    with pytest.raises(CheckpointError, match=says(artifact_file, *parts)):
        open_model(str(artifact_file), **options)


def test_an_artifact_of_a_users_factory_is_trusted_by_name_only(tmp_path):
    header = ArtifactHeader(
        arch=ArchSpec(ref="tests.nets:DepthwiseSE"), preprocessing=DEPTHWISE.preprocessing
    )
    path = tmp_path / "own.safetensors"
    artifact.save(path, artifact.Network(module=DepthwiseSE(), header=header))
    with pytest.raises(CheckpointError, match=says("add --arch tests.nets:DepthwiseSE")):
        open_model(str(path))
    assert open_model(str(path), arch="tests.nets:DepthwiseSE").header == header


def test_nan_in_an_artifact(artifact_file):
    network = artifact.load(artifact_file)
    network.module.fc.bias.data[0] = float("nan")
    artifact.save(artifact_file, network)
    with pytest.raises(CheckpointError, match=says(artifact_file, "'fc.bias'", "NaN")):
        open_model(str(artifact_file))


def test_overrides_reach_the_header(artifact_file):
    network = open_model(str(artifact_file), input_size=(32, 20), mean=(0.5,), std=(0.25,))
    assert network.header.preprocessing == Preprocessing(input_size=(1, 32, 20), mean=(0.5,), std=(0.25,))
    assert network.header.classes == tuple("abcdefg")
