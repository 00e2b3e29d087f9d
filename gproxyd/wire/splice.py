"""The model's name replaced in JSON text, every other byte kept.

A *place* is a path of member names from the root, such as `("message", "model")`; the elements of an array at the
root count as roots (Gemini streams such an array). Only string values are replaced, only at those places, and however
the bytes are cut. What is not JSON passes unchanged.

`Splicer` is the exact machine: it follows strings, escapes and nesting, and works across cuts. In front of it stand
short cuts for whole texts, each with its proof beside it; where a proof fails, the machine decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

import orjson

Place = tuple[bytes, ...]

_IN_OBJECT = re.compile(rb'["{}\[\],:]')
_IN_VALUE = re.compile(rb'["{}\[\]]')
# Possessive (`*+`), so that a long string costs no memory for backtracking.
_STRING_BODY = re.compile(rb'(?>[^"\\]+|\\.)*+', re.DOTALL)


# Behind a member's name: its string value, then one closing brace and no other bracket up to the end.
_LAST_MEMBER = re.compile(rb'\s*:\s*("[^"\\]*")[^{}\[\]]*\}\s*\Z')


class _Role(Enum):
    KEY = 1
    PLACE = 2
    OTHER = 3


def quoted(name: str) -> bytes:
    """A name as a JSON string."""
    return orjson.dumps(name)


class Splicer:
    """Replaces the string at each place by `value` (a JSON text), incrementally.

    `hits` counts how often a place's member was met, whatever its value: more than one per root means that two
    readers of this text could see two different models.
    """

    __slots__ = (
        "_awaits_key",
        "_depth",
        "_escaped",
        "_key",
        "_key_parts",
        "_path",
        "_places",
        "_role",
        "_skip",
        "_value",
        "hits",
    )

    def __init__(self, places: Sequence[Place], value: bytes) -> None:
        self._places = frozenset(places)
        self._value = value
        self._path: list[bytes] = []  # members that lead to the open, watched object
        self._depth = 0  # watched objects that are open
        self._skip = 0  # depth inside a value that holds no place
        self._awaits_key = False
        self._key = b""
        self._key_parts: list[bytes] = []
        self._role: _Role | None = None  # set inside a string
        self._escaped = False  # the cut fell behind a back-slash
        self.hits = 0

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes, returns those that go on. Nothing is held back."""
        out: list[bytes] = []
        position = kept = 0
        end = len(data)
        while position < end:
            if self._role is not None:
                position, kept = self._string(data, position, kept)
                continue
            match = (_IN_VALUE if self._skip else _IN_OBJECT).search(data, position)
            if match is None:
                break
            position = match.end()
            token = match.group()
            if token == b'"':
                if self._open_string() is _Role.PLACE:
                    out += (data[kept : position - 1], self._value)
                    kept = end
            elif self._skip:
                self._skip += 1 if token in b"{[" else -1
            else:
                self._structure(token)
        if not out:
            return data[kept:]
        out.append(data[kept:])
        return b"".join(out)

    def _string(self, data: bytes, position: int, kept: int) -> tuple[int, int]:
        """Runs to the end of the string, or of the data. Returns the position behind it and where kept bytes begin."""
        start = position
        if self._escaped:
            self._escaped = False
            position += 1
        match = _STRING_BODY.match(data, position)
        assert match is not None  # an empty match is one, too
        position = match.end()
        if self._role is _Role.KEY:
            self._key_parts.append(data[start:position])
        if position < len(data) and data[position] == 0x22:
            if self._role is _Role.PLACE:
                kept = position + 1
            elif self._role is _Role.KEY:
                self._key = _decoded(b"".join(self._key_parts))
            self._role = None
            return position + 1, kept
        if position < len(data):  # a back-slash is the last byte
            self._escaped = True
            if self._role is _Role.KEY:
                self._key_parts.append(b"\\")
        if self._role is _Role.PLACE:
            kept = len(data)
        return len(data), kept

    def _open_string(self) -> _Role:
        if self._skip or not self._depth:
            self._role = _Role.OTHER
        elif self._awaits_key:
            self._key_parts.clear()
            self._role = _Role.KEY
        else:
            self._role = _Role.PLACE if (*self._path, self._key) in self._places else _Role.OTHER
        return self._role

    def _structure(self, token: bytes) -> None:
        if token == b"{":
            self._open_object()
        elif token == b"[":
            if self._depth:  # at the root an array is looked into, elsewhere it is skipped
                self._skip = 1
        elif token == b"}":
            if self._depth:
                self._depth -= 1
                if self._path:
                    self._path.pop()
            self._awaits_key = False
        elif token == b",":
            self._awaits_key = self._depth > 0
        elif token == b":" and self._depth:
            self._awaits_key = False
            if (*self._path, self._key) in self._places:
                self.hits += 1

    def _open_object(self) -> None:
        if not self._depth:
            self._depth, self._awaits_key = 1, True
            return
        inner = (*self._path, self._key)
        if any(place[: len(inner)] == inner for place in self._places if len(place) > len(inner)):
            self._path.append(self._key)
            self._depth += 1
            self._awaits_key = True
        else:
            self._skip = 1


def _decoded(key: bytes) -> bytes:
    if b"\\" not in key:
        return key
    try:
        decoded: str = orjson.loads(b'"%b"' % key)
    except orjson.JSONDecodeError:
        return key
    return decoded.encode("utf-8")


class TextSplicer:
    """Replaces the string at each place in whole JSON texts, such as the `data` of one event after another.

    Short cut 1: a text without the last member of any place, in its plain or an escaped spelling, has no place.
    Short cut 2 (places of one member): a text that begins like the one before, up to and including the replaced
    value, and has no second mention, is replaced like the one before. Events of a stream repeat their beginning.
    Short cut 3 (places of one member): the only mention is a member, and behind its value just one `}` and no other
    bracket follows. A member at depth d has d closing brackets behind it, so d is 1. Gemini's events end so.
    """

    __slots__ = ("_after", "_before", "_flat", "_mention", "_places", "_value")

    def __init__(self, places: Sequence[Place], value: bytes) -> None:
        self._places = tuple(places)
        self._value = value
        self._mention = _mention(self._places)
        self._flat = all(len(place) == 1 for place in places)
        self._before = b"\0"  # cannot begin a JSON text
        self._after = b""

    def mentioned(self, text: bytes) -> bool:
        """Whether a place could be in it at all."""
        return self._mention.search(text) is not None

    def splice(self, text: bytes) -> bytes:
        """The text with the value at its places."""
        if text.startswith(self._before) and self._mention.search(text, len(self._before)) is None:
            return self._after + text[len(self._before) :]
        mention = self._mention.search(text)
        if mention is None:
            return text
        if self._flat and (last := _LAST_MEMBER.match(text, mention.end())) is not None:
            start, end = last.span(1)
            plain = mention.group()[:1] == b'"' and text[mention.start() - 1 : mention.start()] != b"\\"
            if plain and self._mention.search(text, end) is None:
                return text[:start] + self._value + text[end:]
        out = Splicer(self._places, self._value).feed(text)
        if self._flat:
            self._remember(text, out, mention.end())
        return out

    def _remember(self, text: bytes, out: bytes, mentioned: int) -> None:
        """Keeps the replaced beginning, where the text's one mention is a plain member whose value was replaced."""
        head = text.find(b'"', mentioned)
        tail = text.find(b'"', head + 1)
        if head < 0 or tail < 0 or self._mention.search(text, tail + 1):
            return
        before, after = text[: tail + 1], text[:head] + self._value
        if out == after + text[tail + 1 :]:
            self._before, self._after = before, after


def _mention(places: Sequence[Place]) -> re.Pattern[bytes]:
    """Matches wherever the last member of a place could stand, however it is spelled.

    A spelling with escapes needs `\\u00` and the high digit of one of the member's letters.
    """
    words = {place[-1] for place in places}
    digits = {b"%x" % (letter >> 4) for word in words for letter in word}
    plain = b"|".join(re.escape(word) for word in sorted(words))
    return re.compile(b'"(?:%b)"|\\\\u00[%b]' % (plain, b"".join(sorted(digits))))


_REQUEST_PLACE: tuple[Place, ...] = ((b"model",),)
_REQUEST_MEMBER = re.compile(rb'"model"\s*:\s*"([^"\\]*)"')


def count_models(body: bytes) -> int:
    """How many top-level `model` members a JSON object has, in any spelling."""
    if b"\\u006" not in body and (plain := body.count(b'"model"')) < 2:
        return plain  # no more than one mention, and the caller's parser found one member or none
    splicer = Splicer(_REQUEST_PLACE, b"")
    splicer.feed(body)
    return splicer.hits


def replace_model(body: bytes, name: str) -> bytes:
    """A JSON object with another top-level `model`; it must have exactly one, and a string.

    Short cut: where the word is mentioned once and the parser found the member, that mention is the member.
    """
    if b"\\u006" not in body and body.count(b'"model"') == 1:
        match = _REQUEST_MEMBER.search(body)
        if match is not None:
            return body[: match.start(1) - 1] + quoted(name) + body[match.end(1) + 1 :]
    return Splicer(_REQUEST_PLACE, quoted(name)).feed(body)
