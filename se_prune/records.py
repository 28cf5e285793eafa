"""The records that pass between stages.

Every record is a frozen, slotted, keyword-only dataclass; those that reach a file carry a `schema_version`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar, Literal

from se_prune.schema import FORBID_EXTRA, SCHEMA_VERSION, record


@record
class ArchSpec:
    """How to build a dense network: a reference as `--arch` takes it, and the factory's own arguments."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    ref: str
    kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)


@record
class Preprocessing:
    """From pixels in [0, 1] to the network's input: size (C, H, W), then `(x - mean) / std` per channel."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@record
class Geometry:
    """The size of one layer after surgery: channels in and out, and groups (1 for a linear layer)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    in_channels: int
    out_channels: int
    groups: int = 1


@record
class Cost:
    """What a network costs for one image of `input_size` (C, H, W).

    `params` counts learnable parameters. `macs` counts convolutions and fully connected layers, one
    multiply-add = 1 (the paper's convention); `macs_se` is the part of it inside SE blocks, `macs_gate` the
    squeeze, activation and multiply of the gates, which `macs` leaves out. `uncounted` names every other
    operation that ran, with how often.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    params: int
    macs: int
    macs_conv: int
    macs_linear: int
    macs_se: int
    macs_gate: int
    input_size: tuple[int, int, int]
    per_layer: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)


#: Two FC layers; one convolution along the channels (ECA); one FC layer (effective SE).
SiteKind = Literal["se", "eca", "effective-se"]


@record
class GateSite:
    """One SE block: where the multiply happens and the layers that compute its gate.

    `owner` is the module whose forward multiplies (the `call`-th time it runs, the `multiply`-th multiply
    in it, with the gate as operand `gate_operand`); `reduce` and `expand` name the two FC layers (`reduce` is
    None for a gate of one layer, `hidden` is 0 then). `features` is the layer whose output channels the gate
    scales, where the trace shows one. `squeeze` is how the map is pooled (`avg`, `max`, `avg+max`), `scale` the
    largest value of the gate: 1, but 2 for `2·sigmoid`. A factor after the multiply is no part of the site.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    owner: str
    call: int = 0
    multiply: int = 0
    gate_operand: int = 1
    channels: int
    hidden: int
    reduce: str | None
    expand: str | None
    features: str | None = None
    gate_activation: str = "sigmoid"
    kind: SiteKind = "se"
    squeeze: str = "avg"
    scale: float = 1.0

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that compute the gate."""
        return tuple(name for name in (self.reduce, self.expand) if name is not None)


@record
class LeftAlone:
    """A multiply by what looks like a gate and is no gate site: its module, the product's shape (C, H, W), why."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    shape: tuple[int, ...]
    reason: str


GroupKind = Literal["gated", "stream", "inner", "hidden"]
#: After the cut: least squares, BN recalibration, then scales and shifts; the first two; BN recalibration; or nothing.
RepairMode = Literal["refit", "layers", "bn", "none"]
#: Those in which least squares follows the cut.
REFITTING: frozenset[RepairMode] = frozenset({"refit", "layers"})
#: Hidden units leave by their own scores, in proportion to the channels that they gate, or not at all.
HiddenPolicy = Literal["prune", "tie", "keep"]
#: What stands where an SE block was: nothing, or a depthwise 1×1 convolution. Where its multiply could not be taken
#: out: a constant in place of its last layer, and nothing in place of its first, which is not used any more.
FoldKind = Literal["identity", "scale", "constant", "unused"]


@record
class ChannelGroup:
    """Channels that must leave together, `channels` of them; `name` is the first layer that makes them.

    `site` is the gate site that scales a gated group or owns a hidden one. `reason` says why a group
    cannot be cut (`prunable` False). Where `tied` > 1, channel i leaves together with i + channels / tied,
    i + 2 · channels / tied, …: grouped convolutions keep as many channels in each of their groups. `units`, where
    there are any, are the only channels that can leave, `tied` at a time, in place of that rule.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    kind: GroupKind
    channels: int
    members: tuple[str, ...]
    site: str | None = None
    prunable: bool = True
    reason: str | None = None
    tied: int = 1
    units: tuple[tuple[int, ...], ...] = ()

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """The channels that leave together, per unit of `tied` channels."""
        every = self.channels // self.tied
        return self.units or tuple(tuple(range(u, self.channels, every)) for u in range(every))


@record
class LayerSlice:
    """What one layer has to do with a group: its channel `index[i]` belongs to the group's channel `root[i]`.

    `role`: the layer makes the channels (`out`), reads them (`in`), or maps each to itself (`channelwise`: BN,
    depthwise convolutions).
    """

    layer: str
    role: Literal["out", "in", "channelwise"]
    index: tuple[int, ...]
    root: tuple[int, ...]


@record
class Coupling:
    """A channel group with every layer that its channels touch."""

    group: ChannelGroup
    slices: tuple[LayerSlice, ...]

    def layers(self, role: str) -> tuple[str, ...]:
        """Return the names of the layers with a role."""
        return tuple(s.layer for s in self.slices if s.role == role)


@record
class LayerCost:
    """The size and the MACs of one convolution or fully connected layer, or of a BN (`macs` 0)."""

    in_channels: int
    out_channels: int
    weights: int
    biases: int
    macs: int
    channelwise: bool


@record
class Inspection:
    """What `inspect` finds: the gate sites, what was left alone, the channel groups and the cost of a network."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    arch: ArchSpec | None
    sites: tuple[GateSite, ...]
    groups: tuple[ChannelGroup, ...]
    cost: Cost
    left_alone: tuple[LeftAlone, ...] = ()


@record
class Scores:
    """Per group, one score per channel (lower leaves first), from one criterion.

    `comparable` says that scores of different groups are in one unit, so that one threshold may rank them
    all; else the planner divides each group by its own mean first.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    criterion: str
    comparable: bool
    groups: dict[str, tuple[float, ...]]


@record
class Budget:
    """What a plan must meet: the share of channels removed, or the fraction of MACs or parameters kept.

    `latency` is a fraction of the dense network's time for one batch, `latency_ms` a time in milliseconds.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    kind: Literal["sparsity", "macs", "params", "latency", "latency_ms"]
    value: float

    @property
    def timed(self) -> bool:
        """Whether the budget is a time."""
        return self.kind in {"latency", "latency_ms"}

    @property
    def option(self) -> str:
        """The command line option that sets it, with its value."""
        return f"--{self.kind.replace('_', '-')} {self.value:g}"


@record
class GroupPlan:
    """What leaves one group, and why no more of it does (`note`).

    `predicted_loss` is the sum of the scores of what leaves, where the criterion's scores are in one unit (a share of
    the recalibrated signal): comparable across groups, from the statistics alone.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    kind: GroupKind
    channels: int
    removed: tuple[int, ...]
    note: str | None = None
    predicted_loss: float | None = None


@record
class SitePlan:
    """Whether a gate stays or is folded to `constants` (C,), one per channel of the dense network.

    `loss` is the predicted cost of folding this site alone, as `SiteSummary.predicted_loss`; `note` says into which
    layer the constants go, or why the gate stays.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    name: str
    action: Literal["keep", "fold"]
    loss: float
    constants: tuple[float, ...] = ()
    note: str | None = None


@record
class LayerRefit:
    """The least-squares repair of one layer: its squared error on held-out images before and after.

    Errors are relative to the variance of the dense network's responses; `kept` says whether the fit was taken.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    layer: str
    error_before: float
    error_after: float
    kept: bool


@record
class PlannedLatency:
    """What a latency budget came to, milliseconds per batch.

    `dense_ms` is the lowest median of the dense network, `measured_ms` that times the ratio of medians of cut and dense
    from `rounds` interleaved rounds (`share`, with its bootstrap interval); so what else the machine did cancels out.
    `predicted_ms` is what the per-layer table says of the same plan, without correction. `attempts` plans were timed.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    runtime: str
    batch_size: int
    threads: int
    dense_ms: float
    target_ms: float
    predicted_ms: float
    measured_ms: float
    share: float
    share_ci95: tuple[float, float]
    rounds: int
    attempts: int
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the measured latency is within the tolerance of the target."""
        return abs(self.measured_ms / self.target_ms - 1) <= self.tolerance

    @property
    def met(self) -> bool:
        """Whether the measured latency is at most the target, but for the tolerance."""
        return self.measured_ms <= self.target_ms * (1 + self.tolerance)


@record
class Plan:
    """The channels that leave, per group, and the gates that are folded, in the dense network's numbering; replayable.

    `groups` are those that could be cut, `refused` those that could not; the note of each says why no more of it
    leaves. `sites` is empty where no gate was to be folded.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    criterion: str
    budget: Budget
    round_to: int
    min_channels: int
    groups: tuple[GroupPlan, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    hidden: HiddenPolicy = "tie"
    refused: tuple[GroupPlan, ...] = ()
    sites: tuple[SitePlan, ...] = ()
    latency: PlannedLatency | None = None

    @property
    def sites_folded(self) -> int:
        """Gate sites whose gate becomes a constant."""
        return sum(site.action == "fold" for site in self.sites)

    @property
    def channels_removed(self) -> int:
        """Channels that leave, hidden units not counted."""
        return sum(len(g.removed) for g in self.groups if g.kind != "hidden")

    @property
    def channels_total(self) -> int:
        """Channels of every group of the plan, hidden units not counted."""
        return sum(g.channels for g in self.groups if g.kind != "hidden")


@record
class HistoryEntry:
    """One thing that was done to a network: the stage, and its settings and results as JSON values."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    stage: str
    details: dict[str, Any] = field(default_factory=dict)


@record
class ArtifactHeader:
    """Everything that an artifact says beside its tensors.

    `folded` names the SE blocks that are gone, `plain` the convolutions that hold what they computed as weights.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    schema_version: Literal[1] = SCHEMA_VERSION
    arch: ArchSpec
    geometry: dict[str, Geometry] = field(default_factory=dict)
    folded: dict[str, FoldKind] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    plan: Plan | None = None
    history: tuple[HistoryEntry, ...] = ()
