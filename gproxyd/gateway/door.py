"""aiohttp's low-level server with what it lacks.

aiohttp's own answer to a malformed request quotes the offending line, secrets included, and logs it with a
traceback; here it is a constant. And whoever writes straight into the transport must hear when the client does not
take what it is sent.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from itertools import chain
from typing import Any, Protocol

from aiohttp.hdrs import TRANSFER_ENCODING
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web import BaseRequest, RequestHandler, RequestPayloadError, Server, StreamResponse
from aiohttp.web_protocol import _ErrInfo

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.errors import Refusal
from gproxyd.gateway.crowd import Bucket, Crowd
from gproxyd.gateway.sent import SENT_AND_CLOSE, date_line
from gproxyd.observe.journal import Occasional
from gproxyd.upstream.deadlines import Deadlines
from gproxyd.wire.headers import new_request_id

WRITE_HIGH_WATER = 64 * 1024
"""Bytes that may wait for a client before its upstream is no longer read."""

CLOSE_GRACE = 5.0
"""Seconds for which a connection that is being closed may still deliver what was written."""

USER_TIMEOUT_MS = 30_000
"""How long written bytes may stay unacknowledged before the kernel gives a vanished client up (tcp(7))."""

FIRST_BYTE_DEADLINE = 30.0
"""Seconds for which a new connection may say nothing at all."""

HEAD_DEADLINE = 10.0
"""Seconds within which a request's head must be complete once it has begun, however it trickles in."""

MAX_HEAD = 64 * 1024
"""Bytes of all header lines of a request together."""

LOOK_EVERY = 0.1
"""Seconds between two looks at a client whose bytes are not being read."""

_PEER_LEFT = frozenset({7, 8})  # TCP_CLOSE, TCP_CLOSE_WAIT (include/net/tcp_states.h)

_OPTIONS: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,
    "keepalive_timeout": 75.0,
    "lingering_time": 3.0,
    "max_field_size": 16 * 1024,
    "max_headers": 128,
    "max_line_size": 16 * 1024,
    "read_bufsize": 64 * 1024,
}

Handler = Callable[[BaseRequest], Awaitable[StreamResponse]]
Malformed = Callable[[str, str | None], None]


class Writable(Protocol):
    """Who writes into a client's transport and must know when to stop."""

    def client_paused(self) -> None: ...
    def client_resumed(self) -> None: ...


class DoorProtocol(RequestHandler):
    """One client connection."""

    __slots__ = (
        "_began",
        "_broken",
        "_bucket",
        "_chunked",
        "_door",
        "_grace",
        "_looking",
        "_malformed",
        "_silent",
        "_tail",
        "writer",
    )

    def __init__(self, manager: Door, *, malformed: Malformed, **options: Any) -> None:
        super().__init__(manager, **options)
        self._door = manager
        self._malformed = malformed
        self._bucket: Bucket | None = None
        self._began: float | None = None  # since when a request's head is awaited
        self._silent = True  # nothing at all has come yet
        self._broken = False  # something came that is no request: nothing more is read
        self._chunked: StreamReader | None = None  # the chunked body that is being received
        self._tail = b""  # the last four bytes that came
        self._grace: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self.writer: Writable | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self._bucket = self._door.crowd.enter(self.peername)
        if self._bucket is None:
            self._turn_away()
            return
        self._await_head()
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._grace, self._looking):
            if timer is not None:
                timer.cancel()
        self._grace = self._looking = None
        if self._bucket is not None:
            self._door.crowd.leave(self._bucket)
            self._bucket = None
        self._door.deadlines.release(self)
        super().connection_lost(exc)

    def _turn_away(self) -> None:
        """Too many connections: said at once, and nothing is read."""
        assert self.transport is not None
        request_id = new_request_id()
        lines = b"Retry-After: 1\r\nx-request-id: %b\r\n" % request_id.encode("ascii")
        self.transport.write(_answer(503, _CROWDED, lines, request_id))
        self.force_close()
        self._door.told.record("connections_refused")

    def _await_head(self) -> None:
        self._began = self._loop.time()
        self._door.deadlines.watch(self)

    def tick(self, now: float) -> None:
        """A head that does not come in time ends the connection (the attack is called slow loris)."""
        limit = FIRST_BYTE_DEADLINE if self._silent else HEAD_DEADLINE
        if self._began is not None and now - self._began > limit:
            self.force_close()

    def abort_later(self) -> None:
        """After a close: gives the client some seconds to take the rest, then ends it."""
        if self.transport is not None and self._grace is None:
            self._grace = self._loop.call_later(CLOSE_GRACE, self.transport.abort)

    @property
    def client_paused(self) -> bool:
        return self._paused

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.writer is not None:
            self.writer.client_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writer is not None:
            self.writer.client_resumed()

    def _pause_transport_reading(self) -> None:
        super()._pause_transport_reading()
        if self._looking is None and self.transport is not None:
            self._looking = self._loop.call_later(LOOK_EVERY, self._look_for_peer)

    def _resume_transport_reading(self) -> None:
        super()._resume_transport_reading()
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def _look_for_peer(self) -> None:
        """While nothing is read, for back-pressure, the loop cannot tell that the client has left; the kernel can."""
        self._looking = None
        if self.transport is None:
            return
        if _has_left(self.transport.get_extra_info("socket")):
            self.transport.abort()
        else:
            self._looking = self._loop.call_later(LOOK_EVERY, self._look_for_peer)

    def data_received(self, data: bytes) -> None:
        if self._silent:
            self._silent = False
            self._began = self._loop.time()
        if self._broken:
            return
        self._tail = (self._tail + data)[-4:]
        count = self._request_count
        try:
            super().data_received(data)
        except (HttpProcessingError, ValueError, AssertionError):
            # What the parser lets through of its libraries' errors is a malformed request all the same.
            self._refuse_malformed()
            self.force_close()
            return
        if self._upgraded:
            self._message_tail = b""  # no protocol but ours is ever spoken: what follows such a request is not kept
        self._look_over(self._request_count - count)
        if self._messages:
            if self._began is not None:
                self._began = None
                self._door.deadlines.release(self)
            if isinstance(self._messages[-1][0], _ErrInfo):
                self._break_off()
        elif self._began is None and self._current_request is None and self._waiter is not None:
            self._await_head()  # the first bytes of another head on a connection that was idle

    def _look_over(self, count: int) -> None:
        """The `count` messages that have just been parsed, by the rules that aiohttp's parsers do not know."""
        while not self._end_chunked(count) and count:
            message, body = self._messages[-count]
            if isinstance(message, _ErrInfo):
                return
            if not _is_fit(message):
                self._drop_last(count)
                self._messages.append((_ErrInfo(400, BadHttpMessage(""), ""), EMPTY_PAYLOAD))
                return
            self._chunked = body if message.chunked else None
            count -= 1

    def _end_chunked(self, count: int) -> bool:
        """Behind a chunked body another parser reads on; `count` messages follow it. Returns whether none may.

        aiohttp's parser (3.14) takes the last trailer of a request for the first header line of the next one, which
        may be its `Authorization`. So what shares a segment with the end of such a body is not believed: the
        connection ends behind the answer.
        """
        if self._chunked is None or not self._chunked._eof:
            return False
        self._chunked = None
        assert self._parser is not None
        if not count and self._tail == b"\r\n\r\n" and not self._buffer_paused:
            self._parser = type(self._parser)(
                self,
                self._loop,
                self._read_bufsize,
                max_line_size=self.max_line_size,
                max_field_size=self.max_field_size,
                max_headers=self.max_headers,
                payload_exception=RequestPayloadError,
                auto_decompress=False,
                max_msg_queue_size=self._max_msg_queue_size,
            )
            return False
        self._drop_last(count)
        if self._messages:
            message, body = self._messages.pop()
            assert not isinstance(message, _ErrInfo)
            self._messages.append((message._replace(should_close=True), body))
        self.close()
        return True

    def _drop_last(self, count: int) -> None:
        for _ in range(count):
            self._messages.pop()

    def _break_off(self) -> None:
        """aiohttp queues what broke the parser behind the running request; if it was that one's body, it must fail.

        The error holds every byte that broke it, in a ring of references that only the collector would undo.
        """
        self._broken = True
        broken, _ = self._messages.pop()
        assert isinstance(broken, _ErrInfo)
        broken.exc.__traceback__ = broken.exc.__context__ = broken.exc.__cause__ = None
        self._messages.append((_ErrInfo(400, BadHttpMessage(""), ""), EMPTY_PAYLOAD))
        body = self._chunked
        if body is not None and not body._eof and body.exception() is None:
            error = RequestPayloadError("the body is malformed")
            body.set_exception(error)
            # A reader that a chunk's end has woken in this very turn does not look before it waits again.
            self._loop.call_soon(body.set_exception, error)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """A constant answer, whatever was wrong: the peer's bytes appear neither in it nor in the log."""
        self._refuse_malformed()
        return SENT_AND_CLOSE

    def log_exception(self, *args: Any, exc_info: BaseException | None = None, **options: Any) -> None:
        """A body that broke after its request was refused is nobody's bug, and has been told of."""
        if not isinstance(exc_info, RequestPayloadError):
            super().log_exception(*args, exc_info=exc_info, **options)

    def _refuse_malformed(self) -> None:
        request_id = new_request_id()
        if self.transport is not None:
            line = b"x-request-id: %b\r\n" % request_id.encode("ascii")
            self.transport.write(_answer(400, _MALFORMED, line, request_id))
        peer = self.peername
        self._malformed(request_id, str(peer[0]) if isinstance(peer, tuple) else None)


def _is_fit(message: RawRequestMessage) -> bool:
    """Whether a request that a parser let through is one that is spoken here: HTTP/1.0 or 1.1, not too large, and
    framed by nothing but `chunked`, which HTTP/1.0 does not know (RFC 9112 section 6.1)."""
    lines = message.raw_headers
    if message.version != HttpVersion11 and message.version != HttpVersion10:
        return False
    coding = message.headers.get(TRANSFER_ENCODING)
    if coding is not None and (coding.lower() != "chunked" or not coding.isascii() or message.version == HttpVersion10):
        return False
    return len(lines) < 4 or sum(map(len, chain.from_iterable(lines))) <= MAX_HEAD


_CROWDED = Refusal("overloaded", "too many connections are open")
_MALFORMED = Refusal("invalid_request", "the request is not valid HTTP/1.1")


def _answer(status: int, error: Refusal, lines: bytes, request_id: str = "") -> bytes:
    """A whole answer for somebody whose dialect is not known, on a connection that ends with it."""
    body = DIALECTS["openai_chat"].error_body(error, request_id)
    head = b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode("ascii"))
    framing = b"Content-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    return head + date_line() + lines + framing + body


def _has_left(raw: socket.socket | None) -> bool:
    """Whether the peer has ended its side (tcp(7), TCP_INFO)."""
    if raw is None or raw.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    state: int = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state in _PEER_LEFT


class Door(Server):
    """Makes a DoorProtocol for every connection. `malformed(request_id, client)` hears of broken requests."""

    def __init__(
        self,
        handler: Handler,
        *,
        loop: asyncio.AbstractEventLoop,
        deadlines: Deadlines,
        crowd: Crowd,
        told: Occasional,
        malformed: Malformed,
    ) -> None:
        super().__init__(handler, handler_cancellation=True, loop=loop)
        self.deadlines = deadlines
        self.crowd = crowd
        self.told = told
        self._malformed = malformed

    def __call__(self) -> DoorProtocol:
        return DoorProtocol(self, loop=self._loop, malformed=self._malformed, **_OPTIONS)
