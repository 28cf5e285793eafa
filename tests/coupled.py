"""Channel groups of small networks, and plans for one of them."""

import torch
from torch import nn

from se_prune.channels import couplings
from se_prune.gates.sites import find_sites
from se_prune.records import Budget, GroupPlan, Plan

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
