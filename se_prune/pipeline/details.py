"""What a report shows beside accuracy: times of operations, gates after the cut, images that changed, hashes."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from se_prune import __version__
from se_prune.artifact import Network
from se_prune.cost import bytes_of
from se_prune.data import DataSource
from se_prune.data.batches import TensorImages
from se_prune.data.folders import FolderImages
from se_prune.data.raw import FileImages
from se_prune.data.source import ClassSplit, Split, balanced_subset
from se_prune.device import inference_batch, processor
from se_prune.errors import UsageError, nearest
from se_prune.evaluate import UNREADABLE
from se_prune.files import write_text
from se_prune.gates.sites import find_sites
from se_prune.gates.statistics import Statistics, collect
from se_prune.gates.summary import liveliest, profile, summarise
from se_prune.pipeline.measure import MEASURED_IMAGES, Reporter, Structure, structure
from se_prune.pipeline.parts import layer_parts, part_operations
from se_prune.preprocessing import example_input
from se_prune.records import GateSite, Plan, Preprocessing
from se_prune.report import card
from se_prune.results import (
    ChangedImage,
    Evaluation,
    GateProfile,
    GateReport,
    GroupSensitivity,
    OperationTime,
    PairedTest,
)
from se_prune.runtimes import require_runtime
from se_prune.runtimes.bench import Setting

PACKAGES = ("torch", "torchvision", "torch-pruning", "timm", "onnx", "onnxruntime", "numpy")
#: Sites and classes whose gate profiles stand in a record; more make it too large.
PROFILES, PROFILE_CLASSES = 24, 32
#: Images that changed their answer, and the pixels of one.
CHANGED, PIXELS = 24, 96
#: Smaller images are shown as they are, in PNG.
SMALL = 48
PROFILE_RUNS = 20
T = TypeVar("T")
JPEG_QUALITY = 80


def profiles(statistics: Statistics | None, classes: Sequence[str] = ()) -> tuple[GateProfile, ...]:
    """Return the gate profiles of the sites, for chosen classes or those whose gates differ most.

    Of many sites, some spread evenly from the first to the last.
    """
    if statistics is None:
        return ()
    chosen = classes or liveliest(statistics, PROFILE_CLASSES)
    return tuple(profile(statistics, site.name, chosen) for site in spread_evenly(statistics.sites, PROFILES))


def spread_evenly(items: Sequence[T], count: int) -> Sequence[T]:
    """Return at most `count` of some items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def require_known(names: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Return names of classes after checking that there are such.

    Raises:
        UsageError: One is none; the message has the nearest.
    """
    for name in names:
        if name not in classes:
            raise UsageError(
                f"there is no class '{name}'{nearest(name, classes)}; the data has {', '.join(classes[:8])}"
                f"{' …' if len(classes) > 8 else ''}."
            )
    return tuple(names)


def gate_report(
    statistics: Statistics,
    *,
    name: str,
    command: str,
    data: str,
    seed: int,
    outlook: str,
    device: torch.device,
    classes: Sequence[str] = (),
    sensitivity: Sequence[GroupSensitivity] = (),
    criterion: str = "",
) -> GateReport:
    """Return the record of a page on one network's gates.

    Args:
        statistics: What `analyze` measured.
        name: Of the network.
        command: The command line.
        data: The name of the data.
        seed: What `analyze` took.
        outlook: The sentence on how alive the gates are.
        device: Where they were measured.
        classes: Whose gates are drawn; those whose gates differ most where none are given.
        sensitivity: What the channel groups are predicted to lose.
        criterion: What predicts it.
    """
    return GateReport(
        name=name,
        command=command,
        data=data,
        n=statistics.n,
        seed=seed,
        outlook=outlook,
        environment=environment(device),
        sites=summarise(statistics),
        profiles=profiles(statistics, classes),
        sensitivity=tuple(sensitivity),
        criterion=criterion if sensitivity else "",
    )


def write_card(
    path: Path,
    network: Network,
    data: DataSource,
    result: Evaluation,
    *,
    file: str,
    command: str,
    device: torch.device,
    against: tuple[str, Evaluation] | None = None,
    paired: PairedTest | None = None,
) -> None:
    """Write the model card of a network that was just evaluated.

    Args:
        path: The card.
        network: The network.
        data: What it was evaluated on.
        result: Its accuracy.
        file: What MODEL was on the command line: a file, or the name of an architecture.
        command: The command line.
        device: Where it was evaluated.
        against: The name of another network and its accuracy on the same images.
        paired: The test of the two.

    Raises:
        SePruneError: The card cannot be written.
    """
    artifact = Path(file)
    is_file = artifact.is_file()
    write_text(
        path,
        card.render(
            card.Card(
                name=artifact.stem if is_file else file,
                file=artifact.name if is_file else file,
                header=network.header,
                data=data.name,
                evaluation=result,
                cost=structure(network).cost,
                bytes=bytes_of(artifact) if is_file else None,
                dense=None if against is None else against[1],
                other="" if against is None else f"network {against[0]}",
                paired=paired,
                command=command,
                environment=environment(device),
                hashes=hashes(data, (artifact,) if is_file else ()),
            )
        ),
    )


def environment(device: torch.device) -> dict[str, str]:
    """Return versions and hardware, for the report."""
    result = {
        "se-prune": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def operations(
    dense: Network, cut: Network, found: Structure, runtime: str, folder: Path
) -> tuple[dict[str, str], tuple[tuple[OperationTime, ...], tuple[OperationTime, ...]] | None]:
    """Return the part of every layer of the dense network, and the profiles of both, batch 1 on one thread.

    Args:
        dense: The dense network.
        cut: The pruned network.
        found: The structure of the dense one.
        runtime: The name of a runtime; without a profiler there are no profiles.
        folder: Where the run's exported files are.
    """
    parts = layer_parts(dense.module, found.example, found.sites)
    setting = Setting(runtime=require_runtime(runtime), batch=1, threads=1)
    if setting.runtime.profile is None:
        return parts, None
    both = []
    for name, network in (("dense", dense), ("pruned", cut)):
        images = example_input(network.header.preprocessing)
        source = setting.runtime.source(network, folder, name, images)
        measured = setting.runtime.profile(source, images, setting.threads, PROFILE_RUNS)
        both.append(part_operations(measured, parts, found.sites))
    return parts, (both[0], both[1])


def gates_after(
    cut: Network,
    data: DataSource,
    found: Structure,
    plan: Plan,
    classes: Sequence[str],
    *,
    device: torch.device,
    seed: int,
    show: Reporter,
) -> dict[str, Any]:
    """Return the fields of a run on the gates that the pruned network has left; none where all are folded.

    Args:
        cut: The pruned network.
        data: Its data; training images are looked at.
        found: The structure of the dense network.
        plan: Of the dense network.
        classes: Whose gates are recorded.
        device: Where to compute.
        seed: Chooses the images.
        show: Shows progress.
    """
    sites = find_sites(cut.module, example_input(cut.header.preprocessing))
    if not sites:
        return {}
    split = balanced_subset(data.train, MEASURED_IMAGES, seed)
    with show.stage("gates of the pruned network", len(split)) as update:
        statistics = collect(
            cut.module,
            sites,
            split,
            cut.header.preprocessing,
            classes=data.classes,
            device=device,
            batch_size=inference_batch(device),
            on_batch=update,
        )
    cut.module.cpu()
    dense = {site.name: site for site in found.sites}
    drawn = {site.name for site in spread_evenly(found.sites, PROFILES)}
    return {
        "sites_after": summarise(statistics),
        "gate_images": statistics.n,
        "profiles_after": tuple(
            profile(statistics, site.name, classes, kept_channels(found, plan, dense.get(site.name, site)))
            for site in statistics.sites
            if site.name in drawn
        ),
    }


def kept_channels(found: Structure, plan: Plan, site: GateSite) -> tuple[int, ...]:
    """Return the dense network's numbers of the channels that a site keeps."""
    removed = {group.name: set(group.removed) for group in plan.groups}
    gone: set[int] = set()
    layer = site.expand or site.features
    for coupling in found.couplings:
        left = removed.get(coupling.group.name, set())
        for part in coupling.slices:
            if part.layer == layer and part.role != "in":
                gone |= {i for i, root in zip(part.index, part.root, strict=True) if root in left}
    return tuple(i for i in range(site.channels) if i not in gone)


def changed_images(split: Split, first: Evaluation, last: Evaluation) -> tuple[ChangedImage, ...]:
    """Return some of the images that two networks answer differently: lost and won in turn, spread over the classes.

    This is where test images are looked at beside evaluation, after every decision, to be shown.
    """
    labels = split.labels.tolist()
    three = [
        (i, label, a, b)
        for i, (label, a, b) in enumerate(zip(labels, first.predictions, last.predictions, strict=True))
        if a != b and UNREADABLE not in (a, b)
    ]
    lost = _spread((item for item in three if item[2] == item[1]), key=1)
    won = _spread((item for item in three if item[3] == item[1]), key=1)
    other = _spread((item for item in three if item[1] not in item[2:]), key=1)
    mixed = [item for group in itertools.zip_longest(lost, won) for item in group if item is not None]
    chosen = [*mixed, *other][:CHANGED]
    return tuple(
        ChangedImage(index=i, label=label, first=a, second=b, **picture)
        for (i, label, a, b), picture in zip(
            chosen, _pictures(split, [item[0] for item in chosen]), strict=True
        )
    )


def _spread(items: Iterable[tuple[int, ...]], key: int) -> list[tuple[int, ...]]:
    """Return items in turn from each class."""
    groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for item in items:
        groups[item[key]].append(item)
    turns = itertools.zip_longest(*(groups[label] for label in sorted(groups)))
    return [item for turn in turns for item in turn if item is not None]


def _pictures(split: Split, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Return images as files in base64, small."""
    if not indices:
        return []
    inner = split.split if isinstance(split, ClassSplit) else split
    size, channels = (PIXELS, PIXELS), 3
    if isinstance(inner, TensorImages):
        channels, height, width = inner.images.shape[1:]
        size = (height, width) if max(height, width) <= SMALL else size
    plain = Preprocessing(input_size=(channels, *size), mean=(0.0,) * channels, std=(1.0,) * channels)
    batches = split.take(torch.tensor(indices)).batches(len(indices), plain)
    pixels = torch.cat([images for images, _ in batches]).mul(255).round().clamp(0, 255).to(torch.uint8)
    return [_encoded(image) for image in pixels]


def _encoded(image: torch.Tensor) -> dict[str, Any]:
    """Return an image (C, H, W) of bytes: PNG where it is small, else JPEG."""
    from PIL import Image

    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    small = max(image.shape[1:]) <= SMALL
    Image.fromarray(array).save(
        file, "PNG" if small else "JPEG", **({} if small else {"quality": JPEG_QUALITY})
    )
    return {
        "mime": "image/png" if small else "image/jpeg",
        "data": base64.b64encode(file.getvalue()).decode(),
    }


def hashes(data: DataSource, files: Iterable[Path]) -> dict[str, str]:
    """Return SHA-256 of files, by name, and of both splits of the data; a folder is hashed as its files, one by one.

    A split held in memory is hashed by its pixels and labels, one of image files by their names and labels, any other
    by its labels.
    """
    whole = [(path, part) for path in files for part in (_inside(path) if path.is_dir() else (path,))]
    found = {part.relative_to(path.parent).as_posix(): _of_file(part) for path, part in whole}
    for name, split in (("training", data.train), ("test", data.test)):
        what, digest = _of_split(split)
        found[f"{name} {what}"] = digest
    return found


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_split(split: Split) -> tuple[str, str]:
    inner = split.split if isinstance(split, ClassSplit) else split
    digest, what = hashlib.sha256(), "labels"
    if isinstance(inner, TensorImages):
        what = "images and labels"
        digest.update(inner.images.contiguous().numpy().tobytes())
    elif isinstance(inner, FolderImages) and isinstance(inner.source, FileImages):
        what = "file names and labels"
        for index in inner.indices.tolist():
            digest.update("/".join(Path(inner.source.paths[index]).parts[-2:]).encode() + b"\0")
    digest.update(split.labels.contiguous().numpy().tobytes())
    return what, digest.hexdigest()
