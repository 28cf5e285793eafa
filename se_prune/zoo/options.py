"""Options of an architecture in its reference: `zoo:se_resnet50?reduction=8&placement=pre`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from se_prune.errors import UsageError, nearest

#: How a value is written.
WORDS = {"true": True, "false": False}


def split(ref: str) -> tuple[str, dict[str, bool | int | float | str]]:
    """Return a reference without its options, and these.

    Raises:
        UsageError: An option is no NAME=VALUE, or stands there twice.
    """
    name, mark, given = ref.partition("?")
    options: dict[str, bool | int | float | str] = {}
    for part in given.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value) or key in options:
            raise UsageError(
                f"options follow ? as NAME=VALUE, each once, with & between them; got '{part}' in {ref}."
            )
        options[key] = _value(value)
    return name, options


def _value(text: str) -> bool | int | float | str:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def require_known(ref: str, options: Collection[str], known: Collection[str]) -> None:
    """Check that a network takes the options of its reference.

    Raises:
        UsageError: It does not; the message names those that it takes.
    """
    for name in options:
        if name not in known:
            raise UsageError(
                f"{ref} takes no option '{name}'{nearest(name, known)}; it takes {', '.join(sorted(known))}."
            )


def merged(ref: str, options: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a reference together with arguments that are asked for beside it.

    Raises:
        UsageError: They disagree.
    """
    for name, value in asked.items():
        if options.get(name, value) != value:
            raise UsageError(
                f"{ref} has {name}={options[name]}, which does not go with {name} {value}; drop one."
            )
    return {**options, **asked}
