"""Whether what came through the door is spoken here, and what it is told if not."""

from __future__ import annotations

import socket
from http import HTTPStatus
from itertools import chain

from aiohttp.hdrs import TRANSFER_ENCODING
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.errors import Refusal
from gproxyd.gateway.sent import date_line

MAX_HEAD = 64 * 1024
"""Bytes of all header lines of a request together."""

_PEER_LEFT = frozenset({7, 8})  # TCP_CLOSE, TCP_CLOSE_WAIT (include/net/tcp_states.h)


def is_fit(message: RawRequestMessage) -> bool:
    """Whether a request that a parser let through is one that is spoken here: HTTP/1.0 or 1.1, not too large, and
    framed by nothing but `chunked`, which HTTP/1.0 does not know (RFC 9112 section 6.1)."""
    lines = message.raw_headers
    if message.version != HttpVersion11 and message.version != HttpVersion10:
        return False
    coding = message.headers.get(TRANSFER_ENCODING)
    if coding is not None and (coding.lower() != "chunked" or not coding.isascii() or message.version == HttpVersion10):
        return False
    return len(lines) < 4 or sum(map(len, chain.from_iterable(lines))) <= MAX_HEAD


CROWDED = Refusal("overloaded", "too many connections are open")
MALFORMED = Refusal("invalid_request", "the request is not valid HTTP/1.1")


def answer(error: Refusal, lines: bytes, request_id: str) -> bytes:
    """A whole answer for somebody whose dialect is not known, on a connection that ends with it."""
    body = DIALECTS["openai_chat"].error_body(error, request_id)
    head = b"HTTP/1.1 %d %b\r\n" % (error.status, HTTPStatus(error.status).phrase.encode("ascii"))
    framing = b"Content-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    return head + date_line() + lines + framing + body


def has_left(raw: socket.socket | None) -> bool:
    """Whether the peer has ended its side (tcp(7), TCP_INFO)."""
    if raw is None or raw.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    state: int = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state in _PEER_LEFT
