"""Profiles that take a second or more: windows, and the census of a whole heap. Real loops and stalls."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

import gproxyd
from gproxyd.observe.pprof import heap, waits
from gproxyd.observe.pprof.answers import Busy
from gproxyd.observe.pprof.serving import serve
from tests.test_pprof import SECRET, Run, functions, outer, take
from tests.test_pprof_cpu import run as run_program
from tests.test_pprof_proto import Decoded

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture
def run() -> Iterator[Run]:
    """Runs a coroutine on a fresh loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner.run


def test_no_value_of_a_variable_and_no_path_of_this_machine_is_in_any_profile(run: Run) -> None:
    async def look() -> list[bytes]:
        tasks = [asyncio.create_task(outer(SECRET)) for _ in range(3)]
        await asyncio.sleep(0)
        found = [(await serve(name, {"debug": "1"})).body for name in ("goroutine", "heap", "mutex")]
        found += [(await take(name)).raw for name in ("goroutine", "heap", "mutex")]
        asyncio.get_running_loop().call_later(0.1, stand_still, SECRET)
        found.append((await serve("block", {"seconds": "1", "debug": "1"})).body)
        found.append((await serve("heap", {"seconds": "1", "debug": "1"})).body)
        for task in tasks:
            task.cancel()
        return found

    for body in run(look()):
        assert SECRET.encode() not in body
        assert str(Path(gproxyd.__file__).parent.parent).encode() not in body
        assert sys.prefix.encode() not in body and sys.base_prefix.encode() not in body


LATENESS = '''\
"""The longest CPU time between two turns of a loop while a profile is taken, in the state that the daemon serves in."""
import asyncio, gc, json, sys, time
import uvloop
from gproxyd import daemon
from gproxyd.observe.pprof.serving import serve

daemon.settle_memory()
collecting, since = 0.0, 0.0

def collected(phase, info):
    global collecting, since
    if phase == "start": since = time.thread_time()
    else: collecting += time.thread_time() - since

async def innermost(): await asyncio.Event().wait()
async def outer(): await innermost()

class Loop: pass
def garbage():
    for _ in range(10):
        it = Loop(); it.it = it

async def main(what):
    if what == "goroutine":
        kept = [asyncio.create_task(outer()) for _ in range(5000)]
        # A full collection is the collector's own business, and may come at any time.
        gc.callbacks.append(collected)
    else: kept = [[number] for number in range(500_000)]
    await asyncio.sleep(0.05)
    gc.collect()
    longest = 0.0
    async def measure():
        nonlocal longest
        last = time.thread_time() - collecting
        while True:
            if what == "heap": garbage()
            await asyncio.sleep(0)
            now = time.thread_time() - collecting
            longest, last = max(longest, now - last), now
    measuring = asyncio.create_task(measure())
    await asyncio.sleep(0)
    answer = await serve(what, {"debug": "1"})
    await asyncio.sleep(0.05)
    measuring.cancel()
    text = answer.body.decode()
    most = max(int(block.split()[0]) for block in text.split("\\n\\n")[1:])
    print(json.dumps({"longest": longest, "most": most, "incomplete": "incomplete" in text}))
    if what == "goroutine":
        for task in kept: task.cancel()

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main(sys.argv[1]))
'''


@pytest.mark.parametrize(("name", "least"), [("goroutine", 5000), ("heap", 500_000)])
def test_a_picture_of_much_does_not_hold_up_the_loop_for_more_than_twenty_milliseconds(
    tmp_path: Path, name: str, least: int
) -> None:
    told = run_program(LATENESS, tmp_path, name)
    assert told["most"] >= least and not told["incomplete"]
    assert told["longest"] < 0.02, told


# heap


class Planted:
    def __init__(self, text: str) -> None:
        self.text = text


class Liar:
    def __sizeof__(self) -> int:
        raise AssertionError("nobody's code is run")


def census(run: Run) -> dict[str, list[int]]:
    return {stack[0][0]: values for stack, values, _ in run(take("heap")).samples}


def test_the_census_counts_objects_by_type_with_their_sizes(run: Run) -> None:
    kept = [Planted(f"{number:06}") for number in range(1234)]
    found = census(run)
    assert found["tests.test_pprof_windows.Planted"] == [1234, sum(map(sys.getsizeof, kept))]
    assert run(take("heap")).types == [("inuse_objects", "count"), ("inuse_space", "bytes")]


def test_the_census_finds_bytes_which_the_collector_does_not_list(run: Run) -> None:
    before = census(run)["bytes"]
    kept = [bytes(50_000) for _ in range(200)]
    after = census(run)["bytes"]
    assert after[0] - before[0] == pytest.approx(len(kept), abs=100)
    assert after[1] - before[1] == pytest.approx(200 * 50_000, rel=0.05)


FROZEN: list[Planted] = []


def test_the_census_finds_what_start_up_froze(run: Run) -> None:
    FROZEN[:] = [Planted(str(number)) for number in range(321)]
    gc.freeze()
    try:
        assert census(run)["tests.test_pprof_windows.Planted"][0] == 321
        FROZEN.append(Planted("grown after start-up"))
        assert census(run)["tests.test_pprof_windows.Planted"][0] == 322
    finally:
        gc.unfreeze()
        FROZEN.clear()


def test_the_census_runs_no_code_of_the_classes_it_counts(run: Run) -> None:
    kept = [Liar() for _ in range(7)]
    assert census(run)["tests.test_pprof_windows.Liar"][0] == len(kept)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_after_a_census_what_it_was_before_even_if_the_client_left(run: Run, enabled: bool) -> None:
    async def look() -> None:
        await take("heap")
        assert gc.isenabled() is enabled
        taking = asyncio.create_task(serve("heap", {}))
        await asyncio.sleep(0.02)
        assert not gc.isenabled()
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert gc.isenabled() is enabled

    if not enabled:
        gc.disable()
    try:
        run(look())
    finally:
        gc.enable()


def test_a_census_without_end_is_told_as_far_as_it_came(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "LONGEST", 0.0)
    assert "incomplete: there was more than could be counted in time" in run(take("heap")).comments


ALLOCATING = """\
def allocate_and_keep(kept):
    for _ in range(100):
        kept.append(bytearray(10_000))
"""


def test_a_window_tells_what_was_allocated_and_what_is_left_of_it_by_stack(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module as any other: pytest loads its own through a loader that keeps their code to itself.
    (tmp_path / "allocating.py").write_text(ALLOCATING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "allocating", raising=False)
    allocating = importlib.import_module("allocating")

    async def look() -> Decoded:
        loop, kept, gone = asyncio.get_running_loop(), list[bytearray](), list[bytearray]()
        loop.call_later(0.1, allocating.allocate_and_keep, kept)
        loop.call_later(0.1, allocating.allocate_and_keep, gone)
        loop.call_later(0.6, gone.clear)
        profile = await take("heap", seconds="1")
        assert len(kept) == 100 and not gone
        return profile

    profile = run(look())
    assert [kind for kind, _ in profile.types] == ["alloc_objects", "alloc_space", "inuse_objects", "inuse_space"]
    place = ("allocating.allocate_and_keep", "allocating.py", 1, 3)
    found = [values for stack, values, _ in profile.samples if stack[0] == place]
    total = [sum(column) for column in zip(*found, strict=True)]
    assert total[1] == pytest.approx(2_000_000, rel=0.05)
    assert total[3] == pytest.approx(1_000_000, rel=0.05)
    assert not tracemalloc.is_tracing()


def test_a_window_of_a_loop_that_never_rests_ends_in_time_and_does_not_find_itself(run: Run) -> None:
    async def work(kept: list[list[int]]) -> None:
        while True:
            kept.append([len(kept)])
            await asyncio.sleep(0)

    async def look() -> tuple[Decoded, float]:
        working, before = asyncio.create_task(work([])), time.thread_time()
        profile = await take("heap", seconds="1")
        working.cancel()
        return profile, time.thread_time() - before

    profile, used = run(look())
    assert used < 5.0
    assert profile.within("gproxyd.observe.pprof") == 0


def test_a_window_ends_when_the_tracer_needs_too_much(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "MOST_TRACED", 0)
    began = time.monotonic()
    assert "ended early: too much was allocated to keep track of" in run(take("heap", seconds="10")).comments
    assert time.monotonic() - began < 8


def test_a_window_while_somebody_else_traces_is_busy_and_leaves_their_tracing_alone(run: Run) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Busy, match="somebody else"):
            run(serve("heap", {"seconds": "1"}))
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


# block


def stand_still(_: str) -> None:
    time.sleep(0.15)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_stall_is_told_with_its_length_and_where_it_happened(
    factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def look() -> Decoded:
        loop = asyncio.get_running_loop()
        loop.call_later(0.1, stand_still, SECRET)
        loop.call_later(0.4, spin, 0.1)
        return await take("block", seconds="1")

    with asyncio.Runner(loop_factory=factory) as runner:
        profile = runner.run(look())
    assert profile.types == [("contentions", "count"), ("delay", "nanoseconds")]
    for name, seconds in (("stand_still", 0.15), ("spin", 0.1)):
        found = [values for stack, values, _ in profile.samples if functions(stack)[0] == name]
        assert sum(count for count, _ in found) == 1
        # The beat was due some milliseconds after the stall began; a busy machine makes it longer.
        assert seconds - 0.015 < sum(delay for _, delay in found) / 1e9 < seconds + 0.15


def test_a_loop_that_only_waits_has_no_stall_of_its_own(run: Run) -> None:
    profile = run(take("block", seconds="1"))
    assert profile.within("test_pprof_windows") == 0


# mutex


async def waits_for_a_lock() -> None:
    waits.record("windowed", 0.5)


def test_a_window_has_only_its_own_waits_with_the_stack_of_whoever_waited(run: Run) -> None:
    async def look() -> Decoded:
        waits.record("windowed", 7.0)
        taking = asyncio.create_task(take("mutex", seconds="1"))
        await asyncio.sleep(0.1)
        await waits_for_a_lock()
        return await taking

    found = [sample for sample in run(look()).samples if sample[0][0][0] == "windowed"]
    assert [values for _, values, _ in found] == [[1, 500_000_000]]
    assert functions(found[0][0])[1:3] == ["waits_for_a_lock", "look"]


async def asks_for_a_thread(executor: waits.Executor) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.run_in_executor(executor, time.sleep, 0.1) for _ in range(2)))


def test_an_executor_tells_how_long_its_calls_waited_for_a_thread_and_who_asked(run: Run) -> None:
    async def look() -> Decoded:
        with waits.Executor(1, name="test_executor") as executor:
            taking = asyncio.create_task(take("mutex", seconds="1"))
            await asyncio.sleep(0.1)
            await asks_for_a_thread(executor)
            return await taking

    found = [(stack, values) for stack, values, _ in run(look()).samples if stack[0][0] == "test_executor"]
    assert sum(values[0] for _, values in found) == 2
    assert 0.09 < sum(values[1] for _, values in found) / 1e9 < 0.5
    assert all("asks_for_a_thread" in functions(stack) for stack, _ in found)
