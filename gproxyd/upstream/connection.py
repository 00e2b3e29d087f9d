"""One connection to an upstream: a request out, its response into a sink, in the same turn of the loop.

Invariants:
- a connection serves one exchange at a time, and no sink hears anything after `ended` or `failed`;
- it goes back to the pool only after a complete response to a completely sent request, with no byte to spare;
- whoever loses interest aborts: the upstream must notice at once, not when it next writes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

from gproxyd.errors import UpstreamError, WireError
from gproxyd.upstream.slices import CODED_SLICE, SLICE, Sliced
from gproxyd.wire.http1 import ResponseHead, ResponseReader

WRITE_HIGH_WATER = 64 * 1024
"""Bytes that may wait for the upstream to take them before an upload is paused."""


class ResponseSink(Protocol):
    """Who takes a response as it comes: whole, or its head, its body's bytes and its end."""

    def answered(self, head: ResponseHead, body: bytes) -> None: ...
    def started(self, head: ResponseHead) -> None: ...
    def received(self, data: bytes) -> None: ...
    def ended(self) -> None: ...
    def failed(self, error: UpstreamError) -> None: ...


class Connection(Sliced):
    """An open connection. `used` counts exchanges, `idle_since` is the loop time at which it became idle."""

    __slots__ = (
        "_drained",
        "_farewell",
        "_kernel",
        "_quick",
        "_reader",
        "_request_sent",
        "_sink",
        "_spare",
        "_taken",
        "_writing_paused",
        "answered",
        "idle_since",
        "used",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._reader = ResponseReader()
        self._sink: ResponseSink | None = None
        self._quick: Callable[[bytes], int] | None = None  # sees chunks first
        self._drained: asyncio.Future[None] | None = None
        self._farewell = False  # the peer has told that it ends its side
        self._kernel = -1
        self._spare = -1
        self._writing_paused = False
        self._request_sent = False
        self._taken = True
        self.answered = False
        self.used = 0
        self.idle_since = 0.0

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        transport = self._transport
        whole = self._sink is None and self._request_sent and self._reader.reusable and not self._rest
        return whole and transport is not None and not transport.is_closing()

    @property
    def unread_by_peer(self) -> bool:
        """After a failure without an answer: whether the peer provably did not process the request.

        Bytes that its kernel never acknowledged were read by nobody. A connection that ends after an acknowledged
        request may have been ended by a process that read it.
        """
        return not self._taken

    # The exchange's side.

    def begin(self, method: str, sink: ResponseSink) -> None:
        """The next response goes into `sink`."""
        assert self._sink is None
        self._reader.expect(method)
        self._sink = sink
        self.slice = SLICE
        self._quick = None
        self._request_sent = False
        self._taken = True
        self.answered = False
        self.used += 1

    def ask(self, data: bytes, sink: ResponseSink) -> None:
        """Sends a whole POST at once, whose response goes into `sink`."""
        self.begin("POST", sink)
        self._request_sent = True
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def write(self, data: bytes) -> None:
        """Sends bytes of the request; quietly nothing on a connection that is gone, whose sink hears of it."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def offer(self, quick: Callable[[bytes], int] | None) -> None:
        """From now on `quick` sees what comes before anybody else does, if a chunk begins there. It takes whole chunks
        that nobody else must see, and returns how many bytes those were. If that was not all, the sink hears of the
        rest as ever, and there is no offer any more. None takes one back."""
        self._quick = quick if self._reader.between else None

    def request_sent(self) -> None:
        """The whole request has been handed over."""
        self._request_sent = True

    @property
    def writing_paused(self) -> bool:
        return self._writing_paused

    async def drained(self) -> None:
        """Waits until the upstream takes more, or the connection is gone."""
        if self._writing_paused and self.open:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)

    def abort(self) -> None:
        """Ends the connection at once; the sink hears no more."""
        self._sink = None
        self.forget()
        if self._transport is not None:
            self._transport.abort()

    # The loop's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # TLS closes its descriptor before it tells that the connection is lost, and then nothing could say any
            # more what the peer has acknowledged: so it gets one more.
            self._kernel = raw.fileno()
            self._secure = transport.get_extra_info("sslcontext") is not None
            if self._secure:
                self._kernel = self._spare = _duplicate(self._kernel)

    def look_at(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:
            self.abort()  # bytes that answer no request would answer the next one
            return
        quick = self._quick
        if quick is not None:
            taken = quick(data)
            if taken == len(data):
                return
            self._quick, data = None, data[taken:]
        if not self.answered and len(data) > CODED_SLICE:
            end = data.find(b"\r\n\r\n") + 4
            if b"\r\ncontent-encoding:" in data[:end].lower() and len(data) > end:
                data = self.later(data, end)  # what is inflated is looked at in smaller slices, as the sink says
        if self.answered:
            chunk = self._reader.chunk(data)
            if chunk is not None:
                sink.received(chunk)
                return
        self.answered = True
        whole = self._reader.whole(data)
        if whole is not None:
            self._tell_last(partial(sink.answered, *whole), sink)
            return
        head, body, ended, error = self._reader.feed(data)
        if head is not None:
            if ended:
                self._tell_last(partial(sink.answered, head, body), sink)
                return
            sink.started(head)
        if body and self._sink is sink:
            sink.received(body)
        if self._sink is not sink:
            return  # the sink gave up meanwhile
        if ended:
            self._tell_last(sink.ended, sink)
        elif error is not None:
            self._fail(UpstreamError("protocol", f"the upstream broke HTTP: {error}"))

    def _tell_last(self, tell: Callable[[], None], sink: ResponseSink) -> None:
        """The sink's last word. One with a bug must not leave its request without an end."""
        self._sink = None
        try:
            tell()
        except Exception:
            sink.failed(UpstreamError("bug", "the gateway failed over this answer", code="internal_error"))
            raise

    def eof_received(self) -> bool:
        self._farewell = True
        self._taken = self.answered or not self._unacknowledged()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.flush()
        if exc is not None and not self.answered:
            # A reset says nothing: who read the request may reset before its kernel acknowledges it. A pipe that is
            # broken had been closed by the peer before the request came (tcp_reset in net/ipv4/tcp_input.c).
            self._taken = not isinstance(exc, BrokenPipeError)
        self._transport = None
        if self._spare >= 0:
            os.close(self._spare)
        self._kernel = self._spare = -1
        self._wake()
        if self._sink is None:
            return
        try:
            complete = exc is None and self._reader.eof()
            if complete and self._secure and not self._farewell:
                raise WireError("TLS was cut off, and so perhaps the body (RFC 9112 section 9.8)")
        except WireError as truncated:
            self._fail(UpstreamError("closed", f"the upstream left early: {truncated}"))
            return
        if complete:
            self._tell_last(self._sink.ended, self._sink)
        else:
            self._fail(UpstreamError("reset", "the upstream reset the connection"))

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake()

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def _fail(self, error: UpstreamError) -> None:
        sink = self._sink
        self.abort()
        if sink is not None:
            sink.failed(error)

    def _unacknowledged(self) -> bool:
        """Whether the kernel still holds bytes that the peer's has not acknowledged (SIOCOUTQ, tcp(7))."""
        if self._kernel < 0:
            return False
        (waiting,) = struct.unpack("i", fcntl.ioctl(self._kernel, termios.TIOCOUTQ, b"\0\0\0\0"))
        return bool(waiting > 0)


class _Nowhere:
    """Stands for a connection that is not there: of an answer that is here already, or while it is being dialled."""

    __slots__ = ()
    slice = 0
    answered = False
    unread_by_peer = False

    def abort(self) -> None:
        """There is nothing to end."""

    def pause_reading(self) -> None:
        """There is nothing to read."""

    def resume_reading(self) -> None:
        """There is nothing to read."""


NOWHERE = cast(Connection, _Nowhere())


def _duplicate(descriptor: int) -> int:
    """Another descriptor of the same socket; -1 if none is left, for then a failure counts as read by the peer."""
    try:
        return os.dup(descriptor)
    except OSError:
        return -1
