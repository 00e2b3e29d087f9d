"""Reports, pruning and request logs: what was booked is what is told, in pages that neither repeat nor skip."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gproxyd.store import gathering, logs, opening, reports
from gproxyd.store.database import Database, Invalid
from gproxyd.store.logs import RequestLog
from gproxyd.store.reports import DAY, Filters
from tests.test_store_ledger import NOON, Told, record, run, store, until

MIDNIGHT = NOON - DAY / 2

RECORDS = [
    record(
        user=(None, "alice", "bob")[number % 3],
        key=(None, "laptop", "ci")[number % 3],
        provider=("openai-main", "anthropic-main")[number % 2],
        model=f"m{number % 5}",
        endpoint=("POST /v1/chat/completions", "GET /v1/models")[number % 4 == 0],
        status=(200, 200, 429)[number % 3 - 1],
        at=MIDNIGHT + (number // 2) * 6 * 3600.0,
        cost_nanousd=number,
        stream=bool(number % 2),
        client_gone=number == 4,
        ttft_ms=None if number % 2 else 12.5,
    )
    for number in range(60)
]

FILTERS: list[tuple[Filters, Any]] = [
    (Filters(), lambda one: True),
    (Filters(user="alice"), lambda one: one.user == "alice"),
    (Filters(user="alice", key="laptop"), lambda one: one.key == "laptop"),
    (Filters(user="' OR 1=1 --"), lambda one: False),
    (Filters(user="%"), lambda one: False),
    (Filters(provider="openai-main", model="m2"), lambda one: (one.provider, one.model) == ("openai-main", "m2")),
    (Filters(endpoint="GET /v1/models"), lambda one: one.endpoint == "GET /v1/models"),
    (Filters(status=429), lambda one: one.status == 429),
    (Filters(since=MIDNIGHT + DAY), lambda one: one.at >= MIDNIGHT + DAY),
    (Filters(until=MIDNIGHT + DAY), lambda one: one.at < MIDNIGHT + DAY),
    (Filters(since=MIDNIGHT + DAY, until=MIDNIGHT + 2 * DAY), lambda one: DAY <= one.at - MIDNIGHT < 2 * DAY),
    (Filters(since=NOON, until=NOON + 1), lambda one: one.at == NOON),
]


async def book_all(here: Any) -> None:
    for one in RECORDS:
        here.ledger.book(one)
    await until(lambda: here.ledger.queued == 0)


def test_every_filter_finds_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            await book_all(here)
            for filters, wanted in FILTERS:
                expected = sorted((one for one in RECORDS if wanted(one)), key=lambda one: -one.at)
                found, following = await reports.usage(here.database, filters, limit=1000)
                assert following is None
                assert sorted(found) == sorted(expected), filters
                assert [one.at for one in found] == [one.at for one in expected]

    run(work())


def test_groups_add_up_to_the_records_whichever_table_they_come_from(tmp_path: Path) -> None:
    def name_of(one: Any, by: str) -> str | None:
        if by == "key":
            return f"{one.user}/{one.key}" if one.user else None
        return f"2027-01-{15 + int((one.at - MIDNIGHT) // DAY):02d}" if by == "day" else getattr(one, by)

    async def work() -> None:
        async with store(tmp_path) as here:
            await book_all(here)
            for filters, wanted in FILTERS:
                for by in ("user", "key", "provider", "model", "day"):
                    expected: dict[str | None, list[int]] = {}
                    for one in filter(wanted, RECORDS):
                        sums = expected.setdefault(name_of(one, by), [0, 0, 0, 0])
                        for place, value in enumerate((1, one.status >= 400, one.input_tokens, one.cost_nanousd)):
                            sums[place] += value
                    rows = await reports.grouped(here.database, by, filters)  # type: ignore[arg-type]
                    found = {row.key: [row.requests, row.errors, row.input_tokens, row.cost_nanousd] for row in rows}
                    assert found == expected, (by, filters)
                    in_order = [row.key for row in rows] if by == "day" else [-(row.cost_nanousd or 0) for row in rows]
                    assert in_order == sorted(in_order)

    run(work())


def test_pages_neither_repeat_nor_skip_while_records_come_in(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            await book_all(here)
            found, cursor = await reports.usage(here.database, limit=7)
            while cursor is not None:
                here.ledger.book(record(at=NOON + 100 * DAY))
                await until(lambda: here.ledger.queued == 0)
                page, cursor = await reports.usage(here.database, cursor=cursor, limit=7)
                found += page
            assert len(found) == 60
            assert sorted(found) == sorted(RECORDS)

    run(work())


def test_all_of_it_can_be_streamed_a_page_at_a_time(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            await book_all(here)
            alone = [one async for one in reports.each(here.database, Filters(user="bob"), 3)]
            assert sorted(alone) == sorted(one for one in RECORDS if one.user == "bob")
            assert len([one async for one in reports.each(here.database)]) == 60

    run(work())


@pytest.mark.parametrize("cursor", ["", "x", ":", "1.0:", ":1", "1:2:3", "1.0:x", "nan", "1.0:99999999999999999999"])
def test_a_cursor_that_was_never_given_out_is_refused(tmp_path: Path, cursor: str) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            with pytest.raises(Invalid):
                await reports.usage(here.database, cursor=cursor)

    run(work())


def test_what_was_spent_is_known_by_user_and_by_key_since_any_day(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            here.ledger.book(record(user="alice", key="a", at=MIDNIGHT - 1, cost_nanousd=1))
            here.ledger.book(record(user="alice", key="a", at=MIDNIGHT, cost_nanousd=10))
            here.ledger.book(record(user="alice", key="b", at=MIDNIGHT + DAY, cost_nanousd=100))
            here.ledger.book(record(user="alice", key=None, at=MIDNIGHT + DAY, cost_nanousd=1000))
            here.ledger.book(record(user=None, key=None, cost_nanousd=5))
            await until(lambda: here.ledger.queued == 0)
            assert await reports.spent(here.database) == {
                ("user", "alice"): 1111,
                ("key", "alice/a"): 11,
                ("key", "alice/b"): 100,
            }
            assert await reports.spent(here.database, "2027-01-15") == {
                ("user", "alice"): 1110,
                ("key", "alice/a"): 10,
                ("key", "alice/b"): 100,
            }
            assert await reports.last_used(here.database) == {"alice/a": MIDNIGHT, "alice/b": MIDNIGHT + DAY}

    run(work())


def test_ten_million_tiny_amounts_add_up_exactly(tmp_path: Path) -> None:
    """$0.0000001 is 100 nano-dollars; the rows' own totals are multiplied rather than booked ten million times."""

    async def work() -> None:
        async with store(tmp_path) as here:
            for _ in range(1000):
                here.ledger.book(record(cost_nanousd=100))
            await until(lambda: here.ledger.queued == 0)
            assert await reports.spent(here.database) == {
                ("user", "alice"): 100_000,
                ("key", "alice/laptop"): 100_000,
            }
            await here.database.write(
                lambda connection: connection.execute("UPDATE totals SET cost_nanousd = cost_nanousd * 10000").rowcount
            )
            here.ledger.book(record(cost_nanousd=1))
            await until(lambda: here.ledger.queued == 0)
            assert (await reports.spent(here.database))["user", "alice"] == 1_000_000_001

    run(work())


def test_pruning_takes_the_old_records_and_leaves_the_totals(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            await book_all(here)
            before = await reports.grouped(here.database, "user")
            old = sum(one.at < MIDNIGHT + 2 * DAY for one in RECORDS)
            assert await reports.prune(here.database, MIDNIGHT + 2 * DAY, at_a_time=3) == old
            left, _ = await reports.usage(here.database, limit=1000)
            assert sorted(left) == sorted(one for one in RECORDS if one.at >= MIDNIGHT + 2 * DAY)
            assert await reports.grouped(here.database, "user") == before

    run(work())


def envelope(number: int, **more: Any) -> dict[str, Any]:
    return {
        "request_id": f"req-{number}",
        "at": NOON + number,
        "user": ("alice", "bob")[number % 2],
        "key": "laptop",
        "provider": "openai-main",
        "model": "m",
        "status": 200 if number % 3 else 502,
        "upstream": {"path": "/v1/chat/completions"},
        **more,
    }


@asynccontextmanager
async def request_log(folder: Path) -> AsyncIterator[tuple[RequestLog, Database, Told]]:
    database = await Database.open(folder / "gproxyd.db")
    told = Told()
    log = RequestLog(database, told)
    log.start()
    try:
        yield log, database, told
    finally:
        await log.stop()
        await database.close()


def test_an_envelope_is_found_again_with_its_bodies(tmp_path: Path) -> None:
    async def work() -> None:
        async with request_log(tmp_path) as (log, _, _):
            one = envelope(1, upstream_body=b"\x00\xff{}", downstream={"headers": [["a", "b"]]}, downstream_body=b"")
            log.put(one)
            await until(lambda: log.written == 1)
            assert await log.find("req-1") == one
            assert await log.find("req-2") is None

    run(work())


def test_logs_are_listed_newest_first_in_pages_and_by_user_and_status(tmp_path: Path) -> None:
    async def work() -> None:
        async with request_log(tmp_path) as (log, database, _):
            for number in range(250):
                log.put(envelope(number))
            await until(lambda: log.written == 250)
            found, cursor = await log.list(limit=100)
            while cursor is not None:
                page, cursor = await log.list(cursor, 100)
                found += page
            assert [row["request_id"] for row in found] == [f"req-{number}" for number in reversed(range(250))]
            assert "upstream" not in found[0]
            alone, _ = await log.list(user="bob", status=502, limit=1000)
            assert [row["request_id"] for row in alone] == [f"req-{n}" for n in reversed(range(250)) if n % 6 == 3]
            with pytest.raises(Invalid):
                await log.list("1; DROP TABLE logs")
            assert await log.prune(NOON + 200) == 200
            assert await database.read("SELECT count(*) FROM logs") == [(50,)]

    run(work())


def test_pruned_logs_take_their_bodies_with_them(tmp_path: Path) -> None:
    async def work() -> None:
        async with request_log(tmp_path) as (log, database, _):
            log.put(envelope(1, upstream_body=b"x"))
            await log.stop()
            assert await database.read("SELECT count(*) FROM log_bodies") == [(1,)]
            await log.prune(NOON + 2)
            assert await database.read("SELECT count(*) FROM log_bodies") == [(0,)]

    run(work())


def test_logs_that_find_no_room_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING", 10)
    monkeypatch.setattr(logs, "MOST_BYTES", 10_000)
    monkeypatch.setattr(gathering, "PAUSE", 0.05)
    monkeypatch.setattr(opening, "WRITER", (("busy_timeout", "50", 50), *opening.WRITER[1:]))

    async def work() -> None:
        async with request_log(tmp_path) as (log, _, told):
            other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            log.put(envelope(0, upstream_body=bytes(20_000)))
            log.put(envelope(1, upstream=object()))
            for number in range(2, 15):
                log.put(envelope(number))
            assert (log.queued, log.dropped) == (10, 5)
            await until(lambda: told.count("request_log_refused") and told.count("request_log_dropped"))
            assert log.queued == 10
            other.execute("ROLLBACK")
            other.close()
            await until(lambda: log.written == 10)

    run(work())
