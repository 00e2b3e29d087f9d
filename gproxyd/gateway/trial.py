"""An answer on trial: held until it is known whether it is one to be proud of, then given to the relay.

It stands between the connection and the relay where another target may answer instead. Invariants: of an answer that
fails the trial the client gets nothing; of one that passes, every byte in its order; what is held is bounded, and so is
the time for which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time as wall

import orjson

from gproxyd.dialects import quirks
from gproxyd.dialects.meter import Meter
from gproxyd.errors import UpstreamError, WireError
from gproxyd.gateway.relay import Relay
from gproxyd.gateway.route import Route
from gproxyd.routing.retries import Fault, fault_of_status, wait_of
from gproxyd.wire import sse
from gproxyd.wire.http1 import ResponseHead
from gproxyd.wire.transform import IDENTITY, INFLATABLE, Inflate

MAX_HELD = 256 * 1024
"""Bytes of an answer that are held."""


class BadAnswer(UpstreamError):
    """An answer that another target's is preferred to. `body` is None if it was not whole; `own` says that the client
    can be told something better than what came."""

    def __init__(self, fault: Fault, head: ResponseHead, body: bytes | None, *, own: bool = False) -> None:
        text = "the upstream's answer is of no use" if own else f"the upstream answered with status {head.status}"
        super().__init__(fault.reason, text)
        self.fault = fault
        self.head = head
        self.body = body
        self.own = own


class Trial:
    """A ResponseSink. `passed` is called when the answer is accepted.

    Without a window (`route.window`) a stream is given on as soon as its head is there.
    """

    def __init__(self, relay: Relay, route: Route, clock: Callable[[], float], passed: Callable[[], None]) -> None:
        self._relay = relay
        self._route = route
        self._window = route.window
        self._clock = clock
        self._until = 0.0
        self._passed = passed
        self._head: ResponseHead | None = None
        self._held: list[bytes] | None = []
        self._size = 0
        self._meter: Meter | None = None
        self._rest = b""  # of an event that is not whole yet
        self.over = False

    # What the connection calls.

    def answered(self, head: ResponseHead, body: bytes) -> None:
        bad = self._verdict(head, body)
        if bad is not None:
            self._fail(bad)
            return
        self._pass()
        self._relay.answered(head, body)

    def started(self, head: ResponseHead) -> None:
        self._head = head
        if self._suspect(head):
            return
        kind = head.fields.media_type()
        if head.status == 200 and self._window and kind == b"text/event-stream" and not head.fields.coding():
            self._meter = Meter(self._route.dialect.name)
            self._until = self._clock() + self._window
            return
        self._release()

    def received(self, data: bytes) -> None:
        if self._held is None:
            self._relay.received(data)
            return
        self._held.append(data)
        self._size += len(data)
        if self._meter is not None:
            self._look(data)
        if self._held is not None and self._size > MAX_HELD and not self.over:
            assert self._head is not None
            bad = self._verdict(self._head, b"".join(self._held), whole=False)
            if bad is None:
                self._release()
            else:
                self._fail(bad)

    def ended(self) -> None:
        if self._held is None:
            self._relay.ended()
            return
        assert self._head is not None
        bad = self._verdict(self._head, b"".join(self._held))
        if bad is not None:
            self._fail(bad)
            return
        self._release()
        if self._relay._over is not None:
            self._relay.ended()

    def failed(self, error: UpstreamError) -> None:
        self.over = True
        self._relay.failed(error)

    def tick(self, now: float) -> None:
        if self._meter is not None and self._held is not None and not self.over and now > self._until:
            self._release()

    # Within.

    def _pass(self) -> None:
        self._held = None
        self.over = True
        self._passed()

    def _release(self) -> None:
        held, head = self._held, self._head
        assert head is not None
        self._pass()
        self._relay.started(head)
        if held and self._relay._over is not None:
            self._relay.received(b"".join(held))

    def _fail(self, bad: UpstreamError) -> None:
        self.over = True
        self._held, self._meter = [], None
        self._relay.failed(bad)

    def _look(self, data: bytes) -> None:
        """Events, as far as they are whole: the first that bears content decides."""
        assert self._meter is not None
        assert self._head is not None
        text = self._rest + data
        end = sse.end_of_events(text)
        self._rest = text[end:]
        if end:
            self._meter.events(text[:end])
            if self._meter.errored and not self._meter.seen_content:
                fault = Fault("broken", "error_event")
                self._fail(BadAnswer(fault, self._head, None, own=True))
            elif self._meter.seen_content:
                self._release()

    def _suspect(self, head: ResponseHead) -> bool:
        """Whether an answer must be heard to its end before anything is known of it."""
        route, status = self._route, head.status
        if status == 200:
            kind = head.fields.media_type()
            json = kind == b"application/json" and route.hold and not head.fields.coding()
            return json or self._is_page(head) or head.length == 0
        known = fault_of_status(status, None) is not None or any(one.status == status for one in route.refusals)
        return known or any(one.status == status for one in route.provider.limited)

    def _is_page(self, head: ResponseHead) -> bool:
        """A web page where an API should be."""
        understood = self._route.operation is not None and self._route.hold
        return understood and head.fields.media_type() in (b"text/html", b"application/xhtml+xml")

    def _verdict(self, head: ResponseHead, body: bytes, *, whole: bool = True) -> UpstreamError | None:
        """What is wrong with an answer, if anything. `body` is all of it, or its beginning."""
        route, status = self._route, head.status
        text = _plain(head, body)
        meaning = quirks.body_error(text, route.provider.body_errors) if route.provider.body_errors else None
        accused = any(one.status == status and (one.contains is None or one.contains in text) for one in route.refusals)
        if accused or meaning == "refused":
            return UpstreamError("auth", "the provider refused the gateway's own credential", code="upstream_auth")
        limited = meaning == "limited" or quirks.is_limited(status, text, route.provider.limited)
        fault = fault_of_status(status, wait_of(head.fields, text, wall()), limited=limited)
        if fault is None and meaning == "failed":
            fault = Fault("broken", "error_event")
        if fault is not None:
            own = status < 400
            return BadAnswer(fault, head, body if whole else None, own=own)
        if status != 200 or not whole:
            return None
        reason = self._useless(head, text)
        return None if reason is None else BadAnswer(Fault("broken", reason), head, None, own=True)

    def _useless(self, head: ResponseHead, text: bytes) -> str | None:
        """Why an answer of status 200 is none."""
        route = self._route
        if route.operation is None or not route.hold:
            return None
        if self._is_page(head):
            return "html"
        if not text.strip():
            return "empty"
        if head.fields.media_type() == b"text/event-stream":
            meter = Meter(route.dialect.name)
            meter.events(text)
            return "error_event" if meter.errored and not meter.seen_content else None
        if head.fields.media_type() == b"application/json" and b'"error"' in text:
            try:
                value = orjson.loads(text)
            except orjson.JSONDecodeError:
                return None
            if isinstance(value, dict) and value.get("error") and route.member not in value:
                return "error_event"
        return None


def _plain(head: ResponseHead, body: bytes) -> bytes:
    """A body without its content coding; as it is if nobody here can undo that."""
    coding = head.fields.coding()
    if coding not in INFLATABLE:
        return body
    try:
        return Inflate(coding, IDENTITY).feed(body)
    except WireError:
        return body
