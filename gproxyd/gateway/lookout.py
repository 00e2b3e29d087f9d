"""While nothing of a client is read, for back-pressure, the loop cannot tell that it has left; the kernel can."""

from __future__ import annotations

import asyncio
import socket

STUCK = 35.0
"""Seconds for which a client may take nothing of what waits for it: more than a relay allows, whose log knows why."""

LOOK_EVERY = 0.1
"""Seconds between two looks at a client whose bytes are not being read."""

_PEER_LEFT = frozenset({7, 8})  # TCP_CLOSE, TCP_CLOSE_WAIT (include/net/tcp_states.h)


class Lookout:
    """Looks after one client from `begin` to `end`; one that has left has its connection aborted."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def begin(self, transport: asyncio.Transport | None) -> None:
        if self._handle is None and transport is not None:
            self._handle = self._loop.call_later(LOOK_EVERY, self._look, transport)

    def end(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self, transport: asyncio.Transport) -> None:
        self._handle = None
        if _has_left(transport.get_extra_info("socket")):
            transport.abort()
        else:
            self.begin(transport)


class Patience:
    """Waits for a client that takes nothing, from `begin` to `end`; one that never does has its connection aborted."""

    __slots__ = ("_handle", "_loop", "_taken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None
        self._taken: asyncio.Event | None = None

    def begin(self, transport: asyncio.Transport) -> None:
        if self._handle is None:
            self._taken = asyncio.Event()
            self._look(transport, -1, 0.0)

    def end(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._taken is not None:
            self._taken.set()
            self._taken = None

    async def over(self) -> None:
        """Returns at its end, or at once if it has not begun."""
        if self._taken is not None:
            await self._taken.wait()

    def _look(self, transport: asyncio.Transport, before: int, since: float) -> None:
        now, waiting = self._loop.time(), transport.get_write_buffer_size()
        if waiting != before:
            since = now
        if now - since > STUCK:
            transport.abort()
        else:
            self._handle = self._loop.call_later(1.0, self._look, transport, waiting, since)


def _has_left(raw: socket.socket | None) -> bool:
    """Whether the peer has ended its side (tcp(7), TCP_INFO)."""
    if raw is None or raw.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    state: int = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state in _PEER_LEFT
