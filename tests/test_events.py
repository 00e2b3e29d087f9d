"""Streams at their limits: any cut, giants and crumbs, clients that vanish, take nothing or race their upstream."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import os
import queue
import random
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson
import pytest
from httptools import HttpResponseParser

from gproxyd.gateway import door, doorstep, relay
from gproxyd.gateway.exchange import Exchanges
from tests.support import raw
from tests.support.process import Process
from tests.support.raw import Reply
from tests.support.running import SECRETS, Loop, Running, until
from tests.support.streams import LINE_ENDS, STREAMS, Stream, random_pieces
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Fin, Pause, Reset, Script, Stall, Upstream, chunk
from tests.test_streams import CONFIG, DIALECTS, DONE, MESSAGES, REQUESTS, SHOWN, played, seen, sent
from tests.test_upstream import listening, read_head, read_request

KIB, MIB = 1024, 1024 * 1024

EVENT = sent("openai_chat")
SEEN = seen("openai_chat")
CHAT = REQUESTS["openai_chat"]
FILE = raw.request("/openai-main/v1/files/f/content")
JSON_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
ARRAY_REQUEST = raw.request("/v1beta/models/vertex-main/upstream-1:streamGenerateContent", {"contents": []})


class Taken:
    """A response of any size, read as it comes: how much there was, how it began and ended, and if it is whole."""

    def __init__(self) -> None:
        self.size = 0
        self.complete = False
        self.start = self.end = b""
        self._parser = HttpResponseParser(self)

    def on_body(self, data: bytes) -> None:
        self.size += len(data)
        if len(self.start) < KIB:
            self.start += data[:KIB]
        self.end = (self.end + data)[-KIB:]

    def on_message_complete(self) -> None:
        self.complete = True

    def read(self, sock: socket.socket) -> Taken:
        while not self.complete and (data := sock.recv(MIB)):
            self._parser.feed_data(data)
        return self


class Lag:
    """The longest work that a loop has done in one go while the block ran: seconds of its thread's own time.

    Not those of the clock, which on a busy machine tell of the neighbours.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._over = False
        self.worst = 0.0

    async def _tick(self) -> None:
        while not self._over:
            before = time.thread_time()
            await asyncio.sleep(0)
            self.worst = max(self.worst, time.thread_time() - before)
            await asyncio.sleep(0.001)
            self.worst = max(self.worst, time.thread_time() - before)

    def __enter__(self) -> Lag:
        self._ticking = asyncio.run_coroutine_threadsafe(self._tick(), self._loop.loop)
        time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._ticking.result(5)


@pytest.fixture
def own_loop() -> Iterator[Loop]:
    """A loop that carries one gateway and nothing else."""
    with Loop() as running:
        yield running


def apart(folder: Path, port: int, *, idle: str = "20s") -> Process:
    """A gateway in a process of its own, in front of a server at `port`."""
    return Process(folder, CONFIG.format(url=f"http://127.0.0.1:{port}", keepalive="0s", idle=idle), SECRETS)


def cpu_seconds(daemon: Process) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(daemon: Process) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


# Whatever the bytes, however they are cut.


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name.replace(" ", "-"))
def test_a_recorded_stream_reaches_the_client_however_the_wire_cuts_it(loop: Loop, stream: Stream) -> None:
    """The cuts fall into the chunks' framing as well, and into the head."""
    head = EVENT_STREAM if stream.kind == "events" else JSON_STREAM
    request = ARRAY_REQUEST if stream.name == "gemini array" else REQUESTS[stream.dialect]
    for seed, style in enumerate(LINE_ENDS):
        played_one = stream.with_line_ends(style) if stream.kind == "events" else stream
        chunks = b"".join(chunk(piece) for piece in random_pieces(played_one.upstream, seed + 100) if piece)
        steps: Script = []
        for piece in random_pieces(head + chunks + LAST_CHUNK, seed, most=15):
            steps += [piece, Pause(0.002)]
        _, gateway = played(loop, steps)
        reply = raw.send(gateway.port, request)
        assert reply.complete and reply.body == played_one.shown(SHOWN[stream.dialect]), (style, seed)


USAGE = {
    "only usage in the last chunk": b'data: {"model":"%b","choices":[],"usage":{"total_tokens":9}}\n\ndata: [DONE]\n\n',
    "usage that is null at first": b'data: {"model":"%b","usage":null}\n\ndata: {"model":"%b","usage":{"n":1}}\n\n',
    "usage that grows": b'data: {"model":"%b","usage":{"n":1}}\n\ndata: {"model":"%b","usage":{"n":2}}\n\n',
    "usage of nothing": b'data: {"model":"%b","usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}\n\n',
    "usage without an end of line": b'data: {"model":"%b","usage":{"total_tokens":9}}',
    "text that looks like usage": rb'data: {"model":"%b","t":"\"usage\":{\"total_tokens\":0}\n\ndata: [DONE]"}'
    + b"\n\n",
}


@pytest.mark.parametrize("what", USAGE)
def test_what_a_stream_says_of_its_usage_is_not_touched(loop: Loop, what: str) -> None:
    template = USAGE[what]
    count = template.count(b"%b")
    _, gateway = played(loop, [EVENT_STREAM, chunk(template % ((b"upstream-1",) * count)), LAST_CHUNK])
    reply = raw.send(gateway.port, CHAT)
    assert reply.complete and reply.body == template % ((SHOWN["openai_chat"],) * count)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request", b"529 Overloaded"])
@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json", b"text/html", b""])
def test_an_answer_of_another_kind_than_was_asked_for(
    loop: Loop, dialect: str, stream: bool, status: bytes, kind: bytes
) -> None:
    """Whatever the request wanted, the answer's own type decides; what is not understood is not touched."""
    named = {"openai_chat": b'{"model":"%b"}', "openai_responses": b'{"model":"%b"}', "anthropic": b'{"model":"%b"}'}
    json = named.get(dialect, b'{"modelVersion":"%b"}')
    template = b"data: " + json + b"\n\n" if kind == b"text/event-stream" else json
    body = template % b"upstream-1"
    line = b"Content-Type: %b\r\n" % kind if kind else b""
    answer = b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, line, len(body), body)
    request = REQUESTS[dialect]
    if not stream:
        request = request.replace(b'"stream":true', b'"other1":true')
        request = request.replace(b":streamGenerateContent?alt=sse", b":generateContent")
    _, gateway = played(loop, [answer])
    reply = raw.send(gateway.port, request)
    understood = status.startswith(b"200") and kind in (b"text/event-stream", b"application/json")
    assert (reply.status, reply.complete) == (int(status[:3]), True)
    assert reply.header("content-type") == (kind.decode() or None)
    assert reply.body == (template % SHOWN[dialect] if understood else body)


OPAQUE = [
    b"application/x-ndjson", b"application/jsonl", b"audio/mpeg", b"application/octet-stream", b"image/png",
    b"application/vnd.amazon.eventstream", b"multipart/mixed; boundary=b", b"text/plain; charset=utf-8", b"video/mp4",
]  # fmt: skip
LOOKALIKE = b'{"model":"upstream-1"}\ndata: {"model":"upstream-1"}\n\n--b\r\n\r\n' + bytes(range(256)) * 40


@pytest.mark.parametrize("kind", OPAQUE)
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_stream_that_is_not_understood_passes_byte_for_byte(loop: Loop, kind: bytes, framing: str) -> None:
    """Nothing is replaced in it and nothing put into it, not even in a silence longer than that between pings."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % kind
    first, second = LOOKALIKE[:333], LOOKALIKE[333:]
    silence = Pause(0.25 if framing == "chunked" else 0.01)
    scripts: dict[str, Script] = {
        "length": [head + b"Content-Length: %d\r\n\r\n" % len(LOOKALIKE) + first, silence, second],
        "chunked": [head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(first), silence, chunk(second), LAST_CHUNK],
        "close": [head + b"\r\n" + first, silence, second, Fin()],
    }
    _, gateway = played(loop, scripts[framing], keepalive="50ms")
    replies: queue.Queue[Reply] = queue.Queue()
    for request in (CHAT, FILE, CHAT.replace(b"/v1/", b"/proxy/openai-main/v1/")):
        threading.Thread(target=lambda request=request: replies.put(raw.send(gateway.port, request))).start()
    for _ in range(3):
        reply = replies.get(timeout=5)
        assert reply.complete and reply.body == LOOKALIKE
        assert reply.header("content-type") == kind.decode()


@pytest.mark.parametrize("ending", [[Fin()], [Reset()]], ids=["fin", "rst"])
def test_a_stream_that_is_not_understood_breaks_without_a_word_of_the_gateways(loop: Loop, ending: Script) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    _, gateway = played(loop, [head + chunk(LOOKALIKE), Pause(0.05), *ending])
    reply = raw.send(gateway.port, FILE)
    assert reply.body == LOOKALIKE and not reply.complete


@pytest.mark.parametrize(
    "target", ["/v1/realtime?model=openai-main/m", "/openai-main/v1/realtime", "/proxy/openai-main/v1/live"]
)
def test_a_realtime_session_is_refused_with_the_way_out(loop: Loop, target: str) -> None:
    upstream, gateway = played(loop, [Stall()])
    headers = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")]
    reply = raw.send(gateway.port, raw.request(target, headers=headers) + b"\x81\x05hello", until_complete=False)
    assert (reply.status, reply.header("connection"), reply.header("upgrade")) == (426, "close", "HTTP/1.1")
    assert reply.json["error"]["code"] == "upgrade_required" and reply.data.count(b"\r\n\r\n") == 1
    assert not upstream.requests


# At once.


@pytest.mark.parametrize("request_of", ["aggregated", "raw"])
def test_two_hundred_events_a_second_arrive_one_by_one(loop: Loop, request_of: str) -> None:
    def metronome(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_request(connection)
        connection.sendall(EVENT_STREAM)
        began = time.monotonic()
        for number in range(200):
            time.sleep(max(0.0, began + number / 200 - time.monotonic()))
            connection.sendall(chunk(b'data: {"model":"upstream-1","at":%.6f}\n\n' % time.monotonic()))
        connection.sendall(LAST_CHUNK)
        connection.recv(1)

    with listening(metronome) as port:
        gateway = loop.gateway(CONFIG.format(url=f"http://127.0.0.1:{port}", keepalive="0s", idle="5s"))
        request = CHAT if request_of == "aggregated" else CHAT.replace(b"/v1/", b"/proxy/openai-main/v1/")
        late: list[float] = []
        with raw.connect(gateway.port) as sock:
            sock.sendall(request)
            data = b""
            while not data.endswith(LAST_CHUNK):
                data = data.rpartition(b"\n\n")[2] + sock.recv(65536)
                now = time.monotonic()
                late += [now - float(piece.partition(b"}")[0]) for piece in data.split(b'"at":')[1:]]
            (connection,) = gateway.daemon._door.connections
            client = connection.transport.get_extra_info("socket")
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert len(late) == 200
    late.sort()
    assert late[100] < 0.01 and late[197] < 0.05, (late[100], late[197], late[-1])


@pytest.mark.slow
def test_a_long_stream_outlives_every_limit_for_silence(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times the idle limit, and as many times that of an idle client connection; both run out only in silence."""
    monkeypatch.setitem(door._OPTIONS, "keepalive_timeout", 2.0)
    steps: Script = [step for _ in range(10) for step in (Pause(1.0), chunk(EVENT))]
    upstream = Upstream(loop, [EVENT_STREAM, *steps, LAST_CHUNK]).start()
    gateway = loop.gateway(CONFIG.format(url=upstream.url, keepalive="0s", idle="2s"))
    began = time.monotonic()
    reply = raw.send(gateway.port, CHAT)
    assert time.monotonic() - began > 9.9
    assert reply.complete and reply.body == SEEN * 10


# Large and small.


def giant(size: int, *, named_first: bool, ended: bool) -> Iterator[bytes]:
    """The chunks of one event of about `size` bytes. Its text is full of what a parser must step over."""
    text = rb"\"model\":\"upstream-1\" {[\\]} " * 2048
    first = b'data: {"model":"upstream-1","text":"' if named_first else b'data: {"text":"'
    yield chunk(first)
    for _ in range(size // len(text)):
        yield chunk(text)
    yield chunk(b'"}' if named_first else b'","model":"upstream-1"}')
    if ended:
        yield chunk(b"\n\n" + EVENT)


@pytest.mark.slow
@pytest.mark.parametrize(("named_first", "ended"), [(True, False), (False, True)], ids=["without-end", "ended"])
def test_a_giant_event_costs_little_memory_and_time_in_proportion(
    tmp_path: Path, named_first: bool, ended: bool
) -> None:
    sizes = [16 * MIB, 16 * MIB, 16 * MIB, 64 * MIB]  # how much is read at once is chance, at first
    playing = iter(sizes)

    def serve(connection: socket.socket) -> None:
        while True:
            read_request(connection)
            connection.sendall(EVENT_STREAM)
            for piece in giant(next(playing), named_first=named_first, ended=ended):
                connection.sendall(piece)
            connection.sendall(LAST_CHUNK)

    with listening(serve) as port, apart(tmp_path, port) as daemon, raw.connect(daemon.port, timeout=20) as sock:
        costs: list[float] = []
        peaks: list[int] = []
        for size in sizes:
            before = cpu_seconds(daemon)
            sock.sendall(CHAT)
            taken = Taken().read(sock)
            costs.append(cpu_seconds(daemon) - before)
            peaks.append(daemon.memory()["VmHWM"])
            assert taken.complete and taken.size > size - 100_000
            name = b'"model":"openai-main/upstream-1"'
            assert taken.start.count(name) + taken.end.count(name) == (2 if ended else 1)
            assert (taken.start if named_first else taken.end).count(name) >= 1
        assert costs[3] <= 4.5 * max(costs[:3]) + 0.3, costs
        assert peaks[3] - peaks[2] < 4 * MIB, peaks


@pytest.mark.parametrize("cut", ["one segment", "segments of their own"])
def test_a_body_in_a_hundred_thousand_chunks_does_not_hold_up_the_others(own_loop: Loop, cut: str) -> None:
    """One byte each: what costs is the framing, and somebody else could be served meanwhile."""
    text = (b'data: {"model":"upstream-1","n":0}\n\n' * 3000)[: 100_000 if cut == "one segment" else 3000]
    text = text[: text.rindex(b"\n\n") + 2]
    wire = b"".join(b"1\r\n%c\r\n" % byte for byte in text)

    def crumbs(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_request(connection)
        connection.sendall(EVENT_STREAM)
        if cut == "one segment":
            connection.sendall(wire)
        else:
            for at in range(0, len(wire), 6):
                connection.send(wire[at : at + 6])
        connection.sendall(LAST_CHUNK)
        connection.recv(1)

    with listening(crumbs) as port:
        gateway = own_loop.gateway(CONFIG.format(url=f"http://127.0.0.1:{port}", keepalive="0s", idle="5s"))
        with Lag(own_loop) as lag:
            began = time.monotonic()
            reply = raw.send(gateway.port, CHAT)
            took = time.monotonic() - began
    assert reply.complete and reply.body == text.replace(b"upstream-1", SHOWN["openai_chat"])
    assert took < 2
    assert lag.worst < 0.05


def test_a_request_in_as_many_chunks_does_not_hold_up_the_others(own_loop: Loop) -> None:
    upstream = Upstream(own_loop, [EVENT_STREAM, LAST_CHUNK]).start()
    gateway = own_loop.gateway(CONFIG.format(url=upstream.url, keepalive="0s", idle="5s"))
    body = orjson.dumps({"model": "openai-main/upstream-1", "messages": MESSAGES, "user": "x" * 300_000})
    wire = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    headers = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
    with Lag(own_loop) as lag:
        began = time.monotonic()
        reply = raw.send(gateway.port, raw.request("/v1/chat/completions", b"", headers=headers) + wire)
        took = time.monotonic() - began
    assert reply.status == 200 and upstream.requests[0].body == body.replace(b"openai-main/", b"")
    assert took < 2
    assert lag.worst < 0.05


# Clients that take little or nothing.


def flood(head: bytes, piece: bytes, total: int, sent_bytes: list[int]) -> Callable[[socket.socket], None]:
    """A server that answers with `total` bytes as fast as they are taken, and counts those of its last answer."""

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * KIB)
        while True:
            read_head(connection)
            connection.sendall(head)
            sent_bytes[0] = 0
            view = memoryview(piece)
            while sent_bytes[0] < total:
                sent_bytes[0] += connection.send(view[sent_bytes[0] % len(piece) :][: 128 * KIB])

    return serve


def standstill(sent_bytes: list[int]) -> int:
    """Waits until an upstream can send no more."""

    def still() -> int | None:
        before = sent_bytes[0]
        time.sleep(0.25)
        return before if before and sent_bytes[0] == before else None

    return until(still, 5)


ONE_EVENT = b'data: {"model":"upstream-1","text":"' + b"x" * (64 * KIB) + b'"}\n\n'
FLOODS = {
    "bytes": (b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: %d\r\n\r\n", bytes(256) * 4096, FILE),
    "events": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n",
        ONE_EVENT * 16,
        CHAT,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FLOODS)
def test_a_gigabyte_for_a_client_that_does_not_read_costs_no_memory(tmp_path: Path, what: str) -> None:
    head, piece, request = FLOODS[what]
    total = 1024 * MIB // len(piece) * len(piece)
    sent_bytes = [0]
    with (
        listening(flood(head % total, piece, total, sent_bytes)) as port,
        apart(tmp_path, port) as daemon,
    ):
        for _ in range(2):  # every buffer has been needed once, and its client has left in the middle
            with raw.connect(daemon.port, timeout=20) as sock:
                sock.sendall(request)
                taken = 0
                while taken < 20 * MIB:
                    taken += len(sock.recv(MIB))
                standstill(sent_bytes)
        before = daemon.memory()["VmRSS"]
        with raw.connect(daemon.port, rcvbuf=4096, timeout=20) as sock:
            sock.sendall(request)
            stopped_at = standstill(sent_bytes)
            grown = daemon.memory()["VmRSS"] - before
        assert stopped_at < 40 * MIB, "the upstream was not stopped"
        assert grown <= MIB, f"{grown / MIB:.1f} MiB"


def test_a_hundred_slow_readers_cost_what_their_buffers_hold(tmp_path: Path) -> None:
    count, each = 100, 2 * 256 * KIB + 128 * KIB  # two of the loop's reads, and what is made of them
    head = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n"
    sent_bytes = [0]
    with (
        listening(flood(head, ONE_EVENT, 1 << 40, sent_bytes)) as port,
        apart(tmp_path, port) as daemon,
        ExitStack() as readers,
    ):
        open_before = descriptors(daemon)
        with raw.connect(daemon.port) as sock:
            sock.sendall(FILE)
            sock.recv(MIB)
            standstill(sent_bytes)
        until(lambda: descriptors(daemon) <= open_before)
        base = daemon.memory()["VmRSS"]
        for _ in range(count):
            sock = readers.enter_context(raw.connect(daemon.port, rcvbuf=4096))
            sock.sendall(FILE)
        until(lambda: descriptors(daemon) == open_before + 2 * count, 15)
        until(lambda: _idle(daemon))
        grown = daemon.memory()["VmRSS"] - base
        began = time.monotonic()
        assert raw.send(daemon.port, raw.request("/healthz", key=None)).status == 200
        assert time.monotonic() - began < 0.1
        readers.close()
        until(lambda: descriptors(daemon) <= open_before)
    assert grown <= count * each, f"{grown / count / KIB:.0f} KiB each"


def _idle(daemon: Process) -> bool:
    before = cpu_seconds(daemon)
    time.sleep(0.25)
    return cpu_seconds(daemon) - before < 0.03


def test_what_came_before_a_reset_is_delivered_first(loop: Loop) -> None:
    """The gateway has not read it all yet, because its client takes nothing."""
    acknowledged = [0]
    over = threading.Event()

    def unread(connection: socket.socket) -> int:
        return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0\0\0\0"))[0])

    def careful(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(EVENT_STREAM)
        for _ in range(200):
            connection.sendall(chunk(ONE_EVENT))
            deadline = time.monotonic() + 0.3
            while unread(connection) and time.monotonic() < deadline:
                time.sleep(0.001)
            if unread(connection):
                break
            acknowledged[0] += 1
        raw.reset(connection)
        over.set()

    with listening(careful) as port:
        gateway = loop.gateway(CONFIG.format(url=f"http://127.0.0.1:{port}", keepalive="0s", idle="5s"))
        with raw.connect(gateway.port, rcvbuf=4096) as sock:
            sock.sendall(CHAT)
            assert over.wait(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
            reply = raw.read(sock, until_complete=False)
    assert acknowledged[0] > 2
    assert not reply.complete and reply.body.count(b'"model":"openai-main/upstream-1"') >= acknowledged[0]
    assert b'"code":"upstream_error"' in reply.body[-300:]


def test_little_is_sent_to_somebody_who_has_left(loop: Loop) -> None:
    buffers = sum(int(Path(f"/proc/sys/net/ipv4/tcp_{side}mem").read_text().split()[2]) for side in ("r", "w"))
    sent_bytes = [0]
    piece = ONE_EVENT * 4
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with listening(flood(head, piece, 1 << 40, sent_bytes)) as port:
        gateway = loop.gateway(CONFIG.format(url=f"http://127.0.0.1:{port}", keepalive="0s", idle="5s"))
        sock = raw.connect(gateway.port)
        sock.sendall(CHAT)
        taken = 0
        while taken < 30 * MIB:
            taken += len(sock.recv(MIB))
        at = sent_bytes[0]
        sock.close()
        until(gateway.at_rest)
        standstill(sent_bytes)
        assert sent_bytes[0] - at <= buffers + MIB
        assert gateway.requests()[0]["outcome"] == "client_gone"


# A client that vanishes without a word.

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NETWORK = 0x40000000


class Cable:
    """Two network namespaces with nothing but a cable between them: `near`, where a gateway may live, and `far`."""

    host = "10.77.0.1"

    def __init__(self) -> None:
        self.near, self.far = (f"gproxyd-{side}-{os.getpid()}" for side in ("near", "far"))

    def __enter__(self) -> Cable:
        try:
            for name in (self.near, self.far):
                _ip("netns", "add", name)
            _ip("-n", self.near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.far)
        except (OSError, subprocess.CalledProcessError):
            self._remove()
            pytest.skip("network namespaces cannot be made here")
        for name, address in ((self.near, "10.77.0.1/30"), (self.far, "10.77.0.2/30")):
            _ip("-n", name, "address", "add", address, "dev", "cable")
            for link in ("cable", "lo"):
                _ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=10)

    def pull(self) -> None:
        _ip("-n", self.far, "link", "set", "cable", "down")

    def connect(self, port: int) -> socket.socket:
        """A connection from the far end. A socket stays in the namespace of the thread that made it."""
        made: queue.Queue[socket.socket] = queue.Queue()

        def connect() -> None:
            enter(self.far)
            made.put(raw.connect(port, host=self.host))

        threading.Thread(target=connect, daemon=True).start()
        return made.get(timeout=5)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def enter(namespace: str) -> None:
    """Moves the calling thread, and no other, into a network namespace (setns(2))."""
    with open(f"/run/netns/{namespace}") as file:
        if _LIBC.setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture
def cable() -> Iterator[Cable]:
    with Cable() as made:
        yield made


NEVER = 3600
VANISHED: dict[str, tuple[Script, str, float, float]] = {
    "while events come": ([EVENT_STREAM, *[chunk(EVENT), Pause(0.05)] * 200], "0s", 0.8, NEVER),
    "while pings are sent": ([EVENT_STREAM, chunk(EVENT), Stall()], "200ms", 0.8, NEVER),
    "with a full buffer, by the kernel": ([EVENT_STREAM, chunk(ONE_EVENT * 160), Stall()], "0s", 0.8, NEVER),
    "with a full buffer, by the clock": ([EVENT_STREAM, chunk(ONE_EVENT * 160), Stall()], "0s", NEVER, 0.8),
}
"""What the upstream does; the silence between pings; the kernel's limit and the gateway's own, in seconds."""


@pytest.mark.parametrize("when", VANISHED)
def test_a_client_that_vanishes_is_given_up_and_its_upstream_told(
    cable: Cable, own_loop: Loop, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its cable is pulled: no end of the connection ever comes."""
    script, keepalive, kernel, own = VANISHED[when]
    monkeypatch.setattr(doorstep, "USER_TIMEOUT_MS", int(kernel * 1000))
    monkeypatch.setattr(relay, "WRITE_DEADLINE", own)

    async def move() -> None:
        enter(cable.near)

    own_loop.run(move())
    upstream = Upstream(own_loop, script).start()
    config = CONFIG.format(url=upstream.url, keepalive=keepalive, idle="60s")
    gateway = own_loop.gateway(config.replace('["127.0.0.1:0"]', f'["{cable.host}:0"]'))
    with cable.connect(gateway.port) as sock:
        sock.sendall(CHAT)
        data = b""
        while SEEN not in data and len(data) < 100_000:
            data += sock.recv(65536)
        cable.pull()
        assert not upstream.peer_left.is_set()
        assert upstream.peer_left.wait(5), "the upstream was never told"
        until(gateway.at_rest)
        line = until(gateway.requests)[0]
        assert (line["outcome"], line["status"]) == ("client_gone", 200)
        assert line.get("reason") == ("write_deadline" if own != NEVER else None)


# A client and an upstream that end in the same moment.

ENDINGS: dict[str, Callable[[socket.socket], object]] = {
    "last chunk": lambda sock: sock.sendall(LAST_CHUNK),
    "last chunk and fin": lambda sock: (sock.sendall(LAST_CHUNK), sock.close()),
    "fin": lambda sock: sock.close(),
    "rst": raw.reset,
    "event and fin": lambda sock: (sock.sendall(chunk(EVENT)), sock.close()),
    "garbage": lambda sock: sock.sendall(b"xyz\r\n"),
}


@contextmanager
def held_up(loop: Loop) -> Iterator[None]:
    """What happens in the block comes to the loop's notice all at once."""
    stopped, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopped.set()
        go_on.wait(1)

    loop.loop.call_soon_threadsafe(stop)
    stopped.wait(1)
    try:
        yield
    finally:
        go_on.set()


@pytest.mark.parametrize("begun", [True, False], ids=["within-the-stream", "before-the-head"])
def test_a_client_and_an_upstream_that_end_at_once_are_settled_once(
    own_loop: Loop, caplog: pytest.LogCaptureFixture, begun: bool
) -> None:
    rng = random.Random(30)
    rounds = 180
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        gateway = own_loop.gateway(CONFIG.format(url=url, keepalive="0s", idle="5s"))
        _race(own_loop, gateway, listener, "last chunk", raw.reset, begun, rng)
        before = len(os.listdir("/proc/self/fd"))
        with caplog.at_level(logging.WARNING):
            for turn in range(rounds):
                how = list(ENDINGS)[turn % len(ENDINGS)]
                leave = socket.socket.close if rng.random() < 0.5 else raw.reset
                _race(own_loop, gateway, listener, how, leave, begun, rng)
        until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    lines = until(lambda: lines if len(lines := gateway.requests()) > rounds else None)
    assert len(lines) == rounds + 1 == len({line["request_id"] for line in lines})
    assert {line["outcome"] for line in lines} <= {"ok", "client_gone", "upstream_error"}
    assert {line["event"] for line in gateway.log()} == {"ready", "request"}
    assert caplog.records == []
    until(lambda: Exchanges not in set(map(type, gateway.daemon._deadlines._watched)))
    assert not gateway.daemon._deadlines._watched or set(map(type, gateway.daemon._deadlines._watched)) == {
        type(gateway.daemon._pool)
    }


def _race(
    loop: Loop,
    gateway: Running,
    listener: socket.socket,
    how: str,
    leave: Callable[[socket.socket], None],
    begun: bool,
    rng: random.Random,
) -> None:
    client = raw.connect(gateway.port)
    client.sendall(CHAT)
    upstream, _ = listener.accept()
    with upstream:
        upstream.settimeout(5)
        read_request(upstream)
        if begun:
            upstream.sendall(EVENT_STREAM + chunk(EVENT))
            data = b""
            while SEEN not in data:
                data += client.recv(65536)
        with held_up(loop):
            for act in rng.sample([lambda: leave(client), lambda: ENDINGS[how](upstream)], 2):
                act()
    until(gateway.at_rest)
    loop.run(asyncio.sleep(0))


def test_terminators_in_the_segment_of_the_head_are_not_lost(loop: Loop) -> None:
    """Everything in one segment: head, events, the vendor's end and the framing's."""
    _, gateway = played(loop, [EVENT_STREAM + chunk(EVENT * 2) + chunk(DONE) + LAST_CHUNK])
    reply = raw.send(gateway.port, CHAT)
    assert reply.complete and reply.body == SEEN * 2 + DONE
