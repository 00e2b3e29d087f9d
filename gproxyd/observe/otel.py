"""Traces for OpenTelemetry: one span per request and one per attempt at an upstream, sent by OTLP over HTTP.

Invariants: while a request runs, only times and ids are noted; spans are made and sent by a thread of their own, from
a queue that is bounded, and what does not fit is counted and told. Nothing of OpenTelemetry is imported before
`opened` is called. No prompt and no secret is in a span.

The trace of a request is its caller's, if it sends a `traceparent` (W3C Trace Context, version 00 and what later
versions add to it): whether it is told was decided there. Upstream goes the attempt's own `traceparent`; what is not
told passes as it came.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gproxyd import __version__
from gproxyd.errors import ConfigError, Problem
from gproxyd.observe.genai import OPERATIONS, provider_name
from gproxyd.observe.journal import Journal
from gproxyd.types import Origin, UsageRecord
from gproxyd.units import format_usd
from gproxyd.wire.headers import Headers

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

MAX_WAITING = 4096
"""Requests whose spans have not been sent yet."""

MAX_BATCH = 256
"""Requests that are sent in one go."""

GATHER = 1.0
"""Seconds for which spans are gathered before they are sent."""

PATIENCE = 10.0
"""Seconds after which a collector that does not take a batch is given up."""

TELL_EVERY = 60.0
"""Seconds between two complaints about spans that were lost."""

_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LINE = re.compile(rb"(?<=\r\n)traceparent:[^\r\n]*\r\n", re.IGNORECASE)
_SAMPLED = 1
_FAULTS = frozenset({"upstream_error", "upstream_timeout", "internal_error"})

_ids = random.Random()  # noqa: S311 - seeded by the system; an id must be unique, not secret


class Settings(Protocol):
    """The section `tracing` of the configuration."""

    @property
    def endpoint(self) -> str | None: ...
    @property
    def service(self) -> str: ...
    @property
    def sample(self) -> float: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


class Parent(NamedTuple):
    """The span within which a request was made, as its caller says."""

    trace: int
    span: int
    state: bytes


class Attempt:
    """One try at an upstream. Times in nanoseconds since the epoch; `ended` is 0 until it is known."""

    __slots__ = ("ended", "error", "model", "origin", "provider", "span", "started", "status", "vendor")

    def __init__(self, provider: str, vendor: str, model: str | None, origin: Origin) -> None:
        self.started = time.time_ns()
        self.span = _ids.getrandbits(64) or 1
        self.provider, self.vendor, self.model, self.origin = provider, vendor, model, origin
        self.ended = 0
        self.status = 0
        self.error: str | None = None


class Trace:
    """What is noted of one request while it runs."""

    __slots__ = ("_tracing", "attempts", "ended", "outcome", "parent", "reason", "record", "span", "started", "trace")

    def __init__(self, tracing: Tracing, parent: Parent | None) -> None:
        self._tracing = tracing
        self.started = time.time_ns()
        self.ended = 0
        self.parent = parent
        self.trace = parent.trace if parent is not None else _ids.getrandbits(128) or 1
        self.span = _ids.getrandbits(64) or 1
        self.attempts: list[Attempt] = []
        self.record: UsageRecord
        self.outcome = "ok"
        self.reason: str | None = None

    def attempt(self, head: bytes, provider: str, vendor: str, model: str | None, origin: Origin) -> bytes:
        """A try begins; the one before it, if any, is over. Returns the request's head with its own `traceparent`."""
        self._end_attempt(0, None)
        made = Attempt(provider, vendor, model, origin)
        self.attempts.append(made)
        line = b"traceparent: 00-%032x-%016x-01\r\n" % (self.trace, made.span)
        return _LINE.sub(b"", head)[:-2] + line + b"\r\n"

    def failed(self, reason: str, status: int = 0) -> None:
        """The running try has failed. `status` is the upstream's, 0 where it did not answer."""
        self._end_attempt(status, reason)

    def finish(self, record: UsageRecord, upstream_status: int, outcome: str, reason: str | None) -> None:
        """The request is over."""
        self._end_attempt(upstream_status, reason if outcome in _FAULTS else None)
        self.ended = time.time_ns()
        self.record, self.outcome, self.reason = record, outcome, reason
        self._tracing.take(self)

    def _end_attempt(self, status: int, error: str | None) -> None:
        if self.attempts and not self.attempts[-1].ended:
            last = self.attempts[-1]
            last.ended, last.status, last.error = time.time_ns(), status, error


class Tracing:
    """Begins traces, and sends what became of them. `sent` and `lost` count spans."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        """Raises ImportError without the extra `otel`."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import SpanExportResult

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # what it would say of every batch, we say once
        self._journal = journal
        self._sample = settings.sample
        self._success = SpanExportResult.SUCCESS
        self._exporter: Any = OTLPSpanExporter(
            _address(settings.endpoint or ""), headers=settings.headers, timeout=PATIENCE
        )
        self._spans = Spans(Resource.create({"service.name": settings.service, "service.version": __version__}))
        self._waiting: deque[Trace] = deque()
        self._told_at = -TELL_EVERY
        self._told = 0
        self.sent = 0
        self.lost = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def begin(self, headers: Headers) -> Trace | None:
        """A request has come with these headers. None if it is not to be traced."""
        given = headers.all(b"traceparent")
        found = _TRACEPARENT.fullmatch(given[0]) if len(given) == 1 else None
        if found is not None and not (found[1] == b"00" and found[5]):
            if not int(found[4], 16) & _SAMPLED:
                return None
            return Trace(self, Parent(int(found[2], 16), int(found[3], 16), b",".join(headers.all(b"tracestate"))))
        return Trace(self, None) if self._sample and _ids.random() < self._sample else None

    def take(self, trace: Trace) -> None:
        """A request is over."""
        if len(self._waiting) >= MAX_WAITING:
            self.lost += 1 + len(trace.attempts)
            return
        self._waiting.append(trace)

    def close(self) -> None:
        """Sends what waits, for PATIENCE at most. Blocks."""
        self._closing.set()
        self._thread.join(PATIENCE)
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._closing.wait(GATHER):
            self._send_waiting()
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            spans = [span for trace in batch for span in self._spans.of(trace)]
            if self._exporter.export(spans) is self._success:
                self.sent += len(spans)
            else:
                self.lost += len(spans)
                if self._closing.is_set():  # whoever waits for the end does not wait for a collector that is away
                    self.lost += sum(1 + len(trace.attempts) for trace in self._waiting)
                    self._waiting.clear()
        if self.lost > self._told and time.monotonic() - self._told_at >= TELL_EVERY:
            self._told_at, self._told = time.monotonic(), self.lost
            self._journal.record("warning", "spans_lost", count=self.lost)


class Spans:
    """Makes spans of what was noted. They are put together whole: a span that is begun, changed and ended through a
    tracer costs several times as much, and all is known at the end."""

    def __init__(self, resource: Resource) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

        self._span, self._context, self._kind = ReadableSpan, SpanContext, SpanKind
        self._unset, self._error = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
        self._flags, self._state = TraceFlags(TraceFlags.SAMPLED), TraceState
        self._resource = resource
        self._scope = InstrumentationScope("gproxyd", __version__)

    def of(self, trace: Trace) -> list[ReadableSpan]:
        """The request's span, and one for each attempt."""
        record, parent = trace.record, trace.parent
        state = self._state.from_header([parent.state.decode("latin-1")]) if parent and parent.state else self._state()
        context = self._context(trace.trace, trace.span, False, self._flags, state)
        caller = self._context(parent.trace, parent.span, True, self._flags, state) if parent else None
        operation = OPERATIONS.get(record.endpoint or "")
        faulty = trace.outcome in _FAULTS or record.status >= 500
        made = self._span(
            _name(operation, record.endpoint, record.model),
            context,
            caller,
            self._resource,
            _of_request(trace, operation),
            kind=self._kind.SERVER,
            status=self._error if faulty else self._unset,
            start_time=trace.started,
            end_time=trace.ended,
            instrumentation_scope=self._scope,
        )
        tries = [
            self._span(
                _name(operation, record.endpoint, attempt.model),
                self._context(trace.trace, attempt.span, False, self._flags, state),
                context,
                self._resource,
                _of_attempt(attempt, operation, number),
                kind=self._kind.CLIENT,
                status=self._error if attempt.error or attempt.status >= 400 else self._unset,
                start_time=attempt.started,
                end_time=attempt.ended,
                instrumentation_scope=self._scope,
            )
            for number, attempt in enumerate(trace.attempts)
        ]
        return [made, *tries]


def opened(settings: Settings, journal: Journal) -> Tracing | None:
    """As configured; None if there is no endpoint. Raises ConfigError if the SDK is not installed."""
    if settings.endpoint is None:
        return None
    try:
        return Tracing(settings, journal)
    except ImportError:
        text = "needs the packages of the extra `otel`: pip install gproxyd[otel]"
        raise ConfigError([Problem("the configuration", None, "tracing.endpoint", text)]) from None


def _address(endpoint: str) -> str:
    """An address without a path is a collector's, and traces have their place there (OTLP/HTTP)."""
    return endpoint if "/" in endpoint.partition("://")[2].rstrip("/") else f"{endpoint.rstrip('/')}/v1/traces"


def _name(operation: str | None, endpoint: str | None, model: str | None) -> str:
    """{gen_ai.operation.name} {gen_ai.request.model}"""
    return " ".join(filter(None, (operation or endpoint or "request", model if operation else None)))


def _of_request(trace: Trace, operation: str | None) -> dict[str, Any]:
    record = trace.record
    told: dict[str, Any] = {
        "gproxyd.request_id": record.request_id,
        "gproxyd.endpoint": record.endpoint,
        "gproxyd.form": record.form,
        "gproxyd.provider": record.provider,
        "gproxyd.requested_model": record.requested_model,
        "gproxyd.user": record.user,
        "gproxyd.key": record.key,
        "gproxyd.outcome": trace.outcome,
        "gproxyd.cost_usd": None if record.cost_nanousd is None else format_usd(record.cost_nanousd),
        "http.response.status_code": record.status or None,
    }
    if trace.outcome != "ok" or record.status >= 400:
        told["error.type"] = trace.reason or str(record.status)
    if trace.attempts:
        told |= _target(trace.attempts[-1], operation)
    if operation is not None:
        told |= _usage(record)
    return {name: value for name, value in told.items() if value is not None}


def _usage(record: UsageRecord) -> dict[str, Any]:
    """Input includes what came from a cache or went into one, whatever the vendor's own counting is."""
    written = (record.cache_write_tokens or 0) + (record.cache_write_1h_tokens or 0)
    given = record.input_tokens
    if given is not None and record.dialect == "anthropic":
        given += (record.cache_read_tokens or 0) + written
    first = record.ttft_ms if record.stream else None
    return {
        "gen_ai.request.stream": record.stream,
        "gen_ai.response.time_to_first_chunk": None if first is None else first / 1000,
        "gen_ai.usage.input_tokens": given,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cache_read_tokens,
        "gen_ai.usage.cache_creation.input_tokens": written or record.cache_write_tokens,
        "gen_ai.usage.reasoning.output_tokens": record.reasoning_tokens,
    }


def _of_attempt(attempt: Attempt, operation: str | None, number: int) -> dict[str, Any]:
    told = _target(attempt, operation) | {"gproxyd.provider": attempt.provider}
    if number:
        told["http.request.resend_count"] = number
    if attempt.status:
        told["http.response.status_code"] = attempt.status
    if attempt.error or attempt.status >= 400:
        told["error.type"] = attempt.error or str(attempt.status)
    return told


def _target(attempt: Attempt, operation: str | None) -> dict[str, Any]:
    told: dict[str, Any] = {"server.address": attempt.origin.host, "server.port": attempt.origin.port}
    if operation is not None:
        told["gen_ai.operation.name"] = operation
        told["gen_ai.provider.name"] = provider_name(attempt.vendor, attempt.provider)
        if attempt.model:
            told["gen_ai.request.model"] = attempt.model
    return told
