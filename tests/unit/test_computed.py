"""Convolutions that compute their weights: plain ones stand in for them where inputs leave."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from se_prune import artifact
from se_prune.computed import computes_weights, mixes_inputs, plain
from se_prune.errors import CheckpointError, SurgeryError
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing
from se_prune.surgery.cut import cut, verify
from tests.coupled import IMAGES, groups_of, planned


class Standardised(nn.Conv2d):
    """A convolution whose rows are standardised over their inputs, or only scaled."""

    def __init__(self, *sizes, center=True, **options):
        super().__init__(*sizes, **options)
        self.center, self.gain = center, nn.Parameter(torch.rand(sizes[1], 1, 1, 1) + 0.5)

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True) if self.center else 0.0
        return self._conv_forward(x, self.gain * (self.weight - mean), self.bias)


class Padding(Standardised):
    """Pads its input itself, as 'same' convolutions with strides do."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Standardised(3, 6, 3, padding=1), Standardised(6, 4, 3, stride=2, groups=2)
        self.c, self.fc = Standardised(4, 5, 1, bias=False), nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.c(F.silu(self.b(F.silu(self.a(x))))).mean((2, 3)))


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}, {"bias": False}]
)
def test_a_plain_convolution_computes_the_same(options):
    layer = Standardised(4, 6, 3, **options)
    same = plain(layer)
    assert type(same) is nn.Conv2d
    assert torch.allclose(same(torch.ones(1, 4, 9, 9)), layer(torch.ones(1, 4, 9, 9)), atol=1e-5)
    assert not torch.allclose(same.weight, layer.weight, atol=1e-2)


def test_what_is_no_plain_convolution():
    assert plain(Padding(4, 6, 3)) is None
    assert plain(nn.Conv2d(4, 6, 3)) is None
    assert (mixes_inputs(Standardised(4, 6, 3)), mixes_inputs(Standardised(4, 6, 3, center=False))) == (
        True,
        False,
    )
    assert not mixes_inputs(nn.Conv2d(4, 6, 3))


def test_inputs_leave_standardised_convolutions(tmp_path):
    model = Net().eval()
    found = groups_of(model)
    assert [name for name, c in found.items() if c.group.prunable] == ["a", "b", "c"]
    plan = planned(found, "a", (0, 3))
    result = cut(model, IMAGES, plan)
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9
    broken = copy.deepcopy(result)
    with torch.no_grad():
        broken.b.weight[0] += 1
    with pytest.raises(
        SurgeryError, match=r"the tensor 'b\.weight' of the cut network is not what the plan makes"
    ):
        verify(model, broken, tuple(found.values()), plan, IMAGES)
    assert [computes_weights(layer) for layer in (result.a, result.b, result.c)] == [True, False, True]
    assert computes_weights(model.b)
    sees = Preprocessing(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    ref = f"{__name__}:Net"
    dense = artifact.Network(module=model, header=ArtifactHeader(arch=ArchSpec(ref=ref), preprocessing=sees))
    header = ArtifactHeader(
        arch=dense.header.arch,
        geometry=artifact.changed_geometry(model, result),
        plain=artifact.made_plain(dense, result),
        preprocessing=sees,
    )
    assert header.plain == ("b",)
    artifact.save(tmp_path / "cut.safetensors", artifact.Network(module=result, header=header))
    again = artifact.load(tmp_path / "cut.safetensors", trust=ref)
    with torch.no_grad():
        assert torch.equal(again.module(IMAGES), result(IMAGES))
    # once more: what is plain stays so
    more = groups_of(again.module)
    plan = planned(more, "b", (1, 2))
    smaller = cut(again.module, IMAGES, plan)
    assert verify(again.module, smaller, tuple(more.values()), plan, IMAGES) <= 1e-9
    assert artifact.made_plain(again, smaller) == ("b", "c")


@pytest.mark.parametrize("name", ["fc", "gone", "", "a.b"])
def test_names_that_lie(name):
    with pytest.raises(CheckpointError, match=f"calls '{name}' plain"):
        artifact.make_plain(Net(), [name], what="it")


def test_a_convolution_that_pads_its_input_itself_keeps_its_inputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Padding(4, 5, 1), nn.Conv2d(5, 2, 9)).eval()
    found = groups_of(model)
    assert found["0"].group.reason == "1 computes its weights from all its inputs together"
    assert found["1"].group.prunable


def test_gains_leave_with_their_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Standardised(4, 5, 1, center=False), nn.Conv2d(5, 2, 8)).eval()
    found = groups_of(model)
    assert found["0"].group.prunable
    plan = planned(found, "1", (1, 2))
    result = cut(model, IMAGES, plan)
    assert result[1].gain.shape == (3, 1, 1, 1)
    assert verify(model, result, tuple(found.values()), plan, IMAGES) <= 1e-9
