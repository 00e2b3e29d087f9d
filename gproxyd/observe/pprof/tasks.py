"""Every asyncio task by its await chain, every thread by its stack.

Invariant: the loop waits a few milliseconds at a time, however many tasks there are.
"""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from types import FrameType
from typing import Any

from gproxyd.observe.pprof.proto import Labels, Profile, ValueType
from gproxyd.observe.pprof.stacks import DEPTH, Resolver, capture, capture_frames, label, named

TURN = 0.004
"""Seconds of work before the loop gets another turn."""

_COUNT = ValueType("goroutine", "count")
_OWN_NAME = re.compile(r"Task-\d+")

# What a suspended coroutine, generator or asynchronous generator stands at, and what it waits for.
_FRAME = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED = ("cr_await", "gi_yieldfrom", "ag_await")


async def take(_: int | None) -> Profile:
    """Tasks and threads as they stand."""
    profile = Profile((_COUNT,), period_type=_COUNT)
    resolver = Resolver()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for identity, frame in sys._current_frames().items():
        labels: Labels = (("thread", label(names.get(identity, "?"))),)
        profile.add(resolver.stack(capture(frame)), (1,), labels)
    turn = time.perf_counter() + TURN
    for task in asyncio.all_tasks():
        captured = capture_frames(reversed(tuple(await_chain(task.get_coro()))))
        stack = resolver.stack(captured) or (named("(done, or foreign code)"),)
        profile.add(stack, (1,), _labels(task.get_name()))
        if time.perf_counter() > turn:
            await asyncio.sleep(TURN)
            turn = time.perf_counter() + TURN
    return profile


def _labels(name: str) -> Labels:
    """A task's name, where somebody gave it one: by numbers no two tasks would be alike."""
    return () if _OWN_NAME.fullmatch(name) else (("task", label(name)),)


def await_chain(awaited: Any) -> Iterator[FrameType]:
    """The frames from a task's own coroutine to the innermost one that waits."""
    for _ in range(DEPTH):
        if awaited is None:
            return
        frame = _first(awaited, _FRAME)
        if isinstance(frame, FrameType):
            yield frame
            awaited = _first(awaited, _AWAITED)
        else:
            awaited = _inside(awaited)


def _first(item: Any, names: tuple[str, ...]) -> Any:
    return next((found for name in names if (found := getattr(item, name, None)) is not None), None)


def _inside(wrapper: Any) -> Any:
    """What the interpreter's own awaitables stand for: `async for` and `__await__` make some that do not tell."""
    found = (item for item in gc.get_referents(wrapper) if isinstance(item, Coroutine | Generator | AsyncGenerator))
    return next(found, None)
