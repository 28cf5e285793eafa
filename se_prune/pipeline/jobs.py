"""Whole jobs: each function runs several stages, and is what a command calls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from se_prune import __version__, artifact
from se_prune.artifact import Network
from se_prune.channels import couplings, layer_costs
from se_prune.cost import count_cost
from se_prune.data import DataSource
from se_prune.data.source import Split, balanced_subset
from se_prune.errors import CheckpointError, DataError, SurgeryError
from se_prune.evaluate import evaluate
from se_prune.gates.energies import ChannelEnergies, collect_energies
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Statistics, collect
from se_prune.planning import check_budget, make_plan
from se_prune.records import (
    ArchSpec,
    ArtifactHeader,
    Budget,
    Cost,
    Coupling,
    Evaluation,
    GateSite,
    HistoryEntry,
    Inspection,
    Plan,
    Preprocessing,
    TrainSettings,
    to_dict,
)
from se_prune.scoring import Evidence, score
from se_prune.scoring.registry import find
from se_prune.surgery.cut import cut, verify
from se_prune.surgery.repair import recalibrate_bn
from se_prune.training import fit
from se_prune.training.loop import StepLog
from se_prune.zoo import registry

#: Training images that scores and repair look at, unless told otherwise.
MEASURED_IMAGES = 2048
BATCH = 256


class Reporter(Protocol):
    """Shows progress; `stage` opens a bar and yields a function that takes the advance and a note."""

    def stage(self, title: str, total: int | None) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """Open a bar for `total` units."""
        ...


class Silent:
    """A reporter that shows nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Yield a function that does nothing."""
        del title, total
        yield lambda *_, **__: None


@dataclass(slots=True, kw_only=True)
class Structure:
    """What the network is made of: gate sites, channel groups and cost."""

    example: torch.Tensor
    sites: tuple[GateSite, ...]
    couplings: tuple[Coupling, ...]
    cost: Cost


@dataclass(slots=True, kw_only=True)
class Applied:
    """What `apply` made: the plan and its proof, the network as cut and as repaired."""

    plan: Plan
    before: Cost
    after: Cost
    max_abs_diff_masked: float
    cut: nn.Module
    network: Network
    repair_seconds: float


def example_input(preprocessing: Preprocessing, n: int = 1) -> torch.Tensor:
    """Return `n` fixed random images (N, C, H, W) of the network's input size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *preprocessing.input_size, generator=generator)


def structure(network: Network) -> Structure:
    """Find gate sites, channel groups and cost of a network.

    Raises:
        SurgeryError: torch-pruning cannot trace it.
    """
    example = example_input(network.header.preprocessing)
    sites = find_sites(network.module, example)
    return Structure(
        example=example,
        sites=sites,
        couplings=couplings(network.module, example, sites),
        cost=count_cost(network.module, network.header.preprocessing, sites),
    )


def inspect(network: Network) -> Inspection:
    """Return what `inspect` prints."""
    found = structure(network)
    return Inspection(
        arch=network.header.arch,
        sites=found.sites,
        groups=tuple(c.group for c in found.couplings),
        cost=found.cost,
    )


def require_classes(network: Network, data: DataSource) -> None:
    """Check that the network has an output for every class of the data.

    Raises:
        DataError: It has more or fewer; the message gives both numbers.
    """
    with torch.no_grad():
        outputs = network.module.eval()(example_input(network.header.preprocessing)).shape[1]
    if outputs != len(data.classes):
        raise DataError(
            f"the network has {outputs} classes but {data.ref} has {len(data.classes)}; use the data it was "
            "trained on, or a checkpoint with that many classes."
        )


def require_statistics(network: Network, found: Structure, statistics: Statistics) -> None:
    """Check that statistics are of a network with these gate sites and layers.

    Raises:
        CheckpointError: They are of another network, or of this one before it was cut.
    """
    sums = {} if statistics.energies is None else statistics.energies.sums
    widths = {name: value.shape[1] for name, value in sums.items()}
    layers = {n: m for n, m in network.module.named_modules() if isinstance(m, artifact.CONV_TYPES)}
    same = all(widths.get(name, layer.in_channels) == layer.in_channels for name, layer in layers.items())
    if statistics.sites != found.sites or not same:
        raise CheckpointError(
            "the statistics are of another network, or of this one before it was cut; make them again with "
            "`se-prune analyze`."
        )


def analyze(
    network: Network,
    data: DataSource,
    *,
    device: torch.device,
    images: int | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Statistics:
    """Measure gates on training images (all, or a balanced `images` of them) and channel energies on a subset.

    Raises:
        SurgeryError: The network has no gate sites.
        DataError: The data does not fit the network.
    """
    show = reporter or Silent()
    require_classes(network, data)
    sites = find_sites(network.module, example_input(network.header.preprocessing))
    if not sites:
        raise SurgeryError(
            "the network has no gate sites, so there is nothing to analyse; `se-prune archs` lists those that have."
        )
    split = data.train if images is None else balanced_subset(data.train, images, seed)
    part = balanced_subset(split, MEASURED_IMAGES, seed)
    preprocessing = network.header.preprocessing
    with show.stage("gates", len(split)) as update:
        statistics = collect(
            network.module,
            sites,
            split,
            preprocessing,
            classes=data.classes,
            device=device,
            batch_size=BATCH,
            on_batch=update,
        )
    with show.stage("channel energies", len(part)) as update:
        statistics.energies = collect_energies(
            network.module,
            part,
            preprocessing,
            classes=len(data.classes),
            device=device,
            batch_size=BATCH,
            on_batch=update,
        )
    network.module.cpu()
    return statistics


def plan(
    network: Network,
    found: Structure,
    budget: Budget,
    *,
    criterion: str,
    device: torch.device,
    data: DataSource | None = None,
    statistics: Statistics | None = None,
    round_to: int = 1,
    min_channels: int = 2,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Plan:
    """Score the channels and choose those that leave.

    Raises:
        UsageError: The criterion is unknown, or measures images and none were given.
        CheckpointError: The statistics are of another network.
        BudgetError: The budget cannot be met.
    """
    needs = find(criterion).needs
    check_budget(budget, round_to, min_channels)
    if statistics is not None:
        require_statistics(network, found, statistics)
    energies = None if statistics is None else statistics.energies
    subset: Split | None = None
    if data is not None and needs:
        require_classes(network, data)
        subset = balanced_subset(data.train, MEASURED_IMAGES, seed)
        if "energies" in needs and energies is None:
            statistics, energies = _measured(
                network, data, found, device=device, seed=seed, reporter=reporter
            )
    preprocessing = network.header.preprocessing
    evidence = Evidence(
        model=network.module,
        example=found.example,
        sites=found.sites,
        couplings=found.couplings,
        seed=seed,
        device=device,
        statistics=statistics,
        energies=energies,
        batches=None if subset is None else lambda: subset.batches(BATCH, preprocessing),
    )
    with (reporter or Silent()).stage(f"score by {criterion}", None):
        scores = score(criterion, evidence)
    network.module.cpu()
    return make_plan(
        found.couplings,
        layer_costs(network.module, found.cost.per_layer),
        scores,
        budget,
        round_to=round_to,
        min_channels=min_channels,
    )


def _measured(
    network: Network,
    data: DataSource,
    found: Structure,
    *,
    device: torch.device,
    seed: int,
    reporter: Reporter | None,
) -> tuple[Statistics | None, ChannelEnergies | None]:
    """Return gate statistics (None without gates) and channel energies of `MEASURED_IMAGES` training images."""
    if found.sites:
        statistics = analyze(
            network, data, device=device, images=MEASURED_IMAGES, seed=seed, reporter=reporter
        )
        return statistics, statistics.energies
    split = balanced_subset(data.train, MEASURED_IMAGES, seed)
    with (reporter or Silent()).stage("channel energies", len(split)) as update:
        energies = collect_energies(
            network.module,
            split,
            network.header.preprocessing,
            classes=len(data.classes),
            device=device,
            batch_size=BATCH,
            on_batch=update,
        )
    return None, energies


def apply_plan(
    network: Network,
    found: Structure,
    chosen: Plan,
    *,
    device: torch.device,
    data: DataSource | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Applied:
    """Cut a network by a plan, prove it against its masked twin, and repair it on training images.

    Args:
        network: The dense network; left as it is.
        found: Its structure.
        chosen: The plan.
        device: Where to repair.
        data: Training images for the repair; None leaves the cut as it is.
        seed: Chooses the images.
        reporter: Shows progress.

    Raises:
        SurgeryError: The cut network differs from its masked twin.
    """
    show = reporter or Silent()
    with show.stage("cut", None):
        module = cut(network.module, found.example, chosen)
        images = example_input(network.header.preprocessing, 4)
        gap = verify(network.module, module, found.couplings, chosen, images)
        sites = find_sites(module, found.example)
        after = count_cost(module, network.header.preprocessing, sites)
    repaired = artifact.clone(module)
    repair: dict[str, Any] = {}
    started = time.perf_counter()
    if data is not None:
        subset = balanced_subset(data.train, MEASURED_IMAGES, seed)
        with show.stage("repair", len(subset)) as update:
            count = recalibrate_bn(
                repaired, subset, network.header.preprocessing, device=device, on_batch=update
            )
        repaired.cpu()
        repair = {"bn_recalibrated": count, "images": len(subset)}
    entry = HistoryEntry(
        stage="apply",
        details={
            "version": __version__,
            "criterion": chosen.criterion,
            "budget": to_dict(chosen.budget),
            "macs": [found.cost.macs, after.macs],
            "params": [found.cost.params, after.params],
            "max_abs_diff_masked": gap,
            "repair": repair,
            "seed": seed,
        },
    )
    header = replace(
        network.header,
        plan=chosen,
        geometry=artifact.changed_geometry(registry.build(network.header.arch), module),
        history=(*network.header.history, entry),
    )
    return Applied(
        plan=chosen,
        before=found.cost,
        after=after,
        max_abs_diff_masked=gap,
        cut=module,
        network=Network(module=repaired, header=header),
        repair_seconds=time.perf_counter() - started,
    )


def gate_layers(sites: tuple[GateSite, ...]) -> set[str]:
    """Return the names of the FC layers of all sites."""
    return {name for site in sites for name in (site.reduce, site.expand) if name is not None}


def finetune(
    network: Network,
    data: DataSource,
    settings: TrainSettings,
    *,
    device: torch.device,
    teacher: Network | None = None,
    seed: int = 0,
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
    stage: str = "finetune",
) -> Network:
    """Train a network on the training images, distilling from `teacher` where one is given.

    Returns:
        A new network on the CPU; the one given is left as it is.
    """
    require_classes(network, data)
    if teacher is not None:
        require_classes(teacher, data)
    module = artifact.clone(network.module)
    sites = find_sites(module, example_input(network.header.preprocessing))
    result = fit(
        module,
        data.train,
        settings,
        preprocessing=network.header.preprocessing,
        device=device,
        seed=seed,
        teacher=None if teacher is None else artifact.clone(teacher.module),
        no_decay=gate_layers(sites),
        resume=resume,
        on_step=on_step,
    )
    details = {
        "version": __version__,
        "data": data.name,
        "train_images": len(data.train),
        "seed": seed,
        "settings": to_dict(settings),
        "distilled": teacher is not None,
        "train_top1": result.train_top1,
    }
    header = replace(
        network.header,
        classes=network.header.classes or data.classes,
        history=(*network.header.history, HistoryEntry(stage=stage, details=details)),
    )
    return Network(module=module, header=header)


def new_network(arch: str, data: DataSource, seed: int) -> Network:
    """Build an architecture with random weights, with the class count and channels of a data set."""
    kwargs: dict[str, Any] = {"num_classes": len(data.classes)}
    own = data.preprocessing
    if own is not None and own.input_size[0] != 3:
        kwargs["in_channels"] = own.input_size[0]
    spec: ArchSpec = registry.resolve(arch, **kwargs)
    torch.manual_seed(seed)
    module = registry.build(spec).eval()
    preprocessing = registry.default_preprocessing(spec, module)
    if own is not None and preprocessing.input_size[0] == own.input_size[0]:
        preprocessing = replace(preprocessing, mean=own.mean, std=own.std)
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, classes=data.classes)
    return Network(module=module, header=header)


def train(
    arch: str,
    data: DataSource,
    settings: TrainSettings,
    *,
    device: torch.device,
    seed: int = 0,
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> tuple[Network, Evaluation]:
    """Train a network from random weights and evaluate it on the test split, which nothing else reads."""
    start = new_network(arch, data, seed)
    network = finetune(
        start, data, settings, device=device, seed=seed, resume=resume, on_step=on_step, stage="train"
    )
    return assess(network, data, device=device)


def assess(
    network: Network, data: DataSource, *, device: torch.device, reporter: Reporter | None = None
) -> tuple[Network, Evaluation]:
    """Evaluate a network on the test split and note the accuracy in its history.

    Raises:
        DataError: The data does not fit the network.
    """
    require_classes(network, data)
    with (reporter or Silent()).stage("evaluate", len(data.test)) as update:
        result = evaluate(
            network.module,
            data.test,
            network.header.preprocessing,
            device=device,
            classes=data.classes,
            on_batch=update,
        )
    network.module.cpu()
    entry = HistoryEntry(
        stage="evaluate",
        details={
            "data": data.name,
            "n": result.n,
            "top1": result.top1,
            "top1_ci95": list(result.top1_ci95),
            "loss": result.loss,
        },
    )
    header = replace(network.header, history=(*network.header.history, entry))
    return Network(module=network.module, header=header), result
