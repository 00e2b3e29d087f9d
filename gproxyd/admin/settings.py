"""The running configuration without its secrets, in the forms of the files: what is shown can be read back.

Invariant: what the schema keeps out of `repr` is not shown; of a mapping its names are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gproxyd.admin.views import moment
from gproxyd.config import fields
from gproxyd.units import format_duration, format_size, format_usd

HIDDEN = "(hidden)"

_Format = Callable[[Any], str]

_FORMATS: tuple[tuple[Any, _Format], ...] = (
    (fields.Duration, format_duration),
    (fields.Timeout, format_duration),
    (fields.Size, format_size),
    (fields.NanoUsd, format_usd),
)
"""Numbers that stand for text: their type, and how they are written."""


def shown(section: BaseModel) -> dict[str, Any]:
    """A section as JSON."""
    told = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        told[name] = _hidden(value) if not field.repr else _value(value, _format(field))
    return told


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict.fromkeys(map(str, value), HIDDEN)
    return None if value is None else HIDDEN


def _value(value: Any, write: _Format | None) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, BaseModel):
        return shown(value)
    if isinstance(value, Mapping):
        return {str(name): _value(inner, write) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_value(inner, write) for inner in value]
    if isinstance(value, int | float):
        return value if write is None else write(value)
    if isinstance(value, bytes):
        return HIDDEN
    if isinstance(value, datetime):
        return moment(value.timestamp())
    return f"sqlite://{value}" if isinstance(value, Path) else str(value)


def _format(field: FieldInfo) -> _Format | None:
    """How a number of this field is written; None where a number is one."""
    marks = [*field.metadata, *_marks(field.annotation)]
    for kind, write in _FORMATS:
        if any(kind.__metadata__[0] is mark for mark in marks):
            return write
    return None


def _marks(annotation: Any) -> list[Any]:
    """What Annotated says anywhere in a type."""
    own = list(annotation.__metadata__) if get_origin(annotation) is Annotated else []
    return own + [mark for inner in get_args(annotation) for mark in _marks(inner)]
