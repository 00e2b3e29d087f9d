"""How late the event loop is.

A timer is set for every half second and notes how long after its time it was called: whatever held up the loop just
then held up every request as well. It is a sample, so a short stall between two timers goes unseen.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from gproxyd.observe.histogram import Histogram

INTERVAL = 0.5
"""Seconds between two timers."""

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class LoopLag:
    """Measures from `start` to `stop`. `last` and `worst` in seconds; `histogram` holds all since the beginning."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.last = 0.0
        self.histogram = Histogram(_BOUNDS)
        # The loop's own time stands still while a callback runs, and uvloop's has steps of a millisecond.
        self._clock = clock
        self._minute: deque[float] = deque(maxlen=round(60 / INTERVAL))
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    @property
    def worst(self) -> float:
        """The longest of the last minute; 0.0 before the first."""
        return max(self._minute, default=0.0)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._handle is None, "it is running"
        self._due = self._clock() + INTERVAL
        self._handle = loop.call_later(INTERVAL, self._look, loop)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.last = max(0.0, self._clock() - self._due)
        self._minute.append(self.last)
        self.histogram.add(self.last)
        self.histogram.file()
        self._handle = None
        self.start(loop)
