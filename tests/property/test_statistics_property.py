"""Sums over images: two parts add up to the whole, and channels keep to themselves."""

from dataclasses import fields

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from se_prune.data.batches import TensorImages
from se_prune.gates.energies import collect_energies
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Collector, SiteSums, Statistics, collect
from se_prune.gates.summary import fold_loss, summarise
from se_prune.records import GateSite
from tests.nets import DEPTHWISE

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cow")
SITE = GateSite(name="se", owner="se", channels=4, hidden=1, reduce="se.a", expand="se.b")
few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def batch(seed, n, channels=4):
    """Return features (N, C, 3, 2), gates (N, C, 1, 1) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, channels, 3, 2, generator=generator)
    s = torch.rand(n, channels, 1, 1, generator=generator)
    return u, s, torch.randint(0, len(CLASSES), (n,), generator=generator)


def summed(*parts):
    """Return the statistics of a collector that saw the parts one after another."""
    collector = Collector([SITE], len(CLASSES), CPU)
    for u, s, labels in parts:
        collector.begin(labels)
        collector.on_gate(SITE, u, s)
    return Statistics(classes=CLASSES, counts=collector.counts, sites=(SITE,), sums=collector.result())


def assert_near(first, second, tolerance=1e-12):
    assert torch.equal(first.counts, second.counts)
    for name, sums in first.sums.items():
        for field in fields(SiteSums):
            a, b = getattr(sums, field.name), getattr(second.sums[name], field.name)
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), field.name


@few
@given(seed=seeds, n=st.integers(2, 30), data=st.data())
def test_merging_two_parts_equals_one_pass(seed, n, data):
    at = data.draw(st.integers(1, n - 1))
    u, s, labels = batch(seed, n)
    first, second = (u[:at], s[:at], labels[:at]), (u[at:], s[at:], labels[at:])
    whole = summed((u, s, labels))
    merged = summed(first).merged(summed(second))
    assert merged.n == n
    assert_near(merged, whole)
    assert_near(summed(second).merged(summed(first)), whole)
    assert_near(summed(first, second), whole)
    assert not torch.allclose(merged.sums["se"].s, summed(first).sums["se"].s)


@few
@given(seeds, seeds, seeds)
def test_merging_is_associative_and_the_empty_sum_is_its_zero(a, b, c):
    x, y, z = (summed(batch(seed, 5)) for seed in (a, b, c))
    assert_near(x.merged(y).merged(z), x.merged(y.merged(z)))
    nothing = Statistics(
        classes=CLASSES,
        counts=torch.zeros(3, dtype=torch.float64),
        sites=(SITE,),
        sums={"se": SiteSums.zeros(3, 4)},
    )
    assert_near(nothing.merged(x), x, tolerance=0)


@few
@given(seed=seeds, order=st.permutations(range(4)))
def test_permuting_channels_permutes_the_sums(seed, order):
    u, s, labels = batch(seed, 9)
    plain = summed((u, s, labels)).sums["se"]
    turned = summed((u[:, order], s[:, order], labels)).sums["se"]
    for field in fields(SiteSums):
        values = getattr(plain, field.name)
        per_channel_first = field.name in {"smin", "smax", "histogram"}
        expected = values[order] if per_channel_first else values[:, order]
        assert torch.allclose(getattr(turned, field.name), expected, rtol=1e-12, atol=1e-12), field.name
    if list(order) != sorted(order):
        assert not torch.allclose(turned.s, plain.s)


@few
@given(seed=seeds, order=st.permutations(range(9)))
def test_the_order_of_images_does_not_matter(seed, order):
    u, s, labels = batch(seed, 9)
    assert_near(summed((u, s, labels)), summed((u[order], s[order], labels[order])))


@few
@given(seed=seeds)
def test_energies_obey_the_inequalities_between_them(seed):
    statistics = summed(batch(seed, 12))
    sums = statistics.sums["se"]
    assert torch.all(sums.s2u2 <= sums.su2 + 1e-12)  # gates are at most 1
    assert torch.all(sums.su2 <= sums.u2 + 1e-12)
    assert torch.all(sums.su2.square() <= sums.s2u2 * sums.u2 * (1 + 1e-9) + 1e-12)  # Cauchy, Schwarz
    assert torch.all(sums.v.square() <= sums.s2u2 * statistics.counts[:, None] * (1 + 1e-5) + 1e-12)
    assert torch.all(sums.smin <= sums.smax)
    assert torch.equal(sums.histogram.sum(1), torch.full((4,), 12.0, dtype=torch.float64))
    assert 0 <= fold_loss(sums) <= 1
    (row,) = summarise(statistics)
    assert 0 <= row.class_specificity <= 1 + 1e-9
    assert 0 <= row.saturated <= 1


@settings(max_examples=6, deadline=None, derandomize=True)
@given(at=st.integers(1, 11))
def test_measuring_two_parts_of_the_data_equals_measuring_all(at):
    torch.manual_seed(0)
    model = DEPTHWISE.build().eval()
    sites = find_sites(model, DEPTHWISE.images())
    pixels = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8)
    split = TensorImages(images=pixels, labels=torch.arange(12) % 3)

    def measure(part):
        # Batches of one, so that no convolution sees another batch size, and float32 rounds alike.
        options = {"device": CPU, "batch_size": 1}
        result = collect(model, sites, part, DEPTHWISE.preprocessing, classes=CLASSES, **options)
        result.energies = collect_energies(model, part, DEPTHWISE.preprocessing, classes=3, **options)
        return result

    whole = measure(split)
    merged = measure(split.take(torch.arange(at))).merged(measure(split.take(torch.arange(at, 12))))
    assert_near(merged, whole)
    assert merged.energies.sums.keys() == whole.energies.sums.keys()
    for name, table in whole.energies.sums.items():
        assert torch.allclose(merged.energies.sums[name], table, rtol=1e-12, atol=1e-12)
