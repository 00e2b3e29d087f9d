"""From what pydantic reports to what an administrator reads.

Invariant: no value of the file gets into a message, and of its keys only those that cannot be a misplaced secret
(`{token:sk-...}`, with the space forgotten, makes the secret part of a key).
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from gproxyd.config.fields import did_you_mean, looks_like_key
from gproxyd.config.schema import Config
from gproxyd.config.source import Flaw, KeyPath

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,79}")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/:-]{0,79}")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_KEY = "[key]"
"""What pydantic appends to a location when the key of a mapping is wrong, not its value."""

_PLAIN = {
    "missing": "is required",
    "string_type": "must be text; put it in quotes if it looks like a number or like true, false or null",
    "int_type": "must be a whole number, without quotes",
    "float_type": "must be a number, without quotes",
    "finite_number": "must be a number, without quotes",
    "bool_type": "must be true or false, without quotes",
    "tuple_type": "must be a list, as in [a, b]",
    "dict_type": "must be a section with keys of its own",
    "mapping_type": "must be a section with keys of its own",
    "model_type": "must be a section with keys of its own",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
}


def flaw(error: ErrorDetails) -> Flaw:
    """The flaw that one of pydantic's errors describes."""
    path: KeyPath = error["loc"]
    if path[-1:] == (_KEY,):
        path = path[:-1]
        if error["type"] == "literal_error":
            return _unknown_key(path)
    if error["type"] == "extra_forbidden":
        return _unknown_key(path)
    if error["type"] == "value_error":
        return Flaw(path, str(error["ctx"]["error"]))
    # pydantic's own text is never used: some of it quotes the input.
    template = _PLAIN.get(error["type"], "is not valid here")
    return Flaw(path, template.format_map(error.get("ctx", {})))


def _unknown_key(path: KeyPath) -> Flaw:
    known = known_keys(path[:-1])
    hint = did_you_mean(str(path[-1]), known) or f"; known here: {', '.join(sorted(known))}"
    return Flaw(path, f"is not a known key{hint}")


def key_path(path: KeyPath) -> str:
    """`providers.openai-main.models[0].id`; a key that may hold a secret is shown as `?`."""
    shown = ""
    for depth, part in enumerate(path):
        if isinstance(part, int):
            shown += f"[{part}]"
        else:
            shown += ("." if shown else "") + (part if _harmless(path[:depth], part) else "?")
    return shown


def _harmless(parent: KeyPath, part: str) -> bool:
    known = known_keys(parent)
    if part in known:
        return True
    if known:  # a key that should not be there: shown if it may be a slip of the pen
        return _WORD.fullmatch(part) is not None and not looks_like_key(part)
    form = _ALIAS if parent in (("aliases",), ("agents",)) else _NAME
    return form.fullmatch(part) is not None and not looks_like_key(part)


def known_keys(path: KeyPath) -> frozenset[str]:
    """The keys that the schema knows under `path`; empty where names are free, and where there is no section."""
    shape: Any = Config
    for part in path:
        shape = _below(_bare(shape), part)
    shape = _bare(shape)
    if isinstance(shape, type) and issubclass(shape, BaseModel):
        return frozenset(shape.model_fields)
    if get_origin(shape) is Mapping:
        key = _bare(get_args(shape)[0])
        return frozenset(get_args(key)) if get_origin(key) is Literal else frozenset()
    return frozenset()


def _below(shape: Any, part: str | int) -> Any:
    if isinstance(shape, type) and issubclass(shape, BaseModel):
        field = shape.model_fields.get(str(part))
        return field.annotation if field else None
    if get_origin(shape) is Mapping:
        return get_args(shape)[1]
    if get_origin(shape) is tuple:
        return get_args(shape)[0]
    return None


def _bare(shape: Any) -> Any:
    """The type without Annotated and without `| None`."""
    if get_origin(shape) is Annotated:
        return _bare(get_args(shape)[0])
    if get_origin(shape) in {Union, types.UnionType}:
        return _bare(next(each for each in get_args(shape) if each is not type(None)))
    return shape
