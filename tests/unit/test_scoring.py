"""Criteria: what they need, what they return, and two of them worked out by hand.

Shapes: N images, C channels, H×W positions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from se_prune.channels import couplings
from se_prune.cost import count_cost
from se_prune.errors import UsageError
from se_prune.layers import layer_costs
from se_prune.planning import make_plan
from se_prune.records import Budget, Preprocessing
from se_prune.scoring import CRITERIA, Evidence, score
from se_prune.scoring.registry import criterion, find, load_all
from se_prune.scoring.signal import describe
from tests.built import lively
from tests.evidence import Tensors, data, evidence, measured
from tests.nets import ALL, DEPTHWISE, RESIDUAL, ConvSE

load_all()
CPU = torch.device("cpu")
GATES = ("gate-energy", "gate-obs", "gate-fisher", "gate-mean", "excitation")
NAMES = ("random", "l1", "l2", "bn-scale", "fpgm", "lamp", "taylor", "hessian", *GATES)
FIXED = tuple(name for name in NAMES if name != "random")


def plan_of(have, scores, value):
    size = tuple(have.example.shape[1:])
    preprocessing = Preprocessing(input_size=size, mean=(0.0,) * size[0], std=(1.0,) * size[0])
    cost = count_cost(have.model, preprocessing, have.sites)
    costs = layer_costs(have.model, cost.per_layer)
    return make_plan(have.couplings, costs, scores, Budget(kind="sparsity", value=value))


def test_the_criteria_are_these():
    assert set(CRITERIA) == set(NAMES)
    assert {n for n, c in CRITERIA.items() if c.comparable} == set(GATES) - {"gate-mean"}
    assert all(c.summary and c.name == n for n, c in CRITERIA.items())


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_and_of_every_group(name, facts):
    have = measured(facts)
    state = {key: value.clone() for key, value in have.model.state_dict().items()}
    result = score(name, have)
    assert (result.criterion, result.comparable) == (name, name in GATES and name != "gate-mean")
    assert {k: len(v) for k, v in result.groups.items()} == {k: c for k, (_, c) in facts.groups.items()}
    assert all(math.isfinite(v) and v >= 0 for values in result.groups.values() for v in values)
    assert any(len(set(values)) == len(values) for values in result.groups.values())
    assert all(torch.equal(value, state[key]) for key, value in have.model.state_dict().items())
    assert all(p.grad is None for p in have.model.parameters())


# Excitation by hand: convolution, BN, ReLU, convolution, BN, SE, and a classifier.


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.b, self.bn2 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.se, self.fc = ConvSE(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.se(self.bn2(self.b(self.bn1(self.a(x)).relu()))).mean((2, 3)))


def chain():
    torch.manual_seed(1)
    model = lively(Chain(), Preprocessing(input_size=(2, 6, 6), mean=(0.0,) * 2, std=(1.0,) * 2))
    with torch.no_grad():
        model.se.reduce.weight.mul_(4)
        model.se.reduce.bias.fill_(1)
        model.se.expand.weight.mul_(4)
    return model


def bn(x, norm):
    """Apply a BN in eval mode, from its definition."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


@torch.no_grad()
def test_gate_energy_is_the_share_of_recalibrated_energy_by_hand():
    model = chain()
    have = evidence(model, (2, 6, 6), 3)
    x = data((2, 6, 6), 3).images
    a = bn(F.conv2d(x, model.a.weight, padding=1), model.bn1).clamp(min=0).double()
    u = bn(F.conv2d(a.float(), model.b.weight, padding=1), model.bn2).double()
    h = (u.float().mean((2, 3)) @ model.se.reduce.weight[:, :, 0, 0].T + model.se.reduce.bias).clamp(min=0)
    s = (h @ model.se.expand.weight[:, :, 0, 0].T + model.se.expand.bias).sigmoid().double()
    pooled = (s[:, :, None, None] * u).mean((2, 3))
    images = len(x)

    inner = []
    whole = sum(
        (float(model.bn2.weight[c]) ** 2 + float(model.bn2.bias[c]) ** 2) * float((s[:, c] ** 2).mean())
        for c in range(4)
    )
    for k in range(3):
        energy = float((a[:, k] ** 2).sum()) / (images * 36)
        lost = 0.0
        for c in range(4):
            gate = float((s[:, c] ** 2).sum()) / images
            gain = float(model.bn2.weight[c]) ** 2 / (float(model.bn2.running_var[c]) + model.bn2.eps)
            lost += gain * gate * float((model.b.weight[c, k].double() ** 2).sum()) * energy
        inner.append(lost / whole)

    gated = [
        sum(float(model.fc.weight[o, c]) ** 2 for o in range(3)) * float((pooled[:, c] ** 2).mean())
        for c in range(4)
    ]
    hidden = [
        sum(float(model.se.expand.weight[c, j, 0, 0]) ** 2 for c in range(4)) * float((h[:, j] ** 2).mean())
        for j in range(2)
    ]
    groups = score("gate-energy", have).groups
    assert set(groups) == {"a", "b", "se.reduce"}
    assert groups["a"] == pytest.approx(inner, rel=1e-4)
    assert groups["b"] == pytest.approx([g / sum(gated) for g in gated], rel=1e-4)
    assert groups["se.reduce"] == pytest.approx([v / sum(hidden) for v in hidden], rel=1e-4)
    assert max(inner) > 1.1 * min(inner)


class Stream(nn.Module):
    """A stem and a head around one residual block, all of it linear but for the block's ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1, bias=False)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.head, self.fc = nn.Conv2d(3, 5, 1, bias=False), nn.Linear(5, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.fc(self.head(x).mean((2, 3)))


@torch.no_grad()
def test_gate_energy_measures_a_residual_branch_against_its_stream():
    torch.manual_seed(2)
    model = lively(Stream(), Preprocessing(input_size=(2, 4, 4), mean=(0.0,) * 2, std=(1.0,) * 2))
    have = evidence(model, (2, 4, 4), 2)
    images = data((2, 4, 4), 2).images
    stem = model.stem(images)
    a = bn(model.conv1(stem), model.bn1).clamp(min=0)
    x = stem + bn(model.conv2(a), model.bn2)

    def energy(maps):
        return maps.double().square().mean((0, 2, 3))

    gain = (model.bn2.weight**2 / (model.bn2.running_var + model.bn2.eps)).double()
    weight2 = model.conv2.weight[:, :, 0, 0].double() ** 2
    inner = [float((gain * weight2[:, k]).sum() * energy(a)[k] / energy(x).sum()) for k in range(4)]
    # A stream's channel is missed by every reader: conv1 (whose BN tells its energy) and head (whose own is taken).
    gain1 = (model.bn1.weight**2 / (model.bn1.running_var + model.bn1.eps)).double()
    own1 = float((model.bn1.weight**2 + model.bn1.bias**2).sum())
    read1 = (gain1[:, None] * model.conv1.weight[:, :, 0, 0].double() ** 2).sum(0) * energy(stem) / own1
    read2 = (model.head.weight[:, :, 0, 0].double() ** 2).sum(0) * energy(x)
    groups = score("gate-energy", have).groups
    assert groups["conv1"] == pytest.approx(inner, rel=1e-4)
    assert groups["stem"] == pytest.approx((read1 + read2 / read2.sum()).tolist(), rel=1e-4)


def no_consumer(model):
    model.blocks[0].conv2.weight[:, 2] = 0


def no_activation(model):
    model.blocks[0].bn1.weight[2] = 0
    model.blocks[0].bn1.bias[2] = -1


@pytest.mark.parametrize("change", [no_consumer, no_activation])
def test_a_channel_that_nothing_reads_or_that_is_never_on_leaves_first(change):
    have = measured(RESIDUAL, change)
    scores = score("gate-energy", have)
    assert scores.groups["blocks.0.conv1"][2] == 0
    wide = [v for name, values in scores.groups.items() if "se" not in name for v in values]
    assert wide.count(0) == 1
    plan = plan_of(have, scores, 1 / 16)
    assert {g.name: g.removed for g in plan.groups if g.removed} == {"blocks.0.conv1": (2,)}
    before = measured(RESIDUAL)
    other = plan_of(before, score("gate-energy", before), 1 / 16)
    assert {g.name: g.removed for g in other.groups if g.removed} != {"blocks.0.conv1": (2,)}


def test_a_gated_channel_that_nothing_reads_scores_zero():
    have = measured(DEPTHWISE, lambda model: model.blocks[1].pw.weight[:, 5].zero_())
    scores = score("gate-energy", have).groups["blocks.0.pw"]
    assert scores[5] == 0
    assert sum(v == 0 for v in scores) == 1


def test_gate_energy_without_statistics_takes_gates_of_one():
    have = measured(DEPTHWISE)
    with_gates = score("gate-energy", have).groups
    have.statistics = None
    without = score("gate-energy", have).groups
    # `stem` is read by a layer whose output is gated; `blocks.1.pw` by the classifier, which no gate scales.
    assert with_gates["stem"] != pytest.approx(without["stem"], rel=1e-6)
    assert with_gates["blocks.1.pw"] == without["blocks.1.pw"]


# Gradients by hand.


def first_order(model, out, into, gradients):
    """Return |w·g| summed per channel over the two layers, averaged over them and normalised (BN has no part)."""
    total = (out.weight * gradients[out.weight]).abs().sum((1, 2, 3))
    total += (into.weight * gradients[into.weight]).abs().sum((0, *range(2, into.weight.ndim)))
    return (total / total.mean()).tolist()


def test_taylor_is_weight_times_gradient_by_hand():
    have = measured(RESIDUAL)
    model, split = have.model, data(RESIDUAL.input_size, RESIDUAL.classes)
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(split.images), split.labels)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
    groups = score("taylor", have).groups
    for block in (0, 1):
        layers = model.blocks[block]
        expected = first_order(model, layers.conv1, layers.conv2, gradients)
        assert groups[f"blocks.{block}.conv1"] == pytest.approx(expected, rel=1e-3)
        gate = first_order(model, layers.se.reduce, layers.se.expand, gradients)
        assert groups[f"blocks.{block}.se.reduce"] == pytest.approx(gate, rel=1e-3)


def test_hessian_is_squared_weight_times_mean_squared_gradient_by_hand():
    have = measured(RESIDUAL)
    model, split = have.model, data(RESIDUAL.input_size, RESIDUAL.classes)
    layers = model.blocks[0]
    weights = [layers.conv1.weight, layers.conv2.weight, layers.bn1.weight]
    squares = [torch.zeros_like(w) for w in weights]
    for image, label in zip(split.images, split.labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for square, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
            square.add_(gradient**2 / len(split))
    out, into, norm = (w**2 * h for w, h in zip(weights, squares, strict=True))
    total = out.sum((1, 2, 3)) + into.sum((0, 2, 3)) + norm
    expected = (total / total.mean()).tolist()
    assert score("hessian", have).groups["blocks.0.conv1"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["taylor", "hessian"])
def test_frozen_layers_are_scored_like_any_other(name):
    have = measured(RESIDUAL)
    expected = score(name, have)
    have.model.blocks[0].requires_grad_(False)
    flags = [p.requires_grad for p in have.model.parameters()]
    assert score(name, have) == expected
    assert [p.requires_grad for p in have.model.parameters()] == flags
    assert {True, False} == set(flags)
    assert all(p.grad is None for p in have.model.parameters())


def test_hessian_looks_at_256_images_at_most():
    class Counted(nn.Module):
        """A network of a few weights that counts the images it sees."""

        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.seen = nn.Conv2d(1, 3, 1), nn.Linear(3, 2), 0

        def forward(self, x):
            self.seen += len(x)
            return self.fc(self.conv(x).mean((2, 3)))

    model = Counted()
    split = Tensors(torch.randn(300, 1, 2, 2), torch.zeros(300, dtype=torch.long))
    example = split.images[:1]
    found = couplings(model, example, ())
    have = Evidence(
        model=model, example=example, sites=(), couplings=found, seed=0, device=CPU,
        batches=lambda limit: split.first(limit).batches(50),
    )  # fmt: skip
    traced = {}
    for name in ("l2", "hessian", "taylor"):
        model.seen = 0
        score(name, have)
        traced[name] = model.seen
    assert traced["hessian"] - traced["l2"] == 256
    assert traced["taylor"] - traced["l2"] == 300


# Properties of all.


@pytest.mark.parametrize("name", FIXED)
def test_permuting_channels_permutes_scores(name):
    order = [3, 0, 5, 1, 4, 2]

    def turn(model):
        block = model.blocks[0]
        block.conv1.weight.copy_(block.conv1.weight[order])
        block.conv2.weight.copy_(block.conv2.weight[:, order])
        for tensor in (block.bn1.weight, block.bn1.bias, block.bn1.running_mean, block.bn1.running_var):
            tensor.copy_(tensor[order].clone())

    plain, turned = (score(name, measured(RESIDUAL, change)).groups for change in (None, turn))
    inner = plain["blocks.0.conv1"]
    assert turned["blocks.0.conv1"] == pytest.approx([inner[i] for i in order], rel=1e-3)
    assert turned["blocks.0.conv1"] != pytest.approx(inner, rel=1e-3)
    assert turned["blocks.1.conv1"] == pytest.approx(plain["blocks.1.conv1"], rel=1e-3)


def test_random_scores_are_those_of_their_seed():
    have = measured(RESIDUAL)
    state = torch.get_rng_state()
    first = score("random", have).groups
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert score("random", have).groups == first
    have.seed = 1
    other = score("random", have).groups
    assert all(other[name] != values for name, values in first.items())
    assert len({v for values in first.values() for v in values}) == sum(map(len, first.values()))


@pytest.mark.parametrize("name", FIXED)
def test_the_same_evidence_gives_the_same_scores(name):
    have = measured(DEPTHWISE)
    first = score(name, have)
    have.seed = 9
    assert score(name, have) == first


# Refusals.


@pytest.mark.parametrize(
    ("word", "meant"), [("exitation", "excitation"), ("tailor", "taylor"), ("bnscale", "bn-scale")]
)
def test_an_unknown_criterion_names_the_nearest_and_all(word, meant):
    have = measured(RESIDUAL)
    for ask in (lambda: find(word), lambda: score(word, have)):
        with pytest.raises(
            UsageError, match=rf"no criterion is called '{word}' \(did you mean '{meant}'\?\)"
        ) as error:
            ask()
        assert all(name in str(error.value) for name in NAMES)
    assert find(meant).name == meant


@pytest.mark.parametrize(
    ("name", "missing"),
    [("taylor", "batches"), ("hessian", "batches"), ("excitation", "energies"), ("excitation", "batches")],
)
def test_criteria_that_measure_images_ask_for_them(name, missing):
    have = measured(RESIDUAL)
    assert score(name, have).groups
    setattr(have, missing, None)
    with pytest.raises(UsageError, match=f"--criterion {name} measures images; add --data"):
        score(name, have)


@pytest.mark.parametrize("name", ["random", "l1", "l2", "bn-scale", "fpgm", "lamp"])
def test_the_others_need_none(name):
    have = measured(RESIDUAL)
    have.statistics = have.energies = have.batches = None
    assert score(name, have).groups


def test_a_name_is_registered_once():
    with pytest.raises(AssertionError, match="l2 is registered twice"):
        criterion("l2", "again")(lambda *_: {})
    assert CRITERIA["l2"].summary != "again"


def test_the_energy_of_a_stream_is_read_before_the_pool():
    have = measured(RESIDUAL)
    described = describe(have)
    stream = next(c for c in have.couplings if c.group.kind == "stream")
    linear = {name for name, module in have.model.named_modules() if isinstance(module, nn.Linear)}
    assert linear & set(stream.layers("in"))  # the classifier reads it too
    assert described.reader_of
    assert not linear & set(described.reader_of.values())
