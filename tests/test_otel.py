"""Traces: what a collector gets over OTLP/HTTP, and what goes to the upstream."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import orjson
import pytest

from gproxyd.errors import ConfigError
from gproxyd.observe import otel
from gproxyd.observe.journal import Journal
from gproxyd.observe.otel import Trace, Tracing, opened
from gproxyd.types import Origin, UsageRecord
from gproxyd.wire.headers import Headers

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SERVER, CLIENT = 2, 3
ERROR = 2
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: api.openai.com\r\nContent-Length: 2\r\n\r\n"
ORIGIN = Origin("https", "api.openai.com", 443)


class Collector:
    """Takes OTLP over HTTP. `status` is what it answers."""

    def __init__(self) -> None:
        self.status = 200
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.block = threading.Event()
        self.block.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.block.wait(10)
                outer.requests.append((self.path, {name.lower(): text for name, text in self.headers.items()}, body))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nobody wants to know."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[Any]:
        found = []
        for _, _, body in self.requests:
            told = ExportTraceServiceRequest.FromString(body)
            found += [span for part in told.resource_spans for scope in part.scope_spans for span in scope.spans]
        return found

    def close(self) -> None:
        self.block.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@dataclass(frozen=True)
class Settings:
    endpoint: str | None
    service: str = "gproxyd"
    sample: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
def lines() -> Iterator[tuple[Journal, int]]:
    reader, writer = os.pipe()
    journal = Journal(form="json", descriptor=writer)
    yield journal, reader
    journal.close()
    os.close(writer)
    os.close(reader)


@pytest.fixture
def journal(lines: tuple[Journal, int]) -> Journal:
    return lines[0]


@pytest.fixture
def tracing(collector: Collector, journal: Journal) -> Iterator[Tracing]:
    made = opened(Settings(collector.address), journal)
    assert made is not None
    yield made
    if not made._closing.is_set():
        made.close()


def headers(**given: str) -> Headers:
    return Headers([(name.encode(), text.encode()) for name, text in given.items()])


def record(**changed: Any) -> UsageRecord:
    usual = UsageRecord(
        "req_1", 0.0, "req_1", "alice", "laptop", "chat", "aggregated", "openai_chat", "openai-main", "gpt-5",
        "chat-default", 100, 20, 60, None, None, 5, 1_234_000, "measured", 200, True, 1, 250.0, 900.0, False,
    )  # fmt: skip
    return usual._replace(**changed)


def attempt(trace: Trace, head: bytes = HEAD, provider: str = "openai-main", vendor: str = "openai") -> bytes:
    return trace.attempt(head, provider, vendor, "gpt-5", ORIGIN)


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def finished(tracing: Tracing, collector: Collector) -> list[Any]:
    tracing.close()
    return collector.spans()


def test_a_request_and_its_attempt_are_spans_of_one_trace(tracing: Tracing, collector: Collector) -> None:
    before = time.time_ns()
    trace = tracing.begin(headers())
    assert trace is not None
    attempt(trace)
    trace.finish(record(), 200, "ok", None)
    request, tried = finished(tracing, collector)
    assert (request.name, request.kind, tried.name, tried.kind) == ("chat gpt-5", SERVER, "chat gpt-5", CLIENT)
    assert request.trace_id == tried.trace_id and len(request.trace_id) == 16
    assert request.parent_span_id == b"" and tried.parent_span_id == request.span_id != tried.span_id
    assert before <= request.start_time_unix_nano <= tried.start_time_unix_nano
    assert tried.start_time_unix_nano <= tried.end_time_unix_nano <= request.end_time_unix_nano <= time.time_ns()
    assert (request.status.code, tried.status.code) == (0, 0)
    assert attributes(request) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-5",
        "gen_ai.request.stream": True,
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 60,
        "gen_ai.usage.reasoning.output_tokens": 5,
        "gproxyd.cost_usd": "0.001234",
        "gproxyd.endpoint": "chat",
        "gproxyd.form": "aggregated",
        "gproxyd.key": "laptop",
        "gproxyd.outcome": "ok",
        "gproxyd.provider": "openai-main",
        "gproxyd.request_id": "req_1",
        "gproxyd.requested_model": "chat-default",
        "gproxyd.user": "alice",
        "http.response.status_code": 200,
        "server.address": "api.openai.com",
        "server.port": 443,
    }
    assert attributes(tried) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-5",
        "gproxyd.provider": "openai-main",
        "http.response.status_code": 200,
        "server.address": "api.openai.com",
        "server.port": 443,
    }


def test_every_attempt_is_a_span_and_tells_why_it_failed(tracing: Tracing, collector: Collector) -> None:
    trace = tracing.begin(headers())
    assert trace is not None
    first = attempt(trace)
    trace.failed("connect")
    second = attempt(trace, provider="mistral-main", vendor="mistral")
    trace.failed("status", 503)
    attempt(trace, provider="local", vendor="")
    trace.finish(record(status=502), 0, "upstream_error", "reset")
    request, *tries = finished(tracing, collector)
    assert first != second
    told = [attributes(one) for one in tries]
    assert [one["error.type"] for one in told] == ["connect", "status", "reset"]
    assert [one.get("http.response.status_code") for one in told] == [None, 503, None]
    assert [one.get("http.request.resend_count") for one in told] == [None, 1, 2]
    assert [one["gen_ai.provider.name"] for one in told] == ["openai", "mistral_ai", "local"]
    assert [one.status.code for one in (request, *tries)] == [ERROR] * 4
    assert attributes(request)["error.type"] == "reset"
    for before, after in pairwise(tries):
        assert before.end_time_unix_nano <= after.start_time_unix_nano


def test_a_refusal_is_no_error_of_the_servers_and_has_no_attempt(tracing: Tracing, collector: Collector) -> None:
    trace = tracing.begin(headers())
    assert trace is not None
    told = record(status=429, provider=None, model=None, input_tokens=None, output_tokens=None, ttft_ms=None)
    trace.finish(told, 0, "refused", "rate_limited")
    (request,) = finished(tracing, collector)
    assert (request.name, request.status.code) == ("chat", 0)
    assert attributes(request)["error.type"] == "rate_limited"


def test_what_is_no_inference_has_no_attributes_of_one(tracing: Tracing, collector: Collector) -> None:
    trace = tracing.begin(headers())
    assert trace is not None
    attempt(trace)
    trace.finish(record(endpoint="files"), 200, "ok", None)
    for span in finished(tracing, collector):
        assert span.name == "files"
        assert not [name for name in attributes(span) if name.startswith("gen_ai")]


def test_input_tokens_include_cached_ones_whatever_the_vendor_counts(tracing: Tracing, collector: Collector) -> None:
    trace = tracing.begin(headers())
    assert trace is not None
    counted = {"cache_read_tokens": 60, "cache_write_tokens": 7, "cache_write_1h_tokens": 3, "input_tokens": 30}
    trace.finish(record(endpoint="messages", dialect="anthropic", **counted), 200, "ok", None)
    told = attributes(finished(tracing, collector)[0])
    assert told["gen_ai.usage.input_tokens"] == 100
    assert told["gen_ai.usage.cache_creation.input_tokens"] == 10


# The context.


def test_the_callers_trace_goes_on(tracing: Tracing, collector: Collector) -> None:
    trace = tracing.begin(headers(Traceparent=PARENT, tracestate="vendor=x,other=y"))
    assert trace is not None
    head = attempt(trace)
    trace.finish(record(), 200, "ok", None)
    request, tried = finished(tracing, collector)
    assert request.trace_id.hex() == TRACE and request.parent_span_id.hex() == SPAN
    assert tried.trace_state == request.trace_state == "vendor=x,other=y"
    assert head.endswith(b"\r\ntraceparent: 00-%b-%b-01\r\n\r\n" % (TRACE.encode(), tried.span_id.hex().encode()))


def test_upstream_goes_one_traceparent_and_nothing_else_changes(tracing: Tracing) -> None:
    trace = tracing.begin(headers(traceparent=PARENT))
    assert trace is not None
    theirs = HEAD[:-2] + b"TraceParent: " + PARENT.encode() + b"\r\nx-traceparent: kept\r\ntracestate: a=b\r\n\r\n"
    head = attempt(trace, theirs)
    assert head.lower().count(b"\r\ntraceparent:") == 1
    assert PARENT.encode() not in head
    ours = [line for line in head.split(b"\r\n") if line.startswith(b"traceparent:")]
    assert head.replace(ours[0] + b"\r\n", b"") == theirs.replace(b"TraceParent: " + PARENT.encode() + b"\r\n", b"")


@pytest.mark.parametrize(
    "given",
    [
        "",
        "00",
        PARENT.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-1",
        f" 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_a_traceparent_that_is_none_begins_a_new_trace(tracing: Tracing, given: str) -> None:
    trace = tracing.begin(headers(traceparent=given))
    assert trace is not None and trace.parent is None
    assert f"{trace.trace:032x}" != TRACE


def test_two_traceparents_are_none(tracing: Tracing) -> None:
    trace = tracing.begin(Headers([(b"traceparent", PARENT.encode())] * 2))
    assert trace is not None and trace.parent is None


def test_a_later_version_is_read_as_far_as_it_is_known(tracing: Tracing) -> None:
    trace = tracing.begin(headers(traceparent=f"cc-{TRACE}-{SPAN}-01-what-comes-later"))
    assert trace is not None and trace.parent is not None and trace.parent.span == int(SPAN, 16)


def test_what_the_caller_does_not_trace_is_not_traced(tracing: Tracing, collector: Collector) -> None:
    assert tracing.begin(headers(traceparent=f"00-{TRACE}-{SPAN}-00")) is None
    assert finished(tracing, collector) == []


@pytest.mark.parametrize(("sample", "least", "most"), [(0.0, 0, 0), (0.5, 350, 650), (1.0, 1000, 1000)])
def test_so_many_of_the_others_are_traced(
    collector: Collector, journal: Journal, sample: float, least: int, most: int
) -> None:
    tracing = opened(Settings(collector.address, sample=sample), journal)
    assert tracing is not None
    chosen = sum(tracing.begin(headers()) is not None for _ in range(1000))
    assert least <= chosen <= most
    assert tracing.begin(headers(traceparent=PARENT)) is not None  # its caller has decided
    tracing.close()


# Sending.


def test_it_goes_to_the_collectors_place_with_its_headers(collector: Collector, journal: Journal) -> None:
    for endpoint in (collector.address, collector.address + "/", collector.address + "/custom/traces"):
        tracing = opened(Settings(endpoint, service="edge", headers={"authorization": "Bearer t"}), journal)
        assert tracing is not None
        trace = tracing.begin(headers())
        assert trace is not None
        trace.finish(record(), 0, "ok", None)
        tracing.close()
        assert (tracing.sent, tracing.lost) == (1, 0)
    assert [path for path, _, _ in collector.requests] == ["/v1/traces", "/v1/traces", "/custom/traces"]
    _, told, body = collector.requests[0]
    assert (told["authorization"], told["content-type"]) == ("Bearer t", "application/x-protobuf")
    (part,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {one.key: one.value.string_value for one in part.resource.attributes}["service.name"] == "edge"


def test_a_collector_that_refuses_costs_spans_which_are_counted_and_told(
    collector: Collector, lines: tuple[Journal, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "GATHER", 0.01)
    collector.status = 400
    tracing = opened(Settings(collector.address), lines[0])
    assert tracing is not None
    for _ in range(3):
        trace = tracing.begin(headers())
        assert trace is not None
        attempt(trace)
        trace.finish(record(), 200, "ok", None)
    tracing.close()
    assert (tracing.sent, tracing.lost) == (0, 6)
    told = orjson.loads(os.read(lines[1], 4096).splitlines()[0])
    assert (told["event"], told["level"]) == ("spans_lost", "warning")
    assert 0 < told["count"] <= 6


def test_a_collector_that_hangs_holds_nobody_up_and_the_queue_is_bounded(
    collector: Collector, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "GATHER", 0.01)
    monkeypatch.setattr(otel, "PATIENCE", 0.3)
    monkeypatch.setattr(otel, "MAX_WAITING", 50)
    collector.block.clear()
    tracing = opened(Settings(collector.address), journal)
    assert tracing is not None
    slowest = 0.0
    for _ in range(500):
        trace = tracing.begin(headers())
        assert trace is not None
        before = time.perf_counter()
        trace.finish(record(), 200, "ok", None)
        slowest = max(slowest, time.perf_counter() - before)
    assert slowest < 0.1
    assert tracing.lost >= 400
    before = time.perf_counter()
    tracing.close()
    assert time.perf_counter() - before < 3
    collector.block.set()


def test_what_waits_is_sent_at_the_end(tracing: Tracing, collector: Collector) -> None:
    for number in range(600):
        trace = tracing.begin(headers())
        assert trace is not None
        trace.finish(record(request_id=f"req_{number}"), 0, "ok", None)
    told = [attributes(span)["gproxyd.request_id"] for span in finished(tracing, collector)]
    assert told == [f"req_{number}" for number in range(600)]
    assert (tracing.sent, tracing.lost) == (600, 0)


# Off.


def test_without_an_endpoint_there_is_nothing(journal: Journal) -> None:
    assert opened(Settings(None), journal) is None


def test_nothing_of_it_is_imported_while_it_is_off() -> None:
    code = (
        "import sys, gproxyd.daemon; from gproxyd.observe.otel import opened; from gproxyd.config import Config\n"
        "assert opened(Config().tracing, None) is None\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('opentelemetry', 'google', 'requests')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "[]\n"


def test_without_the_packages_the_configuration_is_refused(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError) as refused:
        opened(Settings("http://127.0.0.1:4318"), journal)
    assert "tracing.endpoint" in str(refused.value.problems[0]) and "gproxyd[otel]" in str(refused.value.problems[0])


def test_noting_a_request_costs_microseconds(tracing: Tracing) -> None:
    """The loop pays for ids, times and one line of a head; the rest is the thread's."""
    given, told = headers(traceparent=PARENT), record()

    def once() -> float:
        before = time.perf_counter()
        for _ in range(200):
            trace = tracing.begin(given)
            assert trace is not None
            attempt(trace)
            trace.finish(told, 200, "ok", None)
        return (time.perf_counter() - before) / 200

    best = min(once() for _ in range(10))
    print(f"{best * 1e6:.1f} us")
    assert best < 100e-6
