"""Attempts at an upstream: a connection, a credential, the request; the answer is the relay's.

Invariants:
- a request is sent again at most once, only on a connection that had been used before, only if not one byte of an
  answer came, and only if the upstream provably did not read it (or the method is safe);
- whoever leaves, client or gateway, the upstream's connection is aborted at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway.books import Books
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.intake import Body
from gproxyd.gateway.relay import Relay
from gproxyd.gateway.route import Route
from gproxyd.observe.journal import Journal
from gproxyd.routing.credentials import Credential
from gproxyd.upstream.connection import Connection
from gproxyd.upstream.deadlines import Deadlines
from gproxyd.upstream.pool import Pool

MOST_DRAINING = 64
"""Answers that are heard to their end for nobody, all at once."""

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Exchanges:
    """Carries requests out. `relays` are those whose answer is under way."""

    def __init__(
        self, pool: Pool, deadlines: Deadlines, books: Books, journal: Journal, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.pool = pool
        self._books = books
        self._draining = 0
        self._deadlines = deadlines
        self._journal = journal
        self.loop = self._loop = loop
        self.relays: set[Relay] = set()

    async def run(self, route: Route, body: Body, call: Call, down: Downstream) -> None:
        """One request, from its route to its last byte. Raises Refusal if nothing of an answer has left yet."""
        provider, origin = route.provider, route.face.origin
        credential = provider.credentials.take()
        head = route.head_for(credential, body.length, call.method)
        connection = self.pool.idle(origin, provider.proxy)
        if call.envelope is not None:
            call.envelope.forwarded(call.method, f"{origin}{head.split(b' ', 2)[1].decode('ascii')}", head)
            if call.envelope.sent is not None:
                body.watch(call.envelope.sent.add)
        try:
            while True:
                call.attempts += 1
                reused = connection is not None
                if connection is None:
                    connection = await self.pool.fresh(origin, provider.proxy, provider.timeouts.connect)
                try:
                    await self._attempt(connection, credential, head, route, body, call, down)
                    break
                except UpstreamError as error:
                    if not (reused and body.data is not None and may_repeat(error, connection, call.method)):
                        raise
                connection = None
        except UpstreamError as error:
            raise self.refusal(error, route, credential, call) from error
        self.succeeded(route, credential, connection)

    def succeeded(self, route: Route, credential: Credential, connection: Connection) -> None:
        """The key was good, and so may the connection be."""
        route.provider.credentials.accepted(credential)
        self.pool.put_back(connection, route.face.origin, route.provider.proxy)

    def launch(
        self,
        connection: Connection,
        route: Route,
        call: Call,
        down: Downstream,
        over: Callable[[UpstreamError | None], None],
    ) -> Relay:
        """The next answer on this connection goes to the client; `over` hears of its end. `land` must follow that."""
        relay = Relay(call, down, connection, route, self._books, self._loop, over)
        connection.begin(call.method, relay)
        self.watch(relay)
        return relay

    def watch(self, relay: Relay) -> None:
        """An answer is under way, and may take too long."""
        self.relays.add(relay)
        if len(self.relays) == 1:
            self._deadlines.watch(self)

    def land(self, relay: Relay) -> None:
        self.relays.discard(relay)
        relay.detach()

    def tick(self, now: float) -> None:
        """Released here and not when the last answer ends, because the next one is about to begin."""
        for relay in tuple(self.relays):
            relay.tick(now)
        if not self.relays:
            self._deadlines.release(self)

    def abandon(self, relay: Relay, connection: Connection, route: Route, credential: Credential, call: Call) -> None:
        """The client has left: the upstream's work ends, unless it is to be heard to its end for the bill's sake."""

        def over(error: UpstreamError | None) -> None:
            self._draining -= 1
            self.land(relay)
            if error is None:
                self.succeeded(route, credential, connection)
            else:
                connection.abort()
            self._books.close(call, relay.body_bytes)
            self._books.keep(call)

        if call.heard_out and self._draining < MOST_DRAINING and relay.drain(over):
            self._draining += 1
            call.draining = True
            call.outcome, call.status = "client_gone", call.status or 499
            return
        self.land(relay)
        connection.abort()

    async def _attempt(
        self,
        connection: Connection,
        credential: Credential,
        head: bytes,
        route: Route,
        body: Body,
        call: Call,
        down: Downstream,
    ) -> None:
        done: asyncio.Future[None] = self._loop.create_future()

        def over(error: UpstreamError | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        relay = self.launch(connection, route, call, down, over)
        try:
            if body.data is not None:
                connection.write(head + body.data)
                connection.request_sent()
                relay.request_sent()
                await done
            else:
                connection.write(head)
                await self._upload(connection, body, relay, done, down)
        except asyncio.CancelledError:
            self.abandon(relay, connection, route, credential, call)
            raise
        except BaseException:
            connection.abort()
            raise
        finally:
            if not call.draining:
                self.land(relay)
            if done.done() and not done.cancelled():
                done.exception()  # looked at, should the client have left in the same moment

    async def _upload(
        self, connection: Connection, body: Body, relay: Relay, done: asyncio.Future[None], down: Downstream
    ) -> None:
        """Sends a streamed body while the answer may come already. An early answer ends the upload."""
        relay.upload_begins()
        upload = self._loop.create_task(_send(connection, body, relay))
        try:
            await asyncio.wait((upload, done), return_when=asyncio.FIRST_COMPLETED)
            if upload.done():
                upload.result()
                await done
            else:
                done.result()
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

    def refusal(self, error: UpstreamError, route: Route, credential: Credential, call: Call) -> Refusal:
        """What the client is told of a failure. A refused key is parked, and the administrator hears of it."""
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


def may_repeat(error: UpstreamError, connection: Connection, method: str) -> bool:
    """Only a connection that had died unnoticed is worth another try: not one that was too slow, or is shut down."""
    died = error.reason in ("closed", "reset") and not connection.answered
    return died and (method in _SAFE or connection.unread_by_peer)
