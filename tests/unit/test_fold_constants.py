"""Gates whose multiply stands in larger code: their last layer becomes a constant."""

import copy

import onnx
import pytest
import torch
from torch import nn

from se_prune import artifact, pipeline
from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError, SurgeryError
from se_prune.export import export
from se_prune.fixed import ConstantGate
from se_prune.folding import Saving
from se_prune.gates.sites import find_sites
from se_prune.gates.tap import constant_gates, tap
from se_prune.pipeline.folds import without_folded
from se_prune.records import ArchSpec, ArtifactHeader, Budget, Plan, SitePlan
from se_prune.surgery.fold import find_ways, fold
from tests.built import built, random_plan
from tests.nets import FUNCTIONAL, ConvSE
from tests.onnx_graphs import paddle, save

REF = "tests.nets:FunctionalSE"


class GateOnly(nn.Module):
    """The multiply is the block's, which does more than that."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.reduce, self.expand = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        u = self.conv(x)
        return u * self.expand(self.reduce(u.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Residual(ConvSE):
    def forward(self, u):
        return u + super().forward(u)


class Two(ConvSE):
    def forward(self, u, unused):
        return super().forward(u)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(3, 4, 1), Two(4, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.se(x, x)


class Normed(nn.Module):
    """A BN between the two layers, which needs the first."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(2)
        self.reduce, self.expand = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        u = self.conv(x)
        s = nn.functional.hardsigmoid(self.expand(self.norm(self.reduce(u.mean((2, 3), keepdim=True)))))
        return u + u * s


class Shared(GateOnly):
    """The gate is read twice."""

    def forward(self, x):
        u = self.conv(x)
        s = self.expand(self.reduce(u.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return u * s + s


#: Networks, and which first layer goes away.
NETS = {
    "a block": (lambda: nn.Sequential(GateOnly()), "0.reduce"),
    "a residual": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Residual(4, 2)), "1.reduce"),
    "two inputs": (TwoInputs, "se.reduce"),
    "a BN between": (Normed, None),
    "functional": (FUNCTIONAL.build, "reduce"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_the_gate_is_the_constant(name):
    make, unused = NETS[name]
    model, images = make().double().eval(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    (site,) = find_sites(model, images)
    (way,) = find_ways(model, images, [site]).found.values()
    assert (way.kind, way.owner, way.unused) == ("constant", site.expand, unused)
    constants = {site.name: torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)[: site.channels]}
    before = copy.deepcopy(model.state_dict())
    folded, kinds = fold(model, images, constants)
    assert kinds == {site.expand: "constant"} | ({} if unused is None else {unused: "unused"})
    with torch.no_grad(), tap(model, [site], constant_gates(constants)):
        expected = model(images)
    with torch.no_grad():
        assert float((folded(images) - expected).abs().max()) <= 1e-9
        assert float((model(images) - expected).abs().max()) > 1e-3
    assert find_sites(folded, images) == ()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_gate_that_is_read_elsewhere_is_refused():
    model, images = nn.Sequential(Shared()), torch.randn(2, 3, 6, 6)
    sites = find_sites(model, images)
    assert find_ways(model, images, sites).refused == {
        "0": "0 does more than compute the gate and multiply, and its gate is read by more than its multiply"
    }


def test_a_constant_that_the_gate_never_has_is_refused():
    model, images = FUNCTIONAL.build(), FUNCTIONAL.images(2)
    with pytest.raises(
        SurgeryError, match=r"the gate of 'expand' is never 1\.5, so that it cannot be folded"
    ):
        fold(model, images, {"expand": torch.tensor([0.5, 0.5, 1.5, 0.5, 0.5])})


def test_cut_folded_saved_and_exported(tmp_path):
    network = built("functional")
    header = ArtifactHeader(arch=ArchSpec(ref=REF), preprocessing=network.preprocessing)
    dense = Network(module=network.model, header=header)
    found = pipeline.structure(dense)
    site = SitePlan(name="expand", action="fold", loss=0.1, constants=(0.2, 0.4, 0.5, 0.6, 0.9), note="")
    plan = random_plan(network, "sparsity", 0.4)
    plan = plan.__class__(**{**{n: getattr(plan, n) for n in plan.__slots__}, "sites": (site,)})
    applied = pipeline.apply_plan(dense, found, plan, device=torch.device("cpu"), repair="none")
    assert applied.max_abs_diff_masked <= 1e-9
    module = applied.network.module
    assert isinstance(module.expand, ConstantGate)
    assert len(module.expand.weight) == module.conv1.out_channels < 5
    assert applied.network.header.folded == {"expand": "constant", "reduce": "unused"}
    artifact.save(tmp_path / "folded.safetensors", applied.network)
    again = artifact.load(tmp_path / "folded.safetensors", trust=REF)
    images = FUNCTIONAL.images(2)
    with torch.no_grad():
        assert torch.equal(again.module(images), module(images))
    export(again, "onnx", tmp_path / "folded.onnx", images)
    nodes = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert (
        nodes.count("ReduceMean") == nodes.count("Gemm") == 1
    )  # those of the head: nothing of the gate is left


def test_what_is_saved_and_what_is_left():
    network = built("functional")
    header = ArtifactHeader(arch=ArchSpec(ref=REF), preprocessing=network.preprocessing)
    dense = Network(module=network.model, header=header)
    found = pipeline.structure(dense)
    site = SitePlan(name="expand", action="fold", loss=0.1, constants=(0.5,) * 5, note="")
    groups, left = without_folded(dense, found, network.layers, [site])
    assert [c.group.name for c in groups] == ["conv1", "conv2", "fc"]
    assert set(network.layers) - set(left) == {"reduce"}
    assert (left["expand"].macs, left["expand"].weights + left["expand"].biases) == (0, 5)
    way = find_ways(network.model, found.example, found.sites).found["expand"]
    saving = pipeline.folds._saving(
        found.sites[0], way, dict(network.model.named_modules()), FUNCTIONAL.per_layer, 0.1
    )
    # reduce 12 and expand 15 parameters, of which 5 constants stay; 10 MACs each
    assert saving == Saving(sites=("expand",), params=22, macs=20, operations=2, predicted_loss=0.1)


@pytest.mark.parametrize("name", ["", "gone", "blocks"])
def test_names_that_lie(name):
    with pytest.raises(CheckpointError, match=f"folds '{name}', which is no SE block"):
        artifact._require_blocks(FUNCTIONAL.build(), {name: "constant"}, what="it")
    artifact._require_blocks(FUNCTIONAL.build(), {"expand": "constant"}, what="it")


def test_a_network_of_an_onnx_file_is_folded(tmp_path):
    save(tmp_path, paddle())
    dense = open_model(tmp_path / "net.onnx", mean=(0.5,) * 3, std=(0.5,) * 3)
    found = pipeline.structure(dense)
    (gate,) = found.sites
    constants = tuple(torch.linspace(0.1, 0.9, gate.channels).tolist())
    site = SitePlan(name=gate.name, action="fold", loss=0.1, constants=constants, note="")
    macs = found.cost.macs
    plan = Plan(
        criterion="none", budget=Budget(kind="sparsity", value=0.0), round_to=1, min_channels=2, groups=(),
        macs_before=macs, macs_after=macs, params_before=0, params_after=0, sites=(site,),
    )  # fmt: skip
    applied = pipeline.apply_plan(dense, found, plan, device=torch.device("cpu"), repair="none")
    assert applied.max_abs_diff_masked <= 1e-9
    assert applied.after.macs < macs
    artifact.save(tmp_path / "folded.safetensors", applied.network)
    again = open_model(tmp_path / "folded.safetensors")
    with torch.no_grad():
        assert torch.equal(again.module(found.example), applied.network.module(found.example))
    assert pipeline.structure(again).sites == ()
