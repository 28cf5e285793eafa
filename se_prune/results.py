"""What a run results in: accuracy, latency, what the gates do, exports, and the record that a report shows."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar, Literal

from se_prune.records import ArchSpec, Cost, GroupKind, Plan
from se_prune.schema import FORBID_EXTRA, SCHEMA_VERSION, record


@record
class Evaluation:
    """Accuracy on `n` images: fractions, the 95 % Wilson interval of top-1, mean cross-entropy.

    `predictions` holds the top-1 class per image in the split's order, for paired tests.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    n: int
    top1: float
    top5: float
    top1_ci95: tuple[float, float]
    loss: float
    per_class: dict[str, float] = field(default_factory=dict)
    predictions: tuple[int, ...] = ()


@record
class PairedTest:
    """Exact McNemar test of two networks on the same images; `p_value` is two-sided."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    top1_difference: float
    only_first_right: int
    only_second_right: int
    p_value: float


@record
class Latency:
    """Milliseconds per batch from interleaved runs: `median_ms` and the 10th and 90th percentiles.

    `ratio` is the median over rounds of (first network / this network): above 1 is faster than the first.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    runtime: str
    device: str
    threads: int
    batch_size: int
    rounds: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float


@record
class BenchRow:
    """One network in one runtime, milliseconds per batch of `batch_size` images, from interleaved rounds.

    `peak_bytes` is the resident memory of a process that runs it, above one that has only loaded the runtime (None
    where it was not measured). `speedup` is the ratio of medians (reference / this network), with its bootstrap
    interval over rounds; None for the reference itself and where there is none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    network: str
    runtime: str
    device: str
    batch_size: int
    threads: int
    rounds: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    peak_bytes: int | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None


@record
class OperationTime:
    """One operation of a network in a runtime: lower quartile of its milliseconds over runs of one batch.

    `layer` is the layer of the torch network that it computes, or None; `into`, `out` and `macs` (of the batch) are
    that layer's, 0 without. `part` is where in the network it runs: stem, a stage, SE blocks, head. `aligned_ms` is the
    share of `ms` that it would take with both widths rounded up to multiples of 8, measured on the layer alone; None
    where they are multiples already.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    kind: str
    ms: float
    layer: str | None = None
    into: int = 0
    out: int = 0
    macs: int = 0
    part: str = ""
    aligned_ms: float | None = None


@record
class SiteSummary:
    """One row of the site table: how alive a gate is, and what folding it would lose.

    `std_images` is the standard deviation of the gate over images, averaged over channels;
    `class_specificity` the between-class share of the gate's variance; `saturated` the share of gates above
    0.95 or below 0.05; `fold_loss` the share of the recalibrated energy that the best constant gate misses,
    E[(s-a)²u²] / E[v²] with a = E[s·u²] / E[u²]; `logit_shift` the share of the logits' energy by which they move
    with that constant, to first order (None where it was not measured).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    channels: int
    hidden: int
    mean: float
    std_images: float
    class_specificity: float
    saturated: float
    fold_loss: float
    logit_shift: float | None = None
    advice: Literal["keep", "fold"]

    @property
    def predicted_loss(self) -> float:
        """What folding this site costs: the logit shift, or the fold loss where that was not measured."""
        return self.fold_loss if self.logit_shift is None else self.logit_shift


@record
class GateProfile:
    """The gate of one site by channel: the all-class mean and spread, and the mean per class (Figure 5).

    `per_class_std` is the spread within a class. `channels` are the dense network's numbers of the channels, where a
    cut network has others.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    site: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    per_class: dict[str, tuple[float, ...]]
    per_class_std: dict[str, tuple[float, ...]] = field(default_factory=dict)
    channels: tuple[int, ...] = ()


#: Shares of a group's channels at which its loss is predicted.
SENSITIVITY_SHARES = (0.25, 0.5, 0.75)


@record
class GroupSensitivity:
    """What a channel group is predicted to lose without `SENSITIVITY_SHARES` of its channels, as shares of a signal."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    kind: GroupKind
    channels: int
    removed: tuple[int, ...]
    predicted_loss: tuple[float, ...]


@record
class GateReport:
    """What `analyze` shows of a network's gates on `n` training images; `environment` as in `Run`.

    `sensitivity` has the channel groups, the most sensitive first, as `criterion` predicts it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    command: str
    data: str
    n: int
    seed: int
    outlook: str
    environment: dict[str, str]
    sites: tuple[SiteSummary, ...]
    profiles: tuple[GateProfile, ...]
    sensitivity: tuple[GroupSensitivity, ...] = ()
    criterion: str = ""


@record
class ChangedImage:
    """A test image that two networks answer differently, small: a file of type `mime`, its `data` in base64.

    `index` is its place in the test split; `label`, `first` and `second` (the two answers) are classes by number.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    index: int
    label: int
    first: int
    second: int
    mime: Literal["image/png", "image/jpeg"]
    data: str


@record
class StageResult:
    """Accuracy after one stage of a run: dense, cut, repaired, fine-tuned; `seconds` the stage took.

    `step` (from 1) is that of a run in several steps, None of a run in one and of the dense network; `macs` are those
    of the network at this stage (None in records of earlier versions).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    stage: Literal["dense", "cut", "repaired", "fine-tuned"]
    evaluation: Evaluation
    seconds: float
    step: int | None = None
    macs: int | None = None

    @property
    def label(self) -> str:
        """The stage with its step, where there are several."""
        return self.stage if self.step is None else f"{self.stage}, step {self.step}"


@record
class LayerNoise:
    """What whole numbers do at one layer, in dB: 10·log10(signal power / noise power).

    `inside_db` is that of the layer's own output in the file, with all noise from before it; `alone_db` that of the
    network's output where this layer alone is int8. None: nothing differs at all.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    layer: str
    kind: str
    inside_db: float | None
    alone_db: float | None
    kept_float: bool


@record
class Int8:
    """An int8 file beside the float one of the same network and target.

    Accuracies are of the `n` test images; None where no test images were given. `size_ratio` and `latency_ratio` are
    int8 over float. `output_db` is the signal-to-noise ratio of the outputs on the checked images. `layers` is empty
    where the target's tool does not let them be told apart.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    n: int
    top1: float | None
    top1_float: float | None
    float_bytes: int
    size_ratio: float
    float_latency_ms: float
    latency_ratio: float
    output_db: float | None
    calibration_images: int
    layers: tuple[LayerNoise, ...] = ()


@record
class Exported:
    """An exported file, checked against the torch network on real images; `max_abs_diff` of the outputs.

    `bytes` counts all `files`; `relative_diff` is the difference relative to the largest output (or to 1, if all are
    smaller); `top1_agreement` the share of the checked images with the same top-1 class; `latency_ms` the median at
    batch 1. They are None where this machine cannot run the file, and `note` says why. `preprocessing` says what the
    file takes: preprocessed floats, or bytes in a layout.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    target: str
    output: str
    bytes: int
    max_abs_diff: float | None
    top1_agreement: float | None
    images_checked: int
    latency_ms: float | None
    relative_diff: float | None = None
    files: tuple[str, ...] = ()
    input: str = "float32 nchw"
    note: str = ""
    int8: Int8 | None = None


@record
class Drop:
    """Top-1 that one network loses against another on the same `n` images, a fraction; negative where it gains.

    `ci95` is the two-sided 95 % interval, `upper` the end of the one-sided one at the level that was asked for.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    n: int
    drop: float
    ci95: tuple[float, float]
    upper: float


@record
class Try:
    """One network of a search: the fraction of the MACs that it was to keep and kept, and its drop on held-out images.

    `refused` is the sentence that says why there is none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    budget: float
    macs: float | None = None
    drop: Drop | None = None
    keeps: bool = False
    refused: str | None = None


@record
class MaxDrop:
    """What a search for the smallest network within `max_drop` (a fraction) came to.

    Tries are decided on images held out of the split `images`; `proof` is the final network's drop on test images that
    no decision has seen. What counts of a drop is its upper end at the level `confidence`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    max_drop: float
    confidence: float
    images: Literal["train", "test"]
    tries: tuple[Try, ...]
    proof: Drop

    @property
    def kept(self) -> bool:
        """Whether the final network keeps the drop on the test images."""
        return self.proof.upper <= self.max_drop


@record
class Run:
    """All that a report shows of one compression run.

    `labels` are those of the test images, in the order of each stage's predictions. `parts` says in which part of the
    network (stem, a stage, SE blocks, head) a layer is, and `operations` how long each takes in the dense and the
    pruned network. `sites_after` and `profiles_after` are the pruned network's, on as many training images as
    `gate_images`. `changed` are some of the test images whose answer changed, and `hashes` the SHA-256 of files and
    data.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    command: str
    arch: ArchSpec
    data: str
    classes: tuple[str, ...]
    seed: int
    environment: dict[str, str]
    plan: Plan
    cost_before: Cost
    cost_after: Cost
    bytes_before: int
    bytes_after: int
    max_abs_diff_masked: float
    stages: tuple[StageResult, ...]
    paired: PairedTest | None = None
    latency: tuple[Latency, Latency] | None = None
    sites: tuple[SiteSummary, ...] = ()
    profiles: tuple[GateProfile, ...] = ()
    exported: tuple[Exported, ...] = ()
    max_drop: MaxDrop | None = None
    labels: tuple[int, ...] = ()
    parts: dict[str, str] = field(default_factory=dict)
    operations: tuple[tuple[OperationTime, ...], tuple[OperationTime, ...]] | None = None
    sites_after: tuple[SiteSummary, ...] = ()
    profiles_after: tuple[GateProfile, ...] = ()
    gate_images: int = 0
    changed: tuple[ChangedImage, ...] = ()
    hashes: dict[str, str] = field(default_factory=dict)
