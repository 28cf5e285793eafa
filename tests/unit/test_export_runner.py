"""Preprocessing inside the file, and predict.py in a process where importing torch or se_prune fails."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from se_prune.checkpoint import open_model
from se_prune.data import open_data
from se_prune.errors import SePruneError, UsageError
from se_prune.export import runner
from se_prune.export.base import FromPixels, to_pixels
from se_prune.export.onnx import session
from se_prune.pipeline import export_network

FORBID = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "se_prune", %s}:
            raise ImportError(f"{name} is forbidden here")
sys.meta_path.insert(0, Forbid())
script = sys.argv[1]
del sys.argv[0]
%s
import runpy
runpy.run_path(script, run_name="__main__")
"""


def predict(place, *arguments, more="", first=""):
    """Run predict.py without torch and se_prune."""
    line = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        FORBID % (more, first),
        str(place / "predict.py"),
        *map(str, arguments),
    ]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=place)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a network in three forms, predict.py and twelve test images, and what torch says of them."""
    folder = tmp_path_factory.mktemp("shipped")
    data, net = open_data("fashion-mnist"), open_model("zoo:se_mobilenet_x025", pretrained=True)
    export_network(net, "onnx", folder / "plain.onnx", data, images=8, with_runner=True)
    for layout in ("nhwc", "nchw"):
        result = export_network(net, "onnx", folder / f"{layout}.onnx", data, images=8, pixels=layout)
        assert (result.input, result.top1_agreement) == (f"uint8 {layout}", 1.0)
        assert result.max_abs_diff < 1e-5
    few = data.test.take(torch.arange(12))
    images, _ = next(few.batches(12, net.header.preprocessing))
    with torch.no_grad():
        expected = net.module.eval()(images).softmax(1).numpy()
    return folder, few.images.numpy(), expected, net


def test_bytes_in_probabilities_out(place):
    folder, pixels, expected, _ = place
    for name, fed in (("nchw", pixels), ("nhwc", pixels.transpose(0, 2, 3, 1))):
        opened = session(folder / f"{name}.onnx")
        [value] = opened.get_inputs()
        assert (value.type, value.shape[1:]) == ("tensor(uint8)", list(fed.shape[1:]))
        found = opened.run(["probabilities"], {"images": np.ascontiguousarray(fed)})[0]
        assert found == pytest.approx(expected, abs=1e-5)
        assert found.sum(1) == pytest.approx(1)


def test_bytes_survive_the_way_to_the_network_and_back(place):
    _, pixels, _, net = place
    preprocessing = net.header.preprocessing
    images = (torch.from_numpy(pixels) / 255 - preprocessing.mean[0]) / preprocessing.std[0]
    assert np.array_equal(to_pixels(images, preprocessing, "nchw").numpy(), pixels)
    identity = FromPixels(torch.nn.Flatten(), preprocessing, "nhwc")
    identity.logits = False
    back = identity(to_pixels(images, preprocessing, "nhwc"))
    assert torch.allclose(back, images.flatten(1), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "nhwc", "nchw"])
def test_predict_agrees_with_torch_in_a_process_without_it(place, name):
    folder, pixels, expected, net = place
    np.save(folder / "images.npy", pixels)
    done = predict(folder, f"{name}.onnx", "images.npy", "--json", "--top", 2, "--batch", 5)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == list(range(12))
    assert [row["top"][0]["label"] for row in rows] == expected.argmax(1).tolist()
    assert [row["top"][0]["probability"] for row in rows] == pytest.approx(expected.max(1).tolist(), abs=1e-5)
    assert [row["top"][0]["class"] for row in rows] == [net.header.classes[i] for i in expected.argmax(1)]
    assert len(rows[0]["top"]) == 2


def test_torch_really_is_forbidden_there(place):
    done = predict(place[0], "plain.onnx", "images.npy", first="import torch")
    assert done.returncode == 1
    assert "torch is forbidden here" in done.stderr


def forms(folder, pixels):
    """Write the first image in every form that predict.py reads; all but the last need no Pillow."""
    image = pixels[0, 0]
    (folder / "a-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 1, 28, 28) + image.tobytes())
    (folder / "b.pgm").write_bytes(b"P5\n28 28\n255\n" + image.tobytes())
    np.save(folder / "c.npy", image[None, :, :, None])
    np.save(folder / "d.npy", image[None])
    Image.fromarray(image).save(folder / "e.png")
    return ["a-idx3-ubyte", "b.pgm", "c.npy", "d.npy", "e.png"]


def test_every_form_of_an_image_gives_the_same_answer(place):
    folder, pixels, expected, _ = place
    names = forms(folder, pixels)
    done = predict(folder, "plain.onnx", *names, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file"] for row in rows] == names
    assert {row["top"][0]["probability"] for row in rows} == {rows[0]["top"][0]["probability"]}
    assert rows[0]["top"][0]["probability"] == pytest.approx(expected[0].max(), abs=1e-5)
    without = predict(folder, "plain.onnx", *names[:-1], more="'PIL'")
    assert without.stdout.count("%") == 4
    told = predict(folder, "plain.onnx", names[-1], more="'PIL'")
    assert (told.returncode, told.stdout) == (1, "")
    assert "e.png needs Pillow to be read" in told.stderr


def test_a_larger_picture_is_resized_and_cropped(place):
    folder, pixels, expected, _ = place
    larger = Image.fromarray(pixels[0, 0]).resize((96, 96), Image.Resampling.BICUBIC)
    framed = Image.new("L", (112, 112))
    framed.paste(larger, (8, 8))
    framed.convert("RGB").save(folder / "large.png")
    done = predict(folder, "plain.onnx", "large.png", "--json")
    assert json.loads(done.stdout)["top"][0]["label"] == expected[0].argmax()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx", "images.npy"], "there is no file none.onnx"),
        (["predict.py", "images.npy"], "predict.py is none of the files that this program runs"),
        (["plain.onnx", "none.npy"], "none.npy cannot be read"),
        (["plain.onnx", "wide.npy"], r"wide.npy holds images of (1, 28, 30), the network takes (1, 28, 28)"),
        (["plain.onnx", "floats.npy"], "it holds float64 (2, 28, 28)"),
    ],
)
def test_a_mistake_is_told_in_one_line(place, arguments, message):
    folder = place[0]
    np.save(folder / "images.npy", place[1])
    np.save(folder / "wide.npy", np.zeros((2, 28, 30), np.uint8))
    np.save(folder / "floats.npy", np.zeros((2, 28, 28)))
    done = predict(folder, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_somebody_elses_predict_is_not_replaced(tmp_path):
    mine = tmp_path / "predict.py"
    mine.write_text("print('mine')\n")
    with pytest.raises(SePruneError, match=r"predict\.py is there and not ours; move it"):
        runner.require_runner("onnx", tmp_path / "a.onnx")
    mine.unlink()
    runner.write_runner(tmp_path / "a.onnx")
    runner.require_runner("onnx", tmp_path / "a.onnx")  # our own may be replaced
    with pytest.raises(UsageError, match="the Python runtime of executorch needs torch"):
        runner.require_runner("executorch", tmp_path / "a.pte")
