"""Whole jobs; the only part that sees every stage.

`measure` looks, `outline` lists, `jobs` changes, `run` does a whole recipe.
"""

from se_prune.pipeline.classes import for_classes, like
from se_prune.pipeline.compress import compress
from se_prune.pipeline.exporting import export_network
from se_prune.pipeline.folds import outlook
from se_prune.pipeline.jobs import Applied, apply_plan, plan
from se_prune.pipeline.latency import Rounding, Timing, choose_rounding, resolve_rounding
from se_prune.pipeline.measure import (
    Reporter,
    Silent,
    Structure,
    analyze,
    inspect,
    matching,
    require_classes,
    structure,
)
from se_prune.pipeline.outline import Outline, outline
from se_prune.pipeline.run import RunOutcome, run_recipe
from se_prune.pipeline.sensitivity import sensitivities
from se_prune.pipeline.sweep import Point, Sweep, pareto, sweep
from se_prune.pipeline.training import assess, finetune, new_network, train
from se_prune.preprocessing import example_input
from se_prune.training.loop import StepLog

__all__ = [
    "Applied",
    "Outline",
    "Point",
    "Reporter",
    "Rounding",
    "RunOutcome",
    "Silent",
    "StepLog",
    "Structure",
    "Sweep",
    "Timing",
    "analyze",
    "apply_plan",
    "assess",
    "choose_rounding",
    "compress",
    "example_input",
    "export_network",
    "finetune",
    "for_classes",
    "inspect",
    "like",
    "matching",
    "new_network",
    "outline",
    "outlook",
    "pareto",
    "plan",
    "require_classes",
    "resolve_rounding",
    "run_recipe",
    "sensitivities",
    "structure",
    "sweep",
    "train",
]
