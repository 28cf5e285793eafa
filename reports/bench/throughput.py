"""Images per second of the training loop over those of a bare PyTorch loop with the same augmentation, interleaved."""

from __future__ import annotations

import statistics as stats
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

from reports.bench.common import NETWORKS, bundled, markdown_table, write_report
from se_prune import artifact
from se_prune.data import open_data
from se_prune.data.source import balanced_subset
from se_prune.device import choose_device
from se_prune.settings import TrainSettings
from se_prune.training import fit
from se_prune.training.tracking import following

IMAGES, ROUNDS, BAR = 1024, 7, 0.95
SETTINGS = TrainSettings(epochs=1, batch_size=128, lr=1e-3, schedule="constant", warmup=0.0, amp="off")


def main() -> None:
    """Write `reports/throughput.md`."""
    data, device = open_data("fashion-mnist"), choose_device("auto")
    split = balanced_subset(data.train, IMAGES, 0)
    rows = []
    for name in NETWORKS:
        network = bundled(name)
        preprocessing, ratios = network.header.preprocessing, []
        speeds: dict[str, list[float]] = {"ours": [], "bare": []}
        for round_ in range(ROUNDS + 1):
            times = {}
            for label, loop in (("ours", _ours), ("bare", _bare))[:: 1 if round_ % 2 else -1]:
                model = artifact.clone(network.module)
                start = time.perf_counter()
                loop(model, split, preprocessing, device)
                times[label] = time.perf_counter() - start
            if round_:  # the first round warms up
                ratios.append(times["bare"] / times["ours"])
                for label, seconds in times.items():
                    speeds[label].append(IMAGES / seconds)
        rows.append(
            {
                "network": name,
                "images": IMAGES,
                "rounds": ROUNDS,
                "threads": torch.get_num_threads(),
                "ours": stats.median(speeds["ours"]),
                "bare": stats.median(speeds["bare"]),
                "median": stats.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
        )
    body = "# The training loop against a bare one\n\n" + (
        f"One epoch of {IMAGES:,} images, batch {SETTINGS.batch_size}, float32, SGD, with state, log and live figures, "
        f"against a loop of forward, loss, backward and step over the same augmented batches; {ROUNDS} interleaved "
        f"rounds, {torch.get_num_threads()} threads, {device.type}. The ratio is ours over bare in images per second, "
        f"all set-up included; the bar is {BAR}.\n\n"
    )
    body += markdown_table(
        ["network", "ours, images/s", "bare, images/s", "median ratio", "min", "max"],
        [
            [f"zoo:{r['network']}", *(f"{r[k]:.0f}" for k in ("ours", "bare"))]
            + [f"{r[k]:.3f}" for k in ("median", "min", "max")]
            for r in rows
        ],
    )
    write_report("throughput", "python -m reports.bench throughput", body, rows)


def _ours(model: torch.nn.Module, split: Any, preprocessing: Any, device: torch.device) -> None:
    with TemporaryDirectory() as name:
        state, log = Path(name) / "state", Path(name) / "log.csv"
        with following(SETTINGS, log, name="throughput", state=state) as follow:
            fit(
                model,
                split,
                SETTINGS,
                preprocessing=preprocessing,
                device=device,
                resume=state,
                on_step=follow,
            )


def _bare(model: torch.nn.Module, split: Any, preprocessing: Any, device: torch.device) -> None:
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), SETTINGS.lr, SETTINGS.momentum, weight_decay=SETTINGS.weight_decay, nesterov=True
    )
    for images, labels in split.training_batches(SETTINGS, preprocessing, seed=0, epoch=0):
        batch = images.to(device, memory_format=torch.channels_last)
        loss = F.cross_entropy(model(batch), labels.to(device), label_smoothing=SETTINGS.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
