"""One request walks along its plan: attempt after attempt, until an answer is on its way or nothing is left to try.

Invariants: nothing follows the first byte that the client has got; the request is booked once, to the target whose
answer the client has; what no target answered is told once, by the best of what they said.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import TYPE_CHECKING

from gproxyd.dialects.usage import estimate_tokens
from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway.attempts import Attempt, Leg, Passage
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.intake import Body
from gproxyd.gateway.relay import Relay
from gproxyd.gateway.route import Route
from gproxyd.gateway.trial import BadAnswer
from gproxyd.policy.limits import RateLimited
from gproxyd.routing.plan import Answered, Exhausted, Failed, Full, Outcome, Try, attempts
from gproxyd.routing.retries import FINAL, Fault, fault_of_reason, fault_of_status
from gproxyd.upstream.connection import NOWHERE
from gproxyd.vendors import oauth
from gproxyd.wire.headers import Headers
from gproxyd.wire.http1 import ResponseHead

if TYPE_CHECKING:
    from gproxyd.gateway.exchange import Exchanges

_dice = random.Random()  # noqa: S311 - nothing secret


class Walk:
    """One request's way through its attempts."""

    def __init__(self, exchanges: Exchanges, passage: Passage, call: Call, down: Downstream) -> None:
        self._exchanges = exchanges
        self._registry = exchanges.registry
        self._passage = passage
        self._call = call
        self._down = down
        self._answered = False

    async def run(self) -> None:
        """Raises Refusal if nothing of an answer has left."""
        plan = attempts(self._passage.legs, self._passage.terms, self._registry.clock, _dice)
        try:
            step = next(plan)
            while True:
                step = plan.send(await self._try(step))
        except StopIteration as end:
            exhausted: Exhausted = end.value
        finally:
            plan.close()
        if not self._answered:
            await self._give_up(exhausted)

    async def _try(self, step: Try[Leg]) -> Outcome:
        """One attempt."""
        call, passage, leg = self._call, self._passage, step.target.what
        if step.pause:
            await asyncio.sleep(step.pause)
        try:
            if leg.prepare is not None:
                await leg.ready(call)
            route, body = leg.take(call)
            passage.hold(leg, route, call, self._exchanges.books)
            tokens = estimate_tokens(passage.size)
            if not await self._exchanges.gates.enter(route, call, tokens, patient=step.patient):
                return Full()
        except Refusal as refused:
            passage.refused = refused
            return Full()
        if call.attempts:
            self._exchanges.books.stats.retry(route.provider.name)
            _forget(call)
        try:
            await self._send(step, route, body)
        except UpstreamError as error:
            return self._failed(error, step, route, body)
        self._answered = True
        return self._judged(step, route)

    async def _send(self, step: Try[Leg], route: Route, body: Body) -> None:
        """One attempt, and another where a connection had died unnoticed. Raises UpstreamError."""
        exchanges, call, provider = self._exchanges, self._call, route.provider
        if provider.mints:
            await oauth.ready(step.credential.key)
        head = route.head_for(step.credential, body.length, call.method)

        def passed() -> None:
            step.target.health.succeeded(step.credential, self._registry.clock(), step.permit)

        on_trial = passed if route.judged or step.permit.probe else None
        begun = self._passage.begun
        await exchanges.carry(Attempt(step.credential, head, route, body, call, self._down, on_trial, begun))

    def _failed(self, error: UpstreamError, step: Try[Leg], route: Route, body: Body) -> Outcome:
        """The attempt brought nothing that the client has seen."""
        call, passage, leg = self._call, self._passage, step.target.what
        fault = error.fault if isinstance(error, BadAnswer) else fault_of_reason(error.reason)
        self._exchanges.note(error, route, step.credential, call)
        self._exchanges.gates.leave(call)
        passage.fail(leg, error)
        return Failed(fault, begun=self._down.started or body.data is None)

    def _judged(self, step: Try[Leg], route: Route) -> Outcome:
        """The client has an answer: what it says of the upstream."""
        call, passage = self._call, self._passage
        if call.outcome in ("upstream_error", "upstream_timeout"):
            return Failed(Fault("broken", call.reason or "broken"), begun=True)
        if call.outcome != "ok":
            return Failed(FINAL, begun=True)
        fault = None if route.judged else fault_of_status(call.upstream_status, None)
        if fault is not None:
            return Failed(fault, begun=True)
        now = self._registry.clock()
        if passage.agent is not None and call.first_byte_at is not None and call.sent_at is not None:
            self._registry.latencies.add(passage.place(step.target.what), call.first_byte_at - call.sent_at, now)
        if passage.pin is not None:
            key, ttl = passage.pin
            self._registry.orders.pins.put(key, passage.place(step.target.what), now + ttl)
        return Answered()

    async def _give_up(self, exhausted: Exhausted) -> None:
        """Nothing is left to try: the client gets the best of what there is. Raises Refusal."""
        passage, call = self._passage, self._call
        _forget(call)
        if passage.kept is not None:
            leg, bad = passage.kept
            leg.take(call)
            self._pass_on(bad, exhausted.wait)
            return
        if passage.failed is not None:
            leg, error = passage.failed
            leg.take(call)
            call.blame(error)
            told = error.refusal()
            if exhausted.wait > 0:
                told.headers.setdefault("Retry-After", str(math.ceil(exhausted.wait)))
            raise told
        refused = passage.end(exhausted)
        if isinstance(refused, RateLimited):
            self._exchanges.books.stats.limited(refused.kind)
        raise refused

    def _pass_on(self, bad: BadAnswer, wait: float) -> None:
        """Gives the client an answer that was heard to its end and kept."""
        call, head, body = self._call, bad.head, bad.body
        assert call.route is not None
        assert body is not None
        if wait > 0 and not {b"retry-after", b"retry-after-ms"} & set(head.fields):
            lines = [*head.headers, (b"Retry-After", b"%d" % math.ceil(wait))]
            head = ResponseHead(head.status, lines, Headers(lines), head.framing, head.length)
        exchanges = self._exchanges

        def deliver(relay: Relay, call: Call, body: bytes) -> None:
            exchanges.books.close(call, len(body))
            relay.deliver(body)

        relay = Relay(call, self._down, NOWHERE, call.route, exchanges.books, exchanges.loop, _ignore, deliver)
        relay.request_sent()
        relay.answered(head, body)
        relay.detach()


def _forget(call: Call) -> None:
    """What the last attempt has left behind is not what the request will be booked with."""
    call.sent_at = call.first_byte_at = call.meter = call.upstream_id = None
    call.upstream_status = 0


def _ignore(error: UpstreamError | None) -> None:
    """The answer was whole before it was begun, so nothing more is to be heard of it."""
