"""Gate statistics and channel energies against plain loops in float64.

Shapes: N images, K classes, C channels, H×W positions.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from se_prune.errors import DataError
from se_prune.gates.energies import collect_energies
from se_prune.gates.statistics import BINS, SiteSums, collect
from se_prune.gates.summary import profile
from tests.measured import CLASSES, CPU, N, column, images, made, measured, network
from tests.nets import DEPTHWISE, RESIDUAL


def recorded(model, module, facts, split, batch_size=8):
    """Return what goes into a module and what comes out, (N, …) in float64, from a plain pass."""
    went, came = [], []

    def hook(_, args, out):
        went.append(args[0].double().clone())
        came.append(out.double().clone())

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        for batch, _ in split.batches(batch_size, facts.preprocessing):
            model(batch)
    handle.remove()
    return torch.cat(went), torch.cat(came)


@pytest.mark.parametrize(
    ("facts", "gate"), [(RESIDUAL, "sigmoid"), (DEPTHWISE, "fc.3")], ids=["residual", "depthwise"]
)
def test_sums_are_those_of_plain_loops(facts, gate):
    model, sites, split, statistics = measured(facts)
    assert statistics.n == N
    assert statistics.counts.tolist() == [(split.labels == k).sum().item() for k in range(4)]
    assert [s.name for s in sites] == list(statistics.sums)
    for site in sites:
        block = model.get_submodule(site.name)
        u, _ = recorded(model, block, facts, split)
        _, s = recorded(model, block.get_submodule(gate), facts, split)
        s = s.reshape(N, site.channels)
        sums = statistics.sums[site.name]
        for k in range(4):
            for c in range(site.channels):
                chosen = [i for i in range(N) if split.labels[i] == k]
                want = dict.fromkeys(("s", "s2", "u2", "su2", "s2u2", "v"), 0.0)
                for i in chosen:
                    map_, g = u[i, c].flatten().tolist(), float(s[i, c])
                    energy = math.fsum(x * x for x in map_) / len(map_)
                    want["s"] += g
                    want["s2"] += g * g
                    want["u2"] += energy
                    want["su2"] += g * energy
                    want["s2u2"] += math.fsum((g * x) ** 2 for x in map_) / len(map_)
                    want["v"] += math.fsum(g * x for x in map_) / len(map_)
                for name, value in want.items():
                    # Energies and means of a map are summed in float32, everything after that in float64.
                    near = pytest.approx(value, rel=1e-5, abs=1e-5 if name == "v" else 1e-12)
                    assert float(getattr(sums, name)[k, c]) == near, (site.name, name, k, c)
                assert float(sums.s[k, c]) == pytest.approx(want["s"], rel=1e-13)
        assert torch.equal(sums.smin, s.amin(0))
        assert torch.equal(sums.smax, s.amax(0))
        for c in range(site.channels):
            bins = [0] * BINS
            for value in s[:, c].tolist():
                bins[min(BINS - 1, int(value * BINS))] += 1
            assert sums.histogram[c].tolist() == bins
        spread = (sums.smax - sums.smin).max()
        assert spread > 0.01  # a gate that does not move would test little
        assert sums.histogram.sum() == N * site.channels


def six_digits(values):
    return tuple(round(value, 6) for value in values.tolist())


def test_mean_and_variance_of_a_gate():
    model, sites, split, statistics = measured(RESIDUAL)
    block = model.get_submodule(sites[1].name)
    s = recorded(model, block.sigmoid, RESIDUAL, split)[1].reshape(N, -1)
    found = profile(statistics, sites[1].name)
    assert found.mean == six_digits(s.mean(0))
    assert found.std == six_digits(s.std(0, unbiased=False))
    for k, name in enumerate(CLASSES[:3]):
        assert found.per_class[name] == six_digits(s[split.labels == k].mean(0))
    assert found.per_class["never seen"] == (0.0,) * 4
    assert list(profile(statistics, sites[1].name, ["bee"]).per_class) == ["bee"]


@pytest.mark.parametrize("facts", [RESIDUAL, DEPTHWISE], ids=["residual", "depthwise"])
def test_energies_are_those_of_every_layers_input(facts):
    model, _, split, statistics = measured(facts)
    energies = statistics.energies
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert energies.sums.keys() == layers.keys()
    for name, layer in layers.items():
        a = recorded(model, layer, facts, split)[0].reshape(N, -1, layer_positions(layer, model, facts))
        per_image = a.square().mean(2)
        assert torch.allclose(energies.mean(name), per_image.mean(0), rtol=1e-5, atol=1e-12)
        for k in range(3):
            table = per_image[split.labels == k].sum(0)
            assert torch.allclose(energies.sums[name][k], table, rtol=1e-5, atol=1e-12)
    assert energies.counts.tolist() == statistics.counts.tolist()


def layer_positions(layer, model, facts):
    shapes = []
    handle = layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    model(facts.images())
    handle.remove()
    return math.prod(shapes[0][2:])


def test_the_size_of_batches_does_not_matter():
    one, whole = measured(RESIDUAL, 5)[3], measured(RESIDUAL, 100)[3]
    for name, sums in one.sums.items():
        for field in fields(SiteSums):
            a, b = getattr(sums, field.name), getattr(whole.sums[name], field.name)
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), field.name


def test_progress_and_mode():
    model, sites = network(RESIDUAL)
    seen = []
    model.train()
    options = {"device": CPU, "batch_size": 10, "on_batch": seen.append}
    collect(model, sites, images(RESIDUAL), RESIDUAL.preprocessing, classes=CLASSES, **options)
    assert seen == [10, 10, 3]
    assert not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    collect_energies(model, images(RESIDUAL), RESIDUAL.preprocessing, classes=4, **options)
    assert seen == [10, 10, 3] * 2
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_no_image_is_refused():
    model, sites = network(RESIDUAL)
    none = images(RESIDUAL).take(torch.tensor([], dtype=torch.long))
    with pytest.raises(DataError, match="no images to analyse; check --data"):
        collect(model, sites, none, RESIDUAL.preprocessing, classes=CLASSES, device=CPU)
    with pytest.raises(DataError, match="no images to measure channel energies on; check --data"):
        collect_energies(model, none, RESIDUAL.preprocessing, classes=4, device=CPU)


def test_only_the_same_network_and_classes_are_merged():
    _, _, _, one = measured(RESIDUAL)
    twice = one.merged(one)
    assert twice.n == 2 * N
    assert torch.equal(twice.energies.counts, 2 * one.energies.counts)
    other = measured(DEPTHWISE)[3]
    for stranger in (other, replace(one, classes=CLASSES[::-1])):
        with pytest.raises(DataError, match="different networks or classes and cannot be merged"):
            one.merged(stranger)
    with pytest.raises(DataError, match="different networks and cannot be merged"):
        one.energies.merged(other.energies)
    assert one.merged(replace(one, energies=None)).energies is None


def test_bins_are_equal_and_a_gate_of_one_is_in_the_last():
    values = [0.0, 1 / BINS - 1e-4, 1 / BINS + 1e-4, 0.5, 1 - 1 / BINS + 1e-4, 1.0]
    histogram = made([column(*values)], [0, 0, 0, 1, 1, 1]).sums["site0"].histogram[0]
    assert {i: int(n) for i, n in enumerate(histogram) if n} == {0: 2, 1: 1, BINS // 2: 1, BINS - 1: 2}
