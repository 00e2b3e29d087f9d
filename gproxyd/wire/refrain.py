"""Events that go like one before them.

Most events of a stream differ in nothing but their strings and numbers. A *refrain* knows how one of them goes and
matches a whole chunk (RFC 9112 section 7.1) that bears one whole event like it, in one step.

Invariants
- Two events of one refrain are the same but for the strings and numbers that are values: the same members, nesting,
  literals and lines. A string's plain quotes end it, so no value can pass for a member: what was found out about the
  members of one event holds for all of them.
- The values of `type` and `object` belong to the refrain, for they say what an event is.
- An event is not learned for itself: only one whose like has come before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import orjson

from gproxyd.wire.splice import Place, Splicer

MOST = 8
"""Refrains of one kind of stream that are known."""

MOST_TRIES = 256
"""Events that are looked at for the sake of their refrain: who never repeats himself is not listened to for ever."""

MAX_EVENT = 1024
"""Bytes of an event beyond which its refrain is not learned."""

MOST_VALUES = 24
"""Strings and numbers of an event beyond which it is not: each takes 0.2 ms to learn, in which nothing else happens."""

_ONE_EVENT = re.compile(rb"([0-9a-fA-F]{1,7})\r\n((?>(?:(?!data:)[^\r\n]++\n)*)data:)([^\r\n]++)\n\n\r\n")
# What JSON consists of: a member whose value belongs to the refrain, another string, perhaps a member's name, a number.
_TOKEN = re.compile(
    rb'("(?:type|object)"\s*+:\s*+"[^"\\]*+")|("[^"\\]*+(?>(?:\\.[^"\\]*+)*)")(\s*+:)?|(-?[0-9][0-9.eE+\-]*+)',
    re.DOTALL,
)
_STRING = rb'"[^"\\\r\n]*+(?>(?:\\[^\r\n][^"\\\r\n]*+)*)"'
_NUMBER = rb"-?[0-9][0-9.eE+\-]*+"
_SIZE = rb"([0-9a-fA-F]{1,7})\r\n"


Refrain = re.Pattern[bytes]
"""Matches a whole chunk. Its groups are the chunk's size, what stands before the string at a place and what behind it,
both empty for an event without one; the last has the chunk's end."""


class Refrains:
    """The refrains of one kind of stream, whose strings at `places` may be replaced."""

    __slots__ = ("_heard", "_known", "_places", "_tries")

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._known: list[Refrain] = []
        self._heard: set[bytes] = set()
        self._tries = MOST_TRIES

    def find(self, data: bytes, start: int) -> Refrain | None:
        """What matches the chunk that begins there, if it bears an event that goes like one before it."""
        for refrain in self._known:
            if refrain.match(data, start) is not None:
                return refrain
        return None

    def hear(self, data: bytes, start: int, tells: Callable[[bytes], bool]) -> None:
        """Another event has come: how it goes is learned, unless it is the first that goes so, or `tells` of something
        that is to be read in every one of them."""
        if not self._tries or len(self._known) >= MOST:
            return
        self._tries -= 1
        found = _ONE_EVENT.match(data, start)
        if found is None or len(found[0]) > MAX_EVENT or tells(found[0]):
            return
        pattern = _pattern(found[2], found[3], self._places)
        if pattern is None:
            return
        if pattern not in self._heard:
            self._heard.add(pattern)
            return
        self._heard.discard(pattern)
        self._known.append(re.compile(pattern))


def _pattern(lines: bytes, text: bytes, places: Sequence[Place]) -> bytes | None:
    """The pattern of an event: its `lines` up to `data:`, and its data. None if that is no JSON, or too much of it, or
    has two places."""
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    splicer = Splicer(places, b"")
    splicer.feed(text)
    if splicer.hits > 1 or splicer.hits != len(splicer.spans):
        return None
    at = next(iter(splicer.spans.values()), (-1, -1))[0]
    parts = [_SIZE, b"(" if at >= 0 else b"()()", re.escape(lines)]
    kept = values = 0
    for token in _TOKEN.finditer(text):
        whole, string, colon = token.group(1, 2, 3)
        if whole is not None or colon is not None:
            continue
        parts.append(re.escape(text[kept : token.start()]))
        kept = token.end()
        values += 1
        value = _STRING if string is not None else _NUMBER
        parts.append(b")" + value + b"(" if token.start() == at else value)
    if values > MOST_VALUES:
        return None
    parts += (re.escape(text[kept:]), rb"\n\n\r\n", b")" if at >= 0 else b"")
    return b"".join(parts)
