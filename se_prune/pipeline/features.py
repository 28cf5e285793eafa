"""Which features of the dense network a cut one still has, for the distillation of features."""

from __future__ import annotations

import torch

from se_prune.artifact import Network
from se_prune.errors import UsageError
from se_prune.gates.sites import find_sites
from se_prune.pipeline.measure import structure
from se_prune.preprocessing import example_input
from se_prune.surgery.lost import lost_channels
from se_prune.training.losses import FeatureMatch


def match_features(student: Network, teacher: Network) -> FeatureMatch:
    """Match the gates of a network with those of its teacher, channel by channel, by the plan that cut it.

    Args:
        student: A network that was cut from the teacher, or one of the same size.
        teacher: The dense network.

    Raises:
        UsageError: They share no gate site, or the plan does not lead from the teacher to the student.
    """
    found = structure(teacher)
    plan = student.header.plan
    lost = {} if plan is None else lost_channels(plan, found.couplings)
    own = {s.name: s for s in find_sites(student.module, example_input(student.header.preprocessing))}
    shared = [site for site in found.sites if site.name in own]
    if not shared:
        raise UsageError("distill_features needs gate sites that both networks have; set it to 0.")
    kept = {}
    for site in shared:
        layer = site.features if site.features in lost else site.expand
        gone = lost.get(layer or "", set())
        index = [i for i in range(site.channels) if i not in gone]
        if len(index) != own[site.name].channels:
            raise UsageError(
                f"distill_features: at {site.name} the network has {own[site.name].channels} channels, but its plan "
                f"keeps {len(index)} of the teacher's {site.channels}; give the network that it was cut from as "
                "--teacher, or set distill_features = 0."
            )
        kept[site.name] = torch.tensor(index)
    return FeatureMatch(student=tuple(own[s.name] for s in shared), teacher=tuple(shared), kept=kept)
