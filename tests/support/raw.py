"""Sockets without a client library: libraries repair the very malformations under test."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass
class Reply:
    """What came back on a socket: every byte, and how it ended (fin, rst, timeout)."""

    data: bytes
    ended: str

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1]) if self.data.startswith(b"HTTP/1.1 ") else 0

    @property
    def head(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        """The body, its chunked framing undone as far as it goes."""
        rest = self.data.partition(b"\r\n\r\n")[2]
        return dechunk(rest)[0] if b"transfer-encoding: chunked" in self.head.lower() else rest

    @property
    def complete(self) -> bool:
        """Whether a client would take the response for a whole one."""
        rest = self.data.partition(b"\r\n\r\n")[2]
        if b"transfer-encoding: chunked" in self.head.lower():
            return dechunk(rest)[1]
        length = self.header("content-length")
        return len(rest) >= int(length) if length is not None else self.ended == "fin"

    def header(self, name: str) -> str | None:
        values = self.headers(name)
        return values[0] if values else None

    def headers(self, name: str) -> list[str]:
        lines = (line.partition(b":") for line in self.head.split(b"\r\n")[1:])
        return [value.strip().decode("latin-1") for key, _, value in lines if key.lower() == name.lower().encode()]

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


def dechunk(data: bytes) -> tuple[bytes, bool]:
    """Chunked framing undone: the bytes so far, and whether the last chunk came."""
    out: list[bytes] = []
    while True:
        size, mark, data = data.partition(b"\r\n")
        if not mark:
            return b"".join(out), False
        length = int(size, 16)
        if length == 0:
            return b"".join(out), data.startswith(b"\r\n")
        out.append(data[:length])
        if len(data) < length + 2:
            return b"".join(out), False
        data = data[length + 2 :]


def connect(port: int, *, host: str = "127.0.0.1", rcvbuf: int | None = None, timeout: float = 5) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    if rcvbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    sock.settimeout(timeout)
    try:
        sock.connect((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def send(
    port: int,
    parts: bytes | Iterable[bytes | tuple[bytes, float]],
    *,
    half_close: bool = False,
    timeout: float = 5,
    until_complete: bool = True,
) -> Reply:
    """Sends bytes (with pauses in seconds behind them), reads to the end of one response or of the connection."""
    with connect(port, timeout=timeout) as sock:
        for part in [parts] if isinstance(parts, bytes) else parts:
            data, pause = part if isinstance(part, tuple) else (part, 0.0)
            try:
                sock.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return read(sock, until_complete=until_complete)


def read(sock: socket.socket, *, until_complete: bool = True, seen: bytes = b"") -> Reply:
    """Reads one response (or everything until the peer ends, or nothing comes for the socket's time-out).

    `seen` is what has been read of it already.
    """
    reply = Reply(seen, "open")
    while not (until_complete and _looks_complete(reply)):
        try:
            data = sock.recv(65536)
        except TimeoutError:
            reply.ended = "timeout"
            break
        except ConnectionResetError:
            reply.ended = "rst"
            break
        if not data:
            reply.ended = "fin"
            break
        reply.data += data
    return reply


def _looks_complete(reply: Reply) -> bool:
    if b"\r\n\r\n" not in reply.data:
        return False
    framed = reply.header("content-length") is not None or reply.header("transfer-encoding") is not None
    return reply.status in (204, 304) or (framed and reply.complete)


def exchange(sock: socket.socket, data: bytes) -> Reply:
    """One request and its answer; HEAD's ends with its head, whatever length that tells."""
    sock.sendall(data)
    if not data.startswith(b"HEAD "):
        return read(sock)
    seen = b""
    while not seen.endswith(b"\r\n\r\n"):
        received = sock.recv(65536)
        assert received, seen
        seen += received
    return Reply(seen, "open")


def reset(sock: socket.socket) -> None:
    """Closes with a TCP reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def request(
    target: str | bytes,
    body: Any = None,
    *,
    method: str | None = None,
    key: str | None = "ck-test-4f7d1b0c",
    headers: Iterable[tuple[str | bytes, str | bytes]] = (),
    host: bytes = b"gateway.test",
) -> bytes:
    """The bytes of a request, exactly as given. `body`: bytes, or a value for JSON."""
    raw = target.encode() if isinstance(target, str) else target
    data = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
    verb = method or ("GET" if body is None else "POST")
    lines = [b"%b %b HTTP/1.1" % (verb.encode(), raw), b"Host: " + host]
    if key is not None:
        lines.append(b"Authorization: Bearer " + key.encode())
    given = [(_bytes(name), _bytes(value)) for name, value in headers]
    names = {name.lower() for name, _ in given}
    if body is not None and not isinstance(body, bytes) and b"content-type" not in names:
        lines.append(b"Content-Type: application/json")
    lines += [b"%b: %b" % pair for pair in given]
    if body is not None and not names & {b"content-length", b"transfer-encoding"}:
        lines.append(b"Content-Length: %d" % len(data))
    return b"\r\n".join(lines) + b"\r\n\r\n" + data


def _bytes(value: str | bytes) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else value


@dataclass
class Chat:
    """Bodies that most tests need."""

    model: str = "openai-main/gpt-4.1-mini"
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], **self.extra, **more}
