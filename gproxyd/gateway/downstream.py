"""The client's side of a request: heads, framing, and how to end without looking complete.

Written straight into the transport: a response object, its header dictionary and its writer would cost more than
the request itself. Invariants: one head per request; `end` is called only when the response is complete, and every
other way out is `cut`, after which no client can take the response for a whole one.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from http import HTTPStatus
from typing import Literal

from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web import StreamResponse

from gproxyd.gateway.doorstep import DoorProtocol
from gproxyd.gateway.envelopes import Envelope
from gproxyd.gateway.sent import SENT, SENT_AND_CLOSE

_REASONS = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}

Framing = Literal["none", "length", "chunked", "close"]


class Nobody:
    """Takes what is said when the client has left: nothing of it goes anywhere."""

    __slots__ = ("body_bytes",)

    protocol = None
    started = True
    waiting_bytes = 0

    def __init__(self, body_bytes: int) -> None:
        self.body_bytes = body_bytes

    def head(self, status: int, lines: bytes, length: int | None) -> None:
        """Nobody hears it."""

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        """Nobody hears it."""

    def write(self, data: bytes) -> None:
        """Nobody hears it."""

    pass_on = write

    def end(self) -> None:
        """Nobody hears it."""

    def cut(self) -> None:
        """There is nothing left to cut."""

    def abort(self) -> None:
        """There is nothing left to abort."""


class Downstream:
    """Writes one response. `started` once its head is out, `body_bytes` without framing.

    Without a `message` it answers a whole POST of HTTP/1.1 on a connection that goes on.
    """

    # What holds for most.
    _content: StreamReader | None = None
    _http11: bool = True
    _head_only: bool = False
    _framing: Framing = "none"
    started: bool = False
    ended: bool = False
    body_bytes: int = 0
    envelope: Envelope | None = None

    def __init__(
        self, protocol: DoorProtocol, message: RawRequestMessage | None = None, content: StreamReader | None = None
    ) -> None:
        self.__dict__.update(_DEFAULTS)
        self.protocol = protocol
        self._transport: asyncio.Transport | None = protocol.transport
        if message is None:
            self._keep = protocol.goes_on_after_next
        else:
            self._content = content
            self._http11 = message.version >= HttpVersion11
            self._keep = self._http11 and not message.should_close and protocol.goes_on
            self._head_only = message.method == "HEAD"

    @property
    def socket(self) -> socket.socket | None:
        """The client's socket, None if it is gone."""
        return None if self._transport is None else self._transport.get_extra_info("socket")

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def waiting_bytes(self) -> int:
        """What the client has not taken yet, beyond the kernel's own buffers."""
        return self._transport.get_write_buffer_size() if self._transport is not None and self.open else 0

    def close_after(self) -> None:
        """The connection must not go on after this response."""
        self._keep = False

    def go_on(self) -> None:
        """Asks for the body that an `Expect: 100-continue` holds back; HTTP/1.0 knows none (RFC 9110 10.1.1)."""
        if self._http11:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def head(self, status: int, lines: bytes, length: int | None) -> None:
        """Writes the head. `lines` end in CRLF; `length` is the body's, None if it is not known yet."""
        self._write(self._head(status, lines, length))

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        """A response whose body is known, in one write."""
        if status != 200 or self._content is not None or self.envelope is not None:
            head = self._head(status, lines, len(body))
            self._write(head if self._framing == "none" else head + body)
            if self.envelope is not None and self.envelope.answered is not None:
                self.envelope.answered.add(body)
            self.body_bytes = 0 if self._framing == "none" else len(body)
            self.ended = True
            return
        # What nearly all are: the answer to a whole request. The same, in fewer steps.
        assert not self.started
        self.started = self.ended = True
        self._framing = "length"
        self.body_bytes = size = len(body)
        connection = b"" if self._keep else b"Connection: close\r\n"
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n%b\r\n%b" % (lines, size, connection, body))

    def _head(self, status: int, lines: bytes, length: int | None) -> bytes:
        assert not self.started
        self.started = True
        if self._content is not None and not self._content.is_eof():
            self._keep = False  # the rest of the request will not be read, so no other can follow it
        self._framing, framing = self._frame(status, length)
        if self.envelope is not None:
            self.envelope.replied(status, lines)
        return b"HTTP/1.1 %d %b\r\n%b%b%b\r\n" % (
            status,
            _REASONS.get(status, b"Status"),
            lines,
            framing,
            b"" if self._keep else b"Connection: close\r\n",
        )

    def _frame(self, status: int, length: int | None) -> tuple[Framing, bytes]:
        if status in (204, 304):
            return "none", b""
        if length is not None:
            return "none" if self._head_only else "length", b"Content-Length: %d\r\n" % length
        if self._head_only:
            return "none", b""
        if self._http11:
            return "chunked", b"Transfer-Encoding: chunked\r\n"
        self._keep = False
        return "close", b""

    def write(self, data: bytes) -> None:
        """Bytes of the body, at once."""
        size, transport = len(data), self._transport
        if not size or self._framing == "none":
            return
        self.body_bytes += size
        if self.envelope is not None and self.envelope.answered is not None:
            self.envelope.answered.add(data)
        if transport is not None and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (size, data) if self._framing == "chunked" else data)

    def pass_on(self, data: bytes) -> None:
        """The same for bytes that nobody keeps, of a response whose head is out: what most events are."""
        self.body_bytes += (size := len(data))
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (size, data) if self._framing == "chunked" else data)

    def chunk(self, data: bytes, size: int) -> None:
        """The same for bytes that are framed already, `size` without that; `chunked` has been asked before."""
        self.body_bytes += size
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    @property
    def chunked(self) -> bool:
        return self._framing == "chunked"

    def end(self) -> None:
        """The response is complete."""
        if self._framing == "chunked":
            self._write(b"0\r\n\r\n")
        self.ended = True

    def cut(self) -> None:
        """Ends a response that is not complete: what was written is delivered, the framing's own end never comes."""
        self._keep = False
        if not self.open or self._transport is None:
            return
        self._spoil_end()
        self.protocol.abort_later()
        self._transport.close()

    def abort(self) -> None:
        """Ends the connection now, with whatever it still holds."""
        self._keep = False
        self._spoil_end()
        if self._transport is not None:
            self._transport.abort()

    def _spoil_end(self) -> None:
        """Where the end of the connection means "complete", a client whose response is not gets a reset instead."""
        if self._framing != "close" or self.ended or self._transport is None:
            return
        raw = self._transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    @property
    def keeps(self) -> bool:
        """Whether another request may follow on the connection."""
        return self._keep and self.ended

    def sent(self) -> StreamResponse:
        """What the handler returns to aiohttp."""
        return SENT if self.keeps else SENT_AND_CLOSE

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


_DEFAULTS = {name: getattr(Downstream, name) for name in Downstream.__annotations__}
