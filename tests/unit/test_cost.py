"""Counts against hand-computed answers, and the paper's own number; latency with a clock that we wind."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import se_prune
from se_prune import latency
from se_prune.cost import bytes_of, count_cost, count_params
from se_prune.errors import SePruneError, UsageError
from se_prune.gates.sites import find_sites
from se_prune.latency import measure_latency, torch_runner
from se_prune.records import Preprocessing
from tests.nets import ALL, FUNCTIONAL, RESIDUAL, ResidualSE

IMAGENET = Preprocessing(input_size=(3, 224, 224), mean=(0.0,) * 3, std=(1.0,) * 3)


def sized(*size):
    return Preprocessing(input_size=size, mean=(0.0,) * size[0], std=(1.0,) * size[0])


@pytest.mark.parametrize("facts", ALL.values(), ids=ALL)
def test_counts_equal_the_hand_computed_ones(facts):
    model = facts.build()
    result = count_cost(model, facts.preprocessing, find_sites(model, facts.images()))
    assert result.params == facts.params
    assert result.per_layer == facts.per_layer
    assert (result.macs_conv, result.macs_linear) == (facts.macs_conv, facts.macs_linear)
    assert result.macs == facts.macs == sum(facts.per_layer.values())
    assert (result.macs_se, result.macs_gate) == (facts.macs_se, facts.macs_gate)
    assert result.uncounted == facts.uncounted
    assert result.input_size == facts.input_size


def test_se_resnet50_is_the_papers():
    result = count_cost(timm.create_model("legacy_seresnet50"), IMAGENET)
    assert result.macs == 3_860_488_192
    assert result.params == 28_088_024
    assert result.macs_linear == 2048 * 1000
    # The FC layers of SE: 2/r·C² of every block at r = 16 (section 4, equation 5).
    widths = [(256, 3), (512, 4), (1024, 6), (2048, 3)]
    layers = [n for name, n in result.per_layer.items() if "se_module" in name]
    assert sum(layers) == sum(blocks * 2 * width**2 // 16 for width, blocks in widths)
    assert len(layers) == 32


def test_without_sites_the_gates_are_uncounted_by_name():
    result = count_cost(FUNCTIONAL.build(), FUNCTIONAL.preprocessing)
    assert (result.macs_se, result.macs_gate) == (0, 0)
    assert result.macs == FUNCTIONAL.macs
    assert result.uncounted == {"add": 1, "div": 1, "mean": 2, "mul": 3, "relu6": 1, "sigmoid": 2, "silu": 1}


def test_one_of_two_sites_counts_its_own_gate_only():
    model = RESIDUAL.build()
    first, _ = find_sites(model, RESIDUAL.images())
    result = count_cost(model, RESIDUAL.preprocessing, [first])
    assert result.macs_se == RESIDUAL.macs_se // 2
    assert result.macs_gate == RESIDUAL.macs_gate // 2
    assert {"mul": 1, "sigmoid": 1, "adaptive_avg_pool2d": 2}.items() <= result.uncounted.items()


class OddSE(nn.Module):
    """Layers used without calling them, a squeeze in two steps, an in-place multiply, a hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1, bias=False)
        self.reduce = nn.Linear(4, 2)
        self.expand = nn.Linear(2, 4)
        self.mix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        u = self.conv(x)
        z = F.linear(u.mean(3).mean(2), self.reduce.weight, self.reduce.bias)
        s = F.hardsigmoid(self.expand(z)).view(1, 4, 1, 1)
        u *= s
        return torch.cat([u.amax((2, 3)) @ self.mix, u.mean((2, 3))], 1)


def test_layers_are_found_by_their_weights_not_by_their_calls():
    model = OddSE()
    sites = find_sites(model, torch.randn(1, 1, 2, 5))
    assert [(s.reduce, s.expand) for s in sites] == [("reduce", "expand")]
    result = count_cost(model, sized(1, 2, 5), sites)
    # conv 4·10; reduce and expand 4·2 each; the bare parameter 4·3 belongs to the network itself.
    assert result.per_layer == {"conv": 40, "reduce": 8, "expand": 8, "": 12}
    assert (result.macs_conv, result.macs_linear, result.macs_se) == (40, 28, 16)
    # Squeeze: 4·10 values, then 4·2; hard sigmoid 4; multiply 4·10.
    assert result.macs_gate == 40 + 8 + 4 + 40
    assert result.uncounted == {"amax": 1, "cat": 1, "mean": 1}


def test_products_of_activations_are_named_and_not_macs():
    class Attention(nn.Module):
        def forward(self, x):
            flat = x.flatten(2)
            return torch.matmul(flat.transpose(1, 2), flat)

    result = count_cost(Attention(), sized(2, 3, 3))
    assert (result.macs, result.params) == (0, 0)
    assert result.uncounted == {"matmul": 1}


def test_grouped_transposed_and_shared_convolutions():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False)
            self.up = nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False)

        def forward(self, x):
            return self.up(self.shared(self.shared(x)))

    result = count_cost(Odd(), sized(4, 5, 5))
    # shared: twice 25 positions of 4·2·9; up: each of 25 inputs gives 4·2·4.
    assert result.per_layer == {"shared": 2 * 25 * 72, "up": 25 * 32}
    assert result.params == 72 + 32


def test_a_tied_weight_counts_where_it_stands_first():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    result = count_cost(Tied(), sized(1, 1, 3))
    assert result.per_layer == {"a": 2 * 9, "c": 9}
    assert result.params == 2 * 9


def test_model_is_left_as_it_was():
    model = ResidualSE().double()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert count_cost(model, RESIDUAL.preprocessing).macs == RESIDUAL.macs
    assert [m.training for m in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_frozen_parameters_still_count():
    assert count_params(ResidualSE().requires_grad_(False)) == RESIDUAL.params


def test_counting_logs_nothing(caplog):
    caplog.set_level(logging.DEBUG)
    count_cost(FUNCTIONAL.build(), FUNCTIONAL.preprocessing)
    assert not caplog.records


def test_first_use_warns_of_nothing_and_import_is_lazy():
    # fvcore warns when it is first imported, which happened long ago in this process.
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from se_prune.cost import count_cost; assert 'fvcore' not in sys.modules\n"
        "from tests.nets import RESIDUAL as r\n"
        "assert count_cost(r.build(), r.preprocessing).macs == r.macs; assert 'fvcore' in sys.modules"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_nobody_else_imports_fvcore():
    sources = list(Path(se_prune.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    imports = ("import fvcore", "from fvcore")
    importing = {p.name for p in sources if any(i in p.read_text() for i in imports)}
    assert importing == {"cost.py"}


def test_bytes_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 10)
    (tmp_path / "sub" / "b.bin").write_bytes(b"x" * 5)
    assert bytes_of(tmp_path / "a.bin") == 10
    assert bytes_of(tmp_path) == 15
    with pytest.raises(SePruneError, match=r"none\.bin does not exist.*check the path"):
        bytes_of(tmp_path / "none.bin")


class Clock:
    """Time that passes only while a runner runs."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(latency, "perf_counter", lambda: self.now)

    def runner(self, name, milliseconds):
        left = list(milliseconds)

        def run():
            self.order.append(name)
            self.now += left.pop(0) / 1e3

        return name, run


def test_latency_is_interleaved_and_paired_by_round(monkeypatch):
    clock = Clock(monkeypatch)
    first = clock.runner("eager", [99, 10, 40, 10])
    second = clock.runner("onnxruntime", [99, 5, 10, 2.5])
    a, b = measure_latency([first, second], rounds=3, warmup=1, batch_size=4)
    assert clock.order == ["eager", "onnxruntime"] * 4
    assert (a.runtime, b.runtime, a.rounds, a.batch_size) == ("eager", "onnxruntime", 3, 4)
    assert a.median_ms == pytest.approx(10)
    assert b.median_ms == pytest.approx(5)
    assert a.ratio == 1
    assert b.ratio == pytest.approx(4)  # of 2, 4, 4; the ratio of the medians would be 2
    # The sorted times are 10, 10, 40: places 0.2 and 1.8 of 0 to 2.
    assert (a.p10_ms, a.p90_ms) == (pytest.approx(10), pytest.approx(10 + 0.8 * 30))


def test_latency_sets_and_restores_threads():
    before, seen = torch.get_num_threads(), []
    wanted = before + 1
    (result,) = measure_latency(
        [("eager", lambda: seen.append(torch.get_num_threads()))], rounds=2, warmup=1, threads=wanted
    )
    assert seen == [wanted] * 3
    assert result.threads == wanted
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        measure_latency([("eager", lambda: 1 / 0)], threads=wanted)  # type: ignore[list-item]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 3), (5, -1)])
def test_latency_refuses_impossible_rounds(rounds, warmup):
    with pytest.raises(UsageError, match=f"got {rounds} and {warmup}; 30 and 3 are usual"):
        measure_latency([("eager", lambda: None)], rounds, warmup)


def test_torch_runner_runs_in_eval_mode_without_gradients():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads(), x.shape))
            return x

    before = torch.get_num_threads()
    model = Spy().train()
    run = torch_runner(model, torch.zeros(2, 3, 4, 4), "cpu", threads=before + 1)
    assert run() is None
    assert seen == [(False, True, before + 1, (2, 3, 4, 4))]
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_cost_and_latency_on_a_gpu():
    model = ResidualSE().cuda()
    assert count_cost(model, RESIDUAL.preprocessing).macs == RESIDUAL.macs
    assert next(model.parameters()).is_cuda
    run = torch_runner(model, RESIDUAL.images(2), "cuda")
    (result,) = measure_latency([("eager", run)], rounds=3, device="cuda", batch_size=2)
    assert result.device == "cuda"
    assert result.median_ms > 0
