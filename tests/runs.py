"""A small run record as a real compression leaves it: an SE network of four sites on Fashion-MNIST."""

from __future__ import annotations

import base64
import dataclasses
import random
from collections import Counter
from typing import Any

from se_prune.evaluate import wilson
from se_prune.records import ArchSpec, Budget, Cost, GroupKind, GroupPlan, Plan
from se_prune.results import (
    ChangedImage,
    Evaluation,
    Exported,
    GateProfile,
    Latency,
    OperationTime,
    PairedTest,
    Run,
    SiteSummary,
    StageResult,
)

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SITES = ("layer1.0.se", "layer2.0.se", "layer3.0.se", "layer3.2.se")
#: name, kind, channels, how many leave, why no more of it does
GROUPS: tuple[tuple[str, GroupKind, int, int, str | None], ...] = (
    ("conv1", "stream", 16, 8, None),
    ("layer1.0.conv1", "inner", 16, 8, None),
    ("layer1.0.se.reduce", "hidden", 4, 0, "at the floor of 4 hidden units"),
    ("layer2.0.conv1", "inner", 32, 16, None),
    ("layer2.0.conv2", "stream", 32, 8, None),
    ("layer2.0.se.reduce", "hidden", 8, 4, None),
    ("layer3.0.conv1", "inner", 64, 48, None),
    ("layer3.0.conv2", "gated", 64, 24, None),
    ("layer3.0.se.reduce", "hidden", 16, 8, None),
    ("layer3.2.conv1", "inner", 64, 56, "at the floor of 8 channels"),
    ("layer3.2.conv2", "gated", 64, 0, "output of the network's head"),
)
N_IMAGES = 10_000
HOSTILE = '<script>alert("x")</script>|`*_[%{x}]&amp;<img src=x onerror=alert(1)>'


def evaluation(right: int, *, top5: float = 0.998, classes: tuple[str, ...] = CLASSES) -> Evaluation:
    """Return an evaluation with `right` of 10,000 images right; image i is of class i modulo their number."""
    top1 = right / N_IMAGES
    rng = random.Random(right)
    wrong = set(rng.sample(range(N_IMAGES), N_IMAGES - right))
    predictions = tuple(
        (i + (1 + rng.randrange(len(classes) - 1) if i in wrong else 0)) % len(classes)
        for i in range(N_IMAGES)
    )
    seen, hit = (
        Counter(i % len(classes) for i in range(N_IMAGES)),
        Counter(i % len(classes) for i in range(N_IMAGES) if i not in wrong),
    )
    return Evaluation(
        n=N_IMAGES,
        top1=top1,
        top5=top5,
        top1_ci95=wilson(right, N_IMAGES),
        loss=0.9 - 0.75 * top1,
        per_class={name: hit[i] / seen[i] for i, name in enumerate(classes)},
        predictions=predictions,
    )


def profile(site: str, channels: int, liveliness: float, classes: tuple[str, ...] = CLASSES) -> GateProfile:
    """Return a gate profile; `liveliness` is how far the classes lie from their mean."""
    rng = random.Random(site)
    mean = [0.15 + 0.7 * rng.random() for _ in range(channels)]
    per_class = {
        name: tuple(min(1.0, max(0.0, m + rng.gauss(0, liveliness))) for m in mean) for name in classes
    }
    spread = tuple(0.02 + 0.5 * liveliness for _ in mean)
    return GateProfile(
        site=site,
        mean=tuple(mean),
        std=tuple(0.02 + liveliness for _ in mean),
        per_class=per_class,
        per_class_std=dict.fromkeys(classes, spread),
    )


def after(dense: GateProfile) -> GateProfile:
    """Return a gate profile of every second channel."""
    return GateProfile(
        site=dense.site,
        mean=dense.mean[::2],
        std=dense.std[::2],
        per_class={name: gates[::2] for name, gates in dense.per_class.items()},
        per_class_std={name: gates[::2] for name, gates in dense.per_class_std.items()},
        channels=tuple(range(0, len(dense.mean), 2)),
    )


def operations(factor: float) -> tuple[OperationTime, ...]:
    """Return a profile of five operations, each `factor` times as slow."""
    return tuple(
        OperationTime(name=name, kind="Conv", ms=factor * ms, layer=name, part=part)
        for name, ms, part in (
            ("conv1", 1.25, "stem"),
            ("layer1.0.conv1", 2.5, "stage 1, 28 × 28"),
            ("layer1.0.se.reduce", 0.25, "SE blocks"),
            ("layer1.0.se.expand", 0.5, "SE blocks"),
            ("fc", 0.125, "head"),
        )
    )


#: One black pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def changed() -> tuple[ChangedImage, ...]:
    """Return two images whose answer changed: one lost, one won."""
    file = {"mime": "image/png", "data": base64.b64encode(PNG).decode()}
    return (
        ChangedImage(index=17, label=7, first=7, second=9, **file),
        ChangedImage(index=23, label=3, first=4, second=3, **file),
    )


def cost(macs: int, params: int, se: int) -> Cost:
    """Return the cost of a network on 1×28×28 images."""
    return Cost(
        params=params,
        macs=macs,
        macs_conv=macs - se - 640,
        macs_linear=640,
        macs_se=se,
        macs_gate=3 * se // 2,
        input_size=(1, 28, 28),
        per_layer={"conv1": macs // 4, "layer1.0.conv1": macs // 2, "layer1.0.se.reduce": se, "fc": 640},
        uncounted={"batch_norm": 19, "relu": 13, "add": 9},
    )


def plan() -> Plan:
    """Return the plan of `GROUPS`."""
    groups = tuple(
        GroupPlan(name=name, kind=kind, channels=channels, removed=tuple(range(removed)), note=note)
        for name, kind, channels, removed, note in GROUPS
    )
    return Plan(
        criterion="energy",
        budget=Budget(kind="macs", value=0.5),
        round_to=8,
        min_channels=8,
        groups=groups,
        macs_before=41_000_000,
        macs_after=20_049_000,
        params_before=275_000,
        params_after=140_250,
    )


def latency(median: float, ratio: float) -> Latency:
    """Return a latency of one image on one CPU thread."""
    return Latency(
        runtime="torch",
        device="cpu",
        threads=1,
        batch_size=1,
        rounds=50,
        median_ms=median,
        p10_ms=0.97 * median,
        p90_ms=1.08 * median,
        ratio=ratio,
    )


def sites() -> tuple[SiteSummary, ...]:
    """Return the site table: the last site is the same for every class, and can be folded."""
    specificity, fold_loss = (0.12, 0.35, 0.71, 0.02), (0.031, 0.022, 0.054, 0.0004)
    return tuple(
        SiteSummary(
            name=name,
            channels=(16, 32, 64, 64)[i],
            hidden=(4, 8, 16, 16)[i],
            mean=0.4 + 0.02 * i,
            std_images=(0.05, 0.09, 0.13, 0.004)[i],
            class_specificity=specificity[i],
            saturated=(0.03, 0.08, 0.21, 0.0)[i],
            fold_loss=fold_loss[i],
            advice="fold" if fold_loss[i] < 0.001 else "keep",
        )
        for i, name in enumerate(SITES)
    )


def exported() -> Exported:
    """Return one exported ONNX file."""
    return Exported(
        target="onnx",
        output="se_resnet20-half.onnx",
        bytes=583_112,
        max_abs_diff=3.1e-6,
        top1_agreement=1.0,
        images_checked=64,
        latency_ms=0.653,
    )


def make_run(**changes: Any) -> Run:
    """Return a whole run record, with any of its fields replaced by `changes`."""
    fields: dict[str, Any] = {
        "name": "se_resnet20 at half of its MACs",
        "command": "se-prune run recipes/half.toml -o runs/half",
        "arch": ArchSpec(ref="zoo:se_resnet20"),
        "data": "fashion-mnist",
        "classes": CLASSES,
        "seed": 7,
        "environment": {"python": "3.11.2", "torch": "2.14.1", "se-prune": "0.1.0"},
        "plan": plan(),
        "cost_before": cost(41_000_000, 275_000, 120_000),
        "cost_after": cost(20_049_000, 140_250, 51_000),
        "bytes_before": 1_140_000,
        "bytes_after": 598_000,
        "max_abs_diff_masked": 2.1e-6,
        "stages": (
            StageResult(stage="dense", evaluation=evaluation(9431), seconds=0.0),
            StageResult(stage="cut", evaluation=evaluation(3120, top5=0.81), seconds=1.4),
            StageResult(stage="repaired", evaluation=evaluation(9214, top5=0.997), seconds=38.2),
            StageResult(stage="fine-tuned", evaluation=evaluation(9398), seconds=252.0),
        ),
        "paired": PairedTest(
            top1_difference=-0.0033, only_first_right=230, only_second_right=197, p_value=0.1215
        ),
        "latency": (latency(7.61, 1.0), latency(5.52, 1.38)),
        "sites": sites(),
        "profiles": tuple(
            profile(name, channels, liveliness)
            for name, channels, liveliness in zip(
                SITES, (16, 32, 64, 64), (0.03, 0.06, 0.15, 0.003), strict=True
            )
        ),
        "exported": (exported(),),
        "labels": tuple(i % len(CLASSES) for i in range(N_IMAGES)),
        "parts": {
            "conv1": "stem",
            "layer1.0.conv1": "stage 1, 28 × 28",
            "layer1.0.se.reduce": "SE blocks",
            "layer1.0.se.expand": "SE blocks",
            "fc": "head",
        },
        "operations": (operations(1.0), operations(0.5)),
        "sites_after": sites()[:3],
        "gate_images": 2048,
        "changed": changed(),
        "hashes": {"dense.safetensors": "ab" * 32, "test split": "cd" * 32},
    }
    fields["profiles_after"] = tuple(after(profile) for profile in fields["profiles"][:3])
    return Run(**{**fields, **changes})


def hostile_run() -> Run:
    """Return a run record whose names are all `HOSTILE`."""
    classes = (HOSTILE, *CLASSES[1:])
    stages = tuple(
        dataclasses.replace(stage, evaluation=evaluation(9000 + i, classes=classes))
        for i, stage in enumerate(make_run().stages)
    )
    plan = make_run().plan
    group = dataclasses.replace(plan.groups[0], name=HOSTILE, note=HOSTILE)
    return make_run(
        name=HOSTILE,
        command=f"echo ```` {HOSTILE}",
        classes=classes,
        stages=stages,
        plan=dataclasses.replace(plan, groups=(group, *plan.groups[1:])),
        profiles=(profile(SITES[0], 16, 0.1, classes),),
        environment={HOSTILE: HOSTILE},
    )
