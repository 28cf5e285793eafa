"""Training and evaluating whole networks: from random weights, after a cut, on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from se_prune import __version__, artifact
from se_prune.artifact import Network
from se_prune.data import DataSource
from se_prune.device import inference_batch
from se_prune.evaluate import evaluate
from se_prune.gates.sites import find_sites
from se_prune.pipeline.classes import like
from se_prune.pipeline.features import match_features
from se_prune.pipeline.measure import Reporter, Silent, matching, require_classes, structure
from se_prune.pipeline.scales import scaled_groups
from se_prune.preprocessing import example_input, with_preprocessing
from se_prune.records import ArchSpec, ArtifactHeader, HistoryEntry
from se_prune.results import Evaluation
from se_prune.schema import to_dict
from se_prune.settings import TrainSettings
from se_prune.training import fit
from se_prune.training.loop import StepLog
from se_prune.zoo import registry


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

    Args:
        network: What is trained.
        data: The data set; test images are not read.
        settings: How to train.
        device: Where to train.
        teacher: The dense network.
        seed: Fixes order, augmentation and dropout.
        resume: A folder that keeps the state; a run found there goes on at its step, to the same weights.
        on_step: Called after every step.
        stage: What the history calls it.

    Raises:
        DataError: The data does not fit the network.
        UsageError: The settings do not fit the networks or the data.
        CheckpointError: `resume` holds another run.
        Interrupted: The user stopped a run that `resume` keeps.

    Returns:
        A new network on the CPU; the one given is left as it is.
    """
    if teacher is not None:
        teacher = like(teacher, network, data)
    data = matching(network, data)
    if teacher is not None:
        require_classes(teacher, data)
    features = None if teacher is None or not settings.distill_features else match_features(network, teacher)
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
        no_decay={name for site in sites for name in site.layers},
        resume=resume,
        on_step=on_step,
        features=features,
        scaled=scaled_groups(network, structure(network)) if settings.group_lasso else (),
    )
    details: dict[str, Any] = {
        "version": __version__,
        "data": data.name,
        "train_images": len(data.train),
        "seed": seed,
        "settings": to_dict(replace(settings, track=())),
        "distilled": teacher is not None,
        "train_top1": result.train_top1,
    }
    if result.held_out_top1 is not None:
        details |= {"steps": result.steps, "held_out_top1": result.held_out_top1}
        details |= {} if result.best_epoch is None else {"best_epoch": result.best_epoch + 1}
    header = replace(
        network.header,
        classes=network.header.classes or data.classes,
        history=(*network.header.history, HistoryEntry(stage=stage, details=details)),
    )
    return Network(module=module, header=header)


def new_network(
    arch: str,
    data: DataSource,
    seed: int,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Build an architecture with random weights, with the class count and channels of a data set.

    `input_size`, `mean` and `std` overrule the preprocessing, as in `preprocessing.with_preprocessing`.

    Raises:
        UsageError: The architecture is unknown, or the preprocessing does not go with it.
    """
    kwargs: dict[str, Any] = {"num_classes": len(data.classes)}
    own = data.preprocessing
    spec: ArchSpec = registry.resolve(arch, **kwargs)
    if own is not None and own.input_size[0] != registry.default_preprocessing(spec).input_size[0]:
        spec = replace(spec, kwargs={**kwargs, "in_channels": own.input_size[0]})
    torch.manual_seed(seed)
    module = registry.build(spec).eval()
    preprocessing = registry.default_preprocessing(spec, module)
    if own is not None and preprocessing.input_size[0] == own.input_size[0]:
        preprocessing = replace(preprocessing, mean=own.mean, std=own.std)
    header = ArtifactHeader(arch=spec, preprocessing=preprocessing, classes=data.classes)
    return with_preprocessing(
        Network(module=module, header=header), arch, input_size=input_size, mean=mean, std=std
    )


def train(
    arch: str,
    data: DataSource,
    settings: TrainSettings,
    *,
    device: torch.device,
    seed: int = 0,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resume: Path | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> tuple[Network, Evaluation]:
    """Train a network from random weights and evaluate it on the test split, which nothing else reads."""
    start = new_network(arch, data, seed, input_size=input_size, mean=mean, std=std)
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
    data = matching(network, data)
    with (reporter or Silent()).stage("evaluate", len(data.test)) as update:
        result = evaluate(
            network.module,
            data.test,
            network.header.preprocessing,
            device=device,
            classes=data.classes,
            batch_size=inference_batch(device),
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
