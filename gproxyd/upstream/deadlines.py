"""One clock for all that can wait too long.

A timer per stream that is moved at every event costs more than the event. So whoever has a deadline notes when it
last moved, and one timer asks everybody a few times a second. Deadlines are met within `TICK`, not to the millisecond.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

TICK = 0.1
"""Seconds between two looks."""


class Watched(Protocol):
    def tick(self, now: float) -> None:
        """`now` is the loop's monotonic time in seconds."""


class Deadlines:
    """Asks everybody who is watched; sleeps while nobody is."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: set[Watched] = set()
        self._handle: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, who: Watched) -> None:
        self._watched.add(who)
        if self._handle is None:
            self._handle = self._loop.call_later(TICK, self._look)

    def release(self, who: Watched) -> None:
        self._watched.discard(who)

    def _look(self) -> None:
        self._handle = self._loop.call_later(TICK, self._look) if self._watched else None
        now = self._loop.time()
        for who in tuple(self._watched):
            who.tick(now)

    def stop(self) -> None:
        self._watched.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
