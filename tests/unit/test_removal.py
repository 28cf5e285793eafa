"""Removing channels from a copy of a network."""

import copy

import pytest
import torch

from se_prune.channels import remove
from se_prune.errors import SurgeryError
from tests.nets import DEPTHWISE, FUNCTIONAL, RESIDUAL


@pytest.fixture
def model():
    return RESIDUAL.build().train()


def shapes(network):
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def test_removing_keeps_the_other_channels_everywhere(model):
    model.blocks[0].conv1.weight.grad = torch.ones(6, 4, 3, 3)
    result = remove(model, RESIDUAL.images(), {"stem": [3, 1], "blocks.1.conv1": [0], "fc": []})
    assert shapes(model) == shapes(RESIDUAL.build())
    assert torch.equal(result.stem.weight, model.stem.weight[[0, 2]])
    assert torch.equal(result.bn.running_var, model.bn.running_var[[0, 2]])
    assert torch.equal(result.blocks[0].conv1.weight, model.blocks[0].conv1.weight[:, [0, 2]])
    assert torch.equal(result.blocks[1].conv1.weight, model.blocks[1].conv1.weight[1:][:, [0, 2]])
    assert torch.equal(result.blocks[1].conv2.weight, model.blocks[1].conv2.weight[[0, 2]][:, 1:])
    assert torch.equal(result.blocks[1].se.expand.bias, model.blocks[1].se.expand.bias[[0, 2]])
    assert torch.equal(result.fc.weight, model.fc.weight[:, [0, 2]])
    assert all(p.grad is None for p in result.parameters())
    assert model.blocks[0].conv1.weight.grad is not None
    assert result.training
    assert result(RESIDUAL.images(2)).shape == (2, 5)


def test_depthwise_convolutions_shrink_with_their_channels():
    net = DEPTHWISE.build().eval()
    result = remove(net, DEPTHWISE.images(), {"stem": [0], "blocks.0.pw": [5, 6]})
    dw = result.blocks[1].dw
    assert (dw.in_channels, dw.out_channels, dw.groups) == (6, 6, 6)
    assert torch.equal(dw.weight, net.blocks[1].dw.weight[[0, 1, 2, 3, 4, 7]])
    assert (result.blocks[0].dw.groups, result.blocks[0].se.fc[0].in_features) == (5, 6)


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ({"stem": [0, 1, 2, 3]}, r"removes every channel of 'stem'; raise --min-channels"),
        ({"blocks.0.se.reduce": [0, 1]}, r"removes every channel of 'blocks\.0\.se\.reduce'"),
        (
            {"layer1.0.conv1": [0]},
            r"cuts 'layer1\.0\.conv1', which this network does not have; plan it again",
        ),
        ({"blocks": [0]}, r"cuts 'blocks', which this network does not have"),
        ({"bn": [0]}, r"cuts 'bn', which this network does not have"),
        ({"stem": [0, 9]}, r"cuts channels \[9\] of 'stem', which has 4; plan it again"),
        ({"stem": [-1]}, r"cuts channels \[-1\] of 'stem', which has 4"),
        ({"stem": [0, 0]}, r"cuts channels \[0, 0\] of 'stem', which has 4"),
    ],
    ids=["all", "all hidden", "unknown", "a container", "a norm", "beyond", "negative", "twice"],
)
def test_plans_of_another_network_are_refused(model, removed, said):
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=said):
        remove(model, RESIDUAL.images(), {"blocks.1.conv1": [2], **removed})
    assert shapes(model) == shapes(RESIDUAL.build())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert shapes(remove(model, RESIDUAL.images(), {"blocks.1.conv1": [2]})) != shapes(model)


def test_the_functional_network_is_cut_through_its_gate():
    net = FUNCTIONAL.build().eval()
    result = remove(net, FUNCTIONAL.images(), {"conv1": [1], "reduce": [0]})
    assert torch.equal(result.expand.weight, net.expand.weight[[0, 2, 3, 4]][:, [1]])
    assert result(FUNCTIONAL.images(2)).shape == (2, 4)
