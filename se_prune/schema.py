"""What every record is made of: the dataclass form, and JSON that reads back to an equal record.

`to_json` and `from_json` are exact inverses; unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, dataclass_transform, get_args, get_type_hints

from se_prune.errors import SePruneError, nearest

SCHEMA_VERSION: Final = 1
FORBID_EXTRA: dict[str, Any] = {"extra": "forbid", "ser_json_inf_nan": "constants"}

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """Make a class a frozen, slotted, keyword-only dataclass, in a way that type checkers see."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


_ADAPTERS: dict[Any, Any] = {}


def _adapter(cls: type[Any]) -> Any:
    from pydantic import TypeAdapter

    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return the JSON of a record; `from_json` reads it back to an equal one."""
    return str(_adapter(type(value)).dump_json(value, indent=indent).decode())


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """Return the JSON Schema of a record, as its files have it."""
    schema = _adapter(cls).json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{cls.__name__}, schema version {SCHEMA_VERSION}",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def to_dict(value: Any) -> dict[str, Any]:
    """Return a record as plain JSON values."""
    return dict(_adapter(type(value)).dump_python(value, mode="json"))


def from_json(cls: type[T], text: str | bytes, *, what: str = "record") -> T:
    """Read a record from JSON.

    Raises:
        SePruneError: A key is unknown or missing, or a value has the wrong type.
    """
    return _validated(cls, lambda: _adapter(cls).validate_json(text), what)


def from_dict(cls: type[T], values: dict[str, Any], *, what: str = "record") -> T:
    """Read a record from plain values; as `from_json`."""
    return _validated(cls, lambda: _adapter(cls).validate_python(values), what)


def _keys(hint: Any) -> set[str]:
    """Return the field names of every record in a type."""
    if not dataclasses.is_dataclass(hint):
        return {key for part in get_args(hint) for key in _keys(part)}
    hints = {f.name: get_type_hints(hint)[f.name] for f in dataclasses.fields(hint)}
    return {*hints, *(key for part in hints.values() for key in _keys(part))}


def _validated(cls: type[T], read: Any, what: str) -> T:
    from pydantic import ValidationError

    try:
        return read()  # type: ignore[no-any-return]
    except ValidationError as error:
        # an unknown key first: a misspelled one is also missing under its right name
        unknown = [e for e in error.errors() if e["type"] == "unexpected_keyword_argument"]
        first = [*unknown, *error.errors()][0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        hint = nearest(str(first["loc"][-1]), _keys(cls)) if unknown else ""
        raise SePruneError(f"{what} is not valid: {where}: {first['msg']}{hint}.") from error
