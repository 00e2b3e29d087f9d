"""The values of a few top-level members out of a JSON text of any length, as it comes.

Invariants
- Memory is bounded: of values that were not asked for nothing is kept, of those that were at most MAX_VALUE bytes.
- Time is linear in the bytes: their bulk passes in compiled expressions, and none of these can backtrack.
- However the text is cut, what is picked is the same.

The elements of an array at the root count as roots, as for `splice`. What is not JSON picks nothing, or nonsense:
the values must be parsed by whoever wants to know.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

import orjson

MAX_VALUE = 64 * 1024
"""Bytes of a value beyond which it is not picked."""

MAX_DEPTH = 1024
"""Open brackets that a text may have, its root's included, as with the parser."""

# A string's text up to a quote (or the end of the data) that cannot be told to be escaped. Plain searches for one byte
# are many times faster than steps from escape to escape, so a quote is judged by what stands in front of it: behind one
# or three back-slashes it belongs to the text, behind none or two it is the string's end. Who meets more of them, or
# does not see what they follow, takes the exact expression.
TEXT = rb'[^"]*+(?>(?:(?>(?:(?<=[^\\]\\)"[^"]*+)+)|(?<=[^\\]\\\\\\)"[^"]*+)*)'
LAST = rb'(?:(?<!\\)|(?<=[^\\]\\\\))"'
_STRING_TEXT = re.compile(TEXT)
_STRING_EXACT = re.compile(rb'(?>(?:[^"\\]++|\\.)*)', re.DOTALL)

# What can be passed over inside of a skipped value without counting brackets: text without any, whole strings, and
# brackets that are closed again, nested in at most so many levels. Alternatives begin with different bytes and are
# possessive: no way leads back. What is not closed before the data's end is read again on every level, so more levels
# would cost more than they save; three are those of a message's parts.
_LEVELS = 3
_PLAIN = rb'[^"{}\[\]]++|"%b%b' % (TEXT, LAST)


def nested(levels: int) -> bytes:
    """The expression of what stands between brackets, with so many more levels of them inside."""
    if not levels:
        return b"(?>(?:%b)*)" % _PLAIN
    return rb"(?>(?:%b|[{\[]%b[}\]])*)" % (_PLAIN, nested(levels - 1))


BULK, _FLAT = re.compile(nested(_LEVELS)), re.compile(nested(0))
_IN_OBJECT = re.compile(rb'["{}\[\],:]')

_QUOTE, _COMMA, _COLON = b'"', b",", b":"
_BACKSLASH = 0x5C
_OPENING = b"{["


class Picker:
    """Picks members by name from one JSON text.

    `begun` says that an object at the root has opened, `closed` that the last one has been closed again,
    `dropped` that a wanted value was too long. For all wanted names together: `counts` says how often each was met,
    `spans` where the last value of each stood, with the blanks around it, counted from the first byte of the text.
    Of the text's shape, as far as brackets tell: `members` whether an object at the root had any, `end` the position
    behind the first root, `deep` that there were more brackets open than MAX_DEPTH, `broken` that an object at the root
    had a bracket or a colon where none may stand. `picked` holds what `advance` has found.
    """

    __slots__ = (
        "_awaits_key",
        "_base",
        "_begin",
        "_escaped",
        "_in_string",
        "_key",
        "_key_parts",
        "_listed",
        "_names",
        "_open",
        "_parts",
        "_reads_key",
        "_size",
        "_skip",
        "begun",
        "broken",
        "closed",
        "counts",
        "deep",
        "dropped",
        "end",
        "members",
        "picked",
        "spans",
    )

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name.encode("ascii"): name for name in names}
        self._listed = False  # inside an array at the root
        self._open = False  # inside an object at the root
        self._awaits_key = False
        self._key = b""
        self._key_parts: list[bytes] = []
        self._in_string = self._reads_key = self._escaped = False
        self._skip = 0  # depth inside a member's value
        self._parts: list[bytes] | None = None  # the wanted value so far
        self._size = 0  # of that, or of the key that is being read
        self._base = 0  # bytes fed before
        self._begin = 0  # where the wanted value began
        self.begun = self.closed = self.dropped = False
        self.members = self.deep = self.broken = False
        self.end: int | None = None
        self.counts: dict[str, int] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        self.picked: list[tuple[str, bytes]] = []

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """Takes the next bytes; returns the wanted members that end in them, in order, as (name, JSON text)."""
        self.advance(data, 0, len(data))
        self._base += len(data)
        picked, self.picked = self.picked, []
        return picked

    def advance(self, data: bytes, position: int, end: int, tokens: int = sys.maxsize) -> int:
        """Goes on through a text that is all here, from where it stopped last to `end`. Returns where it stops.

        That is earlier behind so many `tokens`: quotes that open strings, brackets, commas and colons that had to be
        looked at one by one, of which each takes as long as a thousand bytes of a string. Not for a text that is fed.
        """
        kept = position  # where the wanted value's bytes begin
        while position < end and tokens:
            if self._in_string:
                position = self._string(data, position, end)
                continue
            if self._skip:
                bulk = BULK if self._skip < MAX_DEPTH - _LEVELS else _FLAT  # none of its brackets is too deep
                position = bulk.match(data, position, end).end()  # type: ignore[union-attr]  # it may be empty
                if position == end:
                    break
            else:
                match = _IN_OBJECT.search(data, position, end)
                if match is None:
                    position = end
                    break
                position = match.start()
            tokens -= 1
            token = data[position : position + 1]
            if self._parts is not None and not self._skip and token in (_COMMA, b"}"):
                self._keep(data[kept:position])
                self._end_value(position)
            position += 1
            if token == _QUOTE:
                self._in_string = True
                if self._awaits_key and not self._skip:
                    self._reads_key, self._size = True, 0
            elif self._structure(token, position):
                kept = position
        if self._parts is not None:
            self._keep(data[kept:position])
        return position

    def _string(self, data: bytes, position: int, end: int) -> int:
        """Runs to the end of the string, or of the data. Returns the position behind it."""
        start = position
        if self._escaped:
            self._escaped = False
            position += 1
        position = text_end(data, position, end)
        if self._reads_key and self._size <= MAX_VALUE:  # no wanted name is longer
            self._key_parts.append(data[start:position])
            self._size += position - start
        if position == end:
            return position
        if data[position] != _BACKSLASH:
            self._in_string = False
            if self._reads_key:
                self._key, self._reads_key = _decoded(b"".join(self._key_parts)), False
                self._key_parts.clear()
            return position + 1
        self._escaped = True  # a back-slash is the last byte
        if self._reads_key:
            self._key_parts.append(b"\\")
        return end

    def _structure(self, token: bytes, position: int) -> bool:
        """Takes a bracket, comma or colon, and the position behind. Returns whether a wanted value begins there."""
        if self._skip:
            self._skip += 1 if token in _OPENING else -1
            if self._skip >= MAX_DEPTH:  # the root is one more
                self.deep = True
        elif not self._open:
            if token == b"{":
                self._open = self._awaits_key = self.begun = True
                self.closed = False
            elif token == b"[" and self._listed:
                self._skip = 1  # an element that is no object
            elif token in b"[]":
                self._listed = token == b"["
        elif token == _COLON:
            self.broken = self.broken or not self._awaits_key
            self._awaits_key, self.members = False, True
            name = self._names.get(self._key)
            if name is not None:
                self.counts[name] = self.counts.get(name, 0) + 1
                self._parts, self._size, self._begin = [], 0, self._base + position
                return True
        elif token == _COMMA:
            self._awaits_key = True
        elif token in _OPENING:
            self._skip = 1
        elif token == b"}":
            self._open, self._awaits_key, self.closed = False, False, True
            if self.end is None:
                self.end = self._base + position
        else:
            self.broken = True
        return False

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_VALUE:
            self.dropped = True
            self._parts = []
        elif self._parts is not None:
            self._parts.append(piece)

    def _end_value(self, position: int) -> None:
        assert self._parts is not None
        name = self._names[self._key]
        self.spans[name] = (self._begin, self._base + position)
        if self._size <= MAX_VALUE:
            self.picked.append((name, b"".join(self._parts).strip(b" \t\r\n")))
        self._parts = None


def text_end(data: bytes, start: int, end: int) -> int:
    """Where a string's text ends that goes on at `start`: at its quote, at `end`, or at a back-slash just before."""
    position: int = _STRING_TEXT.match(data, start, end).end()  # type: ignore[union-attr]  # an empty match is one, too
    if position == start or data[position - 1] != _BACKSLASH:
        return position
    exact: int = _STRING_EXACT.match(data, start, end).end()  # type: ignore[union-attr]
    return exact


def _decoded(key: bytes) -> bytes:
    if b"\\" not in key:
        return key
    try:
        decoded: str = orjson.loads(b'"%b"' % key)
    except orjson.JSONDecodeError:
        return key
    return decoded.encode("utf-8", "surrogatepass")
