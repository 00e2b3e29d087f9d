"""Whether what came through the door is spoken here, and what it is told if not."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from itertools import chain

from aiohttp.hdrs import CONTENT_LENGTH, TRANSFER_ENCODING
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web import RequestPayloadError
from aiohttp.web_protocol import _ErrInfo

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.errors import Refusal
from gproxyd.gateway.sent import date_line

MAX_LINE = 16 * 1024
"""Bytes of a request's target, and of a header's name and value together, about."""

MAX_LINES = 128
"""Header lines of a request."""

MAX_HEAD = 64 * 1024
"""Bytes of all header lines of a request together."""

MOST_OF_A_HEAD = MAX_HEAD + MAX_LINE + 8 * MAX_LINES
"""Bytes of a head that is not complete yet, beyond which it cannot become one that is fit."""


def unfit(message: RawRequestMessage) -> int:
    """0 if a request that a parser let through is one that is spoken here: HTTP/1.0 or 1.1, not too large (else 431),
    framed by nothing but `chunked`, which HTTP/1.0 does not know (RFC 9112 section 6.1; else 400)."""
    lines = message.raw_headers
    if message.version != HttpVersion11 and message.version != HttpVersion10:
        return 400
    coding = message.headers.get(TRANSFER_ENCODING)
    if coding is not None and (coding.lower() != "chunked" or not coding.isascii() or message.version == HttpVersion10):
        return 400
    return 0 if len(lines) < 4 or sum(map(len, chain.from_iterable(lines))) <= MAX_HEAD else 431


def fault(error: BaseException, seen: bytes) -> int:
    """The status for what has broken the parser: 431 if a line of the head that `seen` begins with is too long, or
    there are too many of them. (What is too long behind that head is malformed: a trailer, the size of a chunk.)"""
    head, end, _ = seen.lstrip(b"\r\n").partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    if isinstance(error, LineTooLong):  # which of a line's parts the parser adds up is its own affair
        return 431 if not end or max(map(len, lines)) > MAX_LINE // 2 else 400
    return 431 if type(error) is BadHttpMessage and len(lines) >= MAX_LINES else 400


def broken(status: int) -> tuple[_ErrInfo, StreamReader]:
    """What aiohttp's task finds in its queue where no request is. Nothing of the peer's is in it."""
    return _ErrInfo(status, BadHttpMessage(""), ""), EMPTY_PAYLOAD


UNKNOWN = -1


def owed_after(owed: int, data: bytes, begun: int, message: RawRequestMessage | None) -> int:
    """Bytes until the parser that took `data` stands between two requests again; UNKNOWN where nobody can say.

    `owed` is what it was before, `begun` how many requests began in `data`, `message` the last of them. The parser
    does not tell, so it is counted; and whatever is not one whole head and at most its body is UNKNOWN for good.
    """
    if not data and not begun:
        return owed  # aiohttp asks its parser whether it holds anything back
    if owed:
        return max(owed - len(data), UNKNOWN) if owed > 0 and not begun else UNKNOWN
    if begun != 1 or message is None or message.chunked or message.upgrade:
        return UNKNOWN
    end = data.find(b"\r\n\r\n") + 4
    if data.count(b"\r\n", 0, end) != len(message.raw_headers) + 2:
        return UNKNOWN
    length = message.headers.get(CONTENT_LENGTH, "0")
    return max(end + int(length) - len(data), UNKNOWN) if length.isdecimal() else UNKNOWN


def fail_body(body: StreamReader, loop: asyncio.AbstractEventLoop) -> None:
    """A body that is being read turned out to be malformed."""
    if body._eof or body.exception() is not None:
        return
    error = RequestPayloadError("the body is malformed")
    body.set_exception(error)
    # A reader that a chunk's end has woken in this very turn does not look before it waits again.
    loop.call_soon(body.set_exception, error)


CROWDED = Refusal("overloaded", "too many connections are open")
REFUSALS = {
    400: Refusal("invalid_request", "the request is not valid HTTP/1.1"),
    431: Refusal("headers_too_large", "the request line or the header lines are too long, or too many"),
}


def answer(error: Refusal, lines: bytes, request_id: str) -> bytes:
    """A whole answer for somebody whose dialect is not known, on a connection that ends with it."""
    body = DIALECTS["openai_chat"].error_body(error, request_id)
    head = b"HTTP/1.1 %d %b\r\n" % (error.status, HTTPStatus(error.status).phrase.encode("ascii"))
    framing = b"Content-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    return head + date_line() + lines + framing + body
