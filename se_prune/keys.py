"""The reference of every recipe key, made from the records themselves: what `se-prune run --keys` prints."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from se_prune.recipe import FINETUNE_DEFAULTS, ApplyTable, ModelTable, RunRecipe
from se_prune.settings import SearchTable, TrainSettings


def key_texts(cls: type[Any]) -> dict[str, str]:
    """Return what the docstring of a record says of each of its fields."""
    _, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in attributes.partition("\n\n")[0].splitlines():
        started = re.match(r" {4}(\w+): (.*)", line)
        if started:
            name, texts[started[1]] = started[1], started[2]
        elif name:
            texts[name] += f" {line.strip()}"
    return texts


def key_reference() -> str:
    """Return the reference of every recipe key as Markdown: its values, its default and its meaning."""
    tables: tuple[tuple[str, type[Any], str, dict[str, Any]], ...] = (
        ("Keys above all tables", RunRecipe, "of `se-prune run`", {}),
        ("[model]", ModelTable, "of `se-prune run`", {}),
        ("[apply]", ApplyTable, "of `se-prune run`", {}),
        ("[search]", SearchTable, "of `se-prune run`", {}),
        ("[train]", TrainSettings, "of `se-prune train`", {}),
        ("[finetune]", TrainSettings, "of `se-prune run` and `se-prune finetune`", FINETUNE_DEFAULTS),
    )
    parts = [
        "# Recipe keys\n\nMade by `se-prune run --keys`. A recipe is a TOML file; unknown keys are refused.\n"
    ]
    for title, cls, where, other in tables:
        parts.append(f"\n## {title}\n\nIn recipes {where}.\n")
        if title == "[finetune]":
            differ = ", ".join(f"{key} = {value}" for key, value in other.items())
            parts.append(f"\nThe keys of `[train]`, with other defaults: {differ}.\n")
            continue
        parts.append("\n| key | values | default | meaning |\n|---|---|---|---|\n")
        texts, hints = key_texts(cls), get_type_hints(cls)
        for item in dataclasses.fields(cls):
            default = item.default if item.default is not dataclasses.MISSING else "required"
            row = (f"`{item.name}`", _values(hints[item.name]), _shown(default), texts[item.name])
            parts.append(f"| {' | '.join(row)} |\n")
    return "".join(parts)


def _values(hint: Any) -> str:
    """Return a type as a recipe's writer sees it."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "table"
    if get_origin(hint) is tuple:
        return f"list of {_values(get_args(hint)[0])}"
    parts = [part for part in get_args(hint) if part is not type(None)]
    if parts:
        return " or ".join(_values(part) for part in parts)
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}[hint]


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    if dataclasses.is_dataclass(default):
        return "its defaults"
    return f"`{str(default).lower()}`" if isinstance(default, bool) else str(default)
