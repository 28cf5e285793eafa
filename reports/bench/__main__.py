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
    "criteria",
    "discovery",
    "kills",
    "throughput",
    "distributed",
    "recipes",
    "export",
    "int8",
    "distill",
    "schedules",
    "max_drop",
    "report",
    "graph_cost",
)


def main() -> None:
    """Run the studies named on the command line; `onnx_in` and `picture` run only when named: they need files."""
    names = sys.argv[1:] or list(STUDIES)
    unknown = [name for name in names if name not in {*STUDIES, "onnx_in", "picture"}]
    if unknown:
        sys.exit(f"there is no study '{unknown[0]}'; there are: {', '.join(STUDIES)}, onnx_in, picture.")
    for name in names:
        importlib.import_module(f"reports.bench.{name}").main()


if __name__ == "__main__":
    main()
