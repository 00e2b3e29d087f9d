"""A writer that gathers: what comes within a moment goes into the database in one transaction.

Invariants: whoever has something to write only says so, and never waits; one write runs at a time; while the database
refuses, everything waits and is tried again; what is lost is counted, and told at most once a minute.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import ClassVar

from gproxyd.store.database import Database
from gproxyd.store.errors import Unavailable
from gproxyd.store.ledger import Alarms, Warn

GATHER = 0.1
"""Seconds for which is gathered what nobody hurries."""

PAUSE = 1.0
"""Seconds between tries while the database refuses."""


class Gatherer(ABC):
    """Whatever queues things and writes them a little later. Its own part is the queue.

    REFUSED, DROPPED  the events that tell that the database refuses, and that something is lost
    written           things that the database got
    dropped           things that are lost
    """

    REFUSED: ClassVar[str]
    DROPPED: ClassVar[str]

    def __init__(self, database: Database, warn: Warn) -> None:
        self._database = database
        self._alarm = Alarms(warn)
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.written = 0
        self.dropped = 0

    @property
    @abstractmethod
    def queued(self) -> int:
        """Things that are not in the database yet."""

    @abstractmethod
    async def _write_waiting(self) -> None:
        """Writes until nothing waits. Raises Unavailable, and then keeps what is not written."""

    def _woken(self, hurried: bool = False) -> None:
        """Something waits; it is written at once if it is in a hurry."""
        self._wake.set()
        if hurried:
            self._hurry.set()

    def start(self) -> None:
        """Begins to write."""
        self._task = asyncio.get_running_loop().create_task(self._write_all())

    async def stop(self, deadline: float = 2.0) -> None:
        """Writes what waits, for `deadline` seconds at most."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        try:
            async with asyncio.timeout(deadline):
                await self._write_waiting()
        except (TimeoutError, Unavailable) as error:
            self.dropped += self.queued
            self._alarm(self.DROPPED, count=self.dropped, error=str(error))

    async def _write_all(self) -> None:
        while True:
            await self._wake.wait()
            await self._gather()
            self._wake.clear()
            self._hurry.clear()
            try:
                await self._write_waiting()
            except Unavailable as error:
                self._alarm(self.REFUSED, error=str(error), queued=self.queued)
                await asyncio.sleep(PAUSE)
                self._wake.set()
            if self.dropped:
                self._alarm(self.DROPPED, count=self.dropped)

    async def _gather(self) -> None:
        try:
            async with asyncio.timeout(GATHER):
                await self._hurry.wait()
        except TimeoutError:
            return
