"""Checkpoints and artifacts of small networks, and what messages about them say."""

import re

import torch

from se_prune import artifact
from se_prune.records import ArchSpec, ArtifactHeader
from se_prune.zoo import registry
from tests.nets import RESIDUAL, ResidualSE

ARCH = "tests.nets:ResidualSE"


def says(*parts):
    """Match a message that holds all parts, in this order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def equal(module, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in module.state_dict().items())


def trained():
    """Return a network whose running statistics are not the initial ones."""
    model = ResidualSE()
    with torch.no_grad():
        model(RESIDUAL.images(4))
    return model.eval()


def seven(path):
    """Write an artifact of seven classes."""
    spec = ArchSpec(ref="zoo:se_resnet20", kwargs={"num_classes": 7})
    module = registry.build(spec)
    preprocessing = registry.default_preprocessing(spec)
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, classes=tuple("abcdefg"))
    artifact.save(path, artifact.Network(module=module, header=header))
    return path
