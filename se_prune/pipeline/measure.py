"""Looking at a network: its structure, and what its gates and channels do on training images."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from se_prune import artifact
from se_prune.artifact import Network
from se_prune.channels import couplings
from se_prune.cost import count_cost
from se_prune.data import DataSource
from se_prune.data.batches import Batch
from se_prune.data.source import Split, balanced_subset, of_classes, shared_batches
from se_prune.errors import CheckpointError, DataError, SurgeryError, UsageError, first_line
from se_prune.gates.energies import ChannelEnergies, collect_energies
from se_prune.gates.shift import logit_shifts
from se_prune.gates.sites import discover, find_sites
from se_prune.gates.statistics import Statistics, collect
from se_prune.gates.summary import fold_constants
from se_prune.preprocessing import example_input
from se_prune.records import Cost, Coupling, GateSite, Inspection, LeftAlone, Preprocessing, RepairMode
from se_prune.scoring import Evidence
from se_prune.zoo import registry

LOG = logging.getLogger("se_prune")
#: Training images that scores and repair look at, unless told otherwise.
MEASURED_IMAGES = 2048
#: Those on which the logit shift of a constant gate is taken, which needs gradients.
SHIFT_IMAGES = 256
#: Images per pass; with fewer, summing what the gates do takes a larger share of the time.
BATCH = 256
INPUT = "give the size of its images with --input-size C,H,W, or another network"


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
    """What the network is made of: gate sites, channel groups and cost; what looks like a gate site and is none."""

    example: torch.Tensor
    sites: tuple[GateSite, ...]
    couplings: tuple[Coupling, ...]
    cost: Cost
    left_alone: tuple[LeftAlone, ...] = ()


def structure(network: Network) -> Structure:
    """Find gate sites, channel groups and cost of a network.

    Raises:
        UsageError: It does not take images of its input size.
        SurgeryError: torch-pruning cannot trace it.
    """
    example = example_input(network.header.preprocessing)
    output_of(network.module, example)
    found = discover(network.module, example)
    return Structure(
        example=example,
        sites=found.sites,
        couplings=couplings(network.module, example, found.sites),
        cost=count_cost(network.module, network.header.preprocessing, found.sites),
        left_alone=found.left_alone,
    )


def inspect(network: Network) -> Inspection:
    """Return what `inspect` prints."""
    found = structure(network)
    return Inspection(
        arch=registry.shown(network.header.arch),
        sites=found.sites,
        groups=tuple(c.group for c in found.couplings),
        cost=found.cost,
        left_alone=found.left_alone,
    )


def output_of(module: nn.Module, image: torch.Tensor, advice: str = INPUT) -> object:
    """Return what a network makes of an image (1, C, H, W), in eval mode.

    Raises:
        UsageError: It fails on it; the message ends with the advice.
    """
    try:
        with torch.no_grad():
            return module.eval()(image)
    except Exception as error:  # whatever somebody's own code raises at images that are not its own
        shape = tuple(image.shape[1:])
        raise UsageError(f"the network fails on images of {shape}: {first_line(error)}; {advice}.") from error


def class_count(module: nn.Module, image: torch.Tensor, advice: str = INPUT) -> int:
    """Return how many classes a network tells apart, as one image shows.

    Raises:
        UsageError: It fails on the image, or gives no logits.
    """
    logits = output_of(module, image, advice)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(
            f"the network must give logits (N, K) for images (N, C, H, W), got {found}; wrap it in a module that does."
        )
    return logits.shape[1]


def require_classes(network: Network, data: DataSource) -> None:
    """Check that the network has an output for every class of the data.

    Raises:
        DataError: It has more or fewer; the message gives both numbers.
        UsageError: It takes no images of its input size, or gives no logits.
    """
    outputs = class_count(network.module, example_input(network.header.preprocessing))
    if outputs != len(data.classes):
        raise DataError(
            f"the network has {outputs} classes but {data.ref} has {len(data.classes)}; use the data it was "
            "trained on, or a checkpoint with that many classes."
        )


def matching(network: Network, data: DataSource) -> DataSource:
    """Return the data of the network's own classes, numbered as the network numbers them.

    Classes are compared by name where both sides have names, and by their number where one has none.

    Raises:
        DataError: The network has other classes than the data.
    """
    own = network.header.classes
    if own == data.classes or not _named(own) or not _named(data.classes):
        require_classes(network, data)
        return data
    unknown = [name for name in own if name not in data.classes]
    if unknown:
        raise DataError(
            f"the network was trained on {len(own)} classes, and {len(unknown)} of them are not in {data.ref}: "
            f"{', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''} (it has {', '.join(data.classes[:3])} …); use "
            "the data it was trained on, or name the classes as there."
        )
    if len(own) == len(data.classes):
        _notice(
            f"{data.ref} has the network's {len(own)} classes in another order; they are matched by name."
        )
    data = of_classes(data, [data.classes.index(name) for name in own])
    require_classes(network, data)
    return data


def _named(classes: tuple[str, ...]) -> bool:
    """Say whether classes have names, and not only their numbers in order."""
    return classes != tuple(str(i) for i in range(len(classes)))


@functools.cache
def _notice(text: str) -> None:
    """Log a sentence once."""
    LOG.warning("%s", text)


def first_batches(split: Split, preprocessing: Preprocessing, limit: int | None) -> Iterator[Batch]:
    """Yield this process's share of the first `limit` images of a split, or of all."""
    part = split if limit is None else split.take(torch.arange(min(limit, len(split))))
    yield from shared_batches(part, BATCH, preprocessing)


def evidence_for(
    network: Network,
    found: Structure,
    subset: Split | None,
    *,
    device: torch.device,
    seed: int,
    statistics: Statistics | None,
    energies: ChannelEnergies | None,
    repair: RepairMode = "refit",
) -> Evidence:
    """Return what criteria may read of a network, and of the images that are measured."""
    batches = (
        None if subset is None else functools.partial(first_batches, subset, network.header.preprocessing)
    )
    return Evidence(
        model=network.module,
        example=found.example,
        sites=found.sites,
        couplings=found.couplings,
        seed=seed,
        device=device,
        statistics=statistics,
        energies=energies,
        batches=batches,
        repair=repair,
    )


def require_statistics(network: Network, found: Structure, statistics: Statistics) -> None:
    """Check that statistics are of a network with these gate sites and layers, and of as many classes.

    Raises:
        CheckpointError: They are of another network, or of this one before it was cut, or of other classes.
    """
    own = network.header.classes
    if own and len(statistics.classes) != len(own):
        raise CheckpointError(
            f"the statistics are of {len(statistics.classes)} classes, the network has {len(own)}; make them with "
            "`se-prune analyze` and the same --classes."
        )
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
    """Measure gates on training images (all, or a balanced `images` of them); on a subset, channel energies and shifts.

    Raises:
        SurgeryError: The network has no gate sites.
        DataError: The data does not fit the network.
    """
    data = matching(network, data)
    sites = find_sites(network.module, example_input(network.header.preprocessing))
    if not sites:
        raise SurgeryError(
            "the network has no gate sites, so there is nothing to analyse; `se-prune archs` lists those that have."
        )
    split = data.train if images is None else balanced_subset(data.train, images, seed)
    with (reporter or Silent()).stage("gates", len(split)) as update:
        statistics = collect(
            network.module,
            sites,
            split,
            network.header.preprocessing,
            classes=data.classes,
            device=device,
            batch_size=BATCH,
            on_batch=update,
        )
    part = balanced_subset(split, SHIFT_IMAGES, seed)
    with (reporter or Silent()).stage("logit shift of constant gates", len(part)) as update:
        statistics.shifts = logit_shifts(
            network.module,
            sites,
            {name: fold_constants(sums) for name, sums in statistics.sums.items()},
            part,
            network.header.preprocessing,
            device=device,
            on_batch=update,
        )
    statistics.energies = channel_energies(network, data, split, device=device, seed=seed, reporter=reporter)
    return statistics


def channel_energies(
    network: Network,
    data: DataSource,
    split: Split,
    *,
    device: torch.device,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> ChannelEnergies:
    """Measure the energy of every channel on at most `MEASURED_IMAGES` images of a split."""
    part = balanced_subset(split, MEASURED_IMAGES, seed)
    with (reporter or Silent()).stage("channel energies", len(part)) as update:
        energies = collect_energies(
            network.module,
            part,
            network.header.preprocessing,
            classes=len(data.classes),
            device=device,
            batch_size=BATCH,
            on_batch=update,
        )
    network.module.cpu()
    return energies
