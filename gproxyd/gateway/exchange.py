"""Attempts at an upstream: a connection, a credential, the request; the answer is the relay's.

Invariants:
- a request is sent again at most once, only on a connection that had been used before, only if not one byte of an
  answer came, and only if the upstream provably did not read it (or the method is safe);
- whoever leaves, client or gateway, the upstream's connection is aborted at once.
"""

from __future__ import annotations

import asyncio

from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.intake import Body
from gproxyd.gateway.relay import Manner, Relay
from gproxyd.gateway.route import Route
from gproxyd.observe.journal import Journal
from gproxyd.routing.credentials import Credential
from gproxyd.upstream.connection import Connection
from gproxyd.upstream.deadlines import Deadlines
from gproxyd.upstream.pool import Pool
from gproxyd.vendors import auth
from gproxyd.wire.headers import Headers, request_lines
from gproxyd.wire.http1 import request_head

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_UNDERSTOOD = frozenset({"json", "path", "path+body"})


class Exchanges:
    """Carries requests out. `relays` are those whose answer is under way."""

    def __init__(self, pool: Pool, deadlines: Deadlines, journal: Journal, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._deadlines = deadlines
        self._journal = journal
        self._loop = loop
        self.relays: set[Relay] = set()

    async def run(
        self, route: Route, method: str, headers: Headers, call: Call, down: Downstream, keepalive: float
    ) -> None:
        """One request, from its route to its last byte. Raises Refusal if nothing of an answer has left yet."""
        provider = route.provider
        manner = Manner(
            dialect=route.dialect,
            shown=route.shown,
            hold=_held(route) and method != "HEAD",
            redirects=call.form == "raw",
            keepalive=keepalive,
            refusals=provider.refusals if route.face.auth != "none" else (),
        )
        credential = provider.credentials.take()
        head = _head(route, method, headers, credential)
        connection = self._pool.idle(route.face.origin, provider.proxy)
        try:
            while True:
                call.attempts += 1
                reused = connection is not None
                if connection is None:
                    connection = await self._pool.fresh(route.face.origin, provider.proxy, provider.timeouts.connect)
                try:
                    await self._attempt(connection, head, route, method, call, down, manner)
                    break
                except UpstreamError as error:
                    if not (reused and _may_repeat(error, connection, method, route.body)):
                        raise
                connection = None
        except UpstreamError as error:
            raise self._refusal(error, route, credential, call) from error
        provider.credentials.accepted(credential)
        self._pool.put_back(connection, route.face.origin, provider.proxy)

    async def _attempt(
        self,
        connection: Connection,
        head: bytes,
        route: Route,
        method: str,
        call: Call,
        down: Downstream,
        manner: Manner,
    ) -> None:
        relay = Relay(call, down, connection, manner, route.provider.timeouts, self._loop)
        connection.begin(method, relay)
        self._deadlines.watch(relay)
        self.relays.add(relay)
        try:
            if route.body.data is not None:
                connection.write(head + route.body.data)
                connection.request_sent()
                relay.request_sent()
                await relay.done
            else:
                connection.write(head)
                await self._upload(connection, route.body, relay, down)
        except BaseException:
            connection.abort()
            raise
        finally:
            self.relays.discard(relay)
            self._deadlines.release(relay)
            relay.detach()

    async def _upload(self, connection: Connection, body: Body, relay: Relay, down: Downstream) -> None:
        """Sends a streamed body while the answer may come already. An early answer ends the upload."""
        relay.upload_begins()
        upload = self._loop.create_task(_send(connection, body, relay))
        try:
            await asyncio.wait((upload, relay.done), return_when=asyncio.FIRST_COMPLETED)
            if upload.done():
                upload.result()
                await relay.done
            else:
                relay.done.result()
        except Refusal:
            if down.ended:
                return
            if down.started:
                relay.failed(UpstreamError("client_body", "the request's body broke off", code="invalid_request"))
                return
            raise
        finally:
            if not upload.done():
                upload.cancel()
                await asyncio.wait((upload,))
            if not upload.cancelled():
                upload.exception()  # looked at: what a client that left did to it is nobody's news

    def _refusal(self, error: UpstreamError, route: Route, credential: Credential, call: Call) -> Refusal:
        call.blame(error)
        if error.reason == "auth":
            route.provider.credentials.park(credential)
            self._journal.record(
                "error",
                "credential_refused",
                provider=route.provider.name,
                credential=repr(credential.key),
                request_id=call.id,
                help="the vendor refused this key: renew the secret and reload",
            )
        return error.refusal()


async def _send(connection: Connection, body: Body, relay: Relay) -> None:
    assert body.pieces is not None
    chunked = body.length is None
    async for piece in body.pieces:
        connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        relay.upload_moved()
        if connection.writing_paused:
            await connection.drained()
            relay.upload_moved()
        if not connection.open:
            return  # the relay hears why
    if chunked:
        connection.write(b"0\r\n\r\n")
    connection.request_sent()
    relay.request_sent()


def _may_repeat(error: UpstreamError, connection: Connection, method: str, body: Body) -> bool:
    """Only a connection that had died unnoticed is worth another try: not one that was too slow, or is shut down."""
    whole = body.data is not None and error.reason in ("closed", "reset")
    return whole and not connection.answered and (method in _SAFE or connection.unread_by_peer)


def _head(route: Route, method: str, headers: Headers, credential: Credential) -> bytes:
    """The request's head: what may pass of the client's lines, the provider's own, its key, and the framing."""
    provider, body, face = route.provider, route.body, route.face
    understood = _must_be_read(route)
    drop = provider.own_or_coding if understood else provider.header_names
    key = credential.key.reveal() if credential.key is not None else ""
    if body.length is None:
        framing = b"Transfer-Encoding: chunked\r\n"
    elif body.length or method not in _BODILESS:
        framing = b"Content-Length: %d\r\n" % body.length
    else:
        framing = b""
    return request_head(
        method,
        route.target,
        face.authority,
        b"Accept-Encoding: identity\r\n" if understood else b"",
        request_lines(headers, rewritten=body.rewritten, drop=drop),
        provider.header_lines,
        auth.attach(face.auth if key else "none", key, face.origin, provider.origins),
        framing,
    )


def _held(route: Route) -> bool:
    """Whether a small JSON answer waits until it is whole: not where it grows, nor where it is somebody's file."""
    operation = route.operation
    if operation is None or operation.model == "none":
        return False
    return not operation.growing or b"alt=sse" in route.target  # events were asked for, so JSON does not grow


def _must_be_read(route: Route) -> bool:
    """Whether the gateway has to understand the answer, so that no content coding may hide it."""
    return route.shown is not None or (route.operation is not None and route.operation.model in _UNDERSTOOD)
