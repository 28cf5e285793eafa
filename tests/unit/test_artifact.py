"""Artifacts: what was saved comes back bit for bit, and a file that lies is refused before it does harm."""

import copy
import dataclasses
import errno
import json
import os
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from se_prune import artifact, pipeline
from se_prune.artifact import HEADER_KEY, Network, changed_geometry, geometry, read_header
from se_prune.channels import couplings
from se_prune.checkpoint import open_model
from se_prune.cost import count_cost
from se_prune.errors import CheckpointError, SePruneError, UsageError
from se_prune.files import whole_file
from se_prune.gates.sites import find_sites
from se_prune.layers import layer_costs
from se_prune.planning import make_plan
from se_prune.records import (
    ArchSpec,
    ArtifactHeader,
    Budget,
    Geometry,
    HistoryEntry,
    Preprocessing,
    Scores,
)
from se_prune.schema import to_dict
from se_prune.surgery.cut import cut
from se_prune.zoo import registry
from tests.nets import DEPTHWISE, DepthwiseSE
from tests.tiny import LargestTensor

GREY32 = Preprocessing(input_size=(1, 32, 32), mean=(0.5,), std=(0.25,))
LINEAR = "tests.nets:DepthwiseSE"
#: Zoo networks, one of a library (stem, depthwise, convolutional head, hard sigmoid), and SE blocks of linear layers.
NETWORKS = {
    "zoo:se_resnet20": ({}, registry.FASHION),
    "zoo:se_mobilenet_x025": ({"num_classes": 4, "in_channels": 2}, None),
    "timm:mobilenetv3_small_050": ({"num_classes": 7, "in_channels": 1}, GREY32),
    "torchvision:mobilenet_v3_small": ({"num_classes": 3}, None),
    LINEAR: ({}, DEPTHWISE.preprocessing),
}
RESNET = ArchSpec(ref="zoo:se_resnet20")
CONV = "layer1.0.conv1"
#: Bytes of the largest tensor of an se_resnet20.
LARGEST = 4 * 64 * 64 * 9


def made(ref, **changes):
    """Return a network with random weights and running statistics that are not the initial ones."""
    kwargs, preprocessing = NETWORKS[ref]
    spec = ArchSpec(ref=ref, kwargs=kwargs)
    module = registry.build(spec)
    preprocessing = preprocessing or registry.default_preprocessing(spec, module)
    if preprocessing.input_size[1] == 224:
        preprocessing = dataclasses.replace(preprocessing, input_size=(preprocessing.input_size[0], 48, 48))
    with torch.no_grad():
        module.train()(torch.randn(8, *preprocessing.input_size))
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, **changes)
    return Network(module=module.eval(), header=header)


def randomly_cut(network, share=0.4):
    """Cut a share of the channels, chosen by random scores."""
    module, preprocessing = network.module, network.header.preprocessing
    example = torch.randn(1, *preprocessing.input_size)
    sites = find_sites(module, example)
    found = couplings(module, example, sites)
    scores = Scores(
        criterion="random",
        comparable=False,
        groups={c.group.name: tuple(torch.rand(c.group.channels).tolist()) for c in found},
    )
    costs = layer_costs(module, count_cost(module, preprocessing, sites).per_layer)
    plan = make_plan(found, costs, scores, Budget(kind="sparsity", value=share))
    smaller = cut(module, example, plan).eval()
    sizes = changed_geometry(registry.build(network.header.arch), smaller)
    return Network(module=smaller, header=dataclasses.replace(network.header, plan=plan, geometry=sizes))


@torch.no_grad()
def outputs(network):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(5, *network.header.preprocessing.input_size, generator=generator)
    return network.module(images)


def trust(ref):
    return ref if ref == LINEAR else None


def write(path, header, tensors):
    """Write an artifact by hand, with whatever header."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata={HEADER_KEY: text})
    return path


@pytest.fixture(scope="module")
def resnet():
    """The header (as JSON values) and the tensors of an se_resnet20; copies are for the test to change."""
    torch.manual_seed(1)
    network = made("zoo:se_resnet20")
    return SimpleNamespace(header=to_dict(network.header), state=network.module.state_dict())


# What is saved comes back.


@pytest.mark.parametrize("ref", NETWORKS)
def test_a_dense_network_comes_back_bit_for_bit(ref, tmp_path):
    network = made(ref, classes=("a", "b"), history=(HistoryEntry(stage="x", details={"lr": 0.1}),))
    artifact.save(tmp_path / "net.safetensors", network)
    again = artifact.load(tmp_path / "net.safetensors", trust=trust(ref))
    assert again.header == network.header == read_header(tmp_path / "net.safetensors")
    assert again.header.geometry == {}
    assert torch.equal(outputs(again), outputs(network))
    assert not again.module.training
    assert again.module.state_dict().keys() == network.module.state_dict().keys()
    ours = dict(network.module.named_parameters())
    for name, parameter in again.module.named_parameters():
        assert parameter.requires_grad
        assert parameter.device == torch.device("cpu")
        assert parameter.dtype == ours[name].dtype


@pytest.mark.parametrize("ref", NETWORKS)
def test_a_cut_network_comes_back_bit_for_bit(ref, tmp_path):
    dense = made(ref)
    network = randomly_cut(dense)
    sizes = network.header.geometry
    layers = dict(dense.module.named_modules())
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        assert any(isinstance(layers[name], kind) for name in sizes)
    assert network.header.plan.channels_removed > 0
    assert not torch.equal(outputs(network), outputs(dense))
    artifact.save(tmp_path / "net.safetensors", network)
    again = artifact.load(tmp_path / "net.safetensors", trust=trust(ref))
    assert again.header == network.header
    assert torch.equal(outputs(again), outputs(network))
    for name, module in again.module.named_modules():
        assert geometry(module) == geometry(dict(network.module.named_modules())[name])
    artifact.save(tmp_path / "twice.safetensors", again)
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_a_loaded_network_can_be_trained_and_cut_again(tmp_path):
    artifact.save(tmp_path / "net.safetensors", randomly_cut(made("zoo:se_resnet20"), 0.2))
    again = artifact.load(tmp_path / "net.safetensors")
    again.module.train()(torch.randn(4, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None for p in again.module.parameters())
    again.module.eval().zero_grad()
    smaller = randomly_cut(again, 0.3)
    artifact.save(tmp_path / "net.safetensors", smaller)
    assert torch.equal(outputs(artifact.load(tmp_path / "net.safetensors")), outputs(smaller))
    count = [count_cost(n.module, n.header.preprocessing).params for n in (again, smaller)]
    assert count[1] < count[0]


def test_weights_of_another_precision_are_loaded_in_the_architectures_own(tmp_path, resnet):
    half = {k: v.half() if v.is_floating_point() else v for k, v in resnet.state.items()}
    network = artifact.load(write(tmp_path / "net.safetensors", resnet.header, half))
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}
    assert torch.equal(network.module.fc.weight, resnet.state["fc.weight"].half().float())


def test_a_loaded_network_does_not_hang_on_its_file(tmp_path, resnet):
    path = write(tmp_path / "net.safetensors", resnet.header, resnet.state)
    network = artifact.load(path)
    before = outputs(network).clone()
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(outputs(network), before)


def test_loading_takes_no_random_numbers(tmp_path, resnet):
    path = write(tmp_path / "net.safetensors", resnet.header, resnet.state)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    artifact.load(path)
    assert torch.equal(torch.rand(2), expected)


def test_layers_without_parameters_of_their_own_are_resized(tmp_path):
    class Plain(nn.Sequential):
        def __init__(self, width=4):
            super().__init__(
                nn.Conv2d(1, width, 1), nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, 2, 1)
            )

    registry_spec = ArchSpec(ref="tests.unit.test_artifact:Plain")
    cut_module = Plain(3)
    header = ArtifactHeader(
        arch=registry_spec,
        preprocessing=DEPTHWISE.preprocessing,
        geometry=changed_geometry(Plain(), cut_module),
    )
    assert header.geometry.keys() == {"0", "1", "2"}
    module = Plain()
    artifact.apply_geometry(module, header.geometry, cut_module.state_dict(), what="it")
    assert torch.equal(module(torch.ones(2, 1, 3, 3)), cut_module(torch.ones(2, 1, 3, 3)))


def test_a_clone_is_independent():
    network = made(LINEAR)
    network.module.train()(DEPTHWISE.images(2)).sum().backward()
    copied = artifact.clone(network.module)
    assert not copied.training
    assert all(p.grad is None for p in copied.parameters())
    assert any(p.grad is not None for p in network.module.parameters())
    before = copy.deepcopy(network.module.state_dict())
    nn.init.zeros_(copied.fc.weight)
    assert torch.equal(network.module.fc.weight, before["fc.weight"])


# Files that are no artifacts.


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


# Headers that lie.


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


# Writing.


def old_file(tmp_path):
    path = tmp_path / "net.safetensors"
    artifact.save(path, made(LINEAR))
    return path, path.read_bytes()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, error):
    path, before = old_file(tmp_path)

    def half(tensors, target, metadata):
        target.write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SePruneError
    with pytest.raises(expected) as caught:
        artifact.save(path, made(LINEAR))
    if expected is SePruneError:
        assert "No space left on device. Nothing was changed" in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    monkeypatch.undo()
    artifact.save(path, made(LINEAR))  # the control
    assert path.read_bytes() != before


def test_an_interrupt_before_the_first_byte(tmp_path):
    path, before = old_file(tmp_path)

    def interrupted(target):
        with whole_file(target):
            raise KeyboardInterrupt

    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(target)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path):
    path, before = old_file(tmp_path)
    with pytest.raises(SePruneError, match=r"cannot write .*inside\.safetensors: .*-o"):
        artifact.save(path / "inside.safetensors", made(LINEAR))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_network_that_was_opened_by_the_pipeline_is_not_changed_by_saving(tmp_path):
    network = open_model("zoo:se_resnet20")
    before = copy.deepcopy(network.module.state_dict())
    artifact.save(tmp_path / "net.safetensors", network)
    assert all(torch.equal(v, before[k]) for k, v in network.module.state_dict().items())
    assert pipeline.inspect(artifact.load(tmp_path / "net.safetensors")) == pipeline.inspect(network)
