"""The zoo's networks are the published ones, take what users may ask of them, and refuse what they may not."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from torchvision import models

from se_prune.errors import UsageError
from se_prune.records import ArchSpec
from se_prune.surgery.cut import cut, verify
from se_prune.zoo import registry, senet
from se_prune.zoo.senet import PLACEMENTS, Bottleneck, projection
from se_prune.zoo.shufflenet import ChannelShuffle
from tests.built import built, random_plan

#: Ours and timm's name of the same network.
TWINS = {
    "se_resnet50": "legacy_seresnet50",
    "se_resnet152": "legacy_seresnet152",
    "se_resnext101_32x4d": "legacy_seresnext101_32x4d",
    "senet154": "legacy_senet154",
    "inception_resnet_v2": "inception_resnet_v2",
}
#: One name of each family, and the smallest side of an image that it takes here.
FAMILIES = {
    "se_resnet20": 28, "se_resnext29_8x4d": 28, "se_resnet50": 64, "se_resnext50_32x4d": 64, "senet154": 64,
    "se_vgg16_bn": 64, "se_bn_inception": 64, "se_inception_resnet_v2": 96, "se_mobilenet": 64,
    "se_shufflenet_g3": 64,
}  # fmt: skip


def shapes(name, **kwargs):
    with torch.device("meta"):
        return registry.build(ArchSpec(ref=f"zoo:{name}", kwargs=kwargs))


def timm_shapes(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.fixture
def short(monkeypatch):
    """One unit in each stage of every ResNet: the forms are what is compared, not the depth."""
    for depth in senet.STAGES:
        monkeypatch.setitem(senet.STAGES, depth, (1, 1, 1, 1))


def sizes(model):
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def lively_(model):
    """Give a network without memory random weights that keep its signal alive."""
    generator = torch.Generator().manual_seed(0)
    model.to_empty(device="cpu").eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensor.zero_()
        elif tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        else:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize(("ours", "theirs"), TWINS.items(), ids=TWINS)
def test_keys_and_shapes_are_those_of_published_checkpoints(ours, theirs):
    assert sizes(shapes(ours)) == sizes(timm_shapes(theirs))


@pytest.mark.parametrize("name", ["se_resnet50", "se_resnext101_32x4d", "senet154", "inception_resnet_v2"])
@torch.no_grad()
def test_outputs_are_those_of_published_networks(name, short):
    options = {} if name == "inception_resnet_v2" else {"layers": (1, 1, 1, 1)}
    ours, theirs = lively_(shapes(name)), timm_shapes(TWINS[name], **options).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    side = 107 if name == "inception_resnet_v2" else 57  # odd, where padding and rounding up differ
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected, found = theirs(image), ours(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_vgg_is_torchvisions_and_keeps_its_keys_with_se():
    with torch.device("meta"):
        theirs = models.vgg16_bn()
    plain, gated = sizes(shapes("vgg16_bn")), sizes(shapes("se_vgg16_bn"))
    assert plain == sizes(theirs)
    assert plain.items() <= gated.items()
    assert all(".1.reduce." in key or ".1.expand." in key for key in gated.keys() - plain.keys())
    ours = lively_(shapes("vgg16_bn").features)
    features = theirs.features.eval()
    features.load_state_dict(ours.state_dict(), assign=True)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(image), features(image))


def test_networks_without_se_lack_nothing_else(short):
    for name, plain in {"se_resnet50": "resnet50", "senet154": "senet154_without_se"}.items():
        gated, rest = sizes(shapes(name)), sizes(shapes(plain))
        assert {key for key in gated if "se_module" not in key} == set(rest)
        assert rest.items() < gated.items()


@pytest.mark.parametrize(("name", "side"), FAMILIES.items(), ids=FAMILIES)
def test_any_class_count_and_input_channels(name, side, short):
    model = shapes(name, num_classes=7, in_channels=2, reduction=32).eval()
    assert model(torch.empty(3, 2, side, side, device="meta")).shape == (3, 7)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("option", "value"),
    [("reduction", 0), ("reduction", 2.5), ("reduction", True), ("num_classes", 0), ("in_channels", -1)],
)
def test_sizes_that_cannot_be_are_refused(name, option, value):
    with pytest.raises(UsageError, match=rf"^{option} must be a whole number of at least 1, got {value}\.$"):
        shapes(name, **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "pots"}, r"placement takes standard, .*, got 'pots' \(did you mean 'post'\?\)\.$"),
        ({"depth": 51}, r"depth takes 50, 101, 152, got 51"),
        ({"form": "wide"}, r"form takes resnet, resnext, senet, got 'wide'"),
        ({"ratio": 4}, r"cannot build zoo:se_resnet50 with .*ratio"),
    ],
)
def test_unknown_choices_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        shapes("se_resnet50", **options)


class Affine(nn.Module):
    """Stands for a gate; does not commute with a convolution, a sum or a ReLU."""

    def forward(self, u):
        return 2 * u + 1


#: What a unit computes from its input, its shortcut p and the two parts of its branch, `head` to the 3×3.
PLACED = {
    "standard": lambda g, head, tail, x, p: functional.relu(g(tail(head(x))) + p(x)),
    "pre": lambda g, head, tail, x, p: functional.relu(tail(head(g(x))) + p(x)),
    "post": lambda g, head, tail, x, p: g(functional.relu(tail(head(x)) + p(x))),
    "identity": lambda g, head, tail, x, p: functional.relu(tail(head(x)) + g(p(x))),
    "3x3": lambda g, head, tail, x, p: functional.relu(tail(g(head(x))) + p(x)),
}
#: Channels that the gate scales where the unit has 6 channels in, widths 4, 5 and 8.
SCALED = {"standard": 8, "pre": 6, "post": 8, "identity": 8, "3x3": 5}


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_where_the_gate_stands(placement):
    torch.manual_seed(0)
    unit = Bottleneck(
        6, (4, 5, 8), (1, 2), groups=1, downsample=projection(6, 8, 2), reduction=2, placement=placement
    ).eval()
    assert unit.se_module.fc1.in_channels == SCALED[placement]
    assert unit.se_module.fc1.out_channels == SCALED[placement] // 2
    unit.se_module = Affine()

    def head(x):
        return functional.relu(unit.bn2(unit.conv2(functional.relu(unit.bn1(unit.conv1(x))))))

    def tail(u):
        return unit.bn3(unit.conv3(u))

    image = torch.randn(2, 6, 8, 8)
    found = unit(image)
    expected = {p: f(unit.se_module, head, tail, image, unit.downsample) for p, f in PLACED.items()}
    assert [p for p in PLACEMENTS if torch.allclose(found, expected[p], atol=1e-5)] == [placement]


def test_channel_shuffle():
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert ChannelShuffle(3)(channels).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_bare_names_that_timm_has_keep_meaning_timms():
    others = {*timm.list_models(), *models.list_models(module=models)}
    assert set(registry.ZOO) & others == registry.PREFIXED
    assert registry.resolve("resnet50").ref == "timm:resnet50"
    assert registry.resolve("zoo:resnet50").ref == "zoo:resnet50"
    assert registry.resolve("se_resnet50").ref == "zoo:se_resnet50"


def test_the_small_resnext_learns():
    torch.manual_seed(0)
    model = registry.build(ArchSpec(ref="zoo:se_resnext29_8x4d"))
    images, labels = torch.randn(10, 1, 28, 28), torch.arange(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    losses = []
    for _ in range(6):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["se_resnext29_8x4d", "se_bn_inception"])
def test_they_can_be_cut(name, monkeypatch):
    see = registry.ZOO[name][2]
    if see.input_size[1] > 64:
        small = registry.Preprocessing(input_size=(3, 64, 64), mean=see.mean, std=see.std)
        monkeypatch.setitem(registry.ZOO, name, (*registry.ZOO[name][:2], small))
    found = built(f"zoo:{name}")
    plan = random_plan(found, "sparsity", 0.3)
    result = cut(found.model, found.example, plan)
    assert verify(found.model, result, found.couplings, plan, found.example) <= 1e-9
    assert plan.channels_removed > 100
