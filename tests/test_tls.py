"""TLS towards upstreams: who is believed, who is not, and that the key never leaves in clear."""

from __future__ import annotations

import random
import re
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.certs import Authority, believed, self_signed
from tests.support.configs import providers_at
from tests.support.raw import Reply
from tests.support.running import PROVIDER_KEY, Loop, Running, until
from tests.support.servers import listening, read_request
from tests.support.upstream import EVENT_STREAM, Fin, Pause, Reset, Upstream, chunk, json_reply
from tests.test_uploads import Process, process

KEY = PROVIDER_KEY.encode()
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
OK = json_reply(b'{"ok":true}')


def config(**urls: str) -> str:
    return providers_at(urls, connect="600ms", first_byte="2s", idle="2s")


def chat(port: int, provider: str, **body: object) -> Reply:
    return raw.send(port, raw.request(f"/{provider}/v1/chat/completions", CHAT | body))


class Wire:
    """A relay in front of a server that notes every byte of its peer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.seen = b""

    def __call__(self, connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._port), 5) as onward:
            while True:
                ready, _, _ = select.select([connection, onward], [], [], 5)
                for source in ready:
                    data = source.recv(65536)
                    if source is connection:
                        self.seen += data
                    if not data:
                        return
                    (onward if source is connection else connection).sendall(data)
                if not ready:
                    return


def speaking(context: ssl.SSLContext, met: list[bytes]) -> Callable[[socket.socket], None]:
    """A TLS server that answers requests and notes in `met` what it could decrypt."""

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            while True:
                head, body = read_request(secure)
                met.append(head + body)
                secure.sendall(OK)

    return serve


def plain(connection: socket.socket) -> None:
    """A server that knows no TLS."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    connection.recv(65536)


def mute(connection: socket.socket) -> None:
    """A server that takes the handshake and never answers."""
    while connection.recv(65536):
        pass


def cut(connection: socket.socket) -> None:
    connection.recv(65536)


def reset(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


MET: list[bytes] = []


@contextmanager
def wired(serve: Callable[[socket.socket], object]) -> Iterator[tuple[Wire, int]]:
    with listening(serve) as behind:
        wire = Wire(behind)
        with listening(wire) as port:
            yield wire, port


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def servers(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Wire], Process]]:
    """One daemon in its own process, which believes `authority`, and a server for every kind of trouble."""
    folder = tmp_path_factory.mktemp("tls")
    good = authority.server()
    old = authority.server()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    elder = authority.server()
    elder.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        elder.minimum_version = elder.maximum_version = ssl.TLSVersion.TLSv1_1
    kinds: dict[str, Callable[[socket.socket], object]] = {
        "good": speaking(good, MET),
        "older": speaking(old, MET),
        "oldest": speaking(elder, MET),
        "wrong-name": speaking(authority.server("DNS:other.test,IP:192.0.2.1"), MET),
        "expired": speaking(authority.server(days=-1), MET),
        "self-signed": speaking(self_signed(folder), MET),
        "unknown": speaking(Authority(folder, "unknown").server(), MET),
        "plain": plain,
        "mute": mute,
        "cut": cut,
        "reset": reset,
    }
    wires: dict[str, Wire] = {}
    urls: dict[str, str] = {}
    opened = []
    try:
        for name, serve in kinds.items():
            opened.append(wired(serve))
            wires[name], port = opened[-1].__enter__()
            urls[name] = f"https://localhost:{port}"
        urls["by-address"] = urls["good"].replace("localhost", "127.0.0.1")
        with process(tmp_path_factory.mktemp("daemon"), config(**urls), {"SSL_CERT_FILE": str(authority.path)}) as at:
            yield wires, at
    finally:
        for each in opened:
            each.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["good", "older", "by-address"])
def test_an_upstream_that_proves_itself_is_believed(servers: tuple[dict[str, Wire], Process], kind: str) -> None:
    wires, daemon = servers
    MET.clear()
    for _ in range(3):
        reply = chat(daemon.port, kind)
        assert (reply.status, reply.body) == (200, b'{"ok":true}')
    assert len(MET) == 3 and all(b"\r\nAuthorization: Bearer " + KEY in request for request in MET)
    if kind != "by-address":
        assert b"localhost" in wires[kind].seen, "no server name was indicated"
        assert b"http/1.1" in wires[kind].seen and b"\x02h2" not in wires[kind].seen
        assert KEY not in wires[kind].seen and b"Hello" not in wires[kind].seen


UNPROVEN = {
    "wrong-name": "ostname mismatch",
    "expired": "expired",
    "self-signed": "self-signed certificate",
    "unknown": "unable to get local issuer certificate",
    "oldest": "handshake failed",
    "plain": "handshake failed",
    "cut": "cut off",
    "reset": "cut off",
}
"""Kinds of trouble, and the word by which the administrator can tell them apart."""


@pytest.mark.parametrize("kind", UNPROVEN)
def test_an_upstream_that_does_not_is_never_given_the_key(servers: tuple[dict[str, Wire], Process], kind: str) -> None:
    wires, daemon = servers
    MET.clear()
    start = time.monotonic()
    reply = chat(daemon.port, kind)
    assert time.monotonic() - start < 1
    assert (reply.status, reply.complete) == (502, True)
    error = reply.json["error"]
    assert error["code"] == "upstream_tls" and error["message"].startswith("upstream_error: upstream_tls: ")
    assert UNPROVEN[kind] in error["message"]
    assert wires[kind].seen.startswith(b"\x16\x03"), "what was sent first was no handshake"
    assert KEY not in wires[kind].seen and not MET
    line = until(lambda: [entry for entry in daemon.log() if entry.get("provider") == kind])[0]
    assert (line["status"], line["outcome"], line["reason"]) == (502, "upstream_error", "tls")


def test_a_handshake_that_stalls_is_ended_by_the_connect_limit(servers: tuple[dict[str, Wire], Process]) -> None:
    wires, daemon = servers
    start = time.monotonic()
    reply = chat(daemon.port, "mute")
    assert 0.6 <= time.monotonic() - start < 1.1
    assert (reply.status, reply.json["error"]["code"]) == (504, "upstream_timeout")
    assert KEY not in wires["mute"].seen


def test_without_the_authority_nothing_is_believed(tmp_path: Path, authority: Authority) -> None:
    """The system's own authorities are the default, and there is no way around them."""
    MET.clear()
    with wired(speaking(authority.server(), MET)) as (wire, port):
        other = Authority(tmp_path, "other")
        url = f"https://localhost:{port}"
        folder = tmp_path / "daemon"
        folder.mkdir()
        with process(folder, config(up=url), {"SSL_CERT_FILE": str(other.path), "PYTHONHTTPSVERIFY": "0"}) as daemon:
            reply = chat(daemon.port, "up")
            assert (reply.status, reply.json["error"]["code"]) == (502, "upstream_tls")
        assert KEY not in wire.seen and not MET


# Once connected.


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> Iterator[Authority]:
    with believed(authority):
        yield authority


def secured(loop: Loop, authority: Authority, script: list[object]) -> tuple[Upstream, Running]:
    upstream = Upstream(loop, script).start(tls=authority.server())  # type: ignore[arg-type]
    return upstream, loop.gateway(config(up=upstream.url))


def test_connections_are_kept(loop: Loop, trusting: Authority) -> None:
    upstream, gateway = secured(loop, trusting, [OK])
    for _ in range(20):
        assert chat(gateway.port, "up").status == 200
    assert upstream.connections == 1 and len(upstream.requests) == 20


@pytest.mark.parametrize("ending", [Fin(), Reset()], ids=["fin", "rst"])
def test_a_stream_that_breaks_is_never_complete(loop: Loop, trusting: Authority, ending: object) -> None:
    event = b'data: {"model":"m"}\n\n'
    _, gateway = secured(loop, trusting, [EVENT_STREAM, chunk(event * 3), Pause(0.05), ending])
    reply = chat(gateway.port, "up", stream=True)
    assert reply.status == 200 and not reply.complete
    assert reply.body.startswith(event * 3) and b'"code":"upstream_error"' in reply.body


def test_a_large_body_passes_whole(loop: Loop, trusting: Authority) -> None:
    body = random.Random(1).randbytes(8 * 1024 * 1024)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: %d\r\n\r\n" % len(body)
    upstream, gateway = secured(loop, trusting, [head + body])
    assert chat(gateway.port, "up").body == body
    reply = raw.send(gateway.port, raw.request("/up/v1/files", body, headers=[("Content-Type", "x/y")]))
    assert reply.status == 200 and upstream.requests[-1].body == body


class Hasty:
    """Answers with tags over TLS, and closes each connection that has been idle for some random milliseconds."""

    def __init__(self, context: ssl.SSLContext, *, politely: bool) -> None:
        self._context = context
        self._politely = politely
        self.processed: Counter[bytes] = Counter()
        self.connections = 0
        self.lock = threading.Lock()

    def __call__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._context.wrap_socket(connection, server_side=True) as secure:
            with self.lock:
                self.connections += 1
            patience = 5.0
            while select.select([secure], [], [], patience)[0]:
                _, body = read_request(secure)
                match = re.search(rb'"user":"(\w+)"', body)
                assert match
                with self.lock:
                    self.processed[match[1]] += 1
                secure.sendall(json_reply(b'{"tag":"%b"}' % match[1]))
                patience = random.random() * 0.005
            if self._politely:
                secure.settimeout(0)
                secure.unwrap()


@pytest.mark.parametrize("politely", [False, True], ids=["bare fin", "close_notify"])
def test_no_post_is_processed_twice_where_an_idle_connection_closes(
    loop: Loop, trusting: Authority, politely: bool
) -> None:
    """What TLS has taken cannot be shown to be unread, so a few may fail; none may be repeated, none mixed up.

    How many depends on how fast an end is heard of, which a busy machine spoils: the best of three races counts.
    """
    failed = (race(loop, trusting, politely) for _ in range(3))
    assert any(count <= 15 for count in failed)


def race(loop: Loop, trusting: Authority, politely: bool) -> int:
    """How many of 150 requests failed."""
    upstream = Hasty(trusting.server(), politely=politely)
    failed = 0
    with listening(upstream) as port:
        gateway = loop.gateway(config(up=f"https://localhost:{port}"))
        with raw.connect(gateway.port) as sock:
            for number in range(150):
                tag = f"try{number}"
                sock.sendall(raw.request("/up/v1/chat/completions", CHAT | {"user": tag}))
                reply = raw.read(sock)
                if reply.status == 502:
                    failed += 1
                else:
                    assert (reply.status, reply.body) == (200, b'{"tag":"%b"}' % tag.encode()), (tag, reply.data)
                time.sleep(random.random() * 0.005)
    assert set(upstream.processed.values()) == {1}
    assert len(upstream.processed) >= 150 - failed
    assert upstream.connections > 15, "the race did not take place"
    return failed
