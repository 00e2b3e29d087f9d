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
from gproxyd.gateway.books import Books
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream, Nobody
from gproxyd.gateway.reading import Reading, accused, key_refused, late, patience, whole_reply
from gproxyd.gateway.repeats import Repeats
from gproxyd.gateway.route import Route
from gproxyd.upstream.connection import Connection
from gproxyd.upstream.slices import CODED_SLICE
from gproxyd.vendors.catalogue import RefusedKey
from gproxyd.wire.headers import Headers
from gproxyd.wire.http1 import ResponseHead
from gproxyd.wire.transform import IDENTITY, Inflate, Transform

MAX_HELD = 256 * 1024
"""Bytes of a JSON body that are held until it is whole; a longer one passes as it comes."""

WRITE_DEADLINE = 30.0
"""Seconds after which a client that takes nothing of what is written is given up."""

DRAIN_FOR = 60.0
"""Seconds for which an upstream is heard whose client has left, where that is configured."""

DRAIN_MOST = 16 * 1024 * 1024
"""Bytes of an answer that are read for nobody."""

_NO_HEADERS = Headers(())


class Relay:
    """Takes one response from a connection and gives it to the client.

    `finish` takes a whole answer, to `deliver` it once the books are closed over it. `over` is called once: with None
    when the client has all that it will get, with an error if nothing was sent yet.
    """

    # What holds for most answers.
    _transform: Transform = IDENTITY
    _reading: Reading | None = None
    _repeats: Repeats | None = None
    _head: ResponseHead | None = None
    _headers: Headers = _NO_HEADERS
    _held: list[bytes] | None = None
    _held_bytes: int = 0
    _suspects: tuple[RefusedKey, ...] = ()
    _uploading: bool = False
    _paused: bool = False
    _stalled: tuple[float, int] = (0.0, 0)  # since when the client takes nothing, and how much waited then
    _drains_until: float = 0.0
    begun: Callable[[], None] | None = None  # hears that the head has left

    def __init__(
        self,
        call: Call,
        down: Downstream,
        connection: Connection,
        route: Route,
        books: Books,
        loop: asyncio.AbstractEventLoop,
        over: Callable[[UpstreamError | None], None],
        finish: Callable[[Relay, Call, bytes], None],
    ) -> None:
        self.__dict__.update(_DEFAULTS)  # the object's own: Python finds those many times faster than its class's
        self._call = call
        self._down: Downstream | Nobody = down
        self._connection = connection
        self._route = route
        self._books = books
        self._finish = finish
        self._loop = loop
        self._over: Callable[[UpstreamError | None], None] | None = over
        self._moved = self._written = loop.time()
        protocol = down.protocol
        protocol.writer = self
        if protocol.client_paused:
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

    @property
    def body_bytes(self) -> int:
        """What of the answer's body the client was given."""
        return self._down.body_bytes

    def detach(self) -> None:
        """Nothing more comes from here."""
        self._forget_client()
        self._over = None

    def _forget_client(self) -> None:
        if self._head is not None:
            self.__dict__.pop("received", None)  # a ring of references, which would stay for the collector
        protocol = self._down.protocol
        if protocol is not None and protocol.writer is self:
            protocol.writer = None

    def drain(self, over: Callable[[UpstreamError | None], None]) -> bool:
        """The client has left. Where the answer will tell of tokens, the upstream is heard to its end all the same,
        within bounds, and `over` hears of that; returns whether it is so."""
        told = self._head is None or self._head.status < 400
        if not self._route.metered or self._uploading or not told or self._over is None:
            return False
        self._forget_client()
        self._down = Nobody(self._down.body_bytes)
        self._over = over
        self._held_bytes = 0
        self._drains_until = self._loop.time() + DRAIN_FOR  # from now on `received` counts
        self._repeats = None
        self._connection.offer(None)
        if self._paused:
            self._paused = False
            self._connection.resume_reading()
        return True

    # What the connection calls.

    def answered(self, head: ResponseHead, body: bytes) -> None:
        """A whole answer at once: the short cut for what most are, a held JSON reply that tells its tokens."""
        route, call, fields = self._route, self._call, head.fields
        plain = head.status == 200 and route.hold and fields.media_type() == b"application/json"
        plain = plain and b"content-encoding" not in fields and call.envelope is None
        if not plain or len(body) > MAX_HELD or self._drains_until:
            self.started(head)
            if body and self._over is not None:
                self.received(body)
            if self._over is not None:
                self.ended()
            return
        call.first_byte_at = time.monotonic()
        call.status = call.upstream_status = 200
        self._headers = fields
        try:
            body = whole_reply(call, route, body)
        except WireError as broken:
            self._break_off(UpstreamError("protocol", str(broken)))
            return
        self._finish(self, call, body)

    def deliver(self, body: bytes) -> None:
        """The books are closed over this whole answer: it leaves."""
        self._down.whole(200, self._lines(rewritten=self._route.shown is not None), body)
        self._end(None)

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for the answer."""
        return self._over is not None

    def started(self, head: ResponseHead) -> None:
        self._moved = self._loop.time()
        self._call.first_byte_at = time.monotonic()
        if self._call.sent_at is None:
            self._call.sent_at = self._call.first_byte_at
        self._call.upstream_status = head.status
        self._head = head
        self._headers = head.fields
        if self._call.envelope is not None:
            self._call.envelope.told(head.status, head.headers)
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
        reading = self._reading = Reading(self._call, self._route, head)
        if kind == b"text/event-stream" and not held:
            reading.expect_events()
        elif kind == b"application/json" and head.framing != "none":
            held = held or self._route.hold
            reading.expect_json(held=held)
        self._transform = reading.transform
        looked_at = held or reading.copies or self._transform is not IDENTITY
        if looked_at and self._headers.coding():
            self._connection.slice = CODED_SLICE
        if held:
            self._held = []
            return
        # A body that may be changed, or added to (a ping, an error event), has no length that is known before its end.
        counted = head.framing == "none" or self._transform is IDENTITY
        self._write_head(head.length if counted else None)
        if self._call.envelope is None and not reading.copies and not self._drains_until:
            self.received = self._pass_on  # type: ignore[method-assign]  # nothing else has to be asked from now on
            if head.framing == "chunked":
                self._repeats = reading.repeats(self._down)

    def received(self, data: bytes) -> None:
        self._moved = self._loop.time()
        if self._call.envelope is not None and self._call.envelope.got is not None:
            self._call.envelope.got.add(data)
        if self._drains_until:
            self._held_bytes += len(data)
            if self._held_bytes > DRAIN_MOST:
                self._break_off(UpstreamError("drained", "nobody listens to so long an answer"))
                return
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
        if self._reading is not None:
            self._reading.finish()
        self._books.close(self._call, self._down.body_bytes + len(rest))
        self._down.write(rest)
        self._down.end()
        self._end(None)

    def failed(self, error: UpstreamError) -> None:
        if self._over is None:
            return
        if not self._down.started or self._drains_until:
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
        if self._repeats is not None and self._repeats.stirred:
            self._repeats.stirred = False
            self._moved = self._written = now
        if self._drains_until and now > self._drains_until:
            self._break_off(late("drained", "nobody listens for so long"))
        elif self._paused:
            self._check_client(now)
        elif self._uploading:
            self._check_upload(now)
        elif self._head is None:
            if now - self._moved > self._route.provider.timeouts.first_byte:
                self._break_off(late("timeout_first_byte", "the upstream did not answer in time"))
        elif now - self._moved > patience(self._call, self._route.provider.timeouts, now - self._moved):
            self._break_off(late("timeout_idle", "the upstream stopped sending"))
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
            self._break_off(late("timeout_idle", "the upstream stopped taking the request"))
        else:
            self._break_off(UpstreamError("client_idle", "the request's body stopped coming", code="request_timeout"))

    # Within.

    def _lines(self, *, rewritten: bool) -> bytes:
        decoded = isinstance(self._transform, Inflate)
        return self._route.reply_lines(self._call, self._headers, rewritten=rewritten, decoded=decoded)

    def _write_head(self, length: int | None) -> None:
        assert self._head is not None
        self._call.status = self._head.status
        rewritten = self._transform is not IDENTITY and self._reading is not None and self._reading.rewrites
        self._down.head(self._head.status, self._lines(rewritten=rewritten), length)
        self._written = self._loop.time()
        # Nobody asks for its lines again, and a stream may stay for long.
        self._head, self._headers = self._head._replace(headers=(), fields=_NO_HEADERS), _NO_HEADERS
        if self.begun is not None:
            self.begun()

    def _pass_on(self, data: bytes) -> None:
        """A piece of a stream that only the transform has to see: what most pieces are."""
        self._moved = self._written = self._loop.time()
        try:
            out = self._transform.feed(data)
        except WireError as broken:
            self._break_off(UpstreamError("protocol", str(broken)))
            return
        if out:
            self._down.pass_on(out)
            if self._repeats is not None and self._repeats.ready:
                self._connection.offer(self._repeats.take)

    def _pass(self, data: bytes) -> None:
        if self._reading is not None:
            self._reading.look_at(data)
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
        assert self._head is not None and self._reading is not None  # noqa: PT018 - both or neither
        held, self._held = b"".join(self._held or ()), None
        if accused(self._suspects, self._headers, held):
            self._break_off(key_refused())
            return
        self._reading.watch()
        self._write_head(None if self._reading.rewrites else self._head.length)
        self._pass(held)

    def _end_held(self) -> None:
        assert self._head is not None and self._reading is not None  # noqa: PT018 - both or neither
        body = b"".join(self._held or ())
        self._held = None
        if accused(self._suspects, self._headers, body):
            self._break_off(key_refused())
            return
        try:
            body = self._reading.whole(body)
        except WireError as broken:
            self._break_off(UpstreamError("protocol", str(broken)))
            return
        self._call.status = self._head.status
        self._books.close(self._call, len(body))
        self._down.whole(self._head.status, self._lines(rewritten=self._transform is not IDENTITY), body)

    def _break_off(self, error: UpstreamError) -> None:
        self._connection.abort()
        self.failed(error)

    def _end(self, error: UpstreamError | None) -> None:
        over, self._over = self._over, None
        if self._paused:  # this client takes nothing yet, but the connection's next answer is somebody else's
            self._forget_client()
            self._paused = False
            self._connection.resume_reading()
        if over is not None:
            over(error)


_DEFAULTS = {name: getattr(Relay, name) for name in Relay.__annotations__}
