"""Profiles of a running loop, as the HTTP layer gets them. Real loops, tasks, threads and stalls."""

from __future__ import annotations

import ast
import asyncio
import html.parser
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

import gproxyd
from gproxyd.observe.pprof import stacks, waits
from gproxyd.observe.pprof.answers import Answer, Busy
from gproxyd.observe.pprof.serving import KINDS, serve
from tests.test_pprof_proto import Decoded

SECRET = "sk-canary-5e1f09"

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine on a fresh loop of each kind."""
    factory = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}[request.param]
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run


async def take(path: str, **query: str) -> Decoded:
    answer = await serve(path, query)
    assert (answer.status, answer.content_type) == (200, "application/octet-stream"), answer
    return Decoded(answer.body)


def functions(stack: list[tuple[str, str, int, int]]) -> list[str]:
    return [place[0].rpartition(".")[2] for place in stack]


# The index, parameters, refusals


class Links(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name == "href"]


def test_the_index_links_every_profile_binary_and_as_text(run: Run) -> None:
    answer = run(serve("", {}))
    assert (answer.status, answer.content_type) == (200, "text/html; charset=utf-8")
    expected = [link for name in KINDS for link in (name, f"{name}?debug=1")]
    assert Links(answer.body.decode()).found == [*expected, "cmdline"]
    assert set(KINDS) == {"profile", "heap", "goroutine", "block", "mutex"}


def test_the_command_line_is_told_as_its_words(run: Run) -> None:
    answer = run(serve("cmdline", {}))
    assert answer.content_type.startswith("text/plain")
    assert answer.body.decode().split("\0") == sys.orig_argv


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("profile", {"seconds": "0"}),
        ("profile", {"seconds": "121"}),
        ("profile", {"seconds": "-1"}),
        ("profile", {"seconds": "1.5"}),
        ("profile", {"seconds": ""}),
        ("profile", {"seconds": "٣"}),
        ("profile", {"seconds": SECRET}),
        ("heap", {"seconds": "31"}),
        ("block", {"seconds": "9999999"}),
        ("goroutine", {"seconds": "1"}),
        ("goroutine", {"debug": "yes"}),
        ("mutex", {"debug": SECRET}),
    ],
)
def test_a_bad_parameter_is_answered_400_with_a_sentence_that_does_not_quote_it(
    run: Run, path: str, query: dict[str, str]
) -> None:
    answer = run(serve(path, query))
    assert (answer.status, answer.content_type) == (400, "text/plain; charset=utf-8")
    assert answer.headers["X-Go-Pprof"] == "1", "or go tool pprof does not show the sentence"
    assert answer.body.endswith(b".\n")
    assert SECRET.encode() not in answer.body


@pytest.mark.parametrize("path", ["nothing", "profile/", "../heap", "Heap", "cmdline/x", SECRET])
def test_an_unknown_profile_is_answered_404(run: Run, path: str) -> None:
    answer = run(serve(path, {}))
    assert answer.status == 404
    assert SECRET.encode() not in answer.body


def test_other_parameters_are_ignored_as_a_key_may_stand_among_them(run: Run) -> None:
    assert run(serve("goroutine", {"key": SECRET})).status == 200


@pytest.mark.parametrize("name", ["heap", "goroutine", "mutex"])
def test_every_profile_is_text_with_debug_and_never_kept_by_a_cache(run: Run, name: str) -> None:
    answer: Answer = run(serve(name, {"debug": "1"}))
    assert (answer.status, answer.content_type) == (200, "text/plain; charset=utf-8")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "/" in answer.body.decode().splitlines()[0], "the sample types"


# One at a time


def test_a_second_profile_is_busy_and_names_the_first_and_the_next_one_after_it_is_not(run: Run) -> None:
    async def both() -> None:
        taking = asyncio.create_task(serve("mutex", {"seconds": "1"}))
        await asyncio.sleep(0.05)
        for name in KINDS:
            with pytest.raises(Busy, match="one profile at a time: mutex"):
                await serve(name, {})
        assert (await serve("", {})).status == (await serve("cmdline", {})).status == 200
        assert (await taking).status == 200
        assert (await serve("goroutine", {})).status == 200

    run(both())


@pytest.mark.parametrize("name", ["heap", "block", "mutex"])
def test_a_client_that_leaves_ends_its_profile_and_leaves_nothing_behind(run: Run, name: str) -> None:
    async def leave() -> None:
        taking = asyncio.create_task(serve(name, {"seconds": "30"}))
        await asyncio.sleep(0.1)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert not tracemalloc.is_tracing()
        assert not waits.WAITS.watched
        assert "pprof-block" not in [thread.name for thread in threading.enumerate()]
        assert (await serve("goroutine", {})).status == 200

    run(leave())


# goroutine


async def innermost() -> None:
    await asyncio.Event().wait()


async def middle(_: str) -> None:
    await innermost()


async def outer(secret: str) -> None:
    hidden = secret + "-local"
    await middle(hidden)


async def numbers() -> AsyncIterator[int]:
    yield 1
    await innermost()


async def through_a_generator() -> None:
    async for _ in numbers():
        continue


class Awaitable:
    def __await__(self) -> Iterator[Any]:
        return innermost().__await__()


async def through_an_awaitable() -> None:
    await Awaitable()


@pytest.mark.parametrize(
    ("work", "chain"),
    [
        (lambda: outer(SECRET), ["wait", "innermost", "middle", "outer"]),
        (through_a_generator, ["wait", "innermost", "numbers", "through_a_generator"]),
        (through_an_awaitable, ["wait", "innermost", "through_an_awaitable"]),
    ],
)
def test_a_task_is_shown_by_its_await_chain_leaf_first(run: Run, work: Callable[[], Any], chain: list[str]) -> None:
    async def look() -> Decoded:
        tasks = [asyncio.create_task(work()) for _ in range(3)]
        await asyncio.sleep(0.01)
        profile = await take("goroutine")
        for task in tasks:
            task.cancel()
        return profile

    profile = run(look())
    assert profile.types == [("goroutine", "count")]
    assert [values for stack, values, _ in profile.samples if functions(stack) == chain] == [[3]]


def test_a_task_that_was_named_says_so_and_threads_do(run: Run) -> None:
    async def look() -> Decoded:
        ending = threading.Event()
        thread = threading.Thread(target=ending.wait, name="a-thread")
        thread.start()
        task = asyncio.create_task(outer(SECRET), name="a-task")
        await asyncio.sleep(0.01)
        profile = await take("goroutine")
        ending.set()
        thread.join()
        task.cancel()
        return profile

    profile = run(look())
    labels = [labels for _, _, labels in profile.samples]
    assert {"task": "a-task"} in labels
    assert {"thread": "a-thread"} in labels
    assert {"thread": "MainThread"} in labels


# mutex


def test_waits_are_added_up_by_name_since_the_process_began(run: Run) -> None:
    before = waits.WAITS.totals().get("test_lock", (0, 0))
    for _ in range(3):
        waits.record("test_lock", 0.25)
    assert waits.WAITS.totals()["test_lock"] == (before[0] + 3, before[1] + 750_000_000)
    profile = run(take("mutex"))
    found = [values for stack, values, _ in profile.samples if [place[0] for place in stack] == ["test_lock"]]
    assert found == [list(waits.WAITS.totals()["test_lock"])]


def test_an_executor_is_otherwise_one(run: Run) -> None:
    async def look() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(waits.Executor(2))
        assert await asyncio.to_thread(int, "12", base=8) == 10
        with pytest.raises(ValueError, match="invalid literal"):
            await asyncio.to_thread(int, "x")

    run(look())


def test_names_made_of_data_do_not_grow_the_registry_without_end() -> None:
    registry = waits.Waits()
    for number in range(waits.MAX_NAMES * 2):
        registry.record(f"name-{number}", 0.001)
    assert len(registry.totals()) == waits.MAX_NAMES + 1
    assert registry.totals()["other"] == (waits.MAX_NAMES, waits.MAX_NAMES * 1_000_000)


def test_recording_from_many_threads_loses_nothing() -> None:
    registry = waits.Waits()

    def record() -> None:
        for _ in range(5000):
            registry.record("shared", 1e-9)

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.totals() == {"shared": (20_000, 20_000)}


# stacks


@pytest.mark.parametrize(
    ("file", "short", "module"),
    [
        (stacks.__file__, "gproxyd/observe/pprof/stacks.py", "gproxyd.observe.pprof.stacks"),
        (gproxyd.__file__, "gproxyd/__init__.py", "gproxyd"),
        (asyncio.__file__, "asyncio/__init__.py", "asyncio"),
        (pytest.__file__, "pytest/__init__.py", "pytest"),
        ("/home/somebody/secret-project/run.py", "run.py", "run"),
        ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap>", "importlib._bootstrap"),
        ("<string>", "<string>", "string"),
    ],
)
def test_files_are_named_from_where_they_are_imported(file: str, short: str, module: str) -> None:
    assert stacks.shorten(file) == short
    assert stacks.module_of(short) == module


def test_lines_are_those_of_the_frame_and_a_deep_stack_is_cut_at_its_root() -> None:
    def deep(left: int) -> stacks.Capture:
        return deep(left - 1) if left else stacks.capture(sys._getframe())

    stack = stacks.Resolver().stack(deep(500))
    assert len(stack) == stacks.DEPTH
    line = deep.__code__.co_firstlineno + 1
    name = "tests.test_pprof.test_lines_are_those_of_the_frame_and_a_deep_stack_is_cut_at_its_root.<locals>.deep"
    assert set(stack) == {stacks.Place(name, "tests/test_pprof.py", line - 1, line)}


def test_no_room_of_it_reads_a_frames_variables() -> None:
    for path in Path(stacks.__file__).parent.glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"f_locals", "f_globals", "cr_locals", "co_consts"} - (
            {"co_consts"} if path.name == "heap.py" else set()
        ), path.name
