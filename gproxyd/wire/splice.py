"""The model's name replaced in JSON text, every other byte kept.

A *place* is a path of member names from the root, such as `("message", "model")`; the elements of an array at the
root count as roots (Gemini streams such an array). Only string values are replaced, only at those places, and however
the bytes are cut. What is not JSON passes unchanged.

`Splicer` is the exact machine: it follows strings, escapes and nesting, and works across cuts. In front of it stand
short cuts for whole texts, each with its proof beside it; where a proof fails, the machine decides.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from enum import Enum

import orjson

from gproxyd.wire import spans
from gproxyd.wire.pick import BULK
from gproxyd.wire.pieces import Pieces

Place = tuple[bytes, ...]

_IN_OBJECT = re.compile(rb'["{}\[\],:]')
# Possessive (`*+`), so that a long string costs no memory for backtracking.
_STRING_BODY = re.compile(rb'(?>(?:[^"\\]++|\\.)*)', re.DOTALL)


_BACKSLASH = 0x5C

# Behind a member's name: its string value.
_MEMBER = re.compile(rb'\s*:\s*("[^"\\]*")')
# Up to the end one closing brace and no other bracket.
_TO_THE_END = re.compile(rb"[^{}\[\]]*\}\s*\Z")


class _Role(Enum):
    KEY = 1
    PLACE = 2
    OTHER = 3


def quoted(name: str) -> bytes:
    """A name as a JSON string."""
    return b"%b" % orjson.dumps(name)  # a copy: what orjson (3.13) returns takes 4 KiB for as long as it is kept


class Splicer:
    """Replaces the string at each place by `value` (a JSON text), incrementally.

    `hits` counts how often a place's member was met, whatever its value: more than one per root means that two
    readers of this text could see two different models; `counts` tells them apart by place, `spans` says where the
    last string at a place stood, counted from the first byte fed. Of the text's shape, as far as brackets tell:
    `members` whether an object had any, `end` where the first root ended,
    `broken` that a bracket closed what it did not open.
    """

    __slots__ = (
        "_awaits_key",
        "_base",
        "_begun",
        "_depth",
        "_escaped",
        "_key",
        "_key_parts",
        "_opened",
        "_path",
        "_places",
        "_role",
        "_skip",
        "_value",
        "broken",
        "counts",
        "end",
        "members",
        "spans",
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
        self._base = 0  # bytes fed before
        self._opened = 0
        self._begun = False
        self.broken = False
        self.end: int | None = None
        self.members = False
        self.counts: dict[Place, int] = {}
        self.spans: dict[Place, tuple[int, int]] = {}

    @property
    def hits(self) -> int:
        return sum(self.counts.values())

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes, returns those that go on. Nothing is held back."""
        out: list[bytes] = []
        position = kept = 0
        end = len(data)
        while position < end:
            if self._role is not None:
                position, kept = self._string(data, position, kept)
                continue
            if self._skip:
                position = BULK.match(data, position).end()  # type: ignore[union-attr]  # it may be empty
                if position == end:
                    break
                token = data[position : position + 1]
                position += 1
            else:
                match = _IN_OBJECT.search(data, position)
                if match is None:
                    break
                position = match.end()
                token = match.group()
            if token == b'"':
                if self._open_string() is _Role.PLACE:
                    out += (data[kept : position - 1], self._value)
                    self._opened = self._base + position - 1
                    kept = end
            elif not self._skip:
                self._structure(token)
                if not self._depth and self._begun and self.end is None:
                    self.end = self._base + position
            elif token in b"{[":
                self._skip += 1
            else:
                self._skip -= 1
        self._base += end
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
                self.spans[*self._path, self._key] = (self._opened, self._base + kept)
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
            self.members = True
            if (place := (*self._path, self._key)) in self._places:
                self.counts[place] = self.counts.get(place, 0) + 1
                self.spans.pop(place, None)
        elif token == b"]" and self._depth:
            self.broken = True

    def _open_object(self) -> None:
        if not self._depth:
            self._depth, self._awaits_key, self._begun = 1, True, True
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

    All places must end in the same member; a *mention* is that member's name, however it is spelled.

    Short cut 1: a text without a mention has no place.
    Short cut 2: a text that begins like an earlier one, up to and including the value replaced at depth 1, and has no
    second mention, is replaced like it. Events of a stream repeat their beginning.
    Short cut 3: the only mention is a member, and in front of it stands just one `{` and no `[`, or behind its value
    just one `}` and no other bracket. A member at depth d has d opening brackets in front of it and d closing ones
    behind, so d is 1. OpenAI's replies begin so, Gemini's events end so.
    """

    __slots__ = ("_after", "_before", "_flat", "_length", "_places", "_value", "_word")

    def __init__(self, places: Sequence[Place], value: bytes) -> None:
        (member,) = {place[-1] for place in places}
        self._places = places
        self._flat = (member,) in places
        self._word = b'"%b"' % member
        self._value = value
        self._before = b"\0"  # cannot begin a JSON text
        self._length = 1
        self._after = b""

    def mentioned(self, text: bytes, start: int = 0) -> bool:
        """Whether a place could be in the text, or in its rest. A member spelled with escapes needs a `\\u00`."""
        return text.find(self._word, start) >= 0 or text.find(b"\\u00", start) >= 0

    def splice(self, text: bytes, begin: int = 0) -> bytes:
        """The text, which begins at `begin`, with the value at its places; what stands before it stays."""
        if text.startswith(self._before):
            start = self._length
            if text.find(self._word, start) < 0 and text.find(b"\\u00", start) < 0:
                return self._after + text[start:]
        if not self.mentioned(text, begin):
            return text
        found = self._only_member(text, begin)
        return found or text[:begin] + Splicer(self._places, self._value).feed(text[begin:])

    def _only_member(self, text: bytes, first: int) -> bytes | None:
        """Short cut 3: the text with its only mention's value replaced, if that is a member at depth 1."""
        start = text.find(self._word, first)
        if start < 1 or not self._flat or text[start - 1] == _BACKSLASH or text.find(b"\\u00", first, start) >= 0:
            return None
        member = _MEMBER.match(text, start + len(self._word))
        if member is None or self.mentioned(text, member.end()):
            return None
        begin, end = member.span(1)
        if text.count(b"{", first, start) == 1 and text.find(b"[", first, start) < 0:
            self._before, self._after, self._length = text[:end], text[:begin] + self._value, end
        elif text[first:].lstrip(b" \t\r\n")[:1] != b"{" or _TO_THE_END.match(text, end) is None:
            return None
        return text[:begin] + self._value + text[end:]


_REQUEST_PLACE: tuple[Place, ...] = ((b"model",),)
_REQUEST_WORD = b'"model"'
_ESCAPED = b"\\u006"  # how every letter of `model` begins when it is escaped


def only_model(body: bytes) -> tuple[int, int] | None:
    """Where the string of the member `model` stands in an object that has one at its root; None if that is in doubt.

    The only mention of the name must be the member that the caller's parser has found.
    """
    first = body.find(_REQUEST_WORD)
    if first < 0 or body.find(_REQUEST_WORD, first + 1) >= 0 or _ESCAPED in body:
        return None
    member = _MEMBER.match(body, first + len(_REQUEST_WORD))
    return None if member is None else member.span(1)


def count_models(body: bytes) -> int:
    """How many top-level `model` members a JSON object has, in any spelling; it must have one at least."""
    splicer = Splicer(_REQUEST_PLACE, b"")
    splicer.feed(body)
    return splicer.hits


def replace_model(body: bytes, text: bytes) -> bytes:
    """A JSON object with another top-level `model`, a JSON text; it must have exactly one, and a string."""
    return Splicer(_REQUEST_PLACE, text).feed(body)


def replace_only(text: bytes, word: bytes, value: bytes) -> bytes | None:
    """An object that has a member `word` (quoted) at its root, with another string there; None if that is mentioned
    elsewhere."""
    first = text.find(word)
    if first < 0 or text.find(word, first + 1) >= 0 or b"\\u00" in text:
        return None
    found = _MEMBER.match(text, first + len(word))
    if found is None:
        return None
    start, end = found.span(1)
    return text[:start] + value + text[end:]


def replace_model_path(body: bytes, old: str, new: str) -> bytes:
    """Gemini repeats the path's model in the body: every member `model` that names it (`models/{old}`) names `new`.

    A member's name and value with their plain quotes cannot stand inside a JSON string, where quotes are escaped.
    """
    pattern = rb'(?<!\\)"model"(\s*:\s*)"models/%b"' % re.escape(old.encode("ascii"))
    return re.sub(pattern, lambda match: b'"model"%b"models/%b"' % (match[1], new.encode("ascii")), body)


def replace_model_path_large(body: bytes, old: str, new: str) -> Generator[None, None, bytes]:
    """The same for a body of any length, in steps; the same object where nothing is replaced."""
    named, text = b'"models/%b"' % old.encode("ascii"), b'"models/%b"' % new.encode("ascii")
    pieces, changed, left = Pieces(body), False, spans.TOKENS
    behind = 0  # the last mention
    while (at := (yield from spans.find(body, _REQUEST_WORD, behind))) >= 0:
        behind = at + len(_REQUEST_WORD)
        colon = behind if body.startswith(b":", behind) else (yield from spans.past_blanks(body, behind, len(body)))
        begin = colon + 1
        if body.startswith(b":", colon) and not body.startswith(named, begin):
            begin = yield from spans.past_blanks(body, begin, len(body))
        if body.startswith(b":", colon) and body.startswith(named, begin) and body[max(at - 1, 0)] != _BACKSLASH:
            pieces.edit(begin, begin + len(named), text)
            changed = True
        left -= 1
        if not left:
            left = spans.TOKENS
            yield None
    return (yield from pieces.joined()) if changed else body
