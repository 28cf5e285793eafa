"""Recipes: TOML files that say what a run does; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal

from se_prune.errors import SePruneError, UsageError
from se_prune.records import TrainSettings, from_dict

FINETUNE_DEFAULTS: dict[str, Any] = {"epochs": 2, "lr": 0.02, "warmup": 0.1}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: It is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error


def train_settings(path: Path | None, table: Literal["train", "finetune"], **overrides: Any) -> TrainSettings:
    """Return the settings of a recipe's table (or the defaults), with the given overrides.

    Raises:
        UsageError: A key is unknown or a value has the wrong type.
    """
    values: dict[str, Any] = dict(FINETUNE_DEFAULTS) if table == "finetune" else {}
    if path is not None:
        values |= read_toml(path).get(table, {})
    values |= {key: value for key, value in overrides.items() if value is not None}
    return settings_from(values, f"[{table}] of {path}" if path else f"[{table}]")


def settings_from(values: dict[str, Any], what: str) -> TrainSettings:
    """Validate training settings.

    Raises:
        UsageError: A key is unknown, or a value has the wrong type or is out of range.
    """
    try:
        settings = from_dict(TrainSettings, values, what=what)
    except SePruneError as error:
        raise UsageError(str(error)) from error
    limits = {"epochs": 1, "batch_size": 1, "lr": 0.0, "warmup": 0.0, "crop_padding": 0}
    for name, least in limits.items():
        if getattr(settings, name) < least:
            raise UsageError(f"{what}: {name} must be at least {least}, got {getattr(settings, name)}.")
    return settings


def known_settings() -> list[str]:
    """Return the keys of `[train]` and `[finetune]`."""
    return [field.name for field in dataclasses.fields(TrainSettings)]
