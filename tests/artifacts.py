"""Networks whose artifacts are written and read, and artifacts written by hand."""

import dataclasses
import json

import torch
from safetensors.torch import save_file

from se_prune.artifact import HEADER_KEY, Network
from se_prune.records import (
    ArchSpec,
    ArtifactHeader,
    Preprocessing,
)
from se_prune.zoo import registry
from tests.nets import DEPTHWISE

GREY32 = Preprocessing(input_size=(1, 32, 32), mean=(0.5,), std=(0.25,))


LINEAR = "tests.nets:DepthwiseSE"


#: Zoo networks, one of a library (stem, depthwise, convolutional head, hard sigmoid), and SE blocks of linear layers.
NETWORKS = {
    "zoo:se_resnet20": ({}, registry.FASHION),
    "zoo:se_mobilenet_x025": ({"num_classes": 4, "in_channels": 2}, None),
    "timm:mobilenetv3_small_050": ({"num_classes": 7, "in_channels": 1}, GREY32),
    "torchvision:mobilenet_v3_small": ({"num_classes": 3}, None),
    LINEAR: ({}, DEPTHWISE.preprocessing),
}


def made(ref, **changes):
    """Return a network with random weights and running statistics that are not the initial ones."""
    kwargs, preprocessing = NETWORKS[ref]
    spec = ArchSpec(ref=ref, kwargs=kwargs)
    module = registry.build(spec)
    preprocessing = preprocessing or registry.default_preprocessing(spec, module)
    if preprocessing.input_size[1] == 224:
        preprocessing = dataclasses.replace(preprocessing, input_size=(preprocessing.input_size[0], 48, 48))
    with torch.no_grad():
        module.train()(torch.randn(8, *preprocessing.input_size))
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, **changes)
    return Network(module=module.eval(), header=header)


def trust(ref):
    return ref if ref == LINEAR else None


def write(path, header, tensors):
    """Write an artifact by hand, with whatever header."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata={HEADER_KEY: text})
    return path
