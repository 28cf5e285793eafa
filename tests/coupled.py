"""Channel groups of small networks, and plans for one of them."""

import torch
from torch import nn

from se_prune.channels import couplings
from se_prune.gates.sites import find_sites
from se_prune.records import Budget, GroupPlan, Plan, SitePlan
from se_prune.surgery.cut import cut

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def structure(facts):
    model = facts.build()
    sites = find_sites(model, facts.images())
    return model, sites, couplings(model, facts.images(), sites)


def groups_of(model, example=IMAGES):
    return {c.group.name: c for c in couplings(model, example, find_sites(model, example))}


class Middle(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, middle):
        super().__init__()
        self.a, self.middle = nn.Conv2d(3, 4, 3, padding=1), middle
        self.b, self.fc = nn.Conv2d(4, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.b(self.middle(self.a(x))).mean((2, 3)))


def planned(found, name, removed):
    group = found[name].group
    cutting = GroupPlan(name=name, kind=group.kind, channels=group.channels, removed=removed)
    budget = Budget(kind="sparsity", value=0.1)
    return Plan(
        criterion="hand", budget=budget, round_to=1, min_channels=1, groups=(cutting,),
        macs_before=0, macs_after=0, params_before=0, params_after=0,
    )  # fmt: skip


def without(model, removed, *, fold=()):
    """Return the couplings, the plan that removes channels of layer `a` and folds sites, and the cut network."""
    example = torch.zeros(1, 2, 6, 6)
    found = couplings(model, example, find_sites(model, example))
    groups = tuple(
        GroupPlan(
            name=c.group.name,
            kind=c.group.kind,
            channels=c.group.channels,
            removed=removed if "a" in c.layers("out") else (),
        )
        for c in found
    )
    plan = Plan(
        criterion="random",
        budget=Budget(kind="sparsity", value=0.3),
        round_to=1,
        min_channels=1,
        groups=groups,
        macs_before=1,
        macs_after=1,
        params_before=1,
        params_after=1,
        sites=tuple(SitePlan(name=name, action="fold", loss=0.0) for name in fold),
    )
    return found, plan, cut(model, example, plan)
