"""Whole jobs: each function runs several stages and is what a command calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from se_prune import artifact
from se_prune.data import DataSource, open_data
from se_prune.device import choose_device
from se_prune.evaluate import evaluate
from se_prune.gates.sites import find_sites
from se_prune.records import (
    ArtifactHeader,
    Evaluation,
    GateSite,
    HistoryEntry,
    Preprocessing,
    TrainSettings,
    to_dict,
)
from se_prune.training import fit
from se_prune.training.loop import StepLog
from se_prune.zoo import registry


def gate_layers(sites: tuple[GateSite, ...]) -> set[str]:
    """Return the names of the FC layers of all sites."""
    return {name for site in sites for name in (site.reduce, site.expand) if name is not None}


def example_input(preprocessing: Preprocessing, n: int = 1) -> torch.Tensor:
    """Return `n` fixed random images (N, C, H, W) of the network's input size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *preprocessing.input_size, generator=generator)


def train(
    arch: str,
    data_ref: str,
    settings: TrainSettings,
    *,
    output: Path,
    seed: int = 0,
    device: str = "auto",
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> Evaluation:
    """Train a network from random weights on a data set, evaluate it on the test split, write an artifact."""
    data = open_data(data_ref)
    target = choose_device(device)
    torch.manual_seed(seed)
    spec, module, preprocessing = new_network(arch, data)
    sites = find_sites(module, example_input(preprocessing))
    result = fit(
        module,
        data.train,
        settings,
        preprocessing=preprocessing,
        device=target,
        seed=seed,
        no_decay=gate_layers(sites),
        resume=resume,
        on_step=on_step,
    )
    accuracy = evaluate(module, data.test, preprocessing, device=target, classes=data.classes)
    module.cpu()
    details = {
        "arch": spec.ref,
        "data": data.ref,
        "train_images": len(data.train),
        "seed": seed,
        "settings": to_dict(settings),
        "train_top1": result.train_top1,
        "test": {"n": accuracy.n, "top1": accuracy.top1, "top1_ci95": list(accuracy.top1_ci95)},
    }
    header = ArtifactHeader(
        arch=spec,
        preprocessing=preprocessing,
        classes=data.classes,
        history=(HistoryEntry(stage="train", details=details),),
    )
    artifact.save(output, artifact.Network(module=module, header=header))
    return accuracy


def new_network(arch: str, data: DataSource) -> tuple[registry.ArchSpec, nn.Module, Preprocessing]:
    """Build an architecture with random weights, with the class count and channels of a data set."""
    kwargs: dict[str, int] = {"num_classes": len(data.classes)}
    if data.preprocessing is not None and data.preprocessing.input_size[0] != 3:
        kwargs["in_channels"] = data.preprocessing.input_size[0]
    spec = registry.resolve(arch, **kwargs)
    module = registry.build(spec)
    preprocessing = registry.default_preprocessing(spec, module)
    if data.preprocessing is not None and preprocessing.input_size[0] == data.preprocessing.input_size[0]:
        size = (preprocessing.input_size[0], *preprocessing.input_size[1:])
        preprocessing = Preprocessing(
            input_size=size, mean=data.preprocessing.mean, std=data.preprocessing.std
        )
    return spec, module, preprocessing
