"""What becomes of an answer's body on its way, and what is read of it: its tokens.

Invariants: whatever is read, what passes is the same; a body that nobody can read tells no tokens, and passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from gproxyd.config.schema import Timeouts
from gproxyd.dialects.meter import Meter, read_reply
from gproxyd.errors import UpstreamError, WireError
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream, Nobody
from gproxyd.gateway.repeats import Repeats
from gproxyd.gateway.route import Route
from gproxyd.vendors.catalogue import RefusedKey
from gproxyd.wire.headers import Headers
from gproxyd.wire.http1 import ResponseHead
from gproxyd.wire.splice import TextSplicer, replace_only
from gproxyd.wire.transform import IDENTITY, INFLATABLE, Events, Inflate, Json, Transform, Watched


class Reading:
    """One answer of a status and content coding. `transform` is what its body passes through."""

    def __init__(self, call: Call, route: Route, head: ResponseHead) -> None:
        self._call = call
        self._route = route
        self._coding = head.fields.coding()
        self._told = route.measured and head.status < 400
        self.rewrites = route.shown is not None and head.status < 400
        self._copy: Transform | None = None  # sees what passes
        self.transform: Transform = IDENTITY

    def expect_events(self) -> None:
        """It is a stream of events."""
        self._call.stream = True
        meter = self._meter()
        tap = None if meter is None else meter.events
        if self.rewrites:
            self._decoding(Events(self._route.dialect.places, self._route.shown or b"", tap))
        elif not self._coding:
            self.transform = Events(tap=tap)
        elif self._coding in INFLATABLE:
            self._copy = Inflate(self._coding, Events(tap=tap))

    def expect_json(self, *, held: bool) -> None:
        """It is JSON: `held` until it is whole, or passing as it comes."""
        if not held:
            self._call.stream = self._route.operation is not None and self._route.operation.growing
        if not self.rewrites:
            if not held:
                self.watch()
            return
        inner: Transform = Json(self._route.dialect.places, self._route.shown or b"")
        if self._coding in INFLATABLE and (meter := self._meter()) is not None:
            inner = Watched(meter.feed, inner)  # so that nothing is inflated twice
        elif not held:
            self.watch()
        self._decoding(inner)

    def _decoding(self, inner: Transform) -> None:
        """Identity was asked for. An upstream that compresses all the same is understood where that is possible."""
        if not self._coding:
            self.transform = inner
        elif self._coding in INFLATABLE:
            self.transform = Inflate(self._coding, inner)

    def _meter(self) -> Meter | None:
        """Reads tokens out of an answer that tells them."""
        if not self._told:
            return None
        meter = self._call.meter = Meter(self._route.dialect.name, self._call.hide)
        return meter

    def watch(self) -> None:
        """JSON is read as it passes, unless it is already."""
        meter = self._meter() if self._call.meter is None else None
        if meter is not None and not self._coding:
            self._copy = Watched(meter.feed)
        elif meter is not None and self._coding in INFLATABLE:
            self._copy = Inflate(self._coding, Watched(meter.feed))

    def repeats(self, down: Downstream | Nobody) -> Repeats | None:
        """What takes the events that go like one before them, if it is events that pass, and in chunks."""
        dialect, meter = self._route.dialect.name, self._call.meter
        refrains = self._route.provider.refrains.get(dialect)
        if refrains is None or not isinstance(self.transform, Events) or not isinstance(down, Downstream):
            return None
        meter = meter if isinstance(meter, Meter) else None
        shown = self._route.shown if self.rewrites else None
        return Repeats(dialect, refrains, self.transform, meter, down, shown) if down.chunked else None

    @property
    def copies(self) -> bool:
        """Whether what passes must be looked at."""
        return self._copy is not None

    def look_at(self, data: bytes) -> None:
        """The next bytes of the body."""
        if self._copy is not None:
            try:
                self._copy.feed(data)
            except WireError:
                self._copy = None

    def finish(self) -> None:
        """The body is at its end."""
        if self._call.meter is not None:
            self._call.meter.finish()

    def whole(self, body: bytes) -> bytes:
        """A held body, as it goes on. Raises WireError for one that is not what it says."""
        if self._told and self._coding:
            self.watch()
            self.look_at(body)
            told = self.transform.whole(body)
            self.finish()
            return told
        if self._told and isinstance(self.transform, Json):
            return whole_reply(self._call, self._route, body)
        if self._told:
            self._call.meter = read_reply(self._route.dialect.name, body)
        return self.transform.whole(body)


def whole_reply(call: Call, route: Route, body: bytes) -> bytes:
    """A whole JSON reply, as it goes on, once it has been read. Raises WireError for one that is not what it says."""
    dialect = route.dialect
    reading = call.meter = read_reply(dialect.name, body) if route.measured else None
    if route.shown is None:
        return body
    if reading is not None and reading.root is not None and route.member in reading.root:
        replaced = replace_only(body, dialect.word, route.shown)
        if replaced is not None:
            return replaced
    return TextSplicer(dialect.places, route.shown).splice(body)


def accused(suspects: Sequence[RefusedKey], headers: Headers, body: bytes) -> bool:
    """Whether the beginning of an answer says what one of the suspects says."""
    coding = headers.coding() if suspects else b""
    if coding in INFLATABLE:
        try:
            body = Inflate(coding, IDENTITY).feed(body)
        except WireError:
            pass  # nobody can read what it says
    return any(suspect.contains is None or suspect.contains in body for suspect in suspects)


def key_refused() -> UpstreamError:
    return UpstreamError("auth", "the provider refused the gateway's own credential", code="upstream_auth")


def patience(call: Call, timeouts: Timeouts, silent: float) -> float:
    """Seconds of silence amid an answer that are waited for: more while the model thinks. `silent` has it been."""
    if silent > timeouts.idle and isinstance(call.meter, Meter) and call.meter.thinks:
        return max(timeouts.idle, timeouts.reasoning_idle)
    return timeouts.idle


def late(reason: str, text: str) -> UpstreamError:
    return UpstreamError(reason, text, code="upstream_timeout")
