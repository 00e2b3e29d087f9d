"""Bodies and parameters: their shapes, and what is wrong with them.

The values have the forms that they have in the configuration. Invariant: no message quotes a value, nor a name that
may be a secret in the wrong place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from gproxyd.config import fields, messages
from gproxyd.config.fields import Items, Some, did_you_mean, looks_like_key
from gproxyd.config.people import RateLimit, Role
from gproxyd.config.section import Section
from gproxyd.errors import Refusal
from gproxyd.policy.quotas import MOST
from gproxyd.units import NANO_PER_USD

T = TypeVar("T", bound=Section)

MAX_PAGE = 1000

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _affordable(nano: int) -> int:
    if nano > MOST:
        raise ValueError(f"must be at most {MOST // NANO_PER_USD} US dollars")
    return nano


def _above_zero(nano: int) -> int:
    if not nano:
        raise ValueError("must be more than nothing")
    return nano


def _sound(limits: tuple[RateLimit, ...]) -> tuple[RateLimit, ...]:
    """What the rules of the configuration say of the same list."""
    seen = set()
    for limit in limits:
        if not (limit.rpm or limit.rpd or limit.tpm or limit.concurrency):
            raise ValueError("holds an entry that limits nothing; give it `rpm`, `rpd`, `tpm` or `concurrency`")
        if limit.model in seen:
            raise ValueError("holds two entries for the same models; make one of the two")
        seen.add(limit.model)
    return limits


Usd = Annotated[fields.NanoUsd, AfterValidator(_affordable)]
Limits = Annotated[tuple[RateLimit, ...], Items, AfterValidator(_sound)]
Globs = Annotated[tuple[fields.ModelGlob, ...], Items]


class Money(Section):
    """What may be spent: nano-dollars or None, for ever or in each day or month of UTC."""

    usd: Usd | None
    period: Literal["day", "month"] | None = None


class KeyPatch(Section):
    """What can be changed about a key. What is absent stays; null takes a narrowing, an end or a budget away."""

    enabled: bool = True
    expires_at: fields.Time | None = None
    models: Some[fields.ModelGlob] | None = None
    endpoints: Some[fields.EndpointGlob] | None = None
    agents: Some[fields.AgentName] | None = None
    rate_limits: Limits = ()
    budget: Money | None = None


class KeyForm(KeyPatch):
    """A new key."""

    name: fields.KeyName


class UserPatch(Section):
    """What can be changed about a user. What is absent stays; `quota: null` takes the quota away."""

    role: Role = "user"
    permissions: Globs = ()
    rate_limits: Limits = ()
    quota: Money | None = None


class UserForm(UserPatch):
    """A new user, who may get keys at once."""

    name: fields.UserName
    keys: Annotated[tuple[KeyForm, ...], Items] = ()


class _ListForm(Section):
    """One list, which alone stands for itself."""

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        (name,) = cls.model_fields
        return {name: value} if isinstance(value, list) else value


class PermissionsForm(_ListForm):
    permissions: Globs


class RateLimitsForm(_ListForm):
    rate_limits: Limits


class TopUp(Section):
    usd: Annotated[Usd, AfterValidator(_above_zero)]


class Explain(Section):
    """Would this user's request for this model at this endpoint be served, and by whom?"""

    model: fields.ModelId
    user: Annotated[str, Field(max_length=64)] | None = None
    endpoint: Annotated[str, Field(max_length=1024)] | None = None


def _number(least: int, most: int) -> BeforeValidator:
    def read(text: Any) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise ValueError(f"must be a number from {least} to {most}")
        return int(text)

    return BeforeValidator(read)


def _midnight(text: Any) -> Any:
    return f"{text}T00:00:00Z" if _DATE.fullmatch(text) else text


Moment = Annotated[fields.Time, BeforeValidator(_midnight)]
"""A time, or a day in UTC, which stands for its beginning."""


class Nothing(Section):
    """No parameters, and no members."""


class Cursor(Section):
    cursor: Annotated[str, Field(max_length=128)] | None = None


class Paging(Cursor):
    limit: Annotated[int, _number(1, MAX_PAGE)] = 100


class LogQuery(Paging):
    user: str | None = None
    status: Annotated[int, _number(100, 999)] | None = None


class OwnUsageQuery(Cursor):
    """Which records. `limit` is None where none was given: of sums and of CSV that means all."""

    limit: Annotated[int, _number(1, MAX_PAGE)] | None = None
    key: str | None = None
    provider: str | None = None
    model: str | None = None
    endpoint: str | None = None
    status: Annotated[int, _number(100, 999)] | None = None
    since: Moment | None = None
    until: Moment | None = None
    group_by: Literal["user", "key", "provider", "model", "day"] | None = None
    format: Literal["json", "csv"] = "json"

    @property
    def start(self) -> float | None:
        return _epoch(self.since)

    @property
    def end(self) -> float | None:
        return _epoch(self.until)


class UsageQuery(OwnUsageQuery):
    user: str | None = None


def _epoch(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def read_query(form: type[T], query: Mapping[str, str]) -> T:
    """Raises Refusal (400). A parameter that nobody knows is refused: it may be a filter with a slip of the pen.

    `key` may be there on every path, because it can be the client's credential.
    """
    known = {name: value for name, value in query.items() if name != "key" or "key" in form.model_fields}
    return _validated(form, known, "parameter")


def read_body(form: type[T], body: bytes) -> T:
    """Raises Refusal (400)."""
    if form is Nothing and not body.strip():
        return form()
    try:
        orjson.loads(body)  # strict: UTF-8, no NaN, no lone surrogates
        value = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise Refusal("invalid_request", "the body must be JSON in which no name stands twice") from None
    if value is None and form is Money:
        value = {"usd": None}
    if not isinstance(value, dict) and form not in (PermissionsForm, RateLimitsForm):
        raise Refusal("invalid_request", "the body must be a JSON object")
    return _validated(form, value, "member")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _validated(form: type[T], value: Any, kind: str) -> T:
    try:
        return form.model_validate(value)
    except ValidationError as error:
        problems = [
            (_path(detail["loc"]), _sentence(form, detail, kind))
            for detail in error.errors(include_url=False, include_input=False)
        ]
    text = "; ".join(f"'{path}' {sentence}" if path else f"the body {sentence}" for path, sentence in problems)
    raise Refusal("invalid_request", text, param=problems[0][0] or None)


def _path(location: tuple[int | str, ...]) -> str:
    """`rate_limits[0].rpm`; a name that may hold a secret is shown as `?`."""
    shown = ""
    for part in location:
        if isinstance(part, int):
            shown += f"[{part}]"
        else:
            safe = _NAME.fullmatch(part) is not None and not looks_like_key(part)
            shown += ("." if shown else "") + (part if safe else "?")
    return shown


def _sentence(form: type[Section], detail: ErrorDetails, kind: str) -> str:
    if detail["type"] == "model_type":
        return "must be a JSON object"
    if detail["type"] != "extra_forbidden":
        return messages.flaw(detail).message
    *parents, name = detail["loc"]
    known = _members(form, parents)
    return f"is no {kind} that is known here" + (did_you_mean(str(name), known) or _listed(known))


def _listed(known: list[str]) -> str:
    return f"; known: {', '.join(known)}" if known else ""


def _members(form: type[Section], parents: list[int | str]) -> list[str]:
    nested: dict[str, type[Section]] = {"rate_limits": RateLimit, "quota": Money, "budget": Money, "keys": KeyForm}
    inner = next((nested[part] for part in reversed(parents) if isinstance(part, str) and part in nested), form)
    return sorted(inner.model_fields)
