"""The request's body: read whole where it names the model, else streamed.

Invariant: no body is held beyond its limit. One that says its length is refused before a byte of it is read.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader
from aiohttp.web import RequestPayloadError

from gproxyd.errors import Refusal
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.units import format_size
from gproxyd.wire import multipart, outline, pieces
from gproxyd.wire.headers import Headers
from gproxyd.wire.multipart import FormScanner
from gproxyd.wire.outline import Outline

BODY_IDLE = 60.0
"""Seconds without a byte after which a body that is awaited whole is given up."""

BODY_DEADLINE = 300.0
"""Seconds within which a body that is awaited whole must be there, in whatever crumbs it comes."""

COUNTED_FROM = 64 * 1024
"""Bytes below which a body is not counted: connections are limited, and so are these."""

MIN_RATE = 512
"""Bytes a second that a body must bring in the long run, counted only while it is waited for."""

RATE_GRACE = 30.0
"""Seconds of waiting before a body's rate is looked at."""

SPOOL_AFTER = 1024 * 1024
"""Bytes of a form that wait in memory for its `model`; more wait in an anonymous file."""

_PIECE = 256 * 1024

T = TypeVar("T")


@dataclass(slots=True)
class Body:
    """A body on its way upstream: `data` if it is whole, else `pieces`. `length` in bytes, None if it is not known."""

    data: bytes | None = b""
    pieces: AsyncIterator[bytes] | None = None
    length: int | None = 0
    rewritten: bool = False

    def watch(self, look: Callable[[bytes], None]) -> None:
        """Somebody looks on at what goes up."""
        if self.data is not None:
            look(self.data)
        elif self.pieces is not None:
            self.pieces = _watched(self.pieces, look)

    @classmethod
    def whole(cls, data: bytes, *, rewritten: bool) -> Body:
        return cls(data, None, len(data), rewritten)


async def _watched(pieces: AsyncIterator[bytes], look: Callable[[bytes], None]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        look(piece)
        yield piece


class Budget:
    """What the bodies of all requests may hold together, in bytes. Small ones are not worth counting."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0

    def take(self, size: int, most: int) -> None:
        """Raises Refusal (503) if there is no room."""
        if self.held + size > most:
            raise Refusal("overloaded", "too many large requests at once", headers={"Retry-After": "1"}, close=True)
        self.held += size

    def give(self, size: int) -> None:
        self.held -= size


class Intake:
    """Reads the body of one request. `release` gives back what it has taken of the budget."""

    def __init__(
        self, content: StreamReader, headers: Headers, call: Call, down: Downstream, budget: Budget, budget_limit: int
    ) -> None:
        self._budget = budget
        self._budget_limit = budget_limit
        self._taken = 0
        self._form: Form | None = None
        self._content = content
        self._headers = headers
        self._call = call
        self._down = down
        length = headers.get(b"content-length")
        self.length: int | None = int(length) if length is not None else None
        self.chunked = b"transfer-encoding" in headers
        self._asked = False

    @property
    def kept(self) -> bool:
        """Whether an envelope of the request is kept."""
        return self._call.envelope is not None

    @property
    def present(self) -> bool:
        """Whether the request has a body at all, be it empty."""
        return self.length is not None or self.chunked

    @property
    def complete(self) -> bool:
        """Whether every byte of the body has been received (and nothing more can fail)."""
        return self._content.is_eof()

    def is_json(self) -> bool:
        kind = self._headers.media_type()
        return kind in (b"application/json", b"") or kind.endswith(b"+json")

    def demand_json(self) -> None:
        """Raises Refusal (415) for a body that says it is something else, or is compressed."""
        if not self.is_json():
            raise Refusal("unsupported_media_type", "this endpoint takes application/json")
        if self._headers.coding():
            raise Refusal("unsupported_media_type", "compressed request bodies are not supported", close=True)

    def limit(self, most: int) -> None:
        """Raises Refusal (413) for a body that says it is longer than `most` bytes."""
        if self.length is not None and self.length > most:
            raise _too_large(most)

    def _ask(self) -> None:
        """Answers `Expect: 100-continue`, once, when the request has been admitted."""
        if not self._asked:
            self._asked = True
            if b"expect" in self._headers and not self.complete:
                self._down.go_on()

    async def read(self, most: int) -> bytes:
        """The whole body. Raises Refusal: 413 beyond `most` bytes, 408 if it stops coming, 400 if it is malformed."""
        self.limit(most)
        if self._content.is_eof():
            data = self._content.read_nowait(-1)
            self._came(data)
            if len(data) > most:
                raise _too_large(most)
            self._take(len(data))
            return data
        self._take(self.length or 0)
        chunks: list[bytes | memoryview] = []
        async for chunk in self._chunks(most, patience=BODY_IDLE):
            if self._call.bytes_in > self._taken + COUNTED_FROM:
                self._take(2 * self._call.bytes_in)  # a body of unknown length: in doubling steps
            chunks.append(chunk)
        if self._call.bytes_in <= pieces.STEP:
            return b"".join(chunks)
        return await in_steps(pieces.joined(chunks))

    def _came(self, data: bytes) -> None:
        self._call.bytes_in += len(data)
        envelope = self._call.envelope
        if envelope is not None and envelope.asked is not None:
            envelope.asked.add(data)

    def _take(self, size: int) -> None:
        if size > max(COUNTED_FROM, self._taken):
            self._budget.take(size - self._taken, self._budget_limit)
            self._taken = size

    def release(self) -> None:
        """The body is no longer held."""
        self._budget.give(self._taken)
        self._taken = 0
        if self._form is not None:
            self._form.close()

    async def _chunks(self, most: int, patience: float | None) -> AsyncIterator[bytes]:
        self._ask()
        waited = 0.0
        first = time.monotonic()
        while True:
            began = time.monotonic()
            if patience is not None and began - first > BODY_DEADLINE:
                raise Refusal("request_timeout", "the request's body takes too long", close=True)
            try:
                async with asyncio.timeout(patience):
                    chunk = await self._content.readany()
            except TimeoutError:
                raise Refusal("request_timeout", "the request's body stopped coming", close=True) from None
            except (RequestPayloadError, HttpProcessingError):
                raise Refusal("invalid_request", "the request's body is malformed", close=True) from None
            if not chunk:
                return
            waited += time.monotonic() - began
            if len(chunk) < 16 * 1024:  # a body in crumbs costs by the crumb: everybody else's turn
                await asyncio.sleep(0)
            self._came(chunk)
            if waited > RATE_GRACE and self._call.bytes_in < MIN_RATE * waited:
                raise Refusal("request_timeout", "the request's body comes too slowly", close=True)
            if self._call.bytes_in > most:
                raise _too_large(most)
            yield chunk

    def stream(self, most: int) -> Body:
        """The body as it comes; whole if it is all here. Raises Refusal (413)."""
        self.limit(most)
        if self._content.is_eof():
            data = self._content.read_nowait(-1)
            self._came(data)
            return Body.whole(data, rewritten=False)
        return Body(None, self._chunks(most, patience=None), self.length)

    async def form(self, most: int) -> Form:
        """A form, read up to its `model`. Raises Refusal."""
        self.limit(most)
        kind = self._headers.get(b"content-type", b"")
        form = Form(FormScanner(multipart.boundary(kind)), self._chunks(most, BODY_IDLE), self.length)
        self._form = form
        await form.find_model()
        return form


class Form:
    """A form whose `model` is looked for before the rest is read: in memory, then in an anonymous file."""

    def __init__(self, scanner: FormScanner, chunks: AsyncIterator[bytes], length: int | None) -> None:
        self._scanner = scanner
        self._chunks = chunks
        self._length = length
        # Memory only, unless a form hides its model behind a megabyte of file; then the disk, not the heap.
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_AFTER)  # noqa: SIM115
        self._ended = False

    @property
    def model(self) -> str | None:
        return self._scanner.value

    async def find_model(self) -> None:
        async for chunk in self._chunks:
            self._scanner.feed(chunk)
            self._spool.write(chunk)
            if self._scanner.value is not None:
                return
        self._ended = True
        self._scanner.finish()

    def body(self, model: str | None) -> Body:
        """The form as it goes on, with another model if one is given."""
        new = None if model is None or model == self.model else model.encode("ascii")
        start, end = self._scanner.span
        length = self._length
        if new is not None and length is not None:
            length += len(new) - (end - start)
        return Body(None, self._pieces(new), length, rewritten=new is not None)

    async def _pieces(self, new: bytes | None) -> AsyncIterator[bytes]:
        """All pieces, the last only when the form has proved whole: no upstream may take a broken one for complete."""
        held = b""
        async for piece in self._all(new):
            if held:
                yield held
            held = piece
        self._scanner.finish()
        yield held

    async def _all(self, new: bytes | None) -> AsyncIterator[bytes]:
        with self._spool as spool:
            spool.seek(0)
            if new is not None:
                start, end = self._scanner.span
                while start > 0:
                    piece = spool.read(min(start, _PIECE))
                    start -= len(piece)
                    yield piece
                yield new
                spool.seek(end)
            while piece := spool.read(_PIECE):
                yield piece
        async for chunk in self._chunks:
            self._scanner.feed(chunk)
            yield chunk

    def close(self) -> None:
        self._spool.close()


async def outline_of(body: bytes) -> Outline:
    """What routing needs to know of a JSON object. Raises Refusal (400) for anything else."""
    if len(body) <= outline.LARGE:
        return outline.parse(body)
    return await in_steps(outline.walk(body))


async def in_steps(steps: Generator[object, None, T]) -> T:
    """What a generator returns that pauses with every `yield`. Others get their turn; whoever leaves ends it there."""
    while True:
        async with _turn():
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            await asyncio.sleep(0)  # everybody else's turn, before that of another body


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def _turn() -> asyncio.Lock:
    """Of all bodies that are worked on one goes a step ahead at a time: else their steps would add up."""
    return _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())


def _too_large(most: int) -> Refusal:
    return Refusal("payload_too_large", f"the request's body exceeds {format_size(most)}", close=True)
