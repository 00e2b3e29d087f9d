"""Finished requests as they finish, for those who listen.

Invariants: whoever publishes never waits; what a slow listener has not taken is bounded in number, the oldest goes
first and is counted; a subscription that nobody holds any more is forgotten.
"""

from __future__ import annotations

import asyncio
from collections import deque
from weakref import WeakSet

from gproxyd.errors import Refusal
from gproxyd.types import UsageRecord

BACKLOG = 1000
"""Records that wait for one listener, at most."""

MOST = 32
"""Listeners at once."""


class Feed:
    """Hands every record to all who listen."""

    def __init__(self) -> None:
        self._subscriptions: WeakSet[Subscription] = WeakSet()
        self._closed = False

    def publish(self, record: UsageRecord) -> None:
        """To be called on the loop's thread, once per finished request. Cheap while nobody listens."""
        if self._subscriptions:
            for one in tuple(self._subscriptions):
                one.put(record)

    def subscribe(self) -> Subscription:
        """Everything from now on. Raises Refusal (503) where too many listen."""
        if self._closed or len(self._subscriptions) >= MOST:
            raise Refusal("overloaded", f"{MOST} listeners are the most there can be, or the gateway is stopping")
        made = Subscription(self._subscriptions)
        self._subscriptions.add(made)
        return made

    def close(self) -> None:
        """Ends all subscriptions, so that a gateway which stops waits for none."""
        self._closed = True
        for one in tuple(self._subscriptions):
            one.close()


class Subscription:
    """What one listener has still to take. `closed` when no more will come."""

    def __init__(self, home: WeakSet[Subscription]) -> None:
        self._home = home
        self._waiting: deque[UsageRecord] = deque()
        self._wake = asyncio.Event()
        self._dropped = 0
        self.closed = False

    def put(self, record: UsageRecord) -> None:
        if len(self._waiting) >= BACKLOG:
            self._waiting.popleft()
            self._dropped += 1
        self._waiting.append(record)
        self._wake.set()

    def close(self) -> None:
        self.closed = True
        self._home.discard(self)
        self._wake.set()

    def dropped(self) -> int:
        """How many were lost since this was last asked."""
        count, self._dropped = self._dropped, 0
        return count

    async def next(self, seconds: float) -> UsageRecord | None:
        """The next record; None after so many seconds without one, and when no more will come."""
        if not self._waiting and not self.closed:
            self._wake.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            except TimeoutError:
                return None
        return self._waiting.popleft() if self._waiting else None
