"""Counts by size, filed in heaps, and the quantiles of what was counted lately.

Quantiles come from a histogram whose bounds lie 10 % apart, which puts any value between 0.1 ms and 10,000 s at most
5 % off.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from math import ceil, log
from operator import sub

NOTES = 128
"""Values that wait to be filed."""

# Upper bounds, seconds. Those of GEN_AI_* are what OpenTelemetry's conventions for generative AI metrics prescribe.
DURATION = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TTFT = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
GEN_AI_DURATION = tuple(0.01 * 2**power for power in range(14))
GEN_AI_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
GEN_AI_TOKENS = tuple(4**power for power in range(14))  # ints: comparing them with floats takes twice as long

LOWEST, HIGHEST, _STEP = 1e-4, 1e4, 1.1
_STEPS = range(ceil(log(HIGHEST / LOWEST) / log(_STEP)))
_EXPORTED = {*DURATION, *TTFT, *GEN_AI_DURATION, *GEN_AI_TTFT}
FINE = tuple(sorted({LOWEST * _STEP**step for step in _STEPS} | {HIGHEST} | _EXPORTED))
"""One set of bounds for quantiles and for everything that is exported of times, so that a value is filed once."""


class Histogram:
    """Counts by size. `counts[i]` is how many lay above bounds[i-1] and not above bounds[i]; the last has no bound.

    `total` is their sum: an int as long as all values are (tokens), else a float (seconds).

    `add(value)` only notes a value; notes are filed together, which costs a fraction of filing each at once. Whoever
    adds calls `file` every NOTES values or so; whoever reads gets everything.
    """

    __slots__ = ("_counts", "_notes", "_total", "add", "bounds")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = array("Q", bytes(8 * (len(bounds) + 1)))  # not a list: its size does not depend on the counts
        self._total: float = 0
        self._notes: list[float] = []
        self.add = self._notes.append

    def file(self) -> None:
        notes, counts = self._notes, self._counts
        if notes:
            for slot, times in Counter(map(partial(bisect_left, self.bounds), notes)).items():
                counts[slot] += times
            self._total += sum(notes)
            notes.clear()

    @property
    def counts(self) -> array[int]:
        self.file()
        return self._counts

    @property
    def total(self) -> float:
        self.file()
        return self._total


class Recent:
    """The part of a histogram (over FINE) that has been counted since the last copy but one."""

    __slots__ = ("_histogram", "_newer", "_older")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._older = self._newer = histogram.counts[:]

    def turn(self, *, forget: bool) -> None:
        """Makes a copy; with `forget` all that has been counted so far is old."""
        self._older, self._newer = self._newer, self._histogram.counts[:]
        if forget:
            self._older = self._newer

    def counts(self) -> Iterable[int]:
        return map(sub, self._histogram.counts, self._older)


def quantile(counts: Sequence[int], share: float) -> float | None:
    """The value (seconds) that `share` of the values do not exceed, from counts over FINE; None if there are none."""
    below = list(accumulate(counts))
    if not below[-1]:
        return None
    slot = bisect_left(below, max(1, ceil(share * below[-1])))
    if slot in (0, len(FINE)):
        return LOWEST if slot == 0 else HIGHEST
    low, high = FINE[slot - 1], FINE[slot]
    return 2 * low * high / (low + high)  # as far, in proportion, from the one end as from the other
