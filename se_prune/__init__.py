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
    "SePruneError": "se_prune.errors",
    "TrainSettings": "se_prune.records",
    "open_data": "se_prune.data",
    "open_model": "se_prune.checkpoint",
    "find_sites": "se_prune.gates.sites",
    "evaluate": "se_prune.evaluate",
    "fit": "se_prune.training",
}
__all__ = ["__version__", *_API]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'se_prune' has no attribute '{name}'")
    return getattr(importlib.import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
