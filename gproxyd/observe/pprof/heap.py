"""What is on the heap.

Two pictures. The census costs little and tells types: every object that can be reached is counted once. The window
tells stacks: what was allocated while it was open, which makes allocating many times slower meanwhile.

Invariants: of an object only its type and size are looked at, and no Python code of its class is run; the census works
on the loop's thread, so that what it was the last to hold dies where it should, in turns of a few milliseconds; tracing
ends with the window and the collector works again after the census, whatever ends them.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from gproxyd.observe.pprof.answers import Busy
from gproxyd.observe.pprof.proto import Profile, ValueType
from gproxyd.observe.pprof.stacks import Place, Stack, module_of, named, place_of, shorten

TURN = 0.004
"""Seconds that the census works, and then rests, at a time."""

LONGEST = 30.0
"""Seconds after which a census is told as far as it came."""

STEP = 100
"""Objects between two looks at the clock."""

YOUNG = 20_000
"""Objects made since the last collection that are looked at by one more, although the collector rests."""

SHARDS = 1024
"""A power of two."""

FRAMES = 8
"""Frames per stack in a window; each one makes allocating slower."""

LOOKS = 5
"""Looks per window at what is there; each one is kept until the window has ended."""

MOST_TRACED = 64 * 2**20
"""Bytes that the tracer itself may come to need."""

_INUSE = (ValueType("inuse_objects", "count"), ValueType("inuse_space", "bytes"))
_ALLOC = (ValueType("alloc_objects", "count"), ValueType("alloc_space", "bytes"))
_SPACE = ValueType("space", "bytes")


async def take(seconds: int | None) -> Profile:
    """The census, or a window of `seconds`. Raises Busy."""
    return await (census() if seconds is None else window(seconds))


class _Census:
    """Walks from what the collector knows, the modules and the tasks to everything below them.

    The collector alone does not do: it lists neither what start-up made (frozen, see serving.settle_memory) nor strings
    and bytes. Its list is made at one go, as is that of what a container holds; everything else is done bit by bit. An
    object that dies while others are being counted may leave its address to another, which is then missed.
    """

    def __init__(self) -> None:
        self.counts: dict[type, list[int]] = {}
        # Identities, in many sets: one of a million would hold up the loop when it grows, and when it dies.
        self._seen: list[set[int]] = [set() for _ in range(SHARDS)]
        # Lists to go through, the last one first, each from its end; joining them would copy the long ones.
        self._pending: list[list[Any]] = [[sys.modules, asyncio.all_tasks()], gc.get_objects()]
        # What this is made of would be found through the task that runs it, and grow while it is counted.
        for own in (self, self.__dict__, self.counts, self._pending, self._seen, *self._pending, *self._seen):
            self._shard(own).add(id(own))

    def _shard(self, item: object) -> set[int]:
        return self._seen[id(item) >> 6 & (SHARDS - 1)]

    def step(self) -> bool:
        """Counts some objects. Whether any are left."""
        for _ in range(STEP):
            if not self._pending:
                return False
            if not self._pending[-1]:
                self._pending.pop()
                continue
            item = self._pending[-1].pop()
            shard = self._shard(item)
            if id(item) not in shard:
                shard.add(id(item))
                self._count(item)
                self._pending.append(gc.get_referents(item))
        return True

    def release(self) -> bool:
        """Frees some of what it took to count. Whether any is left."""
        if self._seen:
            self._seen.pop()
        return bool(self._seen)

    def _count(self, item: object) -> None:
        kind = type(item)
        # A class may say its size in Python; that is code of somebody else's, and may do anything.
        own = isinstance(kind.__sizeof__, FunctionType)
        size = object.__sizeof__(item) if own else sys.getsizeof(item)
        counted = self.counts.get(kind)
        if counted is None:
            self.counts[kind] = [1, size]
        else:
            counted[0] += 1
            counted[1] += size


async def census() -> Profile:
    """Objects and bytes by type."""
    profile = Profile(_INUSE, period_type=_SPACE)
    with _collector_resting():
        walk = _Census()
        await asyncio.sleep(TURN)  # listing what there is was a turn of its own
        complete = await _in_turns(walk.step, LONGEST)
        profile.close()
        await _in_turns(walk.release, LONGEST)
    if not complete:
        profile.comment("incomplete: there was more than could be counted in time")
    for kind, counted in walk.counts.items():
        profile.add((_type_place(kind),), counted)
    profile.comment(f"objects of start-up that the collector never looks at: {gc.get_freeze_count()}")
    for line in await asyncio.to_thread(_memory):
        profile.comment(line)
    return profile


@contextmanager
def _collector_resting() -> Iterator[None]:
    """The census's lists are young and long: each small collection would go through them, for 25 ms a million.

    What others make meanwhile must not pile up: see `_in_turns`.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


async def _in_turns(step: Callable[[], bool], longest: float) -> bool:
    """Works until nothing is left, in turns that other work fits between. Whether it came to an end in time."""
    end = time.monotonic() + longest
    while time.monotonic() < end:
        turn = time.perf_counter() + TURN
        while step():
            if time.perf_counter() > turn:
                break
        else:
            return True
        await asyncio.sleep(TURN)
        if gc.get_count()[0] > YOUNG:
            gc.collect(0)
            await asyncio.sleep(TURN)
    return False


def _type_place(kind: type) -> Place:
    module, name = kind.__module__, kind.__qualname__
    module = module if isinstance(module, str) else "?"
    return named(str(name)[:200] if module == "builtins" else f"{module}.{name}"[:200], module)


def _memory() -> Iterable[str]:
    """What the kernel says of the process's memory."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    except OSError:
        return  # no /proc, or an older kernel
    for line in lines:
        if line.startswith(("Rss:", "Pss:", "Private_Dirty:", "Swap:")):
            yield " ".join(line.split())


Trace = tuple[tuple[str, int], ...]
"""(file, line), leaf first."""


_HERE = str(Path(__file__).parent) + "/"


async def window(seconds: int) -> Profile:
    """What is allocated within `seconds`, by stack. Raises Busy.

    The tracer forgets what is freed. So `inuse` is what is still there at the end, and `alloc` how much there came to
    be between looks, added up: at least so much was allocated, and what came and went between two looks is not seen.
    """
    if tracemalloc.is_tracing():
        raise Busy("somebody else traces allocations in this process")
    profile = Profile(_ALLOC + _INUSE, period_type=_SPACE)
    looks: list[tracemalloc.Snapshot] = []
    tracemalloc.start(FRAMES)
    try:
        while len(looks) < LOOKS:
            await asyncio.sleep(seconds / LOOKS)
            # Not in a thread, which would wait for its turn and then keep the interpreter's lock all the same.
            looks.append(tracemalloc.take_snapshot())
            if tracemalloc.get_tracemalloc_memory() > MOST_TRACED:
                profile.comment("ended early: too much was allocated to keep track of")
                break
    finally:
        tracemalloc.stop()
    profile.close()
    profile.comment(f"alloc is a lower bound: growth seen in {len(looks)} looks; inuse is what was left of it")
    # Only now: while it is traced, comparing is slow, and what it makes would be found by the next look.
    await asyncio.to_thread(_compare, looks, profile)
    return profile


def _compare(looks: list[tracemalloc.Snapshot], profile: Profile) -> None:
    """Fills the profile; empties the list."""
    there: dict[Trace, tuple[int, int]] = {}
    grown: dict[Trace, tuple[int, int]] = {}
    looks.reverse()
    while looks:
        before, there = there, _add_up(looks.pop())
        for trace, (count, size) in there.items():
            old_count, old_size = before.get(trace, (0, 0))
            counts, sizes = grown.get(trace, (0, 0))
            grown[trace] = (counts + max(0, count - old_count), sizes + max(0, size - old_size))
    functions = _Functions()
    for trace, totals in grown.items():
        profile.add(functions.stack(trace), (*totals, *there.get(trace, (0, 0))))


def _add_up(snapshot: tracemalloc.Snapshot) -> dict[Trace, tuple[int, int]]:
    sums: dict[tracemalloc.Traceback, list[int]] = {}
    for trace in snapshot.traces:
        counted = sums.setdefault(trace.traceback, [0, 0])
        counted[0] += 1
        counted[1] += trace.size
    found: dict[Trace, tuple[int, int]] = {}
    for traceback, (count, size) in sums.items():
        key = tuple((frame.filename, frame.lineno) for frame in reversed(traceback))
        if not any(file.startswith(_HERE) or file == tracemalloc.__file__ for file, _ in key):
            found[key] = (count, size)
    return found


class _Functions:
    """Which function a line belongs to: the tracer keeps files and lines only. Asks the modules' own loaders."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec] = {}
        for module in tuple(sys.modules.values()):
            spec = module.__dict__.get("__spec__") if isinstance(module, ModuleType) else None
            if isinstance(spec, ModuleSpec) and spec.origin is not None:
                self._specs[spec.origin] = spec
        self._lines: dict[str, dict[int, CodeType]] = {}

    def stack(self, trace: Trace) -> Stack:
        return tuple(self._place(file, line) for file, line in trace)

    def _place(self, file: str, line: int) -> Place:
        if file not in self._lines:
            code = self._code(file)
            self._lines[file] = {} if code is None else _lines_of(code)
        code = self._lines[file].get(line)
        if code is not None:
            return place_of(code, line)
        short = shorten(file)
        return Place(f"{module_of(short)}:{line}", short, 0, line)

    def _code(self, file: str) -> CodeType | None:
        spec = self._specs.get(file)
        if spec is None or not isinstance(spec.loader, InspectLoader):
            return None
        try:
            return spec.loader.get_code(spec.name)
        except (ImportError, OSError, SyntaxError):
            return None  # it has gone or changed since it was loaded


def _lines_of(code: CodeType) -> dict[int, CodeType]:
    """Line -> the innermost code that has it."""
    found = {line: code for _, _, line in code.co_lines() if line}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for line, owner in _lines_of(inner).items():
                # A function's first line belongs to whoever defines it, unless it has no other.
                if line not in found or line != inner.co_firstlineno or owner is not inner or _one_line(inner):
                    found[line] = owner
    return found


def _one_line(code: CodeType) -> bool:
    return {line for _, _, line in code.co_lines() if line} == {code.co_firstlineno}
