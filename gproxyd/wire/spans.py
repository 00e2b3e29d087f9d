"""Where the parts of a long JSON text stand: found in steps, with a pause for everybody else between them.

The generators here yield None for a pause, and beside that what they find. Invariants
- A step takes some milliseconds at most, whatever the text: bytes and tokens are counted.
- Time is linear in the bytes: a value that is passed over is read a few times at most, however it nests.
- Of JSON, what is told is what a parser would tell. What is not JSON raises ValueError, or is passed over where
  brackets and quotes can be matched; no other error is raised. Who wants a value parses it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import orjson

from gproxyd.wire.pick import BULK, LAST, TEXT, nested, text_end

WINDOW = 64 * 1024
"""Bytes after which there is a pause: at most some milliseconds, however dense they are."""

TOKENS = 1024
"""Elements, members, quotes and brackets that are looked at one by one, after which there is a pause, too."""

LONGEST_NAME = 1024
"""Bytes of a member's name beyond which it is none that anybody here knows."""

_SOME = 64
_FIND = 1024 * 1024
_BLANKS = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb'[^ \t\r\n"{}\[\],:]*+')
_UNITS = re.compile(rb"(?>(?:[^\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*)", re.DOTALL)
_HIGH = re.compile(rb"\\u[dD][89abAB]")  # the first half of a character that takes two
_WHOLE = rb'(?:"%b%b|[{\[]%b[}\]]|[^ \t\r\n"{}\[\],:]++)' % (TEXT, LAST, nested(3))
_ELEMENT = re.compile(rb"[ \t\r\n]*+(%b)[ \t\r\n]*+[,\]]" % _WHOLE)
_MEMBER = re.compile(rb'[ \t\r\n]*+"(%b)%b[ \t\r\n]*+:[ \t\r\n]*+(%b)[ \t\r\n]*+[,}]' % (TEXT, LAST, _WHOLE))

_QUOTE = 0x22
_OPENING, _CLOSING = b"{[", b"}]"

Span = tuple[int, int]
T = TypeVar("T")


@dataclass(slots=True)
class Member:
    """A member of an object: its name stands at `at`, its value from `start` to `end`. `before` is where the member in
    front of it ends, `after` where the next one begins; 0 where there is none."""

    name: str
    at: int
    start: int
    end: int
    before: int
    after: int = 0


def elements(body: bytes, start: int, end: int) -> Iterator[Span | None]:
    """Where the elements of the array stand that goes from `start` to `end`."""
    position, mark, left = start + 1, start + WINDOW, TOKENS
    first = True
    while True:
        match = _ELEMENT.match(body, position, min(position + WINDOW, end))
        if match is not None:
            span, position = match.span(1), match.end()
        else:
            position = yield from past_blanks(body, position, end)
            if first and _byte(body, position, end) in b"]":
                return
            stop = yield from past_value(body, position, end)
            span = position, stop
            position = 1 + (yield from past_blanks(body, stop, end))
        first = False
        yield span
        last = _byte(body, position - 1, end)
        if last in b"]":
            return
        if last != b",":
            raise ValueError("no JSON")
        left -= 1
        if not left or position > mark:
            mark, left = position + WINDOW, TOKENS
            yield None


def members(body: bytes, start: int, end: int) -> Iterator[Member | None]:
    """The members of the object that goes from `start` to `end`. `after` of one is known when the next has come."""
    position, mark, left = start + 1, start + WINDOW, TOKENS
    last: Member | None = None
    while True:
        match = _MEMBER.match(body, position, min(position + WINDOW, end))
        if match is not None:
            (opened, closed), (begin, stop), position = match.span(1), match.span(2), match.end()
        else:
            opened = 1 + (yield from past_blanks(body, position, end))
            if last is None and _byte(body, opened - 1, end) in b"}":
                return
            if _byte(body, opened - 1, end) != b'"':
                raise ValueError("no JSON")
            closed = -1 + (yield from past_string(body, opened, end))
            colon = yield from past_blanks(body, closed + 1, end)
            if _byte(body, colon, end) != b":":
                raise ValueError("no JSON")
            begin = yield from past_blanks(body, colon + 1, end)
            stop = yield from past_value(body, begin, end)
            position = 1 + (yield from past_blanks(body, stop, end))
        before = 0
        if last is not None:
            before, last.after = last.end, opened - 1
        last = Member(_name(body, opened, closed), opened - 1, begin, stop, before)
        yield last
        token = _byte(body, position - 1, end)
        if token in b"}":
            return
        if token != b",":
            raise ValueError("no JSON")
        left -= 1
        if not left or position > mark:
            mark, left = position + WINDOW, TOKENS
            yield None


def named(body: bytes, start: int, end: int, names: Collection[str]) -> Generator[None, None, dict[str, list[Member]]]:
    """The members of these names, each as often as it is there."""
    found: dict[str, list[Member]] = {}
    for member in members(body, start, end):
        if member is None:
            yield None
        elif member.name in names:
            found.setdefault(member.name, []).append(member)
    return found


def root(body: bytes) -> Generator[None, None, Span]:
    """Where the text's one value stands."""
    start = yield from past_blanks(body, 0, len(body))
    end = len(body)
    while end > start and body[end - 1] in b" \t\r\n":
        step = max(start, end - WINDOW)
        end = step + len(body[step:end].rstrip(b" \t\r\n"))
        yield None
    return start, end


def without(doomed: list[Member]) -> list[Span]:
    """What is to be cut out of an object that shall lose these members, of one object and in their order."""
    cuts: list[Span] = []
    first: Member | None = None
    for member, following in zip(doomed, [*doomed[1:], None], strict=False):
        first = first or member
        if following is not None and member.after == following.at:
            continue
        if member.after:
            cuts.append((first.at, member.after))
        else:
            cuts.append((first.before or first.at, member.end))
        first = None
    return cuts


def mentions(body: bytes, words: Collection[bytes]) -> Generator[None, None, list[bytes]]:
    """Those of the words that occur."""
    found = []
    for word in words:
        at = yield from find(body, word, 0)
        if at >= 0:
            found.append(word)
    return found


def find(body: bytes, word: bytes, position: int) -> Generator[None, None, int]:
    """Where the word occurs next; -1 if it does not."""
    while position < len(body):
        at = body.find(word, position, position + _FIND + len(word))
        if at >= 0:
            return at
        position += _FIND
        yield None
    return -1


def cut(body: bytes, start: int, position: int, end: int) -> int:
    """Where a string's text that begins at `start` can be cut, at `position` or a little before: between characters."""
    if position >= end:
        return end
    position = _UNITS.match(body, start, position).end()  # type: ignore[union-attr]  # an empty match is one, too
    if position - 6 > start and _HIGH.match(body, position - 6):
        position = _UNITS.match(body, start, position - 6).end()  # type: ignore[union-attr]  # the same
    while body[position] & 0xC0 == 0x80 and position > start:
        position -= 1
    if position <= start:
        raise ValueError("no JSON")
    return position


def past_blanks(body: bytes, position: int, end: int) -> Generator[None, None, int]:
    """The position behind white space."""
    while True:
        stop = min(position + WINDOW, end)
        position = _BLANKS.match(body, position, stop).end()  # type: ignore[union-attr]  # an empty match is one, too
        if position < stop or stop == end:
            return position
        yield None


def at_once(steps: Generator[None, None, T]) -> T:
    """What the generator returns, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def past_string(body: bytes, position: int, end: int) -> Generator[None, None, int]:
    """The position behind the string whose text begins there."""
    while True:
        stop = min(position + WINDOW, end)
        position = text_end(body, position, stop)
        if position < stop and body[position] == _QUOTE:
            return position + 1
        if position < stop:  # a back-slash, and what it escapes
            position += 2
        if position >= end:
            raise ValueError("no JSON")
        yield None


def past_value(body: bytes, position: int, end: int) -> Generator[None, None, int]:
    """The position behind the value that begins there."""
    depth, mark, left = 0, position + WINDOW, TOKENS
    while position < end:
        token = body[position]
        if token == _QUOTE:
            position = yield from past_string(body, position + 1, end)
        elif token in _OPENING:
            depth += 1
            position += 1
        elif token in _CLOSING:
            if not depth:
                break
            depth -= 1
            position += 1
        elif not depth:
            return (yield from _past_scalar(body, position, end))
        if not depth:
            if left < TOKENS - _SOME:  # many of these in a row are long, too
                yield None
            return position
        stop = min(position + WINDOW, end)
        position = BULK.match(body, position, stop).end()  # type: ignore[union-attr]  # an empty match is one, too
        left -= 1
        if not left or position > mark:
            mark, left = position + WINDOW, TOKENS
            yield None
    raise ValueError("no JSON")


def _past_scalar(body: bytes, position: int, end: int) -> Generator[None, None, int]:
    start = position
    while True:
        stop = min(position + WINDOW, end)
        position = _SCALAR.match(body, position, stop).end()  # type: ignore[union-attr]  # an empty match is one, too
        if position < stop or stop == end:
            break
        yield None
    if position == start:
        raise ValueError("no JSON")
    return position


def _byte(body: bytes, position: int, end: int) -> bytes:
    if position >= end:
        raise ValueError("no JSON")
    return body[position : position + 1]


def _name(body: bytes, start: int, end: int) -> str:
    """A member's name; that of one whose name is too long to be known is empty."""
    if end - start > LONGEST_NAME:
        return ""
    name: str = orjson.loads(body[start - 1 : end + 1])
    return name
