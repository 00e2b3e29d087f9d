"""When the event loop stood still, and where.

The loop beats every few milliseconds; a thread watches, and while a beat is overdue it looks at where the loop's thread
is. The beat that comes at last tells how late it was, and that delay is charged to where the loop was met most often.

Invariant: nothing is left behind: neither the thread nor the beat outlives the window.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter

from gproxyd.observe.pprof.proto import Profile, ValueType
from gproxyd.observe.pprof.stacks import Capture, Resolver, Stack, capture, named

STALL = 0.02
"""Seconds that a beat may be late."""

BEAT = 0.005
"""Seconds between two beats, and between two looks of the watcher."""

_DELAY = (ValueType("contentions", "count"), ValueType("delay", "nanoseconds"))


class Watch:
    """Watches the loop that it is started on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._number = 0  # of the beat that is awaited
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look, name="pprof-block", daemon=True)
        self._met: list[tuple[int, Capture]] = []  # (number of the overdue beat, where the loop was)
        self._late: dict[int, float] = {}  # number of a beat -> how late it was, in seconds

    def start(self) -> None:
        self._plan()
        self._thread.start()

    def _plan(self) -> None:
        self._number += 1
        self._due = time.monotonic() + BEAT
        self._timer = self._loop.call_later(BEAT, self._beat)

    def _beat(self) -> None:
        late = time.monotonic() - self._due
        if late > STALL:
            self._late[self._number] = late
        self._plan()

    def _look(self) -> None:
        while not self._ending.wait(BEAT):
            number = self._number
            if time.monotonic() - self._due > STALL:
                frame = sys._current_frames().get(self._loop_thread)
                if frame is not None and number == self._number:
                    self._met.append((number, capture(frame)))

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._ending.set()
        await asyncio.to_thread(self._thread.join)

    def fill(self, profile: Profile) -> None:
        resolver = Resolver()
        met: dict[int, Counter[Stack]] = {}
        for number, captured in self._met:
            met.setdefault(number, Counter())[resolver.stack(captured)] += 1
        for number, late in self._late.items():
            stacks = met.get(number)
            # Whoever keeps the interpreter's lock through all of it is met by nobody.
            stack = stacks.most_common(1)[0][0] if stacks else (named("(not seen)"),)
            profile.add(stack, (1, int(late * 1e9)))


async def take(seconds: int | None) -> Profile:
    """Stalls of more than STALL within `seconds`."""
    profile = Profile(_DELAY, period_type=_DELAY[0])
    watch = Watch(asyncio.get_running_loop())
    watch.start()
    try:
        await asyncio.sleep(seconds or 0)
    finally:
        await watch.stop()
    profile.close()
    await asyncio.to_thread(watch.fill, profile)
    return profile
