"""CPU time by stack.

A POSIX timer stands on each thread's own CPU clock and signals the main thread, where Python runs signal handlers. The
loop's thread is met where it works, because the signal finds it working; a thread that samples would get the
interpreter's lock only when the loop waits, and find it waiting every time. Other threads have a signal of their own:
taking their samples on the loop's signal, or the loop's on theirs, would charge one for another's moment.

The kernel looks at CPU timers at its ticks only (every 4 ms or so). A timer of 10 ms on the loop's thread would pick
among the ticks those before which much CPU time went by, and tell too much of long turns and too little of short ones
(measured: 0.84 where 0.73 was true). So the loop's timer is shorter than any tick, each tick that meets the loop at
work signals, a coin of fixed odds takes HZ of them a second, and the samples share equally what the clock says in all.
What is left: work that is in step with the ticks, as by nothing but timers of whole milliseconds, is met in the same
moment again and again. Other threads are sampled at PERIOD by what their clock says has passed, and so less exactly.

Invariants: the loop's samples add up to its CPU time, less what the handlers cost; once set, the handlers stay, doing
nothing between profiles, because a signal that is still under way would end the process.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from gproxyd.observe.pprof.answers import Unavailable
from gproxyd.observe.pprof.proto import Labels, Profile, ValueType
from gproxyd.observe.pprof.stacks import Capture, Resolver, capture, label, named

HZ = 100
"""Samples per second of CPU time."""

PERIOD = 10**9 // HZ

BELOW_TICK = 10_000
"""Nanoseconds of CPU time after which the loop's timer is due again: at every tick, whatever its length."""

FINE_TICK = 0.002
"""Seconds. Below it (1000 Hz kernels) a signal per tick would cost more than a hundredth, and PERIOD errs little."""

LOOK_EVERY = 0.25
"""Seconds between two looks for threads that have begun."""

SMALLEST = PERIOD // 10
"""A thread's CPU time in nanoseconds that is worth a sample."""

_ON_LOOP = signal.SIGPROF
_ON_THREADS = signal.SIGVTALRM
_COARSE_CLOCK = 6  # CLOCK_MONOTONIC_COARSE, include/uapi/linux/time.h
_SIGEV_THREAD_ID = 4  # include/uapi/asm-generic/siginfo.h
_OWN_NAME = re.compile(r"Task-\d+")


class _Sigevent(ctypes.Structure):
    """sigevent(3type) with SIGEV_THREAD_ID; 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_byte * (64 - ctypes.sizeof(ctypes.c_void_p) - 3 * ctypes.sizeof(ctypes.c_int))),
    )


class _Itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("first_seconds", ctypes.c_long),
        ("first_nanoseconds", ctypes.c_long),
    )


def cpu_clock(thread: int) -> int:
    """The CPU clock of a thread of this process, by its kernel id.

    The kernel's own formula (include/linux/posix-timers_types.h). pthread_getcpuclockid() needs a handle that crashes
    when the thread has ended meanwhile; reading this clock then raises OSError.
    """
    return (~thread << 3) | 6


class _Timer:
    """Signals the main thread whenever a thread has used another `period` ns of CPU time. Raises OSError."""

    def __init__(self, thread: int, number: signal.Signals, period: int) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._id = ctypes.c_void_p()
        event = _Sigevent(signo=number, notify=_SIGEV_THREAD_ID, thread=threading.main_thread().native_id)
        clock = ctypes.c_int(cpu_clock(thread))
        self._check(self._library.timer_create(clock, ctypes.byref(event), ctypes.byref(self._id)))
        every = _Itimerspec(0, period, 0, period)
        self._check(self._library.timer_settime(self._id, 0, ctypes.byref(every), None))

    def _check(self, result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def delete(self) -> None:
        self._library.timer_delete(self._id)


class Sampler:
    """Samples from `start` to `stop`, both on the main thread, where the loop runs."""

    _running: Sampler | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timers: list[_Timer] = []
        self._threads: dict[int, tuple[int, str, int]] = {}  # identity -> (CPU clock, name, its CPU time so far)
        self._foreign: dict[int, int] = {}  # kernel id -> CPU time at the start; in the end what was used since
        self._met: list[tuple[str | None, Capture]] = []  # where the loop was: (task, stack)
        self._met_beside: list[tuple[int, str, Capture]] = []  # other threads: (nanoseconds, thread, stack)
        self._chance = random.Random().random  # noqa: S311 - a coin, not a secret
        tick = time.clock_getres(_COARSE_CLOCK)  # which moves once a tick
        self._period, self._odds = (PERIOD, 1.0) if tick < FINE_TICK else (BELOW_TICK, min(1.0, HZ * tick))
        self._used = 0  # by the loop's thread, in nanoseconds; until the end: its clock at the start
        self.cost = 0
        """Nanoseconds of the main thread's CPU time that the handlers took."""
        self.profile = Profile(
            (ValueType("samples", "count"), ValueType("cpu", "nanoseconds")),
            period_type=ValueType("cpu", "nanoseconds"),
            period=PERIOD,
        )

    def start(self) -> None:
        """Raises Unavailable."""
        if threading.current_thread() is not threading.main_thread():
            raise Unavailable("CPU profiles need an event loop on the process's main thread")
        Sampler._running = self
        for number, handler in ((_ON_LOOP, _loop_worked), (_ON_THREADS, _thread_worked)):
            signal.signal(number, handler)
            signal.siginterrupt(number, False)
        self._foreign = dict(_kernel_threads())
        self._used = time.thread_time_ns()
        try:
            self._timers.append(_Timer(threading.get_native_id(), _ON_LOOP, self._period))
        except (OSError, AttributeError):
            Sampler._running = None
            raise Unavailable("this system has no timers on a thread's CPU clock") from None
        self.adopt(young=False)

    def adopt(self, *, young: bool = True) -> None:
        """Sets a timer on every thread that has none yet. All that a young one has used so far counts."""
        for thread in threading.enumerate():
            if thread.ident in self._threads or thread is threading.main_thread():
                continue
            if thread.ident is None or thread.native_id is None:
                continue
            try:
                clock = cpu_clock(thread.native_id)
                so_far = 0 if young else time.clock_gettime_ns(clock)
                self._timers.append(_Timer(thread.native_id, _ON_THREADS, PERIOD))
            except OSError:
                continue  # it has ended
            self._threads[thread.ident] = (clock, thread.name, so_far)

    def stop(self) -> None:
        Sampler._running = None
        self._used = time.thread_time_ns() - self._used - self.cost
        for timer in self._timers:
            timer.delete()
        self._timers.clear()
        self.profile.close()
        ours = {thread.native_id for thread in threading.enumerate()}
        self._foreign = {
            thread: used - self._foreign.get(thread, 0) for thread, used in _kernel_threads() if thread not in ours
        }

    def loop_worked(self, frame: FrameType | None) -> None:
        """Runs wherever the loop's thread just was."""
        began = time.thread_time_ns()
        if frame is not None and self._chance() < self._odds:
            self._met.append((_task_name(self._loop), capture(frame)))
        self.cost += time.thread_time_ns() - began

    def thread_worked(self) -> None:
        """A thread has worked; which one, its clock tells."""
        began = time.thread_time_ns()
        frames = sys._current_frames()
        for identity, (clock, name, before) in tuple(self._threads.items()):
            try:
                used = time.clock_gettime_ns(clock)
            except OSError:
                del self._threads[identity]
                continue
            if used - before >= SMALLEST and identity in frames:
                self._met_beside.append((used - before, name, capture(frames[identity])))
                self._threads[identity] = (clock, name, used)
        self.cost += time.thread_time_ns() - began

    def finish(self) -> Profile:
        """Everything that was met, put together. Runs in a thread."""
        resolver = Resolver()
        share = self._used // max(1, len(self._met))
        for task, captured in self._met:
            labels: Labels = () if task is None else (("task", label(task)),)
            self.profile.add(resolver.stack(captured), (1, share), (*labels, ("thread", "MainThread")))
        if not self._met and self._used >= SMALLEST:
            self.profile.add((named("(not met)"),), (0, self._used), (("thread", "MainThread"),))
        for nanoseconds, thread, captured in self._met_beside:
            self.profile.add(resolver.stack(captured), (1, nanoseconds), (("thread", label(thread)),))
        for thread_id, used in self._foreign.items():
            if used >= SMALLEST:
                self._add_foreign(thread_id, used)
        total, cost = self._used / 1e6, self.cost / 1e6
        self.profile.comment(
            f"{len(self._met)} samples of the loop in {total:.1f} ms of its CPU time; taking them cost {cost:.1f} ms"
        )
        return self.profile

    def _add_foreign(self, thread: int, used: int) -> None:
        """A thread that Python knows nothing of: how much, not where."""
        try:
            name = Path(f"/proc/self/task/{thread}/comm").read_text("utf-8", "replace").strip()
        except OSError:
            name = ""  # it has ended
        self.profile.add((named("(foreign code)"),), (used // PERIOD or 1, used), (("thread", label(name)),))


def _loop_worked(_: int, frame: FrameType | None) -> None:
    if Sampler._running is not None:
        Sampler._running.loop_worked(frame)


def _thread_worked(_: int, __: FrameType | None) -> None:
    if Sampler._running is not None:
        Sampler._running.thread_worked()


def _task_name(loop: asyncio.AbstractEventLoop) -> str | None:
    """The running task's name, if somebody gave it one, else its coroutine's: numbers would tear equal work apart."""
    task = asyncio.current_task(loop)
    if task is None:
        return None
    name = task.get_name()
    if _OWN_NAME.fullmatch(name):
        name = getattr(task.get_coro(), "__qualname__", "")
    return name


def _kernel_threads() -> Iterator[tuple[int, int]]:
    """(kernel id, CPU time so far in nanoseconds) of every thread of the process."""
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return  # no /proc: only Python's own threads are seen
    for thread in threads:
        try:
            yield thread, time.clock_gettime_ns(cpu_clock(thread))
        except OSError:
            continue


async def take(seconds: int | None) -> Profile:
    """The CPU time of `seconds`. Raises Unavailable."""
    loop = asyncio.get_running_loop()
    sampler = Sampler(loop)
    end = loop.time() + (seconds or 0)
    sampler.start()
    try:
        while (left := end - loop.time()) > 0:
            await asyncio.sleep(min(left, LOOK_EVERY))
            sampler.adopt()
    finally:
        sampler.stop()
    return await asyncio.to_thread(sampler.finish)
