"""Telling the architecture by the tensors: every form of checkpoint that users have opens without `--arch`."""

import argparse
import io
import json
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet

from se_prune import artifact
from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError, UsageError
from se_prune.records import ArchSpec
from se_prune.zoo import registry
from tests.unit.test_checkpoint import saved, says


def lively(module):
    """Give every BN and every gate something to say, and return the module in eval mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if key.endswith("running_var") or (key.endswith("weight") and tensor.ndim == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.2, generator=generator)
            elif re.search(r"\.(se|se_module|block\.\d)\.(fc|fc1|fc2|conv_\w+|conv\d|reduce|expand)\b", key):
                tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)
    return module.eval()


def build(ref, **kwargs):
    return lively(registry.build(ArchSpec(ref=ref, kwargs=kwargs)))


def same_outputs(one, other, channels=3, size=64):
    images = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = one(images)
        assert expected.std() > 0
        return torch.equal(expected, other(images))


@pytest.fixture
def few(monkeypatch):
    """Let only the given architectures be candidates, for tests that are about something else than their number."""

    def keep(*refs):
        known = {}
        for ref in refs:
            library, _, name = ref.partition(":")
            known.setdefault(library, []).append(name)
        monkeypatch.setattr(registry, "names", lambda library: known.get(library, []))

    return keep


# The forms that users have, each among all candidates.

FORMS = [
    ("timm:legacy_seresnet18", {}, "se_resnet18-cadene.pth", "layer1.0.se_module.fc1.weight"),
    ("timm:seresnet18", {"num_classes": 5}, "net.pth", "layer1.0.se.fc1.weight"),
    ("timm:mobilenetv3_small_050", {"in_channels": 1}, "net.safetensors", "blocks.0.0.se.conv_reduce.weight"),
    ("timm:regnety_002", {}, "net.safetensors", "s1.b1.se.fc1.weight"),
    ("torchvision:mobilenet_v3_small", {}, "net.pth", "features.1.block.1.fc1.weight"),
    ("torchvision:regnet_y_400mf", {}, "net.pth", "trunk_output.block1.block1-0.f.se.fc1.weight"),
    ("zoo:se_resnet20", {"in_channels": 3}, "net.pth", "layer1.0.se.reduce.weight"),
]


@pytest.mark.parametrize(("ref", "kwargs", "name", "key"), FORMS, ids=[form[0] for form in FORMS])
def test_every_form_opens_without_its_architecture(ref, kwargs, name, key, tmp_path, caplog):
    theirs = build(ref, **kwargs)
    state = theirs.state_dict()
    assert key in state
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    elif "cadene" in name:  # files of torch 0.4 and before have no batch counters
        assert "last_linear.weight" in state
        saved(tmp_path / name, {k: v for k, v in state.items() if "num_batches_tracked" not in k})
    else:
        saved(tmp_path / name, {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 9})
    network = open_model(str(tmp_path / name))
    assert network.header.arch == ArchSpec(ref=ref, kwargs=kwargs)
    assert same_outputs(theirs, network.module, kwargs.get("in_channels", 3))
    (message,) = caplog.messages
    classes = kwargs.get("num_classes", 10 if ref.startswith("zoo:") else 1000)
    assert f"{name} has the tensors of {ref} with {classes} classes; --arch overrules" in message
    details = network.header.history[0].details
    assert (details["file"], details["arch"]) == (name, f"{ref}, recognised by the tensors")


# moskomule/senet.pytorch: the reference is torchvision's ResNet with its blocks extended here.


class Gate(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        first = nn.Linear(channels, channels // reduction, bias=False)
        last = nn.Linear(channels // reduction, channels, bias=False)
        self.fc = nn.Sequential(first, nn.ReLU(), last, nn.Sigmoid())

    def forward(self, u):
        return u * self.fc(u.mean((2, 3)))[:, :, None, None]


class Basic(resnet.BasicBlock):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.se = Gate(self.conv2.out_channels)

    def forward(self, x):
        u = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.se(u) + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(resnet.Bottleneck):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.se = Gate(self.conv3.out_channels)

    def forward(self, x):
        u = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(
            self.se(self.bn3(self.conv3(u))) + (x if self.downsample is None else self.downsample(x))
        )


def cifar_logits(state, x, blocks):
    """Compute the CIFAR network from its tensors alone: blocks of two convolutions, a gate, a projected shortcut."""

    def normed(name, x):
        part = [state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *part)

    x = F.relu(normed("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for layer in (1, 2, 3):
        for index in range(blocks):
            name, stride = f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            u = F.relu(normed(f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"], None, stride, 1)))
            u = normed(f"{name}.bn2", F.conv2d(u, state[f"{name}.conv2.weight"], padding=1))
            hidden = F.relu(u.mean((2, 3)) @ state[f"{name}.se.fc.0.weight"].T)
            u = u * torch.sigmoid(hidden @ state[f"{name}.se.fc.2.weight"].T)[:, :, None, None]
            if f"{name}.downsample.0.weight" in state:
                x = normed(
                    f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], None, stride)
                )
            x = F.relu(u + x)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("depth", "block", "layers"), [(18, Basic, [2, 2, 2, 2]), (50, Bottleneck, [3, 4, 6, 3])]
)
def test_moskomules_networks_open_and_give_his_outputs(depth, block, layers, tmp_path):
    theirs = lively(resnet.ResNet(block, layers, num_classes=12))
    assert theirs.state_dict()["layer1.0.se.fc.0.weight"].ndim == 2
    path = saved(tmp_path / "seresnet-60a8950a85b2b.pkl", theirs.state_dict())
    network = open_model(str(path))
    assert network.header.arch == ArchSpec(ref=f"zoo:moskomule_se_resnet{depth}", kwargs={"num_classes": 12})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = network.module(images)
        torch.testing.assert_close(logits, theirs(images), rtol=1e-5, atol=1e-5)
        artifact.save(tmp_path / "a.safetensors", network)
        assert torch.equal(logits, open_model(str(tmp_path / "a.safetensors")).module(images))


@pytest.mark.parametrize("reduction", [16, 4])
@pytest.mark.parametrize("arch", [None, "zoo:moskomule_se_resnet20"])
def test_moskomules_cifar_networks_open_at_any_reduction(reduction, arch, tmp_path, few):
    few("zoo:moskomule_se_resnet20", "zoo:moskomule_se_resnet32", "zoo:se_resnet20")
    state = build("zoo:moskomule_se_resnet20", reduction=reduction).state_dict()
    network = open_model(str(saved(tmp_path / "a.pkl", state)), arch=arch)
    expected = {} if reduction == 16 else {"reduction": 4}
    assert network.header.arch == ArchSpec(ref="zoo:moskomule_se_resnet20", kwargs=expected)
    assert network.header.preprocessing.input_size == (3, 32, 32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = network.module(images)
        torch.testing.assert_close(logits, cifar_logits(state, images, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 4), (0, 16), (16,)])
def test_gates_of_impossible_sizes_are_refused(shape, tmp_path):
    state = build("zoo:moskomule_se_resnet20").state_dict()
    state["layer1.0.se.fc.0.weight"] = torch.ones(shape)
    with pytest.raises(CheckpointError, match=says("layer1.0.se.fc.0.weight is", "expected (1, 16)")):
        open_model(str(saved(tmp_path / "a.pkl", state)), arch="zoo:moskomule_se_resnet20")


# pytorchcv, which need not be installed.


def in_zip(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net-0100-1a2b3c4d.pth", buffer.getvalue())
    return path


@pytest.mark.parametrize("name", ["mobilenetv3_small_w7d20", "seresnetbc26b", "regnety002"])
def test_pytorchcvs_networks_open_from_their_archives(name, tmp_path):
    pytest.importorskip("pytorchcv")
    theirs = build(f"pytorchcv:{name}", num_classes=6)
    path = in_zip(tmp_path / f"{name}.pth.zip", theirs.state_dict())
    network = open_model(str(path))
    assert network.header.arch == ArchSpec(ref=f"pytorchcv:{name}", kwargs={"num_classes": 6})
    assert same_outputs(theirs, network.module, size=224)


def test_a_stride_that_no_tensor_tells_must_be_named(tmp_path):
    pytest.importorskip("pytorchcv")
    theirs = build("pytorchcv:seresnet50b")
    assert "features.stage1.unit1.se.conv1.weight" in theirs.state_dict()
    path = str(in_zip(tmp_path / "a.zip", theirs.state_dict()))
    with pytest.raises(
        UsageError, match=says("2 architectures (pytorchcv:seresnet50, pytorchcv:seresnet50b)")
    ):
        open_model(path)
    assert same_outputs(theirs, open_model(path, arch="pytorchcv:seresnet50b").module, size=224)


class Cv(nn.Module):
    """Named as pytorchcv names its networks: a unit with its gate, and the output."""

    def __init__(self, num_classes=1000, in_channels=3, width=8, **_):
        super().__init__()
        unit = nn.Module()
        unit.body = nn.Conv2d(in_channels, width, 3, bias=False)
        unit.se = nn.ModuleDict({"conv1": nn.Conv2d(width, 2, 1), "conv2": nn.Conv2d(2, width, 1)})
        stage = nn.ModuleDict({"unit1": unit})
        self.features = nn.ModuleDict({"stage1": stage})
        self.output = nn.Linear(width, num_classes)


def test_names_as_in_pytorchcv_are_looked_up_there_alone(tmp_path, monkeypatch):
    models = {"net_w8": Cv, "net_w9": lambda **kwargs: Cv(width=9, **kwargs)}
    monkeypatch.setattr(registry, "_pytorchcv_models", lambda: models)
    monkeypatch.setattr(registry, "names", lambda library: {"pytorchcv": sorted(models)}[library])
    state = Cv(num_classes=4, width=9).state_dict()
    assert "features.stage1.unit1.se.conv1.weight" in state
    network = open_model(str(in_zip(tmp_path / "a.zip", state)))
    assert network.header.arch == ArchSpec(ref="pytorchcv:net_w9", kwargs={"num_classes": 4})


def test_pytorchcv_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    def missing():
        raise UsageError("pytorchcv is not installed: pip install pytorchcv")

    monkeypatch.setattr(registry, "_pytorchcv_models", missing)
    path = in_zip(tmp_path / "a.zip", Cv().state_dict())
    with pytest.raises(UsageError, match=says(path, "as in pytorchcv", "pip install pytorchcv")):
        open_model(str(path))


# Several architectures, or none.

ALIKE = ("timm:mobilenetv3_small_100", "timm:tf_mobilenetv3_small_100")


@pytest.fixture
def alike(few):
    few(*ALIKE, "timm:mobilenetv3_small_075")
    return build(ALIKE[1]).state_dict()


def test_several_that_fit_are_listed(tmp_path, alike, caplog):
    path = str(saved(tmp_path / "a.pth", alike))
    parts = ["2 architectures (", ", ".join(ALIKE), "choose one", f"--arch {ALIKE[0]}"]
    with pytest.raises(UsageError, match=says(path, *parts)):
        open_model(path)
    assert open_model(path, arch=ALIKE[1]).header.arch.ref == ALIKE[1]
    assert caplog.messages == []


@pytest.mark.parametrize("ref", ALIKE)
def test_the_one_that_the_file_names_is_taken(ref, tmp_path, alike):
    name = ref.partition(":")[2]
    options = argparse.Namespace(model=f"{name}.lamb_in1k", lr=0.1)
    path = saved(tmp_path / "a.pth", {"state_dict": alike, "arch": "mobilenetv3", "args": options})
    assert open_model(str(path)).header.arch.ref == ref
    save_file(alike, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 1000}))
    assert open_model(str(tmp_path / "model.safetensors")).header.arch.ref == ref


def test_a_name_in_the_file_does_not_outweigh_its_tensors(tmp_path, alike):
    path = saved(tmp_path / "a.pth", {"state_dict": alike, "arch": "mobilenetv3_small_075"})
    with pytest.raises(UsageError, match="2 architectures"):
        open_model(str(path))


def test_the_class_count_decides_between_equals(tmp_path, monkeypatch):
    models = {f"net_{n}": lambda n=n, **kw: Cv(**{"num_classes": n, **kw}) for n in (10, 100)}
    monkeypatch.setattr(registry, "_pytorchcv_models", lambda: models)
    monkeypatch.setattr(registry, "names", lambda _: sorted(models))
    for classes, ref in ((100, "pytorchcv:net_100"), (10, "pytorchcv:net_10")):
        path = saved(tmp_path / "a.pth", Cv(num_classes=classes).state_dict())
        assert open_model(str(path)).header.arch == ArchSpec(ref=ref)
    path = saved(tmp_path / "a.pth", Cv(num_classes=7).state_dict())
    with pytest.raises(UsageError, match=says("net_10, pytorchcv:net_100")):
        open_model(str(path))


@pytest.mark.parametrize(("classes", "name"), [(10, "a_cifar10"), (100, "a_cifar100"), (7, "a_cifar10")])
def test_one_network_under_the_names_of_several_data_sets(classes, name, tmp_path, monkeypatch):
    counts = {"a_cifar10": 10, "a_cifar100": 100, "a_svhn": 10}
    models = {key: lambda n=n, **kw: Cv(**{"num_classes": n, **kw}) for key, n in counts.items()}
    monkeypatch.setattr(registry, "_pytorchcv_models", lambda: models)
    monkeypatch.setattr(registry, "names", lambda _: sorted(models))
    path = saved(tmp_path / "a.pth", Cv(num_classes=classes).state_dict())
    assert open_model(str(path)).header.arch.ref == f"pytorchcv:{name}"


@pytest.mark.parametrize("lost", ["bn1.weight", "layer4.1.conv2.weight", "fc.bias"])
def test_a_lost_tensor_is_named_with_the_closest_architecture(lost, tmp_path, few):
    few("timm:seresnet18", "timm:seresnet34", "timm:resnet18")
    state = build("timm:seresnet18", num_classes=7).state_dict()
    del state[lost]
    state["extra.weight"] = torch.ones(2, 2)
    with pytest.raises(UsageError) as caught:
        open_model(str(saved(tmp_path / "a.pth", state)))
    text = f"the closest is timm:seresnet18: 1 missing ({lost}); 1 unexpected (extra.weight); add --arch"
    assert text in str(caught.value)


def test_a_tensor_of_another_shape_is_named_with_the_closest_architecture(tmp_path, few):
    few("timm:seresnet18", "timm:seresnet34")
    state = build("timm:seresnet18").state_dict()
    state["layer2.0.conv1.weight"] = torch.ones(128, 64, 1, 1)
    path = saved(tmp_path / "a.pth", state)
    text = "layer2.0.conv1.weight is (128, 64, 1, 1), expected (128, 64, 3, 3)"
    with pytest.raises(UsageError, match=says("closest is timm:seresnet18: 1 of another shape", text)):
        open_model(str(path))
    with pytest.raises(CheckpointError, match=says("does not fit timm:seresnet18", text)):
        open_model(str(path), arch="timm:seresnet18")


def test_tensors_of_nothing_known_are_told_shortly(tmp_path):
    state = {f"decoder.{i}.weight": torch.ones(3, 3) for i in range(9)} | {"head.bias": torch.ones(3)}
    with pytest.raises(UsageError) as caught:
        open_model(str(saved(tmp_path / "a.pth", state)))
    message = str(caught.value)
    assert "its 10 tensors (decoder.0.weight, decoder.1.weight, decoder.2.weight and 7 more)" in message
    assert "add --arch" in message
    assert "se-prune archs" in message


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fine_tuned_network_whose_library_makes_a_gate_to_try_it(channels, tmp_path, few):
    few("timm:efficientnet_b0", "timm:efficientnet_b1", "timm:seresnet18")
    kwargs = {"num_classes": 7} | ({} if channels == 3 else {"in_channels": channels})
    path = saved(tmp_path / "a.pth", build("timm:efficientnet_b0", **kwargs).state_dict())
    assert open_model(str(path)).header.arch == ArchSpec(ref="timm:efficientnet_b0", kwargs=kwargs)


def test_sizes_that_disagree_with_a_recognised_file(tmp_path, few):
    few("zoo:se_resnet20")
    path = str(saved(tmp_path / "a.pth", build("zoo:se_resnet20", num_classes=4).state_dict()))
    assert open_model(path, num_classes=4).header.arch.kwargs == {"num_classes": 4}
    with pytest.raises(CheckpointError, match=says("4 classes, not 10", "leave num_classes out")):
        open_model(path, num_classes=10)
