"""Bodies that are never held: how they pass, how they are refused, and that a broken one is never complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, SECRETS, Loop, Running, quiet, until
from tests.support.upstream import Got, Pause, Reset, Script, Stall, Upstream, json_reply
from tests.test_upstream import listening, read_head

MIB = 1024 * 1024
OK = json_reply(b'{"ok":true}')

CONFIG = """\
server: {{listen: ["127.0.0.1:0"], max_body: 1MiB, max_upload: {limit}}}
endpoints: {{files: openai-main}}
providers:
  openai-main:
    vendor: openai
    base_url: "{url}"
    credentials: [provider-key]
    timeouts: {{connect: 2s, first_byte: {wait}, idle: {wait}}}
aliases: {{whisper: openai-main/whisper-large-v3}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""

FORM = ("Content-Type", "multipart/form-data; boundary=frontier")
CHUNKED = ("Transfer-Encoding", "chunked")
EXPECT = ("Expect", "100-continue")
FILES = ("/openai-main/v1/files", "/v1/files")


class Process:
    """A daemon in a process of its own, for what only a process can show: its memory, its environment."""

    def __init__(self, folder: Path, config: str, environ: dict[str, str] | None = None) -> None:
        secrets = folder / "secrets"
        secrets.mkdir()
        for name, value in SECRETS.items():
            (secrets / name).touch(0o600)
            (secrets / name).write_text(value + "\n")
        (folder / "gproxyd.yaml").write_text(quiet(config))
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gproxyd", "serve", "--config", str(folder / "gproxyd.yaml")],
                stderr=log,
                env={
                    **os.environ,
                    "GPROXYD_SECRETS_DIR": str(secrets),
                    "STATE_DIRECTORY": str(secrets.parent),
                    **(environ or {}),
                },
            )
        ready = until(lambda: next((line for line in self.log() if line["event"] == "ready"), None), 20)
        self.port = int(ready["listen"].rpartition(":")[2])

    def log(self) -> list[dict[str, str]]:
        assert self._process.poll() is None, self._log.read_text()
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def memory(self, field: str) -> int:
        """`VmRSS` now, `VmHWM` at its highest, in bytes (proc(5))."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
        assert match
        return int(match[1]) * 1024

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGTERM)  # in a hurry
        assert self._process.wait(10) == 0


@contextmanager
def process(folder: Path, config: str, environ: dict[str, str] | None = None) -> Iterator[Process]:
    daemon = Process(folder, config, environ)
    try:
        yield daemon
    finally:
        daemon.stop()


def gateway_to(loop: Loop, url: str, *, limit: str = "2GiB", wait: str = "5s") -> Running:
    return loop.gateway(CONFIG.format(url=url, limit=limit, wait=wait))


def head(target: str, *headers: tuple[str, str], key: str | None = CLIENT_KEY) -> bytes:
    return raw.request(target, b"", headers=[FORM, *headers], key=key)


def length(size: int) -> tuple[str, str]:
    return ("Content-Length", str(size))


def form(*fields: tuple[str, bytes]) -> tuple[bytes, bytes]:
    """A form up to its file's content, and what follows that."""
    before = b"".join(
        b'--frontier\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), value)
        for name, value in fields
    )
    file = b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="f.bin"\r\n'
    return before + file + b"Content-Type: application/octet-stream\r\n\r\n", b"\r\n--frontier--\r\n"


# Large.


class Sink:
    """An upstream that hashes what it gets, whatever its framing."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[tuple[str, int]] = []
        """The SHA-256 and the length of each complete body."""

    def __call__(self, connection: socket.socket) -> None:
        with connection.makefile("rb", buffering=MIB) as stream:
            while True:
                got = b""
                while line := stream.readline():
                    got += line
                    if line == b"\r\n":
                        break
                if not got:
                    return
                self.heads.append(got)
                digest, count = hashlib.sha256(), 0
                for piece in _pieces(got, stream.read):
                    digest.update(piece)
                    count += len(piece)
                self.bodies.append((digest.hexdigest(), count))
                connection.sendall(OK)


def _pieces(head: bytes, read: Callable[[int], bytes]) -> Iterator[bytes]:
    match = re.search(rb"(?i)\r\ncontent-length: (\d+)\r\n", head)
    if match:
        left = int(match[1])
        while left:
            piece = read(min(left, MIB))
            if not piece:
                raise ConnectionResetError("the body broke off")
            left -= len(piece)
            yield piece
        return
    assert b"\r\nTransfer-Encoding: chunked\r\n" in head
    while True:
        digits = b""
        while not digits.endswith(b"\r\n"):
            digits += read(1)
        size = int(digits, 16)
        piece = read(size + 2)
        if len(piece) < size + 2 or not piece.endswith(b"\r\n"):
            raise ConnectionResetError("the body broke off")
        if not size:
            return
        yield piece[:-2]


LARGE = {
    "files, scoped": ("/openai-main/v1/files", 1024, False, None),
    "files, aggregated": ("/v1/files", 1024, True, None),
    "transcriptions": ("/v1/audio/transcriptions", 1024, False, b"openai-main/whisper-1"),
    "transcriptions, in chunks, by alias": ("/v1/audio/transcriptions", 128, True, b"whisper"),
}
"""Target, size in MiB, whether in chunks, and the model that stands in the form before the file."""

UPSTREAM_MODEL = {b"openai-main/whisper-1": b"whisper-1", b"whisper": b"whisper-large-v3"}


@pytest.fixture(scope="module")
def sink() -> Iterator[tuple[Sink, int]]:
    made = Sink()
    with listening(made) as port:
        yield made, port


@pytest.fixture(scope="module")
def apart(sink: tuple[Sink, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A daemon in its own process, warmed up."""
    config = CONFIG.format(url=f"http://127.0.0.1:{sink[1]}", limit="2GiB", wait="10s")
    with process(tmp_path_factory.mktemp("apart"), config) as daemon:
        for _ in range(5):
            assert raw.send(daemon.port, head("/v1/files", length(10)) + b"0123456789").status == 200
        yield daemon


@pytest.mark.slow
@pytest.mark.parametrize("what", LARGE)
def test_a_large_file_arrives_whole_and_never_lies_in_memory(apart: Process, sink: tuple[Sink, int], what: str) -> None:
    target, mebibytes, chunked, model = LARGE[what]
    before, after = form(*[("model", model)] if model else [], ("purpose", b"batch"))
    block = os.urandom(MIB)
    expected = hashlib.sha256(before.replace(model, UPSTREAM_MODEL[model]) if model else before)
    hashing = threading.Thread(target=lambda: [expected.update(block) for _ in range(mebibytes)])
    hashing.start()
    already = apart.memory("VmHWM")

    with raw.connect(apart.port, timeout=20) as sock:
        size = len(before) + mebibytes * MIB + len(after)
        sock.sendall(head(target, CHUNKED if chunked else length(size)))
        pieces = [before, *[block] * mebibytes, after]
        for piece in pieces:
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        reply = raw.read(sock)

    assert (reply.status, reply.body) == (200, b'{"ok":true}')
    hashing.join()
    expected.update(after)
    shorter = len(model) - len(UPSTREAM_MODEL[model]) if model else 0
    assert sink[0].bodies[-1] == (expected.hexdigest(), size - shorter)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (size - shorter)
    assert sink[0].heads[-1].count(b"\r\n" + framing + b"\r\n") == 1
    assert apart.memory("VmHWM") - already < 32 * MIB


def test_a_chunked_body_passes_whatever_its_chunks(loop: Loop) -> None:
    """One byte each, with extensions and trailers: the content passes, and nothing else of them."""
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    before, after = form()
    body = before + bytes(range(256)) + after
    pieces = b"".join(b'1;a="b;c"\r\n%c\r\n' % byte for byte in body)
    for target in FILES:
        reply = raw.send(gateway.port, head(target, CHUNKED) + pieces + b"0\r\nX-Trailer: t\r\n\r\n")
        assert reply.status == 200
    for got in upstream.requests:
        assert got.complete and got.body == body
        assert not got.header("x-trailer")


def test_the_next_request_follows_on_both_connections(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    with raw.connect(gateway.port) as sock:
        for number in range(4):
            body = os.urandom(300_000)
            if number % 2:
                sock.sendall(head("/v1/files", CHUNKED))
                for start in range(0, len(body), 70_000):
                    piece = body[start : start + 70_000]
                    sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                sock.sendall(b"0\r\n\r\n")
            else:
                sock.sendall(head("/v1/files", length(len(body))))
                time.sleep(0.02)
                sock.sendall(body)
            assert raw.read(sock).status == 200
            assert upstream.requests[-1].body == body
    assert upstream.connections == 1


# Early answers.


TOO_LARGE = b'{"error":{"message":"Maximum content size limit exceeded.","code":"vendor_413"}}'


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("goes_on", [False, True], ids=["client waits", "client goes on"])
def test_an_early_answer_reaches_the_client(loop: Loop, chunked: bool, goes_on: bool) -> None:
    upstream = Upstream(loop, [Pause(0.05), json_reply(TOO_LARGE, status=b"413 Too Large")], on_head=True).start()
    gateway = gateway_to(loop, upstream.url)
    piece = b"x" * 65536
    framed = b"10000\r\n%b\r\n" % piece if chunked else piece
    with raw.connect(gateway.port) as sock:
        sock.sendall(head("/v1/files", CHUNKED if chunked else length(64 * MIB)) + framed)
        if goes_on:
            for _ in range(400):
                sock.sendall(framed)  # more than all buffers hold, less than is read of what was refused
        start = time.monotonic()
        reply = raw.read(sock)
        assert (reply.status, reply.body, reply.complete) == (413, TOO_LARGE, True)
        assert time.monotonic() - start < 0.5
        assert reply.header("connection") == "close"
        if not goes_on and not chunked:
            assert raw.read(sock, until_complete=False).data == b""
    assert upstream.peer_left.wait(1) and not upstream.requests[0].complete
    assert gateway.request(reply.header("x-request-id") or "")["status"] == 413
    until(gateway.at_rest)


def test_an_early_stream_passes_while_the_upload_goes_on(loop: Loop) -> None:
    """An answer that begins before the request has ended is no reason to stop either."""
    first, last = b"data: 1\n\n", b"data: 2\n\n"

    def script(got: Got) -> Script:
        done: Script = [Pause(0.3), b"9\r\n" + last + b"\r\n0\r\n\r\n"]
        return [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n"
                + first + b"\r\n", *done]  # fmt: skip

    upstream = Upstream(loop, script, on_head=True).start()
    gateway = gateway_to(loop, upstream.url)
    with raw.connect(gateway.port) as sock:
        sock.sendall(head("/v1/files", length(200_000)) + b"x" * 100_000)
        got = b""
        while first not in got:
            got += sock.recv(65536)
        sock.sendall(b"x" * 100_000)
        until(lambda: upstream.requests[0].complete)
        reply = raw.read(sock)
    assert last in reply.data and (got + reply.data).endswith(b"0\r\n\r\n")


def test_an_upstream_that_dies_during_the_upload(loop: Loop) -> None:
    upstream = Upstream(loop, [Pause(0.05), Reset()], on_head=True).start()
    gateway = gateway_to(loop, upstream.url)
    with raw.connect(gateway.port) as sock:
        sock.sendall(head("/v1/files", length(64 * MIB)) + b"x" * 100_000)
        reply = raw.read(sock)
    assert (reply.status, reply.json["error"]["code"]) == (502, "upstream_error")
    assert upstream.connections == 1


# Broken uploads.


def broken(loop: Loop, data: bytes, target: str, ending: Callable[[socket.socket], object]) -> tuple[Upstream, Running]:
    """Sends what is no complete request, then does `ending`. The upstream reads what comes and never answers."""
    upstream = Upstream(loop, [Stall()], on_head=True).start()
    gateway = gateway_to(loop, upstream.url)
    with raw.connect(gateway.port) as sock:
        sock.sendall(data)
        until(lambda: upstream.requests and upstream.requests[0].body_bytes)
        ending(sock)
    assert upstream.peer_left.wait(2)
    assert not upstream.requests[0].complete, target
    until(gateway.at_rest)
    return upstream, gateway


CUT = {
    "within a length": (length(1000), b"x" * 500),
    "within a chunk": (CHUNKED, b"100\r\n" + b"x" * 100),
    "between chunks": (CHUNKED, b"5\r\nhello\r\n"),
    "within the last chunk": (CHUNKED, b"5\r\nhello\r\n0\r\n"),
}


@pytest.mark.parametrize("ending", [socket.socket.close, raw.reset], ids=["fin", "rst"])
@pytest.mark.parametrize("where", CUT)
@pytest.mark.parametrize("target", FILES)
def test_an_upload_that_breaks_off_is_never_complete(
    loop: Loop, target: str, where: str, ending: Callable[[socket.socket], None]
) -> None:
    framing, body = CUT[where]
    _, gateway = broken(loop, head(target, framing) + body, target, ending)
    line = until(gateway.requests)[0]
    assert (line["outcome"], line["status"]) == ("client_gone", 499)


MALFORMED = {
    "a size that is none": b"5\r\nhello\r\nxyz\r\nworld\r\n0\r\n\r\n",
    "a size with a sign": b"5\r\nhello\r\n+5\r\nworld\r\n0\r\n\r\n",
    "a chunk that is longer than it says": b"5\r\nhello\r\n5\r\nworldly\r\n0\r\n\r\n",
    "no line end behind the data": b"5\r\nhello\r\n5\r\nworld0\r\n\r\n",
    "no size": b"5\r\nhello\r\n\r\n\r\n",
    "a size beyond all": b"5\r\nhello\r\nfffffffffffffffff\r\nworld\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at once"])
@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("target", ["/v1/files", "/v1/audio/transcriptions"])
def test_a_malformed_chunk_never_completes_the_upload(loop: Loop, target: str, what: str, at_once: bool) -> None:
    upstream = Upstream(loop, lambda got: [OK] if got.complete else [Stall()], on_head=True).start()
    gateway = gateway_to(loop, upstream.url, wait="2s")
    lead = b""
    if "transcriptions" in target:
        before, _ = form(("model", b"whisper"))
        lead = b"%x\r\n%b\r\n" % (len(before), before)
    good, _, bad = MALFORMED[what].partition(b"\r\nhello\r\n")
    parts = [head(target, CHUNKED) + lead + good + b"\r\nhello\r\n", bad]
    follower = raw.request("/healthz")
    start = time.monotonic()
    if at_once:
        reply = raw.send(gateway.port, b"".join(parts) + follower, until_complete=False, timeout=1)
    else:
        reply = raw.send(gateway.port, [(parts[0], 0.05), (parts[1] + follower, 0.0)], until_complete=False, timeout=1)
    if reply.data:
        assert reply.status == 400 and reply.data.count(b"HTTP/1.1 ") == 1, reply.data
        assert reply.complete and reply.json["error"]["code"] == "invalid_request"
        assert b"hello" not in reply.data and b"world" not in reply.data
    assert reply.ended in ("fin", "rst") and time.monotonic() - start < 1
    until(gateway.at_rest)
    if upstream.requests:
        assert upstream.peer_left.wait(1) and not upstream.requests[0].complete


def test_a_form_without_its_end_is_told_as_it_was(loop: Loop) -> None:
    """Framed well, but no whole form: whoever judges it, gateway or vendor, the log tells what the client got."""
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    before, _ = form(("model", b"whisper"))
    body = before + b"x" * 200_000
    request = head("/v1/audio/transcriptions", length(len(body)))
    reply = raw.send(gateway.port, [(request + body[:50_000], 0.05), (body[50_000:], 0.0)])
    line = gateway.request(reply.header("x-request-id") or "")
    if reply.status == 200:
        assert reply.complete and (line["status"], line["outcome"]) == (200, "ok")
    else:
        assert (reply.status, line["status"], line["outcome"]) == (400, 400, "refused")
        assert not [got for got in upstream.requests if got.complete]


def test_a_client_that_stops_sending_is_given_up(loop: Loop) -> None:
    upstream = Upstream(loop, [Stall()], on_head=True).start()
    gateway = gateway_to(loop, upstream.url, wait="400ms")
    with raw.connect(gateway.port) as sock:
        sock.sendall(head("/v1/files", length(1000)) + b"x" * 500)
        start = time.monotonic()
        reply = raw.read(sock)
    assert (reply.status, reply.json["error"]["code"]) == (408, "request_timeout")
    assert 0.3 < time.monotonic() - start < 1
    assert upstream.peer_left.wait(1) and not upstream.requests[0].complete


def test_an_upstream_that_stops_taking_is_given_up(loop: Loop) -> None:
    ended: list[int] = []

    def stubborn(connection: socket.socket) -> None:
        read_head(connection)
        time.sleep(1.5)
        count = 0
        try:
            while data := connection.recv(MIB):
                count += len(data)
        finally:
            ended.append(count)

    with listening(stubborn, rcvbuf=16 * 1024) as port:
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}", wait="500ms")
        with raw.connect(gateway.port) as sock:
            sock.sendall(head("/v1/files", length(64 * MIB)))
            replies: list[Reply] = []
            reader = threading.Thread(target=lambda: replies.append(raw.read(sock)))
            reader.start()
            start = time.monotonic()
            try:
                for _ in range(64):
                    sock.sendall(b"x" * MIB)
            except OSError:
                pass  # given up while sending; what was said of it has been read
            reader.join(5)
        assert (replies[0].status, replies[0].json["error"]["code"]) == (504, "upstream_timeout")
        assert time.monotonic() - start < 5
        assert until(lambda: ended)[0] < 64 * MIB


# Limits.


def test_a_body_that_says_it_is_too_long_is_refused_unread(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url, limit="1MiB")
    for target in (*FILES, "/v1/audio/transcriptions", "/proxy/openai-main/v1/files"):
        reply = raw.send(gateway.port, head(target, length(MIB + 1)))
        assert (reply.status, reply.json["error"]["code"]) == (413, "payload_too_large"), target
        assert reply.header("connection") == "close"
    assert upstream.connections == 0


@pytest.mark.parametrize("target", [*FILES, "/v1/audio/transcriptions"])
def test_a_body_that_grows_too_long_is_cut(loop: Loop, target: str) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url, limit="1MiB")
    before, after = form(("model", b"whisper"))
    for size, status in ((MIB - len(before) - len(after), 200), (MIB, 413)):
        upstream.requests.clear()
        body = before + b"x" * size + after
        with raw.connect(gateway.port) as sock:
            sock.sendall(head(target, CHUNKED))
            for start in range(0, len(body), 100_000):
                piece = body[start : start + 100_000]
                sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            sock.sendall(b"0\r\n\r\n")
            reply = raw.read(sock)
        assert reply.status == status, reply.data
        assert [got.complete for got in upstream.requests] == ([True] if status == 200 else [False])


def test_who_sends_on_after_a_refusal_can_still_read_it(loop: Loop) -> None:
    """A reset on the way would take the answer from the client before it has looked."""
    gateway = gateway_to(loop, "http://127.0.0.1:9", limit="1MiB")
    with raw.connect(gateway.port) as sock:
        sock.sendall(head("/v1/files", length(64 * MIB), key="ck-wrong"))
        for _ in range(20):
            sock.sendall(b"x" * MIB)
        reply = raw.read(sock)
    assert (reply.status, reply.complete) == (401, True)


# Expectations.


def expecting(gateway: Running, request: bytes) -> tuple[socket.socket, bytes]:
    """Sends a head, and reads what comes within a moment without a body having been sent."""
    sock = raw.connect(gateway.port)
    sock.sendall(request)
    sock.settimeout(0.4)
    try:
        return sock, sock.recv(65536)
    except TimeoutError:
        return sock, b""


JSON = ("Content-Type", "application/json")
CHAT_BODY = b'{"model":"openai-main/m","messages":[]}'
ADMITTED = {
    "a file": ("/openai-main/v1/files", FORM, b"x" * 100_000),
    "a form": ("/v1/audio/transcriptions", FORM, b"x".join(form(("model", b"whisper")))),
    "a chat": ("/v1/chat/completions", JSON, CHAT_BODY),
    "a raw chat": ("/proxy/openai-main/v1/chat/completions", JSON, CHAT_BODY),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("what", ADMITTED)
def test_a_client_that_waits_is_told_to_go_on(loop: Loop, what: str, chunked: bool) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    target, kind, body = ADMITTED[what]
    framing = CHUNKED if chunked else length(len(body))
    for _ in range(3):
        request = raw.request(target, b"", headers=[kind, framing, EXPECT])
        sock, got = expecting(gateway, request)
        with sock:
            assert got == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)
            reply = raw.read(sock)
            assert (reply.status, reply.body) == (200, b'{"ok":true}')
    for got_upstream in upstream.requests:
        assert not got_upstream.header("expect")
    assert len(upstream.requests) == 3 and upstream.connections == 1


def test_a_client_that_does_not_wait_after_all(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    reply = raw.send(gateway.port, head("/v1/files", length(5), EXPECT) + b"hello", until_complete=False, timeout=0.3)
    interim, _, rest = reply.data.rpartition(b"HTTP/1.1 200 OK\r\n")
    assert interim in (b"", b"HTTP/1.1 100 Continue\r\n\r\n") and rest.endswith(b'{"ok":true}')


REFUSED = {
    "a wrong key": (head("/v1/files", length(10), EXPECT, key="ck-wrong"), 401),
    "no key": (head("/v1/files", length(10), EXPECT, key=None), 401),
    "a long body": (head("/v1/files", length(3 << 30), EXPECT), 413),
    "a long chat": (raw.request("/v1/chat/completions", b"", headers=[JSON, length(2 * MIB), EXPECT]), 413),
    "no such endpoint": (head("/v1/nothing", length(10), EXPECT), 404),
    "no such provider": (head("/nobody/v1/files", length(10), EXPECT), 404),
    "another expectation": (head("/v1/files", length(10), ("Expect", "foo")), 417),
    "one more expectation": (head("/v1/files", length(10), ("Expect", "100-continue, foo")), 417),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_client_that_waits_is_refused_at_once(loop: Loop, what: str) -> None:
    """The final answer is the first: no 100 asks for a body that nobody wants."""
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    request, status = REFUSED[what]
    start = time.monotonic()
    reply = raw.send(gateway.port, request)
    assert time.monotonic() - start < 0.3
    assert reply.status == status and reply.data.count(b"HTTP/1.1 ") == 1
    assert reply.header("connection") == "close"
    assert upstream.connections == 0


def test_http_1_0_knows_no_interim_answer(loop: Loop) -> None:
    """RFC 9110 section 10.1.1: an expectation of 100-continue in an HTTP/1.0 request must be ignored."""
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    for target in ("/v1/files", "/v1/audio/transcriptions"):
        before, after = form(("model", b"whisper"))
        request = head(target, length(len(before + after)), EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0")
        reply = raw.send(gateway.port, [(request, 0.1), (before + after, 0.0)], until_complete=False)
        assert reply.data.startswith(b"HTTP/1.1 200 OK\r\n"), reply.data
        assert reply.body == b'{"ok":true}'


def test_an_upstream_that_answers_without_being_asked_to_go_on(loop: Loop) -> None:
    """Where `Expect` is not forwarded there is no 100 to wait for, and none can be taken for the next answer."""
    numbers = iter(range(1000))

    def script(got: Got) -> Script:
        number = next(numbers)
        body = b'{"n":%d}' % number
        return [json_reply(body, status=b"403 No") if number == 0 else json_reply(body)]

    upstream = Upstream(loop, script).start()
    gateway = gateway_to(loop, upstream.url)
    for number in range(50):
        sock, got = expecting(gateway, head("/v1/files", length(5), EXPECT))
        with sock:
            assert got == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"hello")
            reply = raw.read(sock)
        assert (reply.status, reply.json) == (200 if number else 403, {"n": number})
    assert upstream.connections == 1
