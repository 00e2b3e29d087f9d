"""What a response's body passes through on its way to the client.

A transform takes bytes as they come and gives bytes that go on at once:

    feed(data)    the next bytes of the body
    finish()      the body is complete: what was held back
    whole(data)   all of a body at once, instead of feed and finish
    fail(event)   the body broke: what may still be sent so that `event` (the dialect's own) stands alone
    at_rest       whether a comment or ping may be put in now

    Identity      everything passes
    Events        server-sent events; an unfinished event is held, so that a break never hands out half of one
    Json          one JSON text, or an array of them
    Watched       another transform, and somebody looks on
    Inflate       undoes a content coding in front of another transform
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from gproxyd.errors import WireError
from gproxyd.wire import sse
from gproxyd.wire.splice import Place, Splicer, TextSplicer

Tap = Callable[[bytes], bytes]

MAX_HELD = 512 * 1024
"""An event that grows beyond this is no longer held but passed on piece by piece. Bytes."""


class Transform(Protocol):
    @property
    def at_rest(self) -> bool: ...

    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...
    def whole(self, data: bytes) -> bytes: ...
    def fail(self, event: bytes) -> bytes: ...


class _Base:
    """What most transforms share: nothing is held, nothing can be added when the body breaks."""

    __slots__ = ()

    @property
    def at_rest(self) -> bool:
        return False

    def feed(self, data: bytes) -> bytes:
        return data

    def finish(self) -> bytes:
        return b""

    def whole(self, data: bytes) -> bytes:
        return self.feed(data) + self.finish()

    def fail(self, event: bytes) -> bytes:
        return b""


class Identity(_Base):
    """Everything passes; nothing can be added to bytes whose meaning is not known."""

    __slots__ = ()


IDENTITY = Identity()
"""It holds nothing, so one is enough."""


class Watched(_Base):
    """Another transform, and somebody looks on at what goes in."""

    __slots__ = ("_inner", "_watch")

    def __init__(self, watch: Callable[[bytes], None], inner: Transform = IDENTITY) -> None:
        self._watch = watch
        self._inner = inner

    @property
    def at_rest(self) -> bool:
        return self._inner.at_rest

    def feed(self, data: bytes) -> bytes:
        self._watch(data)
        return self._inner.feed(data)

    def finish(self) -> bytes:
        return self._inner.finish()

    def fail(self, event: bytes) -> bytes:
        return self._inner.fail(event)


class Json(_Base):
    """Replaces the strings at the places of a JSON body, as it comes."""

    __slots__ = ("_places", "_splicer", "_value")

    def __init__(self, places: Sequence[Place], value: bytes) -> None:
        self._places = places
        self._value = value
        self._splicer: Splicer | None = None

    def feed(self, data: bytes) -> bytes:
        if self._splicer is None:
            self._splicer = Splicer(self._places, self._value)
        return self._splicer.feed(data)

    def whole(self, data: bytes) -> bytes:
        return TextSplicer(self._places, self._value).splice(data)


class Events(_Base):
    """Whole events pass as they come; the strings at the places of their data are replaced (no places: none are).

    `tap` sees every block of whole events before that, and returns what of it goes on.
    """

    __slots__ = ("_at_rest", "_exact", "_held", "_places", "_splicer", "_started", "_tap", "_value", "smooth")

    def __init__(self, places: Sequence[Place] = (), value: bytes = b"", tap: Tap | None = None) -> None:
        self._tap = tap
        self._places = places
        self._value = value
        self._splicer = TextSplicer(places, value) if places else None
        self._held = b""
        self._exact: _EventSplicer | None = None  # set while an event is too large to hold
        self._started = False
        self.smooth = False  # something has come, and nothing of it is held
        self._at_rest = True

    @property
    def at_rest(self) -> bool:
        return self._at_rest

    def feed(self, data: bytes) -> bytes:
        # Short cut for what most streams bring: whole events with LF, nothing held, nothing begun.
        if self.smooth and data.endswith(b"\n\n") and data.find(13) < 0:
            if self._tap is not None:
                data = self._tap(data)
            splicer = self._splicer
            if splicer is None:
                return data
            if data.find(b"\n") == len(data) - 2 and data.startswith(b"data:"):
                return splicer.splice(data, 5)
            return self._replaced(data, splicer)
        if self._exact is not None:
            return self._feed_exact(data)
        start = max(0, len(self._held) - 3)  # the end of an event may have been cut
        if self._held:
            data = self._held + data
        end = sse.end_of_events(data, start)
        if data[end : end + 1] in (b"\n", b"\r") and not data[end:].strip(b"\r\n"):
            end = len(data)  # the LF of a CRLF, or more empty lines: nothing of an event
        self._held = data[end:]
        self._at_rest = not self._held
        out = self._spliced(data[:end]) if end else b""
        self.smooth = self._started and not self._held
        if len(self._held) <= MAX_HELD:
            return out
        self._exact = _EventSplicer(self._places, self._value)
        held, self._held = self._held, b""
        if not self._started and held.startswith(sse.BOM):
            out, held = out + sse.BOM, held[len(sse.BOM) :]
        self._started = True
        return out + self._feed_exact(held)

    def finish(self) -> bytes:
        """An event that the end of the stream leaves unterminated passes, too: what it means is the client's to say."""
        held, self._held = self._held, b""
        return self._spliced(held) if held else b""

    def fail(self, event: bytes) -> bytes:
        self._held = b""
        return event if self._exact is None else b"\n\n" + event

    def _feed_exact(self, data: bytes) -> bytes:
        """More of an event that is too large to hold. What stands behind its end are events like any other."""
        assert self._exact is not None
        out, end = self._exact.feed_event(data)
        if self._exact.at_rest:
            self._exact, self._at_rest = None, True
        return out if end == len(data) else out + self.feed(data[end:])

    def _spliced(self, block: bytes) -> bytes:
        """Whole events (at the end of the stream: the rest) with the value at the places of their data."""
        if self._tap is not None and block:
            block = self._tap(block)
        splicer = self._splicer
        if not block:
            return block
        begins, self._started = not self._started, True
        if splicer is None:
            return block
        if begins and block.startswith(sse.BOM):
            return sse.BOM + self._replaced(block[len(sse.BOM) :], splicer)
        return self._replaced(block, splicer)

    def _replaced(self, block: bytes, splicer: TextSplicer) -> bytes:
        if not splicer.mentioned(block):
            return block
        if b"\r" in block or _MANY_DATA_LINES.search(block):
            return _EventSplicer(self._places, self._value).feed(block)
        splice = splicer.splice
        return b"\n".join([splice(line, 5) if line.startswith(b"data:") else line for line in block.split(b"\n")])


_MANY_DATA_LINES = re.compile(rb"^data:[^\n]*\n(?:[^\n]+\n)*?data:", re.MULTILINE)


class _EventSplicer:
    """The exact machine for events: any line ends, any number of data lines, any cut; nothing is held.

    The data lines of one event are one text with LF between them (HTML section 9.2.6), so one Splicer reads them.
    """

    __slots__ = ("_after_cr", "_in_data", "_name", "_places", "_splicer", "_value", "at_rest")

    def __init__(self, places: Sequence[Place], value: bytes) -> None:
        self._places = places
        self._value = value
        self._splicer = Splicer(places, value)
        self._name: bytes | None = b""  # the line's first bytes, until they tell whether it is data
        self._in_data = False
        self._after_cr = False
        self.at_rest = False

    def feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        for text, end in sse.LINE_PIECE.findall(data):
            self._piece(text, end, out)
        return b"".join(out)

    def feed_event(self, data: bytes) -> tuple[bytes, int]:
        """More of one event: what goes on, and how many of the bytes belonged to it."""
        out: list[bytes] = []
        for piece in sse.LINE_PIECE.finditer(data):
            self._piece(piece[1], piece[2], out)
            if self.at_rest:
                return b"".join(out), piece.end()
        return b"".join(out), len(data)

    def _piece(self, text: bytes, end: bytes, out: list[bytes]) -> None:
        """What stands in a line, as far as it is here, and its end; either may be missing."""
        if text:
            self._after_cr = self.at_rest = False
            self._text(text, out)
        if end:
            self._line_end(end)
            out.append(end)

    def _text(self, text: bytes, out: list[bytes]) -> None:
        if self._name is not None:
            missing = len(b"data:") - len(self._name)
            self._name += text[:missing]
            out.append(text[:missing])
            text = text[missing:]
            if len(self._name) < len(b"data:"):
                return
            self._in_data = self._name == b"data:"
            self._name = None
        out.append(self._splicer.feed(text) if self._in_data else text)

    def _line_end(self, end: bytes) -> None:
        if end == b"\n" and self._after_cr:
            self._after_cr = False  # the second half of a CRLF that was cut in two
            return
        self._after_cr = end == b"\r"
        self.at_rest = self._name == b""
        if self.at_rest:
            self._splicer = Splicer(self._places, self._value)
        elif self._in_data:
            self._splicer.feed(b"\n")
        self._name, self._in_data = b"", False


class Inflate(_Base):
    """Undoes gzip or deflate in front of another transform, member after member, in bounded steps."""

    __slots__ = ("_begun", "_coding", "_inflater", "_inner", "_most", "_unsure")

    def __init__(self, coding: bytes, inner: Transform) -> None:
        self._inner = inner
        self._coding = coding
        self._unsure = b"" if coding == b"deflate" else None  # the beginning, until it tells which deflate it is
        self._inflater = self._new()
        self._begun = False  # inside a member
        self._most = _INFLATE_FREE  # bytes that may come out yet

    @property
    def at_rest(self) -> bool:
        return self._inner.at_rest

    def _new(self) -> zlib._Decompress:
        return zlib.decompressobj(_WINDOWS[self._coding])

    def feed(self, data: bytes) -> bytes:
        pieces: list[bytes] = []  # nothing is read of what turns out to expand beyond all bounds
        broken = False
        self._most += _INFLATE_RATIO * len(data)
        if self._unsure is not None:
            data = self._unsure + data
            self._begun = bool(data)
            if len(data) < 2:
                self._unsure = data
                return b""
            self._unsure = None
            if data[0] & 0x0F != 8 or int.from_bytes(data[:2], "big") % 31:  # no zlib header (RFC 1950 section 2.2)
                self._coding = b"raw"
                self._inflater = self._new()
        while data:
            try:
                piece = self._inflater.decompress(data, _INFLATE_STEP)
            except zlib.error:
                broken = True
                break
            self._most -= len(piece)
            if self._most < 0:
                raise WireError("the response expands beyond all bounds")
            pieces.append(piece)
            self._begun = not self._inflater.eof
            data = self._inflater.unconsumed_tail
            if self._inflater.eof:
                data = self._inflater.unused_data
                self._inflater = self._new()
        out = b"".join([self._inner.feed(piece) for piece in pieces])
        if broken:
            raise WireError("the response's content coding is broken")
        return out

    def finish(self) -> bytes:
        if self._begun:
            raise WireError("the response's content coding stops short")
        return self._inner.finish()

    def fail(self, event: bytes) -> bytes:
        return self._inner.fail(event)


INFLATABLE = frozenset({b"gzip", b"deflate"})
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS, b"raw": -zlib.MAX_WBITS}
_INFLATE_STEP = 64 * 1024
_INFLATE_FREE, _INFLATE_RATIO = 4 * 1024 * 1024, 64  # bytes, and for each that came in: no honest answer has more
