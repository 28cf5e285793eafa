"""Which gates are folded, what folding is said to be worth, and the logit shift against plain derivatives."""

import pytest
import torch

from se_prune.errors import BudgetError, DataError, SurgeryError, UsageError
from se_prune.folding import FoldRequest, Saving, liveness, look_ahead, parse_request, plan_sites
from se_prune.gates.shift import logit_shifts
from se_prune.gates.sites import find_sites
from se_prune.gates.tap import tap
from se_prune.pipeline.folds import check_rest, rest_of
from se_prune.records import Budget, LayerCost
from se_prune.results import SiteSummary
from tests.built import lively
from tests.evidence import CPU, Tensors
from tests.nets import RESIDUAL


def summary(name, shift, advice="keep", std=0.1):
    return SiteSummary(
        name=name,
        channels=2,
        hidden=1,
        mean=0.5,
        std_images=std,
        class_specificity=0.5,
        saturated=0.0,
        fold_loss=0.9,
        logit_shift=shift,
        advice=advice,
    )


ROWS = (summary("a", 0.03), summary("b", 0.001), summary("c", 0.002), summary("d", 0.0001))
CONSTANTS = {row.name: (0.25, 0.5) for row in ROWS}
NOTES = {"a": "into bn1", "b": "into bn2", "c": "into bn3"}
REFUSED = {"d": "it runs more than once"}


def folded(text, tolerance=None):
    plans = plan_sites(parse_request(text, tolerance), ROWS, CONSTANTS, NOTES, REFUSED)
    assert [p.name for p in plans] == ["a", "b", "c", "d"]
    assert all(p.constants == ((0.25, 0.5) if p.action == "fold" else ()) for p in plans)
    return "".join(p.name for p in plans if p.action == "fold")


def test_what_is_asked_for_is_folded_cheapest_first():
    assert folded("all") == "abc"
    assert [folded(n) for n in ("1", "2", "3")] == ["b", "bc", "abc"]
    assert folded(2) == "bc"
    assert folded("c,a") == "ac"
    assert folded(" c , a, c ") == "ac"
    assert folded("auto") == "bc"
    assert folded("auto", 0.0029) == "b"
    assert folded("auto", 0.5) == "abc"
    assert [parse_request(nothing) for nothing in ("none", "0", 0)] == [None] * 3


def test_a_plan_says_why_a_gate_stays_and_where_the_others_go():
    notes = [p.note for p in plan_sites(FoldRequest(mode="count", count=1), ROWS, CONSTANTS, NOTES, REFUSED)]
    assert notes == [None, "into bn2", None, "cannot be folded: it runs more than once"]


@pytest.mark.parametrize(
    ("given", "tolerance", "message"),
    [
        ("4", None, r"asks for more sites than the 3 that can be folded \(of 4 gate sites, 1 cannot be folded\)"),
        ("-1", None, "at least 0, got -1"),
        ("bb", None, "no gate site 'bb'"),
        ("", None, "got nothing"),
        (",", None, "got nothing"),
        ("auto", 0.0, "above 0, got 0"),
        ("auto", float("nan"), "above 0, got nan"),
        ("all", 0.1, "goes with --fold-gates auto"),
        ("none", 0.1, "goes with --fold-gates auto"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(given, tolerance, message):
    with pytest.raises(UsageError, match=message):
        folded(given, tolerance)


def test_a_site_that_cannot_be_folded_is_refused_by_name_only():
    with pytest.raises(SurgeryError, match="the gate of 'd' cannot be folded: it runs more than once"):
        folded("b,d")
    assert folded("b") == "b"


def saving(row):
    return Saving(sites=(row.name,), params=100, macs=50, operations=6, predicted_loss=row.predicted_loss)


def ahead(advice, refused=()):
    shifts = (0.002, 0.02, 0.001)
    rows = [summary(n, x, advice=a) for n, x, a in zip("abc", shifts, advice, strict=True)]
    savings = {row.name: saving(row) for row in rows if row.name not in refused}
    return look_ahead(rows, savings, dict.fromkeys(refused, "a reason"))


def test_the_first_line_says_how_alive_the_gates_are_and_what_folding_is_worth():
    moves = "and is predicted to move the logits by"
    every = f"saves 300 parameters, 150 MACs and 18 operations, {moves} 2.30 % of their energy."
    stats = "median standard deviation over images 0.100, class specificity 0.50"
    assert liveness(ahead(["keep"] * 3)) == (
        f"3 gate sites, alive: {stats}. Folding none is free; folding all 3 {every}"
    )
    assert liveness(ahead(["fold", "keep", "fold"])) == (
        f"3 gate sites, 1 of them alive: {stats}. Folding 2 (--fold-gates auto) saves 200 parameters, 100 MACs and 12 "
        f"operations, {moves} 0.30 % of their energy; folding all 3 {every}"
    )
    assert liveness(ahead(["fold"] * 3)) == (
        f"3 gate sites, dead: {stats}. Fold them all (--fold-gates all): {every}"
    )
    partly = ahead(["fold", "keep", "fold"], refused=("a",))
    assert partly.advised.sites == ("c",)
    assert "folding the 2 that can be saves 200 parameters" in liveness(partly)
    assert "none of which can be folded" in liveness(ahead(["keep"] * 3, refused=("a", "b", "c")))
    assert liveness(look_ahead((), {}, {})) == "This network has no gate sites."
    assert [ahead(a).state for a in (["keep"] * 3, ["fold"] * 3)] == ["alive", "dead"]


def logits_of(model, sites, images, gates):
    with tap(model, sites, lambda site, _, s: gates(site, s)):
        return model(images)


def test_the_logit_shift_is_the_derivative_times_the_change_of_the_gate(monkeypatch):
    monkeypatch.setattr("se_prune.gates.shift.PROBES", 400)
    torch.manual_seed(0)
    model = lively(RESIDUAL.build(), RESIDUAL.preprocessing).double()
    images = RESIDUAL.images(6).double()
    sites = find_sites(model, images)
    constants = {s.name: torch.rand(s.channels).double() for s in sites}
    found = logit_shifts(
        model,
        sites,
        constants,
        Tensors(images, torch.arange(6) % 5),
        RESIDUAL.preprocessing,
        device=CPU,
        batch_size=3,
    )
    with torch.no_grad():
        z, h = model(images), 1e-5
        for site in sites:
            a = constants[site.name].view(1, -1, 1, 1)
            low, high, real = (
                logits_of(
                    model,
                    sites,
                    images,
                    lambda here, s, t=t, a=a, x=site: s + t * (a - s) if here is x else None,
                )
                for t in (-h, h, 1.0)
            )
            slope = (high - low) / (2 * h)
            expected = float(slope.square().sum() / z.square().sum())
            assert found[site.name] == pytest.approx(expected, rel=0.15)
            assert float((real - z).square().sum() / z.square().sum()) != pytest.approx(expected, rel=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_a_gate_that_is_its_constant_shifts_nothing_and_no_image_is_refused():
    model, images = RESIDUAL.build(), RESIDUAL.images(4)
    with torch.no_grad():
        for block in model.blocks:
            block.se.expand.weight.zero_()
            block.se.expand.bias.zero_()
    sites = find_sites(model, images)
    constants = {s.name: torch.full((4,), 0.5) for s in sites}
    split = Tensors(images, torch.arange(4))
    assert set(logit_shifts(model, sites, constants, split, RESIDUAL.preprocessing, device=CPU).values()) == {
        0.0
    }
    other = {name: value + 0.1 for name, value in constants.items()}  # the control
    assert min(logit_shifts(model, sites, other, split, RESIDUAL.preprocessing, device=CPU).values()) > 1e-6
    with pytest.raises(DataError, match="no images"):
        logit_shifts(
            model, sites, constants, Tensors(images[:0], torch.zeros(0)), RESIDUAL.preprocessing, device=CPU
        )


def test_a_budget_is_of_the_dense_network_whatever_is_folded():
    def layer(macs, weights):
        return LayerCost(
            in_channels=4, out_channels=4, weights=weights, biases=0, macs=macs, channelwise=False
        )

    before = {"conv": layer(80, 60), "reduce": layer(20, 40)}
    left = {"conv": before["conv"]}
    assert rest_of(Budget(kind="macs", value=0.4), before, left).value == pytest.approx(0.5)
    assert rest_of(Budget(kind="params", value=0.3), before, left).value == pytest.approx(0.5)
    assert rest_of(Budget(kind="macs", value=0.9), before, left).value == 1.0  # folding alone meets it
    assert rest_of(Budget(kind="sparsity", value=0.4), before, left).value == 0.4  # counts channels
    uneven = {"conv": layer(41, 60)}
    assert 0.1 * 41 / 41 != 0.1
    assert rest_of(Budget(kind="macs", value=0.1), uneven, uneven).value == 0.1  # nothing is folded
    budget, widths = Budget(kind="macs", value=0.4), {"round_to": 1, "min_channels": 2, "hidden": "tie"}
    with pytest.raises(
        BudgetError, match=r"^--macs 0\.4 is 0\.5 of what the folded gates leave, and --macs 0\.5"
    ):
        check_rest((), left, budget, rest_of(budget, before, left), **widths)
    with pytest.raises(BudgetError, match=r"^--macs 0\.4 cannot be met"):
        check_rest((), before, budget, budget, **widths)
