"""Opening models: what users have on disk, and what they should not have."""

import argparse
import hashlib
import os
import pickle
import re
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from se_prune import artifact, checkpoint
from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError, UsageError
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing
from tests.nets import DEPTHWISE, RESIDUAL, DepthwiseSE, ResidualSE

ARCH = "tests.nets:ResidualSE"


def says(*parts):
    """Match a message that holds all parts, in this order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def equal(module, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in module.state_dict().items())


@pytest.fixture
def net():
    model = ResidualSE()
    with torch.no_grad():  # running statistics that are not the initial ones
        model(RESIDUAL.images(4))
    return model.eval()


@pytest.fixture
def artifact_file(tmp_path):
    spec = ArchSpec(ref="zoo:se_resnet20", kwargs={"num_classes": 7})
    module = checkpoint.registry.build(spec)
    preprocessing = checkpoint.registry.default_preprocessing(spec)
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, classes=tuple("abcdefg"))
    path = tmp_path / "run.safetensors"
    artifact.save(path, artifact.Network(module=module, header=header))
    return path


# Architectures.


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


# The library's own weights.


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


# Foreign checkpoints.


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


# Hostile, broken and mistaken files.


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


# Artifacts.


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
