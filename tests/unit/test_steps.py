"""Networks of steps: cut, kept in an artifact without ONNX, exported; and what a hostile artifact may not ask for."""

import builtins
import dataclasses
import json
import math

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from se_prune import artifact
from se_prune.artifact import Network
from se_prune.channels import couplings
from se_prune.checkpoint import open_model
from se_prune.data import DataSource
from se_prune.data.batches import TensorImages
from se_prune.errors import CheckpointError
from se_prune.evaluate import evaluate
from se_prune.export import export
from se_prune.gates.sites import find_sites
from se_prune.pipeline import apply_plan, finetune, plan, structure
from se_prune.pipeline.exporting import real_images
from se_prune.records import ArchSpec, ArtifactHeader, Budget
from se_prune.schema import from_json, to_json
from se_prune.settings import TrainSettings
from se_prune.zoo import registry
from se_prune.zoo.steps import LAYERS, OPERATIONS, Step, StepNetwork, Steps
from tests import nets
from tests.onnx_graphs import paddle, save

CPU = torch.device("cpu")


def photos(classes, size, n=96):
    """Images whose brightness in one corner tells the class."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 120, (n, *size), generator=generator)
    labels = torch.arange(n) % classes
    pixels[:, :, :4, :4] += (30 * labels).clamp(max=120)[:, None, None, None]
    part = TensorImages(images=pixels.to(torch.uint8), labels=labels)
    return DataSource(ref="photos", classes=tuple(map(str, range(classes))), train=part, test=part)


@pytest.fixture(scope="module", params=["paddle", *sorted(nets.ALL)])
def opened(request, tmp_path_factory):
    """A network that was opened from ONNX, by name, with images for it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "paddle":
        network = open_model(save(folder, paddle()), mean=(0.5,) * 3, std=(0.5,) * 3)
        return request.param, network, photos(4, (3, 8, 8))
    torch.manual_seed(0)
    facts = nets.ALL[request.param]
    header = ArtifactHeader(arch=ArchSpec(ref="mine:net"), preprocessing=facts.preprocessing)
    own = Network(module=facts.build().eval(), header=header)
    export(own, "onnx", folder / "own.onnx", facts.images(4))
    return request.param, open_model(folder / "own.onnx"), photos(facts.classes, facts.input_size)


@pytest.fixture(scope="module")
def applied(opened):
    _, network, data = opened
    found = structure(network)
    budget = Budget(kind="macs", value=0.7)
    chosen = plan(network, found, budget, criterion="excitation", device=CPU, data=data)
    return apply_plan(network, found, chosen, device=CPU, data=data)


def test_it_is_cut_and_repaired(opened, applied):
    name, network, _ = opened
    assert applied.after.macs <= 0.7 * applied.before.macs
    assert applied.max_abs_diff_masked < 1e-10
    assert any(fit.kept for fit in applied.refits)
    norms = sum(isinstance(m, artifact.NORM_TYPES) for m in network.module.modules())
    assert norms == (name == "paddle"), "our exports fold BN into the convolutions"
    repair = applied.network.header.history[-1].details["repair"]
    before, after = repair["divergence"]
    assert repair["bn_recalibrated"] == (norms if after < before else 0)
    assert (before > 0) == (norms > 0)


def test_the_same_groups_as_of_the_network_before_its_export(opened):
    name, network, _ = opened
    if name == "paddle":
        return
    facts = nets.ALL[name]
    sites = find_sites(network.module, facts.images())
    groups = [c.group for c in couplings(network.module, facts.images(), sites)]
    assert {g.name: (g.kind, g.channels) for g in groups if g.prunable} == facts.groups


def test_the_artifact_opens_by_itself_and_bit_for_bit(opened, applied, tmp_path, monkeypatch):
    artifact.save(tmp_path / "cut.safetensors", applied.network)
    real = builtins.__import__

    def without_onnx(name, *args, **kwargs):
        if name.partition(".")[0] in {"onnx", "onnxruntime", "onnxscript"}:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    again = open_model(tmp_path / "cut.safetensors")
    monkeypatch.undo()
    mine, theirs = again.module.state_dict(), applied.network.module.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    images = torch.randn(3, *again.header.preprocessing.input_size)
    assert torch.equal(again.module(images), applied.network.module(images))
    assert again.header == applied.network.header
    assert again.header.geometry
    artifact.save(tmp_path / "twice.safetensors", again)
    assert (tmp_path / "twice.safetensors").read_bytes() == (tmp_path / "cut.safetensors").read_bytes()


def test_onnx_again(opened, applied, tmp_path):
    name, _, data = opened
    path = tmp_path / "cut.onnx"
    result = export(applied.network, "onnx", path, real_images(data.train, applied.network, 32))
    assert result.max_abs_diff < 1e-4
    assert result.top1_agreement == 1.0
    again = open_model(path)
    images = real_images(data.train, again, 8)
    with torch.no_grad():
        torch.testing.assert_close(again.module(images), applied.network.module(images), rtol=1e-4, atol=1e-4)
    assert again.module.steps.final == ("softmax" if name == "paddle" else "none")
    assert structure(again).cost.macs == applied.after.macs


def test_it_learns(opened, applied):
    _, network, data = opened
    settings = TrainSettings(epochs=1, batch_size=32, lr=0.01)
    tuned = finetune(applied.network, data, settings, device=CPU, teacher=network)
    before, after = applied.network.module.state_dict(), tuned.module.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert tuned.header.history[-1].details["distilled"]


def test_the_loss_of_a_network_that_ends_with_a_softmax_is_that_of_its_probabilities(tmp_path):
    path = save(tmp_path, paddle())
    network, data = open_model(path), photos(4, (3, 8, 8))
    result = evaluate(network.module, data.test, network.header.preprocessing, device=CPU)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    losses = []
    for images, labels in data.test.batches(1, network.header.preprocessing):
        losses.append(-math.log(session.run(None, {"x": images.numpy()})[0][0, int(labels[0])]))
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


# What an artifact may not ask for.


def tiny():
    """conv, ReLU, mean, FC: the smallest description with all that a hostile one would change."""
    conv = {"rank": 2, "in_channels": 3, "out_channels": 4, "kernel_size": (3, 3), "bias": True}
    return Steps(
        input_size=(3, 8, 8),
        steps=(
            Step(name="stem.conv", op="conv", inputs=("images",), args=conv),
            Step(name="act", op="relu", inputs=("stem.conv",)),
            Step(name="pool", op="mean", inputs=("act",), args={"axes": (2, 3), "keep": False}),
            Step(name="fc", op="linear", inputs=("pool",), args={"inputs": 4, "outputs": 2, "bias": True}),
        ),
    )


def changed(index, **changes):
    whole = tiny()
    parts = list(whole.steps)
    args = changes.pop("args", None)
    parts[index] = dataclasses.replace(parts[index], **changes)
    if args is not None:
        parts[index] = dataclasses.replace(parts[index], args={**parts[index].args, **args})
    return dataclasses.replace(whole, steps=tuple(parts))


def wide():
    first = changed(0, args={"out_channels": 2**20})
    last = changed(3, args={"inputs": 2**20})
    return dataclasses.replace(first, steps=(*first.steps[:3], last.steps[3]))


def spec(description):
    return ArchSpec(ref="onnx:net", kwargs={"steps": to_json(description)})


def write(path, description, module=None):
    """Write an artifact that says whatever it is told to."""
    module = module or registry.build(spec(tiny()))
    preprocessing = nets.RESIDUAL.preprocessing
    artifact.save(
        path,
        Network(module=module, header=ArtifactHeader(arch=spec(description), preprocessing=preprocessing)),
    )
    return path


def test_the_control_opens_and_its_description_survives_json(tmp_path):
    network = open_model(write(tmp_path / "a.safetensors", tiny()))
    assert isinstance(network.module, StepNetwork)
    assert from_json(Steps, network.header.arch.kwargs["steps"]) == tiny()
    assert network.module(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


HOSTILE = {
    "unknown operation": (changed(1, op="exec"), r"'act' \(exec\) is not valid"),
    "operation of torch": (changed(1, op="__class__"), "is not valid"),
    "an attribute's name": (changed(0, name="forward"), "'forward'"),
    "an inner name": (changed(0, name="a._modules"), "'a._modules'"),
    "a path": (changed(0, name="../x"), "is not valid"),
    "twice": (changed(3, name="act"), "'act'"),
    "a later input": (changed(1, inputs=("fc",)), "'act'"),
    "no input": (changed(1, inputs=()), "'act'"),
    "a giant layer": (changed(0, args={"out_channels": 2**30}), "'stem.conv'"),
    "a layer wider than its tensors": (wide(), "does not fit its architecture"),
    "negative": (changed(0, args={"out_channels": -4}), "impossible conv|not valid|go together"),
    "an argument too many": (changed(0, args={"device": 1}), "impossible conv"),
    "a giant map": (
        changed(1, op="pad", args={"pads": (9999, 9999, 9999, 9999), "value": 0.0}),
        "would make .*which no classifier does",
    ),
    "a giant expansion": (changed(2, op="expand", args={"shape": (2**20, 2**20, 8)}), "."),
    "layers that do not meet": (changed(3, args={"inputs": 5}), "do not go together"),
    "no classes": (dataclasses.replace(tiny(), steps=tiny().steps[:2]), "not one number per class"),
    "no steps": (dataclasses.replace(tiny(), steps=()), "of 0 steps"),
    "giant images": (dataclasses.replace(tiny(), input_size=(3, 2**20, 2**20)), "would make"),
    "inside a layer": (changed(3, name="stem.conv.fc"), "stands inside another one"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_description_is_refused(tmp_path, name):
    description, match = HOSTILE[name]
    path = write(tmp_path / "a.safetensors", description)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_model(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_header_that_is_no_description(tmp_path):
    good = write(tmp_path / "a.safetensors", tiny())
    tensors = load_file(good)
    for kwargs, match in (
        ({}, "not to be trusted|missing"),
        ({"steps": 3}, "is damaged|does not go with its tensors|missing"),
        ({"steps": "{"}, "is not valid"),
        ({"steps": to_json(tiny()), "more": 1}, "not to be trusted"),
    ):
        header = json.loads(to_json(artifact.read_header(good)))
        header["arch"]["kwargs"] = kwargs
        save_file(tensors, tmp_path / "b.safetensors", {artifact.HEADER_KEY: json.dumps(header)})
        with pytest.raises(CheckpointError, match=match):
            open_model(tmp_path / "b.safetensors")


def test_the_tables_of_operations():
    assert set(LAYERS) == {"conv", "linear", "norm"}
    assert len(OPERATIONS) > 20
    assert not set(LAYERS) & set(OPERATIONS)


def test_values_are_let_go_of_after_their_last_use():
    network = StepNetwork(tiny()).eval()
    assert network._last_use == {"images": "stem.conv", "stem.conv": "act", "act": "pool", "pool": "fc"}
    assert [step.name for step, _ in network.walk(torch.zeros(1, 3, 8, 8))] == [
        "stem.conv",
        "act",
        "pool",
        "fc",
    ]
