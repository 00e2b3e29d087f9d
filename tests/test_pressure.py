"""Peers that are too fast, too slow or gone: what one does holds up nobody else, and loses nothing."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import random
import select
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
from tests.support.process import Process
from tests.support.raw import Reply
from tests.support.replies import LAST_CHUNK, json_reply
from tests.support.running import SECRETS, Loop, Running, until
from tests.support.servers import listening, read_request

KIB, MIB = 1024, 1024 * 1024
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


# Who is fast does not hold up the others.


class Turns:
    """The longest turn of a loop while the block runs, in seconds of its thread's own time.

    Not those of the clock, which on a busy machine tell of the neighbours.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._over = False
        self.worst = 0.0

    async def _count(self) -> None:
        before = time.thread_time()
        while not self._over:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.worst, before = max(self.worst, now - before), now

    def __enter__(self) -> Turns:
        self._counting = asyncio.run_coroutine_threadsafe(self._count(), self._loop.loop)
        time.sleep(0.02)
        self.worst = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._counting.result(10)


def shortest(loop: Loop, attempts: int, work: Callable[[], None], enough: float) -> float:
    """The longest turn of the best of some attempts: what else the machine does can only make it worse."""
    best = float("inf")
    gc.collect()
    gc.freeze()  # as the daemon does
    try:
        for _ in range(attempts):
            with Turns(loop) as turns:
                work()
            best = min(best, turns.worst)
            if best < enough:
                break
    finally:
        gc.unfreeze()
    return best


_LOGPROB = (
    b'{"token":"Hel","logprob":-0.0001,"bytes":[72,101,108],"top_logprobs":[{"token":"a","logprob":-1.5,'
    b'"bytes":[97]},{"token":"b","logprob":-2,"bytes":[98]}]},'
)
_EVENT = b'data: {"id":"x","model":"m","choices":[{"delta":{"content":"hello"}}]}\n\n'
_USAGE = _EVENT.replace(b"}]}\n", b'}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n')
_VECTOR = b'{"object":"embedding","index":0,"embedding":[%b0.1]},' % (b"-0.0123456," * 1535)


def _json(unit: bytes, size: int) -> bytes:
    return b'{"id":"x","model":"m","data":[%b{}],"usage":{"prompt_tokens":1}}' % (unit * (size // len(unit)))


def _packed(body: bytes) -> bytes:
    """As an upstream compresses prose and JSON: to about a tenth."""
    noise = random.Random(7)
    lines = body.split(b"\n\n")
    return gzip.compress(b"\n\n".join(line.replace(b"hello", noise.randbytes(4).hex().encode()) for line in lines), 5)


ANSWERS: dict[str, tuple[bytes, bytes, Callable[[], bytes]]] = {
    "JSON with log probabilities": (b"application/json", b"", lambda: _json(_LOGPROB, 8 * MIB)),
    "JSON with embeddings": (b"application/json", b"", lambda: _json(_VECTOR, 16 * MIB)),
    "events": (b"text/event-stream", b"", lambda: _EVENT * (8 * MIB // len(_EVENT))),
    "events with tokens": (b"text/event-stream", b"", lambda: _USAGE * (8 * MIB // len(_USAGE))),
    "events with CRLF": (
        b"text/event-stream",
        b"",
        lambda: _EVENT.replace(b"\n", b"\r\n") * (8 * MIB // len(_EVENT)),
    ),
    "compressed events": (
        b"text/event-stream",
        b"Content-Encoding: gzip\r\n",
        lambda: _packed(_EVENT * (8 * MIB // len(_EVENT))),
    ),
}


def drink(port: int, request: bytes) -> int:
    """Reads one answer as fast as it comes; its bytes."""
    with raw.connect(port, timeout=30) as sock:
        sock.sendall(request)
        size, length, tail = 0, 0, b""
        while not (tail.endswith(LAST_CHUNK) or (length and size >= length)):
            data = sock.recv(MIB)
            assert data
            if not size:
                head, _, _ = data.partition(b"\r\n\r\n")
                _, found, after = head.lower().partition(b"\r\ncontent-length: ")
                length = len(head) + 4 + int(after.partition(b"\r\n")[0]) if found else 0
            size += len(data)
            tail = (tail + data)[-64:]
        assert b'"error"' not in tail
    return size


@pytest.mark.parametrize("what", ANSWERS)
def test_a_large_answer_that_comes_at_once_does_not_hold_up_the_others(own_loop: Loop, what: str) -> None:
    kind, line, make = ANSWERS[what]
    body = make()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n" % (kind, line, len(body))

    def serve(peer: socket.socket) -> None:
        while True:
            read_request(peer)
            peer.sendall(head)
            peer.sendall(body)

    with listening(serve) as port:
        gateway = own_loop.gateway(config(f"http://127.0.0.1:{port}"))
        worst = shortest(own_loop, 3, lambda: _ignored(drink(gateway.port, CHAT)), 0.020)
    print(f"{what}: {worst * 1e3:.1f} ms")
    assert worst < 0.035  # two slices of the densest, on a machine that has others to serve


def _ignored(_: int) -> None:
    """What was read does not matter here."""


def _picture(size: int) -> bytes:
    data = base64.b64encode(random.Random(1).randbytes(size * 3 // 4))
    return b'{"model":"fast","messages":[{"role":"user","content":[{"image_url":{"url":"data:;base64,%b"}}]}]}' % data


def _text(size: int) -> bytes:
    message = b'{"role":"user","content":"%b"},' % (b'Hello, \\"world\\" ' * 60)
    return b'{"messages":[%b{}],"model":"fast"}' % (message * (size // len(message)))


def _deep(size: int) -> bytes:
    return b'{"model":"fast","messages":[],"x":[%b0]}' % ((b"[" * 500 + b"]" * 500 + b",") * (size // 1001))


REQUESTS: dict[str, tuple[Callable[[int], bytes], int]] = {
    "a picture": (_picture, 20 * MIB),
    "a long conversation": (_text, 20 * MIB),
    "deep nesting": (_deep, 2 * MIB),
}


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("what", REQUESTS)
def test_a_large_request_does_not_hold_up_the_others(own_loop: Loop, tmp_path: Path, what: str, secure: bool) -> None:
    make, size = REQUESTS[what]
    body = make(size)
    request = raw.request("/v1/chat/completions", body, headers=[("Content-Type", "application/json")])
    received: list[int] = []

    def serve(peer: socket.socket) -> None:
        while True:
            received.append(len(read_request(peer)[1]))
            peer.sendall(OK)

    def send(gateway: Running) -> None:
        with raw.connect(gateway.port, timeout=60) as sock:
            sock.sendall(request)
            assert raw.read(sock).status == 200

    if secure:
        with secure_gateway(own_loop, tmp_path, serve) as gateway:
            worst = shortest(own_loop, 4, lambda: send(gateway), 0.020)
    else:
        with listening(serve) as port:
            gateway = own_loop.gateway(config(f"http://127.0.0.1:{port}"))
            worst = shortest(own_loop, 4, lambda: send(gateway), 0.020)
    assert set(received) == {len(body) - len("fast") + len("m")}
    print(f"{what}: {worst * 1e3:.1f} ms")
    assert worst < 0.020


# Who asks and does not listen.


@pytest.mark.parametrize("what", ["health", "refusals", "models"])
def test_who_asks_on_and_on_and_reads_nothing_is_not_answered_on_and_on(tmp_path: Path, what: str) -> None:
    """Nobody needs a key for most of it."""
    request = {
        "health": raw.request("/healthz", key=None),
        "refusals": raw.request("/v1/files", key=None),
        "models": raw.request("/v1/models"),
    }[what]
    data = memoryview(request * 2000)
    with Process(tmp_path, config("http://127.0.0.1:9"), SECRETS) as daemon:
        for _ in range(50):  # what is needed once
            raw.send(daemon.port, request)
        before = daemon.memory()["VmRSS"]
        with raw.connect(daemon.port, rcvbuf=4096) as sock:
            sock.setblocking(False)
            at, end = 0, time.monotonic() + 4
            while time.monotonic() < end:
                try:
                    at = (at + sock.send(data[at:])) % len(data)
                except BlockingIOError:
                    select.select([], [sock], [], 0.1)
            grown = daemon.memory()["VmRSS"] - before
            assert raw.send(daemon.port, raw.request("/healthz", key=None)).status == 200
    print(f"{what}: {grown / MIB:.1f} MiB")
    assert grown < 16 * MIB
