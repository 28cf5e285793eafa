"""int8: the bundled networks, dense and at half of their MACs (planned and repaired, no training), in every target.

Accuracy of the float and the int8 file on the test images of Fashion-MNIST: the whole set where the environment names
its folder (`FASHION_MNIST=DIR`), else the bundled part. Float and int8 are timed in turn. A finished row is a line of
`reports/int8.jsonl`; a target whose package is missing is left out until it is there.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    write_report,
)
from reports.bench.export import installed
from se_prune import text
from se_prune.artifact import Network
from se_prune.data import DataSource, open_data
from se_prune.device import processor
from se_prune.export import TARGETS, suffix_of
from se_prune.pipeline import apply_plan, export_network, plan, structure
from se_prune.records import Budget
from se_prune.schema import to_dict

ROWS = FOLDER / "int8.jsonl"
VARIANTS = ("half", "dense")
CHOSEN = tuple(name for name, target in TARGETS.items() if target.takes_int8)
HALF, CRITERION = 0.5, "excitation"
#: The bars: accuracy that may be lost, and the size against float.
MOST_DROP, MOST_SIZE = 0.005, 0.3


def main() -> None:
    """Export what is missing, then write `reports/int8.md`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done = {(row["network"], row["variant"], row["target"]) for row in read_rows(ROWS)}
    data = open_data(os.environ.get("FASHION_MNIST", "fashion-mnist"))
    for variant in VARIANTS:
        for name in NETWORKS:
            missing = [t for t in CHOSEN if (name, variant, t) not in done and installed(t, int8=True)]
            if missing:
                _export_all(name, variant, missing, data)
    report()


def _export_all(name: str, variant: str, targets: list[str], data: DataSource) -> None:
    network = bundled(name)
    if variant == "half":
        network = _halved(network, data)
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{suffix_of(target)}"
            result = export_network(network, target, path, data, int8=True)
        found = to_dict(result)
        append_row(
            ROWS,
            {
                "network": name,
                "variant": variant,
                "target": target,
                "bytes": result.bytes,
                "latency_ms": result.latency_ms,
                "top1_agreement": result.top1_agreement,
                "int8": found["int8"],
                "processor": processor(),
                "versions": {package: metadata.version(package) for package in TARGETS[target].packages},
            },
        )


def _halved(network: Network, data: DataSource) -> Network:
    """Return the network at half of its MACs, repaired by least squares."""
    cpu, found = torch.device("cpu"), structure(network)
    chosen = plan(network, found, Budget(kind="macs", value=HALF), criterion=CRITERION, device=cpu, data=data)
    return apply_plan(network, found, chosen, device=cpu, data=data).network


def report() -> None:
    """Write the tables from the rows."""
    rows = sorted(read_rows(ROWS), key=_order)
    met = [
        f"{row['target']}, {row['network']}, {row['variant']}"
        for row in rows
        if _drop(row) <= MOST_DROP and row["int8"]["size_ratio"] <= MOST_SIZE
    ]
    images = sorted({str(row["int8"]["n"]) for row in rows})
    body = [
        "# int8\n",
        f"The bundled networks, dense and at {HALF:.0%} of their MACs (`{CRITERION}`, least squares, no training), "
        f"each as float and as int8 file of the same target; top-1 on {' or '.join(images)} test images of "
        "Fashion-MNIST, 256 training images for calibration. Size and latency (batch 1, one thread, float and int8 in "
        "turn) are int8 over float. Signal to noise is that of the logits on 256 other training images.\n",
        markdown_table(
            [
                "network",
                "",
                "target",
                "float",
                "int8",
                "points lost",
                "same top-1",
                "size",
                "ratio",
                "latency",
                "dB",
            ],
            [_cells(row) for row in rows],
        ),
        f"At most {100 * MOST_DROP:.1f} points lost and at most {MOST_SIZE} of the size: {'; '.join(met) or 'none'}. "
        "Networks as small as these are mostly graph where the format is verbose: OpenVINO's `.xml` alone is larger "
        "than their weights.\n",
        "## Layer by layer, ONNX\n",
        "Signal to noise of the logits where one layer alone is int8: the median, and the worst, of the kinds of "
        "layers; and which layers the export kept in float because the whole network gains at least 0.5 dB.\n",
        markdown_table(
            ["network", "", "kind", "layers", "median, dB", "worst, dB", "worst layer"], _kinds(rows)
        ),
        markdown_table(["network", "", "kept in float"], _kept(rows)),
        _machine(rows),
    ]
    write_report("int8", "python -m reports.bench int8", "\n".join(body), rows)


def _order(row: dict[str, Any]) -> tuple[int, int, int]:
    return VARIANTS.index(row["variant"]), NETWORKS.index(row["network"]), CHOSEN.index(row["target"])


def _drop(row: dict[str, Any]) -> float:
    return float(row["int8"]["top1_float"] - row["int8"]["top1"])


def _cells(row: dict[str, Any]) -> list[str]:
    found = row["int8"]
    return [
        row["network"],
        row["variant"],
        row["target"],
        text.percent(found["top1_float"], 2),
        text.percent(found["top1"], 2),
        f"{100 * _drop(row):.2f}",
        text.percent(row["top1_agreement"]),
        text.file_size(row["bytes"]),
        f"{found['size_ratio']:.3f}",
        f"{found['latency_ratio']:.2f}",
        f"{found['output_db']:.1f}",
    ]


def _kind(layer: dict[str, Any]) -> str:
    if layer["kind"] == "Mul":
        return "gate's product"
    if layer["kind"] == "Add":
        return "sum of a residual"
    if ".se." in layer["layer"]:
        return "gate's layers"
    return "depthwise" if "depthwise" in layer["layer"] else "other layers"


def _kinds(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = []
    for row in (r for r in rows if r["int8"]["layers"]):
        kinds: dict[str, list[tuple[float, str]]] = {}
        for layer in row["int8"]["layers"]:
            if layer["alone_db"] is not None:
                kinds.setdefault(_kind(layer), []).append((layer["alone_db"], layer["layer"]))
        for kind, found in sorted(kinds.items(), key=lambda item: min(item[1])):
            middle = statistics.median(db for db, _ in found)
            worst = min(found)
            figures = [str(len(found)), f"{middle:.1f}", f"{worst[0]:.1f}", worst[1]]
            table.append([row["network"], row["variant"], kind, *figures])
    return table


def _kept(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            r["network"],
            r["variant"],
            ", ".join(n["layer"] for n in r["int8"]["layers"] if n["kept_float"]) or "none",
        ]
        for r in rows
        if r["int8"]["layers"]
    ]


def _machine(rows: list[dict[str, Any]]) -> str:
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return f"{used}; {', '.join(sorted({row['processor'] for row in rows}))}.\n"


if __name__ == "__main__":
    main()
