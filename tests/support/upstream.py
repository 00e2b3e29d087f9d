"""An upstream that does exactly what a script says, byte for byte, and remembers what it got.

A script is a list of steps for each connection (or request): bytes to send, `Pause(seconds)`, `Fin()`, `Reset()`,
`Stall()` (keep open until the peer leaves). By default a request is read to its end before its script runs.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from httptools import HttpRequestParser

from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk, json_reply  # noqa: F401 - what scripts are made of
from tests.support.running import Loop


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class Fin:
    """Close with a FIN."""


@dataclass(frozen=True)
class Reset:
    """Close with a TCP reset."""


@dataclass(frozen=True)
class Stall:
    """Keep the connection open and silent until the peer leaves."""


Step = bytes | Pause | Fin | Reset | Stall
Script = list[Step]


@dataclass
class Got:
    """One request as it arrived: raw head, parsed parts, body."""

    raw_head: bytes = b""
    method: str = ""
    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    body_bytes: int = 0
    complete: bool = False
    connection: int = 0

    def header(self, name: str) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name.lower().encode()]


class Upstream:
    """A scripted server. `requests` in order of arrival; `left_at` when a peer left, in monotonic seconds."""

    def __init__(self, loop: Loop, script: Script | Callable[[Got], Script], *, on_head: bool = False) -> None:
        self._loop = loop
        self._script = script
        self._on_head = on_head
        self.requests: list[Got] = []
        self.connections = 0
        self.left_at: list[float] = []
        self.peer_left = threading.Event()
        self.url = ""
        self.port = 0

    def start(self, host: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None) -> Upstream:
        async def start() -> asyncio.Server:
            return await asyncio.get_running_loop().create_server(lambda: _Peer(self), host, 0, ssl=tls)

        server = self._loop.run(start())
        self.port = server.sockets[0].getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{name}:{self.port}"
        self._loop.at_end(lambda: self._loop.loop.call_soon_threadsafe(server.close))
        return self

    def steps(self, got: Got) -> Script:
        return list(self._script(got)) if callable(self._script) else list(self._script)


class _Peer(asyncio.Protocol):
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._task: asyncio.Task[None] | None = None
        self._queue: asyncio.Queue[Got] = asyncio.Queue()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._upstream.connections += 1
        self._number = self._upstream.connections
        self._parser = HttpRequestParser(self)
        self._task = asyncio.get_running_loop().create_task(self._play())

    def data_received(self, data: bytes) -> None:
        self._data = data
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._got = Got(connection=self._number, raw_head=self._data.partition(b"\r\n\r\n")[0])

    def on_url(self, url: bytes) -> None:
        self._got.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._got.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._got.method = self._parser.get_method().decode()
        self._upstream.requests.append(self._got)
        if self._upstream._on_head:
            self._queue.put_nowait(self._got)

    def on_body(self, data: bytes) -> None:
        self._got.body_bytes += len(data)
        if self._got.body_bytes <= 16 * 1024 * 1024:
            self._got.body += data

    def on_message_complete(self) -> None:
        self._got.complete = True
        if not self._upstream._on_head:
            self._queue.put_nowait(self._got)

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.left_at.append(time.monotonic())
        self._upstream.peer_left.set()
        if self._task is not None:
            self._task.cancel()

    async def _play(self) -> None:
        while True:
            got = await self._queue.get()
            for step in self._upstream.steps(got):
                if not await self._step(step):
                    return

    async def _step(self, step: Step) -> bool:
        if isinstance(step, bytes):
            self._transport.write(step)
        elif isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
        elif isinstance(step, Stall):
            await asyncio.get_running_loop().create_future()
        elif isinstance(step, Fin):
            self._transport.close()
            return False
        else:
            raw = self._transport.get_extra_info("socket")
            await asyncio.sleep(0.02)  # what was written before must be on its way
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
            return False
        return True
