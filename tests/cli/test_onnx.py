"""The commands on an ONNX file: from `inspect` to an ONNX file again."""

import contextlib
import json
from pathlib import Path

import onnxruntime
import pytest

from tests.calls import call
from tests.onnx_graphs import paddle, paddle_values, save
from tests.tiny import png_folder

pytestmark = pytest.mark.slow

KNOWN = "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    with contextlib.chdir(folder):
        png_folder(Path("data"), per_class=16)
        values = paddle_values()
        two = {"fc_weights": values["fc_weights"][:, :2], "fc_offset": values["fc_offset"][:2]}
        save(folder, paddle(outputs="float[1,2] y", **two))
        yield folder


def document(line):
    code, out, err = call(f"{line} --json")
    assert code == 0, err
    return json.loads(out), err


@pytest.fixture(scope="module")
def applied(place):
    document(f"analyze net.onnx --data data {KNOWN} -o stats.safetensors")
    line = f"apply net.onnx --data data {KNOWN} --stats stats.safetensors --macs 0.7 -o cut.safetensors"
    return document(line)[0]


def test_inspect(place):
    found, said = document("inspect net.onnx")
    assert [(s["name"], s["channels"], s["hidden"]) for s in found["sites"]] == [("se_2", 6, 2)]
    assert found["arch"] == {"ref": "onnx:net", "kwargs": {}}
    assert "ImageNet's mean and deviation are assumed" in " ".join(said.split())
    _, said = document(f"inspect net.onnx {KNOWN}")
    assert "assumed" not in said


def test_apply(applied):
    assert applied["after"]["macs"] <= 0.7 * applied["before"]["macs"]
    assert applied["max_abs_diff_masked"] < 1e-10
    assert applied["refit"]


def test_evaluate_and_finetune(applied):
    found, _ = document(f"evaluate cut.safetensors --data data --against net.onnx {KNOWN}")
    assert found["n"] == 32
    assert 0 <= found["against"]["top1"] <= 1
    dense, _ = document(f"evaluate net.onnx --data data {KNOWN}")
    assert 0 < dense["loss"] < 20
    line = "finetune cut.safetensors --teacher net.onnx --data data --epochs 1 --batch-size 8 -o tuned.safetensors"
    tuned, _ = document(line)
    assert tuned["n"] == 32


def test_export(applied):
    found, _ = document("export cut.safetensors --data data -o small.onnx")
    assert found["max_abs_diff"] < 1e-4
    session = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["probabilities"]
    again, said = document("inspect small.onnx")
    assert again["cost"]["macs"] == applied["after"]["macs"]
    assert "assumed" not in said, "our own export says how its images are normalised"


def test_the_file_is_not_written_over(place):
    before = Path("net.onnx").read_bytes()
    code, _, err = call(f"export net.onnx --data data {KNOWN}")
    assert code == 2
    assert "net.onnx is MODEL itself; give another file with -o" in " ".join(err.split())
    assert Path("net.onnx").read_bytes() == before
    assert document(f"export net.onnx --data data {KNOWN} -o again.onnx")[0]["top1_agreement"] == 1.0


def test_a_mistake_is_one_sentence(place):
    Path("broken.onnx").write_bytes(Path("net.onnx").read_bytes()[:-50])
    code, out, err = call("inspect broken.onnx")
    assert (code, out) == (1, "")
    assert err.startswith("error: broken.onnx is")
    assert "Traceback" not in err
