"""The ledger: one record per request, never lost, never twice, never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pytest
import uvloop

from gproxyd.store import booking, opening, reports, schema
from gproxyd.store import ledger as ledgers
from gproxyd.store.database import Database
from gproxyd.store.ledger import Ledger
from gproxyd.store.schema import FIELDS
from gproxyd.store.spool import Spool
from gproxyd.types import UsageRecord

T = TypeVar("T")

NOON = 1_800_014_400.0
"""2027-01-15 12:00 UTC."""

_numbers = itertools.count()

RECORD = UsageRecord(
    id="",
    at=NOON,
    request_id="req_1",
    user="alice",
    key="laptop",
    endpoint="POST /v1/chat/completions",
    form="aggregated",
    dialect="openai_chat",
    provider="openai-main",
    model="gpt-4.1-mini",
    requested_model="chat-default",
    input_tokens=100,
    output_tokens=10,
    cache_read_tokens=50,
    cache_write_tokens=None,
    cache_write_1h_tokens=None,
    reasoning_tokens=None,
    cost_nanousd=56_000,
    provenance="measured",
    status=200,
    stream=True,
    attempts=1,
    ttft_ms=120.5,
    duration_ms=800.25,
    client_gone=False,
)


def record(**changes: Any) -> UsageRecord:
    """A record with an id of its own."""
    return RECORD._replace(**{"id": f"id-{next(_numbers)}", **changes})


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


class Told:
    """What the store had to say."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    def count(self, event: str) -> int:
        return sum(told == event for told, _ in self.lines)


@dataclasses.dataclass
class Store:
    database: Database
    ledger: Ledger
    told: Told
    folder: Path

    async def all_ids(self) -> list[str]:
        return [one for (one,) in await self.database.read("SELECT id FROM usage ORDER BY seq")]

    async def requests(self) -> int:
        """As the totals count them."""
        return int((await self.database.read("SELECT coalesce(sum(requests), 0) FROM totals"))[0][0])

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "spool").iterdir())


@asynccontextmanager
async def store(folder: Path) -> AsyncIterator[Store]:
    """A database and a ledger at work in a folder."""
    told = Told()
    database = await Database.open(folder / "gproxyd.db")
    ledger = Ledger(database, folder / "spool", told)
    await ledger.start()
    here = Store(database, ledger, told, folder)
    try:
        yield here
    finally:
        await ledger.stop()
        await here.database.close()


async def until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.005)


def abandon(ledger: Ledger) -> None:
    """What a kill leaves: files, and locks that are let go of."""
    assert ledger._task is not None
    ledger._stopping.set()
    ledger._task.cancel()
    for owner in {id(one.owner): one.owner for one in ledger._spool.segments}.values():
        os.close(owner.descriptor)
    os.close(ledger._spool._descriptor)


def left_over(folder: Path, lines: list[bytes], name: str = "usage-00000000000000000001-1") -> Path:
    """The files of a process that is dead."""
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    (spool / f"{name}.lock").touch()
    segment = spool / f"{name}.000000"
    segment.write_bytes(b"".join(lines))
    return segment


def line(one: UsageRecord) -> bytes:
    return orjson.dumps(tuple(one)) + b"\n"


def test_a_record_is_in_the_database_within_a_fifth_of_a_second(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            booked = record()
            begun = time.monotonic()
            here.ledger.book(booked)
            await until(lambda: here.ledger.written == 1)
            assert time.monotonic() - begun < 0.2 + 0.3  # the machine's own share
            assert await reports.usage(here.database) == ([booked], None)
            assert here.ledger.queued == 0

    run(work())


def test_the_fields_of_a_line_only_ever_grow_at_the_end() -> None:
    """A spool file may be read by another version than the one that wrote it."""
    assert (
        *("id", "at", "request_id", "user", "key", "endpoint", "form", "dialect", "provider", "model"),
        *("requested_model", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens"),
        *("cache_write_1h_tokens", "reasoning_tokens", "cost_nanousd", "provenance", "status", "stream"),
        *("attempts", "ttft_ms", "duration_ms", "client_gone"),
    ) == FIELDS


def test_both_ways_to_add_up_come_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(7)

    def some(most: int) -> int | None:
        return dice.choice((None, 0, dice.randrange(most)))

    def any_record() -> Any:
        return record(
            user=dice.choice((None, "", "ann", "bob")),
            key=dice.choice((None, "main")),
            provider=dice.choice((None, "up")),
            model=dice.choice((None, "m", "n")),
            status=dice.choice((200, 200, 399, 400, 502)),
            at=NOON + dice.random() * 3600,
            **{name: some(10**6) for name in (*schema.TOKENS, "cost_nanousd")},
        )

    lines = [orjson.dumps(any_record()[:]) for _ in range(400)]
    lines[200:200] = [lines[0], b"torn", lines[3]]
    found = []
    for sums in (booking._sums, lambda rows: None):
        monkeypatch.setattr(booking, "_sums", sums)
        connection = sqlite3.connect(tmp_path / f"{len(found)}.db", isolation_level=None)
        with contextlib.closing(connection):
            schema.migrate(connection)
            told = [booking.book_lines(connection, lines[at : at + 50]) for at in range(0, len(lines), 50)]
            found.append((told, connection.execute("SELECT * FROM totals ORDER BY 1, 2, 3, 4, 5").fetchall()))
    assert found[0] == found[1]
    assert len(found[0][1]) > 20 and sum(inserted for inserted, _ in found[0][0]) == 400


def test_totals_are_what_the_records_add_up_to(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            for number in range(1200):
                here.ledger.book(
                    record(user=f"u{number % 3}", status=200 if number % 4 else 502, at=NOON + number * 60)
                )
            await until(lambda: here.ledger.queued == 0)
            from_totals = await reports.grouped(here.database, "user")
            from_rows = await reports.grouped(here.database, "user", reports.Filters(since=1.0))
            assert from_totals == from_rows
            assert [(one.key, one.requests, one.cost_nanousd) for one in sorted(from_totals)] == [
                (f"u{number}", 400, 400 * 56_000) for number in range(3)
            ]
            assert sum(one.errors for one in from_totals) == 300
            days = await reports.grouped(here.database, "day")
            assert [(one.key, one.requests) for one in days] == [("2027-01-15", 720), ("2027-01-16", 480)]

    run(work())


def test_an_unknown_price_is_counted_and_never_zero(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            here.ledger.book(record(cost_nanousd=None))
            here.ledger.book(record(cost_nanousd=None, input_tokens=None, output_tokens=None, status=429))
            here.ledger.book(record(cost_nanousd=7))
            await until(lambda: here.ledger.queued == 0)
            assert [row.cost_nanousd for row in (await reports.usage(here.database))[0]] == [7, None, None]
            (total,) = await reports.grouped(here.database, "user")
            assert (total.cost_nanousd, total.unpriced, total.requests) == (7, 1, 3)

    run(work())


def test_the_same_id_counts_once(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            one = record()
            for _ in range(3):
                here.ledger.book(one)
            await until(lambda: here.ledger.queued == 0)
            here.ledger.book(one)
            here.ledger.book(record())
            await until(lambda: here.ledger.queued == 0)
            assert len(await here.all_ids()) == await here.requests() == here.ledger.written == 2

    run(work())


HOSTILE = [
    {"model": "\ud800 half a letter"},
    {"model": "nul \0 and \n line end"},
    {"model": "x" * 200_000},
    {"input_tokens": 10**30},
    {"input_tokens": 2**64 - 1},
    {"input_tokens": -5, "cost_nanousd": -1},
    {"output_tokens": 3.7},
    {"output_tokens": "12"},
    {"output_tokens": [1]},
    {"output_tokens": float("nan"), "duration_ms": float("inf")},
    {"at": float("nan")},
    {"at": 10**400},
    {"status": None, "user": None, "key": None},
    {"user": b"bytes"},
    {"requested_model": object()},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: "-".join(changes))
def test_a_strange_record_is_booked_as_far_as_it_makes_sense(tmp_path: Path, changes: dict[str, Any]) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            before, strange, after = record(), record(**changes), record()
            for one in (before, strange, after):
                here.ledger.book(one)
            await until(lambda: here.ledger.queued == 0)
            assert await here.all_ids() == [before.id, strange.id, after.id]
            assert await here.requests() == 3
            assert here.ledger.unreadable == 0
            total = (await reports.grouped(here.database, "provider"))[0]
            assert all(0 <= number <= 3 * 10**15 for number in total[1:])  # type: ignore[operator]

    run(work())


def test_absurd_numbers_never_overflow_the_sums(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            for _ in range(1000):
                here.ledger.book(record(input_tokens=2**63 - 1, cost_nanousd=2**63 - 1))
            await until(lambda: here.ledger.queued == 0)
            (total,) = await reports.grouped(here.database, "user")
            assert (total.requests, total.input_tokens, total.cost_nanousd) == (1000, 10**15, 10**18)

    run(work())


def test_a_torn_line_is_skipped_and_counted_and_its_neighbours_are_not(tmp_path: Path) -> None:
    async def work() -> None:
        good = [record() for _ in range(4)]
        lines = [line(one) for one in good]
        lines.insert(1, line(record())[:40] + b"\n")
        lines.insert(3, b"\n")
        lines[4:4] = [b'{"not": "ours"}\n', b"5\n", b"null\n", b"[]\n", b'["id-x"]\n'[:-2] + b"\n"]
        segment = left_over(tmp_path, [*lines, line(record())[:-20]])
        async with store(tmp_path) as here:
            assert await here.all_ids() == [one.id for one in good]
            assert await here.requests() == 4
            assert here.ledger.unreadable == 8
            assert here.told.count("usage_lines_unreadable") == 1
            assert not segment.exists()

    run(work())


def test_rubbish_in_the_spool_ends_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        left_over(tmp_path, [os.urandom(300_000).replace(b"\n", b"x"), b"\n", line(record())])
        left_over(tmp_path, [bytes(1_000_000)], "usage-00000000000000000002-2")
        left_over(tmp_path, [], "usage-00000000000000000003-3")
        (tmp_path / "spool" / "README").write_text("somebody's")
        async with store(tmp_path) as here:
            assert await here.requests() == 1
            assert here.ledger.alive
            assert len(here.files()) == 3

    run(work())


def test_a_start_returns_when_what_dead_processes_left_is_in_the_database(tmp_path: Path) -> None:
    async def work() -> None:
        booked = [record() for _ in range(4000)]
        for number in range(40):  # more than are taken over at a time
            lines = [line(one) for one in booked[number * 100 : number * 100 + 100]]
            left_over(tmp_path, lines, f"usage-{number:020d}-1")
        async with store(tmp_path) as here:
            assert sorted(await here.all_ids()) == sorted(one.id for one in booked)
            assert await here.requests() == 4000
            assert len(here.files()) == 2  # this process's own

    run(work())


def test_what_was_replayed_once_is_not_counted_again_even_when_its_rows_are_gone(tmp_path: Path) -> None:
    async def work() -> None:
        booked = [record(at=1.0) for _ in range(50)]
        async with store(tmp_path) as here:
            for one in booked:
                here.ledger.book(one)
            await until(lambda: here.ledger.queued == 0)
            await reports.prune(here.database, 2.0)
            assert await here.all_ids() == []
            abandon(here.ledger)
            here.ledger = Ledger(here.database, tmp_path / "spool", here.told)
            await here.ledger.start()
            assert await here.all_ids() == []
            assert await here.requests() == 50
            await here.ledger.stop()

    run(work())


def test_files_rotate_and_are_deleted_when_they_are_in_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            here.ledger._spool._segment_bytes = here.ledger._spool._rotate_at = 10_000
            seen = 0
            for _ in range(400):
                here.ledger.book(record())
                seen = max(seen, len(here.files()))
            assert seen > 8
            await until(lambda: here.ledger.queued == 0 and len(here.files()) == 2)
            assert len(await here.all_ids()) == await here.requests() == 400
            await until(lambda: here.ledger._spool.segments[0] is here.ledger._spool.current)
            assert len(await here.database.read("SELECT * FROM spool")) <= 2
        assert os.listdir(tmp_path / "spool") == []

    run(work())


def test_memory_does_not_grow_with_the_backlog(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = Ledger(None, tmp_path / "spool", Told())
        await ledger.start()
        for _ in range(30_000):
            ledger.book(RECORD)
        assert (ledger.queued, len(ledger._waiting), ledger.dropped) == (30_000, 0, 0)
        await ledger.stop(0.05)

    run(work())


def test_without_a_database_nothing_is_raised_and_the_next_process_finds_all(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        ledger = Ledger(None, tmp_path / "spool", told)
        await ledger.start()
        booked = [record() for _ in range(10)]
        for one in booked:
            ledger.book(one)
        await until(lambda: told.count("usage_store_refuses"))
        await ledger.stop(0.05)
        async with store(tmp_path) as here:
            assert await here.all_ids() == [one.id for one in booked]

    run(work())


def test_a_closed_database_is_the_same_as_none(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            await here.database.close()
            booked = record()
            here.ledger.book(booked)
            await until(lambda: here.told.count("usage_store_refuses"))
            await here.ledger.stop(0.05)
        async with store(tmp_path) as here:
            assert await here.all_ids() == [booked.id]

    run(work())


def test_records_before_the_start_and_after_the_stop_raise_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        database = await Database.open(tmp_path / "gproxyd.db")
        ledger = Ledger(database, tmp_path / "spool", Told())
        early = record()
        ledger.book(early)
        await ledger.start()
        await until(lambda: ledger.written == 1)
        await ledger.stop()
        ledger.book(record())
        assert await database.read("SELECT id FROM usage") == [(early.id,)]
        await database.close()

    run(work())


def test_when_the_disk_refuses_records_wait_in_memory_bounded_and_land_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            folder = tmp_path / "spool"
            here.ledger._spool.close()
            for name in os.listdir(folder):
                (folder / name).unlink()
            folder.rmdir()
            folder.write_text("in the way")
            await here.database.close()
            here.database = here.ledger._database = await Database.open(tmp_path / "gproxyd.db")
            locked = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None)
            locked.execute("BEGIN IMMEDIATE")
            for _ in range(ledgers.MOST_WAITING + 5):
                here.ledger.book(record())
            await until(lambda: here.told.count("usage_records_dropped"))
            assert (here.ledger.dropped, here.ledger.queued) == (5, ledgers.MOST_WAITING)
            folder.unlink()
            locked.execute("ROLLBACK")
            locked.close()
            await until(lambda: here.ledger.queued == 0, 15)
            assert len(await here.all_ids()) == await here.requests() == ledgers.MOST_WAITING
            assert here.told.count("usage_records_dropped") == here.told.count("usage_spool_refuses") == 1

    run(work())


def test_a_disk_that_takes_no_spool_still_lets_records_into_the_database(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "spool").write_text("in the way")
        database = await Database.open(tmp_path / "gproxyd.db")
        told = Told()
        ledger = Ledger(database, tmp_path / "spool", told)
        await ledger.start()
        for _ in range(1100):
            ledger.book(record())
        await until(lambda: ledger.queued == 0)
        assert await database.read("SELECT count(*), sum(requests) FROM usage, totals") == [(1100, 1100 * 1100)]
        assert told.count("usage_spool_refuses") == 1
        await ledger.stop()
        await database.close()

    run(work())


def test_a_write_that_the_disk_takes_in_part_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            whole, real = [record() for _ in range(3)], os.write
            here.ledger.book(whole[0])
            monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:50]))
            here.ledger.book(whole[1])
            monkeypatch.setattr(os, "write", real)
            here.ledger.book(whole[2])
            await until(lambda: here.ledger.queued == 0)
            assert sorted(await here.all_ids()) == sorted(one.id for one in whole)
            assert here.ledger.unreadable == 0

    run(work())


def test_a_part_that_cannot_be_taken_back_spoils_no_other_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    async def work() -> None:
        async with store(tmp_path) as here:
            whole, real = [record() for _ in range(4)], os.write
            monkeypatch.setattr(os, "ftruncate", refuse)
            monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:50]))
            here.ledger.book(whole[0])
            await asyncio.sleep(0)
            here.ledger.book(whole[1])
            monkeypatch.setattr(os, "write", real)
            here.ledger.book(whole[2])
            here.ledger.book(whole[3])
            await until(lambda: here.ledger.queued == 0)
            assert sorted(await here.all_ids()) == sorted(one.id for one in whole)
            assert await here.requests() == 4

    run(work())


def test_a_deleted_spool_folder_loses_nothing_that_is_still_open(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            booked = []
            for _ in range(3):
                booked += [record() for _ in range(20)]
                for one in booked[-20:]:
                    here.ledger.book(one)
                for name in os.listdir(tmp_path / "spool"):
                    (tmp_path / "spool" / name).unlink()
                (tmp_path / "spool").rmdir()
                await until(lambda: here.ledger.queued == 0)
            assert sorted(await here.all_ids()) == sorted(one.id for one in booked)
            assert await here.requests() == 60
            assert here.told.count("usage_spool_deleted") == 1
            assert here.ledger.alive

    run(work())


def test_a_locked_database_holds_up_nobody_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WRITER", (("busy_timeout", "100", 100), *opening.WRITER[1:]))

    async def work() -> None:
        async with store(tmp_path) as here:
            other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            longest, last, end = 0.0, time.monotonic(), time.monotonic() + 1.0
            while time.monotonic() < end:
                here.ledger.book(record())
                await asyncio.sleep(0.002)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            assert here.told.count("usage_store_refuses") == 1
            assert here.ledger.alive
            assert longest < 0.5
            booked = here.ledger.queued
            assert booked > 50
            other.execute("ROLLBACK")
            other.close()
            await until(lambda: here.ledger.queued == 0, 8)
            assert len(await here.all_ids()) == await here.requests() == booked

    run(work())


def test_a_start_on_a_locked_database_returns_and_the_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "WRITER", (("busy_timeout", "50", 50), *opening.WRITER[1:]))
    monkeypatch.setattr(ledgers, "PATIENCE", 0.3)

    async def work() -> None:
        booked = [record() for _ in range(20)]
        left_over(tmp_path, [line(one) for one in booked])
        database = await Database.open(tmp_path / "gproxyd.db")
        other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        ledger = Ledger(database, tmp_path / "spool", Told())
        begun = time.monotonic()
        await ledger.start()
        assert 0.2 < time.monotonic() - begun < 2
        assert ledger.written == 0
        other.execute("ROLLBACK")
        other.close()
        await until(lambda: ledger.written == 20)
        await ledger.stop()
        await database.close()

    run(work())


def test_a_stop_on_a_locked_database_keeps_its_deadline_and_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "WRITER", (("busy_timeout", "50", 50), *opening.WRITER[1:]))

    async def work() -> None:
        async with store(tmp_path) as here:
            other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            one = record()
            here.ledger.book(one)
            begun = time.monotonic()
            await here.ledger.stop(0.3)
            assert time.monotonic() - begun < 1
            other.execute("ROLLBACK")
            other.close()
        async with store(tmp_path) as here:
            assert await here.all_ids() == [one.id]

    run(work())


@pytest.mark.parametrize("how", ["cancelled", "raised"])
def test_a_dead_writer_is_told_of_and_works_again_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            if how == "cancelled":
                assert here.ledger._task is not None
                here.ledger._task.cancel()
            else:
                monkeypatch.setattr(here.ledger, "_to_spool", lambda: 1 / 0)
                here.ledger.book(record())
            await until(lambda: not here.ledger.alive)
            died = time.monotonic()
            monkeypatch.undo()
            here.ledger.book(record())
            await until(lambda: here.ledger.alive and here.ledger.queued == 0, 2)
            assert time.monotonic() - died < 1.5
            assert [fields for event, fields in here.told.lines if event == "usage_writer_died"] == [
                {"error": "cancelled" if how == "cancelled" else "ZeroDivisionError"}
            ]
            assert await here.requests() == (1 if how == "cancelled" else 2)

    run(work())


def test_two_ledgers_on_one_folder_both_work_and_take_nothing_from_each_other(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as one, store(tmp_path) as two:
            for _ in range(300):
                one.ledger.book(record())
                two.ledger.book(record())
                await asyncio.sleep(0)
            await until(lambda: one.ledger.queued == two.ledger.queued == 0)
            assert one.ledger.written == two.ledger.written == 300
            assert await one.requests() == len(await two.all_ids()) == 600
            assert len(one.files()) == 4
        assert os.listdir(tmp_path / "spool") == []

    run(work())


def test_a_living_process_takes_over_from_one_that_dies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "IDLE", 0.1)

    async def work() -> None:
        async with store(tmp_path) as here:
            dying = Ledger(None, tmp_path / "spool", Told())
            await dying.start()
            for _ in range(20):
                dying.book(record())
            await asyncio.sleep(0.3)
            assert await here.requests() == 0  # it lives, and its files are its own
            abandon(dying)
            await until(lambda: here.ledger.written == 20)
            assert await here.requests() == 20

    run(work())


def test_a_lock_file_that_somebody_deletes_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "IDLE", 0.1)

    async def work() -> None:
        async with store(tmp_path) as one:
            for path in (tmp_path / "spool").glob("*.lock"):
                path.unlink()
            async with store(tmp_path) as two:
                for _ in range(40):
                    one.ledger.book(record())
                    two.ledger.book(record())
                    await asyncio.sleep(0.01)
                await until(lambda: one.ledger.queued == two.ledger.queued == 0)
                assert await one.requests() == len(await two.all_ids()) == 80

    run(work())


def test_a_reader_that_never_ends_is_told_of_and_the_writer_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "WAL_ALARM", 2_000_000)
    monkeypatch.setattr(opening, "WRITER", (*opening.WRITER[:-2], ("journal_size_limit", "100000", 100_000)))
    # Checkpoints come early, as they would with a log of a hundred megabytes.
    monkeypatch.setattr(opening, "WRITER", (*opening.WRITER, ("wal_autocheckpoint", "100", 100)))

    async def work() -> None:
        async with store(tmp_path) as here:
            reader = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM usage").fetchone()
            while not here.told.count("database_log_large"):
                for _ in range(1000):
                    here.ledger.book(record())
                await until(lambda: here.ledger.queued == 0)
            assert here.ledger.alive
            reader.execute("ROLLBACK")
            reader.close()
            large = here.database.wal_bytes
            for _ in range(3):
                here.ledger.book(record())
                await until(lambda: here.ledger.queued == 0)
            assert here.database.wal_bytes < large / 2

    run(work())


def test_booking_costs_a_few_microseconds(tmp_path: Path) -> None:
    async def work() -> float:
        ledger = Ledger(None, tmp_path / "spool", Told())
        await ledger.start()
        best = 1.0
        for _ in range(5):
            begun = time.process_time()
            for _ in range(4000):
                ledger.book(RECORD)
            best = min(best, (time.process_time() - begun) / 4000)
        await ledger.stop(0.05)
        return best

    assert run(work()) < 20e-6  # 2 µs on the machine it was written on


def test_a_spool_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.open()
    spool.append(b"[]\n")
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "spool").iterdir()} == {0o600}
    spool.close()
