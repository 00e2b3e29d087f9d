"""The way out: an `Answer` put on the wire as its controls ask, or broken off where they say."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from aiohttp import web

from gproxyd.host.demo.answers import Answer
from gproxyd.host.demo.call import CREATED_RFC3339, Call, Dialect
from gproxyd.host.demo.controls import BEFORE_HEAD, Controls

_SETTLE = 0.02
"""Seconds that bytes already written get to leave the machine before a reset takes them back."""


async def send(request: web.BaseRequest, call: Call, answer: Answer) -> web.StreamResponse:
    """Write the whole of `answer`; where the controls end it early, end in the handler's cancellation."""
    controls = call.controls
    if controls.fail_after == BEFORE_HEAD:
        await _break_off(request, call)
    response = web.StreamResponse(status=answer.status, headers=_head(call, answer))
    pieces = answer.pieces
    if _length_is_told(answer, controls):
        pieces = list(pieces)
        response.content_length = sum(map(len, pieces))
    await response.prepare(request)
    if call.method != "HEAD":
        out = _Cutter(response, controls.chunk)
        if answer.streamed:
            await _send_events(request, out, replace(answer, pieces=pieces), call)
        else:
            await _send_plain(request, out, b"".join(pieces), call)
        await out.flush()
    await response.write_eof()
    return response


class _Cutter:
    """Writes bytes on, re-cut into pieces of `size` if that is given. Each write is one HTTP chunk."""

    def __init__(self, response: web.StreamResponse, size: int | None) -> None:
        self._response = response
        self._size = size
        self._held = bytearray()

    async def write(self, data: bytes) -> None:
        if self._size is None:
            # An empty chunk would be the last one (RFC 9112, section 7.1).
            if data:
                await self._response.write(data)
            return
        self._held += data
        while len(self._held) >= self._size:
            cut = bytes(self._held[: self._size])
            del self._held[: self._size]
            await self._response.write(cut)
            await asyncio.sleep(0)

    async def flush(self) -> None:
        if self._held:
            await self._response.write(bytes(self._held))
            self._held.clear()


async def until_cancelled() -> NoReturn:
    """Wait for the handler's end: aiohttp cancels it when the connection is lost.

    Anything else would make aiohttp write: a returned response is ended properly, an exception becomes a 500.
    """
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _send_events(request: web.BaseRequest, out: _Cutter, answer: Answer, call: Call) -> None:
    controls, sent = call.controls, 0
    for piece in answer.pieces:
        if sent == controls.fail_after:
            break
        if sent and controls.event_delay:
            await asyncio.sleep(controls.event_delay)
        await out.write(piece)
        sent += 1
    if sent != controls.fail_after:
        return
    if controls.fail == "error" and answer.error is not None:
        await out.write(answer.error(sent))
        return
    await out.flush()
    await _break_off(request, call)


async def _send_plain(request: web.BaseRequest, out: _Cutter, body: bytes, call: Call) -> None:
    most = call.controls.fail_after
    await out.write(body if most is None else body[:most])
    if most is not None and most <= len(body):
        await out.flush()
        await _break_off(request, call)


async def _break_off(request: web.BaseRequest, call: Call) -> NoReturn:
    """End the exchange without ending the answer. A stall lasts until the peer leaves."""
    how, transport = call.controls.fail, request.transport
    if how == "stall" or transport is None:
        await until_cancelled()
    call.dropped = True
    if how == "reset":
        await asyncio.sleep(_SETTLE)
        # SO_LINGER of zero seconds makes close() send RST instead of FIN (socket(7)).
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
    await until_cancelled()


def _length_is_told(answer: Answer, controls: Controls) -> bool:
    if controls.known_length:
        return controls.fail != "error"
    return not (answer.streamed or answer.chunked or controls.chunk)


def _head(call: Call, answer: Answer) -> dict[str, str]:
    kind = answer.content_type
    if call.dialect == "gemini" and kind == "application/json":
        kind = "application/json; charset=UTF-8"
    return {
        "content-type": kind,
        "server": "gproxyd-demo",
        _REQUEST_ID[call.dialect]: call.ident("req_demo_"),
        **_VENDOR[call.dialect],
        **answer.headers,
    }


_REQUEST_ID: Mapping[Dialect, str] = {"openai": "x-request-id", "anthropic": "request-id", "gemini": "x-request-id"}

_VENDOR: Mapping[Dialect, Mapping[str, str]] = {
    "openai": {
        "openai-organization": "org-demo",
        "openai-processing-ms": "12",
        "openai-version": "2020-10-01",
        "x-ratelimit-limit-requests": "10000",
        "x-ratelimit-limit-tokens": "2000000",
        "x-ratelimit-remaining-requests": "9999",
        "x-ratelimit-remaining-tokens": "1999000",
        "x-ratelimit-reset-requests": "6ms",
        "x-ratelimit-reset-tokens": "30ms",
    },
    "anthropic": {
        "anthropic-organization-id": "00000000-0000-4000-8000-000000000000",
        "anthropic-ratelimit-requests-limit": "4000",
        "anthropic-ratelimit-requests-remaining": "3999",
        "anthropic-ratelimit-requests-reset": CREATED_RFC3339,
        "anthropic-ratelimit-tokens-limit": "400000",
        "anthropic-ratelimit-tokens-remaining": "399000",
        "anthropic-ratelimit-tokens-reset": CREATED_RFC3339,
    },
    "gemini": {
        "server-timing": "gfet4t7; dur=12",
        "vary": "Origin, X-Origin, Referer",
        "x-content-type-options": "nosniff",
    },
}
