"""CPU profiles of a loop under uvloop, in a process of its own: a profile needs the main thread, and so does pytest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gproxyd.observe.pprof.cpu import FINE_TICK
from gproxyd.observe.pprof.serving import serve
from tests.support.running import Loop
from tests.test_pprof_proto import Decoded

PROGRAM = '''\
"""A loop that works in short turns; says how much CPU time each of its functions took by the clock."""
import asyncio, hashlib, json, os, random, signal, subprocess, sys, threading, time
import uvloop
from gproxyd.observe.pprof.serving import serve

# What is asked comes from outside, at any moment. Work that only timers of whole milliseconds begin is in step with
# the kernel's ticks, at which samples are taken.
CLIENT = """
import random, socket, sys, time
sock, chance, turn = socket.create_connection(("127.0.0.1", int(sys.argv[1]))), random.Random(1), 0
while True:
    sock.sendall(b"hc"[turn : turn + 1])
    turn ^= 1
    if not sock.recv(1): break
    time.sleep(chance.expovariate(2000))
"""
spent = {"hot": 0.0, "cool": 0.0, "busy": 0.0}
chance = random.Random(1)

def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        json.dumps({"a": list(range(50))})

def timed(name, seconds):
    before = time.thread_time()
    burn(seconds)
    spent[name] += time.thread_time() - before

def hot(): timed("hot", chance.uniform(0.001, 0.005))
def cool(): timed("cool", chance.uniform(0.0005, 0.0015))

def busy(ending):
    block, before = b"x" * 1_000_000, time.thread_time()
    while not ending.is_set():
        hashlib.sha256(block).digest()
        time.sleep(0.003)
    spent["busy"] = time.thread_time() - before

async def requests(reader, writer):
    asyncio.current_task().set_name("the-requests")
    while asked := await reader.read(1):
        hot() if asked == b"h" else cool()
        writer.write(b".")
    writer.close()

async def main(enough, threads, folder):
    loop, terminated, windows = asyncio.get_running_loop(), [], []
    loop.add_signal_handler(signal.SIGTERM, terminated.append, 1)
    server = await asyncio.start_server(requests, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(port)], stderr=subprocess.DEVNULL)
    await asyncio.sleep(0.3)
    ending = threading.Event()
    workers = [threading.Thread(target=busy, args=(ending,), name="busy") for _ in range(threads)]
    for worker in workers: worker.start()
    loop.call_later(0.5, os.kill, os.getpid(), signal.SIGTERM)
    # Windows until the loop has worked enough: how long that takes is the machine's business.
    while sum(window["main"] for window in windows) < enough and len(windows) < 30:
        spent.update(hot=0.0, cool=0.0)
        before = time.thread_time()
        answer = await serve("profile", {"seconds": "1"})
        windows.append({**spent, "main": time.thread_time() - before, "status": answer.status})
        with open(f"{folder}/{len(windows)}", "wb") as file: file.write(answer.body)
    ending.set()
    for worker in workers: worker.join()
    client.terminate()
    client.wait()
    signal.raise_signal(signal.SIGPROF)
    signal.raise_signal(signal.SIGVTALRM)
    await asyncio.sleep(0.05)
    server.close()
    print(json.dumps({"windows": windows, "busy": spent["busy"], "terminated": len(terminated)}))

factory = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}[sys.argv[1]]
with asyncio.Runner(loop_factory=factory) as runner:
    runner.run(main(float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
'''


def run(program: str, folder: Path, *arguments: str) -> dict[str, Any]:
    script = folder / "program.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script), *arguments, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stderr == ""
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def of_loop(profile: Decoded, function: str = "") -> list[int]:
    """[samples, nanoseconds] of the loop's thread that have the function in their stack."""
    found = [
        values
        for stack, values, labels in profile.samples
        if labels["thread"] == "MainThread" and any(function in place[0] for place in stack)
    ]
    return [sum(column) for column in zip(*found, strict=True)] or [0, 0]


@pytest.mark.parametrize(
    ("kind", "threads"),
    [
        ("uvloop", 1),
        pytest.param("uvloop", 0, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("asyncio", 0, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_a_function_gets_the_share_that_the_clock_says_within_ten_points(
    tmp_path: Path, kind: str, threads: int
) -> None:
    told = run(PROGRAM, tmp_path, kind, "4", str(threads))
    windows = told["windows"]
    assert {window["status"] for window in windows} == {200}
    profiles = [Decoded((tmp_path / str(number + 1)).read_bytes()) for number in range(len(windows))]
    total = sum(of_loop(profile)[1] for profile in profiles)
    truth = {name: sum(window[name] for window in windows) for name in ("main", "hot", "cool")}
    # All of the loop's CPU time, by its own clock; the handlers' own is left out.
    assert total == pytest.approx(truth["main"] * 1e9, rel=0.04)
    # At some 400 samples ten points are more than four standard deviations.
    assert sum(of_loop(profile)[0] for profile in profiles) > 250
    for name in ("hot", "cool"):
        share = sum(of_loop(profile, f"program.{name}")[1] for profile in profiles) / total
        assert share == pytest.approx(truth[name] / truth["main"], abs=0.1), name
    if threads:
        beside = sum(profile.within("program.busy") for profile in profiles)
        assert beside == pytest.approx(told["busy"] * 1e9, rel=0.2)


def test_samples_say_thread_task_file_and_line_and_no_path_of_this_machine(tmp_path: Path) -> None:
    told = run(PROGRAM, tmp_path, "uvloop", "0.3", "1")
    profile = Decoded((tmp_path / "1").read_bytes())
    stack, _, labels = next(sample for sample in profile.samples if any("burn" in place[0] for place in sample[0]))
    assert labels == {"task": "the-requests", "thread": "MainThread"}
    names = [place[0] for place in stack]
    assert names.index("program.burn") < names.index("program.timed") < names.index("program.requests")
    assert ("asyncio.runners.Runner.run", "asyncio/runners.py") in [place[:2] for place in stack]
    source = PROGRAM.splitlines()
    for function, file, first, line in stack:
        if file == "program.py" and "<module>" not in function:
            assert f"def {function.rpartition('.')[2]}(" in source[first - 1], (function, first)
            assert first <= line <= len(source)
    busy = [labels for stack, _, labels in profile.samples if any("busy" in place[0] for place in stack)]
    assert busy and all(labels == {"thread": "busy"} for labels in busy)
    assert not [text for text in profile.strings if str(tmp_path) in text or text.startswith("/")]
    assert profile.types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert (profile.period_type, profile.period) == (("cpu", "nanoseconds"), 10_000_000)
    assert profile.duration == pytest.approx(1e9, rel=0.2)
    assert told["terminated"] == 1, "the loop's own signal handlers go on working"


OVERHEAD = '''\
"""CPU time of the same work with and without a profile, turn by turn in changing order; plain twice, as a control."""
import asyncio, json, random, signal, statistics, sys, time
import uvloop
from gproxyd.observe.pprof.cpu import Sampler

async def signals(many, raised):
    before = time.thread_time()
    for _ in range(many):
        if raised: signal.raise_signal(signal.SIGPROF)
        await asyncio.sleep(0)
    return (time.thread_time() - before) / many

async def work(units):
    before = time.thread_time()
    for _ in range(units):
        await asyncio.sleep(0)
        for _ in range(5): json.loads(json.dumps({"a": list(range(50)), "b": "x" * 200}))
    return time.thread_time() - before

async def main():
    loop, cost, samples = asyncio.get_running_loop(), 0, 0
    units = int(0.08 / (await work(2000) / 2000))
    turns = {"plain": [], "control": [], "profiled": []}
    for _ in range(100):
        for name in random.sample(list(turns), 3):
            sampler = Sampler(loop)
            if name == "profiled": sampler.start()
            await work(3)
            turns[name].append(await work(units))
            if name == "profiled":
                sampler.stop()
                cost += sampler.cost / 1e9
                samples += int(sampler.finish().text().splitlines()[1].split()[1])
    def more(name):
        ratios = sorted(it / plain - 1 for it, plain in zip(turns[name], turns["plain"]))[10:-10]
        return [statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5]
    sampler = Sampler(loop)
    sampler.start()
    # All that a signal costs but the kernel's part: the handler, and the loop's being woken by it.
    each = min([await signals(2000, True) - await signals(2000, False) for _ in range(5)])
    sampler.stop()
    told = {"handlers": cost / sum(turns["profiled"]), "samples": samples, "each": each}
    print(json.dumps({"profiled": more("profiled"), "control": more("control"), **told}))

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
'''


@pytest.mark.slow
@pytest.mark.long
def test_a_profile_costs_at_most_a_hundredth_of_the_throughput(tmp_path: Path) -> None:
    told = run(OVERHEAD, tmp_path)
    assert told["samples"] > 300
    assert told["handlers"] < 0.01, told
    # One signal per tick of a loop that never rests. CLOCK_MONOTONIC_COARSE moves once a tick.
    tick = max(time.clock_getres(6), FINE_TICK)
    assert told["each"] / tick < 0.01, told
    # The same from outside, if the machine is quiet enough: then work without a profile costs the same twice.
    (slower, error), (control, _) = told["profiled"], told["control"]
    if error > 0.005 or abs(control) > 0.003:
        pytest.skip(f"too much else runs here to see a hundredth of throughput: {told}")
    assert slower < 0.01 + 3 * error, told


STALLED = '''\
"""A loop that stands still longer than its pipe of signals holds."""
import asyncio, json, sys, time
import uvloop
from gproxyd.observe.pprof.serving import serve

def stands_still():
    end = time.thread_time() + 4.5
    while time.thread_time() < end: pass

async def main():
    asyncio.get_running_loop().call_later(0.1, stands_still)
    answer = await serve("profile", {"seconds": "1"})
    open(sys.argv[1] + "/profile", "wb").write(answer.body)
    print(json.dumps({"status": answer.status}))

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
'''


@pytest.mark.slow
@pytest.mark.long
def test_a_loop_that_stands_still_is_profiled_without_a_word_on_standard_error(tmp_path: Path) -> None:
    assert run(STALLED, tmp_path) == {"status": 200}
    profile = Decoded((tmp_path / "profile").read_bytes())
    assert profile.within("stands_still") == pytest.approx(4.5e9, rel=0.05)


def test_a_loop_beside_the_main_thread_is_answered_501_and_the_next_profile_has_its_turn(loop: Loop) -> None:
    for _ in range(2):
        answer = loop.run(serve("profile", {"seconds": "1"}))
        assert answer.status == 501
        assert b"main thread" in answer.body
