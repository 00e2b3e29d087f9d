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
from collections.abc import Iterable

import orjson

MAX_VALUE = 64 * 1024
"""Bytes of a value beyond which it is not picked."""

_STRING_BODY = re.compile(rb'(?>[^"\\]+|\\.)*+', re.DOTALL)

# What can be passed over inside of a skipped value without counting brackets: text without any, whole strings, and
# innermost pairs of brackets. Alternatives begin with different bytes and are possessive: no way leads back.
_FLAT = rb'(?:[^"{}\[\]]++|"(?>[^"\\]+|\\.)*+")*+'
_BULK = re.compile(rb'(?:[^"{}\[\]]++|"(?>[^"\\]+|\\.)*+"|[{\[]%b[}\]])*+' % _FLAT, re.DOTALL)
_IN_OBJECT = re.compile(rb'["{}\[\],:]')

_QUOTE, _COMMA, _COLON = b'"', b",", b":"
_OPENING, _CLOSING = b"{[", b"}]"


class Picker:
    """Picks members by name from one JSON text.

    `begun` says that an object at the root has opened, `closed` that the last one has been closed again,
    `dropped` that a wanted value was too long.
    """

    __slots__ = (
        "_awaits_key",
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
        "closed",
        "dropped",
    )

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.encode("ascii") for name in names)
        self._listed = False  # inside an array at the root
        self._open = False  # inside an object at the root
        self._awaits_key = False
        self._key = b""
        self._key_parts: list[bytes] = []
        self._in_string = self._reads_key = self._escaped = False
        self._skip = 0  # depth inside a member's value
        self._parts: list[bytes] | None = None  # the wanted value so far
        self._size = 0  # of that, or of the key that is being read
        self.begun = self.closed = self.dropped = False

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """Takes the next bytes; returns the wanted members that end in them, in order, as (name, JSON text)."""
        picked: list[tuple[str, bytes]] = []
        position, end = 0, len(data)
        kept = 0  # where the wanted value's bytes begin
        while position < end:
            if self._in_string:
                position = self._string(data, position)
                continue
            if self._skip:
                position = _BULK.match(data, position).end()  # type: ignore[union-attr]  # an empty match is one, too
                if position == end:
                    break
            else:
                match = _IN_OBJECT.search(data, position)
                if match is None:
                    break
                position = match.start()
            token = data[position : position + 1]
            if self._parts is not None and not self._skip and token in (_COMMA, b"}"):
                self._keep(data[kept:position])
                self._end_value(picked)
            position += 1
            if token == _QUOTE:
                self._in_string = True
                if self._awaits_key and not self._skip:
                    self._reads_key, self._size = True, 0
            elif self._structure(token):
                kept = position
        if self._parts is not None:
            self._keep(data[kept:])
        return picked

    def _string(self, data: bytes, position: int) -> int:
        """Runs to the end of the string, or of the data. Returns the position behind it."""
        start = position
        if self._escaped:
            self._escaped = False
            position += 1
        position = _STRING_BODY.match(data, position).end()  # type: ignore[union-attr]  # an empty match is one, too
        if self._reads_key and self._size <= MAX_VALUE:  # no wanted name is longer
            self._key_parts.append(data[start:position])
            self._size += position - start
        if position == len(data):
            return position
        if data[position : position + 1] == _QUOTE:
            self._in_string = False
            if self._reads_key:
                self._key, self._reads_key = _decoded(b"".join(self._key_parts)), False
                self._key_parts.clear()
            return position + 1
        self._escaped = True  # a back-slash is the last byte
        if self._reads_key:
            self._key_parts.append(b"\\")
        return len(data)

    def _structure(self, token: bytes) -> bool:
        """Takes a bracket, comma or colon. Returns whether a wanted value begins behind it."""
        if self._skip:
            self._skip += 1 if token in _OPENING else -1
        elif not self._open:
            if token == b"{":
                self._open = self._awaits_key = self.begun = True
                self.closed = False
            elif token == b"[" and self._listed:
                self._skip = 1  # an element that is no object
            elif token in b"[]":
                self._listed = token == b"["
        elif token == _COLON:
            self._awaits_key = False
            if self._key in self._names:
                self._parts, self._size = [], 0
                return True
        elif token == _COMMA:
            self._awaits_key = True
        elif token in _OPENING:
            self._skip = 1
        elif token == b"}":
            self._open, self._awaits_key, self.closed = False, False, True
        return False

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_VALUE:
            self.dropped = True
            self._parts = []
        elif self._parts is not None:
            self._parts.append(piece)

    def _end_value(self, picked: list[tuple[str, bytes]]) -> None:
        assert self._parts is not None
        if self._size <= MAX_VALUE:
            picked.append((self._key.decode("ascii"), b"".join(self._parts).strip(b" \t\r\n")))
        self._parts = None


def _decoded(key: bytes) -> bytes:
    if b"\\" not in key:
        return key
    try:
        decoded: str = orjson.loads(b'"%b"' % key)
    except orjson.JSONDecodeError:
        return key
    return decoded.encode("utf-8", "surrogatepass")
