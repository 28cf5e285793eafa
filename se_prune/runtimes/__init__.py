"""Where a network runs and is timed: the registry of runtimes, `bench`, and the measured table of layers."""

from se_prune.runtimes.base import RUNTIMES, Runtime, Source, require_runtime
from se_prune.runtimes.bench import bench, profiled
from se_prune.runtimes.table import latency_model, shapes_of

__all__ = [
    "RUNTIMES",
    "Runtime",
    "Source",
    "bench",
    "latency_model",
    "profiled",
    "require_runtime",
    "shapes_of",
]
