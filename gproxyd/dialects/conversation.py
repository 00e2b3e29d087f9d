"""What routing reads in a request: which conversation it belongs to, what a model must be able to do for it, its size.

Invariants: nothing here raises, whatever JSON a client sends; the time is bounded, however long a body is: of long
texts both ends are read, of long lists so many values. Later turns of a conversation have the key of the first.

Sources: OpenAI's and Anthropic's "Prompt caching" guides, the Gemini API's "Context caching" page. Claude Code puts a
line into its system prompt that is another one with every request (`x-anthropic-billing-header`).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from gproxyd.dialects.capabilities import needs, needs_large
from gproxyd.dialects.turns import Fields, items, parts, role, system
from gproxyd.dialects.weight import estimate_tokens, weights_large
from gproxyd.types import DialectName
from gproxyd.wire.spans import at_once

__all__ = [
    "Sticky",
    "estimate_tokens",
    "needs",
    "needs_large",
    "sticky_key",
    "sticky_key_large",
    "weights_large",
]

LIFETIME: Final[Mapping[DialectName, float]] = {
    "openai_chat": 600.0,  # "5 to 10 minutes of inactivity"
    "openai_responses": 600.0,
    "anthropic": 300.0,
    "gemini": 300.0,  # not told for implicit caching; a guess
}
"""Seconds for which a prompt's cache lasts if a request does not say."""

_NAMED = 3600.0  # Gemini's cached contents, unless whoever made them said otherwise
_RETENTIONS = {"24h": 86_400.0, "in_memory": 600.0, "in-memory": 600.0}
_DURATION = re.compile(r"([0-9]{1,4})(s|m|h)")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}

_MOST_VALUES = 2_000
_MOST_TEXT = 8 * 1024
_PAUSE = 64  # values that are looked at at once
_LATEST = 4  # messages from the end in which clients move their cache's mark along
_IGNORED = frozenset({"cache_control", "prompt_cache_breakpoint", "id", "status"})  # what changes from turn to turn
_TEXTS = ("text", "input_text", "output_text")
_BILLING = "x-anthropic-billing-header:"


class Sticky(NamedTuple):
    """`key` is a digest of 16 bytes, `ttl` the seconds for which the vendor keeps what it has read of the prompt."""

    key: bytes
    ttl: float


def sticky_key(dialect: DialectName, fields: Fields) -> Sticky | None:
    """The conversation that a request belongs to; None for one that cannot be told by what is here.

    That is the key that the client gave its cache, else what the conversation begins with: the system prompt and
    everything up to the first thing that the user said. Who goes on from a response that the vendor keeps sends none
    of it, and is to be sent where that response is.
    """
    return at_once(sticky_key_large(dialect, fields))


def sticky_key_large(dialect: DialectName, fields: Fields) -> Generator[None, None, Sticky | None]:
    """The same in steps."""
    ttl = _lifetime(dialect, fields)
    if name := _given_name(dialect, fields):
        return Sticky(_Digest().text("named").text(name).done(), ttl)
    if dialect == "openai_responses" and fields.get("previous_response_id"):
        return None
    opening = yield from _opening(dialect, items(dialect, fields))
    if not opening:
        return None
    digest = _Digest()
    for part in islice(system(dialect, fields), _MOST_VALUES):
        yield from digest.part(part)
    for item in opening:
        digest.text(role(dialect, item))
        for part in parts(dialect, item) or (item,):
            yield from digest.part(part)
    return Sticky(digest.done(), ttl)


def _opening(dialect: DialectName, conversation: Sequence[Any]) -> Generator[None, None, Sequence[Any]]:
    """The items up to the first that the user said; if there is none, up to the first that is not the system's."""
    last = None
    for n, item in enumerate(conversation[:_MOST_VALUES]):
        who = role(dialect, item)
        if who == "user":
            return conversation[: n + 1]
        if who != "system" and last is None:
            last = n
        if n % _PAUSE == _PAUSE - 1:
            yield None
    return conversation[: _MOST_VALUES if last is None else last + 1]


def _given_name(dialect: DialectName, fields: Fields) -> str | None:
    if dialect == "gemini":
        name = fields.get("cachedContent") or fields.get("cached_content")
    else:
        name = fields.get("prompt_cache_key")
        if not name and dialect == "openai_responses":
            name = fields.get("conversation")
            name = name.get("id") if isinstance(name, dict) else name
    return name if isinstance(name, str) and name else None


def _lifetime(dialect: DialectName, fields: Fields) -> float:
    if dialect == "gemini":
        return _NAMED if _given_name(dialect, fields) else LIFETIME[dialect]
    retention = fields.get("prompt_cache_retention")
    options = fields.get("prompt_cache_options")
    asked = [
        _RETENTIONS.get(retention) if isinstance(retention, str) else None,
        _seconds(options.get("ttl", "30m")) if isinstance(options, dict) else None,
        *map(_mark, _cacheable(dialect, fields)),
    ]
    return max((seconds for seconds in asked if seconds), default=LIFETIME[dialect])


def _mark(part: object) -> float | None:
    """Seconds for which something is to be cached up to this part."""
    mark = part.get("cache_control") if isinstance(part, dict) else None
    return _seconds(mark.get("ttl", "5m")) if isinstance(mark, dict) else None


def _seconds(told: object) -> float | None:
    match = _DURATION.fullmatch(told) if isinstance(told, str) else None
    return min(float(match[1]) * _UNITS[match[2]], 86_400.0) if match else None


def _cacheable(dialect: DialectName, fields: Fields) -> Iterator[object]:
    """Where cache marks may stand. Marks for longer come first, and the four that are allowed near both ends."""
    conversation = items(dialect, fields)
    yield fields
    tools = fields.get("tools")
    yield from islice(tools, _MOST_VALUES) if isinstance(tools, list) else ()
    yield from islice(system(dialect, fields), _MOST_VALUES)
    for item in chain(conversation[:_LATEST], conversation[-_LATEST:]):
        yield item
        yield from islice(parts(dialect, item), _MOST_VALUES)


class _Digest:
    """Takes what a conversation begins with, so that equal beginnings come out equal however they are spelled."""

    __slots__ = ("_hash", "_left")

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)
        self._left = _MOST_VALUES

    def done(self) -> bytes:
        return self._hash.digest()

    def text(self, text: str) -> _Digest:
        if len(text) > _MOST_TEXT:
            text = f"{len(text)} {text[: _MOST_TEXT // 2]}{text[-_MOST_TEXT // 2 :]}"
        data = text.encode("utf-8", "replace")
        self._hash.update(b"%d:" % len(data))
        self._hash.update(data)
        return self

    def part(self, part: object) -> Generator[None, None, None]:
        """A part of a message. A text is the same alone, in a part, and in a part with a mark for the cache."""
        self._left -= 1
        if self._left < 0:
            return
        if self._left % _PAUSE == 0:
            yield None
        text = part
        if isinstance(part, dict) and part.get("type", "text") in _TEXTS:
            text = part.get("text")
        if not isinstance(text, str):
            yield from self._value(part)
        elif text := _steady(text):
            self.text(text)

    def _value(self, value: object) -> Generator[None, None, None]:
        waiting: list[object] = [value]
        while waiting and self._left >= 0:
            self._left -= 1
            if self._left % _PAUSE == 0:
                yield None
            one = waiting.pop()
            if isinstance(one, str):
                self.text(one)
            elif isinstance(one, dict):
                names = sorted(name for name in islice(one, _MOST_VALUES) if name not in _IGNORED)
                self.text(" ".join(names))
                waiting += [one[name] for name in names]
            elif isinstance(one, list):
                self.text(f"[{len(one)}")
                waiting += one[:_MOST_VALUES]
            else:
                self.text(repr(one))


def _steady(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text
