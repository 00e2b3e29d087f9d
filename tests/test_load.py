"""Much at once: streams, connections, bodies, names. What it costs stays small, and one does not hold up another."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import resource
import ssl
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar, cast

import pytest
import uvloop

from gproxyd.serving import settle_memory
from tests.support import raw
from tests.support.checks import check_alive
from tests.support.process import Process
from tests.support.raw import Reply
from tests.support.running import SECRETS, Loop, until
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, chunk, json_reply
from tests.test_limits import FORM, HEALTH, JSON, config, cpu_seconds, descriptors, head_of

T = TypeVar("T", bound=asyncio.Protocol)

KIB, MIB = 1024, 1024 * 1024
OK = json_reply(b'{"id":"x","object":"chat.completion","model":"m","choices":[]}')
EVENT = b'data: {"id":"x","model":"m","choices":[{"delta":{"content":"Hello"}}]}\n\n'
CHAT = raw.request("/up/v1/chat/completions", {"model": "m", "messages": []})
STREAM = raw.request("/v1/chat/completions", {"model": "up/m", "messages": [], "stream": True})


class Held(asyncio.Protocol):
    """One connection of an upstream that begins a stream for every request and leaves it open."""

    open: list[Held]
    """All whose stream is open."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.endswith((b"}", b"\r\n\r\n")):  # requests here are small: each is one piece, or ends with its body
            self.transport.write(EVENT_STREAM + chunk(EVENT))
            self.open.append(self)

    def end(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(chunk(EVENT) + LAST_CHUNK)


class Sink(asyncio.Protocol):
    """One connection of an upstream that counts a body and answers it; `wait` seconds later if it is to be slow."""

    wait = 0.0
    requests = 0
    bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.head = b""
        self.left: int | None = None

    def data_received(self, data: bytes) -> None:
        if self.left is None:
            self.head += data
            head, mark, data = self.head.partition(b"\r\n\r\n")
            if not mark:
                return
            self.left = int(head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0] or 0)
        self.left -= len(data)
        type(self).bytes += len(data)
        if self.left <= 0:
            self.head, self.left = b"", None
            type(self).requests += 1
            asyncio.get_running_loop().call_later(self.wait, self.transport.write, OK)


def upstream_of(loop: Loop, protocol: type[asyncio.Protocol]) -> str:
    """Serves such connections; the address."""

    async def start() -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, backlog=1024)

    server = loop.run(start())
    loop.at_end(lambda: loop.loop.call_soon_threadsafe(server.close))
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def kind_of(base: type[T], **attributes: object) -> type[T]:
    """Such connections with counters of their own."""
    return type(base.__name__, (base,), attributes)


@contextmanager
def process(folder: Path, url: str, server: str = "", **environ: str) -> Iterator[Process]:
    with Process(folder, config(url, server=server, idle="30s"), SECRETS, **environ) as daemon:
        yield daemon


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def exchange(port: int, data: bytes) -> Reply:
    """One request on a connection of its own."""
    async with connected(port) as (reader, writer):
        writer.write(data)
        return await answer(reader)


async def answer(reader: asyncio.StreamReader) -> Reply:
    """The next response on a connection, which must say its length."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    reply = Reply(head, "open")
    length = reply.header("content-length")
    assert length is not None, head
    reply.data += await asyncio.wait_for(reader.readexactly(int(length)), 20)
    return reply


# Streams.


def test_a_thousand_silent_streams_cost_little(loop: Loop, tmp_path: Path) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(1000, (soft - 300) // 2)  # both ends are here
    held: list[Held] = []
    url = upstream_of(loop, kind_of(Held, open=held))

    async def work(daemon: Process, stack: AsyncExitStack) -> None:
        async with connected(daemon.port) as (reader, writer):  # what the first needs is needed once
            writer.write(STREAM)
            await reader.readuntil(b"\n\n")
        base, at_rest = len(descriptors(daemon.pid)), daemon.memory()["VmRSS"]
        streams = []
        for _ in range(count):
            reader, writer = await stack.enter_async_context(connected(daemon.port))
            writer.write(STREAM)
            streams.append((reader, writer))
        for reader, _ in streams:
            begun = await asyncio.wait_for(reader.readuntil(b"\n\n"), 20)
            assert begun.startswith(b"HTTP/1.1 200 OK\r\n")
        each = (daemon.memory()["VmRSS"] - at_rest) / count
        assert len(descriptors(daemon.pid)) >= base + 2 * count - 2
        began, before = time.monotonic(), cpu_seconds(daemon.pid)
        await asyncio.sleep(2)
        busy = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - began)
        print(f"{count} streams: {each / KIB:.1f} KiB each, {busy:.1%} of a processor while silent")
        assert each <= 40 * KIB, each
        assert busy < 0.10, busy
        for one in held:
            loop.loop.call_soon_threadsafe(one.end)
        for reader, writer in streams:
            rest = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 20)
            assert rest.count(b"data: ") == 1
            assert b'"model":"up/m"' in rest
            writer.close()
        lines = await asyncio.to_thread(until, lambda: _requests(daemon, count + 1), 10)
        assert [line["outcome"] for line in lines].count("ok") == count
        # Idle upstream connections are kept, of clients nothing is.
        await asyncio.to_thread(until, lambda: len(descriptors(daemon.pid)) <= base + 257)

    async def everything(daemon: Process) -> None:
        async with AsyncExitStack() as stack:
            await work(daemon, stack)

    with process(tmp_path, url) as daemon:
        asyncio.run(everything(daemon))


def _requests(daemon: Process, count: int) -> list[dict[str, object]] | None:
    lines = [line for line in daemon.log() if line["event"] == "request"]
    return lines if len(lines) >= count else None


class Player(asyncio.Protocol):
    """One connection of an upstream that answers a small request with `count` events, `pause` seconds apart, and a
    large one with a small answer."""

    count, pause = 0, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.head, self.left, self.large = b"", -1, False

    def data_received(self, data: bytes) -> None:
        if self.left < 0:
            self.head += data
            head, _, data = self.head.partition(b"\r\n\r\n")
            self.left = int(head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
            self.large = self.left > MIB
        self.left -= len(data)
        if self.left:
            return
        self.head, self.left = b"", -1
        self.transport.write(OK if self.large else EVENT_STREAM)
        if not self.large:
            self.to_come = self.count
            self.beat()

    def beat(self) -> None:
        self.to_come -= 1
        self.transport.write(chunk(EVENT))
        if self.to_come:
            asyncio.get_running_loop().call_later(self.pause, self.beat)
        else:
            self.transport.write(LAST_CHUNK)


def generate(pipe: Connection, streams: int, rate: int, seconds: float, bodies: list[bytes]) -> None:
    """Clients and upstream in a process of their own, so that they take no time from the gateway's loop.

    Tells the upstream's port, is told the gateway's, tells how many events each stream had and what the bodies got.
    """
    Player.count, Player.pause = int(seconds * rate), 1 / rate

    async def stream(port: int) -> int:
        async with connected(port) as (reader, writer):
            writer.write(STREAM)
            return (await asyncio.wait_for(reader.readuntil(LAST_CHUNK), 30)).count(b"data: ")

    async def work() -> None:
        server = await asyncio.get_running_loop().create_server(Player, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        port = await asyncio.to_thread(pipe.recv)
        running = [asyncio.create_task(stream(port)) for _ in range(streams)]
        await asyncio.sleep(seconds / 4)
        asked = [asyncio.create_task(exchange(port, body)) for body in bodies]
        answers = [(await one).status for one in asked]
        pipe.send((await asyncio.gather(*running), answers))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())


def lag_under(bodies: list[bytes], streams: int, rate: int, seconds: float) -> list[float]:
    """By how much the loop of a gateway under this load is late with a timer of 5 ms, sorted."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=generate, args=(theirs, streams, rate, seconds, bodies), daemon=True)
    child.start()
    lags: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - before - 0.005)

    try:
        with Loop() as loop:
            gateway = loop.gateway(config(f"http://127.0.0.1:{ours.recv()}", idle="30s"))
            ticking = asyncio.run_coroutine_threadsafe(tick(), loop.loop)
            ours.send(gateway.port)
            assert ours.poll(30), "the clients have not come to an end"
            events, answers = ours.recv()
            ticking.cancel()
            assert events == [int(seconds * rate)] * streams
            assert answers == [200] * len(bodies)
            until(gateway.at_rest)
            assert gateway.daemon.gateway.budget.held == 0
    finally:
        child.kill()
        child.join(10)
    return sorted(lags)


def test_large_bodies_do_not_stop_running_streams() -> None:
    """Measured up to three times: what else the machine does can only make it worse."""
    message = b'{"role":"user","content":"%b"},' % (b'Hello, \\"world\\" ' * 60)
    text = b'{"messages":[' + message * (10 * MIB // len(message)) + b'{}],"model":"up/m"}'
    body = head_of("/v1/chat/completions", len(text), JSON) + text
    for _ in range(3):
        settle_memory()  # what the other tests have left is not the gateway's to look through
        lags = lag_under([body] * 10, streams=200, rate=20, seconds=2.5)
        p50, p99 = lags[len(lags) // 2], lags[len(lags) * 99 // 100]
        print(f"lag: p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, most {lags[-1] * 1e3:.1f} ms of {len(lags)}")
        if p99 < 0.050:
            break
    assert len(lags) > 100
    assert p99 < 0.050, lags[-20:]


# Connections.


def test_two_thousand_connections_come_and_go_and_leave_nothing(loop: Loop, tmp_path: Path) -> None:
    url = upstream_of(loop, kind_of(Sink))
    with process(tmp_path, url) as daemon:
        for _ in range(2):
            assert raw.send(daemon.port, CHAT).status == 200
        base, at_rest = len(descriptors(daemon.pid)), daemon.memory()["VmRSS"]
        began = time.monotonic()
        for number in range(2000):
            sock = raw.connect(daemon.port)
            if number % 4 == 1:
                sock.sendall(b"GET /healthz HT")
            elif number % 4 == 2:
                sock.sendall(HEALTH)  # and leaves without its answer
            (raw.reset if number % 3 else type(sock).close)(sock)
            if number % 500 == 499:
                assert raw.send(daemon.port, CHAT).status == 200
        assert time.monotonic() - began < 10
        until(lambda: len(descriptors(daemon.pid)) <= base)
        assert daemon.memory()["VmRSS"] - at_rest < 16 * MIB
        assert raw.send(daemon.port, CHAT).status == 200
        assert {line["event"] for line in daemon.log()} <= {"ready", "request", "malformed_request"}


def hello() -> bytes:
    """What a client that takes the port for a TLS one says first."""
    context, into, out = ssl.create_default_context(), ssl.MemoryBIO(), ssl.MemoryBIO()
    wrapped = context.wrap_bio(into, out, server_hostname="gateway.test")
    with pytest.raises(ssl.SSLWantReadError):
        wrapped.do_handshake()
    return out.read()


def test_what_is_no_http_at_all_harms_nobody(loop: Loop) -> None:
    gateway = loop.gateway(config(upstream_of(loop, kind_of(Sink)), idle="30s"))
    chance = random.Random(5)
    noises = {
        "TLS": hello(),
        "half of TLS": hello()[:100],
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "SOCKS": b"\x05\x01\x00",
        "PROXY": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
        "zeros": bytes(100_000),
        "one line": b"x" * 1_000_000,
        **{f"chance {number}": chance.randbytes(chance.randrange(1, 3000)) for number in range(60)},
    }
    for name, noise in noises.items():
        with raw.connect(gateway.port) as sock:
            try:
                sock.sendall(noise)
                sock.shutdown(1)
                reply = raw.read(sock, until_complete=False)
            except OSError:
                continue  # refused before all of it was sent
            assert reply.ended in ("fin", "rst"), name
            assert reply.status in (0, 400, 505), (name, reply.data)
    check_alive(gateway)
    until(lambda: gateway.daemon._door.crowd.count == 0)
    until(gateway.at_rest)
    assert not [line for line in gateway.log() if line["level"] in ("warning", "error")]


# Providers.


def test_a_slow_provider_does_not_slow_another(loop: Loop) -> None:
    slow, fast = upstream_of(loop, kind_of(Sink, wait=2.5)), upstream_of(loop, kind_of(Sink))
    text = config(fast, idle="30s").replace(
        "users:", f'  slow: {{vendor: openai, base_url: "{slow}", credentials: [provider-key]}}\nusers:'
    )
    gateway = loop.gateway(text)

    async def work() -> list[float]:
        waiting = [asyncio.create_task(exchange(gateway.port, CHAT.replace(b"/up/", b"/slow/"))) for _ in range(50)]
        await asyncio.sleep(0.3)
        assert gateway.daemon.gateway.in_flight == 50
        took: list[float] = []
        while not any(one.done() for one in waiting) and len(took) < 300:
            began = time.monotonic()
            assert (await exchange(gateway.port, CHAT)).status == 200
            took.append(time.monotonic() - began)
            await asyncio.sleep(0.005)
        assert [(await one).status for one in waiting] == [200] * 50
        return took

    took = sorted(asyncio.run(work()))
    p95 = took[len(took) * 95 // 100]
    print(f"beside a slow provider: p50 {statistics.median(took) * 1e3:.1f} ms, p95 {p95 * 1e3:.1f} ms of {len(took)}")
    assert len(took) >= 50
    assert p95 < 0.15
    until(gateway.at_rest)


# Memory.


def pipelined(port: int, requests: Iterator[bytes]) -> Counter[bytes]:
    """All of them on one connection, twenty at a time. How often each status came."""
    statuses: Counter[bytes] = Counter()
    with raw.connect(port) as sock:
        while several := list(islice(requests, 20)):
            sock.sendall(b"".join(several))
            got = b""
            wanted = statuses.total() + len(several)
            while statuses.total() < wanted:
                data = sock.recv(262144)
                assert data, "the connection ended"
                got += data
                *whole, got = got.split(b"HTTP/1.1 ")
                if len(got) >= 3:  # the beginning of the last is there
                    whole, got = [*whole, got], b""
                statuses.update(one[:3] for one in whole if one[:3].isdigit())
    return statuses


def different(numbers: range) -> Iterator[bytes]:
    """Requests of which each has a path, a model or a key of its own, and every one another client's name."""
    for number in numbers:
        agent = [("User-Agent", f"agent/{number}")]
        if number % 10 == 0:
            yield raw.request("/up/v1/chat/completions", {"model": f"model-{number}"}, headers=agent)
        elif number % 3 == 0:
            yield raw.request(f"/v1/nothing/{number}", headers=agent)
        elif number % 3 == 1:
            yield raw.request(f"/up/v1/{number}", key=f"key-{number}", headers=agent)
        else:
            yield raw.request("/v1/chat/completions", {"model": f"nobody-{number}/m"}, headers=agent)


def test_twenty_thousand_different_requests_are_forgotten(loop: Loop, tmp_path: Path) -> None:
    with process(tmp_path, upstream_of(loop, kind_of(Sink))) as daemon:
        pipelined(daemon.port, different(range(2000)))
        before = daemon.memory()["VmRSS"]
        statuses = pipelined(daemon.port, different(range(2000, 22_000)))
        assert statuses == {b"404": 6000, b"401": 6000, b"400": 6000, b"200": 2000}
        grown = daemon.memory()["VmRSS"] - before
        print(f"20,000 different requests: {grown / MIB:.1f} MiB")
        assert grown < 8 * MIB, grown


def test_thousands_of_long_paths_are_forgotten(loop: Loop, tmp_path: Path) -> None:
    """Nobody needs a key to send them."""
    with process(tmp_path, "http://127.0.0.1:9") as daemon:

        def long(numbers: range) -> Iterator[bytes]:
            for number in numbers:
                yield raw.request(f"/proxy/up/v1/{number:05}/{'x' * 15_000}", key=None)

        pipelined(daemon.port, long(range(100)))
        before = daemon.memory()["VmRSS"]
        assert pipelined(daemon.port, long(range(100, 3100))) == {b"401": 3000}
        grown = daemon.memory()["VmRSS"] - before
        print(f"3,000 long paths: {grown / MIB:.1f} MiB")
        assert grown < 16 * MIB, grown


class LateSink(Sink):
    """One that reads nothing of a body for half a second: what has come by then waits in the gateway."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        asyncio.get_running_loop().call_later(0.5, self.transport.resume_reading)


def test_a_hundred_uploads_at_once_need_little_memory(loop: Loop, tmp_path: Path) -> None:
    counted = kind_of(LateSink)
    size, piece = 3_000_000, bytes(50_000)
    head = head_of("/up/v1/files", size, FORM)

    async def upload(port: int) -> Reply:
        async with connected(port) as (reader, writer):
            writer.write(head)
            for _ in range(size // len(piece)):
                writer.write(piece)
                await writer.drain()
            return await answer(reader)

    async def everything(port: int) -> list[Reply]:
        return await asyncio.gather(*(upload(port) for _ in range(100)))

    with process(tmp_path, upstream_of(loop, counted)) as daemon:
        assert asyncio.run(upload(daemon.port)).status == 200
        before = daemon.memory()["VmRSS"]
        replies = asyncio.run(everything(daemon.port))
        assert [reply.status for reply in replies] == [200] * 100
        grown = daemon.memory()["VmHWM"] - before
        print(f"100 uploads of 3 MB: {grown / MIB:.1f} MiB")
        assert grown < 96 * MIB, grown
        # The gateway's are all answered, so all has arrived.
        assert (counted.requests, counted.bytes) == (101, 101 * size)
