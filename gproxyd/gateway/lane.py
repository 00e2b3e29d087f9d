"""The short way through the gateway, for requests of which nothing has to be waited for.

A client sends the same head all day: the same key, path and headers, only the length differs. When the long way has
admitted such a head once and found a route for its model, the next one like it is answered right where its bytes
arrive: no parser, no task, no future, no turn of the loop until the upstream answers, but to dial where no connection
is idle. It holds for JSON requests that are here in one piece; whatever else happens (a refusal, a failure before the
upstream has read anything) is the long way's business, which then sees the request as if nothing had been, or goes on
behind the attempt that failed.

Invariant: a head is known by *all* its bytes but the length, under one snapshot; a reload forgets every one. What was
admitted once was read by aiohttp's parser, so no byte is ever understood here in another way than there.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp.http import HttpVersion11, RawRequestMessage

from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway import refusal
from gproxyd.gateway.admission import Admission, client_address
from gproxyd.gateway.call import Call
from gproxyd.gateway.doorstep import DoorProtocol
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.exchange import may_repeat
from gproxyd.gateway.intake import Intake
from gproxyd.gateway.relay import Relay
from gproxyd.gateway.route import Route
from gproxyd.routing.credentials import Credential
from gproxyd.upstream.connection import NOWHERE, Connection
from gproxyd.upstream.pool import take
from gproxyd.wire import inject, outline, splice

if TYPE_CHECKING:
    from gproxyd.gateway.handler import Gateway
    from gproxyd.gateway.snapshot import Snapshot

MAX_KNOWN = 1024
"""Heads that are remembered per snapshot, each with at most so many models."""

MAX_MODELS = 64

MAX_HEAD = 4096
"""Bytes beyond which a head is not remembered."""

MOST_AWAITED = 128 * 1024
"""Bytes of a body whose rest is waited for: what a client's network brings at once."""

MAX_KEYS = 16
"""Heads of one way that are kept ready: a key may change every hour."""

_ONCE = frozenset(
    b"expect idempotency-key traceparent tracestate baggage x-request-id x-correlation-id x-amzn-trace-id "
    b"x-b3-traceid x-cloud-trace-context b3 date".split()
)
"""Headers that are another with every request: no head that bears one comes twice."""

_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*+([0-9]++)[ \t]*+\r\n", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class Way:
    """Where requests for a model go, the connections that are `waiting` there, what every call of the kind `knows` from
    the beginning, and the `heads` of requests, but for their length, by the key that they bear."""

    route: Route
    waiting: list[Connection]
    knows: Mapping[str, Any] = field(repr=False)
    heads: dict[str | None, bytes] = field(default_factory=dict, repr=False)

    def head(self, credential: Credential) -> bytes:
        key = None if credential.key is None else credential.key.reveal()
        known = self.heads.get(key)
        if known is None:
            if len(self.heads) >= MAX_KEYS:
                self.heads.clear()
            known = self.heads[key] = self.route.head_for(credential, 0, "POST").removesuffix(b"0\r\n\r\n")
        return known


@dataclass(slots=True, eq=False)
class Known:
    """A head that was admitted: its bytes `before` its length's digits and `after` them, and the ways of the models
    that were asked for with it. `most` bytes may a body have that takes them."""

    admission: Admission
    before: bytes
    after: bytes
    most: int
    asks_usage: bool
    ways: dict[object, Way] = field(default_factory=dict)
    snapshot: Snapshot = field(init=False)
    length_at: int = field(init=False)
    rest: int = field(init=False)

    def __post_init__(self) -> None:
        self.snapshot = self.admission.snapshot
        self.length_at, self.rest = len(self.before), len(self.after)


class Lane:
    """Answers what it can at once, and learns from the long way what that is."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def learn(
        self,
        protocol: DoorProtocol,
        message: RawRequestMessage,
        admission: Admission,
        call: Call,
        route: Route,
        intake: Intake,
    ) -> None:
        """The long way has found a route for a call."""
        operation, caller = admission.operation, admission.caller
        if operation is None or operation.model != "json" or admission.target.form not in ("aggregated", "scoped"):
            return
        plain = message.method == "POST" and message.version == HttpVersion11 and not message.should_close
        plain = plain and not intake.chunked and not intake.kept and _ONCE.isdisjoint(admission.headers)
        if not plain or caller.expires_at is not None or admission.snapshot.config.chat.default_stream:
            return
        if protocol.head is None or protocol.head[0] is not message or route.asked is None:
            return
        if route.provider.mints or route.provider.fits:  # a token may have to be waited for; a body is made anew
            return
        cut = _cut(protocol.head[1])
        if cut is None:
            return
        heads = admission.snapshot.known
        if len(heads) >= MAX_KNOWN:
            heads.clear()
        most = min(outline.LARGE, admission.snapshot.config.server.max_body)
        known = heads.get(cut)
        if known is None:
            known = heads[cut] = Known(admission, *cut, most, asks_usage=operation.name == "chat")
        if len(known.ways) >= MAX_MODELS:
            known.ways.clear()
        waiting = self._gateway.exchanges.pool.waiting(route.face.origin, route.provider.proxy)
        known.ways[route.asked] = Way(route, waiting, call.like(route))

    def take(self, protocol: DoorProtocol, data: bytes) -> bool | None:
        """Begins to answer a request. Returns False if `data` must go the long way; None if that is not known before
        the rest of its body is here."""
        gateway, known = self._gateway, protocol.known
        if known is None or known.snapshot is not gateway.snapshot or not data.startswith(known.before):
            cut = _cut(data)
            known = protocol.known = None if cut is None else gateway.snapshot.known.get(cut)
            if known is None:
                return False
        start = known.length_at
        end = data.find(b"\r", start, start + 8)
        body = data[end + known.rest :]
        if end < 0 or not data.startswith(known.after, end):
            return False
        if data[start:end] != b"%d" % len(body):
            return None if _is_more(data[start:end], len(body)) else False
        if len(body) > known.most or gateway.draining or protocol.client_paused:
            return False
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            return False
        span = splice.only_model(body) if type(fields) is dict else None
        way = None if span is None else known.ways.get(fields.get("model"))
        if span is None or way is None or len(body) > way.route.most or not way.route.health.closed:
            return False
        if way.route.binding is not None and way.route.binding.search(body):
            return False
        connection = take(way.waiting)
        if connection is None and gateway.tracing is not None:
            return False  # an attempt begins with its connection, and that is told of on the long way
        flight = Flight(gateway, protocol, data, known, way, connection or NOWHERE)
        if (way.route.limited or way.route.rules) and not self._hold(flight, way, connection, len(body), fields):
            return False
        flight.call.bytes_in = len(body)
        if way.route.sent is not None:
            body = body[: span[0]] + way.route.sent + body[span[1] :]
        if known.asks_usage and fields.get("stream") is True and way.route.provider.tells_usage:
            asking = inject.usage_asked(body, fields)
            flight.call.hide = asking is not body
            body = asking
        flight.depart(body)
        return True

    def _hold(
        self, flight: Flight, way: Way, connection: Connection | None, size: int, fields: Mapping[str, object]
    ) -> bool:
        """Whether the caller may, and can afford it; who may not is told so by the long way, where others may wait."""
        route = way.route
        if not (route.upstream_rules and len(self._gateway.exchanges.gates.throttle(route.provider.name))):
            try:
                self._gateway.books.hold(flight.call, route, size, fields, tentative=True)
            except Refusal:
                pass  # who refuses tells why on the long way
            else:
                return True
        if connection is not None:
            way.waiting.append(connection)
        return False


def _is_more(digits: bytes, size: int) -> bool:
    """Whether a length says that the rest of a small body will come."""
    return digits.isdigit() and size < int(digits) <= MOST_AWAITED


def _cut(data: bytes) -> tuple[bytes, bytes] | None:
    """A head's bytes before its length's digits and after them; None for one that is not worth remembering."""
    end = data.find(_END, 0, MAX_HEAD)
    length = _LENGTH.search(data, 0, end + 2) if end > 0 else None
    return None if length is None else (data[: length.start(1)], data[length.end(1) : end + 4])


class Flight(Relay):
    """One request on the short way: the relay of its answer, and all that is done when that is over."""

    def __init__(
        self, gateway: Gateway, protocol: DoorProtocol, data: bytes, known: Known, way: Way, connection: Connection
    ) -> None:
        route = way.route
        call = Call(way.knows)
        call.attempts = 1
        call.client = protocol.client
        admission = known.admission
        if admission.snapshot.trusted:
            call.client = client_address(protocol.peername, admission.headers, admission.snapshot)
        if gateway.tracing is not None:
            call.trace = gateway.tracing.begin(admission.headers)
        self.call = call
        self.downstream = Downstream(protocol)
        self._gateway = gateway
        self._protocol = protocol
        self._data = data
        self._way = way
        self._dialling: asyncio.Task[None] | None = None
        self._credential: Credential = route.provider.credentials.take()
        exchanges = gateway.exchanges
        super().__init__(
            call, self.downstream, connection, route, gateway.books, exchanges.loop, self.over, exchanges.finish
        )

    def depart(self, body: bytes) -> None:
        self._gateway.enter()
        self._protocol.board(self)
        if self._connection is NOWHERE:
            self._dialling = self._loop.create_task(self._dial(body))
        else:
            self._ask(body)

    async def _dial(self, body: bytes) -> None:
        """No connection is idle."""
        route, pool = self._route, self._gateway.exchanges.pool
        try:
            connection = await pool.fresh(route.face.origin, route.provider.proxy, route.provider.timeouts.connect)
        except UpstreamError as error:
            self._dialling = None
            self._end(error)
            return
        except Exception:
            self._dialling = None
            self._end(UpstreamError("bug", "the gateway failed over this request", code="internal_error"))
            raise
        self._dialling, self._connection = None, connection
        if self._paused:
            connection.pause_reading()
        self._moved = self._loop.time()
        self._ask(body)

    def _ask(self, body: bytes) -> None:
        connection, exchanges, route = self._connection, self._gateway.exchanges, self._route
        exchanges.watch(self)
        sink = exchanges.sink(self, route, self.call) if route.judged or route.listened else self
        head = b"%b%d\r\n\r\n" % (self._way.head(self._credential), len(body))
        if self.call.trace is not None:
            head = route.traced(self.call.trace, head)
        connection.ask(head + body, sink)
        self.call.sent_at = time.monotonic()

    def _write_head(self, length: int | None) -> None:
        super()._write_head(length)
        self._data = b""  # it goes no other way now

    def over(self, error: UpstreamError | None) -> None:
        """The relay's end: the answer is out, or failed before anything was."""
        exchanges, connection, call = self._gateway.exchanges, self._connection, self.call
        exchanges.relays.discard(self)
        self._forget_client()
        if error is None:
            route = self._route
            if route.health.troubled or call.upstream_status >= 400 or call.outcome != "ok":
                exchanges.took(route, self._credential, call)
            exchanges.pool.rest(connection, self._way.waiting)
            self._end_call()
            return
        connection.abort()
        protocol, route = self._protocol, self._route
        goes_on = may_repeat(error, connection, "POST")
        goes_on = goes_on or exchanges.goes_on(error, protocol, route, self._credential, call)
        if goes_on and protocol.unboard(self._data):
            self._gateway.books.drop(call)
            self._gateway.leave()
            return
        exchanges.stays(protocol)
        told = exchanges.refusal(error, self._route, self._credential, call)
        call.status = told.status
        refusal.write(call, self.downstream, told)
        self._end_call()

    def client_left(self) -> None:
        """The client's connection is gone: nobody is generating for nobody."""
        call = self.call
        if self._dialling is not None:
            self._dialling.cancel()
            self.detach()
        else:
            self._gateway.exchanges.abandon(self, self._connection, self._route, self._credential, call)
        if call.draining:
            self._gateway.leave()
            return
        if call.outcome == "ok":
            call.outcome, call.status = "client_gone", call.status or 499
        self._close()

    def _end_call(self) -> None:
        self._close()
        self._protocol.alight(keep=self.downstream.keeps)

    def _close(self) -> None:
        if not self.call.closed:
            self._gateway.books.close(self.call, self.body_bytes)
        self._gateway.leave()
