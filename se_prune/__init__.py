"""Channel pruning for Squeeze-and-Excitation networks, guided by their own gates.

The public API is loaded on first use, so that `import se_prune` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "ArchSpec": "se_prune.records",
    "Budget": "se_prune.records",
    "Network": "se_prune.artifact",
    "SePruneError": "se_prune.errors",
    "Statistics": "se_prune.gates.statistics",
    "TrainSettings": "se_prune.settings",
    "Timing": "se_prune.pipeline",
    "analyze": "se_prune.pipeline",
    "apply_plan": "se_prune.pipeline",
    "assess": "se_prune.pipeline",
    "compress": "se_prune.pipeline",
    "bench": "se_prune.runtimes",
    "choose_device": "se_prune.device",
    "count_cost": "se_prune.cost",
    "export_network": "se_prune.pipeline",
    "find_sites": "se_prune.gates.sites",
    "finetune": "se_prune.pipeline",
    "for_classes": "se_prune.pipeline",
    "inspect": "se_prune.pipeline",
    "measure_latency": "se_prune.latency",
    "open_data": "se_prune.data",
    "open_model": "se_prune.checkpoint",
    "paired": "se_prune.evaluate",
    "plan": "se_prune.pipeline",
    "run_recipe": "se_prune.pipeline",
    "save": "se_prune.artifact",
    "structure": "se_prune.pipeline",
    "summarise": "se_prune.gates.summary",
    "sweep": "se_prune.pipeline",
    "train": "se_prune.pipeline",
    "write_report": "se_prune.report",
}
__all__ = ["__version__", *_API]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'se_prune' has no attribute '{name}'")
    return getattr(importlib.import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
