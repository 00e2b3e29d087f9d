"""How long a loop is busy with one thing."""

from __future__ import annotations

import asyncio
import time

from tests.support.running import Loop


class Turns:
    """The longest turn of a loop while the block runs, in seconds of its thread's own time.

    Not those of the clock, which on a busy machine tell of the neighbours.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._over = False
        self.worst = 0.0

    async def _count(self) -> None:
        before = time.thread_time()
        while not self._over:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.worst, before = max(self.worst, now - before), now

    def __enter__(self) -> Turns:
        self._counting = asyncio.run_coroutine_threadsafe(self._count(), self._loop.loop)
        time.sleep(0.02)
        self.worst = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._counting.result(10)
