"""The other export targets: parity where the package is there, what is said where it is not, files as a unit."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.errors import SePruneError, UsageError
from se_prune.export import TARGETS, coreml, export, litert, suffix_of
from se_prune.export.torch_export import EXTRA
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing
from tests.unit.test_export_runner import predict

EXTRAS = ("openvino", "executorch", "litert", "coreml", "ncnn")
MOST = {"openvino": 2, "executorch": 2, "litert": 2, "coreml": 1, "ncnn": 3, "torch": 1}


class Gated(nn.Module):
    """A convolution, a hard-swish, a gate and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        u = nn.functional.hardswish(self.first(x))
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(u.mean((2, 3), keepdim=True)))))
        return self.fc((u * gate).mean((2, 3)))


class Noise(nn.Module):
    """Never gives the same logits twice."""

    def forward(self, x):
        return x.mean((2, 3)) + torch.rand_like(x.mean((2, 3)))


def network(module=None):
    torch.manual_seed(0)
    preprocessing = Preprocessing(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,))
    header = ArtifactHeader(
        arch=ArchSpec(ref="mine:net"), preprocessing=preprocessing, classes=("a", "b", "c")
    )
    return Network(module=(module or Gated()).eval(), header=header)


def images(n=6):
    return nn.functional.avg_pool2d(
        torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(1)), 3, 1, 1
    )


def require(name, *, int8=False):
    """Skip a test whose target's packages are not there."""
    for package in (*TARGETS[name].packages, *(TARGETS[name].int8_packages if int8 else ())):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def _their_warnings():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"onnx", "coreml"}))
def test_a_file_agrees_with_torch(tmp_path, name):
    require(name)
    path = tmp_path / f"net{suffix_of(name)}"
    result = export(network(), name, path, images())
    assert result.max_abs_diff < 1e-4
    assert (result.top1_agreement, result.images_checked, result.target) == (1.0, 6, name)
    written = sorted(tmp_path.iterdir())
    assert sorted(result.files) == [str(p) for p in written]
    assert len(written) == MOST[name]
    assert sum(p.stat().st_size for p in written) == result.bytes
    assert result.latency_ms > 0


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"onnx", "coreml"}))
def test_a_file_that_differs_is_not_kept(tmp_path, name):
    require(name)
    with pytest.raises(SePruneError):
        export(network(Noise()), name, tmp_path / f"net{suffix_of(name)}", images())
    assert list(tmp_path.iterdir()) == []


def test_litert_takes_bytes_and_prints_nothing(tmp_path, capfd):
    require("litert")
    result = export(network(), "litert", tmp_path / "net.tflite", images(), pixels="nhwc")
    assert (result.input, result.top1_agreement) == ("uint8 nhwc", 1.0)
    assert result.max_abs_diff < 1e-5
    assert capfd.readouterr() == ("", "")


def test_what_native_code_writes_is_hidden_and_no_longer_than_asked(capfd, monkeypatch):
    monkeypatch.delenv(litert.LOG_LEVEL, raising=False)
    with litert.importing():
        assert os.environ[litert.LOG_LEVEL] == "2"
        os.write(2, b"hidden")
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"
    assert litert.LOG_LEVEL not in os.environ
    monkeypatch.setenv(litert.LOG_LEVEL, "0")
    with litert.importing():
        assert os.environ[litert.LOG_LEVEL] == "0", "what the user chose"
    assert os.environ[litert.LOG_LEVEL] == "0"


def test_core_ml_is_saved_and_not_verified_elsewhere(tmp_path, monkeypatch):
    require("coreml")
    monkeypatch.setattr(sys, "platform", "linux")
    result = export(network(), "coreml", tmp_path / "net.mlpackage", images())
    assert result.note == "converted and saved, not verified: Core ML runs on macOS only, and this is linux"
    assert (result.max_abs_diff, result.top1_agreement, result.latency_ms, result.images_checked) == (
        None,
        None,
        None,
        0,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["net.mlpackage"]
    assert result.bytes > 100
    export(network(), "coreml", tmp_path / "net.mlpackage", images())  # a folder is replaced by a folder
    assert (tmp_path / "net.mlpackage" / "Manifest.json").is_file()


def test_core_ml_runs_on_macos(monkeypatch):
    assert coreml.elsewhere() is None or sys.platform != "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert coreml.elsewhere() is None


@pytest.mark.parametrize("name", ["openvino", "executorch"])
def test_int8_of_other_targets(tmp_path, name):
    require(name, int8=True)
    path = tmp_path / f"net{suffix_of(name)}"
    result = export(network(), name, path, images(), quantised=True, calibration=images(8), pixels="nchw")
    assert result.input == "uint8 nchw"
    assert result.int8.output_db > 20
    assert result.int8.calibration_images == 8
    assert result.max_abs_diff > 0
    assert (result.int8.n, result.int8.top1) == (0, None)


@pytest.mark.parametrize("name", ["openvino", "litert", "ncnn"])
def test_predict_runs_it_without_torch(tmp_path, name):
    from se_prune.export.runner import write_runner

    require(name)
    path = tmp_path / f"net{suffix_of(name)}"
    net = network()
    export(net, name, path, images())
    write_runner(path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    done = predict(tmp_path, path.name, "x.npy", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line)["top"][0] for line in done.stdout.splitlines()]
    with torch.no_grad():
        expected = net.module((torch.from_numpy(pixels)[:, None] / 255 - 0.3) / 0.4).softmax(1)
    assert [row["probability"] for row in rows] == pytest.approx(expected.amax(1).tolist(), abs=1e-4)
    assert [row["class"] for row in rows] == ["abc"[i] for i in expected.argmax(1)]


def test_pt2_is_for_trusted_files_only_and_says_so(tmp_path):
    result = export(network(), "torch", tmp_path / "net.pt2", images())
    assert "open this file only where its writer is trusted" in result.note
    extra = {EXTRA: ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra[EXTRA])["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, TARGETS[name].packages[0], None)
    with pytest.raises(
        SePruneError,
        match=rf"--to {name} needs a package that is missing .*: pip install 'se-prune\[{name}\]'",
    ):
        export(network(), name, tmp_path / f"net{suffix_of(name)}", images())
    assert list(tmp_path.iterdir()) == []


def test_the_extras_are_those_of_the_package():
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name in EXTRAS:
        wanted = {requirement.partition(">")[0].replace("-", "_") for requirement in extras[name]}
        assert {*TARGETS[name].packages, *TARGETS[name].int8_packages} == wanted


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ncnn",
            {"quantised": True},
            "--to ncnn does not go with --int8; --int8 goes with executorch, onnx, openvino",
        ),
        ("ncnn", {"pixels": "nhwc"}, "--to ncnn does not go with --with-preprocessing"),
        ("litert", {"quantised": True}, "--to litert does not go with --int8"),
        ("coreml", {"quantised": True}, "--to coreml does not go with --int8"),
    ],
)
def test_what_a_target_does_not_take_is_refused(tmp_path, name, options, message):
    with pytest.raises(UsageError, match=message):
        export(network(), name, tmp_path / f"net{suffix_of(name)}", images(), **options)


def test_another_ending_and_files_of_others_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a file for openvino ends with \.xml, got .*net\.onnx; change -o"):
        export(network(), "openvino", tmp_path / "net.onnx", images())
    (tmp_path / "net.bin").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match=r"would replace .*net\.bin, which belongs to something else"):
        export(network(), "openvino", tmp_path / "net.xml", images())
    assert (tmp_path / "net.bin").read_bytes() == b"somebody's"
