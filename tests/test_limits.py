"""Clients that are slow, silent or too many: they are told or let go, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from gproxyd.gateway import doorstep, intake
from gproxyd.gateway.intake import Budget
from gproxyd.upstream import connection
from tests.support import raw
from tests.support.certs import Authority, believed
from tests.support.checks import check_alive, check_error
from tests.support.configs import providers_at
from tests.support.process import Process, clean_environ
from tests.support.raw import Reply
from tests.support.running import SECRETS, Loop, Running, until
from tests.support.servers import listening, read_head
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Pause, Script, Stall, Upstream, chunk, json_reply

T = TypeVar("T")

MIB = 1024 * 1024
OK = json_reply(b'{"id":"x","object":"chat.completion","model":"m","choices":[]}')
EVENT = b'data: {"model":"m","choices":[]}\n\n'
HEALTH = raw.request("/healthz", key=None)
CHAT = raw.request("/up/v1/chat/completions", {"model": "m", "messages": []})
STREAM = raw.request("/up/v1/chat/completions", {"model": "m", "messages": [], "stream": True})
FORM = ("Content-Type", "multipart/form-data; boundary=frontier")


def config(url: str, *, server: str = "", idle: str = "20s") -> str:
    return providers_at({"up": url}, connect="5s", first_byte="20s", idle=idle, keepalive="0s", server=server)


def gateway_to(loop: Loop, upstream: Upstream | str, **more: str) -> Running:
    return loop.gateway(config(upstream if isinstance(upstream, str) else upstream.url, **more))


def nothing_held(gateway: Running) -> None:
    until(gateway.at_rest)
    assert gateway.daemon.gateway.budget.held == 0


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients have 0.4 s to begin, and as much for a head."""
    monkeypatch.setattr(doorstep, "FIRST_BYTE_DEADLINE", 0.4)
    monkeypatch.setattr(doorstep, "HEAD_DEADLINE", 0.4)


def ended_after(sock: socket.socket, began: float, drip: bytes = b"", every: float = 0.05) -> float:
    """Sends `drip` byte by byte until the gateway ends the connection; the seconds that took, three at most."""
    left = iter(drip)
    sock.settimeout(every)
    while time.monotonic() - began < 3:
        try:
            if not sock.recv(65536):
                break
        except TimeoutError:
            pass
        except ConnectionResetError:
            break
        try:
            sock.sendall(bytes([byte]) if (byte := next(left, None)) is not None else b"")
        except (BrokenPipeError, ConnectionResetError):
            break
    return time.monotonic() - began


# Heads.


@pytest.mark.usefixtures("hurry")
def test_who_says_nothing_is_let_go(gateway: Running) -> None:
    with raw.connect(gateway.port) as sock:
        assert 0.35 < ended_after(sock, time.monotonic()) < 1.2
    check_alive(gateway)


@pytest.mark.usefixtures("hurry")
def test_a_head_that_trickles_is_given_up_however_often_a_byte_comes(gateway: Running) -> None:
    with raw.connect(gateway.port) as sock:
        began = time.monotonic()
        assert 0.35 < ended_after(sock, began, b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"x" * 1000) < 1.2


@pytest.mark.usefixtures("hurry")
def test_the_time_for_a_head_begins_with_its_first_byte(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorstep, "FIRST_BYTE_DEADLINE", 5.0)
    with raw.connect(gateway.port) as sock:
        time.sleep(0.5)
        began = time.monotonic()
        sock.sendall(b"G")
        assert 0.35 < ended_after(sock, began, b"ET /healthz HT") < 1.2
    with raw.connect(gateway.port) as sock:
        time.sleep(0.5)
        sock.sendall(HEALTH)
        assert raw.read(sock).status == 200


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("begun", [3, 25])
def test_a_second_head_has_no_more_time_than_the_first(gateway: Running, begun: int) -> None:
    head = b"\r\nGET /healthz HTTP/1.1\r\nX-Slow: " + b"x" * 100
    with raw.connect(gateway.port) as sock:
        sock.sendall(HEALTH)
        assert raw.read(sock).status == 200
        time.sleep(0.6)  # an idle connection is left alone
        began = time.monotonic()
        sock.sendall(head[:begun])
        assert 0.35 < ended_after(sock, began, head[begun:]) < 1.2


@pytest.mark.usefixtures("hurry")
def test_idle_connections_and_long_answers_are_left_alone(loop: Loop) -> None:
    upstream = Upstream(loop, [EVENT_STREAM + chunk(EVENT), Pause(0.7), chunk(EVENT) + LAST_CHUNK]).start()
    gateway = gateway_to(loop, upstream)
    with raw.connect(gateway.port) as idle, raw.connect(gateway.port) as busy:
        idle.sendall(HEALTH)
        assert raw.read(idle).status == 200
        busy.sendall(STREAM)
        reply = raw.read(busy)
        assert (reply.status, reply.complete, reply.body) == (200, True, EVENT * 2)
        for sock in (idle, busy):
            time.sleep(0.25)
            sock.sendall(HEALTH)
            assert raw.read(sock).status == 200
        assert len(gateway.daemon._deadlines) <= 1  # the pool of upstream connections; clients that rest have none


@pytest.mark.usefixtures("hurry")
def test_a_body_may_take_longer_than_a_head(loop: Loop) -> None:
    gateway = gateway_to(loop, Upstream(loop, [OK]).start())
    head, _, body = CHAT.partition(b"\r\n\r\n")
    parts = [(head + b"\r\n\r\n", 0.3), *((body[i : i + 10], 0.15) for i in range(0, len(body), 10))]
    assert raw.send(gateway.port, parts).status == 200


def test_the_head_of_five_hundred_slow_clients_costs_nobody_else_anything(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorstep, "HEAD_DEADLINE", 1.0)
    gateway = gateway_to(loop, Upstream(loop, [OK]).start())
    with ExitStack() as stack:
        slow = [stack.enter_context(raw.connect(gateway.port)) for _ in range(500)]
        began = time.monotonic()
        for sock in slow:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
            sock.setblocking(False)
        took: list[float] = []
        while time.monotonic() - began < 0.8:
            for sock in slow[len(took) % 5 :: 5]:
                sock.send(b"x")
            asked = time.monotonic()
            assert raw.send(gateway.port, CHAT).status == 200
            took.append(time.monotonic() - asked)
        took.sort()
        assert took[len(took) * 9 // 10] < 0.15, took
        poller = select.poll()
        for sock in slow:
            poller.register(sock, select.POLLIN)
        until(lambda: len(poller.poll(0)) == len(slow) or None)
        assert time.monotonic() - began < 3
    until(lambda: gateway.daemon._door.crowd.count == 0)
    until(lambda: not gateway.daemon._door.connections)


# Bodies.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body must bring 1,000 bytes a second after 0.3 s of waiting, and something every 0.5 s."""
    monkeypatch.setattr(intake, "RATE_GRACE", 0.3)
    monkeypatch.setattr(intake, "MIN_RATE", 1000)
    monkeypatch.setattr(intake, "BODY_IDLE", 0.5)


def head_of(target: str, size: int | None, kind: tuple[str, str]) -> bytes:
    framing = ("Transfer-Encoding", "chunked") if size is None else ("Content-Length", str(size))
    return raw.request(target, b"", headers=[kind, framing])


JSON = ("Content-Type", "application/json")
JSON_HEAD = head_of("/up/v1/chat/completions", 100_000, JSON)
SLOW: dict[str, tuple[bytes, bytes]] = {
    "held": (JSON_HEAD, b'{"model":"m",'),
    "held, of unknown length": (head_of("/up/v1/chat/completions", None, JSON), b'd\r\n{"model":"m",\r\n'),
    "streamed": (head_of("/up/v1/files", 100_000, FORM), b"--frontier\r\n"),
    "streamed, of unknown length": (head_of("/up/v1/files", None, FORM), b"c\r\n--frontier\r\n\r\n"),
    "a form that is looked into": (head_of("/v1/audio/transcriptions", 100_000, FORM), b"--frontier\r\n"),
}


def slow_body(gateway: Running, name: str, each: bytes, every: float) -> tuple[Reply, float]:
    """Sends the beginning of a body, then `each` again and again, until an answer comes."""
    head, beginning = SLOW[name]
    one = b"%x\r\n%b\r\n" % (len(each), each) if b"chunked" in head and each else each
    with raw.connect(gateway.port) as sock:
        sock.sendall(head + beginning)
        began = time.monotonic()
        while not select.select([sock], [], [], every)[0]:
            assert time.monotonic() - began < 4, "no answer"
            sock.sendall(one)
        took = time.monotonic() - began
        return raw.read(sock), took


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", SLOW)
def test_a_body_that_trickles_is_given_up(loop: Loop, name: str) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream)
    reply, took = slow_body(gateway, name, b"x", 0.05)
    check_error(reply, 408, "request_timeout")
    assert reply.header("connection") == "close"
    assert 0.25 < took < 1.5
    nothing_held(gateway)
    if "streamed" in name:
        assert upstream.peer_left.wait(2)
        assert [got.complete for got in upstream.requests] == [False]
    else:
        assert upstream.connections == 0
    (line,) = until(gateway.requests)
    assert (line["status"], line["reason"]) == (408, "request_timeout")
    assert line["outcome"] != "internal_error"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", SLOW)
def test_a_body_that_stops_is_given_up(loop: Loop, name: str) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream, idle="500ms")
    reply, took = slow_body(gateway, name, b"", 0.05)
    check_error(reply, 408, "request_timeout")
    assert 0.4 < took < 1.5
    nothing_held(gateway)
    assert not [got for got in upstream.requests if got.complete]
    if "streamed" in name:
        assert upstream.peer_left.wait(2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("target", ["/up/v1/chat/completions", "/up/v1/files"])
def test_a_body_that_is_slow_but_not_too_slow_passes(loop: Loop, target: str) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream)
    body = b'{"model":"m","a":"' + b"x" * 3480 + b'"}'
    kind = JSON if "chat" in target else FORM
    parts = [(body[i : i + 175], 0.05) for i in range(0, len(body), 175)]
    reply = raw.send(gateway.port, [head_of(target, len(body), kind), *parts])
    assert reply.status == 200, reply.data
    assert upstream.requests[0].body == body


def test_an_upstream_that_takes_its_time_is_not_the_clients_fault(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "RATE_GRACE", 0.2)
    monkeypatch.setattr(intake, "MIN_RATE", 20 * MIB)
    size = 16 * MIB

    def slowly(peer: socket.socket) -> None:
        _, rest = read_head(peer)
        time.sleep(1.0)
        count = len(rest)
        while count < size:
            data = peer.recv(MIB)
            assert data
            count += len(data)
        peer.sendall(OK)

    with listening(slowly, rcvbuf=65536) as port:
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
        with raw.connect(gateway.port, timeout=10) as sock:
            sock.sendall(head_of("/up/v1/files", size, FORM) + b"x" * size)
            assert raw.read(sock).status == 200


def test_slow_bodies_leave_room_for_others(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: the upstream hears nothing of them, and every one is gone in time."""
    monkeypatch.setattr(intake, "BODY_IDLE", 0.6)
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream)
    with ExitStack() as stack:
        slow = [stack.enter_context(raw.connect(gateway.port)) for _ in range(100)]
        for sock in slow:
            sock.sendall(JSON_HEAD + b"{")
        until(lambda: gateway.daemon.gateway.in_flight == len(slow))
        assert raw.send(gateway.port, CHAT).status == 200
        assert [raw.read(sock).status for sock in slow] == [408] * len(slow)
    assert len(upstream.requests) == 1
    nothing_held(gateway)


# How many.


def refused_at_once(port: int, *, host: str = "127.0.0.1", source: str | None = None) -> Reply:
    began = time.monotonic()
    with connect_from(source, host, port) as sock:
        reply = raw.read(sock, until_complete=False)
    assert time.monotonic() - began < 1
    check_error(reply, 503, "overloaded")
    assert reply.header("retry-after") == "1"
    assert reply.header("connection") == "close"
    assert reply.header("date")
    assert reply.ended in ("fin", "rst")
    return reply


def connect_from(source: str | None, host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), 5, source_address=(source, 0) if source else None)


def test_beyond_the_limit_clients_are_told_and_those_inside_are_served(loop: Loop) -> None:
    upstream = Upstream(loop, [EVENT_STREAM + chunk(EVENT), Pause(1.0), chunk(EVENT) + LAST_CHUNK]).start()
    gateway = gateway_to(loop, upstream, server="max_connections: 10")
    crowd = gateway.daemon._door.crowd
    with ExitStack() as stack:
        stream = stack.enter_context(raw.connect(gateway.port))
        stream.sendall(STREAM)
        begun = stream.recv(65536)
        inside = [stack.enter_context(raw.connect(gateway.port)) for _ in range(9)]
        until(lambda: crowd.count == 10)
        for _ in range(20):
            refused_at_once(gateway.port)
        with raw.connect(gateway.port) as sock:  # one that has asked already can read its answer, too
            sock.sendall(CHAT)
            assert raw.read(sock).status == 503
        inside[0].sendall(HEALTH)
        assert raw.read(inside[0]).status == 200
        reply = raw.read(stream, seen=begun)
        assert (reply.complete, reply.body) == (True, EVENT * 2)
        assert crowd.count == 10
        inside.pop().close()
        until(lambda: crowd.count == 9)
        check_alive(gateway)
    until(lambda: crowd.count == 0)
    lines = [line for line in gateway.log() if line["event"] == "connections_refused"]
    assert 1 <= len(lines) <= 21
    assert {line["level"] for line in lines} == {"info"}


def test_a_flood_of_clients_beyond_the_limit_is_told_of_now_and_then(loop: Loop) -> None:
    gateway = gateway_to(loop, Upstream(loop, [OK]).start(), server="max_connections: 1")
    with raw.connect(gateway.port) as inside:
        inside.sendall(HEALTH)
        assert raw.read(inside).status == 200
        began = time.monotonic()
        for _ in range(500):
            with raw.connect(gateway.port) as sock:
                assert sock.recv(65536).startswith(b"HTTP/1.1 503 ")
        seconds = time.monotonic() - began
        inside.sendall(CHAT)
        assert raw.read(inside).status == 200
    lines = [line for line in gateway.log() if line["event"] == "connections_refused"]
    assert len(lines) <= 50 * (seconds + 2)


def test_health_is_seen_from_its_own_listener_though_nobody_else_gets_in(loop: Loop) -> None:
    server = 'max_connections: 1, ops_listen: ["127.0.0.1:0"]'
    gateway = gateway_to(loop, Upstream(loop, [OK]).start(), server=server)
    ops = int(gateway.daemon.addresses[1].rpartition(":")[2])
    with raw.connect(gateway.port):
        until(lambda: gateway.daemon._door.crowd.count == 1)
        refused_at_once(gateway.port)
        assert raw.send(ops, HEALTH).body == b"OK"


def in_a_network_of_its_own(work: Callable[[], T], *addresses: str) -> T:
    """Runs `work` in a thread, whose sockets and children live in a fresh network with these addresses."""

    def run() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x40000000):  # CLONE_NEWNET, of this thread alone (unshare(2))
            pytest.skip(f"no network namespace can be made here: {os.strerror(ctypes.get_errno())}")
        for address in addresses:
            command = ["ip", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else [])]
            subprocess.run(command, check=True, timeout=10)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(60)


def test_one_address_cannot_take_all_the_room(tmp_path: Path) -> None:
    server = "max_connections_per_address: 5, trusted_proxies: [192.0.2.9/32]"
    text = config("http://127.0.0.1:9", server=server).replace('"127.0.0.1:0"', '"0.0.0.0:0", "[::]:0"')

    def work() -> None:
        with Process(tmp_path, text, SECRETS) as daemon, ExitStack() as stack:
            ports = [int(address.rpartition(":")[2]) for address in daemon.ready["listen"].split()]

            def fill(source: str, count: int) -> list[socket.socket]:
                sockets = [stack.enter_context(connect_from(source, *at(source))) for _ in range(count)]
                for sock in sockets:  # each is inside, and stays
                    sock.sendall(HEALTH)
                    assert raw.read(sock).status == 200
                return sockets

            def at(source: str) -> tuple[str, int]:
                return ("2001:db8::1", ports[1]) if ":" in source else ("192.0.2.1", ports[0])

            def fill_one(source: str) -> bool:
                sock = stack.enter_context(connect_from(source, *at(source)))
                sock.sendall(HEALTH)
                return raw.read(sock).status == 200

            def full(source: str) -> None:
                host, port = at(source)
                refused_at_once(port, host=host, source=source)

            first = fill("192.0.2.2", 5)
            full("192.0.2.2")
            fill("192.0.2.3", 5)
            full("192.0.2.3")
            fill("192.0.2.9", 12)  # a trusted proxy stands for many
            fill("2001:db8:1::1", 3)
            fill("2001:db8:1::2", 2)
            full("2001:db8:1::1")  # one network, one client
            full("2001:db8:1::2")
            fill("2001:db8:2::1", 5)
            for _ in range(12):
                stack.enter_context(raw.connect(ports[0])).sendall(HEALTH)
            first.pop().close()
            until(lambda: fill_one("192.0.2.2"))
            full("192.0.2.2")
            first[0].sendall(HEALTH)
            assert raw.read(first[0]).status == 200

    v4 = [f"192.0.2.{number}/24" for number in (1, 2, 3, 9)]
    v6 = [f"{address}/128" for address in ("2001:db8::1", "2001:db8:1::1", "2001:db8:1::2", "2001:db8:2::1")]
    in_a_network_of_its_own(work, *v4, *v6)


# How much.


@pytest.fixture
def highest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the budget held after each taking."""
    seen: list[int] = []
    take = Budget.take

    def watched(self: Budget, size: int, most: int) -> None:
        take(self, size, most)
        seen.append(self.held)

    monkeypatch.setattr(Budget, "take", watched)
    return seen


BIG = b'{"model":"m","a":"' + b"x" * (2 * MIB) + b'"}'


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_many_large_bodies_at_once_are_refused_beyond_the_budget(loop: Loop, highest: list[int], framing: str) -> None:
    upstream = Upstream(loop, [Pause(0.6), OK]).start()
    gateway = gateway_to(loop, upstream, server="max_bodies: 9MiB")
    whole = head_of("/up/v1/chat/completions", len(BIG), JSON) + BIG
    if framing == "chunked":
        whole = head_of("/up/v1/chat/completions", None, JSON) + chunk(BIG) + LAST_CHUNK

    def ask(_: int) -> Reply:
        return raw.send(gateway.port, whole, timeout=10)

    replies = at_once(20, ask)
    served = [reply for reply in replies if reply.status == 200]
    shed = [reply for reply in replies if reply.status != 200]
    assert 1 <= len(served) <= 4
    for reply in shed:
        check_error(reply, 503, "overloaded")
        assert reply.header("retry-after") == "1"
    assert max(highest) <= 9 * MIB
    assert len(upstream.requests) == len(served)
    nothing_held(gateway)
    assert ask(0).status == 200  # and there is room again
    nothing_held(gateway)


def test_a_large_body_is_refused_before_it_is_sent(loop: Loop, highest: list[int]) -> None:
    gateway = gateway_to(loop, Upstream(loop, [Pause(0.5), OK]).start(), server="max_bodies: 3MiB")
    head = raw.request(
        "/up/v1/chat/completions",
        b"",
        headers=[JSON, ("Content-Length", str(len(BIG))), ("Expect", "100-continue")],
    )
    with raw.connect(gateway.port) as first:
        first.sendall(head)
        assert first.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        second = raw.send(gateway.port, head)
        check_error(second, 503, "overloaded")
        assert raw.send(gateway.port, CHAT).status == 200  # what is small is not counted
        first.sendall(BIG)
        assert raw.read(first).status == 200
    nothing_held(gateway)
    assert max(highest) <= 3 * MIB


def test_a_body_that_comes_at_once_is_counted_like_any_other(loop: Loop) -> None:
    """Its bytes may all be there before the gateway looks for the first time."""
    gateway = gateway_to(loop, Upstream(loop, [OK]).start(), server="max_bodies: 64KiB")
    body = b'{"model":"m","a":"' + b"x" * 100_000 + b'"}'
    whole = head_of("/up/v1/chat/completions", len(body), JSON) + body
    with raw.connect(gateway.port) as sock:
        sock.sendall(HEALTH)
        assert raw.read(sock).status == 200
        loop.loop.call_soon_threadsafe(time.sleep, 0.2)
        sock.sendall(whole)
        check_error(raw.read(sock), 503, "overloaded")
    nothing_held(gateway)


def test_whoever_leaves_within_a_body_gives_its_room_back(loop: Loop) -> None:
    upstream = Upstream(loop, [Stall()]).start()
    gateway = gateway_to(loop, upstream, server="max_bodies: 64MiB")
    budget = gateway.daemon.gateway.budget
    whole = head_of("/up/v1/chat/completions", len(BIG), JSON) + BIG
    pieces = head_of("/up/v1/chat/completions", None, JSON) + chunk(BIG[:MIB])
    for leave in (socket.socket.close, raw.reset):
        sockets = [raw.connect(gateway.port) for _ in range(12)]
        for index, sock in enumerate(sockets):
            sock.sendall((whole, whole[: len(whole) // 2], pieces)[index % 3])
        until(lambda: gateway.daemon.gateway.in_flight == 12 and budget.held >= 8 * len(BIG) + 4 * MIB)
        for sock in sockets:
            leave(sock)
        nothing_held(gateway)
    assert raw.send(gateway.port, whole[:-1] + b"]").status == 400
    assert raw.send(gateway.port, whole.replace(b'"m"', b'"\n"', 1)).status == 400
    nothing_held(gateway)


def test_streamed_bodies_need_no_room(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream, server="max_bodies: 64KiB")
    reply = raw.send(gateway.port, head_of("/up/v1/files", len(BIG), FORM) + BIG)
    assert reply.status == 200
    assert upstream.requests[0].body == BIG


# Noise.


def storm(port: int, count: int, data: bytes, *, at_once: int = 40) -> int:
    """Sends `data` on `count` connections, and reads each to its end. How many were answered with 400."""

    async def one(limit: asyncio.Semaphore) -> bool:
        async with limit:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            try:
                reply = await asyncio.wait_for(reader.read(), 10)
            finally:
                writer.close()
            return reply.startswith(b"HTTP/1.1 400 ")

    async def everything() -> int:
        limit = asyncio.Semaphore(at_once)
        return sum(await asyncio.gather(*(one(limit) for _ in range(count))))

    return asyncio.run(everything())


def test_a_storm_of_broken_requests_fills_no_log_and_others_are_served(loop: Loop) -> None:
    gateway = gateway_to(loop, Upstream(loop, [OK]).start())
    took: list[float] = []
    over = threading.Event()

    def good() -> None:
        while not over.wait(0.02):
            began = time.monotonic()
            assert raw.send(gateway.port, CHAT).status == 200
            took.append(time.monotonic() - began)

    broken = b"GARBAGE storm-canary-77d1\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(good)
        began = time.monotonic()
        answered = storm(gateway.port, 2000, broken)
        seconds = time.monotonic() - began
        over.set()
        serving.result(10)
    assert answered == 2000
    took.sort()
    assert took[len(took) * 9 // 10] < 0.25, took
    time.sleep(1.1)  # in another second what was left out is told
    assert raw.send(gateway.port, broken).status == 400

    def told() -> list[dict[str, Any]]:
        return [line for line in gateway.log() if line["event"] == "malformed_request"]

    until(lambda: len(told()) + sum(line.get("left_out", 0) for line in told()) == 2001)
    assert len(told()) <= 50 * (seconds + 2) + 1
    assert "canary" not in gateway.log_path.read_text()
    assert len(gateway.requests()) == len(took)
    until(lambda: gateway.daemon._door.crowd.count == 0)


# Descriptors.


@contextmanager
def trickling(loop: Loop) -> Iterator[Upstream]:
    """An upstream whose streams bring an event every 50 ms, for six seconds."""
    beats: Script = [step for _ in range(120) for step in (Pause(0.05), chunk(EVENT))]
    yield Upstream(loop, [EVENT_STREAM + chunk(EVENT), *beats, LAST_CHUNK]).start()


def events_within(sock: socket.socket, seconds: float) -> int:
    """How many events a stream brings meanwhile."""
    data, end = b"", time.monotonic() + seconds
    sock.settimeout(0.1)
    while time.monotonic() < end:
        try:
            got = sock.recv(65536)
            assert got, "the stream ended"
            data += got
        except TimeoutError:
            pass
    return data.count(b"data: ")


def cpu_seconds(pid: int) -> float:
    """What a process has used so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_descriptors(folder: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start from here on have no more than `limit` descriptors, and cannot get more."""
    shell = folder / "python"
    shell.write_text(f'#!/bin/sh\nulimit -n {limit} && exec "{sys.executable}" "$@"\n')
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))


def test_with_few_descriptors_too_many_clients_are_refused_and_a_stream_runs_on(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_descriptors(tmp_path, 256, monkeypatch)
    with trickling(loop) as upstream, Process(tmp_path, config(upstream.url), SECRETS) as daemon, ExitStack() as stack:
        stream = stack.enter_context(raw.connect(daemon.port))
        stream.sendall(STREAM)
        assert b"200 OK" in stream.recv(65536)
        began, before = time.monotonic(), cpu_seconds(daemon.pid)
        crowd = [stack.enter_context(raw.connect(daemon.port)) for _ in range(400)]
        assert time.monotonic() - began < 2
        assert events_within(stream, 1.5) >= 15
        busy = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - began)
        assert busy < 0.5, busy
        answers = [silently(sock) for sock in crowd]
        refused = [answer for answer in answers if answer]
        assert len(refused) >= 400 - 128
        assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in refused), refused
        assert b"" in answers  # some are inside, silent
        for sock in crowd:
            sock.close()
        until(lambda: raw.send(daemon.port, HEALTH).status == 200)
        another = stack.enter_context(raw.connect(daemon.port))
        another.sendall(STREAM)
        assert b"200 OK" in another.recv(65536)
        assert events_within(stream, 0.5) >= 4
        assert not [line for line in daemon.log() if line["event"] == "library"]


def silently(sock: socket.socket) -> bytes:
    """What a connection has brought so far; `closed` if it ended without a word."""
    sock.setblocking(False)
    try:
        return sock.recv(65536) or b"closed"
    except BlockingIOError:
        return b""
    except ConnectionResetError:
        return b"closed"


def lower(pid: int, soft: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def descriptors(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]


def test_when_no_socket_is_left_requests_are_refused_as_overload_and_it_passes(loop: Loop, tmp_path: Path) -> None:
    """Whatever has taken the descriptors: nothing spins, nothing ends, and the upstream is not blamed."""
    with trickling(loop) as upstream, Process(tmp_path, config(upstream.url), SECRETS) as daemon, ExitStack() as stack:
        stream = stack.enter_context(raw.connect(daemon.port))
        stream.sendall(STREAM)
        assert b"200 OK" in stream.recv(65536)
        inside = [stack.enter_context(raw.connect(daemon.port)) for _ in range(3)]
        for sock in inside:
            sock.sendall(HEALTH)
            assert raw.read(sock).status == 200
        lower(daemon.pid, max(descriptors(daemon.pid)) + 1)
        before = cpu_seconds(daemon.pid)
        began = time.monotonic()
        outside = [stack.enter_context(raw.connect(daemon.port)) for _ in range(100)]
        assert events_within(stream, 1.0) >= 10
        busy = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - began)
        assert busy < 0.3, busy
        for sock in inside:
            sock.sendall(CHAT)
            check_error(raw.read(sock), 503, "overloaded")
        lower(daemon.pid, 4096)
        for sock in outside:
            sock.close()
        until(lambda: answered(daemon.port))
        inside[0].sendall(STREAM)
        assert b"200 OK" in inside[0].recv(65536)
        assert events_within(stream, 0.5) >= 4
        reasons = [line.get("reason") for line in daemon.log() if line["event"] == "request" and line["status"] == 503]
        assert reasons == ["exhausted"] * 3


def answered(port: int) -> bool:
    try:
        return raw.send(port, HEALTH).status == 200
    except OSError:
        return False


def test_a_secure_upstream_is_used_though_no_spare_descriptor_is_left(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has two, the second only for a verdict on failures: without it the request must not hang."""

    def none_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    authority = Authority(tmp_path)
    with believed(authority):
        gateway = gateway_to(loop, Upstream(loop, [OK]).start(tls=authority.server()))
        assert raw.send(gateway.port, CHAT).status == 200
        other = gateway_to(loop, Upstream(loop, [OK]).start(tls=authority.server()))
        monkeypatch.setattr(connection, "os", SimpleNamespace(dup=none_left, close=os.close))
        began = time.monotonic()
        reply = raw.send(other.port, CHAT, timeout=10)
        assert reply.status in (200, 503), reply.data
        assert time.monotonic() - began < 2
        nothing_held(other)


@pytest.mark.parametrize("how", ["-X dev", "PYTHONASYNCIODEBUG"])
def test_development_mode_is_refused(tmp_path: Path, how: str) -> None:
    """It would answer with tracebacks."""
    (tmp_path / "gproxyd.yaml").write_text("server: {listen: ['127.0.0.1:0']}\n")
    option = ["-X", "dev"] if how == "-X dev" else []
    environ: dict[str, Any] = {} if option else {how: "1"}
    ended = subprocess.run(
        [sys.executable, *option, "-m", "gproxyd", "serve", "--config", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=20,
        env={**clean_environ(), **environ},
    )
    assert ended.returncode == 1
    assert "development mode" in ended.stderr
    assert "Traceback" not in ended.stderr


# What one connection may do.


def test_a_connection_ends_after_so_many_requests(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the long way and on the short one (the second and later requests with the same head)."""
    monkeypatch.setattr(doorstep, "MAX_REQUESTS", 5)
    upstream = Upstream(loop, lambda _: [json_reply(b'{"ok":true}')]).start()
    gateway = loop.gateway(CONNECTION.format(url=upstream.url))
    with raw.connect(gateway.port) as sock:
        for number in range(1, 6):
            sock.sendall(raw.request("/v1/chat/completions", {"model": "up/m"}))
            reply = raw.read(sock)
            assert reply.status == 200
            assert (b"Connection: close" in reply.head) == (number == 5)
        assert sock.recv(1) == b""


def test_a_refused_body_is_not_read_for_ever(loop: Loop) -> None:
    gateway = loop.gateway(CONNECTION.format(url="http://127.0.0.1:9"))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    with raw.connect(gateway.port) as sock:
        sock.sendall(head)
        assert raw.read(sock).status == 401
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 96 * 1024 * 1024:
                sent += sock.send(b"x" * 65536)
        assert sent < 64 * 1024 * 1024  # what the kernels hold on both sides is not small


def test_a_body_in_crumbs_has_a_deadline(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BODY_DEADLINE", 0.4)
    gateway = loop.gateway(CONNECTION.format(url="http://127.0.0.1:9"))
    head = raw.request("/v1/chat/completions", {"model": "up/m"}).partition(b"\r\n\r\n")[0]
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    with raw.connect(gateway.port) as sock:
        sock.sendall(b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]))
        began = time.monotonic()
        sock.settimeout(0.02)
        answer = b""
        while not answer and time.monotonic() - began < 5:
            sock.sendall(b"1;" + b"e" * 200 + b"\r\n \r\n")
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 3


CONNECTION = """\
server: {{listen: ["127.0.0.1:0"]}}
providers: {{up: {{vendor: custom, auth: none, dialects: {{openai_chat: "{url}"}}}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""
