"""Where responses, files and batches live: which ids replies and requests tell, and that homes are found again."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gproxyd.dialects.identity import EVENT_MARK, Named, asked, deleted, made
from gproxyd.store import gathering
from gproxyd.store import homes as store
from gproxyd.store.database import Database
from gproxyd.store.homes import KEEP, Home, Homes
from gproxyd.store.opening import Gate, companion
from gproxyd.wire.operations import Operation, find
from tests.test_store_ledger import Told, run, until

MAIN, OTHER = Home("openai-main", "key-1"), Home("azure-eu")


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def homes(folder: Path, **options: Any) -> AsyncIterator[tuple[Homes, Told]]:
    told = Told()
    database = await Database.open(folder / "gproxyd.db")
    found = Homes(database, told, **options)
    found.start()
    try:
        yield found, told
    finally:
        await found.stop()
        await database.close()


def test_a_home_is_known_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (first, _):
            first.remember("response", "resp_1", MAIN)
            first.remember("file", "file-1", OTHER)
            assert first.known("response", "resp_1") == MAIN
            assert await first.find("file", "file-1") == OTHER
        async with homes(tmp_path) as (second, _):
            assert second.known("response", "resp_1") is None
            assert await second.find("response", "resp_1") == MAIN
            assert second.known("response", "resp_1") == MAIN
            assert await second.find("file", "resp_1") is None
            assert await second.find("response", "resp_2") is None
            assert await second.find("response", "x" * 100_000) is None

    run(work())


def test_what_a_killed_process_had_remembered_is_found_by_the_next(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (one, _):
            one.remember("file", "file-1", MAIN)
            one.remember("response", "resp_1", MAIN)
            await until(lambda: one.queued == 0)
            async with homes(tmp_path) as (other, _):  # the first has not stopped, as little as if it were dead
                assert await other.find("file", "file-1") == MAIN
                assert await other.find("response", "resp_1") == MAIN

    run(work())


def test_a_file_is_written_without_waiting_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "GATHER", 60.0)

    async def work() -> None:
        async with homes(tmp_path) as (found, _):
            found.remember("response", "resp_1", MAIN)
            await asyncio.sleep(0.05)
            assert found.queued == 1
            found.remember("file", "file-1", MAIN)
            await until(lambda: found.queued == 0)

    run(work())


def test_what_is_deleted_is_forgotten_here_and_on_disk(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (found, _):
            for written_between in (False, True):
                found.remember("file", "file-1", MAIN)
                if written_between:
                    await until(lambda: found.queued == 0)
                found.forget("file", "file-1")
                assert found.known("file", "file-1") is None
                assert await found.find("file", "file-1") is None
            await until(lambda: found.queued == 0)
            found.remember("file", "file-2", MAIN)
            found.forget("file", "file-2")
            found.remember("file", "file-2", OTHER)
        async with homes(tmp_path) as (again, _):
            assert await again.find("file", "file-1") is None
            assert await again.find("file", "file-2") == OTHER

    run(work())


def test_what_is_deleted_while_it_is_looked_for_is_not_found(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (found, _):
            found.remember("file", "file-1", MAIN)
        async with homes(tmp_path) as (found, _):
            looking = asyncio.create_task(found.find("file", "file-1"))
            await asyncio.sleep(0)
            found.forget("file", "file-1")
            assert await looking is None
            assert found.known("file", "file-1") is None

    run(work())


def test_what_changes_while_it_is_written_is_written_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (found, _):
            gate = Gate(companion(tmp_path / "gproxyd.db", "-lock"))
            with gate:
                found.remember("file", "file-1", MAIN)
                await asyncio.sleep(0.05)
                found.remember("file", "file-1", OTHER)
            await until(lambda: found.queued == 0)
            gate.close()
        async with homes(tmp_path) as (again, _):
            assert await again.find("file", "file-1") == OTHER

    run(work())


def test_the_first_that_has_a_home_counts_wherever_it_is_known(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (found, _):
            found.remember("file", "on-disk", MAIN)
        async with homes(tmp_path) as (found, _):
            found.remember("file", "in-memory", OTHER)
            assert await found.first([("file", "?"), ("file", "in-memory"), ("file", "on-disk")]) == OTHER
            assert await found.first([("file", "?"), ("file", "on-disk"), ("file", "in-memory")]) == MAIN
            assert await found.first([("file", "?"), ("response", "on-disk")]) is None
            assert await found.first([]) is None
            assert await found.first(("file", f"{n}") for n in range(10_000)) is None

    run(work())


def test_memory_is_bounded_and_the_least_recently_used_goes_to_disk_only(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path, most=100) as (found, _):
            for n in range(1_000):
                found.remember("response", f"resp_{n}", Home(f"p{n}"))
                found.known("response", "resp_0")
            await until(lambda: found.queued == 0)
            assert found.known("response", "resp_0") == Home("p0")
            assert found.known("response", "resp_500") is None
            assert sum(found.known("response", f"resp_{n}") is not None for n in range(1_000)) == 100
            assert [await found.find("response", f"resp_{n}") for n in range(1_000)] == [
                Home(f"p{n}") for n in range(1_000)
            ]
            assert found.written == 1_000

    run(work())


def test_what_is_told_again_is_not_written_again_unless_it_moved(tmp_path: Path) -> None:
    clock = Clock()

    async def work() -> None:
        async with homes(tmp_path, clock=clock) as (found, _):
            for _ in range(50):
                found.remember("response", "resp_1", MAIN)
            await until(lambda: found.written == 1)
            found.remember("response", "resp_1", OTHER)
            await until(lambda: found.written == 2)
            clock.now += 20 * store.DAY
            found.remember("response", "resp_1", OTHER)  # it lives on
            await until(lambda: found.written == 3)
            clock.now += 20 * store.DAY
            assert await found.find("response", "resp_1") == OTHER

    run(work())


def test_homes_are_kept_as_long_as_vendors_keep_the_things(tmp_path: Path) -> None:
    clock = Clock()

    async def work() -> None:
        async with homes(tmp_path, clock=clock) as (found, _):
            for kind in KEEP:
                found.remember(kind, "x", MAIN)
            await until(lambda: found.queued == 0)
            clock.now += 30 * store.DAY + 1
            assert {kind for kind in KEEP if found.known(kind, "x")} == {"file", "conversation", "batch"}
            assert await found.find("response", "x") is None
            assert await found.prune() == 3
            assert await found.prune() == 0
            assert await found.find("file", "x") == MAIN

    run(work())


def test_while_the_database_refuses_nothing_waits_and_later_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "PAUSE", 0.05)

    async def work() -> None:
        async with homes(tmp_path) as (found, told):
            (tmp_path / "gproxyd.db").rename(tmp_path / "away")
            found.remember("file", "file-1", MAIN)
            await until(lambda: "homes_refused" in {event for event, _ in told.lines})
            assert await found.find("file", "file-1") == MAIN
            assert found.queued == 1
            (tmp_path / "away").rename(tmp_path / "gproxyd.db")
            await until(lambda: found.queued == 0)
        async with homes(tmp_path) as (again, _):
            assert await again.find("file", "file-1") == MAIN

    run(work())


def test_what_waits_is_bounded_and_what_is_lost_is_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_WAITING", 10)

    async def work() -> None:
        async with homes(tmp_path) as (found, told):
            for n in range(15):
                found.remember("response", f"resp_{n}", MAIN)
            assert (found.queued, found.dropped) == (10, 5)
            assert found.known("response", "resp_14") == MAIN
            await until(lambda: "homes_dropped" in {event for event, _ in told.lines})

    run(work())


def test_the_file_tells_neither_ids_nor_how_many_of_a_kind(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (found, _):
            found.remember("response", "resp_a_secret_of_some_length", MAIN)

    run(work())
    assert b"resp_a_secret" not in b"".join(path.read_bytes() for path in tmp_path.glob("gproxyd.db*"))
    connection = sqlite3.connect(tmp_path / "gproxyd.db")
    ((id, provider, account, expires_at),) = connection.execute("SELECT * FROM homes").fetchall()
    assert (len(id), provider, account) == (16, "openai-main", "key-1")
    assert expires_at == pytest.approx(time.time() + 30 * store.DAY, abs=60)
    connection.close()


def test_a_hundred_thousand_lookups_do_not_stop_the_loop(tmp_path: Path) -> None:
    async def work() -> None:
        async with homes(tmp_path) as (found, _):
            longest, last = 0.0, time.perf_counter()

            async def beat() -> None:
                nonlocal longest, last
                while True:
                    last = time.perf_counter()
                    await asyncio.sleep(0.001)
                    longest = max(longest, time.perf_counter() - last)

            heart = asyncio.create_task(beat())
            for n in range(2_000):
                found.remember("response", f"resp_{n}", MAIN)
                await found.find("response", f"unknown_{n}")
            heart.cancel()
            assert longest < 0.2

    run(work())


def operation(method: str, path: str) -> Operation:
    methods, _ = find(b"/v1", path.encode())
    return methods[method]


RESPONSES, FILES, BATCHES = (operation("POST", f"/{name}") for name in ("responses", "files", "batches"))
MESSAGES, CHAT = operation("POST", "/messages"), operation("POST", "/chat/completions")

RESPONSE = {"id": "resp_1", "object": "response", "status": "in_progress", "conversation": {"id": "conv_1"}}

REPLIES: list[tuple[Operation, dict[str, Any], list[tuple[str, str]]]] = [
    (RESPONSES, RESPONSE, [("response", "resp_1"), ("conversation", "conv_1")]),
    (RESPONSES, {"type": "response.created", "response": RESPONSE},
     [("response", "resp_1"), ("conversation", "conv_1")]),
    (RESPONSES, {**RESPONSE, "store": False}, []),
    (RESPONSES, {"error": {"message": "no"}}, []),
    (RESPONSES, {"object": "list", "data": [{"type": "message", "id": "msg_1", "role": "user"}]}, []),
    (FILES, {"id": "file-1", "object": "file", "purpose": "batch"}, [("file", "file-1")]),
    (FILES, {"id": "file_1", "type": "file", "filename": "x"}, [("file", "file_1")]),
    (FILES, {"object": "list", "data": [{"id": f"f{n}", "object": "file"} for n in range(3)]},
     [("file", "f0"), ("file", "f1"), ("file", "f2")]),
    (FILES, {"data": [{"id": "file_1", "type": "file"}], "has_more": False}, [("file", "file_1")]),
    (FILES, {"id": "file-1", "object": "file", "deleted": True}, []),
    (FILES, {"id": "batch_1", "object": "batch", "input_file_id": "a"}, []),
    (BATCHES, {"id": "batch_1", "object": "batch", "input_file_id": "a", "output_file_id": "b", "error_file_id": None},
     [("batch", "batch_1"), ("file", "a"), ("file", "b")]),
    (MESSAGES, {"id": "msg_1", "type": "message", "container": {"id": "container_1"}}, [("container", "container_1")]),
    (MESSAGES, {"type": "message_start", "message": {"container": {"id": "c"}}}, [("container", "c")]),
    (CHAT, {"id": "chatcmpl-1", "object": "chat.completion"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("asked_for", "value", "told"), REPLIES, ids=range(len(REPLIES)))
def test_what_a_reply_tells_to_live_with_its_vendor(
    asked_for: Operation, value: dict[str, Any], told: list[tuple[str, str]]
) -> None:
    assert list(made(asked_for, None, value)) == told


CONTENTS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"id": "file-1", "object": "file"}, [("file", "file-1")]),
    ({"id": "file-of-another", "object": "file"}, []),
    ({"object": "list", "data": [{"id": "file-of-another", "object": "file"}]}, []),
    ({"id": "file-1", "object": "batch", "output_file_id": "file-of-another"}, []),
    ({"response": {"id": "resp_of_another", "object": "response"}}, []),
]


@pytest.mark.parametrize(("value", "told"), CONTENTS, ids=range(len(CONTENTS)))
def test_a_file_whose_content_looks_like_a_reply_moves_nothing_of_anybody(
    value: dict[str, Any], told: list[tuple[str, str]]
) -> None:
    assert list(made(operation("GET", "/files/f/content"), b"file-1", value)) == told


def test_the_event_that_tells_the_id_bears_its_mark() -> None:
    assert EVENT_MARK in b'data: {"type":"response.created","response":{"id":"resp_1"}}'


@pytest.mark.parametrize(
    ("asked_for", "value", "told"),
    [
        (FILES, {"id": "file-1", "object": "file", "deleted": True}, [("file", "file-1")]),
        (FILES, {"id": "file_1", "type": "file_deleted"}, [("file", "file_1")]),
        (RESPONSES, {"id": "resp_1", "object": "response.deleted", "deleted": True}, [("response", "resp_1")]),
        (FILES, {"id": "file-1", "object": "file", "deleted": False}, []),
        (CHAT, {"id": "x", "deleted": True}, []),
    ],
)
def test_what_a_deletion_tells(asked_for: Operation, value: dict[str, Any], told: list[tuple[str, str]]) -> None:
    assert list(deleted(asked_for, value)) == told


REQUESTS: list[tuple[Operation, bytes | None, dict[str, Any], list[tuple[str, str]]]] = [
    (operation("GET", "/responses/r"), b"resp_1", {}, [("response", "resp_1")]),
    (operation("GET", "/files/f/content"), b"file-1", {}, [("file", "file-1")]),
    (operation("POST", "/batches/b/cancel"), b"batch_1", {}, [("batch", "batch_1")]),
    (BATCHES, None, {"input_file_id": "file-1", "endpoint": "/v1/chat/completions"}, [("file", "file-1")]),
    (RESPONSES, None, {
        "previous_response_id": "resp_1",
        "input": [{"role": "user", "content": [{"type": "input_file", "file_id": "old"}]},
                  {"role": "user", "content": [{"type": "input_image", "file_id": "new"}, {"type": "input_text"}]}],
        "tools": [{"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["in-tool"]}},
                  {"type": "code_interpreter", "container": "cntr_1"}],
    }, [("response", "resp_1"), ("file", "in-tool"), ("container", "cntr_1"), ("file", "new"), ("file", "old")]),
    (RESPONSES, None, {"input": "hi", "conversation": {"id": "conv_1"}}, [("conversation", "conv_1")]),
    (RESPONSES, None, {"input": "hi", "conversation": "conv_1"}, [("conversation", "conv_1")]),
    (MESSAGES, None, {
        "container": {"id": "container_1", "skills": []},
        "messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "file", "file_id": "f"}}]}],
    }, [("container", "container_1"), ("file", "f")]),
    (CHAT, None, {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
     [("file", "f")]),
    (CHAT, None, {"messages": [{"role": "user", "content": "file_id"}], "previous_response_id": 7}, []),
]  # fmt: skip


@pytest.mark.parametrize(("asked_for", "target", "fields", "told"), REQUESTS, ids=range(len(REQUESTS)))
def test_what_a_request_speaks_of(
    asked_for: Operation, target: bytes | None, fields: dict[str, Any], told: list[tuple[str, str]]
) -> None:
    assert list(asked(asked_for, target, fields)) == told


def test_ids_are_bounded_in_length_and_number() -> None:
    parts = [{"type": "input_file", "file_id": f"f{n}"} for n in range(1_000)]
    assert len(asked(RESPONSES, None, {"input": [{"role": "user", "content": parts}]})) == 64
    assert asked(RESPONSES, b"x" * 257, {"previous_response_id": ""}) == ()
    assert asked(RESPONSES, b"\xff" * 3, {}) == (Named("response", "\N{REPLACEMENT CHARACTER}" * 3),)
    assert len(made(FILES, None, {"data": [{"id": f"{n}", "object": "file"} for n in range(1_000)]})) == 640
