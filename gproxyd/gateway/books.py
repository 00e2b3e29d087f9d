"""What a request may cost, while it runs, and what is written of it when it is over, whichever way it ended.

Invariants: what `hold` sets aside is returned exactly once; a request's books are closed once, before the last bytes
of its answer leave, so that what a client has got in full is in the ledger whatever becomes of this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from gproxyd.dialects.usage import Usage, estimate_input, estimate_tokens, request_bounds
from gproxyd.gateway.call import Call
from gproxyd.gateway.route import Route
from gproxyd.observe.journal import Journal
from gproxyd.observe.stats import Stats
from gproxyd.policy import limits, quotas
from gproxyd.policy.limits import Limiter, RateLimited
from gproxyd.policy.quotas import Quotas
from gproxyd.types import UsageRecord
from gproxyd.vendors import prices

UNBOUNDED = 4096
"""Tokens that an answer is expected to have at most where neither the request nor the model sets a bound."""

_LEVELS = {"ok": "info", "refused": "info", "client_gone": "info", "internal_error": "error"}


class Sink(Protocol):
    """Who takes a record of every request."""

    def book(self, record: Sequence[Any]) -> None:
        """`record` holds the fields of a UsageRecord."""

    def together(self) -> None:
        """Records from now on are written at once, by `commit`."""

    def commit(self) -> None: ...


class Shelf(Protocol):
    """Who keeps envelopes."""

    def put(self, envelope: Mapping[str, Any]) -> None: ...


class Books:
    """Holds and closes the account of each request. `ledger` and `watchers` hear of every one that had a caller."""

    def __init__(self, journal: Journal, stats: Stats, limiter: Limiter, quotas: Quotas) -> None:
        self._journal = journal
        self.stats = stats
        self.limiter = limiter
        self.quotas = quotas
        self.ledger: Sink | None = None
        self.logs: Shelf | None = None
        self.watchers: list[Callable[[UsageRecord], None]] = []

    def hold(self, call: Call, route: Route, size: int, body: Mapping[str, object], *, tentative: bool = False) -> None:
        """Sets aside what a request of `size` bytes may cost, in money and in places. Raises Refusal (402, 429).

        `tentative` says that whoever is refused asks again, so that nothing is counted yet.
        """
        if route.limited:
            call.money = self.quotas.reserve(route.caller.accounts, self._worst(route, size, body))
        if route.rules:
            try:
                name = call.requested_model or ""
                call.place = self.limiter.admit(route.rules, name, estimate_tokens(size), route.dialect.name)
            except RateLimited as refused:
                call.money.release()
                if not tentative:
                    self.stats.limited(refused.kind)
                raise

    def _worst(self, route: Route, size: int, body: Mapping[str, object]) -> int:
        """Nano-dollars that the request can cost; 0 where its price is unknown."""
        facts = route.facts
        if facts.price is None:
            return 0
        asked = request_bounds(route.dialect.name, body)
        most = asked.max_output if asked.max_output is not None else facts.max_output
        prompt = min(estimate_input(size), facts.context or size)
        return prices.worst(facts.price, prompt, UNBOUNDED if most is None else most, (asked.service_tier or "",))

    def drop(self, call: Call) -> None:
        """The request takes another way, on which it will be held anew."""
        call.money.release()
        call.place.cancel()

    def close(self, call: Call, bytes_out: int) -> None:
        """The request is over: `bytes_out` of an answer's body have gone or go now."""
        if call.closed:
            return
        call.closed = True
        call.bytes_out = bytes_out
        call.ended = time.monotonic()
        route = call.route
        if call.meter is not None and call.meter.errored and call.outcome == "ok" and call.status < 400:
            call.outcome, call.reason = "upstream_error", "error_event"
        usage = None if route is None else self._usage(call, route)
        call.cost = cost = _cost(call, usage)
        if call.money is not quotas.FREE:
            call.money.settle(cost or 0)
        elif cost and call.caller is not None:
            self.quotas.charge(call.caller.accounts, cost)
        if call.place is not limits.FREE:
            call.place.settle(0 if usage is None else usage.prompt_tokens + (usage.output_tokens or 0))
        if call.endpoint != "health":
            self._tell(call, usage)
        if call.trace is not None:
            call.trace.finish(UsageRecord(*_record(call, usage)), call.upstream_status, call.outcome, call.reason)
        level = "debug" if call.endpoint in _QUIET else _LEVELS.get(call.outcome, "warning")
        if route is not None and call.first_byte_at is not None and self._journal.takes_json:
            self._journal.put_members(level, "request", call.line(route.told))
        else:
            self._journal.put(level, "request", call.fields())

    @contextmanager
    def together(self) -> Iterator[None]:
        """The records of requests that are closed within are written at once, at its end."""
        ledger = self.ledger
        if ledger is not None:
            ledger.together()
        try:
            yield
        finally:
            if ledger is not None:
                ledger.commit()

    def keep(self, call: Call) -> None:
        """Puts the envelope away of a request whose books are closed and whose last byte has gone."""
        if call.envelope is not None and self.logs is not None:
            self.logs.put(call.envelope.finish(call))

    def _usage(self, call: Call, route: Route) -> Usage | None:
        """The tokens of the request, as far as they are known or can be judged, and where that comes from."""
        meter = call.meter
        told = None if meter is None else meter.usage
        if meter is not None and told is not None:
            whole = call.outcome == "ok" or meter.complete
            call.provenance = "measured" if whole else "partial"
            if not whole and (told.output_tokens or 0) < meter.event_count:  # an event is a token, about
                told = replace(told, output_tokens=meter.event_count)
            return told
        answered = call.upstream_status < 400 if call.upstream_status else call.outcome == "client_gone"
        refused = meter is not None and meter.errored and not meter.seen_content
        refused = refused or (call.status >= 400 and call.outcome != "client_gone")  # nothing of it reached the client
        if not route.metered or call.sent_at is None or not answered or refused:
            return None
        call.provenance = "estimated"
        seen = 0 if meter is None else meter.event_count or estimate_tokens(call.bytes_out)
        return Usage(estimate_tokens(call.bytes_in), seen, cached_in_input=route.dialect.name != "anthropic")

    def _tell(self, call: Call, usage: Usage | None) -> None:
        route = call.route
        tally = route.tally if route is not None else self.stats.tally(call.endpoint or "", call.provider or "", "")
        first, sent = call.first_byte_at, call.sent_at
        tally.finished(
            call.status,
            call.ended - call.started,
            None if first is None else first - call.started,
            None if sent is None else sent - call.started,
            None if first is None or sent is None else call.ended - first,
            usage,
            call.cost,
            call.outcome not in ("ok", "client_gone") or call.status >= 400,
        )
        if call.caller is None:
            return
        record = _record(call, usage)
        if self.ledger is not None:
            self.ledger.book(record)
        if self.watchers:
            told = UsageRecord(*record)
            for watcher in self.watchers:
                watcher(told)


_QUIET = frozenset({"health", "ops"})
"""Endpoints that machines ask all day."""


def _cost(call: Call, usage: Usage | None) -> int | None:
    """Nano-dollars; None where the price is not known, nor how much was used of what has one."""
    route = call.route
    if usage is not None:
        assert route is not None
        return None if route.facts.price is None else prices.cost(route.facts.price, usage)
    # Of what did not come, and of what names no model, nothing is to be paid.
    served = route is not None and route.model is not None and route.billed and 0 < call.upstream_status < 400
    failed = call.meter is not None and call.meter.errored
    failed = failed or (call.status >= 400 and call.outcome != "client_gone")
    return None if served and not failed else 0


def _record(call: Call, usage: Usage | None) -> tuple[Any, ...]:
    """The fields of a UsageRecord."""
    caller, tokens = call.caller, usage or _NOTHING
    return (
        call.id,
        call.at,
        call.id,
        None if caller is None else caller.user,
        None if caller is None else caller.key,
        call.endpoint,
        call.form,
        call.dialect,
        call.provider,
        call.model,
        call.requested_model,
        tokens.input_tokens,
        tokens.output_tokens,
        tokens.cache_read_tokens,
        tokens.cache_write_tokens,
        tokens.cache_write_1h_tokens,
        tokens.reasoning_tokens,
        call.cost,
        call.provenance,
        call.status,
        call.stream,
        call.attempts,
        None if call.first_byte_at is None else round((call.first_byte_at - call.started) * 1000, 3),
        round((call.ended - call.started) * 1000, 3),
        call.outcome == "client_gone",
    )


_NOTHING = Usage()
