"""The vendor's sockets: one handler for all paths, one record per request.

Invariants: a request is recorded before its body is read; `finished` and `client_gone` are never both true; no
face awaits anything, so whatever is awaited here is the network or a delay that was asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl as tls
from collections import deque
from collections.abc import Collection
from email.message import Message
from urllib.parse import parse_qsl, unquote

from aiohttp import hdrs, web

from gproxyd.host.demo import controls, errors, routes
from gproxyd.host.demo.answers import Answer, VendorError
from gproxyd.host.demo.call import Call, Seen, Shelves
from gproxyd.host.demo.form import KEEP, FormReader
from gproxyd.host.demo.send import send, until_cancelled

_JSON_LIMIT = 64 << 20
_HEAD_LIMIT = 1 << 16
_GRACE = 0.1
"""Seconds that running answers get when the vendor stops."""


class DemoVendor:
    """The embedded scripted vendor; the package docstring tells what it serves.

    With `keys`, a request must carry exactly one credential, and it must be one of them. `seen` holds the last
    `remember` requests, oldest first; nothing is remembered by default.
    """

    def __init__(self, *, keys: Collection[str] = (), remember: int = 0) -> None:
        self.seen: deque[Seen] = deque(maxlen=remember)
        self._keys = frozenset(keys)
        self._shelves = Shelves()
        self._runner: web.ServerRunner | None = None
        self._base = ""

    async def start(self, host: str = "127.0.0.1", port: int = 0, *, ssl: tls.SSLContext | None = None) -> str:
        """Listen, and return the base URL, without a trailing slash."""
        assert self._runner is None, "already started"
        server = web.Server(
            self._serve,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=_HEAD_LIMIT,
            max_field_size=_HEAD_LIMIT,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=_GRACE)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=ssl).start()
        bound = self._runner.addresses[0][1]
        name = f"[{host}]" if ":" in host else host
        self._base = f"{'https' if ssl else 'http'}://{name}:{bound}"
        return self._base

    async def stop(self) -> None:
        """Close the listener and every connection; harmless when not started."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request.raw_path.encode("utf-8", "surrogateescape")
        seen = Seen(request.method, target, list(request.raw_headers))
        self.seen.append(seen)
        call = self._call(request, seen)
        try:
            response = await self._exchange(request, call)
        except asyncio.CancelledError:
            # With the transport still there it is the vendor that stops, not the peer that has left.
            seen.client_gone = request.transport is None and not call.dropped
            raise
        except ConnectionError:
            # A write found the transport closing; the cancellation that goes with it is on its way.
            seen.client_gone = not call.dropped
            await until_cancelled()
        seen.finished = True
        return response

    async def _exchange(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        try:
            await _read_body(request, call)
            answer = self._answer(call)
        except VendorError as error:
            answer = errors.render(error, call)
        if call.controls.delay:
            await asyncio.sleep(call.controls.delay)
        return await send(request, call, answer)

    def _call(self, request: web.BaseRequest, seen: Seen) -> Call:
        encoded, _, query = request.raw_path.partition("?")
        path = unquote(encoded)
        headers = {name.lower(): value for name, value in request.headers.items()}
        return Call(
            method=request.method,
            path=path,
            query=dict(parse_qsl(query, keep_blank_values=True)),
            headers=headers,
            seen=seen,
            dialect=routes.dialect_of(path, headers),
            shelves=self._shelves,
            base=self._base,
        )

    def _answer(self, call: Call) -> Answer:
        call.controls = controls.read(call.headers)
        credentials = _credentials(call)
        credential = credentials[0] if credentials else ""
        if self._keys and (len(credentials) != 1 or credential not in self._keys):
            raise errors.unauthorized(credential)
        if call.controls.status is not None:
            raise errors.scripted(call.controls.status, credential)
        try:
            return routes.answer(call)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # The faces read their JSON as if every value had its documented type.
            raise VendorError(400, "Invalid type for a value in the body of your request.") from error


async def _read_body(request: web.BaseRequest, call: Call) -> None:
    """Read all of the body, in pieces, into the call and its record. Raises VendorError (413) for endless JSON."""
    await _continue(request, call)
    seen, kept, digest = call.seen, bytearray(), hashlib.sha256()
    kind = call.headers.get("content-type", "")
    form = _form_reader(kind)
    limit = _JSON_LIMIT if "json" in kind else KEEP
    try:
        async for data in request.content.iter_any():
            seen.body_bytes += len(data)
            digest.update(data)
            kept += data[: limit - len(kept)]
            if form is not None:
                form.feed(data)
    finally:
        seen.body_sha256 = digest.hexdigest()
        seen.body = bytes(kept) if seen.body_bytes <= KEEP else b""
    if "json" in kind and seen.body_bytes > limit:
        raise VendorError(413, "Maximum content size limit exceeded.")
    call.body = bytes(kept)
    if form is not None:
        if not form.complete:
            raise VendorError(400, "Could not parse multipart form: the closing boundary is missing.")
        call.form = tuple(form.parts)


async def _continue(request: web.BaseRequest, call: Call) -> None:
    """Say 100 Continue to a client that waits for it (RFC 9110, section 10.1.1), as curl does with large bodies."""
    if call.headers.get("expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # aiohttp refuses to send a response head after the writer has sent anything.
        request.writer.output_size = 0


def _form_reader(content_type: str) -> FormReader | None:
    head = Message()
    head["content-type"] = content_type
    boundary = head.get_boundary() if head.get_content_type() == "multipart/form-data" else None
    return None if boundary is None else FormReader(boundary.encode())


def _credentials(call: Call) -> list[str]:
    """Every credential the request carries, in whatever place."""
    found = [value.removeprefix("Bearer ") for value in call.seen.header(hdrs.AUTHORIZATION)]
    for name in ("x-api-key", "x-goog-api-key", "api-key"):
        found += call.seen.header(name)
    return [*found, call.query["key"]] if "key" in call.query else found
