"""What every export target shares: the network as its file will compute it, the parity check, and the clock.

Shapes: N images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import copy
import importlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from se_prune.errors import SePruneError
from se_prune.records import ArtifactHeader, Preprocessing
from se_prune.schema import to_dict
from se_prune.zoo.registry import shown
from se_prune.zoo.steps import WithFinal, final_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from se_prune.artifact import Network
    from se_prune.results import Int8, LayerNoise

INPUT, OUTPUT, SCORES = "images", "logits", "probabilities"
#: Largest allowed difference of a logit, relative to the largest logit (or to 1, if all are smaller).
TOLERANCE = 1e-3
CHECK_BATCH = 32
WARMUP, TIMED_RUNS = 5, 50

#: How images enter a file: preprocessed floats, or bytes in one of two layouts.
Pixels = Literal["nhwc", "nchw"]
#: Runs an opened file: images (N, …) to logits or probabilities (N, K).
Run = Callable[["NDArray[Any]"], "NDArray[np.float32]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is exported: a copy of the network as its file will compute it, and real images as the file takes them.

    `images` and `calibration` are float32 (N, C, H, W), or bytes in the layout `pixels`. The two hold different images,
    where there are enough.
    """

    module: nn.Module
    images: torch.Tensor
    calibration: torch.Tensor
    header: ArtifactHeader
    pixels: Pixels | None = None

    @property
    def arch(self) -> str:
        """How messages name the network."""
        return self.header.arch.ref

    @property
    def output(self) -> str:
        """Name of the output: what it holds."""
        return OUTPUT if self.pixels is None and final_of(self.module) == "none" else SCORES

    def example(self, n: int) -> torch.Tensor:
        """Return `n` images; the first ones are repeated where there are fewer."""
        times = -(-n // len(self.images))
        return torch.cat([self.images] * times)[:n].contiguous()

    def metadata(self) -> dict[str, Any]:
        """Return what a program must know to feed the file and to name its answers; every value has a JSON form."""
        preprocessing = to_dict(self.header.preprocessing)
        return {
            "arch": to_dict(shown(self.header.arch)),
            "classes": self.header.classes,
            **{key: preprocessing[key] for key in ("input_size", "mean", "std")},
            "input": "float32 nchw" if self.pixels is None else f"uint8 {self.pixels}",
            "output": self.output,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime that networks are exported to.

    Args:
        name: What `--to` takes.
        suffix: Of the main file.
        packages: The packages it needs.
        install: The command that installs them.
        write: Writes the main file, and what belongs to it, into a folder of its own. With `int8` it writes whole
            numbers, calibrated on the subject's images, and returns what it measured layer by layer.
        open: Opens a file to be run on the CPU, on so many threads.
        others: Suffixes of further files, which replace that of the main file.
        importing: What the packages are imported in.
        takes_int8: Whether `write` can.
        int8_packages: The packages that it needs for that as well.
        takes_pixels: Whether bytes can be its input.
        unverifiable: Why this machine cannot run the file; None where it can.
        note: What a user must know about the file.
    """

    name: str
    suffix: str
    packages: tuple[str, ...]
    install: str
    write: Callable[[Subject, Path, bool], tuple[LayerNoise, ...]]
    open: Callable[[Path, Subject, int], Run]
    others: tuple[str, ...] = ()
    importing: Callable[[], AbstractContextManager[None]] = nullcontext
    takes_int8: bool = False
    int8_packages: tuple[str, ...] = ()
    takes_pixels: bool = True
    unverifiable: Callable[[], str | None] = lambda: None
    note: str = ""

    def require_packages(self, *, int8: bool = False) -> None:
        """Check that the packages are there.

        Raises:
            SePruneError: One is missing; the message says how to install it.
        """
        packages = (*self.packages, *(self.int8_packages if int8 else ()))
        with self.importing():
            require_packages(f"export --to {self.name}", packages, self.install)

    def files(self, main: Path) -> tuple[Path, ...]:
        """Return all files of an export, the main one first."""
        return (main, *(main.with_suffix(suffix) for suffix in self.others))


def require_packages(asking: str, packages: Sequence[str], install: str) -> None:
    """Import packages.

    Args:
        asking: What needs them.
        packages: Their names.
        install: The command that installs them.

    Raises:
        SePruneError: One is missing; the message says how to install it.
    """
    for package in packages:
        try:
            with quiet():
                importlib.import_module(package)
        except ImportError as error:
            raise SePruneError(f"{asking} needs a package that is missing ({error}): {install}") from error


class FromPixels(nn.Module):
    """A network with its preprocessing in front of it, and a softmax behind it where it gives logits."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, pixels: Pixels) -> None:
        super().__init__()
        self.network, self.pixels, self.logits = network, pixels, final_of(network) == "none"
        mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
        std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
        self.scale, self.shift = nn.Buffer(1 / (255 * std)), nn.Buffer(-mean / std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bytes (N, H, W, C) or (N, C, H, W) to probabilities (N, K)."""
        x = images.permute(0, 3, 1, 2) if self.pixels == "nhwc" else images
        y: torch.Tensor = self.network(x.float() * self.scale + self.shift)
        return y.softmax(1) if self.logits else y


def to_pixels(images: torch.Tensor, preprocessing: Preprocessing, pixels: Pixels) -> torch.Tensor:
    """Return the bytes that preprocessed images (N, C, H, W) were made of, or the nearest ones after resizing."""
    mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
    x = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return (x.permute(0, 2, 3, 1) if pixels == "nhwc" else x).contiguous()


def subject(
    network: Network,
    images: torch.Tensor,
    *,
    calibration: torch.Tensor | None = None,
    pixels: Pixels | None = None,
) -> Subject:
    """Return what is exported of a network, which is copied.

    Args:
        network: The network and its header.
        images: Preprocessed real images (N, C, H, W) for the check.
        calibration: Others for int8; the same where None.
        pixels: Put the preprocessing into the file, for bytes of this layout.
    """
    module = copy.deepcopy(network.module).cpu().float().eval()
    module = module if final_of(module) == "none" else WithFinal(module).eval()
    images = images.detach().cpu().float()
    calibration = images if calibration is None else calibration.detach().cpu().float()
    preprocessing = network.header.preprocessing
    if pixels is not None:
        module = FromPixels(module, preprocessing, pixels).eval()
        images, calibration = (to_pixels(x, preprocessing, pixels) for x in (images, calibration))
    return Subject(
        module=module, images=images, calibration=calibration, header=network.header, pixels=pixels
    )


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest difference of an output, the same relative to the largest output, and the share of equal top-1."""

    difference: float
    relative: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of a written file; nothing where this machine cannot run it, and `note` says why."""

    parity: Parity | None = None
    latency_ms: float | None = None
    note: str = ""
    int8: Int8 | None = None


@torch.no_grad()
def compare(subject: Subject, run: Run) -> Parity:
    """Compare a file with the torch network on the subject's images: one alone, and in batches of up to 32.

    A single image is checked once more as a batch of two, so that a dynamic batch is always exercised.
    """
    many = subject.images if len(subject.images) > 1 else subject.example(2)
    batches = list(torch.split(many, CHECK_BATCH))
    expected = [subject.module(batch).numpy() for batch in batches]
    actual = [run(batch.numpy()) for batch in batches]
    single = np.abs(subject.module(many[:1]).numpy() - run(many[:1].numpy())).max()
    differences = [np.abs(e - a).max() for e, a in zip(expected, actual, strict=True)]
    difference = float(np.max([single, *differences]))
    same = [e.argmax(1) == a.argmax(1) for e, a in zip(expected, actual, strict=True)]
    largest = max(1.0, float(max(np.abs(e).max() for e in expected)))
    return Parity(difference, difference / largest, float(np.concatenate(same).mean()))


def require_parity(parity: Parity, subject: Subject, target: str) -> None:
    """Refuse a file that does not compute what the network computes.

    Raises:
        SePruneError: The difference is above the tolerance, or not a number.
    """
    if not parity.relative <= TOLERANCE:  # also refuses NaN
        allowed = TOLERANCE * parity.difference / parity.relative if parity.relative > 0 else TOLERANCE
        raise SePruneError(
            f"the {target} file of {subject.arch} differs from the torch network by {parity.difference:.2g} on "
            f"{len(subject.images)} images (allowed: {allowed:.2g}), so it was not kept; run `se-prune evaluate` to "
            "see that the network itself gives finite and repeatable outputs."
        )


def latencies_ms(runs: Sequence[Run], image: torch.Tensor) -> list[float]:
    """Return the median milliseconds of one image (1, …) of each, after warm-up, in turn."""
    fed = image.numpy()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(WARMUP + TIMED_RUNS):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(fed)
            own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own[WARMUP:]) for own in times]


def size_of(target: Target, path: Path) -> int:
    """Return the bytes of all files of an export; some are folders."""
    parts = (p for file in target.files(path) for p in ([file] if file.is_file() else file.rglob("*")))
    return sum(p.stat().st_size for p in parts if p.is_file())


def one_by_one(run: Run) -> Run:
    """Return a run for any number of images, from one that takes a single image."""

    def each(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.concatenate([run(images[i : i + 1]) for i in range(len(images))])

    return each


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hide the warnings of packages about themselves, and what these loggers say; errors are still raised."""
    silenced = [(logger, logger.level) for logger in map(logging.getLogger, loggers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger, _ in silenced:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in silenced:
                logger.setLevel(level)
