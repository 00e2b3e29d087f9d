"""A client that leaves: its upstream is told at once, and nothing stays behind."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gproxyd.gateway import relay
from tests.support import raw
from tests.support.certs import Authority, believed
from tests.support.configs import providers_at
from tests.support.running import Loop, Running, until
from tests.support.servers import black_hole, listening, read_head
from tests.support.upstream import EVENT_STREAM, Got, Script, Stall, Upstream, chunk, json_reply

BOUND = 0.25
"""Seconds within which an upstream must see that its client has left."""

EVENT = b'data: {"model":"m","choices":[]}\n\n'
CHAT = {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
CHAT_REQUEST = raw.request("/v1/chat/completions", CHAT)
UPLOAD_SIZE = 10 * 1024 * 1024
UPLOAD_HEAD = raw.request(
    "/up/v1/files",
    b"",
    headers=[("Content-Type", "multipart/form-data; boundary=b"), ("Content-Length", str(UPLOAD_SIZE))],
)
PIECE = b"x" * 65536

Leave = Callable[[socket.socket], None]


@pytest.fixture(params=["fin", "rst"])
def leave(request: pytest.FixtureRequest) -> Leave:
    """How the client goes: by a plain close, or by a reset."""
    return socket.socket.close if request.param == "fin" else raw.reset


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    made = Authority(tmp_path_factory.mktemp("authority"))
    with believed(made):
        yield made


def gateway_to(loop: Loop, url: str) -> Running:
    return loop.gateway(providers_at({"up": url}, connect="20s", first_byte="20s", idle="20s", keepalive="0s"))


def upstream_and_gateway(
    loop: Loop, script: Script | Callable[[Got], Script], tls: Authority | None, *, on_head: bool = False
) -> tuple[Upstream, Running]:
    upstream = Upstream(loop, script, on_head=on_head).start(tls=tls.server() if tls else None)
    return upstream, gateway_to(loop, upstream.url)


def nothing_left(gateway: Running, status: int, reason: str | None = None) -> None:
    """Nothing is under way, and the one request has its one line."""
    until(gateway.at_rest)
    until(gateway.requests)
    time.sleep(0.1)  # a second line would be written by now
    (line,) = gateway.requests()
    assert (line["outcome"], line["status"], line.get("reason")) == ("client_gone", status, reason)


def told_in_time(upstream: Upstream, left: float) -> None:
    assert upstream.peer_left.wait(2), "the upstream was never told"
    assert upstream.left_at[0] - left < BOUND


SILENT: Script = [Stall()]
STREAM: Script = [EVENT_STREAM + chunk(EVENT), Stall()]
JSON_HELD: Script = [json_reply(b'{"model":"m","choices":[]}')[:-5], Stall()]
BINARY: Script = [b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: 1000000\r\n\r\n" + PIECE, Stall()]

PHASES: dict[str, tuple[Script, bytes, int]] = {
    "before the first byte": (SILENT, b"", 499),
    "within a stream": (STREAM, EVENT[-3:], 200),
    "within a body": (BINARY, PIECE[-3:], 200),
    "while a body is held": (JSON_HELD, b"", 499),
}
"""What the upstream does, what the client has seen when it leaves, and the status of the log line."""


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("phase", PHASES)
def test_the_upstream_hears_of_it(loop: Loop, authority: Authority, leave: Leave, phase: str, secure: bool) -> None:
    script, seen, status = PHASES[phase]
    played: list[Script] = [script]
    upstream, gateway = upstream_and_gateway(
        loop, lambda _: played.pop() if played else [json_reply(b'{"ok":true}')], authority if secure else None
    )
    sock = raw.connect(gateway.port)
    sock.sendall(CHAT_REQUEST)
    got = b""
    while seen and seen not in got:
        got += sock.recv(65536)
    until(lambda: upstream.requests)
    time.sleep(0.05)
    left = time.monotonic()
    leave(sock)
    told_in_time(upstream, left)
    nothing_left(gateway, status)
    # The connection was given up with its exchange: the next request has another, and its own answer.
    assert raw.send(gateway.port, CHAT_REQUEST).json == {"ok": True}
    assert [got.connection for got in upstream.requests] == [1, 2]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_during_an_upload(loop: Loop, authority: Authority, leave: Leave, secure: bool) -> None:
    upstream, gateway = upstream_and_gateway(loop, [Stall()], authority if secure else None, on_head=True)
    sock = raw.connect(gateway.port)
    sock.sendall(UPLOAD_HEAD + PIECE * 4)
    until(lambda: upstream.requests and upstream.requests[0].body_bytes == 4 * len(PIECE))
    left = time.monotonic()
    leave(sock)
    told_in_time(upstream, left)
    nothing_left(gateway, 499)
    assert not upstream.requests[0].complete


def send_until_unread(gateway: Running, sock: socket.socket) -> None:
    """Sends until the gateway reads no more, yet so little that the kernel could still deliver an end."""
    (connection,) = until(lambda: gateway.daemon._door.connections)
    paused = False
    while not paused:
        sock.sendall(PIECE[:32768])
        deadline = time.monotonic() + 0.15
        time.sleep(0.001)
        while (paused := connection._reading_paused) and time.monotonic() < deadline:
            time.sleep(0.005)


def tcp_table() -> list[list[str]]:
    """This machine's IPv4 connections (proc(5)): local and remote address, state and queues in columns 1 to 4."""
    with open("/proc/net/tcp") as table:
        return [row.split() for row in table.readlines()[1:]]


def connecting(port: int) -> int:
    """How many connections to `port` are not yet made (state SYN_SENT)."""
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "02" for row in tcp_table())


def test_during_an_upload_that_the_upstream_does_not_take(loop: Loop, leave: Leave) -> None:
    """Then nothing is read from the client either, and the loop says nothing of its departure."""
    rest: list[int] = []
    gone = threading.Event()

    def stubborn(connection: socket.socket) -> None:
        _, body = read_head(connection)
        gone.wait(20)
        count = len(body)
        try:
            while data := connection.recv(1 << 20):
                count += len(data)
        finally:
            rest.append(count)

    with listening(stubborn, rcvbuf=16 * 1024) as port:
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
        sock = raw.connect(gateway.port)
        sock.sendall(UPLOAD_HEAD)
        send_until_unread(gateway, sock)
        left = time.monotonic()
        leave(sock)
        until(gateway.at_rest, 2)
        assert time.monotonic() - left < BOUND
        gone.set()
        assert until(lambda: rest)[0] < UPLOAD_SIZE
        nothing_left(gateway, 499)


@pytest.mark.parametrize("phase", ["connecting", "connecting with a body that waits"])
def test_while_connecting(loop: Loop, leave: Leave, phase: str) -> None:
    """A long body fills the buffers before anybody wants it, so that nothing is read from the client meanwhile."""
    with black_hole() as port:
        fillers = connecting(port)
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
        sock = raw.connect(gateway.port)
        if "body" in phase:
            sock.sendall(UPLOAD_HEAD)
            send_until_unread(gateway, sock)
        else:
            sock.sendall(CHAT_REQUEST)
        until(lambda: connecting(port) > fillers)
        left = time.monotonic()
        leave(sock)
        until(lambda: connecting(port) == fillers, 2)
        assert time.monotonic() - left < BOUND
        nothing_left(gateway, 499)


def test_in_the_tls_handshake(loop: Loop, authority: Authority, leave: Leave) -> None:
    """An upstream that accepts and then says nothing."""
    ended: list[float] = []
    met: list[bytes] = []

    def mute(connection: socket.socket) -> None:
        try:
            while data := connection.recv(65536):
                met.append(data)
        finally:
            ended.append(time.monotonic())

    with listening(mute) as port:
        gateway = gateway_to(loop, f"https://localhost:{port}")
        sock = raw.connect(gateway.port)
        sock.sendall(CHAT_REQUEST)
        until(lambda: met)
        left = time.monotonic()
        leave(sock)
        assert until(lambda: ended)[0] - left < BOUND
        nothing_left(gateway, 499)


def test_before_its_own_body_is_complete(loop: Loop, leave: Leave) -> None:
    upstream, gateway = upstream_and_gateway(loop, [Stall()], None)
    sock = raw.connect(gateway.port)
    sock.sendall(CHAT_REQUEST[:-10])
    until(lambda: gateway.daemon.gateway.in_flight)
    leave(sock)
    nothing_left(gateway, 499)
    assert upstream.connections == 0


def test_with_requests_of_its_own_still_waiting(loop: Loop, leave: Leave) -> None:
    """So many that nothing more is read from it until the first is answered."""
    upstream, gateway = upstream_and_gateway(loop, [Stall()], None)
    sock = raw.connect(gateway.port)
    sock.sendall(CHAT_REQUEST * 100)
    until(lambda: upstream.requests)
    time.sleep(0.1)
    left = time.monotonic()
    leave(sock)
    told_in_time(upstream, left)
    nothing_left(gateway, 499)


def endless(connection: socket.socket) -> None:
    read_head(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n")
    try:
        while True:
            connection.sendall(PIECE)
    finally:
        ENDED.append(time.monotonic())


ENDED: list[float] = []


def test_without_having_read_what_waits_for_it(loop: Loop, leave: Leave) -> None:
    """The client's side is full, so the upstream is not being read when the client goes."""
    ENDED.clear()
    with listening(endless) as port:
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
        sock = raw.connect(gateway.port, rcvbuf=4096)
        sock.sendall(CHAT_REQUEST)
        time.sleep(0.5)
        left = time.monotonic()
        leave(sock)
        assert until(lambda: ENDED)[0] - left < BOUND
        nothing_left(gateway, 200)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_takes_nothing_is_given_up(loop: Loop, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """What it finds when it comes back must not look complete: where the end is the only framing, no plain end."""
    monkeypatch.setattr(relay, "WRITE_DEADLINE", 0.4)
    ENDED.clear()
    with listening(endless) as port:
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
        with raw.connect(gateway.port, rcvbuf=4096) as sock:
            start = time.monotonic()
            sock.sendall(CHAT_REQUEST.replace(b"HTTP/1.1", b"HTTP/" + version.encode()))
            assert 0.3 < until(lambda: ENDED)[0] - start < 1.5
            reply = raw.read(sock, until_complete=False)
            assert len(reply.data) > 1000 and not reply.complete
        nothing_left(gateway, 200, "write_deadline")


def test_a_client_that_only_ends_its_own_side(loop: Loop) -> None:
    """It may get its answer or be taken for gone, but the log must say which."""
    _, gateway = upstream_and_gateway(loop, [json_reply(b'{"ok":true}')], None)
    reply = raw.send(gateway.port, CHAT_REQUEST, half_close=True)
    until(gateway.at_rest)
    line = until(gateway.requests)[0]
    if reply.data:
        assert reply.complete and (line["outcome"], line["status"]) == ("ok", 200)
    else:
        assert (line["outcome"], line["status"]) == ("client_gone", 499)


def test_nothing_leaks_when_many_leave(loop: Loop, authority: Authority) -> None:
    """Descriptors and tasks are where they were before."""
    _, gateway = upstream_and_gateway(loop, [Stall()], authority)
    with black_hole() as port:
        nowhere = gateway_to(loop, f"http://127.0.0.1:{port}")
        before = len(os.listdir("/proc/self/fd"))
        for to in (gateway, nowhere):
            socks = [raw.connect(to.port) for _ in range(50)]
            for sock in socks:
                sock.sendall(CHAT_REQUEST)
            until(lambda to=to: to.daemon.gateway.in_flight == 50)
            time.sleep(0.1)
            for number, sock in enumerate(socks):
                raw.reset(sock) if number % 2 else sock.close()
            until(to.at_rest)
            until(lambda to=to: len(to.requests()) == 50)
            assert {line["outcome"] for line in to.requests()} == {"client_gone"}
        until(lambda: len(os.listdir("/proc/self/fd")) <= before)
