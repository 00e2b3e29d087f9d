"""A long text made of the parts of another and of new ones between them, put together in steps.

Invariant: what is kept is copied once, and so many bytes at a time that nobody waits for more than some milliseconds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from io import BytesIO

STEP = 1024 * 1024
"""Bytes that are copied at once."""

Edit = tuple[int, int, bytes]
"""What stands from one position to another is replaced by a text."""

_FRESH = 40 * STEP  # bytes that no allocator takes from what it keeps: glibc never keeps more than 32 MiB at a stretch

_SHORT = 4 * 1024  # bytes of a part that is gathered with others
_MANY = 512  # of them, at most


class Pieces:
    """A text in the making, from its beginning to its end: `keep` and `skip` say what becomes of the body up to a
    position, `put` adds something new."""

    __slots__ = ("_begin", "_body", "_end", "_parts", "_short")

    def __init__(self, body: bytes) -> None:
        self._body = memoryview(body)
        self._begin = self._end = 0  # what is kept and not yet among the parts
        self._parts: list[bytes | memoryview] = []
        self._short: list[bytes | memoryview] = []

    def keep(self, end: int) -> None:
        self._end = end

    def skip(self, end: int) -> None:
        self._flush()
        self._begin = self._end = end

    def put(self, text: bytes) -> None:
        self._flush()
        self._add(text)

    def copy(self, start: int, end: int) -> None:
        """Something of the body in another place."""
        self._flush()
        self._add(self._body[start:end])

    def edit(self, start: int, end: int, text: bytes = b"") -> None:
        """What is before `start` is kept, what is from there to `end` replaced."""
        self.keep(start)
        self.skip(end)
        if text:
            self._add(text)

    def joined(self) -> Generator[None, None, bytes]:
        """All of it; of the body's rest, all is kept."""
        self.keep(len(self._body))
        self.skip(len(self._body))
        self._gather()
        return (yield from joined(self._parts))

    def _flush(self) -> None:
        if self._end > self._begin:
            begin, self._begin = self._begin, self._end
            self._add(self._body[begin : self._end])

    def _add(self, part: bytes | memoryview) -> None:
        if len(part) > _SHORT:
            self._gather()
            self._parts.append(part)
            return
        self._short.append(part)
        if len(self._short) >= _MANY:
            self._gather()

    def _gather(self) -> None:
        if self._short:
            self._parts.append(b"".join(self._short))
            self._short.clear()


def edited(body: bytes, edits: Iterable[Edit]) -> Generator[None, None, bytes]:
    """The body with other texts from one position to another, in whichever order they are told; none may overlap."""
    pieces = Pieces(body)
    for start, end, text in sorted(edits, key=lambda edit: edit[:2]):
        pieces.edit(start, end, text)
    return (yield from pieces.joined())


def joined(parts: list[bytes | memoryview]) -> Generator[None, None, bytes]:
    """The parts as one; each is given back as soon as it is copied."""
    size = sum(map(len, parts))
    if size <= 2 * STEP:
        return b"".join(parts)
    # So many zeros come from the kernel as pages that nobody has touched yet. What is written in their place is given
    # out without another copy, and the pages behind it go back.
    whole = BytesIO(bytes(max(size, _FRESH)))
    parts.reverse()
    left = STEP
    while parts:
        part = memoryview(parts.pop())
        for start in range(0, len(part), STEP):
            left -= whole.write(part[start : start + STEP])
            if left <= 0:
                left = STEP
                yield None
    whole.truncate()
    return whole.getvalue()
