"""Criteria: rules that score the channels of every group; lower scores leave first."""

from se_prune.scoring.registry import CRITERIA, Evidence, score

__all__ = ["CRITERIA", "Evidence", "score"]
