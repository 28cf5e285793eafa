"""ONNX files that are refused, each in a sentence of its own."""

import numpy as np
import onnx
import pytest

from se_prune.checkpoint import open_model
from se_prune.errors import CheckpointError, UsageError
from se_prune.onnx_file import nodes as onnx_nodes
from se_prune.zoo import steps
from tests.onnx_graphs import PADDLE, model, paddle, save
from tests.unit.test_onnx_file import HEAD, normal


def refused(tmp_path, proto, match, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        open_model(save(tmp_path, proto), **options)
    assert len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 200, -40])
def test_a_file_that_is_cut_short(tmp_path, keep):
    path = save(tmp_path, paddle())
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="copy or download it again"):
        open_model(path)
    path.write_bytes(content)
    assert open_model(path)


def test_a_text_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"whole ONNX file; copy or download it again"):
        open_model(path)


@pytest.mark.parametrize("in_nodes", [False, True])
def test_weights_in_another_file_are_not_opened(tmp_path, in_nodes):
    proto = paddle(in_nodes=in_nodes)
    tensors = [n.attribute[0].t for n in proto.graph.node if n.op_type == "Constant"]
    tensor = [*proto.graph.initializer, *tensors][0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    refused(tmp_path, proto, "keeps 'stem_weights' in another file, which is not opened")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (
            "o = Relu (n)",
            "o = Det (n)",
            r"the operator Det \(o\) is not read; those of classifiers are: Add, ",
        ),
        ("o = Relu (n)", "o = com.microsoft.Gelu (n)", r"Gelu is of the domain 'com\.microsoft'"),
        (
            "y = Softmax <axis = 1> (t)",
            "y = Reshape (t, shape_y)",
            r"gives \[1, 4, 1, 1\] .*only classifiers",
        ),
        (
            "y = Softmax <axis = 1> (t)",
            "y = ReduceMean <axes = [1]> (t)",
            r"gives \[1, 1\] .*only classifiers",
        ),
        ("y = Softmax <axis = 1> (t)", "y = Identity (fc_offset)", r"output does not depend on the images"),
        ("q = Reshape (p, shape_out)", "q = Reshape (p, shape_y)", r"Reshape \(q\) is not read: it makes"),
        ("r = MatMul (q, fc_weights)", "r = MatMul (q, shape_y)", "MatMul"),
        ("v = Mul (u, s)", "v = Mul (u, odd)", r"Mul \(v\) is not read: a constant of shape \(8, 8\)"),
        (
            "t = Add (r, fc_offset)",
            "t = Mul (r, fc_offset)",
            r"Mul \(t\) is not read: .*on maps \(N, C, H, W\)",
        ),
        ("j = Relu (i)", "j = Softmax <axis = 1> (i)", r"Softmax \(j\) is not read: it is over axis 1 of 4"),
    ],
)
def test_what_is_no_classifier_or_not_read(tmp_path, old, new, match):
    assert old in PADDLE
    values = {
        "shape_y": np.array([4, 1, 1, 1]) if "q = " in old else np.array([1, 4, 1, 1]),
        "odd": normal(8, 8),
    }
    proto = paddle(PADDLE.replace(old, new), outputs="float y" if old[0] == "y" else "float[1,4] y", **values)
    if "com.microsoft" in new:
        proto.opset_import.add(domain="com.microsoft", version=1)
    refused(tmp_path, proto, match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inputs": "float[1,3,8,8] x, float[1,3,8,8] other"}, r"inputs x \[1, 3, 8, 8\]; other .* has one of shape"),
        ({"inputs": "float[1,192] x"}, r"inputs x \[1, 192\], .* has one of shape \(N, C, H, W\)"),
        ({"inputs": "double[1,3,8,8] x"}, "does not take float32 images"),
        ({"inputs": "float[1,3,999999,999999] x"}, "which no classifier does"),
        ({"outputs": "float[1,4] y, float[1,5] q"}, r"has 2 outputs \(y, q\), and a classifier has one"),
        ({"opset": 6}, r"is of opset 6, and opsets 7 to \d+ are read"),
        ({"fc_weights": normal(5, 4).astype(np.float16)}, "'fc_weights' is of type float16"),
        ({"fc_weights": np.full((5, 4), np.nan, np.float32)}, "'fc_weights' holds NaN"),
        ({"stem_weights": normal(6, 2, 3, 3)}, r"Conv \(a\) is not read"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_be(tmp_path, options, match):
    refused(tmp_path, paddle(**options), match)


def test_control_flow_functions_and_sparse_weights(tmp_path):
    proto = paddle()
    branch = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["n"], ["o"])], "b", [], [])
    relu = next(node for node in proto.graph.node if node.output[0] == "o")
    relu.op_type = "If"
    relu.attribute.append(onnx.helper.make_attribute("then_branch", branch))
    refused(tmp_path, proto, r"has control flow \(If\)")
    proto = paddle()
    proto.functions.add(name="f", domain="mine")
    refused(tmp_path, proto, "holds functions or sparse tensors")


@pytest.mark.parametrize(
    ("body", "values", "match"),
    [
        ("c = ConstantOfShape (huge) d = ReduceMean (c) z = Mul (x, d)", {"huge": np.array([2**20] * 4)}, "of up to"),
        ("c = Expand (one, huge) z = Add (x, c)", {"one": np.float32([1]), "huge": np.array([2**20] * 3)}, "of up to"),
        ("c = Mul (tall, wide) z = Add (x, c)", {"tall": normal(9999, 1), "wide": normal(1, 9999)}, "of up to"),
        ("c = Expand (x, huge) z = Relu (c)", {"huge": np.array([1, 3, 8, 8])}, None),
        ("z = Pad (x, pads)", {"pads": np.array([0, 0, 2**40, 0, 0, 0, 0, 0])}, r"Pad \(z\)|would make"),
        ("z = Conv <pads = [90000, 90000, 0, 0]> (x, w)", {"w": normal(3, 3, 1, 1)}, "would make"),
    ],
    ids=["fill", "constant expand", "outer product", "control", "pad", "conv"],
)  # fmt: skip
def test_files_that_would_take_all_memory(tmp_path, body, values, match):
    proto = model(body + HEAD, {**values, "fc": normal(3, 3)})
    if match is None:
        assert open_model(save(tmp_path, proto))
    else:
        refused(tmp_path, proto, match)


def test_what_the_output_does_not_need_is_not_run(tmp_path):
    body = PADDLE + "bomb = ConstantOfShape (huge) boom = com.other.Boom (bomb)"
    proto = paddle(PADDLE, huge=np.array([2**30, 2**30]))
    bomb = paddle(body.replace("com.other.Boom", "Relu"), huge=np.array([2**30, 2**30]))
    assert len(bomb.graph.node) == len(proto.graph.node) + 2
    assert open_model(save(tmp_path, bomb))


def test_a_difference_from_onnxruntime_names_the_first_operator(tmp_path, monkeypatch):
    path = save(tmp_path, paddle())
    monkeypatch.setitem(
        steps.OPERATIONS, "hardsigmoid", lambda x, alpha, beta: (x * alpha + beta).clamp(0, 0.5)
    )
    with pytest.raises(
        CheckpointError, match=r"differs from onnxruntime by .* operator HardSigmoid \(s\) on"
    ):
        open_model(path)


def test_the_table_holds_operators_of_onnx():
    assert len(onnx_nodes.NODES) > 30
    assert {"Conv", "BatchNormalization", "HardSigmoid", "Gemm", "Softmax"} <= set(onnx_nodes.NODES)
    assert set(onnx_nodes.NODES) <= {schema.name for schema in onnx.defs.get_all_schemas()}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"arch": "zoo:se_resnet20"}, UsageError, "holds its own graph .*leave --arch and --ema out"),
        ({"ema": True}, UsageError, "leave --arch and --ema out"),
        ({"pretrained": True}, UsageError, "leave --pretrained out"),
        ({"num_classes": 3}, CheckpointError, "has 4 classes, not 3"),
    ],
)
def test_options_that_do_not_go_with_a_file(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        open_model(save(tmp_path, paddle()), **options)


@pytest.mark.parametrize("ref", ["onnx:net", "missing.onnx"])
def test_a_file_that_is_not_there(ref, tmp_path):
    with pytest.raises((UsageError, CheckpointError), match=r"give net\.onnx|missing\.onnx does not exist"):
        open_model(ref)
