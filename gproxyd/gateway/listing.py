"""The models that a caller sees, in the caller's dialect: configured models, and aliases beside them.

Sources: OpenAI API reference (models), Anthropic API reference (models; `created_at` is the epoch where a release
date is not known), Gemini API reference (models.list, models.get).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qs, unquote

from gproxyd.config import Model, Price, Rates
from gproxyd.errors import Refusal
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.policy.callers import Caller
from gproxyd.types import DialectName
from gproxyd.units import format_usd


@dataclass(frozen=True, slots=True)
class Entry:
    """One name that a caller may send. `alias_of` names its target if it is an alias."""

    id: str
    provider: str
    context: int | None
    max_output: int | None
    price: Price | None
    alias_of: str | None = None


def entries(snapshot: Snapshot, provider: str | None) -> list[Entry]:
    """What can be called, by its name in the aggregated form or, with `provider`, in that provider's scoped form."""
    found: list[Entry] = []
    for name, section in snapshot.config.providers.items():
        if provider in (None, name) and snapshot.providers[name].usable:
            prefix = "" if provider else f"{name}/"
            found += (_entry(prefix + model.id, name, model, None) for model in section.models)
    for alias, (home, target) in snapshot.aliases.items():
        if provider in (None, home) and snapshot.providers[home].usable:
            models = {model.id: model for model in snapshot.config.providers[home].models}
            entry = _entry(alias, home, models.get(target), f"{home}/{target}")
            found.append(replace(entry, price=snapshot.config.aliases[alias].price or entry.price))
    return found


def _entry(name: str, provider: str, model: Model | None, alias_of: str | None) -> Entry:
    if model is None:
        return Entry(name, provider, None, None, None, alias_of)
    return Entry(name, provider, model.context, model.max_output, model.price, alias_of)


def find(found: Sequence[Entry], raw_id: bytes) -> Entry:
    """The entry of an id from a path, percent-decoded once. Raises Refusal (404)."""
    wanted = unquote(raw_id.decode("ascii"))
    for entry in found:
        if entry.id == wanted:
            return entry
    raise Refusal("model_not_found", "no such model is configured, and no alias bears that name")


def answer(
    snapshot: Snapshot, caller: Caller, provider: str | None, raw_id: bytes | None, dialect: DialectName, query: bytes
) -> Any:
    """The JSON value of the whole list of what the caller may call, or of one entry. Raises Refusal (400, 404)."""
    prefix = f"{provider}/" if provider else ""
    found = [
        entry
        for entry in entries(snapshot, provider)
        if caller.may_model(prefix + entry.id) or (entry.alias_of is not None and caller.may_model(entry.id))
    ]
    shape, page = _SHAPES.get(dialect, (_openai, _openai_page))
    if raw_id is not None:
        return shape(find(found, raw_id))
    parameters = {name: values[-1] for name, values in parse_qs(query.decode("ascii")).items()}
    return page(found, parameters)


def _openai(entry: Entry) -> dict[str, Any]:
    facts = {
        "context_window": entry.context,
        "max_output_tokens": entry.max_output,
        "pricing": _pricing(entry.price),
        "alias_of": entry.alias_of,
    }
    own = {"id": entry.id, "object": "model", "created": 0, "owned_by": entry.provider}
    return own | {name: value for name, value in facts.items() if value is not None}


def _pricing(price: Price | None) -> dict[str, str] | None:
    """USD per million tokens, as decimal strings."""
    if price is None:
        return None
    rates = ((name, getattr(price, name)) for name in Rates.model_fields)
    return {name: format_usd(value) for name, value in rates if value is not None}


def _openai_page(found: Sequence[Entry], parameters: Mapping[str, str]) -> dict[str, Any]:
    return {"object": "list", "data": [_openai(entry) for entry in found]}


def _anthropic(entry: Entry) -> dict[str, Any]:
    facts = {"max_input_tokens": entry.context, "max_tokens": entry.max_output}
    own = {"type": "model", "id": entry.id, "display_name": entry.id, "created_at": "1970-01-01T00:00:00Z"}
    return own | {name: value for name, value in facts.items() if value is not None}


def _anthropic_page(found: Sequence[Entry], parameters: Mapping[str, str]) -> dict[str, Any]:
    limit = _number(parameters, "limit", 20, 1000)
    ids = [entry.id for entry in found]
    first, last = 0, len(found)
    if after := parameters.get("after_id"):
        first = _position(ids, after) + 1
    if before := parameters.get("before_id"):
        last = _position(ids, before)
        first = max(first, last - limit)
    page = found[first : min(last, first + limit)]
    return {
        "data": [_anthropic(entry) for entry in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": first > 0 if before else first + limit < len(found),
    }


def _gemini(entry: Entry) -> dict[str, Any]:
    facts = {"inputTokenLimit": entry.context, "outputTokenLimit": entry.max_output}
    own = {
        "name": f"models/{entry.id}",
        "version": "001",
        "displayName": entry.id,
        "supportedGenerationMethods": ["generateContent", "countTokens"],
    }
    return own | {name: value for name, value in facts.items() if value is not None}


def _gemini_page(found: Sequence[Entry], parameters: Mapping[str, str]) -> dict[str, Any]:
    size = _number(parameters, "pageSize", 50, 1000)
    start = _number(parameters, "pageToken", 0, len(found), least=0)
    page: dict[str, Any] = {"models": [_gemini(entry) for entry in found[start : start + size]]}
    if start + size < len(found):
        page["nextPageToken"] = str(start + size)
    return page


def _number(parameters: Mapping[str, str], name: str, default: int, most: int, least: int = 1) -> int:
    text = parameters.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text)):
        raise Refusal("invalid_request", f"'{name}' must be a number from {least} to {most}", param=name)
    return min(int(text), most)


def _position(ids: list[str], wanted: str) -> int:
    try:
        return ids.index(wanted)
    except ValueError:
        raise Refusal("invalid_request", "the cursor names no model of this list") from None


_Page = Callable[[Sequence[Entry], Mapping[str, str]], dict[str, Any]]
_SHAPES: Mapping[DialectName, tuple[Callable[[Entry], dict[str, Any]], _Page]] = {
    "anthropic": (_anthropic, _anthropic_page),
    "gemini": (_gemini, _gemini_page),
}
