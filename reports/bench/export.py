"""Export: every target that installs, on networks of every kind, dense and with half of their channels gone.

The bundled networks have their trained weights. The others have random ones, with BN statistics of real images
(Fashion-MNIST, resized): white noise, or BN without statistics, gives logits that no runtime reproduces. Branches whose
last BN begins at zero, which a converter would leave out, begin at one. A finished row is a line of
`reports/export.jsonl`; a target whose package is missing is left out until it is there.
"""

from __future__ import annotations

import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reports.bench.common import FOLDER, append_row, bundled, markdown_table, read_rows, write_report
from se_prune import text
from se_prune.artifact import NORM_TYPES, Network
from se_prune.checkpoint import open_model
from se_prune.data import DataSource, open_data
from se_prune.device import processor
from se_prune.errors import SePruneError
from se_prune.export import TARGETS, export, suffix_of
from se_prune.pipeline import plan, structure
from se_prune.pipeline.exporting import real_images
from se_prune.records import Budget
from se_prune.schema import to_dict
from se_prune.surgery.cut import cut

ROWS = FOLDER / "export.jsonl"
#: (name, images the files are checked on)
REFS = (
    ("zoo:se_resnet20", 64),
    ("zoo:se_mobilenet_x025", 64),
    ("timm:mobilenetv3_large_100", 16),
    ("timm:regnety_004", 16),
    ("timm:efficientnet_b0", 16),
    ("timm:legacy_seresnet50", 16),
)
SPARSITY = 0.5
VARIANTS = ("dense", "half")
BATCH = 16


def main() -> None:
    """Export what is missing, then write `reports/export.md`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done = {(row["network"], row["variant"], row["target"]) for row in read_rows(ROWS)}
    data = open_data("fashion-mnist")
    for ref, images in REFS:
        for variant in VARIANTS:
            missing = [t for t in TARGETS if (ref, variant, t) not in done and installed(t)]
            if missing:
                _export_all(ref, variant, missing, data, images)
    report()


def installed(target: str, *, int8: bool = False) -> bool:
    """Say whether a target's packages are there."""
    try:
        TARGETS[target].require_packages(int8=int8)
    except SePruneError:
        return False
    return True


def _export_all(ref: str, variant: str, targets: list[str], data: DataSource, count: int) -> None:
    network = _opened(ref, data)
    if variant == "half":
        network = _halved(network, data)
    images = real_images(data.train, network, count)
    for target in targets:
        row: dict[str, Any] = {"network": ref, "variant": variant, "target": target, "processor": processor()}
        row["versions"] = {package: metadata.version(package) for package in TARGETS[target].packages}
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = export(network, target, Path(folder) / f"network{suffix_of(target)}", images)
            except SePruneError as error:
                row["error"] = str(error)
            else:
                found = to_dict(result)
                row |= {key: found[key] for key in found if key not in {"output", "files", "int8", "target"}}
        append_row(ROWS, row)


def _opened(ref: str, data: DataSource) -> Network:
    """Return a network: trained where it is bundled, else with random weights and statistics of real images."""
    library, _, name = ref.partition(":")
    if library == "zoo":
        return bundled(name)
    torch.manual_seed(0)
    network = open_model(ref)
    for module in network.module.modules():
        if isinstance(module, NORM_TYPES) and module.weight is not None and not module.weight.any():
            nn.init.ones_(module.weight)
    _take_statistics(network.module, real_images(data.train, network, BATCH))
    return network


@torch.no_grad()
def _take_statistics(module: nn.Module, images: torch.Tensor) -> None:
    """Let every BN see the images once."""
    norms = [m for m in module.modules() if isinstance(m, NORM_TYPES)]
    for norm in norms:
        norm.momentum = 1.0
    module.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    module.eval()


def _halved(network: Network, data: DataSource) -> Network:
    """Return the network with half of its channels gone, the least L2 norms first, and fresh BN statistics."""
    found, budget = structure(network), Budget(kind="sparsity", value=SPARSITY)
    chosen = plan(network, found, budget, criterion="l2", device=torch.device("cpu"), repair="none")
    module = cut(network.module, found.example, chosen)
    _take_statistics(module, real_images(data.train, network, BATCH))
    return Network(module=module, header=network.header)


def report() -> None:
    """Write the tables from the rows."""
    rows = read_rows(ROWS)
    targets = [t for t in TARGETS if any(row["target"] == t for row in rows)]
    left = [t for t in TARGETS if t not in targets]
    kinds = [(ref, variant) for ref, _ in REFS for variant in VARIANTS]
    found = {(row["network"], row["variant"], row["target"]): row for row in rows}
    known = [row for row in rows if row.get("relative_diff") is not None]
    worst = max((row["relative_diff"] for row in known), default=float("nan"))
    agreeing = sum(row["top1_agreement"] == 1.0 for row in known)
    body = [
        "# Export\n",
        "Every target that was installed, on the bundled networks (trained) and on timm's with random weights and BN "
        f"statistics of real images; dense, and with {SPARSITY:.0%} of the channels gone (L2 norms, fresh BN "
        "statistics). Each file is compared with torch on Fashion-MNIST images, resized: 64 for the bundled networks, "
        f"16 for the others. {len(known)} of {len(kinds) * len(TARGETS)} files were compared; the largest difference, "
        f"relative to the largest logit, is {worst:.1e} (allowed: 1e-03), and {agreeing} of {len(known)} give the "
        "same top-1 class for every image.\n",
        "## Largest difference, relative to the largest logit; share of equal top-1\n",
        _table(kinds, targets, found, _parity),
        "## Size\n",
        _table(kinds, targets, found, lambda row: text.file_size(row["bytes"])),
        "## Latency, ms, batch 1, one thread (ExecuTorch: its own choice)\n",
        "Each file was timed when it was made, not in turn with the others, on a machine with other work: compare "
        "orders of magnitude. `reports/latency.md` has interleaved times.\n",
        _table(kinds, targets, found, _latency),
        _notes(rows, left),
    ]
    write_report("export", "python -m reports.bench export", "\n".join(body), rows)


def _parity(row: dict[str, Any]) -> str:
    if row["relative_diff"] is None:
        return "saved, not verified"
    return f"{row['relative_diff']:.1e}, {text.percent(row['top1_agreement'])}"


def _latency(row: dict[str, Any]) -> str:
    return text.MISSING if row["latency_ms"] is None else text.significant(row["latency_ms"])


def _table(kinds: Any, targets: list[str], found: Any, write: Any) -> str:
    rows = []
    for ref, variant in kinds:
        cells = [found.get((ref, variant, target)) for target in targets]
        shown = ["" if c is None else ("refused" if "error" in c else write(c)) for c in cells]
        rows.append([ref.partition(":")[2], variant, *shown])
    return markdown_table(["network", "", *targets], rows)


def _notes(rows: list[dict[str, Any]], left: list[str]) -> str:
    notes = sorted({f"- {row['target']}: {row['note']}." for row in rows if row.get("note")})
    notes += [f"- {r['target']}, {r['network']}, {r['variant']}: {r['error']}" for r in rows if "error" in r]
    if left:
        notes.append(f"- not installed where this ran: {', '.join(left)}.")
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    hardware = ", ".join(sorted({row["processor"] for row in rows}))
    return "## Notes\n\n" + "\n".join(notes) + f"\n\n{used}; torch {torch.__version__}; {hardware}.\n"


if __name__ == "__main__":
    main()
