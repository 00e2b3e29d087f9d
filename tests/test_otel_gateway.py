"""Traces of a running gateway: every admitted request is one, on the long way and on the short one."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from gproxyd.host.demo import DemoVendor
from tests.support.running import CLIENT_KEY, CONFIG, Loop, Running, until
from tests.test_otel import CLIENT, ERROR, PARENT, SERVER, SPAN, TRACE, Collector, attributes

CHAT = {"model": "chat-default", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
def scripted(loop: Loop) -> Iterator[tuple[DemoVendor, str]]:
    """A vendor of its own, and its address."""
    mark = loop.mark()
    yield loop.vendor()
    loop.release(mark)


@pytest.fixture
def traced(loop: Loop, scripted: tuple[DemoVendor, str], collector: Collector) -> Running:
    collector.requests.clear()
    return loop.gateway(CONFIG.format(vendor=scripted[1]) + f'tracing: {{endpoint: "{collector.address}"}}\n')


def ask(connection: http.client.HTTPConnection, body: Any, **headers: str) -> int:
    told = {"authorization": f"Bearer {CLIENT_KEY}", "content-type": "application/json", **headers}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), told)
    response = connection.getresponse()
    response.read()
    return response.status


def spans(collector: Collector, count: int) -> list[Any]:
    found: list[Any] = until(lambda: found if len(found := collector.spans()) >= count else None)
    assert len(found) == count
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_each_request_is_a_trace_with_its_attempt_whichever_way_it_goes(
    traced: Running, scripted: tuple[DemoVendor, str], collector: Collector, stream: bool
) -> None:
    connection = http.client.HTTPConnection(traced.host, traced.port)
    for _ in range(3):  # the first goes the long way, the others the short one
        assert ask(connection, {**CHAT, "stream": stream}, traceparent=PARENT) == 200
    connection.close()
    found = spans(collector, 6)
    requests, tries = ([span for span in found if span.kind == kind] for kind in (SERVER, CLIENT))
    assert {span.trace_id.hex() for span in found} == {TRACE}
    assert {span.parent_span_id.hex() for span in requests} == {SPAN}
    assert [span.parent_span_id for span in tries] == [span.span_id for span in requests]
    for span in requests:
        told = attributes(span)
        assert told["gen_ai.usage.output_tokens"] > 0
        assert (told["gen_ai.request.stream"], told["gproxyd.requested_model"]) == (stream, "chat-default")
    for span in tries:
        assert attributes(span)["http.response.status_code"] == 200
    sent = [seen.header("traceparent") for seen in scripted[0].seen]
    assert sent == [[f"00-{TRACE}-{span.span_id.hex()}-01"] for span in tries]


def test_a_failure_is_told_where_it_happened(
    traced: Running, scripted: tuple[DemoVendor, str], collector: Collector, loop: Loop
) -> None:
    loop.run(scripted[0].stop())
    connection = http.client.HTTPConnection(traced.host, traced.port)
    assert ask(connection, CHAT) == 502
    connection.close()
    request, tried = spans(collector, 2)
    assert (request.status.code, tried.status.code) == (ERROR, ERROR)
    assert attributes(request)["error.type"] == attributes(tried)["error.type"]


def test_what_its_caller_does_not_trace_passes_as_it_came(
    traced: Running, scripted: tuple[DemoVendor, str], collector: Collector
) -> None:
    given = PARENT[:-1] + "0"
    connection = http.client.HTTPConnection(traced.host, traced.port)
    assert ask(connection, CHAT, traceparent=given) == 200
    assert ask(connection, CHAT) == 200  # this one is told, and what was not told is not among its spans
    connection.close()
    spans(collector, 2)
    assert scripted[0].seen[0].header("traceparent") == [given]


def test_who_is_not_let_in_makes_no_spans(traced: Running, collector: Collector) -> None:
    connection = http.client.HTTPConnection(traced.host, traced.port)
    assert ask(connection, CHAT, authorization="Bearer wrong") == 401
    assert ask(connection, CHAT) == 200
    connection.close()
    spans(collector, 2)
