"""Surgery on networks of timm, torchvision and the zoo at 30 % and 60 % of their channels, beside plain torch-pruning.

Weights are random, with lively BN statistics that let no signal grow; channels leave by the L2 norm of their group.
Each network runs in a process of its own, which is given up after `SECONDS`. A finished one is a line of
`reports/surgery.jsonl`.
"""

from __future__ import annotations

import collections
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from rich.progress import track

from reports.bench.common import FOLDER, append_row, markdown_table, read_rows, write_report

ROWS = FOLDER / "surgery.jsonl"
SPARSITIES = (0.3, 0.6)
SECONDS = 400
#: torch-pruning alone follows some networks without end (ECA gates between views); it is given up sooner.
PLAIN_SECONDS = 120
NETWORKS = (
    *(f"zoo:{n}" for n in ("se_resnet20", "se_mobilenet_x025", "se_resnext29_8x4d", "se_resnet50", "se_shufflenet_g3")),
    *(f"zoo:{n}" for n in ("se_bn_inception", "se_resnext50_32x4d", "moskomule_se_resnet18", "se_resnet50_pre")),
    *(
        f"torchvision:{n}"
        for n in (
            "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_s",
            "regnet_y_400mf", "regnet_y_800mf",
        )
    ),
    *(
        f"timm:{n}"
        for n in (
            "cs3sedarknet_xdw", "cspnext_tiny", "eca_resnext26ts", "ecaresnet26t", "ecaresnext26t_32x4d",
            "ecaresnet50d_pruned", "efficientnet_b0", "efficientnetv2_rw_t", "efficientvit_m0", "ese_vovnet19b_slim_dw",
            "ese_vovnet19b_slim", "fastvit_t8", "fbnetv3_b", "ghostnet_050", "ghostnet_100", "ghostnetv2_100",
            "hardcorenas_a", "hardcorenas_b", "hgnet_tiny", "lcnet_035", "lcnet_050", "lcnet_100", "lcnetv2_small",
            "legacy_seresnet18", "legacy_seresnet34", "legacy_seresnet50", "legacy_seresnext26_32x4d", "mixnet_s",
            "mixnet_m", "mnasnet_small", "mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_100",
            "mobileone_s4", "nf_regnet_b0", "regnetv_040", "regnety_002", "regnety_004", "regnety_008", "regnetz_005",
            "regnetz_b16", "repghostnet_050", "repvit_m1", "resnest14d", "resnest26d", "rexnet_100", "rexnetr_100",
            "semnasnet_050", "semnasnet_100", "seresnet18", "seresnet33ts", "seresnet50", "seresnext26d_32x4d",
            "seresnext26ts", "seresnext50_32x4d", "shvit_s1", "skresnet18", "spnasnet_100", "tf_efficientnet_b0",
            "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "tf_mixnet_s", "tf_mobilenetv3_large_100",
            "tf_mobilenetv3_small_100", "tinynet_a", "tinynet_d", "tinynet_e", "tresnet_m", "test_efficientnet",
            "test_nfnet",
        )
    ),
)  # fmt: skip


def main() -> None:
    """Write `reports/surgery.md`."""
    if len(sys.argv) > 3 and sys.argv[1] == "one":
        sys.stdout.write(json.dumps(one(sys.argv[2], float(sys.argv[3]))) + "\n")
        return
    done = {(row["network"], row["sparsity"]) for row in read_rows(ROWS)}
    jobs = [job for job in itertools.product(NETWORKS, SPARSITIES) if job not in done]
    for name, sparsity in track(jobs, "surgery"):
        append_row(ROWS, {"network": name, "sparsity": sparsity, **_alone(name, sparsity)})
    report()


def _alone(name: str, sparsity: float) -> dict[str, Any]:
    """Run one network in a process of its own, and give it up where it does not end."""
    command = [sys.executable, "-m", "reports.bench.surgery", "one", name, str(sparsity)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return {"ours": f"not finished after {SECONDS} s", "plain": "not run"}
    if ended.returncode:
        return {"ours": f"ended with code {ended.returncode}", "plain": "not run"}
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def one(name: str, sparsity: float) -> dict[str, Any]:
    """Cut one network, prove it, save it, open it, export it; and let torch-pruning cut the same."""
    import torch

    from se_prune.checkpoint import open_model
    from se_prune.errors import SePruneError
    from tests.built import calm, lively

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    network = open_model(name)
    lively(network.module, network.header.preprocessing)
    calm(network.module, network.header.preprocessing)
    network.module.eval()
    row: dict[str, Any] = {}
    try:
        row |= _ours(network, sparsity)
    except SePruneError as error:
        row["ours"] = str(error)[:160]
    row["plain"] = _plain(network, sparsity)
    return row


def _ours(network: Any, sparsity: float) -> dict[str, Any]:
    import torch

    from se_prune import artifact
    from se_prune.export import export
    from se_prune.pipeline import apply_plan, example_input, plan, structure
    from se_prune.records import Budget

    device = torch.device("cpu")
    found = structure(network)
    chosen = plan(network, found, Budget(kind="sparsity", value=sparsity), criterion="l2", device=device)
    applied = apply_plan(network, found, chosen, device=device, repair="none")
    images = example_input(network.header.preprocessing, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.safetensors"
        artifact.save(path, applied.network)
        again = artifact.load(path)
        with torch.no_grad():
            logits = applied.network.module(images)
            same = torch.equal(again.module(images), logits)
        exported = export(again, "onnx", Path(folder) / "cut.onnx", images)
    return {
        "ours": "cut",
        "groups": len(found.couplings),
        "refused": dict(collections.Counter(str(g.note) for g in chosen.refused if g.note != "output layer")),
        "macs": applied.after.macs / applied.before.macs,
        "twin": applied.max_abs_diff_masked,
        "artifact_exact": same,
        "onnx": exported.max_abs_diff,
        "logits": float(logits.abs().max()),
    }


def _plain(network: Any, sparsity: float) -> str:
    """Let torch-pruning cut by the group's L2 norm, the same ratio in every layer, as its examples do."""
    from se_prune.cost import count_cost
    from se_prune.gates.sites import find_sites
    from se_prune.pipeline import example_input

    model, preprocessing = network.module.eval(), network.header.preprocessing
    example = example_input(preprocessing)
    before = count_cost(model, preprocessing, find_sites(model, example)).macs
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(PLAIN_SECONDS)
    try:
        plain_cut(model, example, sparsity)
        after = count_cost(model, preprocessing, find_sites(model, example)).macs
    except Exception as error:  # noqa: BLE001 - whatever it or the network it leaves behind raises is the result
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        signal.alarm(0)
    return f"runs, {100 * after / before:.0f} % of the MACs"


def plain_cut(model: Any, example: Any, ratio: float, round_to: int | None = None) -> None:
    """Let torch-pruning cut a module in place: L2 norm of the group, one ratio everywhere, the classifier ignored."""
    import torch
    import torch_pruning as tp

    outputs = model(example).shape[1]
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    model.requires_grad_(True)
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[m for m in heads if m.weight.shape[0] == outputs],
        round_to=round_to,
    )
    pruner.step()
    model.eval()
    with torch.no_grad():
        model(example)


def _give_up(*_: object) -> None:
    raise TimeoutError(f"not finished after {PLAIN_SECONDS} s")


def report() -> None:
    """Write `reports/surgery.md` from the rows that are there."""
    rows = read_rows(ROWS)
    cut = [r for r in rows if r["ours"] == "cut"]
    good = [
        r
        for r in cut
        if r["artifact_exact"] and r["onnx"] < 1e-3 * _scale(r) and r["twin"] < 1e-9 * _scale(r)
    ]
    whole = {r["network"] for r in rows} - {r["network"] for r in rows if r not in good}
    plain = {r["network"] for r in rows} - {r["network"] for r in rows if not r["plain"].startswith("runs")}
    body = "# Surgery\n\n"
    body += (
        "Random weights, BN statistics of random images. Ours: share of the channels of all groups that can be cut, by "
        "L2 norm; the cut network equals its masked twin in float64 (largest difference of the logits, within 1e-9 of "
        "the largest logit, which random weights make large in some), the artifact opens with equal outputs bit for "
        "bit, the ONNX file equals torch (largest difference, onnxruntime, within 1e-3 of the largest logit). "
        "torch-pruning: `MagnitudePruner`, the same ratio in every layer, the classifier ignored; it runs or does not, "
        "nothing more is checked.\n\n"
        f"Of {len({r['network'] for r in rows})} networks ours handles {len(whole)} at both sparsities, plain "
        f"torch-pruning runs on {len(plain)}.\n\n"
    )
    table = []
    for row in sorted(rows, key=lambda r: (NETWORKS.index(r["network"]), r["sparsity"])):
        name, share = row["network"], f"{100 * row['sparsity']:.0f} %"
        if row["ours"] != "cut":
            table.append([name, share, row["ours"], "", "", "", "", row["plain"]])
            continue
        kept = "; ".join(f"{times} × {reason}" for reason, times in row["refused"].items())
        table.append(
            [
                name,
                share,
                f"{100 * row['macs']:.0f} % of the MACs",
                f"{row['twin'] / _scale(row):.0e}",
                "exact" if row["artifact_exact"] else "differs",
                f"{row['onnx'] / _scale(row):.0e}",
                kept or "none",
                row["plain"],
            ]
        )
    head = ["network", "sparsity", "ours", "twin", "artifact", "ONNX", "groups that stay, beside the head"]
    body += markdown_table([*head, "torch-pruning"], table)
    write_report("surgery", "python -m reports.bench surgery", body, rows)


def _scale(row: dict[str, Any]) -> float:
    """Return what differences are relative to: the largest logit, or 1 where that is less."""
    return max(1.0, float(row["logits"]))


if __name__ == "__main__":
    main()
