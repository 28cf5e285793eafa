"""Options of an architecture in its reference, and what a network says of those that it does not take."""

import pytest
import torch

from se_prune import artifact
from se_prune.checkpoint import open_model
from se_prune.errors import UsageError
from se_prune.records import ArchSpec
from se_prune.zoo import registry
from tests.nets import ResidualSE


def test_options_reach_the_network_and_its_artifact(tmp_path):
    network = open_model("zoo:se_resnet20?reduction=8&num_classes=7&in_channels=3")
    assert network.header.arch == ArchSpec(
        ref="zoo:se_resnet20", kwargs={"reduction": 8, "num_classes": 7, "in_channels": 3}
    )
    assert network.module.layer1[0].se.reduce.out_channels == 2
    assert network.header.preprocessing.input_size == (3, 28, 28)
    artifact.save(tmp_path / "net.safetensors", network)
    again = open_model(tmp_path / "net.safetensors", arch="zoo:se_resnet20?reduction=8")
    assert again.header.arch == network.header.arch


@pytest.mark.parametrize(
    ("ref", "kwargs"),
    [
        ("se_resnet50?placement=pre&se=true", {"placement": "pre", "se": True}),
        ("zoo:se_mobilenet?width=0.5&small_input=false", {"width": 0.5, "small_input": False}),
        ("timm:seresnet50?num_classes=3", {"num_classes": 3}),
        ("tests.nets:ResidualSE?num_classes=3", {"num_classes": 3}),
    ],
)
def test_values_are_read_by_their_looks(ref, kwargs):
    spec = registry.resolve(ref)
    assert spec.kwargs == kwargs
    assert "?" not in spec.ref


def test_a_checkpoint_of_another_reduction_opens(tmp_path):
    state = registry.build(ArchSpec(ref="zoo:se_resnet20", kwargs={"reduction": 8})).state_dict()
    torch.save(state, tmp_path / "net.pth")
    network = open_model(tmp_path / "net.pth", arch="zoo:se_resnet20?reduction=8")
    assert torch.equal(network.module.fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            "zoo:se_resnet20?reductoin=8",
            r"takes no option 'reductoin' \(did you mean 'reduction'\?\); it takes depth",
        ),
        (
            "timm:seresnet50?checkpoint_path=x",
            "takes no option 'checkpoint_path'; it takes in_channels, num_classes",
        ),
        ("tests.nets:ResidualSE?depth=3", "takes no option 'depth'"),
        ("zoo:se_resnet20?reduction", "as NAME=VALUE, each once, with & between them; got 'reduction'"),
        ("zoo:se_resnet20?", "got ''"),
        ("zoo:se_resnet20?reduction=4&reduction=8", "got 'reduction=8'"),
        ("zoo:se_resnet50?placement=befor", "placement takes standard, pre"),
        ("zoo:se_resnet20?reduction=0", "reduction"),
    ],
)
def test_options_that_a_network_does_not_take(ref, message):
    with pytest.raises(UsageError, match=message):
        open_model(ref)
    assert open_model("tests.nets:ResidualSE").module.fc.out_features == ResidualSE().fc.out_features


def test_options_that_disagree_with_what_is_asked_beside():
    with pytest.raises(UsageError, match="has num_classes=7, which does not go with num_classes 5; drop one"):
        open_model("zoo:se_resnet20?num_classes=7", num_classes=5)
    assert open_model("zoo:se_resnet20?num_classes=5", num_classes=5).header.arch.kwargs == {"num_classes": 5}


def test_bundled_weights_have_their_own_options():
    with pytest.raises(
        UsageError, match="the bundled zoo:se_resnet20 has its own reduction; leave that option"
    ):
        open_model("zoo:se_resnet20?reduction=8", pretrained=True)
    assert open_model("zoo:se_resnet20?num_classes=10", pretrained=True).header.classes
