"""Gate statistics and channel energies against plain loops in float64, their file, and what they say.

Shapes: N images, K classes, C channels, H×W positions.
"""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from se_prune.data.batches import TensorImages
from se_prune.errors import CheckpointError, DataError
from se_prune.gates.energies import collect_energies
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import BINS, HEADER_KEY, Collector, SiteSums, Statistics, collect
from se_prune.gates.summary import (
    cheapest_within,
    fold_constants,
    fold_loss,
    profile,
    specificity,
    summarise,
)
from se_prune.records import GateSite
from tests.nets import DEPTHWISE, RESIDUAL

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cow", "never seen")
N = 23


def images(facts, n=N):
    """Return ever brighter images whose classes come in uneven numbers; the last of `CLASSES` has none."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(n, *facts.input_size, generator=generator) * torch.linspace(20, 255, n).view(
        -1, 1, 1, 1
    )
    return TensorImages(images=pixels.to(torch.uint8), labels=torch.tensor([0, 1, 1, 2, 1, 0, 1] * n)[:n])


def network(facts):
    """Return a network whose gates are alive, in eval mode, with its sites."""
    torch.manual_seed(0)
    model = facts.build().eval()
    sites = find_sites(model, facts.images())
    with torch.no_grad():
        for site in sites:
            reduce = model.get_submodule(site.reduce)
            reduce.weight.abs_().mul_(20)  # no hidden unit is dead, for features of either sign
            if reduce.bias is not None:
                reduce.bias.fill_(1)
            model.get_submodule(site.expand).weight.mul_(6)
    return model, sites


def measured(facts, batch_size=8):
    model, sites = network(facts)
    split = images(facts)
    options = {"device": CPU, "batch_size": batch_size}
    statistics = collect(model, sites, split, facts.preprocessing, classes=CLASSES, **options)
    statistics.energies = collect_energies(model, split, facts.preprocessing, classes=4, **options)
    return model, sites, split, statistics


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


def test_mean_and_variance_of_a_gate():
    model, sites, split, statistics = measured(RESIDUAL)
    block = model.get_submodule(sites[1].name)
    s = recorded(model, block.sigmoid, RESIDUAL, split)[1].reshape(N, -1)
    found = profile(statistics, sites[1].name)
    assert found.mean == pytest.approx(s.mean(0).tolist(), rel=1e-12)
    assert found.std == pytest.approx(s.std(0, unbiased=False).tolist(), rel=1e-6)
    for k, name in enumerate(CLASSES[:3]):
        assert found.per_class[name] == pytest.approx(s[split.labels == k].mean(0).tolist(), rel=1e-12)
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


# The file.


@pytest.mark.parametrize("with_energies", [True, False])
def test_a_file_gives_back_exactly_what_was_saved(tmp_path, with_energies):
    saved = measured(RESIDUAL)[3]
    if not with_energies:
        saved.energies = None
    saved.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    assert (loaded.classes, loaded.sites, loaded.n) == (saved.classes, saved.sites, saved.n)
    assert torch.equal(loaded.counts, saved.counts)
    assert loaded.sums.keys() == saved.sums.keys()
    for name, sums in saved.sums.items():
        for field in fields(SiteSums):
            a, b = getattr(sums, field.name), getattr(loaded.sums[name], field.name)
            assert a.dtype == b.dtype == torch.float64
            assert torch.equal(a, b)
    assert (loaded.energies is None) == (not with_energies)
    if with_energies:
        assert torch.equal(loaded.energies.counts, saved.energies.counts)
        assert loaded.energies.sums.keys() == saved.energies.sums.keys()
        for name, table in saved.energies.sums.items():
            assert torch.equal(loaded.energies.sums[name], table)
    assert summarise(loaded) == summarise(saved)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "stats.safetensors"
    measured(RESIDUAL)[3].save(file)
    assert Statistics.load(file).n == N
    return file


def rewritten(path, change):
    """Write the file again with its header or tensors changed."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
    tensors = load_file(path)
    metadata = {HEADER_KEY: change(header, tensors)}
    save_file(tensors, path, metadata=metadata)


def newer(header, _):
    return json.dumps({**header, "schema_version": 2})


def unknown_key(header, _):
    header["sites"][0]["colour"] = "red"
    return json.dumps(header)


def no_sites(header, _):
    del header["sites"]
    return json.dumps(header)


def no_json(*_):
    return "{"


def a_list(*_):
    return "[]"


def tensor_missing(header, tensors):
    del tensors["blocks.0.se/u2"]
    return json.dumps(header)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (newer, "schema version is 2, not 1"),
        (unknown_key, "sites|colour|unexpected"),
        (no_sites, "sites"),
        (no_json, "Expecting property name"),
        (a_list, "list"),
        (tensor_missing, r"blocks\.0\.se/u2"),
    ],
    ids=lambda v: getattr(v, "__name__", "said"),
)
def test_damaged_files_are_refused_with_the_reason(path, change, said):
    rewritten(path, lambda header, _: json.dumps(header))
    Statistics.load(path)
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        Statistics.load(path)
    assert str(path) in str(caught.value)
    assert "is not a statistics file of `se-prune analyze`" in str(caught.value)
    assert str(caught.value).endswith("make it again.")


def test_missing_truncated_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match=r"none does not exist; make it with `se-prune analyze`"):
        Statistics.load(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="make it again"):
        Statistics.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="make it again"):
        Statistics.load(path)
    with pytest.raises(CheckpointError, match="make it again"):
        Statistics.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=f"{HEADER_KEY}.*make it again"):
        Statistics.load(path)


# What they say: gates made by hand.


def site(name, channels):
    return GateSite(
        name=name, owner=name, channels=channels, hidden=1, reduce=f"{name}.a", expand=f"{name}.b"
    )


def made(gates, labels, u=None, classes=2):
    """Return the statistics of one site per table of gates (N, C); features (N, C, 2, 2) are 1 unless given."""
    sites = [site(f"site{i}", table.shape[1]) for i, table in enumerate(gates)]
    collector = Collector(sites, classes, CPU)
    collector.begin(torch.tensor(labels))
    for own, table in zip(sites, gates, strict=True):
        features = torch.ones(*table.shape, 2, 2) if u is None else u
        collector.on_gate(own, features, table[:, :, None, None])
    return Statistics(
        classes=tuple(map(str, range(classes))),
        counts=collector.counts,
        sites=tuple(sites),
        sums=collector.result(),
    )


def column(*values):
    return torch.tensor(values)[:, None]


def test_specificity_is_zero_where_the_classes_agree():
    (row,) = summarise(made([column(0.25, 0.75, 0.25, 0.75)], [0, 0, 1, 1]))
    assert row.class_specificity == 0
    assert row.std_images == 0.25


def test_specificity_is_one_where_the_gate_is_a_function_of_the_class():
    (row,) = summarise(made([column(0.25, 0.25, 0.75, 0.75)], [0, 0, 1, 1]))
    assert row.class_specificity == 1
    assert row.std_images == 0.25


def test_specificity_between_is_the_share_of_variance():
    statistics = made([column(0.0, 0.5, 0.5, 1.0)], [0, 0, 1, 1])
    between, total = specificity(statistics.sums["site0"], statistics.counts)
    # Class means 1/4 and 3/4: between-class variance 1/16; the variance over all is 1/8.
    assert (between.item(), total.item()) == (1 / 16, 1 / 8)
    assert summarise(statistics)[0].class_specificity == 0.5


def test_specificity_weighs_classes_by_their_images_and_skips_those_unseen():
    statistics = made([column(1.0, 0.0, 0.0, 0.0)], [0, 1, 1, 1], classes=5)
    between, total = specificity(statistics.sums["site0"], statistics.counts)
    assert between.item() == pytest.approx(3 / 16)
    assert total.item() == pytest.approx(3 / 16)


def test_specificity_of_a_gate_that_never_moves_is_zero():
    (row,) = summarise(made([torch.full((6, 3), 0.3)], [0, 0, 0, 1, 1, 1]))
    assert row.class_specificity == pytest.approx(0, abs=1e-6)
    assert row.std_images < 1e-7


def test_saturation_is_the_share_near_zero_and_one():
    rows = summarise(
        made(
            [column(0.01, 0.99, 0.5, 0.4), column(0.0, 1.0, 0.02, 0.98), column(0.1, 0.9, 0.5, 0.6)],
            [0, 0, 1, 1],
        )
    )
    assert [row.saturated for row in rows] == [0.5, 1.0, 0.0]
    assert rows[0].mean == pytest.approx(1.9 / 4)


def test_bins_are_equal_and_a_gate_of_one_is_in_the_last():
    values = [0.0, 1 / BINS - 1e-4, 1 / BINS + 1e-4, 0.5, 1 - 1 / BINS + 1e-4, 1.0]
    histogram = made([column(*values)], [0, 0, 0, 1, 1, 1]).sums["site0"].histogram[0]
    assert {i: int(n) for i, n in enumerate(histogram) if n} == {0: 2, 1: 1, BINS // 2: 1, BINS - 1: 2}


def random_site(seed, n=12, channels=5):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, channels, 2, 2, generator=generator)
    u *= torch.rand(n, channels, 1, 1, generator=generator) * 3
    return u, torch.rand(n, channels, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_fold_loss_is_the_least_that_any_constant_loses(seed):
    u, s = random_site(seed)
    sums = made([s], [0, 1] * 6, u).sums["site0"]
    energy = u.double().square().mean((2, 3))
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
    lost = ((s.double()[..., None] - grid) ** 2 * energy[..., None]).sum(0)  # (C, grid)
    least, where = lost.min(1)
    whole = (s.double() ** 2 * energy).sum()
    assert fold_loss(sums) == pytest.approx(float(least.sum() / whole), rel=1e-4)
    assert fold_loss(sums) <= float(least.sum() / whole) * (1 + 1e-6)
    assert torch.allclose(fold_constants(sums), grid[where], atol=1 / 4000)
    assert fold_loss(sums) > 0.05
    # The mean gate is another constant, and a worse one.
    mean = ((s.double() - s.double().mean(0)) ** 2 * energy).sum() / whole
    assert fold_loss(sums) < float(mean)


def test_folding_a_constant_gate_loses_nothing():
    u, _ = random_site(0)
    values = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    sums = made([values.expand(12, 5)], [0, 1] * 6, u).sums["site0"]
    assert fold_loss(sums) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(fold_constants(sums), values.double(), atol=1e-7)


def test_channels_without_any_energy_fold_to_their_mean_gate():
    u, s = random_site(1)
    u[:, 2] = 0
    sums = made([s], [0, 1] * 6, u).sums["site0"]
    assert float(fold_constants(sums)[2]) == pytest.approx(float(s[:, 2].double().mean()))
    assert math.isfinite(fold_loss(sums))
    nothing = made([s], [0, 1] * 6, torch.zeros_like(u)).sums["site0"]
    assert fold_loss(nothing) == 0


def test_sites_are_advised_to_be_folded_as_long_as_their_losses_add_up_to_little():
    live, dead = column(0.1, 0.9, 0.2, 0.8), column(0.5, 0.5001, 0.5, 0.5001)
    statistics = made([live, dead, dead], [0, 0, 1, 1])
    assert [row.advice for row in summarise(statistics)] == ["keep", "fold", "fold"]
    assert [row.logit_shift for row in summarise(statistics)] == [None] * 3
    names = [site.name for site in statistics.sites]
    # the shift of the logits, where it was measured, decides: 0.003 + 0.001 is below 0.005, with 0.0011 it is not
    for last, advice in ((0.003, ["fold", "keep", "fold"]), (0.0051, ["fold", "keep", "keep"])):
        statistics.shifts = dict(zip(names, (0.001, 0.0052, last), strict=True))
        rows = summarise(statistics)
        assert [row.advice for row in rows] == advice
        assert [row.predicted_loss for row in rows] == [0.001, 0.0052, last]
    assert cheapest_within({"a": 0.3, "b": 0.1, "c": 0.2}, 0.31) == ("b", "c")
    assert cheapest_within({"a": 0.3, "b": 0.1, "c": 0.2}, 0.1) == ()


def test_shifts_survive_the_file_and_belong_to_one_pass(tmp_path):
    first, second = (made([column(0.1, 0.9, 0.2, 0.8)], [0, 0, 1, 1]) for _ in range(2))
    first.shifts = second.shifts = {"site0": 0.25}
    first.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors").shifts == {"site0": 0.25}
    assert first.merged(second).shifts is None  # the constants were those of one half
    second.shifts = None
    second.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors").shifts is None
    second.shifts = {"other": 0.25}
    second.save(tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="not a statistics file"):
        Statistics.load(tmp_path / "s.safetensors")
