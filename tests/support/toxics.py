"""A TCP relay that spoils what passes through it.

    relay = Relay("127.0.0.1", port, toxics=lambda: [Latency("down", after=b"\\r\\n\\r\\n", delay=0.1)])
    await relay.start()

A toxic works in one direction (`up` towards the server, `down` towards the client), on everything behind its mark: so
many bytes, or the first occurrence of some bytes. Without a mark it works from the connection's first moment, before
anything has been sent. Several toxics stand one behind the other.

    Latency     each piece waits
    Bandwidth   so many bytes a second pass
    SlowClose   the connection ends here, and what passes on is only its end, late
    Timeout     nothing passes any more, nothing is read, nobody is told
    ResetPeer   both ends get a reset
    Slicer      pieces of one to seven bytes
    LimitData   so many bytes pass, then both ends get a FIN
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down"]
Mark = bytes | int | None
Pieces = AsyncGenerator[bytes, None]


class Ending(Exception):
    """The connection is over, for both ends: by a reset, or politely."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__("reset" if reset else "fin")
        self.reset = reset


@dataclass(frozen=True)
class Toxic(ABC):
    direction: Direction
    after: Mark = None

    async def run(self, pieces: Pieces, link: Link) -> Pieces:
        """Passes what comes in front of the mark, and gives the rest to `work`."""
        if self.after is None:
            link.begun(self)
            async with aclosing(self.work(pieces, link)) as spoilt:
                async for piece in spoilt:
                    yield piece
            return
        finder = _Finder(self.after)
        async for data in pieces:
            if link.healed:
                yield data
                continue
            before, behind = finder.cut(data)
            if before:
                yield before
            if finder.found:
                link.begun(self)
                async with aclosing(self.work(_chain(behind, pieces), link)) as spoilt:
                    async for piece in spoilt:
                        yield piece
                return

    @abstractmethod
    def work(self, pieces: Pieces, link: Link) -> Pieces:
        """What becomes of the pieces behind the mark."""


@dataclass(frozen=True)
class Latency(Toxic):
    """Seconds, give or take some. Pieces wait side by side: what is far away is not slow."""

    delay: float = 0.1
    jitter: float = 0.03
    seed: int = 0

    async def work(self, pieces: Pieces, link: Link) -> Pieces:
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()

        async def accept() -> None:
            dice = random.Random(self.seed)
            due = 0.0
            try:
                async for piece in pieces:
                    wait = 0.0 if link.healed else self.delay + dice.uniform(-self.jitter, self.jitter)
                    due = max(due, clock() + wait)
                    under_way.put_nowait((due, piece))
            finally:
                under_way.put_nowait(None)

        accepting = asyncio.create_task(accept())
        try:
            while (arrival := await under_way.get()) is not None:
                due, piece = arrival
                await asyncio.sleep(max(0.0, due - clock()))
                yield piece
            await accepting
        finally:
            await _cancel([accepting])


@dataclass(frozen=True)
class Bandwidth(Toxic):
    """`rate` in bytes per second."""

    rate: float = 4096

    async def work(self, pieces: Pieces, link: Link) -> Pieces:
        loop = asyncio.get_running_loop()
        step = max(1, int(self.rate / 50))
        async for piece in pieces:
            due = loop.time()
            for start in range(0, len(piece), step):
                part = piece[start : start + step]
                due += len(part) / self.rate
                if not link.healed:
                    await asyncio.sleep(max(0.0, due - loop.time()))
                yield part


@dataclass(frozen=True)
class SlowClose(Toxic):
    delay: float = 0.1

    async def work(self, pieces: Pieces, link: Link) -> Pieces:
        link.ending = True
        await asyncio.sleep(self.delay)
        raise Ending(reset=False)
        yield b""


@dataclass(frozen=True)
class Timeout(Toxic):
    async def work(self, pieces: Pieces, link: Link) -> Pieces:
        link.ending = True
        link.stuck.add(self.direction)
        await asyncio.get_running_loop().create_future()
        yield b""


@dataclass(frozen=True)
class ResetPeer(Toxic):
    async def work(self, pieces: Pieces, link: Link) -> Pieces:
        raise Ending(reset=True)
        yield b""


@dataclass(frozen=True)
class Slicer(Toxic):
    seed: int = 0

    async def work(self, pieces: Pieces, link: Link) -> Pieces:
        dice = random.Random(self.seed)
        async for piece in pieces:
            rest = piece
            while rest:
                size = len(rest) if link.healed else dice.randint(1, 7)
                yield rest[:size]
                rest = rest[size:]
                await asyncio.sleep(0)


@dataclass(frozen=True)
class LimitData(Toxic):
    count: int = 0

    async def work(self, pieces: Pieces, link: Link) -> Pieces:
        left = self.count
        if left:
            async for piece in pieces:
                if link.healed:
                    yield piece
                    continue
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    break
        if left <= 0:
            raise Ending(reset=False)


class _Finder:
    """Looks for a mark in a stream of pieces."""

    def __init__(self, mark: bytes | int) -> None:
        self._mark = mark
        self._tail = b""
        self._left = mark if isinstance(mark, int) else 0
        self.found = False

    def cut(self, data: bytes) -> tuple[bytes, bytes]:
        """What stands up to the mark and including it, and what stands behind it."""
        if isinstance(self._mark, int):
            end = min(self._left, len(data))
            self._left -= end
            self.found = not self._left
        else:
            window = self._tail + data
            at = window.find(self._mark)
            self.found = at >= 0
            end = at + len(self._mark) - len(self._tail) if self.found else len(data)
            self._tail = window[-len(self._mark) + 1 :] if len(self._mark) > 1 else b""
        return data[:end], data[end:]


async def _chain(first: bytes, rest: Pieces) -> Pieces:
    if first:
        yield first
    async for piece in rest:
        yield piece


class Link:
    """One connection through a relay. `client` and `server` are the sockets towards either end."""

    def __init__(self, relay: Relay, client: socket.socket) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self.client = client
        self.server = socket.socket()
        self.healed = False
        self.ending = False
        self.stuck: set[Direction] = set()

    def begun(self, toxic: Toxic) -> None:
        self._relay.begun_at.append(self._loop.time())

    async def run(self) -> None:
        pumps: list[asyncio.Task[None]] = []
        reset = True
        try:
            await self._join()
            toxics = self._relay.toxics()
            for source, sink, way in ((self.client, self.server, "up"), (self.server, self.client, "down")):
                chosen = [toxic for toxic in toxics if toxic.direction == way]
                pumps.append(self._loop.create_task(self._pump(source, sink, chosen)))
            await asyncio.gather(*pumps)
            reset = False
        except Ending as ending:
            reset = ending.reset
            if not reset:
                await self._stop(pumps)
                await self._end_politely()
        except OSError:
            pass  # an end has gone by a reset; so the other gets one
        finally:
            try:
                await self._stop(pumps)
            finally:
                self._close(reset=reset)

    async def _join(self) -> None:
        self.server.setblocking(False)
        if self._relay.receive_buffer:
            self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._relay.receive_buffer)
        await self._loop.sock_connect(self.server, self._relay.target)
        for end in (self.client, self.server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def _pump(self, source: socket.socket, sink: socket.socket, toxics: Sequence[Toxic]) -> None:
        async with AsyncExitStack() as stack:
            pieces = self._read(source)
            for toxic in toxics:
                pieces = await stack.enter_async_context(aclosing(toxic.run(pieces, self)))
            async for piece in pieces:
                await self._loop.sock_sendall(sink, piece)
        sink.shutdown(socket.SHUT_WR)

    async def _read(self, source: socket.socket) -> Pieces:
        while data := await self._loop.sock_recv(source, 65536):
            yield data

    async def _end_politely(self) -> None:
        """A FIN for both. Unread bytes would make it a reset, so what still comes is taken."""
        for end in (self.client, self.server):
            try:
                end.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # gone already
        for end in (self.client, self.server):
            try:
                while await self._loop.sock_recv(end, 65536):
                    pass
            except OSError:
                pass  # it has had its FIN, and answered with a reset

    def _close(self, *, reset: bool) -> None:
        for end in (self.client, self.server):
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()

    @staticmethod
    async def _stop(pumps: Sequence[asyncio.Task[None]]) -> None:
        for pump in pumps:
            pump.cancel()
        if pumps:
            await asyncio.wait(pumps)
            for pump in pumps:
                _ = pump.cancelled() or pump.exception()


class Relay:
    """Listens on a port of its own and passes connections on to `host:port`, each through toxics of its own.

    open        it accepts
    refused     nobody listens on its port
    black hole  nobody accepts, and the kernel's queue is full: a SYN is never answered

    `begun_at` are the loop's times at which a toxic's mark was passed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        toxics: Callable[[], Sequence[Toxic]] = lambda: (),
        state: Literal["open", "refused", "black hole"] = "open",
        receive_buffer: int | None = None,
    ) -> None:
        self.target = (host, port)
        self.toxics = toxics
        self.receive_buffer = receive_buffer
        self.begun_at: list[float] = []
        self._state = state
        self._fillers: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._accepting: asyncio.Task[None] | None = None
        self.port: int = self._listener.getsockname()[1]

    async def start(self) -> None:
        if self._state == "open":
            self._open()
        elif self._state == "black hole":
            self._listener.listen(0)
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", self.port))
                self._fillers.append(filler)

    def _open(self) -> None:
        self._listener.listen(128)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            client.setblocking(False)
            link = Link(self, client)
            task = self._links[link] = loop.create_task(link.run())
            task.add_done_callback(lambda _, link=link: self._links.pop(link))

    @property
    def stuck(self) -> set[Direction]:
        """The directions in which nothing passes any more, on any connection."""
        return set().union(*(link.stuck for link in self._links))

    @property
    def busy(self) -> bool:
        return bool(self._links)

    async def spoil(self, toxics: Callable[[], Sequence[Toxic]]) -> None:
        """Other toxics, for connections to come; those that exist are ended, and both ends have heard of it."""
        await _cancel(list(self._links.values()))
        await asyncio.sleep(0.02)
        self.toxics = toxics

    async def heal(self) -> None:
        """No more toxics: connections that were to end do so now, the others and all to come are sound."""
        self.toxics = lambda: ()
        for filler in self._fillers:
            filler.close()
        if self._accepting is None:
            self._open()
        doomed = []
        for link, task in self._links.items():
            link.healed = True
            if link.ending:
                doomed.append(task)
        await _cancel(doomed)

    async def close(self) -> None:
        for filler in self._fillers:
            filler.close()
        if self._accepting is not None:
            await _cancel([self._accepting])
        await _cancel(list(self._links.values()))
        self._listener.close()


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
