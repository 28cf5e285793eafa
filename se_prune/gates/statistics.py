"""The statistics pass: what every gate does on real images, streamed once over the data.

Shapes: N images, K classes, C channels, H×W positions, B histogram bins. All sums are float64; memory is
O(K·C) whatever the number of images; adding the sums of two halves equals one pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from se_prune import distributed
from se_prune.data.source import shared_batches
from se_prune.errors import CheckpointError, DataError, SePruneError
from se_prune.files import write_tensors
from se_prune.gates.energies import ChannelEnergies
from se_prune.gates.tap import tap
from se_prune.records import GateSite, Preprocessing
from se_prune.schema import SCHEMA_VERSION, from_dict, to_dict

if TYPE_CHECKING:
    from se_prune.data import Split

#: Bins of a gate's histogram: 0.05 and 0.95, the bounds of saturation, are edges of it.
BINS = 100
HEADER_KEY = "se_prune_statistics"
TABLE = ("s", "s2", "u2", "su2", "s2u2", "v")
#: Images whose sums are taken at once: their columns stay in the cache.
CHUNK = 64
ENERGY = "energy:"
ENERGY_COUNTS = "energy-counts"


@dataclass(slots=True, kw_only=True)
class SiteSums:
    """Sums over images of one site: gates and energies per class and channel (K, C), histogram (C, B).

    `u2` is Σ mean_hw u², so `su2` = Σ s·mean u² and `s2u2` = Σ s²·mean u² = Σ mean v²; `v` = Σ mean v. The
    histogram is of s over the site's `scale`.
    """

    s: torch.Tensor
    s2: torch.Tensor
    u2: torch.Tensor
    su2: torch.Tensor
    s2u2: torch.Tensor
    v: torch.Tensor
    smin: torch.Tensor
    smax: torch.Tensor
    histogram: torch.Tensor

    @classmethod
    def zeros(cls, classes: int, channels: int) -> SiteSums:
        """Return the sums of no image."""
        table = {name: torch.zeros(classes, channels, dtype=torch.float64) for name in TABLE}
        return cls(
            **table,
            smin=torch.full((channels,), torch.inf, dtype=torch.float64),
            smax=torch.full((channels,), -torch.inf, dtype=torch.float64),
            histogram=torch.zeros(channels, BINS, dtype=torch.float64),
        )

    def merged(self, other: SiteSums) -> SiteSums:
        """Return the sums over both sets of images."""
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        added["smin"] = torch.minimum(self.smin, other.smin)
        added["smax"] = torch.maximum(self.smax, other.smax)
        return SiteSums(**added)


@dataclass(slots=True, kw_only=True)
class Statistics:
    """The statistics of a network on `counts.sum()` images; `counts` (K,) images per class.

    `energies` and `shifts` (per site the share of the logits' energy that folding it moves, `gates.shift`) stand
    beside them where they were measured, on their own (smaller) sets of images.
    """

    classes: tuple[str, ...]
    counts: torch.Tensor
    sites: tuple[GateSite, ...]
    sums: dict[str, SiteSums]
    energies: ChannelEnergies | None = None
    shifts: dict[str, float] | None = None

    @property
    def n(self) -> int:
        """Images seen."""
        return int(self.counts.sum())

    def merged(self, other: Statistics) -> Statistics:
        """Return the statistics over both sets of images; without shifts, whose constants were those of one set.

        Raises:
            DataError: The two are of other networks or other classes.
        """
        if self.sites != other.sites or self.classes != other.classes:
            raise DataError("these statistics are of different networks or classes and cannot be merged.")
        sums = {name: value.merged(other.sums[name]) for name, value in self.sums.items()}
        energies = None
        if self.energies is not None and other.energies is not None:
            energies = self.energies.merged(other.energies)
        return Statistics(
            classes=self.classes,
            counts=self.counts + other.counts,
            sites=self.sites,
            sums=sums,
            energies=energies,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"counts": self.counts}
        for name, value in self.sums.items():
            tensors |= {f"{name}/{f.name}": getattr(value, f.name) for f in fields(value)}
        if self.energies is not None:
            tensors[ENERGY_COUNTS] = self.energies.counts
            tensors |= {f"{ENERGY}{name}": value for name, value in self.energies.sums.items()}
        header = {
            "schema_version": SCHEMA_VERSION,
            "classes": list(self.classes),
            "sites": [to_dict(site) for site in self.sites],
            "shifts": self.shifts,
        }
        write_tensors(path, tensors, {HEADER_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, broken, or something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            header = json.loads(metadata[HEADER_KEY])
            _check_version(header["schema_version"])
            sites = tuple(from_dict(GateSite, values, what=str(path)) for values in header["sites"])
            sums = {
                site.name: SiteSums(**{f.name: tensors[f"{site.name}/{f.name}"] for f in fields(SiteSums)})
                for site in sites
            }
            return cls(
                classes=tuple(header["classes"]),
                counts=tensors["counts"],
                sites=sites,
                sums=sums,
                energies=_read_energies(tensors),
                shifts=_read_shifts(header, sites),
            )
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist; make it with `se-prune analyze`.") from error
        except (SafetensorError, SePruneError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a statistics file of `se-prune analyze` ({error}); make it again."
            ) from error


def _check_version(version: int) -> None:
    if version != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {version}, not {SCHEMA_VERSION}")


def _read_shifts(header: dict[str, object], sites: Sequence[GateSite]) -> dict[str, float] | None:
    shifts = header.get("shifts")
    if shifts is None:
        return None
    if not isinstance(shifts, dict):
        raise TypeError(f"its shifts are a {type(shifts).__name__}")
    return {site.name: float(shifts[site.name]) for site in sites}


def _read_energies(tensors: dict[str, torch.Tensor]) -> ChannelEnergies | None:
    if ENERGY_COUNTS not in tensors:
        return None
    return ChannelEnergies(
        counts=tensors[ENERGY_COUNTS],
        sums={k.removeprefix(ENERGY): v for k, v in tensors.items() if k.startswith(ENERGY)},
    )


@torch.no_grad()
def collect(
    model: nn.Module,
    sites: Sequence[GateSite],
    split: Split,
    preprocessing: Preprocessing,
    *,
    classes: Sequence[str],
    device: torch.device,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the network once over the images and sum what its gates do.

    Several processes share the images, and all return the sums over all of them.

    Raises:
        DataError: There is no image.
    """
    if len(split) == 0:
        raise DataError("there are no images to analyse; check --data.")
    collector = Collector(sites, len(classes), device)
    model.to(device).eval()
    with tap(model, sites, collector.on_gate):
        for images, labels in shared_batches(split, batch_size, preprocessing):
            collector.begin(labels)
            model(images.to(device, non_blocking=True))
            if on_batch is not None:
                on_batch(len(labels) * distributed.size())
    collector.merge()
    return Statistics(
        classes=tuple(classes), counts=collector.counts, sites=tuple(sites), sums=collector.result()
    )


class Collector:
    """Adds up one batch after another; `begin` names the classes of the batch that follows.

    A site only leaves its gates and the moments of its features (N, C) behind; the sums of all sites are taken
    together once per batch, over their joined channels, since with small maps a pass is otherwise spent on
    starting small operations.
    """

    def __init__(self, sites: Sequence[GateSite], classes: int, device: torch.device) -> None:
        self.sites = tuple(sites)
        channels = sum(site.channels for site in sites)
        self.joined = SiteSums.zeros(classes, channels)
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.labels = torch.zeros(0, dtype=torch.long)
        self.pending: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        scales = [site.scale for site in self.sites for _ in range(site.channels)]
        self.scales = None if all(scale == 1 for scale in scales) else torch.tensor(scales)
        # mps has no float64: there the sums of a batch are taken on the CPU
        self.accumulate_on = torch.device("cpu") if device.type == "mps" else device

    def begin(self, labels: torch.Tensor) -> None:
        """Say which class (N,) each image of the next batch has."""
        self._finish_batch()
        self.labels = labels.to(self.accumulate_on)
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def on_gate(self, site: GateSite, u: torch.Tensor, s: torch.Tensor) -> None:
        """Add the gates and energies of one site for the current batch."""
        norm = torch.linalg.vector_norm(u, dim=(2, 3)) / (u.shape[2] * u.shape[3]) ** 0.5
        self.pending[site.name] = (s.reshape(u.shape[:2]), norm, u.mean((2, 3)))

    def result(self) -> dict[str, SiteSums]:
        """Return the sums so far, by site."""
        self._finish_batch()
        parts = {
            f.name: getattr(self.joined, f.name).split(
                [site.channels for site in self.sites], dim=1 if f.name in TABLE else 0
            )
            for f in fields(SiteSums)
        }
        return {
            site.name: SiteSums(**{name: part[index].clone() for name, part in parts.items()})
            for index, site in enumerate(self.sites)
        }

    def merge(self) -> None:
        """Put the sums over the images of all processes in the place of this one's."""
        self._finish_batch()
        joined, ends = self.joined, torch.cat([self.joined.smax, -self.joined.smin])
        distributed.add_up(self.counts, *(getattr(joined, name) for name in TABLE), joined.histogram)
        distributed.largest(ends)
        joined.smax, joined.smin = ends[: len(joined.smax)], -ends[len(joined.smax) :]

    def _finish_batch(self) -> None:
        if not self.pending:
            return
        gates, norms, means = (
            torch.cat([self.pending[site.name][index] for site in self.sites], 1).to(self.accumulate_on)
            for index in range(3)
        )
        self.pending = {}
        table = torch.zeros(
            len(self.counts), len(TABLE), gates.shape[1], dtype=torch.float64, device=self.accumulate_on
        )
        for chunk in zip(*(torch.split(t, CHUNK) for t in (self.labels, gates, norms, means)), strict=True):
            _add_images(table, *chunk)
        by_class = table.cpu()
        for index, name in enumerate(TABLE):
            getattr(self.joined, name).add_(by_class[:, index])
        low, high = gates.amin(0).cpu().double(), gates.amax(0).cpu().double()
        torch.minimum(self.joined.smin, low, out=self.joined.smin)
        torch.maximum(self.joined.smax, high, out=self.joined.smax)
        shares = gates if self.scales is None else gates / self.scales.to(gates)
        self.joined.histogram.add_(_histogram(shares).cpu())


def _add_images(
    table: torch.Tensor, labels: torch.Tensor, gates: torch.Tensor, norms: torch.Tensor, means: torch.Tensor
) -> None:
    """Add images (N, C) to the sums of their classes (K, 6, C), in the order of `TABLE`."""
    n, channels = gates.shape
    columns = torch.empty(n, len(TABLE), channels, dtype=torch.float64, device=table.device)
    gate, gate2, energy, gate_energy, gate2_energy, mean = columns.unbind(1)
    gate.copy_(gates)
    torch.mul(gate, gate, out=gate2)
    energy.copy_(norms).square_()
    torch.mul(gate, energy, out=gate_energy)
    torch.mul(gate2, energy, out=gate2_energy)
    torch.mul(gate, means, out=mean)
    table.index_add_(0, labels, columns)


def _histogram(gate: torch.Tensor) -> torch.Tensor:
    """Return how many gates (N, C) fall into each of `BINS` equal bins of [0, 1], per channel (C, B)."""
    channels = gate.shape[1]
    bins = (gate * BINS).int().clamp_(0, BINS - 1)
    bins += BINS * torch.arange(channels, dtype=torch.int32, device=bins.device)
    return torch.bincount(bins.view(-1), minlength=BINS * channels).view(channels, BINS)
