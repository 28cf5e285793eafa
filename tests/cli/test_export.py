"""`export` with its options: int8 beside float, the preprocessing in the file, predict.py, and what is refused."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from se_prune.data import open_data
from se_prune.export import qdq
from tests.calls import NET, call, document
from tests.tiny import fashion_folder
from tests.unit.test_export_int8 import weights

MOBILE = "zoo:se_mobilenet_x025 --pretrained"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    with contextlib.chdir(folder):
        fashion_folder(Path("data"), train=160, test=200)
        yield folder


@pytest.mark.slow
def test_int8_with_all_that_ships(place):
    options = (
        "--int8 --max-drop 0.03 --with-preprocessing --layout nchw --runner --images 64 --calibration 96"
    )
    found = document(f"export {MOBILE} --data data -o small.onnx {options}")
    assert found["bytes"] == Path("small.onnx").stat().st_size
    assert found["input"] == "uint8 nchw"
    int8 = found["int8"]
    assert (int8["n"], int8["calibration_images"]) == (200, 96)
    assert int8["top1"] >= int8["top1_float"] - 0.03
    assert int8["top1_float"] > 0.85
    assert int8["size_ratio"] < 0.3
    assert int8["output_db"] > 15
    assert found["top1_agreement"] > 0.9
    assert {layer["kind"] for layer in int8["layers"]} == {"Conv", "Mul", "Gemm"}
    assert not any(layer["layer"].startswith("network.") for layer in int8["layers"])
    largest = [int(np.abs(whole.astype(int)).max()) for _, whole, _ in weights(onnx.load("small.onnx"))]
    assert len(largest) > 40
    assert set(largest) == {qdq.WEIGHT_MAX}
    images = open_data("data").test.images.numpy()
    np.save("images.npy", images)
    line = [sys.executable, "-W", "ignore", "-I", "predict.py", "small.onnx", "images.npy", "--json"]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    labels = [json.loads(row)["top"][0]["label"] for row in said.splitlines()]
    assert np.mean(np.array(labels) == open_data("data").test.labels.numpy()) == pytest.approx(int8["top1"])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--int8 --max-drop 2", 2, "--max-drop is a fraction"),
        ("--max-drop 0.01", 2, "give it with --int8"),
        ("--layout wide", 2, "--layout takes nhwc or nchw, got 'wide'"),
        ("--int8 --calibration 0", 2, "--calibration must be at least 1, got 0"),
        ("--images 0", 2, "--images must be at least 1, got 0"),
        ("--to ncnn --int8", 2, "--to ncnn does not go with --int8"),
        ("--to torch --runner", 2, "the Python runtime of torch needs torch"),
    ],
)
def test_options_that_make_no_sense_write_nothing(place, options, code, message):
    before = sorted(place.iterdir())
    found = call(f"export {NET} --data data -o wrong.pt2 {options}")
    assert found[0] == code
    assert message in " ".join(found[2].split())
    assert sorted(place.iterdir()) == before


def test_a_missing_package_is_told_before_any_work(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, _, err = call(f"export {NET} --data data --to openvino -o net.xml")
    assert code == 1
    assert "pip install 'se-prune[openvino]'" in " ".join(err.split())
    assert not Path("net.xml").exists()
