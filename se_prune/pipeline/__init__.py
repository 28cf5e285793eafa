"""Whole jobs; the only part that sees every stage. `jobs` holds one function a command, `run` the whole recipe."""

from se_prune.pipeline.jobs import (
    Applied,
    Reporter,
    Silent,
    Structure,
    analyze,
    apply_plan,
    assess,
    example_input,
    finetune,
    inspect,
    new_network,
    plan,
    require_classes,
    structure,
    train,
)
from se_prune.pipeline.run import RunOutcome, run_recipe
from se_prune.training.loop import StepLog

__all__ = [
    "Applied",
    "Reporter",
    "RunOutcome",
    "Silent",
    "StepLog",
    "Structure",
    "analyze",
    "apply_plan",
    "assess",
    "example_input",
    "finetune",
    "inspect",
    "new_network",
    "plan",
    "require_classes",
    "run_recipe",
    "structure",
    "train",
]
