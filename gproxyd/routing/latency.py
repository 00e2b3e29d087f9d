"""How long targets take until their first byte, and which is worth asking first.

Invariants: what is kept is bounded in number and age; a target of which nothing is known is tried, by one request at
a time, so that a newcomer is neither forgotten nor flooded.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from statistics import median
from typing import TypeVar

SAMPLES = 32
"""Times that are kept of a target."""

RECENT = 300.0
"""Seconds after which a time says nothing any more."""

TRY_EVERY = 10.0
"""Seconds between two tries of a target of which nothing is known."""

JITTER = 0.05
"""By what share medians are varied, so that equals share the work."""

MOST = 4096

T = TypeVar("T", bound=Hashable)


class _Times:
    __slots__ = ("tried_at", "values")

    def __init__(self) -> None:
        self.values: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self.tried_at = -TRY_EVERY


class Latencies:
    """Times to the first byte by target. `dice` gives the jitter."""

    def __init__(self, dice: random.Random | None = None) -> None:
        self._dice = dice or random.Random()  # noqa: S311 - nothing secret
        self._known: OrderedDict[Hashable, _Times] = OrderedDict()

    def add(self, target: Hashable, seconds: float, now: float) -> None:
        """A target's first byte came after so many seconds."""
        self._times(target).values.append((now, seconds))

    def median(self, target: Hashable, now: float) -> float | None:
        """Seconds; None if nothing recent is known."""
        times = self._known.get(target)
        if times is None:
            return None
        while times.values and now - times.values[0][0] > RECENT:
            times.values.popleft()
        return median(seconds for _, seconds in times.values) if times.values else None

    def order(self, targets: Sequence[T], now: float) -> list[T]:
        """The targets, the fastest first; before them one that is worth a try, if there is one."""
        scored = [(self._score(target, now), place, target) for place, target in enumerate(targets)]
        scored.sort(key=lambda one: one[:2])
        if scored and scored[0][0] < 0:
            self._times(scored[0][2]).tried_at = now
            # Whoever is not tried this time stands behind those that are known.
            scored[1:] = sorted(
                ((float("inf") if score < 0 else score, place, target) for score, place, target in scored[1:]),
                key=lambda one: one[:2],
            )
        return [target for _, _, target in scored]

    def _score(self, target: Hashable, now: float) -> float:
        typical = self.median(target, now)
        if typical is not None:
            return typical * self._dice.uniform(1 - JITTER, 1 + JITTER)
        times = self._known.get(target)
        return -1.0 if times is None or now - times.tried_at >= TRY_EVERY else float("inf")

    def _times(self, target: Hashable) -> _Times:
        times = self._known.get(target)
        if times is None:
            times = self._known[target] = _Times()
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        return times
