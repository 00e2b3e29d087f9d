"""One clock for all that can wait too long.

A timer per stream that is moved at every event costs more than the event. So whoever has a deadline notes when it
last moved, and one timer asks everybody a few times a second. Deadlines are met within `TICK`, not to the millisecond.

Invariant: nobody pays for time in which the process itself stood still (a busy machine, a stopped process). A timer
that rings late rings before the sockets are read; so what has arrived meanwhile is read first, then it is looked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

TICK = 0.1
"""Seconds between two looks, and by which one comes so late that the process must have stood still."""


class Watched(Protocol):
    def tick(self, now: float) -> None:
        """`now` is the loop's monotonic time in seconds."""


class Deadlines:
    """Asks everybody who is watched; sleeps while nobody is."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: set[Watched] = set()
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._excused = False

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, who: Watched) -> None:
        self._watched.add(who)
        if self._handle is None:
            self._sleep(self._loop.time())

    def release(self, who: Watched) -> None:
        self._watched.discard(who)

    def _sleep(self, now: float) -> None:
        self._due = now + TICK
        self._handle = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self._excused = not self._excused and now - self._due > TICK  # who is late every time looks every second time
        self._handle = None
        if self._watched:
            self._sleep(now)
        if not self._excused:
            for who in tuple(self._watched):
                who.tick(now)

    def stop(self) -> None:
        self._watched.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, but for time that the process had. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    late: asyncio.TimerHandle | None = None
    async with asyncio.timeout(None) as limit:

        def ring() -> None:
            nonlocal late
            if loop.time() - due > TICK:
                late = loop.call_later(TICK, limit.reschedule, 0.0)
            else:
                limit.reschedule(0.0)

        handle = loop.call_at(due, ring)
        try:
            yield
        finally:
            handle.cancel()
            if late is not None:
                late.cancel()
