"""A queue before an upstream's limits: a short burst waits a little instead of failing.

Invariants: first come, first served: nobody passes those who wait; the queue is bounded in length and every wait in
time; whoever leaves while waiting leaves no trace; whoever would have to wait longer than the queue is patient is told
so at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from gproxyd.errors import Refusal

T = TypeVar("T")

MOST = 64
"""Requests that may wait before one provider."""

LOOK_EVERY = 0.1
"""Seconds between two looks of whoever is first: not everybody who leaves says so."""

PATIENCE = 5.0
"""Seconds that one may wait."""


class Throttle:
    """The queue before one provider.

    `wait_of` reads from the Refusal of one who was not admitted how many seconds it is until another try is worth it;
    0 says: when a running request ends.
    """

    def __init__(self, wait_of: Callable[[Refusal], float], most: int = MOST, patience: float = PATIENCE) -> None:
        self._wait_of = wait_of
        self._most = most
        self._patience = patience
        self._waiting: deque[asyncio.Event] = deque()
        self._refused: Refusal | None = None  # what the first of those who wait was told last

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, admit: Callable[[], T]) -> T | None:
        """A place that is free now; None if others wait for it. Raises the Refusal of `admit`."""
        return None if self._waiting else admit()

    async def get(self, admit: Callable[[], T]) -> T:
        """A place, as soon as one is free. Raises the Refusal that stood in the way last."""
        if not self._waiting:
            try:
                return admit()
            except Refusal as refused:
                if self._wait_of(refused) > self._patience:
                    raise
                self._refused = refused
        if len(self._waiting) >= self._most:
            raise self._told()
        turn = asyncio.Event()
        self._waiting.append(turn)
        try:
            return await self._stand(turn, admit)
        finally:
            self._waiting.remove(turn)
            self.released()

    async def _stand(self, turn: asyncio.Event, admit: Callable[[], T]) -> T:
        now = asyncio.get_running_loop().time
        until = now() + self._patience
        while True:
            left = until - now()
            if self._waiting[0] is turn:
                try:
                    return admit()
                except Refusal as refused:
                    self._refused = refused
                    told = self._wait_of(refused)
                    left = -1.0 if told > left else min(left, told or LOOK_EVERY)
            if left <= 0:
                raise self._told()
            turn.clear()
            try:
                async with asyncio.timeout(left):
                    await turn.wait()
            except TimeoutError:
                pass  # its place may be free by now, else its time is over

    def _told(self) -> Refusal:
        assert self._refused is not None  # nobody waits but behind one who was refused
        return self._refused

    def released(self) -> None:
        """A running request has ended, or one who waited has left: the next one looks."""
        if self._waiting:
            self._waiting[0].set()
