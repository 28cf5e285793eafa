"""Artifacts: what was saved comes back bit for bit."""

import copy
import dataclasses
import errno
import os
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from se_prune import artifact, pipeline
from se_prune.artifact import Network, changed_geometry, geometry, read_header
from se_prune.channels import couplings
from se_prune.checkpoint import open_model
from se_prune.cost import count_cost
from se_prune.errors import SePruneError
from se_prune.files import whole_file
from se_prune.gates.sites import find_sites
from se_prune.layers import layer_costs
from se_prune.planning import make_plan
from se_prune.records import (
    ArchSpec,
    ArtifactHeader,
    Budget,
    HistoryEntry,
    Scores,
)
from se_prune.schema import to_dict
from se_prune.surgery.cut import cut
from se_prune.zoo import registry
from tests.artifacts import LINEAR, NETWORKS, made, trust, write
from tests.nets import DEPTHWISE


@pytest.fixture(scope="module")
def resnet():
    """The header (as JSON values) and the tensors of an se_resnet20; copies are for the test to change."""
    torch.manual_seed(1)
    network = made("zoo:se_resnet20")
    return SimpleNamespace(header=to_dict(network.header), state=network.module.state_dict())


RESNET = ArchSpec(ref="zoo:se_resnet20")


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
