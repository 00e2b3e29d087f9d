"""Damaged requests: whatever the gateway passes on is one well-formed request, the very one that it logged.

FUZZ_SEED=N FUZZ_ROUNDS=N make it another or a longer run; a failure prints both, and the bytes.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from aiohttp import web_protocol
from aiohttp.http_parser import HttpRequestParserPy

from gproxyd.gateway import door
from tests.support import framing, raw
from tests.support.checks import CREDENTIAL_HEADERS, quick_log
from tests.support.framing import CHAT, CHUNKED, CORPUS, FILES, FIVE, LAST, Sent, get, post, read_strictly
from tests.support.running import CLIENT_KEY, CONFIG, PROVIDER_KEY, Loop, Running, until
from tests.support.upstream import json_reply

SEED = int(os.environ.get("FUZZ_SEED", "20240607"))
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1500"))
OK = json_reply(b"{}")

VALID = [
    get(),
    get(b"X-One: 1\r\nAccept: */*\r\n") * 2,
    post(b"Content-Length: 5\r\n", FIVE),
    post(b"Content-Length: 5\r\nX-Y: z\r\n", FIVE, target=FILES),
    post(CHUNKED, b"2\r\n{ \r\n3\r\n  }\r\n0\r\n\r\n"),
    post(CHUNKED, b"2;a=b\r\n{ \r\n3\r\n  }\r\n0\r\nX-T: 1\r\n\r\n", target=FILES),
    post(b"Content-Length: 5\r\n", FIVE, target=b"/proxy/openai-main/v1/x?a=b"),
    post(b"Content-Length: 5\r\n", FIVE, target=CHAT) + get() + post(CHUNKED, framing.FIVE_CHUNKED),
]
SEEDS = [*VALID * 80, *(case.data for case in CORPUS if len(case.data) < 3000)]
MARKS = [
    *(bytes([byte]) for byte in b"\r\n\0 \t:;,\x0b\xff05#"),
    *(b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"chunked", b"HTTP/1.1", b"GET ", b" HTTP/1.0\r\n"),
    *(b"Content-Length: 3\r\n", b"Content-Length: 50\r\n", CHUNKED, b"Transfer-Encoding: gzip, chunked\r\n"),
    *(b"Connection: close\r\n", b"Connection: authorization\r\n", b"Upgrade: websocket\r\n"),
    *(b"Expect: 100-continue\r\n", b"Host: evil.example\r\n", b"X_Api_Key: x\r\n"),
    *(b"/../", b"%2e%2e", b"?key=", framing.SMUGGLED),
]


def damaged(chance: random.Random) -> bytes:
    """A request, changed at one to four places."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                data[at:at] = chance.choice(MARKS)
            case 1:
                del data[at : at + chance.randint(1, 4)]
            case 2:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 3:
                end = min(len(data), at + chance.randint(1, 40))
                data[at:at] = data[at:end]
            case 4:
                data[at : at + chance.randint(1, 8)] = chance.choice(MARKS)
            case _:
                data[at:] = chance.choice(SEEDS)[chance.randrange(40) :]
    return bytes(data) or b"\r\n"


class Recorder:
    """An upstream that keeps every byte of every connection, and answers whatever looks like a whole request."""

    def __init__(self) -> None:
        self.connections: list[bytearray] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            got = bytearray()
            self.connections.append(got)
            threading.Thread(target=self._talk, args=(connection, got), daemon=True).start()

    def _talk(self, connection: socket.socket, got: bytearray) -> None:
        answered = 0
        with connection:
            while True:
                try:
                    more = connection.recv(65536)
                    if not more:
                        return
                    got += more
                    found = whole(bytes(got))
                    while answered < found:
                        answered += 1
                        connection.sendall(OK)
                except OSError:
                    return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def whole(data: bytes) -> int:
    """How many whole requests there are. What is none never becomes one, and is found at the end of the round."""
    try:
        return len(read_strictly(data))
    except ValueError:
        return 0


@contextmanager
def recording() -> Iterator[Recorder]:
    recorder = Recorder()
    thread = threading.Thread(target=recorder.serve, daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        recorder.close()
        thread.join(5)


def requests_of(recorder: Recorder) -> list[Sent]:
    """What the upstream got in a round; a connection may end within a request that the gateway gave up."""
    found = []
    for got in recorder.connections:
        data = bytes(got)
        try:
            found += read_strictly(data)
        except ValueError:
            # Given up on the way: what there is must be the beginning of a request, never its end.
            assert not data.endswith(b"0\r\n\r\n") or b"chunked" not in data, data
            head, _, _ = data.partition(b"\r\n\r\n")
            sent = read_strictly(b"\r\n".join(line for line in head.split(b"\r\n") if not _frames(line)) + b"\r\n\r\n")
            found.append(sent[0]._replace(body=b"given up"))
    return found


def _frames(line: bytes) -> bool:
    return line.lower().startswith((b"content-length:", b"transfer-encoding:"))


def upstream_path(path: str) -> bytes:
    for prefix in ("/proxy/openai-main", "/openai-main"):
        if path.startswith(prefix + "/"):
            return path.removeprefix(prefix).encode()
    return path.encode()


def play(gateway: Running, recorder: Recorder, data: bytes, offset: int) -> tuple[list[dict[str, Any]], int]:
    """One round. Returns the log lines of its requests, and where the log ends."""
    with raw.connect(gateway.port, timeout=0.5) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR) if not data else None
            sock.settimeout(0.01)
            reply = raw.read(sock, until_complete=False)
        except (BrokenPipeError, ConnectionResetError):
            reply = raw.Reply(b"", "rst")
    assert PROVIDER_KEY.encode() not in reply.data
    until(gateway.at_rest)
    marker = raw.send(gateway.port, LAST)
    assert marker.status == 200, "the gateway is gone"
    request_id = (marker.header("x-request-id") or "").encode()

    def written() -> bytes:
        with open(gateway.log_path, "rb") as log:
            log.seek(offset)
            text = log.read()
        return text if request_id in text and text.endswith(b"\n") else b""

    text = until(written)
    assert PROVIDER_KEY.encode() not in text and CLIENT_KEY.encode() not in text, text
    lines = [orjson.loads(line) for line in text.splitlines()]
    assert {line["event"] for line in lines} <= {"request", "malformed_request"}, text
    asked = [line for line in lines if line["event"] == "request" and line["request_id"].encode() != request_id]
    return asked, offset + len(text)


def check(sent: list[Sent], lines: list[dict[str, Any]]) -> None:
    """Each attempt in the log is one request upstream, the same in all that the log tells."""
    tried = [line for line in lines if line["attempts"]]
    assert len(sent) <= sum(line["attempts"] for line in tried)
    assert len(sent) >= sum(line["outcome"] == "ok" for line in tried)
    waiting = list(sent)
    for line in tried:
        fits = [
            one
            for one in waiting
            if one.method == line["method"]
            and one.target.partition(b"?")[0] == upstream_path(line["path"])
            and (one.body == b"given up" or line["outcome"] != "ok" or len(one.body) == line["bytes_in"])
        ]
        assert fits or line["outcome"] != "ok", line
        if fits:
            waiting.remove(fits[0])
    assert not waiting, "more went upstream than was logged"
    for one in sent:
        credentials = [(name.lower(), value) for name, value in one.headers if name.lower() in CREDENTIAL_HEADERS]
        assert credentials == [(b"authorization", b"Bearer " + PROVIDER_KEY.encode())]
        names = {name.lower() for name, _ in one.headers}
        assert not names & {b"connection", b"upgrade", b"expect", b"te", b"trailer", b"keep-alive", b"proxy-connection"}
        assert not any(b"_" in name for name in names)


@pytest.mark.parametrize("parser", ["c", "python"])
def test_what_is_passed_on_is_what_was_logged(loop: Loop, parser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"FUZZ_SEED={SEED} FUZZ_ROUNDS={ROUNDS}")
    monkeypatch.setitem(door._OPTIONS, "lingering_time", 0.01)
    if parser == "python":
        monkeypatch.setattr(web_protocol, "HttpRequestParser", HttpRequestParserPy)
    chance = random.Random(SEED)
    passed = 0
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "10"))
    with quick_log(), recording() as recorder:
        gateway = loop.gateway(CONFIG.format(vendor=f"http://127.0.0.1:{recorder.port}"))
        gateway.daemon._told._most = sys.maxsize
        until(gateway.log)
        offset = os.path.getsize(gateway.log_path)
        for number in range(ROUNDS):
            data = damaged(chance)
            recorder.connections.clear()
            pool_forgets(gateway)
            try:
                lines, offset = play(gateway, recorder, data, offset)
                sent = requests_of(recorder)
                check(sent, lines)
            except AssertionError as error:
                raise AssertionError(f"FUZZ_SEED={SEED}, round {number}: {data!r} -> {recorder.connections}") from error
            passed += len(sent)
            if time.monotonic() > end and "FUZZ_ROUNDS" not in os.environ:
                break
    assert passed > number // 20, "nearly nothing came through, so nearly nothing was tried"


def pool_forgets(gateway: Running) -> None:
    """Each round has connections of its own, so that what arrives on one is this round's."""
    pool = gateway.daemon.gateway.exchanges.pool

    async def close() -> None:
        pool.close()

    gateway._loop.run(close())
