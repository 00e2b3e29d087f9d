"""The response, from the upstream's bytes into the client's transport.

What the upstream connection receives passes the transform and is written in the same turn of the loop: no queue, no
task and no future per chunk. Invariants:
- nothing reaches the client before the head, and no attempt may follow once the head has left;
- a small JSON body is held until it is whole, so its failure is a clean error and its length is known;
- a response that breaks later ends with the dialect's error event, if it is a stream, and never as if complete;
- while the client does not take what is written, the upstream is not read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gproxyd.errors import UpstreamError, WireError
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.route import Route
from gproxyd.upstream.connection import Connection
from gproxyd.vendors.catalogue import RefusedKey
from gproxyd.wire.headers import Headers, is_request_id, response_lines
from gproxyd.wire.http1 import ResponseHead
from gproxyd.wire.transform import IDENTITY, INFLATABLE, Events, Inflate, Json, Transform

MAX_HELD = 256 * 1024
"""Bytes of a JSON body that are held until it is whole; a longer one passes as it comes."""

WRITE_DEADLINE = 30.0
"""Seconds after which a client that takes nothing of what is written is given up."""


_NO_HEADERS = Headers(())
_NO_NAMES: frozenset[bytes] = frozenset()
_CODING = frozenset({b"content-encoding"})


class Relay:
    """Takes one response from a connection and gives it to the client.

    `over` is called once: with None when the client has all that it will get, with an error if nothing was sent yet.
    """

    __slots__ = (
        "_call",
        "_connection",
        "_down",
        "_head",
        "_headers",
        "_held",
        "_held_bytes",
        "_loop",
        "_moved",
        "_over",
        "_paused",
        "_route",
        "_stalled",
        "_suspects",
        "_transform",
        "_uploading",
        "_written",
    )

    def __init__(
        self,
        call: Call,
        down: Downstream,
        connection: Connection,
        route: Route,
        loop: asyncio.AbstractEventLoop,
        over: Callable[[UpstreamError | None], None],
    ) -> None:
        self._call = call
        self._down = down
        self._connection = connection
        self._route = route
        self._loop = loop
        self._over: Callable[[UpstreamError | None], None] | None = over
        self._transform: Transform = IDENTITY
        self._head: ResponseHead | None = None
        self._headers = _NO_HEADERS
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._suspects: tuple[RefusedKey, ...] = ()
        self._uploading = False
        self._moved = self._written = loop.time()
        self._paused = False
        self._stalled = (0.0, 0)  # since when the client takes nothing, and how much waited then
        down.protocol.writer = self
        if down.protocol.client_paused:
            self.client_paused()

    # The request's side.

    def upload_begins(self) -> None:
        """The body is streamed: until it is over, the clock asks whether bytes still move."""
        self._uploading = True

    def upload_moved(self) -> None:
        self._moved = self._loop.time()

    def request_sent(self) -> None:
        """The upstream has the whole request: its time for an answer begins."""
        self._uploading = False
        self._call.sent_at = time.monotonic()
        self._moved = self._loop.time()

    def detach(self) -> None:
        """Nothing more comes from here."""
        if self._down.protocol.writer is self:
            self._down.protocol.writer = None
        self._over = None

    # What the connection calls.

    def started(self, head: ResponseHead) -> None:
        self._moved = self._loop.time()
        self._call.first_byte_at = time.monotonic()
        if self._call.sent_at is None:
            self._call.sent_at = self._call.first_byte_at
        self._head = head
        self._headers = head.fields
        if head.status >= 400:
            self._suspects = tuple(refusal for refusal in self._route.refusals if refusal.status == head.status)
        if head.status in (301, 302, 303, 307, 308) and not self._route.redirects:
            self._break_off(UpstreamError("redirect", "the upstream answered with a redirect, which is not followed"))
            return
        self._choose(head)

    def _choose(self, head: ResponseHead) -> None:
        """How the body passes: as events, as JSON (held until it is whole, or not), or untouched."""
        kind = self._headers.media_type()
        held = bool(self._suspects)
        if kind == b"text/event-stream" and not held:
            self._transform = self._for_events(head)
        elif kind == b"application/json" and head.framing != "none":
            self._transform = self._for_json(head)
            held = held or self._route.hold
        if held:
            self._held = []
            return
        # A body that may be changed, or added to (a ping, an error event), has no length that is known before its end.
        counted = head.framing == "none" or self._transform is IDENTITY
        self._write_head(head.length if counted else None)

    def received(self, data: bytes) -> None:
        self._moved = self._loop.time()
        if self._held is not None:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes > MAX_HELD:
                self._let_go()
            return
        self._pass(data)

    def ended(self) -> None:
        if self._held is not None:
            self._end_held()
            self._end(None)
            return
        try:
            rest = self._transform.finish()
        except WireError as broken:
            self._break_off(UpstreamError("protocol", str(broken)))
            return
        self._down.write(rest)
        self._down.end()
        self._end(None)

    def failed(self, error: UpstreamError) -> None:
        if self._over is None:
            return
        if not self._down.started:
            self._end(error)
            return
        self._call.blame(error)
        event = self._route.dialect.error_event(error.refusal(), self._call.id)
        self._down.write(self._transform.fail(event))
        self._down.cut()
        self._end(None)

    # What the client's connection and the clock call.

    def client_paused(self) -> None:
        self._paused = True
        self._stalled = (self._loop.time(), self._down.waiting_bytes)
        self._connection.pause_reading()

    def client_resumed(self) -> None:
        self._paused = False
        self._moved = self._loop.time()
        self._connection.resume_reading()

    def tick(self, now: float) -> None:
        if self._over is None:
            return
        if self._paused:
            self._check_client(now)
        elif self._uploading:
            self._check_upload(now)
        elif self._head is None:
            if now - self._moved > self._route.provider.timeouts.first_byte:
                self._break_off(_late("timeout_first_byte", "the upstream did not answer in time"))
        elif now - self._moved > self._route.provider.timeouts.idle:
            self._break_off(_late("timeout_idle", "the upstream stopped sending"))
        elif self._route.keepalive and now - self._written > self._route.keepalive and self._transform.at_rest:
            self._written = now
            self._down.write(self._route.dialect.ping)

    def _check_client(self, now: float) -> None:
        since, waiting = self._stalled
        if self._down.waiting_bytes != waiting:
            self._stalled = (now, self._down.waiting_bytes)
        elif now - since > WRITE_DEADLINE:
            self._call.outcome, self._call.reason = "client_gone", "write_deadline"
            self._connection.abort()
            self._down.abort()
            self._end(None)

    def _check_upload(self, now: float) -> None:
        if now - self._moved <= self._route.provider.timeouts.idle:
            return
        if self._connection.writing_paused:
            self._break_off(_late("timeout_idle", "the upstream stopped taking the request"))
        else:
            error = UpstreamError("client_idle", "the request's body stopped coming", code="request_timeout")
            self._break_off(error)

    # Within.

    def _rewrites(self, head: ResponseHead) -> bool:
        return self._route.shown is not None and head.status < 400

    def _for_events(self, head: ResponseHead) -> Transform:
        if not self._rewrites(head):
            return IDENTITY if self._headers.coding() else Events()
        return self._decoding(Events(self._route.dialect.places, self._route.shown or b""))

    def _for_json(self, head: ResponseHead) -> Transform:
        if not self._rewrites(head):
            return IDENTITY
        return self._decoding(Json(self._route.dialect.places, self._route.shown or b""))

    def _decoding(self, inner: Transform) -> Transform:
        """Identity was asked for. An upstream that compresses all the same is understood where that is possible."""
        coding = self._headers.coding()
        if not coding:
            return inner
        if coding in INFLATABLE:
            return Inflate(coding, inner)
        return IDENTITY

    def _lines(self, *, rewritten: bool) -> bytes:
        call, route = self._call, self._route
        drop = _CODING if isinstance(self._transform, Inflate) else _NO_NAMES
        return b"%b%b%b%bx-gproxyd-attempts: %d\r\nserver-timing: gateway;dur=%.1f\r\n" % (
            response_lines(self._headers, rewritten=rewritten, drop=drop),
            route.dialect.id_lines(call.id),
            self._upstream_id(),
            route.tags,
            call.attempts,
            call.overhead_ms(),
        )

    def _upstream_id(self) -> bytes:
        """The vendor's own id of the request, if it gave one that may stand in a log."""
        value = self._headers.get(b"x-request-id") or self._headers.get(b"request-id")
        if value is None or not is_request_id(value):
            return b""
        self._call.upstream_id = value.decode("ascii")
        return b"x-gproxyd-upstream-request-id: %b\r\n" % value

    def _write_head(self, length: int | None) -> None:
        assert self._head is not None
        self._call.status = self._head.status
        rewritten = self._transform is not IDENTITY and self._rewrites(self._head)
        self._down.head(self._head.status, self._lines(rewritten=rewritten), length)
        self._written = self._loop.time()

    def _pass(self, data: bytes) -> None:
        try:
            out = self._transform.feed(data)
        except WireError as broken:
            self._break_off(UpstreamError("protocol", str(broken)))
            return
        if out:
            self._written = self._moved
            self._down.write(out)

    def _let_go(self) -> None:
        """The body is too long to be held; what it is suspected of must stand in its beginning."""
        assert self._head is not None
        held, self._held = b"".join(self._held or ()), None
        if self._accused(held):
            self._break_off(_key_refused())
            return
        self._write_head(None if self._rewrites(self._head) else self._head.length)
        self._pass(held)

    def _end_held(self) -> None:
        assert self._head is not None
        body = b"".join(self._held or ())
        self._held = None
        if self._accused(body):
            self._break_off(_key_refused())
            return
        try:
            body = self._transform.whole(body)
        except WireError as broken:
            self._break_off(UpstreamError("protocol", str(broken)))
            return
        self._call.status = self._head.status
        rewritten = self._transform is not IDENTITY
        self._down.whole(self._head.status, self._lines(rewritten=rewritten), body)

    def _accused(self, body: bytes) -> bool:
        coding = self._headers.coding() if self._suspects else b""
        if coding in INFLATABLE:
            try:
                body = Inflate(coding, IDENTITY).feed(body)
            except WireError:
                pass  # nobody can read what it says
        return any(suspect.contains is None or suspect.contains in body for suspect in self._suspects)

    def _break_off(self, error: UpstreamError) -> None:
        self._connection.abort()
        self.failed(error)

    def _end(self, error: UpstreamError | None) -> None:
        over, self._over = self._over, None
        if over is not None:
            over(error)


def _late(reason: str, text: str) -> UpstreamError:
    return UpstreamError(reason, text, code="upstream_timeout")


def _key_refused() -> UpstreamError:
    return UpstreamError("auth", "the provider refused the gateway's own credential", code="upstream_auth")
