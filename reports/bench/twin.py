"""The largest difference between cut networks and their masked twins in float64, sparsity 0.1 to 0.9."""

from __future__ import annotations

from reports.bench.common import NETWORKS, bundled, markdown_table, write_report
from se_prune.data import open_data
from se_prune.device import choose_device
from se_prune.pipeline import apply_plan, plan, structure
from se_prune.records import Budget


def main() -> None:
    """Write `reports/twin.md`."""
    data, device = open_data("fashion-mnist"), choose_device("auto")
    rows = []
    for name in NETWORKS:
        network = bundled(name)
        found = structure(network)
        for tenth in range(1, 10):
            budget = Budget(kind="sparsity", value=tenth / 10)
            chosen = plan(network, found, budget, criterion="excitation", device=device, data=data)
            applied = apply_plan(network, found, chosen, device=device, data=data, repair="none")
            rows.append(
                {
                    "network": name,
                    "sparsity": tenth / 10,
                    "macs_kept": applied.after.macs / applied.before.macs,
                    "max_abs_diff": applied.max_abs_diff_masked,
                }
            )
    body = "# Cut networks against their masked twins\n\n"
    body += "Largest absolute difference of the logits in float64, eval mode, 8 training images.\n\n"
    body += markdown_table(
        ["network", "channels removed", "MACs kept", "largest difference"],
        [
            [
                f"zoo:{r['network']}",
                f"{100 * r['sparsity']:.0f} %",
                f"{100 * r['macs_kept']:.1f} %",
                f"{r['max_abs_diff']:.1e}",
            ]
            for r in rows
        ],
    )
    write_report("twin", "python -m reports.bench twin", body, rows)
