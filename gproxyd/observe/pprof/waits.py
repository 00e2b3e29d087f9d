"""Waits for locks, pools, queues and executors. CPython has no hook for them, so whoever waited says so:

    waits.record("upstream_pool", seconds)

Invariants: recording is cheap enough to be always on, and may be done from any thread; names are words of the code, a
bounded number of them; stacks are kept only while a window is open.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

from gproxyd.observe.pprof.proto import Profile, ValueType
from gproxyd.observe.pprof.stacks import Capture, Resolver, capture, named

MAX_NAMES = 256
"""More names than the code has words for mean that one was made of data; they are counted as `other`."""

MAX_STACKS = 100_000
"""Waits in one window whose stacks are kept; the others count by name."""

P = ParamSpec("P")
T = TypeVar("T")

_DELAY = (ValueType("contentions", "count"), ValueType("delay", "nanoseconds"))


class _Wait(NamedTuple):
    name: str
    nanoseconds: int
    where: Capture | None


class Waits:
    """Counts and nanoseconds by name, since the process began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, list[int]] = {}
        self._window: list[_Wait] | None = None

    def record(self, name: str, seconds: float, where: Capture | None = None) -> None:
        """A wait that is over. `where` is whose wait it was, if that is not the caller's stack."""
        nanoseconds = max(0, int(seconds * 1e9))
        with self._lock:
            total = self._totals.get(name)
            if total is None:
                name = name if len(self._totals) < MAX_NAMES else "other"
                total = self._totals.setdefault(name, [0, 0])
            total[0] += 1
            total[1] += nanoseconds
            if self._window is not None:
                if where is None and len(self._window) < MAX_STACKS:
                    where = capture(sys._getframe(1))
                self._window.append(_Wait(name, nanoseconds, where))

    @property
    def watched(self) -> bool:
        """Whether a window is open, so that stacks are worth keeping."""
        return self._window is not None

    def totals(self) -> dict[str, tuple[int, int]]:
        """Name -> (waits, nanoseconds)."""
        with self._lock:
            return {name: (count, nanoseconds) for name, (count, nanoseconds) in self._totals.items()}

    def open(self) -> None:
        self._window = []

    def close(self) -> list[_Wait]:
        with self._lock:
            window, self._window = self._window, None
        return window or []


WAITS = Waits()
"""The process's."""

record = WAITS.record


class Executor(ThreadPoolExecutor):
    """Threads whose queue is told of: how long each call waited for one of them, as `name`."""

    def __init__(self, max_workers: int | None = None, *, name: str = "executor") -> None:
        super().__init__(max_workers, thread_name_prefix=name)
        self._name = name

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        where = capture(sys._getframe(1)) if WAITS.watched else None
        return super().submit(self._run, time.perf_counter(), where, fn, args, kwargs)

    def _run(self, since: float, where: Capture | None, fn: Callable[..., T], args: Any, kwargs: dict[str, Any]) -> T:
        WAITS.record(self._name, time.perf_counter() - since, where)
        return fn(*args, **kwargs)


async def take(seconds: int | None) -> Profile:
    """All waits since the process began, by name; or those that end within `seconds`, by stack."""
    profile = Profile(_DELAY, period_type=_DELAY[0])
    if seconds is None:
        profile.comment("since the process began")
        for name, totals in WAITS.totals().items():
            profile.add((named(name),), totals)
        return profile
    WAITS.open()
    try:
        await asyncio.sleep(seconds)
    finally:
        met = WAITS.close()
    profile.close()
    await asyncio.to_thread(_fill, profile, met)
    return profile


def _fill(profile: Profile, met: list[_Wait]) -> None:
    resolver = Resolver()
    for wait in met:
        stack = resolver.stack(wait.where) if wait.where is not None else ()
        profile.add((named(wait.name), *stack), (1, wait.nanoseconds))
