"""Opening ONNX classifiers: what other tools write is read, and equals onnxruntime; the rest ends in a sentence."""

import json
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.errors import UsageError
from se_prune.export import export
from se_prune.gates.sites import find_sites
from se_prune.records import ArchSpec, ArtifactHeader
from se_prune.zoo import steps
from tests import nets
from tests.onnx_graphs import PADDLE, model, paddle, save

#: A head behind a snippet that makes `z` of the images `x`.
HEAD = " p = GlobalAveragePool (z) q = Flatten (p) y = Gemm <transB = 1> (q, fc)"


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(0, 1, shape).astype(np.float32)


def images(n=3, size=(3, 8, 8)):
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(1))


def reference(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]


# What is read.


def test_a_network_of_constant_nodes_that_takes_one_image_opens_for_any_batch(tmp_path):
    path = save(tmp_path, paddle())
    network = open_model(path)
    assert network.header.arch.ref == "onnx:net"
    (site,) = find_sites(network.module, images(1))
    assert (site.channels, site.hidden, site.reduce, site.expand) == (6, 2, "se_1", "se_2")
    assert site.features == "stem"
    x = images(3)
    expected = np.concatenate([reference(path, x[i : i + 1]) for i in range(3)])
    with torch.no_grad():
        logits = network.module(x)
    np.testing.assert_allclose(logits.softmax(1).numpy(), expected, atol=1e-6)
    assert abs(float(logits.sum(1)[0]) - 1) > 0.01, "logits, not probabilities"
    assert isinstance(network.module.stem_bn, torch.nn.BatchNorm2d)
    assert network.module.fc.bias is not None, "an addition behind a product is its bias"
    assert network.module.se_1.bias is not None


def test_a_flipped_weight_would_be_seen(tmp_path):
    """The control of the comparison: another weight gives other numbers."""
    path = save(tmp_path, paddle(fc_offset=np.zeros(4, np.float32)))
    other = save(tmp_path, paddle(), "other.onnx")
    assert np.abs(reference(path, images(1)) - reference(other, images(1))).max() > 1e-2


@pytest.fixture(scope="module", params=sorted(nets.ALL))
def exported(request, tmp_path_factory):
    """One of our tiny networks, and its file as our own export writes it."""
    torch.manual_seed(0)
    facts = nets.ALL[request.param]
    module = facts.build().eval()
    classes = tuple(f"class {i}" for i in range(facts.classes))
    header = ArtifactHeader(arch=ArchSpec(ref="mine:net"), preprocessing=facts.preprocessing, classes=classes)
    path = tmp_path_factory.mktemp(request.param) / "own.onnx"
    export(Network(module=module, header=header), "onnx", path, facts.images(4))
    return facts, module, header, path


def test_our_own_export_opens_again(exported, caplog):
    facts, module, header, path = exported
    network = open_model(path)
    assert network.header.preprocessing == header.preprocessing
    assert network.header.classes == header.classes
    assert caplog.records == [], "nothing is assumed of a file that says it all"
    with torch.no_grad():
        torch.testing.assert_close(network.module(facts.images(5)), module(facts.images(5)))
    sites = {s.name: (s.channels, s.hidden, s.reduce, s.expand) for s in find_sites(module, facts.images())}
    again = find_sites(network.module, facts.images())
    assert {(s.channels, s.hidden, s.reduce, s.expand) for s in again} == set(sites.values())
    assert set(facts.per_layer) == {n for n, m in network.module.named_modules() if hasattr(m, "weight")}


SNIPPETS = {
    "conv with a bias": ("z = Conv <pads = [1, 1, 1, 1]> (x, w, c)", {"w": normal(4, 3, 3, 3), "c": normal(4)}),
    "uneven padding": (
        "z = Conv <auto_pad = \"SAME_UPPER\", strides = [2, 2], kernel_shape = [3, 3]> (x, w)",
        {"w": normal(4, 3, 3, 3)},
    ),
    "depthwise, dilated": (
        "a = Conv (x, e) z = Conv <group = 4, dilations = [2, 2]> (a, w)",
        {"e": normal(4, 3, 1, 1), "w": normal(4, 1, 3, 3)},
    ),
    "normalised inside": (
        "a = Sub (x, mean) b = Div (a, std) z = Conv (b, w)",
        {"mean": normal(3, 1, 1), "std": 2 + np.abs(normal(1, 3, 1, 1)), "w": normal(4, 3, 1, 1)},
    ),
    "a constant minus a map": ("a = Sub (one, x) z = Conv (a, w)", {"one": np.float32(1), "w": normal(4, 3, 1, 1)}),
    "constant first": (
        "a = Conv (x, w) b = Mul (half, a) z = Add (shift, b)",
        {"w": normal(4, 3, 1, 1), "half": np.float32([0.5]), "shift": normal(4, 1, 1)},
    ),
    "a bias that another node reads without it": (
        "a = Conv (x, w) b = Add (a, shift) z = Mul (a, b)",
        {"w": normal(4, 3, 1, 1), "shift": normal(1, 4, 1, 1)},
    ),
    "max pool, uneven": (
        "a = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [0, 0, 1, 1]> (x) z = Conv (a, w)",
        {"w": normal(4, 3, 1, 1)},
    ),
    "average pool, padding counted": (
        "a = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x) z = Conv (a, w)",
        {"w": normal(4, 3, 1, 1)},
    ),
    "average pool, padding left out": (
        "a = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x) z = Conv (a, w)",
        {"w": normal(4, 3, 1, 1)},
    ),
    "pad": (
        "a = Pad (x, pads, value) z = Conv (a, w)",
        {"pads": np.array([0, 0, 1, 0, 0, 0, 2, 1]), "value": np.float32(0.5), "w": normal(4, 3, 3, 3)},
    ),
    "concatenation and activations": (
        "a = Conv (x, w) b = Sigmoid (a) c = Tanh (a) d = LeakyRelu (a) e = Elu (a) f = Softplus (a) "
        "z = Concat <axis = 1> (b, c, d, e, f)",
        {"w": normal(1, 3, 1, 1)},
    ),
    "shape arithmetic": (
        "a = Conv (x, w) b = ReduceMean <axes = [2, 3]> (a) s = Shape (a) i = Gather (s, zero) j = Unsqueeze (i, at) "
        "k = Concat <axis = 0> (j, rest) c = Reshape (b, k) z = Expand (c, s)",
        {"w": normal(4, 3, 1, 1), "zero": np.array(0), "at": np.array([0]), "rest": np.array([-1, 1, 1])},
    ),
    "a channel shuffle": (
        "a = Reshape (x, five) b = Transpose <perm = [0, 2, 1, 3, 4]> (a) c = Reshape (b, four) z = Conv (c, w)",
        {"five": np.array([0, 3, 1, 8, 8]), "four": np.array([0, -1, 8, 8]), "w": normal(4, 3, 1, 1)},
    ),
    "nothing to do": (
        "a = Dropout (x) b = Identity (a) c = Cast <to = 1> (b) e = Clip (c) z = Conv (e, w)",
        {"w": normal(4, 3, 1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SNIPPETS))
def test_operators_of_classifiers(tmp_path, name):
    body, values = SNIPPETS[name]
    made = 5 if name.startswith("concatenation") else 4
    path = save(tmp_path, model(body + HEAD, {**values, "fc": normal(3, made)}))
    network = open_model(path, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert network.header.history[0].details["onnxruntime_difference"] < 1e-5
    np.testing.assert_allclose(network.module(images(5)).detach(), reference(path, images(5)), atol=1e-4)


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (11, "a = Unsqueeze <axes = [4]> (x) b = Squeeze <axes = [4]> (a) z = Clip (b, low, high)"),
        (13, "a = Unsqueeze (x, at) b = Squeeze (a, at) z = Clip (b, low, high)"),
        (9, "z = Clip <min = -0.5, max = 0.7> (x)"),
        (18, "a = ReduceMean <keepdims = 0> (x, sides) b = Unsqueeze (a, sides) z = Add (x, b)"),
        (14, "z = HardSwish (x)"),
        (20, "z = Gelu (x)"),
    ],
)
def test_what_newer_opsets_moved_from_attributes_to_inputs(tmp_path, opset, body):
    values = {
        "at": np.array([4]), "sides": np.array([2, 3]), "low": np.float32(-0.5), "high": np.float32(0.7),
        "w": normal(4, 3, 1, 1), "fc": normal(3, 4), "shift": normal(3),
    }  # fmt: skip
    head = HEAD.replace("(z)", "(last)").replace("fc)", "fc, shift)")
    path = save(tmp_path, model(f"{body} last = Conv (z, w){head}", values, opset=opset))
    network = open_model(path, mean=(0.5,) * 3, std=(0.5,) * 3)
    np.testing.assert_allclose(network.module(images()).detach(), reference(path, images()), atol=1e-4)


@pytest.mark.parametrize(
    ("last", "final"),
    [("y = LogSoftmax <axis = 1> (t)", "log_softmax"), ("y = Sigmoid (t)", "sigmoid"), ("y = Identity (t)", "none")],
)  # fmt: skip
def test_what_the_network_ends_with_is_taken_off_and_put_back(tmp_path, last, final):
    path = save(tmp_path, paddle(PADDLE.replace("y = Softmax <axis = 1> (t)", last)))
    network = open_model(path)
    assert network.module.steps.final == final
    logits = network.module(images(1)).detach()
    expected = reference(path, images(1))
    np.testing.assert_allclose(steps.FINALS[final](logits), expected, atol=1e-5)
    assert final == "none" or np.abs(logits.numpy() - expected).max() > 0.1
    result = export(network, "onnx", tmp_path / "again.onnx", images(4))
    assert result.max_abs_diff < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "again.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == ("logits" if final == "none" else "probabilities")
    np.testing.assert_allclose(reference(tmp_path / "again.onnx", images(1)), expected, atol=1e-5)
    metadata = {item.key: item.value for item in onnx.load(tmp_path / "again.onnx").metadata_props}
    assert json.loads(metadata["se_prune.arch"]) == {"ref": "onnx:net", "kwargs": {}}


# Size and preprocessing of the images.


def test_an_open_size_is_asked_for(tmp_path):
    body, values = SNIPPETS["conv with a bias"]
    path = save(tmp_path, model(body + HEAD, {**values, "fc": normal(3, 4)}, inputs="float[N,3,H,W] x"))
    with pytest.raises(UsageError, match=r"leaves the size of its images open \(3,\?,\?\); add --input-size"):
        open_model(path)
    assert open_model(path, input_size=(6, 10)).header.preprocessing.input_size == (3, 6, 10)
    open_ = save(tmp_path, model(body + HEAD, {**values, "fc": normal(3, 4)}, inputs="float[N,C,H,W] x"))
    assert open_model(open_, input_size=(6, 10)).header.preprocessing.input_size == (3, 6, 10)


@pytest.mark.parametrize("size", [(16, 16), (3, 8, 9), (1, 8, 8)])
def test_a_fixed_size_stays(tmp_path, size):
    with pytest.raises(UsageError, match=r"takes images of 3,8,8 alone, not .*; leave --input-size out"):
        open_model(save(tmp_path, paddle()), input_size=size)


def test_a_normalisation_that_is_assumed_is_announced(tmp_path, caplog):
    path = save(tmp_path, paddle())
    with caplog.at_level(logging.WARNING, "se_prune"):
        assert open_model(path).header.preprocessing.mean == (0.485, 0.456, 0.406)
        (record,) = caplog.records
        assert "ImageNet's mean and deviation are assumed" in record.getMessage()
        caplog.clear()
        assert open_model(path, mean=(0.5,) * 3, std=(0.25,) * 3).header.preprocessing.std == (0.25,) * 3
    assert caplog.records == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("mean", "[1, 2]"), ("std", "[0, 1, 1]"), ("mean", "[1e999, 0, 0]"), ("std", "no"), ("mean", "[[[")],
)
def test_metadata_that_mean_nothing_are_left_alone(tmp_path, key, value):
    proto = paddle()
    stated = {"mean": "[0.1, 0.2, 0.3]", "std": "[1, 1, 1]", "classes": '["a", "b"]', key: value}
    for name, text in stated.items():
        proto.metadata_props.add(key=f"se_prune.{name}", value=text)
    network = open_model(save(tmp_path, proto))
    assert network.header.preprocessing.mean == (0.485, 0.456, 0.406)
    assert network.header.classes == (), "two names for four classes"
