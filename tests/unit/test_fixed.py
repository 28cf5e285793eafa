"""Blurs and mixed convolutions: what modules keep of their channels beside parameters follows a cut."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from se_prune import artifact
from se_prune.errors import CheckpointError
from se_prune.fixed import filter_of
from se_prune.records import ArchSpec, ArtifactHeader, Geometry, Preprocessing
from se_prune.surgery.cut import cut, verify
from tests.coupled import IMAGES, groups_of, planned


class Blur(nn.Module):
    """The blur of anti-aliased networks: a fixed kernel, the same for every channel."""

    def __init__(self, channels, *, same=True, persistent=False):
        super().__init__()
        self.channels = channels
        kernel = torch.tensor([1.0, 2.0, 1.0])
        kernel = (kernel[:, None] * kernel / 16).repeat(channels, 1, 1, 1)
        if not same:
            kernel = kernel * torch.arange(1, channels + 1).view(-1, 1, 1, 1)
        self.register_buffer("filt", kernel, persistent=persistent)

    def forward(self, x):
        return F.conv2d(F.pad(x, [1] * 4, mode="reflect"), self.filt, stride=2, groups=self.channels)


class Blurred(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.a, self.bn, self.blur = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Blur(8, **options)
        self.b, self.fc = nn.Conv2d(8, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.b(self.blur(self.bn(self.a(x)).relu())).mean((2, 3)))


class Mixed(nn.ModuleDict):
    """Depthwise kernels of several sizes, each for a part of the map (MixNet)."""

    def __init__(self, splits, attribute="splits"):
        super().__init__(
            {f"c{i}": nn.Conv2d(n, n, 2 * i + 1, padding=i, groups=n) for i, n in enumerate(splits)}
        )
        self.attribute = attribute
        setattr(self, attribute, list(splits) if attribute == "splits" else tuple(n + 1 for n in splits))

    def forward(self, x):
        widths = getattr(self, self.attribute)
        parts = torch.split(x, [n if self.attribute == "splits" else n - 1 for n in widths], 1)
        return torch.cat([conv(part) for conv, part in zip(self.values(), parts, strict=True)], 1)


class MixedNet(nn.Module):
    def __init__(self, attribute="splits"):
        super().__init__()
        self.a, self.mix = nn.Conv2d(3, 9, 1), Mixed((3, 2, 4), attribute)
        self.b, self.fc = nn.Conv2d(9, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.b(self.mix(self.a(x)).relu()).mean((2, 3)))


def proven(model, name, removed):
    found = groups_of(model)
    assert found[name].group.prunable, found[name].group.reason
    plan = planned(found, name, removed)
    result = cut(model, IMAGES, plan)
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9
    return result


def round_trip(model, result, path, ref):
    sees = Preprocessing(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    sizes = artifact.changed_geometry(model, result)
    header = ArtifactHeader(arch=ArchSpec(ref=ref), geometry=sizes, preprocessing=sees)
    artifact.save(path, artifact.Network(module=result, header=header))
    again = artifact.load(path, trust=ref)
    with torch.no_grad():
        assert torch.equal(again.module(IMAGES), result(IMAGES))
    return header


@pytest.mark.parametrize("persistent", [True, False])
def test_a_blur_is_cut_with_the_channels_that_it_filters(persistent, tmp_path, monkeypatch):
    model = Blurred(persistent=persistent).eval()
    result = proven(model, "a", (1, 2, 6))
    assert (result.blur.channels, tuple(result.blur.filt.shape)) == (5, (5, 1, 3, 3))
    assert model.blur.channels == 8
    monkeypatch.setattr(f"{__name__}.Stored", lambda: Blurred(persistent=persistent), raising=False)
    header = round_trip(model, result, tmp_path / "cut.safetensors", f"{__name__}:Stored")
    assert header.geometry["blur"] == Geometry(in_channels=5, out_channels=5, groups=5)


def test_a_filter_of_unlike_kernels_keeps_its_channels():
    model = Blurred(same=False)
    assert filter_of(model.blur) is None
    assert filter_of(Blur(4)) == "filt"
    found = groups_of(model)
    assert found["a"].group.reason == "a convolution whose weights are no layer's own reads its channels"
    assert found["b"].group.prunable


def test_parts_of_a_mixed_convolution_lose_their_own_channels(tmp_path):
    model = MixedNet().eval()
    found = groups_of(model)
    assert {name: (c.group.channels, c.group.prunable) for name, c in found.items() if name != "fc"} == {
        "mix.c0": (3, True),
        "mix.c1": (2, True),
        "mix.c2": (4, True),
        "b": (5, True),
    }
    assert {s.layer: s.index for s in found["mix.c1"].slices} == {"mix.c1": (0, 1), "b": (3, 4), "a": (3, 4)}
    result = proven(proven(model, "mix.c0", (2,)), "mix.c2", (0, 1, 3))
    assert result.mix.splits == [2, 2, 1]
    assert [conv.groups for conv in result.mix.values()] == [2, 2, 1]
    assert model.mix.splits == [3, 2, 4]
    round_trip(model, result, tmp_path / "cut.safetensors", f"{__name__}:MixedNet")


def test_a_split_whose_widths_nobody_holds_is_refused():
    found = groups_of(MixedNet("more"))
    assert {found[f"mix.c{i}"].group.reason for i in range(3)} == {
        "a split into fixed widths reads its channels"
    }


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Geometry(in_channels=5, out_channels=4, groups=5), "impossible layer size"),
        (
            Geometry(in_channels=10**9, out_channels=10**9, groups=10**9),
            "recorded size of 'blur' does not fit",
        ),
    ],
)
def test_filters_of_sizes_that_lie(size, message):
    model = Blurred()
    with pytest.raises(CheckpointError, match=message):
        artifact.apply_geometry(model, {"blur": size}, model.state_dict(), what="it")
    assert model.blur.channels == 8
