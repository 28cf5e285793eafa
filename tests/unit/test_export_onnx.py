"""ONNX export of a zoo network: parity, dynamic batch, metadata; and that nothing wrong or unfinished is kept."""

import json
import logging
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from se_prune.artifact import Network
from se_prune.errors import DataError, SePruneError, UsageError
from se_prune.export import TARGETS, export
from se_prune.export import onnx as onnx_target
from se_prune.records import ArchSpec, ArtifactHeader, Preprocessing
from se_prune.zoo import registry

CLASSES = ("T-shirt/top", "Trouser", "größer als 0")
REF = "zoo:se_resnet20"


def network(module, ref, size=(1, 28, 28)):
    preprocessing = Preprocessing(input_size=size, mean=(0.286,) * size[0], std=(0.353,) * size[0])
    return Network(
        module=module,
        header=ArtifactHeader(arch=ArchSpec(ref=ref), preprocessing=preprocessing, classes=CLASSES),
    )


class Noise(nn.Module):
    """Never gives the same logits twice, so that no file can agree with it."""

    def forward(self, x):
        return x.mean(dim=(2, 3)) + torch.rand_like(x.mean(dim=(2, 3)))


class NotANumber(nn.Module):
    def forward(self, x):
        return torch.log(x.mean(dim=(2, 3)) * 0 - 1)


class NoOnnxForm(nn.Module):
    def forward(self, x):
        return torch.special.airy_ai(x).mean(dim=(2, 3))


class Weak(nn.Module):
    """Logits of a hundred that differ by 0.02: below the tolerance relative to them, above the absolute one."""

    def forward(self, x):
        return 100 + 0.02 * torch.rand_like(x.mean(dim=(2, 3)))


def smooth_images(n, size=(1, 28, 28)):
    return torch.nn.functional.avg_pool2d(torch.randn(n, *size), 3, 1, 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    module = registry.build(ArchSpec(ref=REF))
    module.train()
    images = smooth_images(35)
    path = tmp_path_factory.mktemp("onnx") / "deep" / "net.onnx"
    result = export(network(module, REF), "onnx", path, images)
    return module, images, path, result


def test_the_file_agrees_with_the_network(exported):
    _, images, path, result = exported
    assert result.max_abs_diff < 1e-4
    assert (result.target, result.output, result.images_checked) == ("onnx", str(path), len(images))
    assert result.top1_agreement == 1.0
    assert result.bytes == path.stat().st_size
    assert 0 < result.latency_ms < 10_000
    assert list(path.parent.iterdir()) == [path], "one file: no external data, no temporary left"


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_batch_is_dynamic(exported, n):
    module, images, path, _ = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [(name, shape)] = [(value.name, value.shape) for value in session.get_inputs()]
    assert (name, shape) == ("images", ["batch", 1, 28, 28])
    logits = session.run(["logits"], {"images": images[:n].numpy()})[0]
    module.eval()
    with torch.no_grad():
        expected = module(images[:n]).numpy()
    module.train()
    assert np.abs(logits - expected).max() < 1e-4


def test_the_network_is_left_as_it_was(exported):
    module = exported[0]
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_metadata_say_how_to_feed_it(exported):
    model = onnx.load(exported[2])
    values = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert values == {
        "se_prune.arch": {"ref": REF, "kwargs": {}},
        "se_prune.classes": list(CLASSES),
        "se_prune.input_size": [1, 28, 28],
        "se_prune.mean": [0.286],
        "se_prune.std": [0.353],
        "se_prune.input": "float32 nchw",
        "se_prune.output": "logits",
    }
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]
    onnx.checker.check_model(model, full_check=True)


def test_no_path_of_this_machine_is_in_the_file(exported):
    content = exported[2].read_bytes()
    assert b"se_prune.arch" in content
    assert b"node_" in content
    assert b"stack_trace" not in content
    assert b".py" not in content


@pytest.mark.parametrize(("module", "message"), [(Noise(), "differs"), (NotANumber(), "by nan")])
def test_a_file_that_does_not_agree_is_not_kept(tmp_path, module, message):
    before = tmp_path / "net.onnx"
    before.write_bytes(b"older file")
    with pytest.raises(
        SePruneError, match=rf"mine:net .*{message}.*it was not kept; run `se-prune evaluate`"
    ):
        export(network(module, "mine:net", (3, 8, 8)), "onnx", before, torch.rand(4, 3, 8, 8))
    assert before.read_bytes() == b"older file"
    assert list(tmp_path.iterdir()) == [before]


def test_the_tolerance_is_relative_to_the_logits(tmp_path):
    result = export(
        network(Weak(), "mine:net", (3, 8, 8)), "onnx", tmp_path / "a.onnx", torch.rand(1, 3, 8, 8)
    )
    assert 1e-3 < result.max_abs_diff < 0.1
    assert result.images_checked == 1


def test_a_network_without_onnx_form_is_refused(tmp_path):
    with pytest.raises(
        SePruneError, match=r"torch cannot convert mine:net to ONNX \(.*airy_ai.*\); run the network"
    ):
        export(
            network(NoOnnxForm(), "mine:net", (3, 8, 8)), "onnx", tmp_path / "a.onnx", torch.rand(4, 3, 8, 8)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("loggers", "heard"), [(onnx_target.LOGGERS, False), ((), True)], ids=["quiet", "control"]
)
def test_the_exporter_is_silent_and_the_loggers_are_restored(
    tmp_path, monkeypatch, capfd, caplog, loggers, heard
):
    monkeypatch.setattr(onnx_target, "LOGGERS", loggers)
    levels = [logging.getLogger(name).level for name in onnx_target.LOGGERS]
    with caplog.at_level(logging.INFO):
        export(network(Weak(), "mine:net", (3, 8, 8)), "onnx", tmp_path / "a.onnx", torch.rand(4, 3, 8, 8))
    assert any("onnx" in record.name for record in caplog.records) == heard
    assert capfd.readouterr() == ("", "")
    assert [logging.getLogger(name).level for name in onnx_target.LOGGERS] == levels


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("onx", "did you mean 'onnx'"),
        ("tflite", "--to takes coreml, executorch, litert, ncnn, onnx, openvino, torch"),
    ],
)
def test_an_unknown_target_names_the_known_ones(tmp_path, target, hint):
    assert list(TARGETS) == ["onnx", "openvino", "executorch", "litert", "coreml", "ncnn", "torch"]
    with pytest.raises(UsageError, match=hint):
        export(network(Weak(), "mine:net"), target, tmp_path / "a.onnx", torch.rand(2, 1, 28, 28))


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (0, 1, 28, 28), (1, 28, 28)])
def test_images_of_another_size_are_refused(tmp_path, shape):
    with pytest.raises(
        DataError, match=r"of shape \(N, 1, 28, 28\) .* got \(.*check --data and --input-size"
    ):
        export(network(Weak(), "mine:net"), "onnx", tmp_path / "a.onnx", torch.rand(shape))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SePruneError, match=r"onnxruntime.*: pip install onnx onnxscript onnxruntime"):
        export(network(Weak(), "mine:net"), "onnx", tmp_path / "a.onnx", torch.rand(2, 1, 28, 28))
