"""The short way where no connection to the upstream is idle: it dials, and fails just as the long way does."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import orjson
import pytest

from gproxyd.gateway import lane
from tests.support import raw
from tests.support.configs import providers_at
from tests.support.raw import Reply
from tests.support.replies import json_reply
from tests.support.running import Loop, Running, until
from tests.support.servers import accepting, black_hole, listening, read_request
from tests.support.upstream import Fin, Got, Script, Upstream

LONG_WAY = ("Date", "Sun, 06 Nov 1994 08:49:37 GMT")
"""A header with which no head is remembered."""


def asked(text: str, *more: tuple[str, str]) -> bytes:
    body = {"model": "up/m", "messages": [{"role": "user", "content": text}]}
    return raw.request("/v1/chat/completions", body, headers=more)


def echo(got: Got) -> Script:
    """Tells what was said, and ends the connection."""
    said = orjson.loads(got.body)["messages"][0]["content"]
    message = {"role": "assistant", "content": said}
    body = orjson.dumps({"model": "m", "choices": [{"index": 0, "message": message}]})
    return [json_reply(body, headers=b"Connection: close\r\n"), Fin()]


def gateway_to(loop: Loop, url: str, *, connect: str = "500ms") -> Running:
    retries = "routing: {retries: {max: 10, budget: 1.0}}\n"
    return loop.gateway(providers_at({"up": url}, connect=connect, first_byte="5s", idle="5s", more=retries))


@pytest.fixture
def flights(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[lane.Flight]]:
    """What takes the short way."""
    found: list[lane.Flight] = []
    depart = lane.Flight.depart

    def counted(self: lane.Flight, body: bytes) -> None:
        found.append(self)
        depart(self, body)

    monkeypatch.setattr(lane.Flight, "depart", counted)
    yield found
    found.clear()


def test_requests_that_find_no_idle_connection_dial_and_get_their_own_answers(
    loop: Loop, flights: list[lane.Flight]
) -> None:
    upstream = Upstream(loop, echo).start()
    gateway = gateway_to(loop, upstream.url)
    assert raw.send(gateway.port, asked("first")).status == 200
    with ExitStack() as stack:
        socks = [stack.enter_context(raw.connect(gateway.port)) for _ in range(40)]
        for number, sock in enumerate(socks):
            sock.sendall(asked(f"number {number}"))
        for number, sock in enumerate(socks):
            reply = raw.read(sock)
            assert reply.json["choices"][0]["message"]["content"] == f"number {number}"
            assert reply.header("x-gproxyd-attempts") == "1"
    assert len(flights) == 40
    assert upstream.connections == 41
    until(gateway.at_rest)


class Closing:
    """An upstream that answers so many requests, and then listens no more until it is to."""

    def __init__(self) -> None:
        self.port = 0
        self.processed = 0

    def serve(self, connection: socket.socket) -> None:
        read_request(connection)
        self.processed += 1
        connection.sendall(json_reply(b'{"model":"m","choices":[]}', headers=b"Connection: close\r\n"))


def told(reply: Reply) -> tuple[int, object, str | None]:
    code = reply.json["error"]["code"] if reply.status >= 400 else None
    return reply.status, code, reply.header("x-gproxyd-attempts")


def test_an_upstream_that_refuses_is_told_of_as_on_the_long_way(loop: Loop, flights: list[lane.Flight]) -> None:
    found = []
    for more in ((), (LONG_WAY,)):
        upstream = Closing()
        with listening(upstream.serve) as port:
            gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
            assert raw.send(gateway.port, asked("first", *more)).status == 200
        before = len(flights)
        reply = raw.send(gateway.port, asked("nobody listens", *more))
        line = gateway.request(reply.header("x-request-id") or "")
        found.append((told(reply), line["attempts"], line["outcome"], line["reason"], len(flights) - before))
        until(gateway.at_rest)
    short, long = found
    assert short[:-1] == long[:-1]
    assert (short[-1], long[-1]) == (1, 0)
    assert short[0][:2] == (502, "upstream_error")


def test_an_upstream_that_comes_back_is_asked_once_more(loop: Loop, flights: list[lane.Flight]) -> None:
    upstream = Closing()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with accepting(listener, upstream.serve):
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
        assert raw.send(gateway.port, asked("first")).status == 200
    with raw.connect(gateway.port) as sock:
        sock.sendall(asked("wait a moment"))
        until(lambda: flights)
        with accepting(socket.create_server(("127.0.0.1", port)), upstream.serve):
            reply = raw.read(sock)
    assert (reply.status, upstream.processed) == (200, 2)
    assert int(reply.header("x-gproxyd-attempts") or 0) > 1


def known_but_unreachable(loop: Loop, stack: ExitStack, connect: str) -> Running:
    """A gateway that knows the head, and whose upstream then is a black hole."""
    upstream = Closing()
    with listening(upstream.serve) as port:
        gateway = gateway_to(loop, f"http://localhost:{port}", connect=connect)
        assert raw.send(gateway.port, asked("first")).status == 200
    hole = stack.enter_context(black_hole())
    names = gateway.daemon.gateway.exchanges.pool._dialler._names
    infos = [(*info[:4], (info[4][0], hole, *info[4][2:])) for _, known in names.values() for info in known]
    for name in names:
        names[name] = (loop.loop.time() + 60, infos[-1:])
    return gateway


def test_who_cannot_be_reached_in_time_is_given_up(loop: Loop, flights: list[lane.Flight]) -> None:
    with ExitStack() as stack:
        gateway = known_but_unreachable(loop, stack, "300ms")
        began = time.monotonic()
        reply = raw.send(gateway.port, asked("too late"))
        assert told(reply)[:2] == (504, "upstream_timeout")
        assert 0.25 < time.monotonic() - began < 25
        assert len(flights) == 1
        until(gateway.at_rest)


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_meanwhile_ends_the_dialling(loop: Loop, flights: list[lane.Flight], reset: bool) -> None:
    with ExitStack() as stack:
        gateway = known_but_unreachable(loop, stack, "60s")
        with raw.connect(gateway.port) as sock:
            sock.sendall(asked("who is gone"))
            until(lambda: flights)
            time.sleep(0.1)
            if reset:
                raw.reset(sock)
        until(gateway.at_rest)
        until(lambda: [line for line in gateway.requests() if line["outcome"] == "client_gone"])
    (line,) = [line for line in gateway.requests() if line["outcome"] == "client_gone"]
    assert (line["status"], line["attempts"]) == (499, 1)
    assert flights[0]._dialling is None or flights[0]._dialling.cancelled()


def test_a_stop_ends_who_is_still_dialling(loop: Loop, flights: list[lane.Flight]) -> None:
    with ExitStack() as stack:
        gateway = known_but_unreachable(loop, stack, "60s")
        sock = stack.enter_context(raw.connect(gateway.port))
        sock.sendall(asked("too late"))
        until(lambda: flights)
        time.sleep(0.05)
        began = time.monotonic()
        gateway.stop()
        assert time.monotonic() - began < 10
