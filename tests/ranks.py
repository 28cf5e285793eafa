"""What one process and two must agree on: run as `python -m tests.ranks FOLDER` under torchrun's variables.

`measured` and `trained` are called by the tests themselves for the answers of one process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import se_prune
from se_prune import distributed
from se_prune.data.folders import FolderImages
from se_prune.data.raw import FileImages
from se_prune.data.source import readable, shared_batches
from se_prune.errors import BudgetError, Interrupted, UsageError
from se_prune.evaluate import evaluate
from se_prune.files import write_text
from se_prune.gates.energies import collect_energies
from se_prune.gates.moments import collect_grams, has_rows
from se_prune.gates.shift import logit_shifts
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import collect
from se_prune.records import Preprocessing
from se_prune.settings import TrainSettings
from se_prune.surgery.affine import tune
from se_prune.surgery.repair import divergence, recalibrate_bn
from se_prune.training import fit
from se_prune.training.losses import FeatureMatch
from tests.nets import DEPTHWISE, DepthwiseSE
from tests.tiny import GREY, stripes

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PLAIN = TrainSettings(
    epochs=3, batch_size=24, lr=0.05, flip=0.5, crop_padding=1, amp="off", sync_bn="on", held_out=0.25
)
SETTINGS = {
    "plain": PLAIN,
    "mixed": replace(PLAIN, mixup=0.4, cutmix=1.0, erase=0.5, rand_augment=1, ema_decay=0.9),
    "accumulated": replace(PLAIN, batch_size=8, accumulate=5, ema_decay=0.9, ema_bn_images=48, clip_norm=0.1),
    "features": replace(PLAIN, distill_features=1.0, optimizer="adamw", lr=0.01),
    "best": replace(PLAIN, keep="best", patience=1, schedule="onecycle"),
    "looked up": replace(PLAIN, crop_padding=0),
}


class Dropping(DepthwiseSE):
    """Drops a tenth of its outputs while it trains."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


def net(cls=DepthwiseSE, seed=0):
    torch.manual_seed(seed)
    return cls().eval()


def measured(images: Path) -> dict[str, torch.Tensor]:
    """Return everything that passes over images result in: sums, Gram matrices, evaluations, repairs."""
    model, split = net(), stripes(101)  # odd, and 13 batches of 8, the last of 5
    sites = find_sites(model, DEPTHWISE.images())
    options = {"device": CPU, "batch_size": 8}
    statistics = collect(model, sites, split, GREY, classes=("a", "b", "c"), **options)
    found = {"counts": statistics.counts}
    for name, sums in statistics.sums.items():
        found |= {f"sums {name} {f.name}": getattr(sums, f.name) for f in fields(sums)}
    energies = collect_energies(model, split, GREY, classes=3, **options)
    found |= {f"energies {name}": value for name, value in energies.sums.items()}
    constants = {site.name: torch.full((site.channels,), 0.5) for site in sites}
    shifts = logit_shifts(model, sites, constants, split, GREY, **options)
    found["shifts"] = torch.tensor(list(shifts.values()), dtype=torch.float64)
    layers = [name for name, module in model.named_modules() if has_rows(module)]
    with torch.no_grad(), collect_grams(model, layers) as grams:
        for batch, _ in shared_batches(split, 8, GREY):
            model(batch)
    found |= {f"gram {name}": value for name, value in grams.items()}
    with torch.no_grad(), collect_grams(model, layers) as few:  # of two processes one has no image
        for batch, _ in shared_batches(stripes(5), 8, GREY):
            model(batch)
    found |= {f"gram of five {name}": value for name, value in few.items()}
    found |= evaluated("", evaluate(model, split, GREY, **options))
    other = net(seed=1)
    found["divergence"] = torch.tensor(divergence(model, other, split, GREY, device=CPU), dtype=torch.float64)
    recalibrate_bn(other, split, GREY, device=CPU, batch_size=8)
    found |= {f"bn {name}": value.double() for name, value in other.named_buffers()}
    many = stripes(320)
    found["tuned"] = torch.tensor(
        tune(model, other, many, GREY, device=CPU, batch_size=8), dtype=torch.float64
    )
    found |= {f"tuned {name}": value.detach().double() for name, value in other.named_parameters()}
    return found | of_folder(images)


def of_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Return an evaluation on files, two of which are damaged: each process reads one of them."""
    source = FolderImages.of(FileImages.scan(folder), workers=0, max_bad_images=2)
    size = Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(0.25,))
    found = evaluated("files ", evaluate(net(), source, size, device=CPU, batch_size=2))
    return found | {"files readable": readable(source, torch.arange(len(source)))}


def evaluated(title: str, result) -> dict[str, torch.Tensor]:
    numbers = [result.n, result.top1, result.top5, *result.top1_ci95, result.loss, *result.per_class.values()]
    return {
        f"{title}evaluation": torch.tensor(numbers, dtype=torch.float64),
        f"{title}predictions": torch.tensor(result.predictions),
    }


def compressed(network: Path) -> dict[str, torch.Tensor]:
    """Return what planning and repair of a trained network come to, by criterion."""
    split, model = stripes(101), net()
    model.load_state_dict(load_file(network))
    found = {}
    for criterion in ("excitation", "gate-fisher", "taylor", "hessian"):
        pairs = [(split.images.float() / 255, split.labels)]
        applied = se_prune.compress(
            model, pairs, macs=0.6, criterion=criterion, repair="layers", device="cpu"
        )
        found |= {f"{criterion} {k}": v.double() for k, v in applied.network.module.state_dict().items()}
        removed = [index for group in applied.plan.groups for index in group.removed]
        found[f"{criterion} plan"] = torch.tensor(removed)
        found[f"{criterion} refits"] = torch.tensor([f.error_after for f in applied.refits]).double()
    return found


def trained(
    settings: TrainSettings, cls=DepthwiseSE, teacher: bool = True, **options
) -> dict[str, torch.Tensor]:
    """Train, and return the weights, the loss and the accuracies."""
    model, dense = net(cls), net(seed=5) if teacher else None
    match = None
    if settings.distill_features:
        sites = find_sites(model, DEPTHWISE.images())
        match = FeatureMatch(
            student=sites, teacher=sites, kept={s.name: torch.arange(s.channels) for s in sites}
        )
    result = fit(
        model,
        stripes(101),
        settings,
        preprocessing=GREY,
        device=CPU,
        teacher=dense,
        features=match,
        **options,
    )
    numbers = [result.loss, result.train_top1, result.held_out_top1 or 0.0]
    return {**model.state_dict(), "numbers": torch.tensor(numbers, dtype=torch.float64)}


def stopped(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Interrupt the second process within a step; return the weights of the resumed run, and what was said."""
    settings = replace(PLAIN, epochs=2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupt(log):
        if log.step == 2 and distributed.rank() == distributed.size() - 1:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        trained(settings, Dropping, resume=folder, on_step=interrupt)
        said = "went on"
    except Interrupted as error:
        said = str(error)
    steps: list[int] = []
    result = trained(settings, Dropping, resume=folder, on_step=lambda log: steps.append(log.step))
    return result, {"said": said, "first step": steps[0]}


def refused(settings: TrainSettings) -> str:
    try:
        trained(settings)
    except UsageError as error:
        return str(error)
    return "trained"


def failing_in_main() -> str:
    """Return what all processes hear of a budget that only the main one looks at."""

    def refuse() -> None:
        raise BudgetError("the main process refused.")

    try:
        distributed.from_main(refuse)
    except BudgetError as error:
        return str(error)
    return "went on"


def prefixed(title: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{title}: {name}": value.contiguous().clone() for name, value in values.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    found = prefixed("measured", measured(folder / "images"))
    found |= prefixed("compressed", compressed(folder / "trained.safetensors"))
    for name, settings in SETTINGS.items():
        found |= prefixed(name, trained(settings))
    found |= prefixed("own norms", trained(replace(PLAIN, sync_bn="off")))
    found |= prefixed("whole", trained(replace(PLAIN, epochs=2), Dropping))
    resumed, notes = stopped(folder / "state")
    found |= prefixed("resumed", resumed)
    notes |= {
        "odd": refused(replace(PLAIN, batch_size=25)),
        "pairs": refused(replace(PLAIN, batch_size=26, mixup=1.0)),
        "budget": failing_in_main(),
        "record": asdict(distributed.record_from_main(Preprocessing, lambda: GREY)),
    }
    write_text(folder / "once.txt", f"written by process {distributed.rank()}")
    rank = distributed.rank()
    distributed.stop()  # from here on each writes for itself
    save_file(found, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(notes), encoding="utf-8")


def start_two(command: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Start a command twice with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    paths = f"{ROOT}{os.pathsep}{ROOT / 'cli'}"
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **os.environ,
                **place,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
