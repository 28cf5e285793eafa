"""Folded networks in artifacts."""

from dataclasses import replace

import pytest
import torch

from se_prune import artifact
from se_prune.artifact import Network, changed_geometry
from se_prune.errors import CheckpointError
from se_prune.gates.sites import find_sites
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing
from se_prune.surgery.fold import fold
from se_prune.zoo.registry import build
from tests.unit.test_fold import opened, run, some


def saved(name, folder, keep=0):
    """Fold all sites but the first `keep`, save, and return the path with the folded module."""
    model, images = opened(name)
    model = model.float()
    sites = find_sites(model, images.float())[keep:]
    folded, kinds = fold(model, images, some(sites))
    spec = ArchSpec(ref=name)
    size = tuple(images.shape[1:])
    header = ArtifactHeader(
        arch=spec,
        preprocessing=Preprocessing(input_size=size, mean=(0.0,) * size[0], std=(1.0,) * size[0]),
        geometry=changed_geometry(build(spec), folded),
        folded=kinds,
    )
    path = folder / "folded.safetensors"
    artifact.save(path, Network(module=folded, header=header))
    return path, folded, images.float(), header


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("zoo:se_resnet20", 0),
        ("zoo:se_resnet20", 4),
        ("timm:mobilenetv3_small_050", 0),
        ("tests.unit.test_fold:Joined", 0),
    ],
)
def test_an_artifact_brings_a_folded_network_back_bit_for_bit(name, keep, tmp_path):
    path, folded, images, header = saved(name, tmp_path, keep)
    again = artifact.load(path, trust=name)
    assert again.header == header
    assert set(header.folded.values()) == {"scale" if "Joined" in name else "identity"}
    assert torch.equal(run(again.module, images), run(folded, images))
    assert len(find_sites(again.module, images)) == keep


BAD = {
    "gone": ({"layer1.9.se": "identity"}, r"folds 'layer1\.9\.se', which is no SE block"),
    "whole": ({"": "identity"}, "folds '', which is no SE block"),
    "a layer": ({"layer1.0.conv1": "identity"}, r"folds 'layer1\.0\.conv1', which is no SE block"),
    "an activation": ({"layer1.0.relu": "identity"}, "which is no SE block"),
    "nested": ({"layer1.0": "identity", "layer1.0.se": "identity"}, "inside a block that it folds"),
    "a block too many": ({"layer1.0": "identity", "layer1.0.se": None}, "does not fit its architecture"),
    "the other kind": ({"layer1.0.se": "scale"}, "does not fit its architecture"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_folds_something_else_is_refused(case, tmp_path):
    path, folded, _, header = saved("zoo:se_resnet20", tmp_path)
    artifact.load(path)  # the control
    change, message = BAD[case]
    kinds = {name: kind for name, kind in {**header.folded, **change}.items() if kind is not None}
    artifact.save(path, Network(module=folded, header=replace(header, folded=kinds)))
    with pytest.raises(CheckpointError, match=message):
        artifact.load(path)
