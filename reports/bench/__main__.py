"""`python -m reports.bench [NAME …]`: run all studies, or those named."""

from __future__ import annotations

import importlib
import sys

STUDIES = (
    "bundled",
    "without_se",
    "twin",
    "overhead",
    "scores",
    "classes",
    "surgery",
    "folding",
    "latency",
    "ablation",
    "criteria",
    "discovery",
    "kills",
    "throughput",
    "distributed",
    "recipes",
    "export",
    "int8",
    "distill",
    "sensitivity",
    "schedules",
    "max_drop",
    "report",
    "graph_cost",
    "refit_cost",
)
#: Those that need files which are not ours, named by the environment.
NAMED = ("onnx_in", "picture", "full_finetune")


def main() -> None:
    """Run the studies named on the command line; those of `NAMED` run only when named."""
    names = sys.argv[1:] or list(STUDIES)
    unknown = [name for name in names if name not in {*STUDIES, *NAMED}]
    if unknown:
        sys.exit(f"there is no study '{unknown[0]}'; there are: {', '.join(STUDIES)}, {', '.join(NAMED)}.")
    for name in names:
        importlib.import_module(f"reports.bench.{name}").main()


if __name__ == "__main__":
    main()
