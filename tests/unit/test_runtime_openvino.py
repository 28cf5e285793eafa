"""OpenVINO as a runtime: what its counters say, single layers, and what is said where it is missing."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from se_prune.errors import SePruneError
from se_prune.pipeline import Timing
from se_prune.runtimes import ov, require_runtime
from se_prune.timing import LayerShape

CONV = LayerShape(kind="conv", into=4, out=6, size=(8, 8), kernel=(3, 3), padding=(1, 1))


def counted(name, kind, microseconds, exec_type="jit_f32"):
    time = SimpleNamespace(total_seconds=lambda: microseconds / 1e6)
    return SimpleNamespace(node_name=name, node_type=kind, exec_type=exec_type, real_time=time)


class Request:
    """Counts like the runtime: means over all runs so far, in whole microseconds."""

    times = {
        ("conv/WithoutBiases", "Convolution"): [900, 10, 20, 30],
        ("relu", "Relu"): [5, 2, 2, 2],
        ("fc", "FullyConnected"): [1, 0, 0, 0],
    }

    def __init__(self):
        self.runs = 0

    def infer(self, feeds):
        self.runs += 1

    @property
    def profiling_info(self):
        nothing = [counted("x", "Parameter", 0), counted("sum", "Add", 0, "undef")]
        return nothing + [counted(*key, sum(t[: self.runs]) // self.runs) for key, t in self.times.items()]


def test_the_first_run_is_taken_out_of_the_mean(monkeypatch):
    monkeypatch.setattr(ov, "compiled", lambda *_, **__: SimpleNamespace(create_infer_request=Request))
    found = ov._times(b"", {}, 1, 3)
    # (900 + 10 + 20 + 30) / 4 = 240, and (240 * 4 - 900) / 3 = 20; (5 + 3 * 2) // 4 = 2, and (2 * 4 - 5) / 3 = 1
    assert found == {
        ("conv/WithoutBiases", "Convolution"): pytest.approx(0.021),
        ("relu", "Relu"): pytest.approx(0.002),
        ("fc", "FullyConnected"): pytest.approx(0.001),
    }


def test_single_layers_in_any_number(monkeypatch):
    pytest.importorskip("openvino")
    shapes = [CONV, LayerShape(kind="linear", into=16, out=3, size=(1, 1)), CONV.at(8, 64), CONV]
    found = ov.time_layers(shapes, 2, 1)
    assert len(found) == 4
    assert found[0] == found[3], "equal ones are timed once"
    assert all(ms > 0 for ms in found)


def test_a_network_runs_at_the_batch_that_it_is_given(tmp_path):
    openvino = pytest.importorskip("openvino")
    from se_prune.runtimes.ort import bank

    model, feeds = bank([CONV], 2)
    [(name, image)] = feeds.items()
    fixed = ov.compiled(model, 1, (5, *image.shape[1:]))
    assert list(fixed.input(0).shape) == [5, 4, 8, 8]
    assert list(ov.compiled(model, 1).input(0).shape) == [2, 4, 8, 8]
    assert np.asarray(fixed(np.zeros((5, 4, 8, 8), np.float32))[0]).shape == (5, 6, 8, 8)
    assert (name, openvino.Core().available_devices[:1]) == ("x2_4_8_8", ["CPU"])


def test_a_missing_package_is_told_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = r"--runtime openvino needs a package that is missing .*: pip install 'se-prune\[openvino\]'"
    with pytest.raises(SePruneError, match=message):
        require_runtime("openvino")
    with pytest.raises(SePruneError, match=message):
        Timing(runtime="openvino")
    assert Timing(runtime="torch").threads >= 1


def test_modules_are_not_files():
    with pytest.raises(AssertionError, match="opens files"):
        ov.open_file(torch.nn.Identity(), torch.zeros(1, 1, 2, 2), 1)
