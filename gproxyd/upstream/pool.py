"""Idle connections per origin.

Invariants: a connection is either in the pool or with one exchange; the one used last is used first, because the
others are more likely to have been closed by their peer meanwhile.
"""

from __future__ import annotations

import asyncio

from gproxyd.types import Origin
from gproxyd.upstream.connection import Connection
from gproxyd.upstream.deadlines import Deadlines
from gproxyd.upstream.dial import Dialler

IDLE_LIMIT = 15.0
"""Seconds after which an idle connection is closed: below what vendors' front ends allow."""

MAX_IDLE = 256
"""Idle connections kept per origin."""

_Route = tuple[Origin, Origin | None]


class Pool:
    """Keeps connections between exchanges. Outlives configurations: a reload keeps what is warm."""

    def __init__(self, dialler: Dialler, deadlines: Deadlines, loop: asyncio.AbstractEventLoop) -> None:
        self._dialler = dialler
        self._deadlines = deadlines
        self._loop = loop
        self._idle: dict[_Route, list[Connection]] = {}

    def idle(self, origin: Origin, proxy: Origin | None = None) -> Connection | None:
        """An idle connection, taken out of the pool, or None."""
        waiting = self._idle.get((origin, proxy))
        while waiting:
            connection = waiting.pop()
            if connection.reusable:
                return connection
            connection.abort()
        return None

    async def fresh(self, origin: Origin, proxy: Origin | None, timeout: float) -> Connection:
        """A new connection. Raises UpstreamError."""
        return await self._dialler.dial(origin, proxy, timeout)

    def put_back(self, connection: Connection, origin: Origin, proxy: Origin | None = None) -> None:
        """Takes a connection after an exchange: keeps it if another may follow, else closes it."""
        waiting = self._idle.setdefault((origin, proxy), [])
        if not connection.reusable or len(waiting) >= MAX_IDLE:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        waiting.append(connection)
        self._deadlines.watch(self)

    def tick(self, now: float) -> None:
        """Closes what has been idle too long; the oldest stand first."""
        for route, waiting in tuple(self._idle.items()):
            while waiting and (now - waiting[0].idle_since > IDLE_LIMIT or not waiting[0].open):
                waiting.pop(0).abort()
            if not waiting:
                del self._idle[route]
        if not self._idle:
            self._deadlines.release(self)

    def close(self) -> None:
        for waiting in self._idle.values():
            for connection in waiting:
                connection.abort()
        self._idle.clear()
