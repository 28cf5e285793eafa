"""The group lasso: which parameters scale which channel, its value and gradient, and what training with it shrinks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.data.source import DataSource
from se_prune.errors import UsageError
from se_prune.pipeline import finetune, structure
from se_prune.pipeline.scales import scaled_groups
from se_prune.records import ArchSpec, ArtifactHeader
from se_prune.settings import TrainSettings
from se_prune.training.lasso import ChannelScale, GroupLasso, ScaledGroup
from tests.nets import DepthwiseSE, ResidualSE
from tests.tiny import GREY, stripes

CPU = torch.device("cpu")
SETTINGS = TrainSettings(epochs=8, batch_size=24, lr=0.05, flip=0.0, crop_padding=0, amp="off")
STRONG = replace(SETTINGS, group_lasso=0.2, group_lasso_ramp=0.25)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2)
        self.expand = nn.Conv2d(2, 3, 1)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([3.0, 1.0]))
            self.expand.weight.copy_(torch.tensor([[9.0, 9.0], [0.0, 4.0], [1.0, 1.0]]).view(3, 2, 1, 1))


def toy(**options):
    """A group of two channels; its gate's rows are 1 and 2 of three."""
    model = Toy()
    group = ScaledGroup(
        name="a",
        channels=2,
        scales=(
            ChannelScale(parameter="bn.weight", index=torch.tensor([0, 1]), root=torch.tensor([0, 1])),
            ChannelScale(parameter="expand.weight", index=torch.tensor([1, 2]), root=torch.tensor([0, 1])),
        ),
    )
    settings = replace(SETTINGS, **({"group_lasso": 0.5, "group_lasso_ramp": 0.0} | options))
    return model, GroupLasso(model, [group], settings)


def test_the_penalty_is_the_sum_of_the_channels_norms():
    model, lasso = toy()
    penalty = lasso(0, 10)
    assert penalty.item() == pytest.approx(0.5 * (5.0 + 3.0**0.5))  # √(3² + 4²) and √(1² + 1² + 1²)
    penalty.backward()
    assert model.bn.weight.grad.tolist() == pytest.approx([0.5 * 3 / 5, 0.5 / 3**0.5])
    rows = model.expand.weight.grad.flatten(1)
    assert rows[0].tolist() == [0.0, 0.0]  # a channel of no group
    assert rows[1].tolist() == pytest.approx([0.0, 0.5 * 4 / 5])
    assert model.expand.bias.grad is None


def test_the_strength_rises_to_its_full_value():
    _, lasso = toy(group_lasso=0.4, group_lasso_ramp=0.5)
    assert [lasso.at(step, 8) for step in (0, 1, 3, 7)] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    _, lasso = toy(group_lasso=0.4, group_lasso_ramp=0.0)
    assert lasso.at(0, 8) == 0.4


def network(cls=DepthwiseSE):
    torch.manual_seed(3)
    header = ArtifactHeader(arch=ArchSpec(ref="in hand"), preprocessing=GREY, classes=("a", "b", "c"))
    module = cls(num_classes=3, in_channels=1) if cls in {DepthwiseSE, ResidualSE} else cls()
    return Network(module=module.eval(), header=header)


def test_a_stream_is_scaled_by_every_bn_that_writes_to_it_and_by_the_rows_of_its_gates():
    net = network(ResidualSE)
    found = structure(net)
    groups = {group.name: group for group in scaled_groups(net, found)}
    kinds = {coupling.group.name: coupling.group.kind for coupling in found.couplings}
    assert "hidden" in kinds.values()
    assert not [name for name in groups if kinds[name] == "hidden"]
    expands = {f"{site.expand}.weight" for site in found.sites}
    of_gates = {s.parameter for g in groups.values() for s in g.scales} & expands
    assert of_gates == expands
    (stream,) = (group for name, group in groups.items() if kinds[name] == "stream")
    assert len([s for s in stream.scales if s.parameter not in expands]) >= 2
    assert all(len(s.index) == stream.channels for s in stream.scales)


def trained(settings):
    net = network()
    split = stripes(96)
    data = DataSource(ref="stripes", classes=("a", "b", "c"), train=split, test=split.take(torch.arange(0)))
    return net, finetune(net, data, settings, device=CPU)


def scale_of(net, before):
    """Return, of the norms of all channels that can leave, the mean."""
    lasso = GroupLasso(net.module, scaled_groups(before, structure(before)), STRONG)
    return torch.cat(lasso.norms()).mean().item()


def test_training_shrinks_what_can_leave_and_leaves_the_rest():
    net, plain = trained(SETTINGS)
    _, sparse = trained(STRONG)
    assert scale_of(sparse, net) < 0.6 * scale_of(plain, net)
    held = {s.parameter for g in scaled_groups(net, structure(net)) for s in g.scales}
    sizes = [
        {
            n: float(p.detach().norm())
            for n, p in tuned.module.named_parameters()
            if n not in held and p.ndim > 1
        }
        for tuned in (plain, sparse)
    ]
    assert len(sizes[0]) > 4
    for name, size in sizes[0].items():
        assert sizes[1][name] > 0.8 * size, name


def test_without_strength_nothing_changes():
    _, plain = trained(SETTINGS)
    _, again = trained(replace(SETTINGS, group_lasso_ramp=0.1))
    ours, theirs = plain.module.state_dict(), again.module.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_network_without_bn_and_gates_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))

    net = network(Bare)
    with pytest.raises(UsageError, match="neither at channels that can leave; set it to 0"):
        scaled_groups(net, structure(net))
