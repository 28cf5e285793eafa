"""Recipes: TOML files that say what a run does; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import math
import tomllib
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from se_prune.errors import SePruneError, UsageError, nearest
from se_prune.records import Budget, HiddenPolicy, RepairMode
from se_prune.schedule import StepShape
from se_prune.schema import FORBID_EXTRA, from_dict, record
from se_prune.settings import MAX_BAD_IMAGES, SearchTable, TrainSettings

FINETUNE_DEFAULTS: dict[str, Any] = {"epochs": 2, "lr": 0.02, "warmup": 0.1}
BUNDLED = Path(__file__).parent / "_recipes"
SOURCE = Path(__file__).parent.parent / "recipes"


@record
class ModelTable:
    """`[model]`: what to compress, as MODEL, `--arch`, `--pretrained` and `--ema` take it.

    Attributes:
        ref: An artifact, a checkpoint or ONNX file, or an architecture such as `timm:efficientnet_b0`.
        arch: Architecture of a checkpoint, where its tensors do not tell.
        pretrained: Load the library's own weights.
        ema: Take the averaged weights of a checkpoint that holds both.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    ref: str
    arch: str | None = None
    pretrained: bool = False
    ema: bool = False


@record
class ApplyTable:
    """`[apply]`: exactly one of the budgets (or none, where gates are folded alone), and how to cut and fold.

    Attributes:
        sparsity: Budget: the share of channels that leaves, 0 to 1.
        macs: Budget: the fraction of multiply-adds that stays, 0 to 1.
        params: Budget: the fraction of parameters that stays, 0 to 1.
        criterion: How channels are scored, as `se-prune apply --criterion` takes it.
        steps: So many times the network is cut, repaired and fine-tuned, measured anew each time; the budget, of
            channels, MACs or parameters, is met by the last. Every step but the last has epochs / (2 · steps) of the
            epochs of `[finetune]`, in whole epochs and at least one; the last has the rest. One is the default: with
            the same epochs in all, three were no better at a fifth of the MACs (`reports/schedules.md`).
        shape: What leaves in each step: as much each time (`linear`), most of it first, as (1 - t)³ falls (`cubic`),
            or the same share of what is left (`geometric`).
        round_to: Cut groups keep a multiple of so many channels.
        min_channels: No group keeps fewer channels.
        hidden: Hidden units of SE blocks leave by their own scores (`prune`), in proportion to the channels that they
            gate (`tie`), or not at all (`keep`).
        classes: Names of the classes that the deployment needs; all where there are none.
        repair: After the cut: least squares, BN statistics, then scales and shifts towards the dense network's outputs
            (`refit`), the same without the last (`layers`), BN statistics alone (`bn`), or `none`.
        fold_gates: Gates that become constants: `none`, `auto`, `all`, a number of them, or their names.
        fold_tolerance: Largest predicted loss of a gate that `auto` folds.
        latency: Budget: the fraction of the dense network's latency that stays, 0 to 1.
        latency_ms: Budget: milliseconds of one image.
        runtime: Where a latency is measured.
        threads: CPU threads of that measurement.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    sparsity: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    runtime: str = "onnxruntime"
    threads: int = 1
    criterion: str = "excitation"
    steps: int = 1
    shape: StepShape = "cubic"
    round_to: int | Literal["auto"] = 1
    min_channels: int = 2
    hidden: HiddenPolicy = "tie"
    classes: tuple[str, ...] = ()
    repair: RepairMode = "refit"
    fold_gates: str | int = "none"
    fold_tolerance: float | None = None


@record
class RunRecipe:
    """A whole run: `[model]`, `data`, `[apply]`, `[finetune]` (left out: no training), `export` targets.

    Attributes:
        model: The table `[model]`.
        data: The data set, as `--data` takes it; the command line's `--data` comes first.
        apply: The table `[apply]`.
        search: The table `[search]`, in place of a budget in `[apply]`.
        finetune: The table `[finetune]`; without it nothing is trained.
        export: Formats that the pruned network is written in, such as `onnx`.
        name: Title of the report.
        seed: Fixes every random choice.
        latency_rounds: Interleaved rounds in which the dense and the pruned network are timed; 0 for none.
        workers: Processes that decode images; without, one a core, at most 8.
        max_bad_images: Unreadable images of a split that are left out before the run stops: a share of the split below
            1, a number of images from 1 on.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    model: ModelTable
    data: str | None = None
    apply: ApplyTable = ApplyTable()
    search: SearchTable | None = None
    finetune: TrainSettings | None = None
    export: tuple[str, ...] = ()
    name: str | None = None
    seed: int = 0
    latency_rounds: int = 50
    workers: int | None = None
    max_bad_images: float = MAX_BAD_IMAGES


@record
class _TrainFile:
    """A recipe of `train` or `finetune`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA
    train: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: It is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}; check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}; see recipes/ for examples.") from error


def find_recipe(name: str | Path) -> Path:
    """Return a recipe file: a path, or the name of one that ships with se-prune.

    Raises:
        UsageError: There is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = BUNDLED if BUNDLED.is_dir() else SOURCE
    shipped = {p.stem: p for p in sorted(folder.glob("*.toml"))}
    if path.suffix in {"", ".toml"} and path.stem in shipped and path.parent == Path():
        return shipped[path.stem]
    raise UsageError(
        f"there is no recipe {name}{nearest(path.stem, shipped)}; give a TOML file or one of: {', '.join(shipped)}."
    )


def budget_of(
    sparsity: float | None,
    macs: float | None,
    params: float | None,
    *,
    latency: float | None = None,
    latency_ms: float | None = None,
    folds: bool = False,
) -> Budget:
    """Return the one budget that was given; a sparsity of 0 where none was and gates are folded (`folds`).

    Raises:
        UsageError: Several were given, or none and nothing is folded.
    """
    options: dict[Literal["sparsity", "macs", "params", "latency", "latency_ms"], float | None] = {
        "sparsity": sparsity,
        "macs": macs,
        "params": params,
        "latency": latency,
        "latency_ms": latency_ms,
    }
    given = [(kind, value) for kind, value in options.items() if value is not None]
    if folds and not given:
        return Budget(kind="sparsity", value=0.0)
    if len(given) != 1:
        raise UsageError(
            "give exactly one budget: --sparsity, --macs, --params, --latency or --latency-ms, such as --macs 0.5 "
            "(--fold-gates alone needs none)."
        )
    return Budget(kind=given[0][0], value=given[0][1])


def table_budget(table: ApplyTable, *, folds: bool = False) -> Budget:
    """Return the budget of a recipe's `[apply]` table, as `budget_of`."""
    return budget_of(
        table.sparsity,
        table.macs,
        table.params,
        latency=table.latency,
        latency_ms=table.latency_ms,
        folds=folds,
    )


def with_budget(table: ApplyTable, budget: Budget | None) -> ApplyTable:
    """Return an `[apply]` table with this budget, and no other."""
    values: dict[str, Any] = dict.fromkeys(("sparsity", "macs", "params", "latency", "latency_ms"))
    return replace(table, **(values | ({} if budget is None else {budget.kind: budget.value})))


def check_search(search: SearchTable, table: ApplyTable, what: str) -> None:
    """Check a `[search]` table.

    Raises:
        UsageError: A value is out of range, or there is a budget as well.
    """
    if with_budget(table, None) != table:
        raise UsageError(f"{what}: give a budget or max_drop, not both.")
    for name, (least, most) in SEARCH_LIMITS.items():
        if not least <= getattr(search, name) <= most:
            raise UsageError(
                f"{what}: {name} must be at least {least} and at most {most}, got {getattr(search, name)}."
            )


def parse_round_to(text: str) -> int | Literal["auto"]:
    """Read `--round-to`: a number, or `auto`.

    Raises:
        UsageError: It is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--round-to takes a number of channels or auto, got '{text}'.") from error


def read_run(path: Path) -> RunRecipe:
    """Read a recipe of `se-prune run`.

    Raises:
        UsageError: A key is unknown or missing, or a value has the wrong type.
    """
    values = read_toml(path)
    if isinstance(values.get("finetune"), dict):
        values["finetune"] = {**FINETUNE_DEFAULTS, **values["finetune"]}
    if isinstance(values.get("apply"), dict) and isinstance(values["apply"].get("fold_gates"), bool):
        raise UsageError(
            f'{path}: fold_gates takes "none", "auto", "all", a number, or names, got a truth value.'
        )
    recipe: RunRecipe = _checked(RunRecipe, values, str(path))
    check_run(recipe, str(path))
    return recipe


def check_run(recipe: RunRecipe, what: str) -> None:
    """Check what the types of a recipe's keys do not say.

    Raises:
        UsageError: A value is out of range, or keys do not go together.
    """
    table = recipe.apply
    if recipe.search is not None:
        check_search(recipe.search, table, what)
        table = with_budget(table, Budget(kind="macs", value=recipe.search.least))
    budget = table_budget(table, folds=str(table.fold_gates) not in {"none", "0"})
    if recipe.finetune is not None:
        _check_ranges(recipe.finetune, f"[finetune] of {what}")
    if table.steps < 1:
        raise UsageError(f"{what}: steps must be at least 1, got {table.steps}.")
    if table.steps > 1 and budget.timed:
        raise UsageError(
            f"{what}: {table.steps} steps need a budget of channels, MACs or parameters; put macs in place of "
            f"{budget.kind}, or steps = 1."
        )
    if recipe.finetune is not None and recipe.finetune.epochs < table.steps:
        raise UsageError(
            f"{what}: {table.steps} steps need as many epochs of fine-tuning at least, got {recipe.finetune.epochs}; "
            "raise epochs, or take fewer steps."
        )
    if recipe.finetune is not None and recipe.finetune.group_lasso and table.steps == 1:
        raise UsageError(
            f"{what}: group_lasso makes channels ready for the next cut, and a run in one step has none; raise steps, "
            "or leave it out."
        )


def train_settings(path: Path | None, table: Literal["train", "finetune"], **overrides: Any) -> TrainSettings:
    """Return the settings of a recipe's table (or the defaults), with the given overrides.

    Raises:
        UsageError: A key is unknown or a value has the wrong type.
    """
    values: dict[str, Any] = dict(FINETUNE_DEFAULTS) if table == "finetune" else {}
    what = f"[{table}]"
    if path is not None:
        document = _checked(_TrainFile, read_toml(path), str(path))
        values |= getattr(document, table)
        what = f"[{table}] of {path}"
    values |= {key: value for key, value in overrides.items() if value is not None}
    settings: TrainSettings = _checked(TrainSettings, values, what)
    _check_ranges(settings, what)
    return settings


def _checked(cls: type[Any], values: dict[str, Any], what: str) -> Any:
    try:
        return from_dict(cls, values, what=what)
    except SePruneError as error:
        raise UsageError(str(error)) from error


#: The least and the largest value of keys of `SearchTable`.
SEARCH_LIMITS: dict[str, tuple[float, float]] = {
    "max_drop": (0.0, 100.0),
    "confidence": (0.5, 0.999),
    "held_out": (0.001, 0.5),
    "least": (0.001, 0.99),
    "tolerance": (0.001, 0.5),
}
#: The least and the largest value of keys of `TrainSettings`; all must be finite.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "batch_size", "accumulate"), (1, math.inf)),
    **dict.fromkeys(
        ("crop_padding", "weight_decay", "clip_norm", "ema_bn_images", "rand_augment"), (0, math.inf)
    ),
    **dict.fromkeys(("mixup", "cutmix", "distill_features", "group_lasso", "patience"), (0, math.inf)),
    "lr": (0.0, math.inf),
    "distill_temperature": (1e-3, math.inf),
    "rand_augment_magnitude": (0, 10),
    "held_out": (0, 0.5),
    **dict.fromkeys(
        ("momentum", "warmup", "label_smoothing", "ema_decay", "flip", "erase", "distill_weight", "mix_prob"),
        (0, 1),
    ),
    "group_lasso_ramp": (0, 1),
}


def _check_ranges(settings: TrainSettings, what: str) -> None:
    for name, (least, most) in LIMITS.items():
        value = getattr(settings, name)
        if not least <= value <= most or value == math.inf:  # also refuses NaN
            bound = "" if most == math.inf else f", at most {most}"
            raise UsageError(f"{what}: {name} must be at least {least}{bound} and finite, got {value}.")
    _check_pairs(settings, what)


def _check_pairs(settings: TrainSettings, what: str) -> None:
    """Refuse keys that do not go together."""
    if (settings.patience or settings.keep == "best") and not settings.held_out:
        key = "patience" if settings.patience else 'keep = "best"'
        raise UsageError(f"{what}: {key} needs images to measure each epoch; add held_out = 0.05.")
    if (settings.mixup or settings.cutmix) and settings.batch_size % 2:
        raise UsageError(
            f"{what}: mixup and cutmix mix pairs, so batch_size must be even, got {settings.batch_size}."
        )
    if settings.ema_bn_images and not settings.ema_decay:
        raise UsageError(f"{what}: ema_bn_images needs an average of the weights; add ema_decay = 0.99.")
    if settings.compile and settings.distill_features:
        raise UsageError(
            f"{what}: distill_features reads the gates while the network runs, which a compiled one does not "
            "allow; leave out compile."
        )
