"""A file that lies is refused before it does harm."""

import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from se_prune import artifact
from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError, UsageError
from se_prune.records import (
    ArchSpec,
    ArtifactHeader,
    Geometry,
)
from se_prune.schema import to_dict
from se_prune.zoo import registry
from tests.artifacts import made, write
from tests.nets import DEPTHWISE, DepthwiseSE
from tests.tiny import LargestTensor


@pytest.fixture(scope="module")
def resnet():
    """The header (as JSON values) and the tensors of an se_resnet20; copies are for the test to change."""
    torch.manual_seed(1)
    network = made("zoo:se_resnet20")
    return SimpleNamespace(header=to_dict(network.header), state=network.module.state_dict())


RESNET = ArchSpec(ref="zoo:se_resnet20")


CONV = "layer1.0.conv1"


#: Bytes of the largest tensor of an se_resnet20.
LARGEST = 4 * 64 * 64 * 9


def test_what_is_no_artifact(tmp_path, resnet):
    path = write(tmp_path / "net.safetensors", resnet.header, resnet.state)
    assert artifact.is_artifact(path)
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert not artifact.is_artifact(path)
        with pytest.raises(
            CheckpointError, match=r"net\.safetensors is not a whole safetensors file .*again"
        ):
            artifact.load(path)
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(2)}, plain)
    assert not artifact.is_artifact(plain)
    with pytest.raises(CheckpointError, match=r"a safetensors file but not an artifact; .*--arch"):
        artifact.load(plain)
    assert not artifact.is_artifact(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="missing does not exist; check the path"):
        artifact.load(tmp_path / "missing")
    assert not artifact.is_artifact(tmp_path)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        artifact.load(tmp_path)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A module that leaves one file behind when it is imported, and another when its factory is called."""
    (tmp_path / "foreign_nets.py").write_text(
        "from pathlib import Path\n"
        "from tests.nets import DepthwiseSE\n"
        f"here = Path({str(tmp_path)!r})\n"
        "(here / 'imported').touch()\n"
        "def build(**kwargs):\n"
        "    (here / 'called').touch()\n"
        "    return DepthwiseSE(**kwargs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "foreign_nets:build"
    sys.modules.pop("foreign_nets", None)


@pytest.mark.parametrize("asked", [None, "foreign_nets:other", "zoo:se_resnet20"])
def test_a_users_factory_is_neither_imported_nor_called(tmp_path, factory, asked):
    header = ArtifactHeader(arch=ArchSpec(ref=factory), preprocessing=DEPTHWISE.preprocessing)
    path = write(tmp_path / "net.safetensors", to_dict(header), DepthwiseSE().state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"wants to call foreign_nets:build, which is not one of our libraries; .*--arch",
    ):
        artifact.load(path, trust=asked)
    assert "foreign_nets" not in sys.modules
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "called").exists()
    network = artifact.load(path, trust=factory)  # the control: named by the user, it is called
    assert isinstance(network.module, DepthwiseSE)
    assert (tmp_path / "imported").exists()
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize("asked", [None, "timm:mobilenetv3_small_050"])
def test_a_header_cannot_make_a_library_load_files(tmp_path, asked):
    other = tmp_path / "other.pth"
    other.write_text("never to be read")
    network = made("timm:mobilenetv3_small_050")
    header = to_dict(network.header)
    header["arch"]["kwargs"]["checkpoint_path"] = str(other)
    path = write(tmp_path / "net.safetensors", header, network.module.state_dict())
    with pytest.raises(CheckpointError, match=r"asks for timm:mobilenetv3_small_050 with .*checkpoint_path"):
        artifact.load(path, trust=asked)
    with pytest.raises(CheckpointError, match="not to be trusted"):
        open_model(str(path), arch=asked)
    with pytest.raises(RuntimeError, match="loading this checkpoint"):  # the control: timm would read it
        timm.create_model("mobilenetv3_small_050", checkpoint_path=str(other))


@pytest.mark.parametrize(
    ("ref", "kwargs"),
    [
        ("timm:mobilenetv3_small_050", {"pretrained": True}),
        ("timm:nonsense", {}),
        ("timm:mobilenetv3_small_050.lamb_in1k", {}),
        ("torchvision:maskrcnn_resnet50_fpn", {}),  # would download a backbone
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("zoo:se_resnet19", {}),
        ("zoo:se_resnet20", {"device": "cuda"}),
        ("zoo:se_resnet20", {"self": 1}),
    ],
)
def test_what_a_header_may_not_ask_of_a_library(tmp_path, resnet, ref, kwargs, monkeypatch):
    monkeypatch.setattr(registry, "build", lambda spec: pytest.fail(f"built {spec}"))
    header = {**resnet.header, "arch": {"ref": ref, "kwargs": kwargs}}
    path = write(tmp_path / "net.safetensors", header, resnet.state)
    with pytest.raises(CheckpointError, match=f"asks for {ref} with .*, which no artifact of ours does"):
        artifact.load(path)


def test_a_library_that_is_not_installed_is_named(tmp_path, resnet):
    if registry.importlib.util.find_spec("pytorchcv") is not None:
        pytest.skip("pytorchcv is installed")
    header = {**resnet.header, "arch": {"ref": "pytorchcv:seresnet18", "kwargs": {}}}
    with pytest.raises(UsageError, match="pip install pytorchcv"):
        artifact.load(write(tmp_path / "net.safetensors", header, resnet.state))


NUMBERS = {
    "classes": ({"num_classes": 1_000_000}, "num_classes=1000000"),
    "many classes": ({"num_classes": 10**15}, f"num_classes={10**15}"),
    "no float": ({"num_classes": float("1e15")}, "num_classes=1000000000000000.0"),
    "infinite": ({"num_classes": float("inf")}, "num_classes=inf"),
    "negative": ({"num_classes": -1}, "num_classes=-1"),
    "channels": ({"in_channels": 10**9}, "in_channels=1000000000"),
    "depth": ({"depth": 60_000_002}, "depth=60000002"),
    "another depth": ({"depth": 2_000}, "depth=2000"),
    "text": ({"num_classes": "ten"}, "cannot be built"),
    "a reduction by 0": (
        {"reduction": 0},
        "cannot be built .reduction must be a whole number of at least 1, got 0",
    ),
    "no depth": ({"depth": 21}, "cannot be built"),
    "another size": ({"num_classes": 11}, r"does not fit its architecture: size mismatch for fc\.weight"),
    "no gates": ({"se": False}, "does not fit its architecture: Unexpected key"),
}


@pytest.mark.parametrize(("kwargs", "message"), NUMBERS.values(), ids=NUMBERS)
def test_arguments_that_do_not_go_with_the_tensors(tmp_path, resnet, kwargs, message):
    header = {**resnet.header, "arch": {"ref": "zoo:se_resnet20", "kwargs": kwargs}}
    path = write(tmp_path / "net.safetensors", header, resnet.state)
    with LargestTensor() as seen, pytest.raises(CheckpointError, match=message) as caught:
        artifact.load(path)
    assert seen.bytes <= LARGEST
    assert "\n" not in str(caught.value)


def test_a_width_takes_no_memory_before_it_is_known_to_fit(tmp_path):
    network = made("zoo:se_mobilenet_x025")
    state = dict(network.module.state_dict())
    state["filler"] = torch.zeros(300)  # lets the arguments be as large as 300
    header = to_dict(network.header)
    header["arch"]["kwargs"]["width"] = 64.0  # 65,536 channels: 16 GiB for one convolution
    path = write(tmp_path / "net.safetensors", header, state)
    with LargestTensor() as seen, pytest.raises(CheckpointError, match="does not fit its architecture"):
        artifact.load(path)
    assert 0 < seen.bytes <= 4 * 256 * 256
    with LargestTensor() as control:
        torch.empty(256 * 256 + 1)
    assert control.bytes == 4 * (256 * 256 + 1)


@pytest.mark.parametrize("ref", ["timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small"])
def test_a_librarys_network_takes_no_more_memory_than_its_file_tells(tmp_path, ref):
    network = made(ref)
    header = to_dict(network.header)
    header["arch"]["kwargs"]["num_classes"] = 1_000_000
    path = write(tmp_path / "net.safetensors", header, network.module.state_dict())
    largest = max(v.nbytes for v in network.module.state_dict().values())
    with (
        LargestTensor() as seen,
        pytest.raises(CheckpointError, match="num_classes=1000000, which does not go"),
    ):
        artifact.load(path)
    assert seen.bytes <= largest


SIZES = {
    "no channels": (CONV, (0, 16, 1), "impossible layer size"),
    "negative": (CONV, (16, -16, 1), "impossible layer size"),
    "no groups": (CONV, (16, 16, 0), "impossible layer size"),
    "groups that do not divide": (CONV, (16, 16, 5), "impossible layer size"),
    "groups that it does not have": (CONV, (64, 16, 4), "impossible layer size"),
    "depthwise": (CONV, (256, 16, 256), "impossible layer size"),
    "other inputs": (CONV, (15, 16, 1), "does not fit its tensor"),
    "other outputs": (CONV, (16, 15, 1), "does not fit its tensor"),
    "huge inputs": (CONV, (10**13, 16, 1), "does not fit its tensor"),
    "large inputs": (CONV, (10**7, 16, 1), "does not fit its tensor"),
    "huge outputs": (CONV, (16, 10**13, 1), "does not fit its tensor"),
    "beyond 64 bits": (CONV, (16, 10**30, 1), "does not fit its tensor"),
    "huge linear": ("fc", (10**12, 10, 1), "does not fit its tensor"),
    "huge norm": ("bn1", (10**12, 10**12, 1), "does not fit its tensor"),
    "activation": ("relu", (16, 16, 1), "resizes a ReLU, which has no channels"),
    "container": ("layer1.0", (16, 16, 1), "resizes a BasicBlock, which has no channels"),
    "root": ("", (16, 16, 1), "resizes a CifarResNet, which has no channels"),
    "unknown": ("layer9.conv", (16, 16, 1), "resizes 'layer9.conv', which its architecture does not have"),
}


@pytest.mark.parametrize(("layer", "size", "message"), SIZES.values(), ids=SIZES)
def test_sizes_that_lie(tmp_path, resnet, layer, size, message):
    sizes = {layer: {"in_channels": size[0], "out_channels": size[1], "groups": size[2]}}
    path = write(tmp_path / "net.safetensors", {**resnet.header, "geometry": sizes}, resnet.state)
    with LargestTensor() as seen, pytest.raises(CheckpointError, match=message):
        artifact.load(path)
    assert seen.bytes <= LARGEST
    true = {layer: {"in_channels": 16, "out_channels": 16, "groups": 1}} if layer == CONV else {}
    artifact.load(write(path, {**resnet.header, "geometry": true}, resnet.state))  # the control


def test_sizes_of_a_layer_that_only_has_a_scale(tmp_path):
    path = tmp_path / "net.safetensors"
    network = made("torchvision:mobilenet_v3_small")
    with pytest.raises(CheckpointError, match="resizes a LayerNorm, which has no channels"):
        artifact.resize(nn.LayerNorm(3), Geometry(in_channels=3, out_channels=3))
    artifact.save(path, network)
    assert artifact.load(path).header == network.header


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plann": None}, r"plann: Unexpected keyword argument \(did you mean 'plan'\?\)"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"arch": None}, "arch: Input should be"),
        ({"arch": {"ref": "zoo:se_resnet20", "kwargs": {"depth": [20]}}}, "arch.kwargs.depth"),
        ({"geometry": {"fc": {"in_channels": 1}}}, "geometry.fc.out_channels: Field required"),
        ({"geometry": {"fc": {"in_channels": 1.5, "out_channels": 1}}}, "geometry.fc.in_channels"),
        ({"preprocessing": {"input_size": [1, 28], "mean": [0], "std": [1]}}, "preprocessing.input_size"),
    ],
)
def test_headers_of_another_form(tmp_path, resnet, changes, message):
    path = write(tmp_path / "net.safetensors", {**resnet.header, **changes}, resnet.state)
    with pytest.raises(CheckpointError, match=rf"the header of .*{message}.*another version, or is damaged"):
        artifact.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", "[" * 100_000])
def test_headers_that_are_no_document(tmp_path, resnet, text):
    with pytest.raises(CheckpointError, match="is not valid: the document"):
        artifact.load(write(tmp_path / "net.safetensors", text, resnet.state))


def test_tensors_that_are_missing_left_over_or_of_another_shape(tmp_path, resnet):
    path = tmp_path / "net.safetensors"
    state = dict(resnet.state)
    del state["layer2.1.bn2.running_mean"]
    with pytest.raises(CheckpointError, match=r"Missing key.*layer2\.1\.bn2\.running_mean"):
        artifact.load(write(path, resnet.header, state))
    with pytest.raises(CheckpointError, match=r"Unexpected key.*'?extra\.weight"):
        artifact.load(write(path, resnet.header, {**resnet.state, "extra.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"size mismatch for fc\.bias: .*\[9\].*\[10\]"):
        artifact.load(write(path, resnet.header, {**resnet.state, "fc.bias": torch.zeros(9)}))
    with pytest.raises(CheckpointError, match="does not fit its architecture"):
        artifact.load(write(path, resnet.header, {"nothing": torch.zeros(0)}))
    artifact.load(write(path, resnet.header, resnet.state))


def test_many_missing_tensors_are_counted(tmp_path, resnet):
    error = RuntimeError("Error(s):\n\ta.\n\tb.\n\tc.\n\td.\n\te.")
    assert artifact.short_mismatch(error) == "a; b; c (and 2 more)"
    assert artifact.short_mismatch(RuntimeError("Error(s):\n\ta.\n\tb.")) == "a; b"
