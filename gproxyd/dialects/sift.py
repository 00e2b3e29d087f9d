"""A long request's members as routing reads them: what is short is parsed, of what is long only its outline is made.

Invariants
- Readers find what a parser would have given them, but for stand-ins: a long text is a `Long`, which tells its length
  and gives out what is asked for; what nobody reads that closely is `Unread`.
- The time of a step, the values that are kept and the depth to which long ones are looked into are bounded. Beyond
  MOST_VALUES of them, of an item only its short members are read.
- What is sent is never written from a stand-in, but from where its text stands in the body.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gproxyd.dialects.turns import SHAPES
from gproxyd.errors import Refusal
from gproxyd.types import DialectName
from gproxyd.wire import outline, spans
from gproxyd.wire.pick import MAX_VALUE
from gproxyd.wire.spans import Member, Span

WHOLE = 32 * 1024
"""Bytes of a value up to which it is parsed at once."""

MOST_VALUES: Final = 100_000
"""Values that are kept of a request: to give back as many takes some milliseconds."""

MOST_ITEMS: Final = 50_000
"""Items of a conversation, beyond which it is refused: to give back as many takes some milliseconds, too."""

_DEPTH = 6  # levels of long values below an item or another member
_LIGHT = 1024  # bytes of the members that are read of an item if no more values may be kept
_MOST_LIGHT = 16  # such members
_MOST_MEMBERS = 10_000  # of one long object
_CHUNK = 32 * 1024

NAMES: Final = frozenset(outline.FIELDS).union(
    (name for shape in SHAPES.values() for name in (shape.items, *shape.system, *shape.beside)),
    ("modalities", "reasoning", "reasoning_effort", "thinking", "tool_choice", "web_search_options"),  # what it needs
    ("cache_control", "cachedContent", "cached_content"),  # which conversation it is
    ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    ("container", "conversation", "input_file_id"),  # what lives with one vendor
)
"""The members that anybody here reads or writes."""


class Unread:
    """A value that nobody has looked into. `size` in bytes."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class Long(str):
    """A long text that is read from the body when it is asked for. As a plain `str` it is its beginning only.

    `size` in bytes, as it stands in the body.
    """

    _body: bytes
    _ends: list[int]
    _chars: list[int]
    _from: int
    size: int

    def __new__(cls, body: bytes, ends: list[int], chars: list[int], start: int = 0) -> Long:
        """`ends` are positions in the body at which its text can be cut, first and last included; `chars` as many
        characters are in front of each."""
        made = str.__new__(cls, _text(body, ends[0], ends[1]))
        made._body, made._ends, made._chars, made._from = body, ends, chars, start
        made.size = ends[-1] - ends[0]
        return made

    def __len__(self) -> int:
        return self._chars[-1] - self._from

    def __getitem__(self, place: Any) -> str:
        start, end, step = (slice(place, place + 1 or None) if isinstance(place, int) else place).indices(len(self))
        assert step == 1
        start, end = start + self._from, max(start, end) + self._from
        first = bisect_right(self._chars, start) - 1
        read: list[str] = []
        for n in range(first, len(self._ends) - 1):
            if self._chars[n] >= end:
                break
            read.append(_text(self._body, self._ends[n], self._ends[n + 1]))
        return "".join(read)[start - self._chars[first] : end - self._chars[first]]

    def partition(self, word: str) -> tuple[str, str, str]:
        """Only for words of the text's beginning."""
        head, found, _ = self[: self._chars[1]].partition(word)
        rest = Long(self._body, self._ends, self._chars, self._from + len(head) + len(word)) if found else ""
        return head if found else self, found, rest

    def startswith(self, word: Any, *_: Any) -> bool:
        return self[:_LIGHT].startswith(word)

    def isascii(self) -> bool:
        return self[:].isascii()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self[:].encode(encoding, errors)


@dataclass(slots=True)
class Sifted:
    """`fields` are the members that anybody reads, `members` where each of them stands, as often as it is there, and
    `places` where the items of the conversation do, if they are a list. `empty` says that there is no member at all."""

    fields: dict[str, Any]
    members: dict[str, list[Member]]
    places: list[Span]
    empty: bool


def sift(dialect: DialectName, body: bytes) -> Generator[None, None, Sifted]:
    """Reads a JSON object. Raises Refusal (400)."""
    try:
        return (yield from _Sieve(body).sifted(SHAPES[dialect].items))
    except ValueError:
        raise Refusal("invalid_request", "the request's body is not valid JSON") from None


class _Sieve:
    __slots__ = ("_body", "_left")

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._left = MOST_VALUES

    def sifted(self, items: str) -> Generator[None, None, Sifted]:
        body = self._body
        start, end = yield from spans.root(body)
        members = yield from spans.named(body, start, end, NAMES)
        first = yield from spans.past_blanks(body, start + 1, end)
        found = Sifted({}, members, [], body[first] == _CLOSED)
        for name, places in members.items():
            last = places[-1]
            if name == items and body[last.start] == _BRACKET:
                found.fields[name] = yield from self._items(last, found.places)
            elif last.end - last.start <= MAX_VALUE:
                found.fields[name] = orjson.loads(body[last.start : last.end])
                yield None
            else:
                found.fields[name] = yield from self._value(last.start, last.end, _DEPTH)
        return found

    def _items(self, member: Member, places: list[Span]) -> Generator[None, None, list[Any]]:
        items: list[Any] = []
        for span in spans.elements(self._body, member.start, member.end):
            if span is None:
                yield None
                continue
            if len(items) == MOST_ITEMS:
                raise Refusal("invalid_request", f"a conversation of more than {MOST_ITEMS} items is too long")
            places.append(span)
            items.append((yield from self._value(*span, _DEPTH)) if self._left > 0 else (yield from self._light(*span)))
        return items

    def _value(self, start: int, end: int, depth: int) -> Generator[None, None, Any]:
        body = self._body
        if end - start <= WHOLE:
            value = orjson.loads(body[start:end])
            self._left -= _count(value)
            return value
        if body[start] == _QUOTE:
            return (yield from _long(body, start + 1, end - 1))
        if not depth or body[start] not in (_BRACE, _BRACKET):
            return Unread(end - start)
        return (yield from (self._object if body[start] == _BRACE else self._list)(start, end, depth - 1))

    def _object(self, start: int, end: int, depth: int) -> Generator[None, None, dict[str, Any]]:
        found: dict[str, Any] = {}
        for member in spans.members(self._body, start, end):
            if member is None:
                yield None
            elif self._left <= 0 or len(found) == _MOST_MEMBERS:
                break
            else:
                found[member.name] = yield from self._value(member.start, member.end, depth)
        return found

    def _list(self, start: int, end: int, depth: int) -> Generator[None, None, list[Any]]:
        found: list[Any] = []
        for span in spans.elements(self._body, start, end):
            if span is None:
                yield None
            elif self._left <= 0:
                found.append(Unread(end - span[0]))
                break
            else:
                found.append((yield from self._value(*span, depth)))
        return found

    def _light(self, start: int, end: int) -> Generator[None, None, Any]:
        """An item's short members."""
        body = self._body
        if body[start] != _BRACE:
            return Unread(end - start)
        found: dict[str, Any] = {}
        for member in spans.members(body, start, end):
            if member is None:
                yield None
            elif len(found) < _MOST_LIGHT:
                size = member.end - member.start
                short = size <= _LIGHT and body[member.start] not in (_BRACE, _BRACKET)
                found[member.name] = orjson.loads(body[member.start : member.end]) if short else Unread(size)
        return found


_QUOTE, _BRACE, _BRACKET, _CLOSED = b'"{[}'


def _count(value: object) -> int:
    """How many values it is."""
    count, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        count += 1
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return count


def _long(body: bytes, start: int, end: int) -> Generator[None, None, Long]:
    """The long text of a string."""
    ends, chars = [start], [0]
    while ends[-1] < end:
        begin = ends[-1]
        stop = spans.cut(body, begin, min(begin + _CHUNK, end), end)
        chars.append(chars[-1] + len(_text(body, begin, stop)))
        ends.append(stop)
        if len(ends) % 8 == 0:
            yield None
    return Long(body, ends, chars)


def _text(body: bytes, start: int, end: int) -> str:
    """Raises ValueError."""
    piece = body[start:end]
    if b"\\" not in piece and piece.isascii():
        return piece.decode("ascii")
    text: str = orjson.loads(b'"%b"' % piece)
    return text
