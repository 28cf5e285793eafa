"""The repair of scales and shifts: its slopes, its solver, what it moves, and where it must refuse."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from se_prune.artifact import NORM_TYPES
from se_prune.checkpoint import open_model
from se_prune.data import open_data
from se_prune.data.source import balanced_subset
from se_prune.surgery import affine
from se_prune.surgery.affine import tune
from se_prune.surgery.knobs import curvature_rows

CPU = torch.device("cpu")
NETWORKS = ("zoo:se_resnet20", "zoo:se_mobilenet_x025")


@pytest.fixture(scope="module")
def pixels():
    """Return some of the bundled training images."""
    order = balanced_subset(open_data("fashion-mnist").train, 2000, 0)
    return lambda count, start=0: order.take(torch.arange(start, start + count))


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request):
    """A trained network and the same with its scales and shifts disturbed, as a cut would leave them."""
    torch.manual_seed(0)
    network = open_model(request.param, pretrained=True)
    dense = network.module.eval()
    other = copy.deepcopy(dense)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, NORM_TYPES):
                module.weight.mul_(1 + 0.1 * torch.randn_like(module.weight))
                module.bias.add_(0.1 * torch.randn_like(module.bias))
    return dense, other, network.header.preprocessing


def run(dense, model, see, split):
    return tune(dense, model, split, see, device=CPU, batch_size=64)


def moved(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_it_comes_nearer_by_scales_and_shifts_alone(pair, pixels, monkeypatch):
    monkeypatch.setattr(affine, "LEAST_SHARE", 0.0)
    dense, other, see = pair
    model = copy.deepcopy(other)
    divergences = run(dense, model, see, pixels(640))
    assert len(divergences) > 1
    assert divergences == sorted(divergences, reverse=True)
    unseen = next(iter(pixels(256, start=640).batches(256, see)))[0]
    with torch.no_grad():
        wanted, was, now = (m(unseen).log_softmax(1) for m in (dense, other, model))
    before, after = (functional.kl_div(x, wanted, reduction="batchmean", log_target=True) for x in (was, now))
    assert after < 0.9 * before
    knobs = {n for n, m in model.named_modules() if isinstance(m, (*NORM_TYPES, nn.Linear))}
    changed = moved(other.state_dict(), model.state_dict())
    assert changed
    assert {name.rpartition(".")[0] for name in changed} <= knobs
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"}


def test_nothing_moves_where_nothing_is_wrong(pair, pixels, monkeypatch):
    monkeypatch.setattr(affine, "LEAST_SHARE", 0.0)
    dense, _, see = pair
    model = copy.deepcopy(dense)
    assert run(dense, model, see, pixels(128)) == [0.0]
    assert not moved(dense.state_dict(), model.state_dict())


def test_too_few_images_move_nothing(pair, pixels):
    dense, other, see = pair
    model = copy.deepcopy(other)
    assert run(dense, model, see, pixels(40)) == []
    assert not moved(other.state_dict(), model.state_dict())


def test_no_hook_and_no_setting_is_left(pair, pixels, monkeypatch):
    monkeypatch.setattr(affine, "LEAST_SHARE", 0.0)
    dense, other, see = pair
    model = copy.deepcopy(other).requires_grad_(True)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    run(dense, model, see, pixels(128))
    assert [p is frozen for p in model.parameters() if not p.requires_grad] == [True]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_row_has_the_curvature_as_its_mean():
    torch.manual_seed(0)
    q = torch.randn(5, dtype=torch.float64).softmax(0)
    signs = 2.0 * torch.randint(0, 2, (200_000, 5)).double() - 1
    rows = curvature_rows(q.expand(len(signs), 5), signs)
    assert torch.allclose(rows.mT @ rows / len(rows), q.diag() - q.outer(q), atol=2e-3)


def test_the_dense_network_sees_every_image_once(pair, pixels, monkeypatch):
    monkeypatch.setattr(affine, "LEAST_SHARE", 0.0)
    dense, other, see = pair
    seen = []
    handle = dense.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    steps = len(run(dense, copy.deepcopy(other), see, pixels(640))) - 1
    handle.remove()
    assert steps >= 1, "so there was a second pass"
    assert sum(seen) == 640


def test_conjugate_gradients_solve():
    torch.manual_seed(0)
    half = torch.randn(30, 20, dtype=torch.float64)
    matrix, wanted = half.mT @ half + torch.eye(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    found = affine._solve(lambda v: matrix @ v, wanted, torch.zeros_like(wanted))
    exact = torch.linalg.solve(matrix, wanted)
    assert torch.allclose(found, exact, rtol=0, atol=2e-3 * float(exact.norm()))
