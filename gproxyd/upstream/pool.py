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
        self._watching = False

    def waiting(self, origin: Origin, proxy: Origin | None = None) -> list[Connection]:
        """The connections that wait there, the one used last at the end: always the same list."""
        return self._idle.setdefault((origin, proxy), [])

    def idle(self, origin: Origin, proxy: Origin | None = None) -> Connection | None:
        """An idle connection, taken out of the pool, or None."""
        return take(self.waiting(origin, proxy))

    async def fresh(self, origin: Origin, proxy: Origin | None, timeout: float) -> Connection:
        """A new connection. Raises UpstreamError."""
        return await self._dialler.dial(origin, proxy, timeout)

    def put_back(self, connection: Connection, origin: Origin, proxy: Origin | None = None) -> None:
        """Takes a connection after an exchange: keeps it if another may follow, else closes it."""
        self.rest(connection, self.waiting(origin, proxy))

    def rest(self, connection: Connection, waiting: list[Connection]) -> None:
        """The same, by the list of those that wait at its origin."""
        if not connection.reusable or len(waiting) >= MAX_IDLE:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        waiting.append(connection)
        if not self._watching:
            self._watching = True
            self._deadlines.watch(self)

    def tick(self, now: float) -> None:
        """Closes what has been idle too long; the oldest stand first."""
        for waiting in self._idle.values():
            while waiting and (now - waiting[0].idle_since > IDLE_LIMIT or not waiting[0].open):
                waiting.pop(0).abort()
        if not any(self._idle.values()):
            self._watching = False
            self._deadlines.release(self)

    def close(self) -> None:
        for waiting in self._idle.values():
            for connection in waiting:
                connection.abort()
            waiting.clear()


def take(waiting: list[Connection]) -> Connection | None:
    """The connection that was used last of those that wait and are still open."""
    while waiting:
        connection = waiting.pop()
        if connection.open:
            return connection
    return None
