"""An attempt at an upstream: a connection, a credential, the request; the answer is the relay's.

Invariants:
- an attempt is made again at most once, only on a connection that had been used before, only if not one byte of an
  answer came, and only if the upstream provably did not read it (or the method is safe);
- whoever leaves, client or gateway, the upstream's connection is aborted at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from itertools import islice

from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway.attempts import Attempt, Gates, Passage, Tried
from gproxyd.gateway.books import Books
from gproxyd.gateway.call import Call
from gproxyd.gateway.doorstep import DoorProtocol
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.homing import Homes, Listener
from gproxyd.gateway.intake import Body
from gproxyd.gateway.relay import Relay
from gproxyd.gateway.route import Route
from gproxyd.gateway.trial import BadAnswer, Trial
from gproxyd.gateway.walk import Walk
from gproxyd.observe.journal import Journal
from gproxyd.routing.agents import Place
from gproxyd.routing.breaker import State
from gproxyd.routing.credentials import Credential
from gproxyd.routing.health import Registry
from gproxyd.routing.retries import Fault, fault_of_reason, fault_of_status
from gproxyd.upstream.connection import Connection, ResponseSink
from gproxyd.upstream.deadlines import Deadlines
from gproxyd.upstream.pool import Pool
from gproxyd.vendors import oauth

MOST_DRAINING = 64
"""Answers that are heard to their end for nobody, all at once."""

MOST_A_TICK = 1000
"""Answers that are looked at in one tick; where there are more, each is looked at as many ticks less often."""

AT_ONCE = 256 * 1024
"""Bytes of a body that go to an upstream at once. A longer one goes in pieces, as they are taken: copied, or encrypted,
at a stretch it would hold up everybody else."""

MOST_TRIED = 1024
"""Requests that are on their way from the short way to the long one, all at once."""

OnTrial = Callable[[], None]
"""Hears that an answer was accepted."""

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Exchanges:
    """Carries requests out. `relays` are those whose answer is under way."""

    def __init__(
        self, pool: Pool, deadlines: Deadlines, books: Books, journal: Journal, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.pool = pool
        self.books = self._books = books
        self.registry = Registry(self._turned)
        self.homes: Homes | None = None
        self.gates = Gates(books.limiter)
        books.stats.sources.circuit_breakers = lambda: self.registry.statsz(_ahead)
        self._tried: dict[DoorProtocol, Tried] = {}
        self._trials: set[Trial] = set()
        self._draining = 0
        self._deadlines = deadlines
        self._journal = journal
        self.loop = self._loop = loop
        self.relays: set[Relay] = set()
        self._round: Iterator[Relay] = iter(())  # who is still to be looked at before those who were seen already
        self._whole: list[tuple[Relay, Call, bytes]] = []  # answers that leave at the end of this turn of the loop

    async def run(self, passage: Passage, call: Call, down: Downstream) -> None:
        """One request, from its plan to its last byte. Raises Refusal if nothing of an answer has left yet."""
        await Walk(self, passage, call, down).run()

    async def carry(self, attempt: Attempt) -> None:
        """One attempt. Raises UpstreamError if nothing of an answer has left yet."""
        route, call = attempt.route, attempt.call
        provider, origin = route.provider, route.face.origin
        connection = self.pool.idle(origin, provider.proxy)
        call.attempts += 1
        while True:
            reused = connection is not None
            head = attempt.head if call.trace is None else route.traced(call.trace, attempt.head)
            if call.envelope is not None:
                call.envelope.forwarded(call.method, str(origin), head, attempt.body)
            try:
                if connection is None:
                    connection = await self.pool.fresh(origin, provider.proxy, provider.timeouts.connect)
                await self._attempt(connection, attempt, head)
                break
            except UpstreamError as error:
                if call.trace is not None:
                    call.trace.failed(error.reason, call.upstream_status)
                may = reused and connection is not None and attempt.body.data is not None
                if not may or connection is None or not may_repeat(error, connection, call.method):
                    raise
            connection = None
            call.attempts += 1
        self.pool.put_back(connection, origin, provider.proxy)

    def took(self, route: Route, credential: Credential, call: Call) -> None:
        """What an answer on the short way says of the upstream: nothing that would cost anything, if all is well."""
        if call.upstream_status < 400 and call.outcome == "ok" and not route.health.troubled:
            return
        now = self.registry.clock()
        if call.outcome in ("upstream_error", "upstream_timeout"):
            route.health.failed(credential, Fault("broken", call.reason or "broken"), now)
        elif call.outcome == "ok":
            fault = fault_of_status(call.upstream_status, None)
            if fault is None:
                route.health.succeeded(credential, now)
            else:
                route.health.failed(credential, fault, now)

    def sink(self, relay: Relay, route: Route, call: Call, passed: OnTrial | None = None) -> ResponseSink:
        """What a connection gives its answer to: the relay, or what stands before it where the answer is on trial or
        tells of things whose home is to be remembered."""
        sink: ResponseSink = relay
        if route.judged or passed is not None:
            sink = trial = Trial(relay, route, self.loop.time, passed or _nothing)
            if route.window:
                self._trials.add(trial)
        if route.listened and self.homes is not None:
            sink = Listener(sink, route, call.method, self.homes)
        return sink

    def goes_on(
        self, error: UpstreamError, protocol: DoorProtocol, route: Route, credential: Credential, call: Call
    ) -> bool:
        """Whether a request whose first attempt was made on the short way goes on along the long one, which then knows
        of that attempt: where another target may answer, and where the first one could not even be reached."""
        fault = error.fault if isinstance(error, BadAnswer) else fault_of_reason(error.reason)
        if not (route.judged or call.sent_at is None) or not fault.retryable:
            return False
        self.note(error, route, credential, call)
        route.health.failed(credential, fault, self.registry.clock())
        if len(self._tried) >= MOST_TRIED:
            self._tried.clear()  # whoever left meanwhile
        self._tried[protocol] = Tried(call.attempts, Place(route.health.provider, route.health.model), error, fault)
        return True

    def stays(self, protocol: DoorProtocol) -> None:
        """It does not go on, after all."""
        self._tried.pop(protocol, None)

    def tried(self, protocol: DoorProtocol) -> Tried | None:
        """The attempts that the request on that connection has behind it."""
        return self._tried.pop(protocol, None)

    def _turned(self, label: str, state: State) -> None:
        """A breaker has entered another state."""
        self._books.stats.breaker_turned(label, state)
        self._journal.record("info" if state == "closed" else "warning", "circuit_breaker", target=label, state=state)

    def launch(
        self,
        connection: Connection,
        route: Route,
        call: Call,
        down: Downstream,
        over: Callable[[UpstreamError | None], None],
        trial: OnTrial | None = None,
        begun: Callable[[], None] | None = None,
    ) -> Relay:
        """The next answer on this connection goes to the client, perhaps after a trial; `over` hears of its end, before
        that `begun` that its head has left, if it is not whole at once. `land` must follow the end."""
        relay = Relay(call, down, connection, route, self._books, self._loop, over, self.finish)
        relay.begun = begun
        connection.begin(call.method, self.sink(relay, route, call, trial))
        self.watch(relay)
        return relay

    def watch(self, relay: Relay) -> None:
        """An answer is under way, and may take too long."""
        self.relays.add(relay)
        if len(self.relays) == 1:
            self._deadlines.watch(self)

    def finish(self, relay: Relay, call: Call, body: bytes) -> None:
        """A whole answer is here. All that came in one turn of the loop are booked with one write, and then leave."""
        self._whole.append((relay, call, body))
        if len(self._whole) == 1:
            self._loop.call_soon(self._finish_all)

    def _finish_all(self) -> None:
        whole, self._whole = self._whole, []
        closed: list[tuple[Relay, bytes]] = []
        with self._books.together():
            for relay, call, body in whole:
                if not relay.wanted:
                    continue  # its client has left meanwhile, and that has been seen to
                try:
                    self._books.close(call, len(body))
                except Exception as bug:  # noqa: BLE001 - one request's bug ends that request only
                    self._bug(relay, bug)
                else:
                    closed.append((relay, body))
        for relay, body in closed:
            try:
                relay.deliver(body)
            except Exception as bug:  # noqa: BLE001 - the same
                self._bug(relay, bug)

    def _bug(self, relay: Relay, bug: Exception) -> None:
        relay.failed(UpstreamError("bug", "the gateway failed over this answer", code="internal_error"))
        self._loop.call_exception_handler({"message": "an answer met a bug", "exception": bug})

    def land(self, relay: Relay) -> None:
        self.relays.discard(relay)
        relay.detach()

    def tick(self, now: float) -> None:
        """Released here and not when the last answer ends, because the next one is about to begin."""
        for relay in self._next_ones():
            relay.tick(now)
        for trial in tuple(self._trials):
            trial.tick(now)
            if trial.over:
                self._trials.discard(trial)
        if not self.relays:
            self._deadlines.release(self)

    def _next_ones(self) -> tuple[Relay, ...]:
        """Ten thousand that are silent must not keep a processor busy."""
        if len(self.relays) <= MOST_A_TICK:
            self._round = iter(())
            return tuple(self.relays)
        turn = tuple(islice(self._round, MOST_A_TICK))
        if len(turn) < MOST_A_TICK:
            self._round = iter(tuple(self.relays))
        return turn

    def abandon(self, relay: Relay, connection: Connection, route: Route, credential: Credential, call: Call) -> None:
        """The client has left: the upstream's work ends, unless it is to be heard to its end for the bill's sake."""

        def over(error: UpstreamError | None) -> None:
            self._draining -= 1
            self.land(relay)
            if error is None:
                self.pool.put_back(connection, route.face.origin, route.provider.proxy)
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

    async def _attempt(self, connection: Connection, attempt: Attempt, head: bytes) -> None:
        credential, _, route, body, call, down, passed, begun = attempt
        done: asyncio.Future[None] = self._loop.create_future()

        def over(error: UpstreamError | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        relay = self.launch(connection, route, call, down, over, passed, begun)
        try:
            if body.data is not None and len(body.data) <= AT_ONCE:
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
        except BadAnswer:
            self.pool.put_back(connection, route.face.origin, route.provider.proxy)  # it may have been heard in full
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
        """What the client is told of a failure on the short way, which says something of the upstream, too."""
        call.blame(error)
        self.note(error, route, credential, call)
        fault = error.fault if isinstance(error, BadAnswer) else fault_of_reason(error.reason)
        if fault.retryable:
            route.health.failed(credential, fault, self.registry.clock())
        return error.refusal()

    def note(self, error: UpstreamError, route: Route, credential: Credential, call: Call) -> None:
        """An attempt has failed. Of a refused key the administrator hears; its plan parks it."""
        self._books.stats.upstream_error(route.provider.name, error.reason)
        if error.reason == "auth":
            if isinstance(credential.key, oauth.ServiceAccount):
                credential.key.forget()
            self._journal.record(
                "error",
                "credential_refused",
                provider=route.provider.name,
                credential=repr(credential.key),
                request_id=call.id,
                help="the vendor refused this key: renew the secret and reload",
            )


def _ahead(seconds: float) -> str:
    """The moment that lies so many seconds ahead, as RFC 3339 writes it."""
    return datetime.fromtimestamp(time.time() + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _nothing() -> None:
    """Nobody waits to hear that an answer was accepted."""


async def _in_pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), AT_ONCE):
        yield data[start : start + AT_ONCE]
        await asyncio.sleep(0)


async def _send(connection: Connection, body: Body, relay: Relay) -> None:
    pieces = _in_pieces(body.data) if body.data is not None else body.pieces
    assert pieces is not None
    chunked = body.length is None
    async for piece in pieces:
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
