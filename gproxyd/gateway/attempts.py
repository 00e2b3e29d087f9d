"""What one request brings to its attempts: where it may go, and what it holds while it does.

Invariants: the caller's own limits are met once, however many attempts follow; an upstream's limits are met by every
attempt, and what an attempt that failed has used of them stays used; at any moment money is held for the target that
is being asked, and for no other.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway.agents import AgentAtWork
from gproxyd.gateway.books import Books
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.intake import Body
from gproxyd.gateway.route import Route
from gproxyd.gateway.trial import BadAnswer
from gproxyd.policy import limits
from gproxyd.policy.limits import Limiter, RateLimited
from gproxyd.routing.agents import Place
from gproxyd.routing.credentials import Credential
from gproxyd.routing.plan import Exhausted, Target, Terms
from gproxyd.routing.retries import Fault
from gproxyd.routing.throttle import Throttle

Make = Callable[[], tuple[Route, Body]]


class Leg:
    """One way that a request may take; its route and body are made when it is first taken.

    `prepare` is what takes too long to be done at once; None where nothing does, or when it is done.
    """

    __slots__ = ("_made", "_make", "asks_usage", "model", "prepare", "provider")

    def __init__(self, provider: str, model: str | None, make: Make | None, made: tuple[Route, Body] | None) -> None:
        self.provider = provider
        self.model = model
        self._make = make
        self._made = made
        self.asks_usage = False
        self.prepare: Callable[[], Awaitable[None]] | None = None

    async def ready(self, call: Call) -> None:
        """What takes long is done, in steps, before a request goes this way for the first time: `take` does not wait.
        Raises Refusal if it cannot."""
        if self.prepare is not None:
            call.provider, call.model = self.provider, self.model
            await self.prepare()
            self.prepare = None

    def take(self, call: Call) -> tuple[Route, Body]:
        """The request goes this way now. Raises Refusal if it cannot."""
        if self._make is None:
            assert self._made is not None
            return self._made
        call.provider, call.model = self.provider, self.model
        if self._made is None:
            call.hide = False
            self._made = self._make()
            self.asks_usage = call.hide
        call.hide = self.asks_usage
        call.route = self._made[0]
        return self._made

    def forget(self) -> bool:
        """The body is not needed any more. Returns whether it was held."""
        self._make = self.prepare = None
        if self._made is None or self._made[1].data is None:
            return False
        self._made[1].data = None
        return True


class Attempt(NamedTuple):
    """One request to one upstream, and where its answer goes.

    head    the request's, but for what belongs to a trace
    passed  hears that an answer on trial was accepted; None where no answer is on trial
    begun   hears that the answer's head has left
    """

    credential: Credential
    head: bytes
    route: Route
    body: Body
    call: Call
    down: Downstream
    passed: Callable[[], None] | None
    begun: Callable[[], None] | None


class Tried(NamedTuple):
    """Attempts that were made in vain: how many, and where the last one went and what became of it."""

    attempts: int
    place: Place
    error: UpstreamError
    fault: Fault


@dataclass(slots=True, eq=False)
class Passage:
    """One request, admitted, and everywhere it may go. `legs` in the order in which they are to be asked.

    pin     the key of the conversation, and how long it is to stay where it is answered
    usual   whether every request like it would go the same way
    size    bytes of the request, and `fields` of its body: what it may cost is read from them
    release gives back what its body takes of the budget for all of them
    """

    legs: Sequence[Target[Leg]]
    terms: Terms
    size: int = 0
    fields: Mapping[str, object] = field(default_factory=dict)
    agent: AgentAtWork | None = None
    pin: tuple[bytes, float] | None = None
    usual: bool = True
    held: Leg | None = None
    refused: Refusal | None = None
    kept: tuple[Leg, BadAnswer] | None = None
    failed: tuple[Leg, UpstreamError] | None = None
    release: Callable[[], None] | None = None

    @property
    def route(self) -> Route | None:
        """The first leg's, if it has been made."""
        made = self.legs[0].what._made
        return None if made is None else made[0]

    def hold(self, leg: Leg, route: Route, call: Call, books: Books) -> None:
        """Sets aside what the request may cost at that target, and once what it takes of its caller's limits. Raises
        Refusal (402, 429)."""
        if self.held is leg:
            return
        if self.held is None:
            own = route if route.rules == route.caller.rules else replace(route, rules=route.caller.rules)
            books.hold(call, own, self.size, self.fields)
        elif route.limited:
            call.money.release()
            books.hold(call, replace(route, rules=()), self.size, self.fields)
        self.held = leg

    def begun(self) -> None:
        """Something of an answer has left, so no attempt follows: a stream of minutes does not hold its prompt."""
        self.fields = {}
        held = [target.what.forget() for target in self.legs]
        if any(held) and self.release is not None:
            self.release()

    def fail(self, leg: Leg, error: UpstreamError) -> None:
        """An attempt has failed. What it brought is kept, if the client could be told that."""
        if isinstance(error, BadAnswer) and error.body is not None and not error.own:
            self.kept = (leg, error)
        else:
            self.failed = (leg, error)

    def resume(self, tried: Tried, call: Call) -> None:
        """Attempts have been made before the plan begins."""
        fault = tried.fault
        again = fault.kind == "broken" and fault.again
        other_key = fault.kind in ("key", "limited")
        self.terms = replace(self.terms, tried=tried.attempts, last=tried.place, again=again, other_key=other_key)
        call.attempts = tried.attempts
        for target in self.legs:
            if (target.provider, target.model) == tried.place:
                self.fail(target.what, tried.error)

    def end(self, exhausted: Exhausted) -> Refusal:
        """What the client is told if nothing came that could be passed on."""
        if self.refused is not None:
            return self.refused
        wait = max(1, math.ceil(exhausted.wait))
        text = f"no target can be used at present; try again in {wait} s"
        return Refusal("no_target", text, headers={"Retry-After": str(wait)})

    def place(self, leg: Leg) -> Place:
        return Place(leg.provider, leg.model or "")


class Places(limits.Hold):
    """What a request holds of its caller's limits and of an upstream's, as one. `ended` is called when it is over."""

    __slots__ = ("_ended", "own", "theirs")

    def __init__(self, own: limits.Hold, theirs: limits.Hold, ended: Callable[[], None]) -> None:
        self.own = own
        self.theirs = theirs
        self._ended = ended

    @property
    def open(self) -> bool:
        return self.own.open or self.theirs.open

    def settle(self, tokens: int) -> None:
        self.own.settle(tokens)
        self.theirs.settle(tokens)
        self._ended()

    def release(self) -> None:
        self.own.release()
        self.theirs.release()
        self._ended()

    def cancel(self) -> None:
        self.own.cancel()
        self.theirs.cancel()
        self._ended()

    def fail(self) -> limits.Hold:
        """The attempt is over, the request is not: what it goes on holding."""
        self.theirs.release()
        self._ended()
        return self.own


def wait_of(refused: Refusal) -> float:
    """How long it is until another try is worth it."""
    if not isinstance(refused, RateLimited) or refused.kind == "concurrency":
        return 0.0
    return float(refused.wait)


class Gates:
    """The queues before upstreams' limits, by provider. They outlive configurations."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._throttles: dict[str, Throttle] = {}

    def throttle(self, provider: str) -> Throttle:
        found = self._throttles.get(provider)
        if found is None:
            found = self._throttles[provider] = Throttle(wait_of)
        return found

    async def enter(self, route: Route, call: Call, tokens: int, *, patient: bool) -> bool:
        """Takes a place at the route's upstream. Returns False if others wait for it. Raises RateLimited."""
        rules = route.upstream_rules
        if not rules:
            return True
        throttle = self.throttle(route.provider.name)

        def admit() -> limits.Hold:
            return self._limiter.admit(rules, call.requested_model or "", tokens, route.dialect.name)

        place = await throttle.get(admit) if patient else throttle.take(admit)
        if place is None:
            return False
        call.place = Places(call.place, place, throttle.released)
        return True

    @staticmethod
    def leave(call: Call) -> None:
        """The attempt has failed: its place at the upstream is free."""
        if isinstance(call.place, Places):
            call.place = call.place.fail()
