"""The short way through the gateway, for requests of which nothing has to be waited for.

A client sends the same head all day: the same key, path and headers, only the length differs. When the long way has
admitted such a head once and found a route for its model, the next one like it is answered right where its bytes
arrive: no task, no future, no turn of the loop until the upstream answers. It holds for JSON requests that are here
in one piece and find an idle connection to their upstream; whatever else happens (a refusal, a failure before the
upstream has read anything) is the long way's business, which then sees the request as if nothing had been.

Invariant: a head is known by *all* its bytes but the length, under one snapshot; a reload forgets every one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.streams import StreamReader

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
from gproxyd.upstream.connection import Connection
from gproxyd.wire import inject, outline

if TYPE_CHECKING:
    from gproxyd.gateway.handler import Gateway

MAX_KNOWN = 1024
"""Heads that are remembered per snapshot, each with at most so many models."""

MAX_MODELS = 64

MAX_HEAD = 4096
"""Bytes of header lines beyond which a head is not remembered."""

Head = tuple[object, ...]


@dataclass(slots=True, eq=False)
class Known:
    """A head that was admitted, and the routes of the models that were asked for with it."""

    admission: Admission
    most: int
    asks_usage: bool
    routes: dict[str, Route] = field(default_factory=dict)


@lru_cache(maxsize=1024)
def _length_at(names: tuple[bytes, ...]) -> int:
    """Where `Content-Length` stands; -1 if it does not."""
    return next((place for place, name in enumerate(names) if name.lower() == b"content-length"), -1)


def _head(message: RawRequestMessage) -> Head | None:
    """What tells one head from another; None for one that is not worth remembering."""
    names, texts = zip(*message.raw_headers, strict=True)
    place = _length_at(names)
    return None if place < 0 else (message.path, names, texts[:place], texts[place + 1 :])


class Lane:
    """Answers what it can at once, and learns from the long way what that is."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def learn(self, message: RawRequestMessage, admission: Admission, route: Route, intake: Intake) -> None:
        """The long way has found a route."""
        operation, caller = admission.operation, admission.caller
        if operation is None or operation.model != "json" or admission.target.form not in ("aggregated", "scoped"):
            return
        plain = message.method == "POST" and not intake.chunked and b"expect" not in admission.headers
        if not plain or caller.expires_at is not None or intake.kept or admission.snapshot.config.chat.default_stream:
            return
        if sum(len(name) + len(text) for name, text in message.raw_headers) > MAX_HEAD:
            return
        most = min(outline.LARGE, admission.snapshot.config.server.max_body)
        heads = admission.snapshot.known
        head = _head(message)
        if head is None or route.asked is None:
            return
        if len(heads) >= MAX_KNOWN:
            heads.clear()
        known = heads.setdefault(head, Known(admission, most, asks_usage=operation.name == "chat"))
        if len(known.routes) >= MAX_MODELS:
            known.routes.clear()
        known.routes[route.asked] = route

    def take(self, protocol: DoorProtocol, message: RawRequestMessage, content: StreamReader) -> bool:
        """Begins to answer a request whose body is here. Returns False if it must go the long way."""
        gateway = self._gateway
        if message.method != "POST" or message.version != HttpVersion11 or message.should_close or gateway.draining:
            return False
        snapshot = gateway.snapshot
        known = snapshot.known.get(_head(message))
        if known is None or len(content._buffer) != 1:
            return False
        body = content._buffer[0]
        if len(body) > known.most:
            return False
        try:
            found = outline.parse(body)
        except Refusal:
            return False
        route = known.routes.get(found.model) if found.models == 1 and isinstance(found.model, str) else None
        if route is None:
            return False
        connection = gateway.exchanges.pool.idle(route.face.origin, route.provider.proxy)
        if connection is None:
            return False
        flight = Flight(gateway, protocol, message, content, known.admission, route, connection)
        try:
            gateway.books.hold(flight.call, route, len(body), found.fields, tentative=True)
        except Refusal:
            gateway.exchanges.pool.put_back(connection, route.face.origin, route.provider.proxy)
            return False
        if route.sent is not None:
            body = found.replaced(body, route.sent)
        if known.asks_usage and found.fields.get("stream") is True and route.provider.tells_usage:
            asking = inject.usage_asked(body, found.fields)
            flight.call.hide = asking is not body
            body = asking
        flight.depart(body)
        return True


class Flight:
    """One request on the short way."""

    __slots__ = (
        "_connection",
        "_content",
        "_credential",
        "_down",
        "_gateway",
        "_message",
        "_protocol",
        "_relay",
        "_route",
        "call",
    )

    def __init__(
        self,
        gateway: Gateway,
        protocol: DoorProtocol,
        message: RawRequestMessage,
        content: StreamReader,
        admission: Admission,
        route: Route,
        connection: Connection,
    ) -> None:
        self._gateway = gateway
        self._protocol = protocol
        self._message = message
        self._content = content
        self._route = route
        self._connection = connection
        self.call = call = Call()
        call.__dict__.update(route.known)
        call.route = route
        call.attempts = 1
        call.client = protocol.client
        if admission.snapshot.trusted:
            call.client = client_address(protocol.peername, admission.headers, admission.snapshot)
        self._down = Downstream(protocol, message, content)
        self._credential: Credential = route.provider.credentials.take()
        self._relay: Relay

    def depart(self, body: bytes) -> None:
        gateway, route, connection = self._gateway, self._route, self._connection
        self.call.bytes_in = self._content._size
        gateway.enter()
        self._protocol.board(self)
        self._relay = gateway.exchanges.launch(connection, route, self.call, self._down, self.over)
        connection.write(route.head_for(self._credential, len(body), "POST") + body)
        connection.request_sent()
        self._relay.request_sent()

    def over(self, error: UpstreamError | None) -> None:
        """The relay's end: the answer is out, or failed before anything was."""
        exchanges = self._gateway.exchanges
        exchanges.land(self._relay)
        if error is None:
            exchanges.succeeded(self._route, self._credential, self._connection)
            self._end()
            return
        self._connection.abort()
        if may_repeat(error, self._connection, "POST"):
            self._gateway.books.drop(self.call)
            self._gateway.leave()
            self._protocol.unboard(self._message, self._content)
        else:
            told = exchanges.refusal(error, self._route, self._credential, self.call)
            self.call.status = told.status
            refusal.write(self.call, self._down, told)
            self._end()

    def client_left(self) -> None:
        """The client's connection is gone: nobody is generating for nobody."""
        call = self.call
        self._gateway.exchanges.abandon(self._relay, self._connection, self._route, self._credential, call)
        if call.draining:
            self._gateway.leave()
            return
        if call.outcome == "ok":
            call.outcome, call.status = "client_gone", call.status or 499
        self._close()

    def _end(self) -> None:
        self._close()
        self._protocol.alight(keep=self._down.keeps)

    def _close(self) -> None:
        self._gateway.books.close(self.call, self._down.body_bytes)
        self._gateway.leave()
