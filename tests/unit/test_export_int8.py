"""int8 in ONNX: 7-bit weights, the layers that stay in float, and what is refused; the arithmetic by hand."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from se_prune.artifact import Network
from se_prune.data import open_data
from se_prune.errors import DropError, UsageError
from se_prune.export import export, int8, noise, qdq
from se_prune.export.base import subject
from se_prune.export.onnx import model_of, session
from se_prune.pipeline import export_network
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing

SIZE = (1, 8, 8)


def network(module, size=SIZE):
    preprocessing = Preprocessing(input_size=size, mean=(0.5,) * size[0], std=(0.25,) * size[0])
    return Network(module=module.eval(), header=ArtifactHeader(
        arch=ArchSpec(ref="mine:net"), preprocessing=preprocessing, classes=("a", "b", "c")
    ))  # fmt: skip


class Gated(nn.Module):
    """Two convolutions, a gate, a sum; the first convolution has one channel with huge weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.reduce, self.expand, self.fc = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        u = torch.relu(self.first(x))
        v = self.second(u)
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(v.mean((2, 3), keepdim=True)))))
        return self.fc(torch.relu(v * gate + u).mean((2, 3)))


@pytest.fixture(scope="module")
def form():
    torch.manual_seed(0)
    exported = subject(network(Gated()), torch.randn(8, *SIZE))
    made = qdq.Int8Form(model_of(exported))
    made.calibrate(exported.images.numpy())
    return made, exported.images.numpy()


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [(-1.0, 1.55, 0.01, 100), (0.5, 2.55, 0.01, 0), (-2.55, -1.0, 0.01, 255), (0.0, 0.0, 1.0, 0)],
)
def test_scale_and_zero_point_by_hand(low, high, scale, zero):
    found = qdq.Range(low, high).affine()
    assert found[0] == pytest.approx(scale)
    assert found[1] == zero


def test_what_can_become_int8(form):
    found = [(c.layer, c.kind, c.dropped is not None, c.last) for c in form[0].candidates]
    assert found == [
        ("first", "Conv", True, False),
        ("second", "Conv", False, False),
        ("reduce", "Conv", True, False),
        ("expand", "Conv", False, False),
        ("mul behind expand", "Mul", False, False),
        ("add behind expand", "Add", True, False),
        ("fc", "Gemm", False, True),
    ]


def weights(model):
    """Return the int8 weights of a model, by the kind of layer that reads them."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = {n.output[0]: n for n in model.graph.node}
    for node in model.graph.node:
        if node.op_type in qdq.WEIGHTED and node.input[1] in made:
            whole, scale = made[node.input[1]].input[:2]
            scale = scale if scale in constants else made[scale].input[0]  # 16 bits, cast when read
            yield node.op_type, constants[whole], constants[scale]


def test_two_products_never_leave_16_bits(form):
    built = form[0].build({c.index for c in form[0].candidates})
    found = list(weights(built))
    assert [kind for kind, _, _ in found] == ["Conv", "Conv", "Conv", "Conv", "Gemm"]
    for _, whole, scale in found:
        assert whole.dtype == np.int8
        assert scale.shape == (whole.shape[0],), "one scale for each output channel"
        assert int(np.abs(whole.astype(int)).max()) == 64, "the range is used"
        assert 2 * 255 * int(np.abs(whole.astype(int)).max()) < 2**15


def test_weights_are_within_half_a_step(form):
    made = form[0]
    built = made.build({c.index for c in made.candidates})
    originals = [v for v in made.weights.values() if v.ndim >= 2]
    for _, whole, scale in weights(built):
        shape = (-1,) + (1,) * (whole.ndim - 1)
        back = whole * scale.reshape(shape)
        [original] = [o for o in originals if o.shape == whole.shape and np.abs(o - back).max() < 0.1]
        assert np.all(np.abs(original - back) <= 0.5001 * scale.reshape(shape))


def test_scales_are_rounded_up_to_16_bits():
    scale = np.array([1.0, 0.1, 1 / 3, 2.0**-14, 3e-3], np.float32)
    found = qdq.up_to_half(scale)
    assert found.dtype == np.float32
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32)), "16 bits hold them"
    assert np.all((scale <= found) & (found <= scale * (1 + 2**-10)))
    assert list(found[[0, 3]]) == [1.0, 2.0**-14]


@pytest.mark.parametrize(("factor", "casts"), [(1.0, 2), (1e-5, 1), (1e7, 0)])
def test_wide_layers_keep_scale_and_bias_in_16_bits_where_these_hold_them(factor, casts):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(1, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 3, bias=False))
    with torch.no_grad():
        wide[0].weight *= factor
        wide[0].bias *= factor
    exported = subject(network(wide), torch.randn(8, *SIZE))
    made = qdq.Int8Form(model_of(exported))
    made.calibrate(exported.images.numpy())
    model = made.build({c.index for c in made.candidates if c.kind == "Conv"})
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    held = [constants[n.input[0]] for n in model.graph.node if n.op_type == "Cast"]
    assert [(v.dtype, v.shape) for v in held] == [(np.float16, (32,))] * casts
    exact, found = (
        session(m.SerializeToString()).run(None, {"images": exported.images.numpy()})[0]
        for m in (made.model, model)
    )
    assert int8.decibel(exact, found) > 25


def test_no_layer_in_int8_is_the_float_graph(form):
    made, images = form
    exact, same = (
        session(m.SerializeToString()).run(None, {"images": images})[0] for m in (made.model, made.build(()))
    )
    assert np.array_equal(exact, same)
    whole = session(made.build({c.index for c in made.candidates}).SerializeToString())
    ratio = int8.decibel(exact, whole.run(None, {"images": images})[0])
    assert 20 < ratio < 60


def test_small_names_change_nothing(form):
    made, images = form
    built = made.build({c.index for c in made.candidates})
    small = qdq.shrink(built)
    results = [session(m.SerializeToString()).run(None, {"images": images})[0] for m in (built, small)]
    assert np.array_equal(*results)
    assert len(small.SerializeToString()) < 0.75 * len(built.SerializeToString())
    onnx.checker.check_model(small, full_check=True)
    assert [v.name for v in (*small.graph.input, *small.graph.output)] == ["images", "logits"]


class Uneven(nn.Module):
    """The last layer reads one feature of hundreds, which it ignores, beside others below one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3, bias=False)
        self.scale = nn.Buffer(torch.tensor([1000.0, *[1.0] * 7]))
        with torch.no_grad():
            self.fc.weight[:, 0] = 0

    def forward(self, x):
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))).amax((2, 3)) * self.scale)


def test_the_layer_that_ruins_the_output_stays_in_float():
    torch.manual_seed(1)
    exported = subject(network(Uneven()), torch.randn(16, *SIZE))
    images = exported.images.numpy()
    uneven = qdq.Int8Form(model_of(exported))
    uneven.calibrate(images)
    uneven.weight_size = lambda candidate: 0  # so small a network has no layer with 1 % of its weights
    kept, layers = noise.choose(uneven, images)
    fc = layers[-1]
    assert (fc.layer, fc.kept_float, fc.inside_db) == ("fc", True, None)
    assert all(fc.alone_db < other.alone_db - 20 for other in layers[:-1])
    every = {c.index for c in uneven.candidates}
    exact = noise._run(uneven, uneven.model, images)
    without, mixed = (noise._noise(uneven, chosen, images, exact) for chosen in (every, every - kept))
    assert mixed > without + 15


def test_large_layers_never_stay_in_float(form):
    made, _ = form
    sizes = [made.weight_size(c) for c in made.candidates]
    assert sizes == [72, 576, 16, 16, 0, 0, 24]
    assert [noise._is_small(made, c) for c in made.candidates] == [
        False,
        False,
        False,
        False,
        True,
        True,
        False,
    ]


def test_logits_before_a_softmax_keep_their_digits():
    torch.manual_seed(0)
    exported = subject(network(Gated()), torch.randn(4, *SIZE), pixels="nchw")
    [last] = [c for c in qdq.Int8Form(model_of(exported)).candidates if c.kind == "Gemm"]
    assert last.last


def test_what_is_not_finite_in_calibration_stays_in_float(form):
    made, images = form
    partly = qdq.Int8Form(made.model)
    partly.ranges = {n: r for n, r in made.ranges.items() if n != made.candidates[0].settled}
    built = partly.build({c.index for c in partly.candidates})
    kinds = [n.op_type for n in built.graph.node]
    assert kinds.count("QuantizeLinear") == 7, "what the gate, the product and the last layer read and give"
    assert kinds.count("Conv") == 4
    assert len(session(built.SerializeToString()).run(None, {"images": images})[0]) == len(images)


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("se_prune")]


def test_the_loss_decides(tmp_path, monkeypatch, caplog):
    data = open_data("fashion-mnist")
    net = network(Gated(), (1, 28, 28))
    images = torch.randn(4, 1, 28, 28)
    monkeypatch.setattr(int8, "_accuracies", lambda *_: (1000, 0.90, 0.88))
    path = tmp_path / "a.onnx"
    with pytest.raises(
        DropError, match=r"int8 file for onnx loses 2\.00 points .*--max-drop allows 1\.00; nothing was kept"
    ):
        export(net, "onnx", path, images, quantised=True, test=data.test, max_drop=0.01)
    assert list(tmp_path.iterdir()) == []
    assert DropError.exit_code == 3
    assert export(net, "onnx", path, images, quantised=True, test=data.test, max_drop=0.03).int8.top1 == 0.88
    assert told(caplog) == []
    export(net, "onnx", path, images, quantised=True, test=data.test)
    assert len(told(caplog)) == 1
    assert "loses 2.00 points" in told(caplog)[0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.5}, r"--max-drop needs test images"),
        (
            {"max_drop": 1.5, "test": ()},
            r"--max-drop is a fraction of the images, 0\.005 for half a point, got 1\.5",
        ),
    ],
)
def test_an_impossible_limit_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export(
            network(Gated()), "onnx", tmp_path / "a.onnx", torch.randn(2, *SIZE), quantised=True, **options
        )
    assert list(tmp_path.iterdir()) == []


def test_a_limit_without_int8_is_refused(tmp_path):
    with pytest.raises(UsageError, match="give it with --int8"):
        export_network(
            network(Gated(), (1, 28, 28)),
            "onnx",
            tmp_path / "a.onnx",
            open_data("fashion-mnist"),
            max_drop=0.1,
        )
