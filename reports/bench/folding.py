"""Folding gates: predicted against measured loss of each site, the accuracy that folding costs, the time that it wins.

Predictions and per-site losses are taken on training images; the test images give the accuracies alone. Resumable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from reports.bench.common import (
    FOLDER,
    NETWORKS,
    append_row,
    bundled,
    markdown_table,
    read_rows,
    spearman,
    write_report,
)
from se_prune.artifact import Network
from se_prune.checkpoint import open_model
from se_prune.cost import count_cost
from se_prune.data import DataSource, open_data
from se_prune.data.batches import TensorImages
from se_prune.data.source import Split, balanced_subset
from se_prune.evaluate import evaluate, paired
from se_prune.export import export
from se_prune.folding import FoldRequest, liveness, parse_request
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Statistics
from se_prune.gates.summary import fold_constants, fold_loss
from se_prune.gates.tap import tap
from se_prune.latency import measure_latency
from se_prune.pipeline import analyze, apply_plan, example_input, outlook, plan, structure
from se_prune.pipeline.exporting import real_images
from se_prune.pipeline.measure import MEASURED_IMAGES, SHIFT_IMAGES
from se_prune.records import Budget, RepairMode
from se_prune.results import Evaluation
from se_prune.runtimes.ort import open_file
from se_prune.surgery.fold import fold
from se_prune.zoo import registry

CPU = torch.device("cpu")
NOTHING_CUT = Budget(kind="sparsity", value=0.0)
HELD_OUT = 4096
ROUNDS = 200
ROWS = FOLDER / "folding.jsonl"
REPAIRS: tuple[RepairMode, ...] = ("none", "refit")
#: Timed with random weights, which take as long as any.
UNTRAINED = ("timm:mobilenetv3_small_100", "zoo:se_resnet50")
PREDICTIONS = {
    "shift": "logit shift, first order (what `auto` goes by)",
    "fisher": "KL divergence, second order: ½·E over the network's own classes of (∂log p/∂s·(a−s))²",
    "energy": "share of the site's energy, E[(s−a)²u²] / E[v²]",
    "lost": "energy lost at the site, E[(s−a)²u²]",
}
MEASURES = {"logits": "logits", "kl": "KL", "loss": "cross-entropy", "wrong": "top-1"}


def main() -> None:
    """Measure what is missing, then write `reports/folding.md`."""
    torch.set_num_threads(1)
    data = open_data("fashion-mnist")
    done = {row["network"] for row in read_rows(ROWS)}
    for name in NETWORKS:
        if f"zoo:{name}" not in done:
            append_row(ROWS, {**_study(bundled(name), data), "latency": _timed(bundled(name), data)})
    for ref in UNTRAINED:
        if ref not in done:
            append_row(ROWS, {"network": ref, "latency": _timed(open_model(ref), None)})
    report()


def report() -> None:
    """Write `reports/folding.md` from the rows that are there."""
    rows, share = read_rows(ROWS), _last_stage_of_the_paper()
    body = _body([row for row in rows if "sites" in row], [row["latency"] for row in rows], share)
    write_report("folding", "python -m reports.bench folding", body, {"rows": rows, "se_resnet50": share})


def _study(network: Network, data: DataSource) -> dict[str, Any]:
    order = balanced_subset(data.train, len(data.train) - 1, 0)  # measured images stand first
    assert isinstance(order, TensorImages)
    held_out = order.take(torch.arange(MEASURED_IMAGES, MEASURED_IMAGES + HELD_OUT))
    statistics = analyze(network, data, device=CPU, images=MEASURED_IMAGES)
    few = balanced_subset(data.train, SHIFT_IMAGES, 0)
    return {
        "network": network.header.arch.ref,
        "first_line": liveness(outlook(network, statistics)),
        "sites": _sites(network, statistics, few, held_out),
        "folded": _accuracies(network, data, statistics),
    }


@torch.no_grad()
def _logits(network: Network, module: torch.nn.Module, split: Split) -> torch.Tensor:
    return torch.cat([module(x) for x, _ in split.batches(256, network.header.preprocessing)])


def _sites(network: Network, statistics: Statistics, few: Split, held_out: Split) -> list[dict[str, Any]]:
    """Return predicted and measured losses of folding each site alone."""
    example = example_input(network.header.preprocessing)
    labels = torch.cat([y for _, y in held_out.batches(256, network.header.preprocessing)])
    z = _logits(network, network.module.eval(), held_out)
    dense = z.log_softmax(1)
    constants = {name: fold_constants(sums) for name, sums in statistics.sums.items()}
    fisher = _fisher(network, statistics, constants, few)
    rows = []
    for site in statistics.sites:
        sums = statistics.sums[site.name]
        module, _ = fold(network.module, example, {site.name: constants[site.name]})
        moved = _logits(network, module.eval(), held_out)
        assert statistics.shifts is not None
        rows.append(
            {
                "site": site.name,
                "shift": statistics.shifts[site.name],
                "fisher": fisher[site.name],
                "energy": fold_loss(sums),
                "lost": fold_loss(sums) * float(sums.s2u2.sum()),
                "logits": float((moved - z).square().sum() / z.square().sum()),
                "kl": float((dense.exp() * (dense - moved.log_softmax(1))).sum(1).mean()),
                "loss": float(F.cross_entropy(moved, labels) - F.cross_entropy(z, labels)),
                "wrong": float(
                    ((z.argmax(1) == labels).float() - (moved.argmax(1) == labels).float()).mean()
                ),
            }
        )
    return rows


def _fisher(
    network: Network, statistics: Statistics, constants: Mapping[str, torch.Tensor], few: Split
) -> dict[str, float]:
    total = dict.fromkeys(constants, 0.0)
    for images, _ in few.batches(64, network.header.preprocessing):
        added: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def probe(site: Any, _: Any, s: torch.Tensor, seen: Any = added) -> torch.Tensor:
            seen[site.name] = (s.detach(), torch.zeros_like(s, requires_grad=True))
            return s + seen[site.name][1]

        with tap(network.module, statistics.sites, probe):
            log_p = network.module(images).log_softmax(1)
        p = log_p.detach().exp()
        for k in range(p.shape[1]):
            slopes = torch.autograd.grad(log_p[:, k].sum(), [v for _, v in added.values()], retain_graph=True)
            for (name, (s, _)), slope in zip(added.items(), slopes, strict=True):
                step = (slope * (constants[name].to(s).view(1, -1, 1, 1) - s)).flatten(1).sum(1)
                total[name] += float((p[:, k] * step.square()).sum()) / (2 * len(few))
    return total


def _requests(statistics: Statistics) -> dict[str, FoldRequest]:
    last = statistics.sites[-1].name.split(".")[0]
    stage = [s.name for s in statistics.sites if s.name.split(".")[0] == last and last != "blocks"]
    texts = {"auto": "auto"}
    if stage:
        texts["the last stage"] = ",".join(stage)
    texts["all"] = "all"
    return {label: request for label, text in texts.items() if (request := parse_request(text)) is not None}


def _accuracies(network: Network, data: DataSource, statistics: Statistics) -> list[dict[str, Any]]:
    """Return top-1 on the test images, folded and repaired."""
    found = structure(network)
    preprocessing = network.header.preprocessing

    def on(module: torch.nn.Module, split: Split) -> Evaluation:
        return evaluate(module, split, preprocessing, device=CPU)

    dense = on(network.module, data.test)
    rows: list[dict[str, Any]] = [{"folded": "none", "repair": "", "top1": dense.top1}]
    for label, request in _requests(statistics).items():
        chosen = plan(
            network,
            found,
            NOTHING_CUT,
            criterion="excitation",
            device=CPU,
            statistics=statistics,
            folds=request,
        )
        for repair in REPAIRS:
            applied = apply_plan(network, found, chosen, device=CPU, data=data, repair=repair)
            module = applied.network.module
            result = on(module, data.test)
            test = paired(dense, result, data.test)
            rows.append(
                {
                    "folded": f"{label}: {chosen.sites_folded} of {len(chosen.sites)}",
                    "repair": repair,
                    "params": applied.after.params / applied.before.params,
                    "top1": result.top1,
                    "difference": test.top1_difference,
                    "p": test.p_value,
                    "max_abs_diff": applied.max_abs_diff_masked,
                }
            )
    return rows


def _timed(network: Network, data: DataSource | None) -> dict[str, Any]:
    """Time a network and the same with all gates folded in onnxruntime, batch 1, one thread, in turn."""
    preprocessing = network.header.preprocessing
    example = example_input(preprocessing)
    images = example if data is None else real_images(data.train, network, 1)
    sites = find_sites(network.module, example)
    module, _ = fold(network.module, example, {s.name: torch.full((s.channels,), 0.5) for s in sites})
    cost = count_cost(network.module, preprocessing, sites)
    folded = Network(module=module.eval(), header=network.header)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{label}.onnx" for label in ("dense", "folded")]
        for one, path in zip((network, folded), paths, strict=True):
            export(one, "onnx", path, images)
        runners = [("onnxruntime", open_file(path, images, 1)) for path in paths]
        first, second = measure_latency(runners, rounds=ROUNDS, warmup=20, threads=1)
    return {
        "network": network.header.arch.ref,
        "sites": len(sites),
        "macs_se": cost.macs_se / cost.macs,
        "params_se": 1 - count_cost(module, preprocessing).params / cost.params,
        "dense_ms": first.median_ms,
        "folded_ms": second.median_ms,
        "ratio": second.ratio,
        "rounds": ROUNDS,
    }


def _last_stage_of_the_paper() -> dict[str, float]:
    """Return the parameters that SE adds to ResNet-50: all of it, and without its last stage."""
    with torch.device("meta"):
        dense = registry.build(registry.resolve("zoo:se_resnet50"))
    shapes = {name: p.numel() for name, p in dense.named_parameters()}
    se = {name: n for name, n in shapes.items() if ".se_module." in name}
    plain = sum(shapes.values()) - sum(se.values())
    return {
        "all": sum(se.values()) / plain,
        "without_last": sum(n for name, n in se.items() if not name.startswith("layer4.")) / plain,
    }


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _body(rows: list[dict[str, Any]], timed: list[dict[str, Any]], share: Mapping[str, float]) -> str:
    text = ["# Folding gates\n"]
    text.append(
        "Every gate has one best constant per channel, a = E[s·u²] / E[u²]. A site is folded alone, its SE block taken "
        f"out for real, and compared with the network as it was on {HELD_OUT:,} training images that the statistics "
        f"({MEASURED_IMAGES:,} images) have not seen (the networks themselves were trained on them).\n"
    )
    for row in rows:
        text += [f"## {row['network']}\n", f"> {row['first_line']}\n", *_site_tables(row["sites"])]
        text += [
            "Nothing cut, no training, on the 10,000 test images. Repair `none`: the closed form alone.\n",
            _fold_table(row["folded"]),
        ]
    text += ["## The paper's last stage\n", _remark(rows, share)]
    text += ["## Time\n", *_time_table(timed)]
    return "\n".join(text)


def _site_tables(sites: list[dict[str, Any]]) -> list[str]:
    predicted = "predicted: share of the logits' energy"
    measured = ["measured: the same", "KL", "cross-entropy", "top-1, points"]
    table = [
        [
            s["site"],
            _percent(s["shift"]),
            _percent(s["energy"]),
            _percent(s["logits"]),
            f"{s['kl']:.4f}",
            f"{s['loss']:+.4f}",
            f"{-100 * s['wrong']:+.2f}",
        ]
        for s in sites
    ]
    ranks = [
        [
            meaning,
            *(f"{spearman([s[p] for s in sites], [s[m] for s in sites]):.2f}" for m in MEASURES),
        ]
        for p, meaning in PREDICTIONS.items()
    ]
    return [
        markdown_table(["site", predicted, "energy lost at the site", *measured], table),
        "Spearman's rank correlation over the sites with what was measured:\n",
        markdown_table(["prediction", *MEASURES.values()], ranks),
        "Top-1 moves little on images that the network was trained on, and none of them predicts it well.\n",
    ]


def _fold_table(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        told = ["", "", "", ""]
        if "p" in row:
            p = f"{row['p']:.2g}" if row["p"] else "< 1e-300"
            told = [
                _percent(row["params"], 1),
                f"{100 * row['difference']:+.2f}",
                p,
                f"{row['max_abs_diff']:.0e}",
            ]
        table.append([row["folded"], row["repair"], told[0], _percent(row["top1"]), *told[1:]])
    columns = [
        "folded",
        "repair",
        "parameters kept",
        "top-1",
        "points",
        "McNemar p",
    ]
    return markdown_table([*columns, "largest difference to its twin"], table)


def _remark(rows: list[dict[str, Any]], share: Mapping[str, float]) -> str:
    text = (
        f"SE adds {_percent(share['all'], 1)} to ResNet-50's parameters, {_percent(share['without_last'], 1)} without "
        "the SE blocks of its last stage (`zoo:se_resnet50`; the paper: about 10 % and 4 %). The paper finds the gates "
        "of its last two blocks nearly the same for every class, and the least useful. "
    )
    small = next(r for r in rows if r["network"] == "zoo:se_resnet20")
    last = [r for r in small["folded"] if r["folded"].startswith("the last stage")]
    costs = ", ".join(f"{100 * r['difference']:+.2f} points with repair {r['repair']}" for r in last)
    stage = [s for s in small["sites"] if s["site"].startswith("layer3.")]
    worst = sorted(small["sites"], key=lambda s: -s["logits"])[: len(stage)]
    here = "also" if not {s["site"] for s in worst} & {s["site"] for s in stage} else "not"
    return text + (
        f"In zoo:se_resnet20, trained here on small images, the last stage is {here} the cheapest to fold: "
        f"folding its {len(stage)} sites costs {costs} on the test images.\n"
    )


def _time_table(timed: list[dict[str, Any]]) -> list[str]:
    table = [
        [
            r["network"],
            str(r["sites"]),
            _percent(r["macs_se"]),
            _percent(r["params_se"], 1),
            f"{r['dense_ms']:.3f} ms",
            f"{r['folded_ms']:.3f} ms",
            f"{r['ratio']:.2f}",
        ]
        for r in timed
    ]
    columns = [
        "network",
        "sites",
        "MACs in SE",
        "parameters in SE",
        "with gates",
        "all folded",
        "times as fast",
    ]
    told = (
        f"onnxruntime, CPU, one thread, batch 1, medians of {ROUNDS} interleaved rounds; other work of the machine "
        "falls on both alike. Weights do not matter here: the last two networks have random ones.\n"
    )
    return [told, markdown_table(columns, table)]


if __name__ == "__main__":
    main()
