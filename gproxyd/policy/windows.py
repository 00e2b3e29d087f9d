"""A sliding window: how much happened in the last so many seconds.

Invariants: what happened is counted for at least `length` seconds, so no stretch of that length ever holds more than
was allowed; it is counted for at most one grain longer, and not at all longer while the allowance is at most FINE.
A window holds at most about 2 x FINE entries, 16 bytes each.

Times come from the caller's monotonic clock, in seconds; one that steps back counts as standing still.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left

FINE = 256
"""Up to this many events are remembered each at its own time; more are put together, in grains of length / FINE."""

_NEVER = math.inf


class Window:
    """Counts of events of the last `length` seconds.

    total   how many, as of the last `expire`
    due     when the oldest leave: from then on `expire` has something to do
    """

    __slots__ = ("_counts", "_gone", "_head", "_since", "_times", "due", "length", "total")

    def __init__(self, length: float) -> None:
        self.length = length
        self.total = 0
        self.due = _NEVER
        self._times = array("d")  # the last time of each entry, rising
        self._counts = array("q")
        self._head = 0  # the oldest entry that still counts
        self._since = 0.0  # the first time of the newest entry
        self._gone = -_NEVER  # the time of the last entry that left

    def expire(self, now: float) -> None:
        """Forgets what happened `length` seconds ago or earlier."""
        times, counts, head, length = self._times, self._counts, self._head, self.length
        end = len(times)
        while head < end and times[head] + length <= now:
            self.total -= counts[head]
            self._gone = times[head]
            head += 1
        if head == end:
            del times[:], counts[:]
            head = 0
            self.due = _NEVER
        else:
            if head > FINE:
                del times[:head], counts[:head]
                head = 0
            self.due = times[head] + length
        self._head = head

    def add(self, now: float, count: int, fine: bool) -> None:
        """Counts events. `fine`: the allowance is at most FINE, so that each may have an entry of its own."""
        if now >= self.due:
            self.expire(now)
        times = self._times
        self.total += count
        if times:
            now = max(now, times[-1])
            if now == times[-1] or (not fine and now - self._since < self.length / FINE):
                times[-1] = now
                self._counts[-1] += count
                if len(times) == self._head + 1:
                    self.due = now + self.length
                return
        else:
            self.due = now + self.length
        self._since = now
        times.append(now)
        self._counts.append(count)

    def give_back(self, at: float) -> None:
        """Takes back one event that was counted at `at`, if it still counts."""
        if at <= self._gone:
            return
        index = bisect_left(self._times, at, self._head)
        if index < len(self._times) and self._counts[index] > 0:
            self._counts[index] -= 1
            self.total -= 1

    def ready(self, most: int) -> float:
        """The time from which on no more than `most` count, if nothing is added; infinity if that never comes."""
        left = self.total
        if left <= most:
            return -_NEVER
        for index in range(self._head, len(self._times)):
            left -= self._counts[index]
            if left <= most:
                return self._times[index] + self.length
        return _NEVER

    def reset(self, now: float) -> float:
        """Seconds until nothing counts any more."""
        return max(0.0, self._times[-1] + self.length - now) if self.total else 0.0

    def saved(self) -> tuple[list[float], list[int]]:
        """Times and counts, oldest first."""
        return self._times[self._head :].tolist(), self._counts[self._head :].tolist()

    def restore(self, times: list[float], counts: list[int], now: float) -> None:
        """Takes over what was saved: `times` on this clock, rising, none later than `now`."""
        self._times, self._counts, self._head = array("d", times), array("q", counts), 0
        self.total = sum(counts)
        self._since = times[-1] if times else 0.0
        self.due = -_NEVER
        self.expire(now)
