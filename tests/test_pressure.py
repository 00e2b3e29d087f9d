"""Clients that are slow: what was under way for them reaches them whole, and disturbs nobody after them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gproxyd.gateway import doorstep
from tests.support import raw
from tests.support.certs import Authority, believed
from tests.support.configs import providers_at
from tests.support.raw import Reply
from tests.support.replies import json_reply
from tests.support.running import Loop, Running, until
from tests.support.servers import listening, read_request

KIB = 1024
CHAT = raw.request("/v1/chat/completions", {"model": "fast", "messages": []})
FILE = raw.request("/up/v1/files/f/content")
OK = json_reply(b'{"id":"x","object":"chat.completion","model":"m","choices":[]}')


def config(url: str, *, first_byte: str = "20s") -> str:
    more = "aliases: {fast: up/m}\n"
    return providers_at({"up": url}, connect="5s", first_byte=first_byte, idle="20s", keepalive="0s", more=more)


@pytest.fixture
def own_loop() -> Iterator[Loop]:
    """A loop that carries one gateway and nothing else."""
    with Loop() as running:
        yield running


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes little for a client, so that few bytes are enough to meet back-pressure."""
    made = doorstep.DoorProtocol.connection_made

    def connection_made(self: doorstep.DoorProtocol, transport: asyncio.BaseTransport) -> None:
        made(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)

    monkeypatch.setattr(doorstep.DoorProtocol, "connection_made", connection_made)


def outcomes(gateway: Running, count: int) -> list[str]:
    """How so many requests ended, as soon as all of them are logged."""
    return until(lambda: lines if len(lines := [line["outcome"] for line in gateway.requests()]) >= count else None)


# What is under way when a client is slow.


def read_slowly(port: int, request: bytes, pause: float = 0.3) -> Reply:
    """Asks, reads nothing for a while, then all of it."""
    with raw.connect(port, rcvbuf=4096) as sock:
        sock.sendall(request)
        time.sleep(pause)
        return raw.read(sock)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("size", [150_000, 180_000, 240_000, 400_000])
@pytest.mark.parametrize("target", [FILE, CHAT], ids=["bytes", "a held answer"])
def test_behind_an_answer_for_a_slow_client_the_next_one_is_read(own_loop: Loop, target: bytes, size: int) -> None:
    """Its last bytes are often those which fill the client's buffer; and then its connection is used again."""
    connections: list[int] = []

    def serve(peer: socket.socket) -> None:
        connections.append(len(connections))
        large = True
        while True:
            read_request(peer)
            peer.sendall(json_reply(b'{"model":"m","x":"%b"}' % (b"y" * size)) if large else OK)
            large = False

    with listening(serve) as port:
        gateway = own_loop.gateway(config(f"http://127.0.0.1:{port}", first_byte="1s"))
        for request in (target, CHAT):
            assert read_slowly(gateway.port, request).complete
        began = time.monotonic()
        assert raw.send(gateway.port, CHAT).status == 200
        assert time.monotonic() - began < 0.5
        assert outcomes(gateway, 3) == ["ok"] * 3
    assert len(connections) == 1


def leave_at_once(secure: ssl.SSLSocket) -> None:
    """Says that it goes, and goes, as most servers do."""
    secure.setblocking(False)
    try:
        secure.unwrap()
    except OSError:
        pass  # it does not wait for an answer
    secure.close()


@contextmanager
def secure_gateway(loop: Loop, folder: Path, serve: Callable[[ssl.SSLSocket], None]) -> Iterator[Running]:
    authority = Authority(folder)
    context = authority.server()

    def talk(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as secure:
            serve(secure)

    with believed(authority), listening(talk) as port:
        yield loop.gateway(config(f"https://localhost:{port}"))


FRAMINGS = {"length": b"Content-Length: %d\r\n", "the end": b""}


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("kind", [b"audio/mpeg", b"text/event-stream"], ids=["bytes", "events"])
def test_a_slow_client_gets_all_of_an_answer_whose_secure_upstream_has_left(
    own_loop: Loop, tmp_path: Path, framing: str, kind: bytes
) -> None:
    unit = b"data: %b\n\n" % (b"y" * 992)
    sizes = iter([200, 400, 500, 600, 700, 900])
    size = 0

    def serve(peer: ssl.SSLSocket) -> None:
        nonlocal size
        size = next(sizes)
        read_request(peer)
        body, line = unit * size, FRAMINGS[framing]
        line = line % len(body) if line else line
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nConnection: close\r\n%b\r\n%b" % (kind, line, body))
        leave_at_once(peer)

    with secure_gateway(own_loop, tmp_path, serve) as gateway:
        for _ in range(6):
            reply = read_slowly(gateway.port, FILE)
            assert reply.complete
            assert reply.body == unit * size, (len(reply.body), size * len(unit))
        assert outcomes(gateway, 6) == ["ok"] * 6


@pytest.mark.parametrize("told", [True, False], ids=["announced", "cut off"])
def test_the_end_of_a_secure_answer_counts_only_if_it_was_announced(own_loop: Loop, tmp_path: Path, told: bool) -> None:
    """Where nothing but the end of the connection ends a body, whoever cuts the wire could shorten it."""

    def serve(peer: ssl.SSLSocket) -> None:
        read_request(peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n" + b"x" * 1000)
        if told:
            leave_at_once(peer)

    with secure_gateway(own_loop, tmp_path, serve) as gateway:
        reply = raw.send(gateway.port, FILE)
        assert (reply.status, reply.complete) == (200, told)
        line = until(gateway.requests)[0]
        assert (line["outcome"] == "ok") == told
