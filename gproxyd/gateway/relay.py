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
from dataclasses import dataclass

from gproxyd.config import Timeouts
from gproxyd.dialects.dialect import Dialect
from gproxyd.errors import UpstreamError, WireError
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.refusal import id_lines
from gproxyd.upstream.connection import Connection
from gproxyd.vendors.catalogue import RefusedKey
from gproxyd.wire.headers import Headers, is_request_id, response_lines
from gproxyd.wire.http1 import ResponseHead
from gproxyd.wire.splice import quoted
from gproxyd.wire.target import MODEL_NAME
from gproxyd.wire.transform import INFLATABLE, Events, Identity, Inflate, Json, Transform

MAX_HELD = 256 * 1024
"""Bytes of a JSON body that are held until it is whole; a longer one passes as it comes."""

WRITE_DEADLINE = 30.0
"""Seconds after which a client that takes nothing of what is written is given up."""


@dataclass(slots=True)
class Manner:
    """How a response is passed on.

    dialect    whose error events and pings a stream bears
    shown      the model's name that replies must bear, None if they keep the upstream's
    hold       whether small JSON bodies are held until they are whole
    redirects  whether a redirect is the client's to see
    keepalive  seconds of silence after which a stream gets a ping, 0 for never
    refusals   answers that mean that the gateway's own key was refused
    """

    dialect: Dialect
    shown: str | None
    hold: bool
    redirects: bool
    keepalive: float
    refusals: tuple[RefusedKey, ...]


_NO_HEADERS = Headers(())
_NO_NAMES: frozenset[bytes] = frozenset()
_CODING = frozenset({b"content-encoding"})


class Relay:
    """Takes one response from a connection and gives it to the client. `done` ends with it, or with its failure."""

    __slots__ = (
        "_call",
        "_connection",
        "_down",
        "_head",
        "_headers",
        "_held",
        "_held_bytes",
        "_loop",
        "_manner",
        "_moved",
        "_paused",
        "_stalled",
        "_suspects",
        "_timeouts",
        "_transform",
        "_uploading",
        "_written",
        "done",
    )

    def __init__(
        self,
        call: Call,
        down: Downstream,
        connection: Connection,
        manner: Manner,
        timeouts: Timeouts,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._call = call
        self._down = down
        self._connection = connection
        self._manner = manner
        self._timeouts = timeouts
        self._loop = loop
        self._transform: Transform = Identity()
        self._head: ResponseHead | None = None
        self._headers = _NO_HEADERS
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._suspects: tuple[RefusedKey, ...] = ()
        self._uploading = False
        self._moved = self._written = loop.time()
        self._paused = False
        self._stalled = (0.0, 0)  # since when the client takes nothing, and how much waited then
        self.done: asyncio.Future[None] = loop.create_future()
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
        if self.done.done() and not self.done.cancelled():
            self.done.exception()  # looked at, should the client have left in the same moment

    # What the connection calls.

    def started(self, head: ResponseHead) -> None:
        self._moved = self._loop.time()
        self._call.first_byte_at = time.monotonic()
        if self._call.sent_at is None:
            self._call.sent_at = self._call.first_byte_at
        self._head = head
        self._headers = Headers(head.headers)
        if head.status >= 400:
            self._suspects = tuple(refusal for refusal in self._manner.refusals if refusal.status == head.status)
        if head.status in (301, 302, 303, 307, 308) and not self._manner.redirects:
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
            held = held or self._manner.hold
        if held:
            self._held = []
            return
        # A body that may be changed, or added to (a ping, an error event), has no length that is known before its end.
        counted = head.framing == "none" or isinstance(self._transform, Identity)
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
            self._over(None)
            return
        try:
            rest = self._transform.finish()
        except WireError as broken:
            self._break_off(UpstreamError("protocol", str(broken)))
            return
        self._down.write(rest)
        self._down.end()
        self._over(None)

    def failed(self, error: UpstreamError) -> None:
        if self.done.done():
            return
        if not self._down.started:
            self._over(error)
            return
        self._call.blame(error)
        event = self._manner.dialect.error_event(error.refusal(), self._call.id)
        self._down.write(self._transform.fail(event))
        self._down.cut()
        self._over(None)

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
        if self.done.done():
            return
        if self._paused:
            self._check_client(now)
        elif self._uploading:
            self._check_upload(now)
        elif self._head is None:
            if now - self._moved > self._timeouts.first_byte:
                self._break_off(_late("timeout_first_byte", "the upstream did not answer in time"))
        elif now - self._moved > self._timeouts.idle:
            self._break_off(_late("timeout_idle", "the upstream stopped sending"))
        elif self._manner.keepalive and now - self._written > self._manner.keepalive and self._transform.at_rest:
            self._written = now
            self._down.write(self._manner.dialect.ping)

    def _check_client(self, now: float) -> None:
        since, waiting = self._stalled
        if self._down.waiting_bytes != waiting:
            self._stalled = (now, self._down.waiting_bytes)
        elif now - since > WRITE_DEADLINE:
            self._call.outcome, self._call.reason = "client_gone", "write_deadline"
            self._connection.abort()
            self._down.abort()
            self._over(None)

    def _check_upload(self, now: float) -> None:
        if now - self._moved <= self._timeouts.idle:
            return
        if self._connection.writing_paused:
            self._break_off(_late("timeout_idle", "the upstream stopped taking the request"))
        else:
            error = UpstreamError("client_idle", "the request's body stopped coming", code="request_timeout")
            self._break_off(error)

    # Within.

    def _rewrites(self, head: ResponseHead) -> bool:
        return self._manner.shown is not None and head.status < 400

    def _for_events(self, head: ResponseHead) -> Transform:
        if not self._rewrites(head):
            return Identity() if self._headers.coding() else Events()
        return self._decoding(Events(self._manner.dialect.places, quoted(self._manner.shown or "")))

    def _for_json(self, head: ResponseHead) -> Transform:
        if not self._rewrites(head):
            return Identity()
        return self._decoding(Json(self._manner.dialect.places, quoted(self._manner.shown or "")))

    def _decoding(self, inner: Transform) -> Transform:
        """Identity was asked for. An upstream that compresses all the same is understood where that is possible."""
        coding = self._headers.coding()
        if not coding:
            return inner
        if coding in INFLATABLE:
            return Inflate(coding, inner)
        return Identity()

    def _lines(self, *, rewritten: bool) -> list[bytes]:
        call = self._call
        drop = _CODING if isinstance(self._transform, Inflate) else _NO_NAMES
        model = call.model
        if model is None or MODEL_NAME.fullmatch(model) is None:  # on raw paths it is whatever the body said
            model = None
        return [
            response_lines(self._headers, rewritten=rewritten, drop=drop),
            *id_lines(call),
            self._upstream_id(),
            b"x-gproxyd-provider: %b\r\n%bx-gproxyd-attempts: %d\r\nserver-timing: gateway;dur=%.1f\r\n"
            % (
                (call.provider or "").encode("ascii"),
                b"" if model is None else b"x-gproxyd-model: %b\r\n" % model.encode("ascii"),
                call.attempts,
                call.overhead_ms(),
            ),
        ]

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
        rewritten = not isinstance(self._transform, Identity) and self._rewrites(self._head)
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
        rewritten = not isinstance(self._transform, Identity)
        self._down.whole(self._head.status, self._lines(rewritten=rewritten), body)

    def _accused(self, body: bytes) -> bool:
        coding = self._headers.coding() if self._suspects else b""
        if coding in INFLATABLE:
            try:
                body = Inflate(coding, Identity()).feed(body)
            except WireError:
                pass  # nobody can read what it says
        return any(suspect.contains is None or suspect.contains in body for suspect in self._suspects)

    def _break_off(self, error: UpstreamError) -> None:
        self._connection.abort()
        self.failed(error)

    def _over(self, error: UpstreamError | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def _late(reason: str, text: str) -> UpstreamError:
    return UpstreamError(reason, text, code="upstream_timeout")


def _key_refused() -> UpstreamError:
    return UpstreamError("auth", "the provider refused the gateway's own credential", code="upstream_auth")
