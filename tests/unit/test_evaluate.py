"""Accuracy, its interval and the paired test, against values worked out elsewhere or by counting."""

import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from se_prune.errors import DataError
from se_prune.evaluate import Z95, _binomial_two_sided, drop, evaluate, mcnemar, paired, wilson
from se_prune.records import Preprocessing
from se_prune.results import Evaluation

CPU = torch.device("cpu")
PLAIN = Preprocessing(input_size=(1, 1, 6), mean=(0.0,), std=(1.0,))


@dataclass
class Logits:
    """A split whose images are the logits that `nn.Flatten` makes of them, (N, K)."""

    logits: torch.Tensor
    labels: torch.Tensor
    read: int = 0

    def __len__(self):
        return len(self.labels)

    def batches(self, batch_size, preprocessing):
        for start in range(0, len(self), batch_size):
            self.read += 1
            part = slice(start, start + batch_size)
            yield self.logits[part], self.labels[part]


def split(rows, labels):
    return Logits(torch.tensor(rows, dtype=torch.float32), torch.tensor(labels))


def run(data, model=None, **options):
    return evaluate(model or nn.Flatten(), data, PLAIN, device=CPU, **options)


# The Wilson interval.


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # these four solved in 40 decimal digits
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1.0),
        (9400, 10_000, 0.935174, 0.944488),
    ],
)
def test_wilson_against_known_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_newcombe(right, n, low, high):
    """Newcombe 1998, Table I, method 3, to the four decimals that are printed there."""
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (9400, 10_000), (1, 10**6)])
def test_the_ends_of_wilson_are_where_the_score_test_just_passes(right, n):
    for end in wilson(right, n):
        assert (right / n - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, abs=1e-15)


def test_wilson_has_symmetry_and_limits():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(3, 20)
    assert wilson(17, 20) == pytest.approx((1 - high, 1 - low))
    assert wilson(3, 20, z=0.0) == pytest.approx((0.15, 0.15))
    tiny = 1e-12
    for k in range(10):
        low, high = wilson(k, 9)
        assert 0 <= low <= k / 9 + tiny
        assert k / 9 - tiny <= high <= 1


# McNemar's test.


def counted(k, n):
    """Return the share of all 2^n sequences of coin flips that are at least as lopsided as k of n."""
    sequences = list(itertools.product((0, 1), repeat=n))
    return sum(abs(2 * sum(s) - n) >= abs(2 * k - n) for s in sequences) / len(sequences)


@pytest.mark.parametrize("n", range(1, 10))
def test_mcnemar_against_enumeration(n):
    for k in range(n + 1):
        test = mcnemar([True] * k + [False] * (n - k), [False] * k + [True] * (n - k))
        assert test.p_value == pytest.approx(counted(k, n), abs=1e-12)
        assert (test.only_first_right, test.only_second_right) == (k, n - k)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 0.03125),
        (1, 9, 0.021484375),
        (9, 1, 0.021484375),
        (3, 10, 0.09228515625),
        (6, 16, 0.052478790283203125),
        (86, 150, 3.716e-05),  # Agresti's approval ratings; R's exact2x2 prints 3.716e-05
    ],
)
def test_mcnemar_against_known_values(first, second, p):
    both, neither = 7, 4
    a = [True] * both + [False] * neither + [True] * first + [False] * second
    b = [True] * both + [False] * neither + [False] * first + [True] * second
    test = mcnemar(a, b)
    assert test.p_value == pytest.approx(p, rel=1e-3)
    assert test.top1_difference == pytest.approx((second - first) / len(a))


@pytest.mark.parametrize("n", [997, 998, 999, 1000, 1001, 1002, 2500])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.45, 0.49, 0.5])
def test_large_counts_are_as_exact_as_small_ones(n, share):
    k = int(share * n)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    exact = min(Fraction(1), Fraction(2 * tail, 2**n))
    if exact < Fraction(1, 10**300):
        assert 0 <= _binomial_two_sided(k, n) < 1e-290
    else:
        assert _binomial_two_sided(k, n) == pytest.approx(float(exact), rel=1e-9)


def test_thousands_of_differing_images_are_counted_exactly():
    # n = 20,000: with a new binomial coefficient for each of the 9,800 terms this took half a minute
    assert _binomial_two_sided(9800, 20_000) == pytest.approx(0.0047808894559, rel=1e-9)
    normal = math.erfc((200 - 0.5) / math.sqrt(5000) / math.sqrt(2))  # with continuity correction
    assert _binomial_two_sided(9800, 20_000) == pytest.approx(normal, rel=1e-3)


def test_a_paired_test_needs_pairs():
    for first, second in (([True], []), ([], []), ([True, False], [True])):
        with pytest.raises(DataError, match=f"same images twice, got {len(first)} and {len(second)}"):
            mcnemar(first, second)


# Evaluation.

ROWS = [
    # six classes; the label is right at rank 1, 2, 5, 6, 1, 1, 6
    [9, 1, 2, 3, 4, 5],  # predicted 0, label 0
    [8, 9, 2, 3, 4, 5],  # predicted 1, label 0
    [1, 9, 8, 7, 6, 0],  # predicted 1, label 0 (fifth)
    [0, 9, 8, 7, 6, 5],  # predicted 1, label 0 (sixth)
    [0, 1, 9, 3, 4, 5],  # predicted 2, label 2
    [0, 1, 9, 3, 4, 5],  # predicted 2, label 2
    [0, 1, 2, 3, 4, 9],  # predicted 5, label 0 (sixth)
]
LABELS = [0, 0, 0, 0, 2, 2, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_counts(batch_size):
    data, seen = split(ROWS, LABELS), []
    result = run(data, batch_size=batch_size, on_batch=seen.append)
    assert result.n == 7
    assert result.top1 == 3 / 7
    assert result.top5 == 5 / 7
    assert result.top1_ci95 == wilson(3, 7)
    assert result.predictions == (0, 1, 1, 1, 2, 2, 5)
    assert result.per_class == {"0": 1 / 5, "2": 1.0}
    expected = [
        math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(ROWS, LABELS, strict=True)
    ]
    assert result.loss == pytest.approx(sum(expected) / 7, rel=1e-12)
    assert sum(seen) == 7
    assert len(seen) == data.read == math.ceil(7 / batch_size)


def test_classes_are_named_as_far_as_names_go():
    names = ["ant", "bee"]
    assert run(split(ROWS, LABELS), classes=names).per_class == {"ant": 1 / 5, "2": 1.0}


def test_top5_with_fewer_classes_is_always_right():
    result = run(split([[1, 2, 3], [3, 2, 1]], [0, 1]))
    assert (result.top1, result.top5) == (0.0, 1.0)


@pytest.mark.parametrize("label", [6, 999])
def test_a_label_without_an_output(label):
    with pytest.raises(DataError, match=f"label {label}, but the network has 6 classes; .*that many classes"):
        run(split(ROWS, [0] * 6 + [label]))
    assert run(split(ROWS, [0] * 6 + [5])).per_class["5"] == 1.0


def test_no_images():
    with pytest.raises(DataError, match="no images to evaluate; check --data"):
        run(split(torch.zeros(0, 6).tolist(), []))


def test_the_network_is_run_in_eval_mode_without_gradients():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(1.0)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            assert not torch.is_grad_enabled()
            return self.drop(x * self.scale)

    model = Spy().train()
    assert run(split(ROWS, LABELS), model).top1 == 3 / 7
    assert not model.training


def test_half_precision_outputs_lose_nothing_more():
    class Half(nn.Module):
        def forward(self, x):
            return x.half()

    assert run(split(ROWS, LABELS), Half()) == run(split(ROWS, LABELS))


def test_paired_evaluations():
    data = split(ROWS, LABELS)
    worse = split([[0, 9, 0, 0, 0, 0]] * 4 + ROWS[4:], LABELS)
    test = paired(run(data), run(worse), data)
    assert (test.only_first_right, test.only_second_right) == (1, 0)
    assert test.top1_difference == pytest.approx(-1 / 7)
    assert test.p_value == 1.0
    same = paired(run(data), run(data), data)
    assert (same.top1_difference, same.only_first_right, same.p_value) == (0.0, 0, 1.0)


def answers(lost, won, both, neither=0):
    """Return two evaluations and their split: images that the second network lost, won, and where both agree."""
    labels = [0] * (lost + won + both + neither)
    first = [0] * lost + [1] * won + [0] * both + [1] * neither
    second = [1] * lost + [0] * won + [0] * both + [1] * neither
    n = len(labels)

    def of(predictions):
        right = predictions.count(0)
        return Evaluation(
            n=n, top1=right / n, top5=1.0, top1_ci95=(0.0, 1.0), loss=0.0, predictions=tuple(predictions)
        )

    return of(first), of(second), split([[0] * 6] * n, labels)


def test_a_drop_with_its_interval():
    found = drop(*answers(30, 20, 950), 0.95)
    assert (found.n, found.drop) == (1000, pytest.approx(0.01))
    lost, won = 31 / 1002, 21 / 1002  # one image more of each kind
    error = math.sqrt((lost + won - (lost - won) ** 2) / 1002)
    assert found.ci95 == pytest.approx((lost - won - 1.959964 * error, lost - won + 1.959964 * error))
    assert found.upper == pytest.approx(lost - won + 1.644854 * error)
    assert found.ci95[0] < 0 < found.drop < found.upper < found.ci95[1]
    assert drop(*answers(30, 20, 950), 0.5).upper == found.drop
    gain = drop(*answers(20, 30, 950), 0.95)
    assert gain.drop == pytest.approx(-0.01)


def test_networks_that_agree_everywhere_have_an_interval_all_the_same():
    found = drop(*answers(0, 0, 100), 0.9)
    assert found.drop == 0.0
    assert 0 < found.upper < found.ci95[1] < 0.05


def test_images_that_one_network_could_not_read_are_in_no_drop():
    first, second, images = answers(10, 0, 90)
    unread = replace(second, predictions=(-1, *second.predictions[1:]))
    found = drop(first, unread, images, 0.5)
    assert (found.n, found.drop) == (99, pytest.approx(9 / 99))
