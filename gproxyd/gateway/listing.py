"""The models that a caller sees, in the caller's dialect: models, agents and aliases, as `shelves` has laid them out.

Sources: the API references of OpenAI (models), Anthropic (models) and Gemini (models.list, models.get).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from urllib.parse import parse_qs, unquote

import orjson

from gproxyd.errors import Refusal
from gproxyd.gateway.shelves import HEADS, Entry, Shape, Shelf, permits
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.policy.callers import Caller
from gproxyd.types import DialectName


def answer(
    snapshot: Snapshot, caller: Caller, provider: str | None, raw_id: bytes | None, dialect: DialectName, query: bytes
) -> orjson.Fragment:
    """The whole list of what the caller may call, or one entry of it, as JSON. Raises Refusal (400, 404)."""
    shelf = snapshot.shelves.shelf(provider)
    shape, page = _SHAPES.get(dialect, ("openai", _openai_page))
    if raw_id is not None:
        return orjson.Fragment(_find(shelf, caller, raw_id).text(shape))
    parameters = {name: values[-1] for name, values in parse_qs(query.decode("ascii")).items()}
    return orjson.Fragment(page(shelf.chosen(caller), parameters))


def _find(shelf: Shelf, caller: Caller, raw_id: bytes) -> Entry:
    """The entry of an id from a path, percent-decoded once. Raises Refusal (404), the same for what is not there and
    for what the caller may not call."""
    entry = shelf.by_id.get(unquote(raw_id.decode("ascii")))
    if entry is None or not permits(caller, entry):
        raise Refusal("model_not_found", "no such model is known here, and no alias or agent bears that name")
    return entry


def _texts(entries: Sequence[Entry], shape: Shape) -> bytes:
    """The entries as a JSON array."""
    if not entries:
        return b"[]"
    head = b'{"' + HEADS[shape]
    return b"[" + head + (b"," + head).join([entry.start + getattr(entry.tails, shape) for entry in entries]) + b"]"


def _openai_page(found: Sequence[Entry], parameters: Mapping[str, str]) -> bytes:
    return b'{"object":"list","data":' + _texts(found, "openai") + b"}"


def _anthropic_page(found: Sequence[Entry], parameters: Mapping[str, str]) -> bytes:
    limit = _number(parameters, "limit", 20, 1000)
    ids = [entry.id for entry in found]
    first, last = 0, len(found)
    if after := parameters.get("after_id"):
        first = _position(ids, after) + 1
    if before := parameters.get("before_id"):
        last = _position(ids, before)
        first = max(first, last - limit)
    page = found[first : min(last, first + limit)]
    rest = {
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": first > 0 if before else first + limit < len(found),
    }
    return b'{"data":' + _texts(page, "anthropic") + b"," + orjson.dumps(rest)[1:]


def _gemini_page(found: Sequence[Entry], parameters: Mapping[str, str]) -> bytes:
    size = _number(parameters, "pageSize", 50, 1000)
    start = _number(parameters, "pageToken", 0, len(found), least=0)
    end = start + size
    following = b',"nextPageToken":"%d"' % end if end < len(found) else b""
    return b'{"models":' + _texts(found[start:end], "gemini") + following + b"}"


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


_Page = Callable[[Sequence[Entry], Mapping[str, str]], bytes]
_SHAPES: Mapping[DialectName, tuple[Shape, _Page]] = {
    "anthropic": ("anthropic", _anthropic_page),
    "gemini": ("gemini", _gemini_page),
}
