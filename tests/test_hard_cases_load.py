"""Crowds at full size: streams, connections, names and bodies by the thousand, and crumbs by the million.

Sizes are those that matter, as far as the descriptors of one process go; each test prints what it has measured.
KINDS=N has another number of different requests.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import uvloop

from gproxyd.gateway import doorstep
from gproxyd.serving import settle_memory
from tests.support import raw
from tests.support.configs import providers_at
from tests.support.process import Process
from tests.support.running import SECRETS, Loop, until
from tests.support.servers import listening, read_request
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, chunk
from tests.test_events import Lag, Taken, flood
from tests.test_load import (
    EVENT,
    STREAM,
    Held,
    Player,
    Sink,
    answer,
    connected,
    different,
    exchange,
    kind_of,
    pipelined,
    upstream_of,
)

KIB, MIB = 1024, 1024 * 1024
HEALTH = raw.request("/healthz", key=None)
CHAT = {"model": "m", "messages": []}


def config(url: str, *, server: str = "", more: str = "") -> str:
    times = {"connect": "5s", "first_byte": "60s", "idle": "60s", "keepalive": "0s"}
    return providers_at({"up": url}, **times, server=server, more=more)


def room(each: int) -> int:
    """How many of what needs `each` descriptors in a process there can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return (hard - 600) // each


def cpu_seconds(daemon: Process) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(daemon: Process) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


# Streams.


def test_as_many_silent_streams_as_there_are_descriptors_for(loop: Loop, tmp_path: Path) -> None:
    """Ten thousand, where a process may have that many twice."""
    count = min(10_000, room(2))
    held: list[Held] = []
    url = upstream_of(loop, kind_of(Held, open=held))
    request = raw.request("/up/v1/chat/completions", {**CHAT, "stream": True})

    async def work(daemon: Process) -> None:
        base, at_rest = descriptors(daemon), daemon.memory()["VmRSS"]
        async with AsyncExitStack() as stack:
            readers = []
            for number in range(count):
                reader, writer = await stack.enter_async_context(connected(daemon.port))
                writer.write(request)
                readers.append(reader)
                if number % 100 == 99:
                    await readers[-1].readuntil(b"\n\n")
            for number, reader in enumerate(readers):
                if number % 100 != 99:
                    await asyncio.wait_for(reader.readuntil(b"\n\n"), 30)
            each = (daemon.memory()["VmRSS"] - at_rest) / count
            assert descriptors(daemon) >= base + 2 * count
            began, before = time.monotonic(), cpu_seconds(daemon)
            await asyncio.sleep(3)
            busy = (cpu_seconds(daemon) - before) / (time.monotonic() - began)
            print(f"{count} streams: {each / KIB:.1f} KiB each, {busy:.1%} of a processor while silent")
            assert each <= 40 * KIB
            assert busy < 0.08  # a twentieth, and what else the machine does
        await asyncio.to_thread(until, lambda: descriptors(daemon) <= base + 8, 20)

    with Process(tmp_path, config(url, server="max_connections: 20000"), SECRETS) as daemon:
        asyncio.run(work(daemon))


def test_a_thousand_slow_readers_cost_what_their_buffers_hold(tmp_path: Path) -> None:
    count, each = min(1000, room(2)), 256 * KIB + 64 * KIB  # a read of the loop's, and what waits for the client
    head = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n"
    piece = bytes(64 * KIB)
    with (
        listening(flood(head, piece, 1 << 40, [0])) as port,
        Process(tmp_path, config(f"http://127.0.0.1:{port}"), SECRETS) as daemon,
        ExitStack() as readers,
    ):
        base, before = descriptors(daemon), daemon.memory()["VmRSS"]
        for _ in range(count):
            sock = readers.enter_context(raw.connect(daemon.port, rcvbuf=4096))
            sock.sendall(raw.request("/up/v1/files/f/content"))
        until(lambda: descriptors(daemon) == base + 2 * count, 30)
        spent = -1.0
        while cpu_seconds(daemon) - spent > 0.03:
            spent = cpu_seconds(daemon)
            time.sleep(0.5)
        grown = daemon.memory()["VmRSS"] - before
        began = time.monotonic()
        assert raw.send(daemon.port, HEALTH).status == 200
        assert time.monotonic() - began < 0.25
        print(f"{count} slow readers: {grown / count / KIB:.0f} KiB each")
        readers.close()
        until(lambda: descriptors(daemon) <= base, 20)
    assert grown <= count * each, grown / count / KIB


def test_a_million_chunks_of_a_byte_cost_time_in_proportion_and_nobody_waits() -> None:
    """In whatever segments the kernel makes of them."""
    text = b'data: {"model":"m","n":0}\n\n' * 38_000
    wire = b"".join(b"1\r\n%c\r\n" % byte for byte in text)

    def crumbs(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(EVENT_STREAM + wire + LAST_CHUNK)
        connection.recv(1)

    with listening(crumbs) as port, Loop() as own:
        gateway = own.gateway(config(f"http://127.0.0.1:{port}"))
        with Lag(own) as lag, raw.connect(gateway.port, timeout=20) as sock:
            began = time.monotonic()
            sock.sendall(raw.request("/up/v1/chat/completions", {**CHAT, "stream": True}))
            taken = Taken().read(sock)
            took = time.monotonic() - began
    print(f"{len(text)} chunks: {took:.1f} s, {lag.worst * 1e3:.0f} ms in one go at most")
    assert taken.complete and taken.size == len(text) > 980_000
    assert took < 15
    assert lag.worst < 0.05


class Beating(Player):
    """An upstream whose streams end when they are told to."""

    over = False

    def beat(self) -> None:
        self.transport.write(chunk(EVENT) if not self.over else LAST_CHUNK)
        if not self.over:
            asyncio.get_running_loop().call_later(self.pause, self.beat)


def beat(pipe: Connection, streams: int, rate: float, bodies: list[bytes], seconds: float) -> None:
    """Clients and upstream in a process of their own. The streams begin one by one, so that their events are spread;
    tells when the last has begun, goes on for that long with the bodies in the midst of it, tells when it is over."""
    Beating.pause = 1 / rate

    async def stream(port: int) -> bool:
        async with connected(port) as (reader, writer):
            writer.write(STREAM)
            while not (data := await reader.read(65536)).endswith(LAST_CHUNK):
                assert data
        return True

    async def work() -> None:
        server = await asyncio.get_running_loop().create_server(Beating, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        port = await asyncio.to_thread(pipe.recv)
        running = []
        for _ in range(streams):
            running.append(asyncio.create_task(stream(port)))
            await asyncio.sleep(0.002)
        await asyncio.sleep(1)
        pipe.send("begun")
        await asyncio.sleep(seconds / 4)
        statuses = [(await exchange(port, body)).status for body in bodies]
        await asyncio.sleep(seconds / 4)
        pipe.send(statuses)
        Beating.over = True
        pipe.send(all(await asyncio.gather(*running)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())


def late(streams: int, rate: float, bodies: list[bytes], seconds: float) -> list[float]:
    """By how much the loop of a gateway under that load is late with a timer of 5 ms, sorted."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=beat, args=(theirs, streams, rate, bodies, seconds))
    child.start()
    lags: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - before - 0.005)

    try:
        with Loop() as loop:
            gateway = loop.gateway(config(f"http://127.0.0.1:{ours.recv()}"))
            ours.send(gateway.port)
            assert ours.poll(60) and ours.recv() == "begun"
            ticking = asyncio.run_coroutine_threadsafe(tick(), loop.loop)
            spent, began = time.process_time(), time.monotonic()
            assert ours.poll(60) and ours.recv() == [200] * len(bodies)
            busy = (time.process_time() - spent) / (time.monotonic() - began)
            ticking.cancel()
            print(f"{streams} streams of {rate} events a second: {busy:.0%} of a processor")
            assert ours.poll(60) and ours.recv() is True
            until(gateway.at_rest)
    finally:
        child.kill()
        child.join(10)
    return sorted(lags)


def test_a_thousand_streams_and_large_bodies_leave_the_loop_time() -> None:
    """As many events a second as leave half a processor free. Measured up to three times: what else the machine does
    can only make it worse."""
    message = b'{"role":"user","content":"%b"},' % (b'Hello, \\"world\\" ' * 60)
    text = b'{"messages":[' + message * (10 * MIB // len(message)) + b'{}],"model":"up/m"}'
    lines = [("Content-Type", "application/json"), ("Content-Length", str(len(text)))]
    body = raw.request("/v1/chat/completions", b"", headers=lines) + text
    for _ in range(3):
        settle_memory()  # what the other tests have left is not the gateway's to look through
        lags = late(1000, 5, [body] * 5, 4)
        p50, p99 = lags[len(lags) // 2], lags[len(lags) * 99 // 100]
        print(f"lag: p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, most {lags[-1] * 1e3:.1f} ms of {len(lags)}")
        if p99 < 0.020:
            break
    assert p99 < 0.020, lags[-20:]


# Connections.


def fastest(took: list[float], part: float) -> float:
    return sorted(took)[int(len(took) * part)]


def test_thousands_who_dawdle_are_let_go_in_time_and_nobody_else_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand send their heads byte by byte, five thousand nothing at all."""
    monkeypatch.setattr(doorstep, "HEAD_DEADLINE", 2.0)
    monkeypatch.setattr(doorstep, "FIRST_BYTE_DEADLINE", 3.0)
    room(4)
    settle_memory()
    with Loop() as loop, ExitStack() as stack:
        gateway = loop.gateway(config(upstream_of(loop, kind_of(Sink))))
        assert raw.send(gateway.port, raw.request("/up/v1/chat/completions", CHAT)).status == 200
        began = time.monotonic()
        silent = [stack.enter_context(raw.connect(gateway.port)) for _ in range(5000)]
        seated = time.monotonic()
        slow = [stack.enter_context(raw.connect(gateway.port)) for _ in range(2000)]
        for sock in slow:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        started = time.monotonic()
        took: list[float] = []
        while time.monotonic() < started + 1.2:
            for sock in slow[len(took) % 20 :: 20]:
                sock.send(b"x")
            asked = time.monotonic()
            assert raw.send(gateway.port, raw.request("/up/v1/chat/completions", CHAT)).status == 200
            took.append(time.monotonic() - asked)
        assert all_ended(slow, 2.5) < started + 2.0 + 0.7
        assert all_ended(silent, 3.5) < seated + 3.0 + 0.7
        p50, p99 = (fastest(took, part) * 1e3 for part in (0.5, 0.99))
        print(f"{len(took)} asked meanwhile: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        assert seated - began < 5 and fastest(took, 0.9) < 0.1
        until(lambda: gateway.daemon._door.crowd.count == 0)
        until(lambda: not gateway.daemon._door.connections)


def all_ended(sockets: list[socket.socket], seconds: float) -> float:
    """Waits until the gateway has ended them all. When that was."""
    poller = select.poll()
    for sock in sockets:
        poller.register(sock, select.POLLIN)
    until(lambda: len(poller.poll(0)) == len(sockets), seconds)
    return time.monotonic()


def test_ten_thousand_come_and_go_at_a_steady_pace(loop: Loop, tmp_path: Path) -> None:
    def come_and_go(number: int) -> None:
        sock = raw.connect(daemon.port)
        if number % 4 == 1:
            sock.sendall(b"GET /healthz HT")
        elif number % 4 == 2:
            sock.sendall(HEALTH)
        raw.reset(sock)

    with Process(tmp_path, config(upstream_of(loop, kind_of(Sink))), SECRETS) as daemon:
        assert raw.send(daemon.port, HEALTH).status == 200
        base, before = descriptors(daemon), daemon.memory()["VmRSS"]
        took: list[float] = []
        with ThreadPoolExecutor(4) as pool:
            for quarter in range(4):
                began = time.monotonic()
                list(pool.map(come_and_go, range(quarter * 2500, quarter * 2500 + 2500)))
                took.append(time.monotonic() - began)
                assert raw.send(daemon.port, HEALTH).status == 200
        until(lambda: descriptors(daemon) <= base)
        print("connections a second:", [int(2500 / seconds) for seconds in took])
        assert max(took) < 5 * min(took)
        assert daemon.memory()["VmRSS"] - before < 16 * MIB


# Names and bodies.


def series(daemon: Process) -> int:
    return raw.send(daemon.port, raw.request("/metrics", key=None)).body.count(b"\ngproxyd_")


def test_requests_that_are_all_different_leave_neither_memory_nor_series(loop: Loop, tmp_path: Path) -> None:
    count = int(os.environ.get("KINDS", "30000"))
    with Process(tmp_path, config(upstream_of(loop, kind_of(Sink))), SECRETS) as daemon:
        pipelined(daemon.port, different(range(count // 4)))
        _, told = series(daemon), series(daemon)
        before = daemon.memory()["VmRSS"]
        statuses = pipelined(daemon.port, different(range(count // 4, count)))
        grown = daemon.memory()["VmRSS"] - before
        print(f"{count} different requests: {grown / MIB:.1f} MiB, {series(daemon)} series")
        assert set(statuses) == {b"200", b"400", b"401", b"404"}
        assert grown < 8 * MIB
        assert series(daemon) == told < 1000


def test_two_hundred_bodies_of_thirty_megabytes_are_shed_at_the_budget(loop: Loop, tmp_path: Path) -> None:
    size, budget = 30_000_000, 128 * MIB
    lines = [("Content-Type", "application/json"), ("Content-Length", str(size))]
    head = raw.request("/v1/chat/completions", b"", headers=lines)
    start = b'{"model":"up/m","a":"'
    pieces = [start + b"x" * (MIB - len(start)), *[b"x" * MIB] * (size // MIB - 1)]
    pieces.append(b"x" * (size - len(pieces) * MIB - 2) + b'"}')

    async def upload(port: int) -> tuple[int, str | None]:
        async with connected(port) as (reader, writer):
            told = asyncio.create_task(answer(reader))
            writer.write(head)
            for piece in pieces:
                if told.done():
                    break
                writer.write(piece)
                await asyncio.wait((told, asyncio.create_task(writer.drain())), return_when=asyncio.FIRST_COMPLETED)
            reply = await told
            return reply.status, reply.header("retry-after")

    async def everything(port: int) -> list[tuple[int, str | None]]:
        return await asyncio.gather(*(upload(port) for _ in range(200)))

    url = upstream_of(loop, kind_of(Sink, wait=0.3))
    with Process(tmp_path, config(url, server="max_bodies: 128MiB"), SECRETS) as daemon:
        assert raw.send(daemon.port, HEALTH).status == 200
        before = daemon.memory()["VmRSS"]
        replies = asyncio.run(everything(daemon.port))
        grown = daemon.memory()["VmHWM"] - before
        served = sum(status == 200 for status, _ in replies)
        print(f"200 bodies of {size // MIB} MiB: {served} served, {grown / MIB:.0f} MiB at most")
        assert set(replies) == {(200, None), (503, "1")}
        assert 4 <= served < 100
        assert grown < 2.5 * budget
        assert raw.send(daemon.port, HEALTH).status == 200
