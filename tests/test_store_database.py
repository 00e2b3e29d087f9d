"""The database file: judged before it is used, moved aside rather than overwritten, and never left in a transaction."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from gproxyd.store import booking, opening, schema
from gproxyd.store.booking import book_segment
from gproxyd.store.database import Database, StoreError, Unavailable
from gproxyd.store.opening import Gate, companion, open_writer
from tests.test_store_ledger import line, record, run, store, until


def opened(path: Path) -> tuple[sqlite3.Connection, list[str]]:
    """What `Database.open` does in its thread."""
    warnings: list[str] = []
    gate = Gate(companion(path, "-lock"))
    try:
        return open_writer(path, gate, warnings), warnings
    finally:
        gate.close()


def some_database(path: Path, batches: int = 40, *, per_batch: int = 20) -> tuple[list[str], dict[str, bytes]]:
    """Books records in so many transactions; gives their ids and the files as a power cut would find them."""
    folder = path.parent / "lines"
    folder.mkdir(parents=True)
    booked = [record() for _ in range(batches * per_batch)]
    (folder / "usage-1-1.000000").write_bytes(b"".join(map(line, booked)))
    connection, _ = opened(path)
    read_to, most = 0, booking.BATCH
    booking.BATCH = per_batch
    try:
        for _ in range(batches):
            connection.execute("BEGIN IMMEDIATE")
            read_to = book_segment(connection, folder / "usage-1-1.000000", read_to, growing=True).read_to
            connection.execute("COMMIT")
    finally:
        booking.BATCH = most
    files = {suffix: companion(path, suffix).read_bytes() for suffix in ("", "-wal")}
    connection.close()
    return [one.id for one in booked], files


def put(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.iterdir():
        old.unlink()
    for suffix, content in files.items():
        companion(path, suffix).write_bytes(content)
        companion(path, suffix).chmod(0o600)


def check_consistent(connection: sqlite3.Connection, ids: list[str]) -> int:
    """A prefix of what was booked, and totals and offset that fit it."""
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    found = [one for (one,) in connection.execute("SELECT id FROM usage ORDER BY seq")]
    assert found == ids[: len(found)]
    assert connection.execute("SELECT coalesce(sum(requests), 0) FROM totals").fetchone() == (len(found),)
    assert connection.execute("SELECT count(*) FROM spool").fetchone() == (1 if found else 0,)
    return len(found)


def test_after_a_power_cut_a_consistent_prefix_is_there(tmp_path: Path) -> None:
    ids, files = some_database(tmp_path / "a" / "gproxyd.db")
    chance = random.Random(7)
    lengths = set()
    for _ in range(250):
        offset = chance.randrange(len(files["-wal"]))
        wal = files["-wal"][:offset]
        if chance.random() < 0.5:
            wal += bytes(len(files["-wal"]) - offset)
        put(tmp_path / "b" / "gproxyd.db", {"": files[""], "-wal": wal})
        connection, warnings = opened(tmp_path / "b" / "gproxyd.db")
        assert warnings == []
        lengths.add(check_consistent(connection, ids))
        connection.close()
    assert len(lengths) > 20
    assert max(lengths) <= len(ids)


def test_a_truncated_file_is_whole_or_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "gproxyd.db"
    _, _ = some_database(path, 20)
    content = path.read_bytes()
    chance = random.Random(8)
    moved = 0
    for _ in range(60):
        cut = content[: chance.randrange(1, len(content))]
        put(tmp_path / "b" / "gproxyd.db", {"": cut})
        connection, warnings = opened(tmp_path / "b" / "gproxyd.db")
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()
        aside = [one for one in (tmp_path / "b").glob("*.corrupt-*") if not one.name.endswith(("-wal", "-shm"))]
        assert len(aside) == 1
        assert aside[0].read_bytes() == cut
        assert any("corrupt" in warning for warning in warnings)
        moved += 1
    assert moved == 60


CORRUPTIONS = {
    "magic": lambda content: b"SQLike" + content[6:],
    "page_size": lambda content: content[:16] + b"\x03\x07" + content[18:],
    "leaf": lambda content: content[: 4096 * 20] + os.urandom(4096) + content[4096 * 21 :],
    "root": lambda content: content[:100] + b"\xff" * 60 + content[160:],
    "text": lambda _: b"not a database at all\n" * 500,
    "short": lambda _: b"x",
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupt_file_is_moved_aside_as_it_is_and_loudly(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a" / "gproxyd.db"
    some_database(path)
    broken = CORRUPTIONS[kind](path.read_bytes())
    companion(path, "-wal").unlink(missing_ok=True)
    path.write_bytes(broken)

    async def work() -> None:
        database = await Database.open(path)
        assert await database.read("SELECT count(*) FROM usage") == [(0,)]
        aside = [one for one in path.parent.glob("*.corrupt-*") if re.fullmatch(r".*\.corrupt-\d{8}T\d{6}Z", one.name)]
        assert len(aside) == 1
        assert aside[0].read_bytes() == broken
        assert str(aside[0]) in " ".join(database.warnings)
        assert "corrupt" in database.warnings[0]
        await database.close()
        again = await Database.open(path)
        assert again.warnings == []
        await again.close()

    run(work())


def test_two_corrupt_files_in_one_second_are_both_kept(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "gproxyd.db").write_bytes(b"rubbish" * 1000)
        opened(tmp_path / "gproxyd.db")[0].close()
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 2


@pytest.mark.parametrize("what", ["empty", "missing"])
def test_a_log_that_has_lost_its_file_is_kept(tmp_path: Path, what: str) -> None:
    _, files = some_database(tmp_path / "a" / "gproxyd.db")
    path = tmp_path / "b" / "gproxyd.db"
    put(path, {"-wal": files["-wal"], **({"": b""} if what == "empty" else {})})
    connection, warnings = opened(path)
    connection.close()
    (kept,) = path.parent.glob("*.corrupt-*-wal")
    assert kept.read_bytes() == files["-wal"]
    assert any(what in warning for warning in warnings)


def test_a_corrupt_log_gives_what_stood_before_it(tmp_path: Path) -> None:
    ids, files = some_database(tmp_path / "a" / "gproxyd.db")
    wal = bytearray(files["-wal"])
    wal[len(wal) // 2] ^= 0xFF
    put(tmp_path / "b" / "gproxyd.db", {"": files[""], "-wal": bytes(wal)})
    connection, warnings = opened(tmp_path / "b" / "gproxyd.db")
    assert warnings == []
    assert 0 < check_consistent(connection, ids) < len(ids)
    connection.close()


def test_a_newer_schema_is_refused_and_the_file_is_untouched(tmp_path: Path) -> None:
    path = tmp_path / "gproxyd.db"
    connection, _ = opened(path)
    connection.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    wal = companion(path, "-wal").read_bytes()
    before = path.read_bytes()
    # The log still holds the change when the next one comes, as after a kill.
    copy = tmp_path / "copy.db"
    copy.write_bytes(before)
    companion(copy, "-wal").write_bytes(wal)
    connection.close()
    for one in (path, copy):
        before, log = one.read_bytes(), companion(one, "-wal")
        wal = log.read_bytes() if log.exists() else b""
        with pytest.raises(StoreError, match="written by a newer gproxyd"):
            run(Database.open(one))
        assert one.read_bytes() == before
        assert (log.read_bytes() if log.exists() else b"") == wal
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_a_database_of_another_program_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "grafana.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE dashboards (id)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        run(Database.open(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("where", ["missing/gproxyd.db", "folder", "file/gproxyd.db"])
def test_a_place_that_cannot_hold_it_is_an_error_of_ours(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        run(Database.open(tmp_path / where))


def test_the_settings_are_read_back(tmp_path: Path) -> None:
    async def work() -> None:
        database = await Database.open(tmp_path / "gproxyd.db")
        for (name, _, expected), table in ((one, table) for table in ("w", "r") for one in opening.WRITER):
            if table == "w":
                found = await database.write(lambda c, name=name: c.execute(f"PRAGMA {name}").fetchone())  # type: ignore[misc]
                assert found == (expected,), name
        assert await database.read("PRAGMA query_only") == [(1,)]
        with pytest.raises(Unavailable, match="readonly"):
            await database.read("DELETE FROM usage")
        await database.close()

    run(work())


def test_a_file_system_without_a_write_ahead_log_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WRITER", (("journal_mode", "DELETE", "wal"),))
    with pytest.raises(StoreError, match="journal_mode"):
        run(Database.open(tmp_path / "gproxyd.db"))


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}


def test_nobody_else_can_read_any_of_its_files(tmp_path: Path) -> None:
    async def work() -> None:
        before = os.umask(0)
        try:
            async with store(tmp_path) as here:
                here.ledger.book(record())
                await until(lambda: here.ledger.queued == 0)
                assert modes(tmp_path) == dict.fromkeys(
                    ("gproxyd.db", "gproxyd.db-wal", "gproxyd.db-shm", "gproxyd.db-lock"), 0o600
                )
        finally:
            os.umask(before)

    run(work())


def test_a_file_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    async def work() -> None:
        await (await Database.open(tmp_path / "gproxyd.db")).close()
        (tmp_path / "gproxyd.db").chmod(0o644)
        database = await Database.open(tmp_path / "gproxyd.db")
        assert set(modes(tmp_path).values()) == {0o600}
        assert len(database.warnings) == 1
        await database.close()

    run(work())


def test_a_backup_under_load_is_consistent(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            done = threading.Event()

            def back_up() -> None:
                with sqlite3.connect(tmp_path / "gproxyd.db") as source:
                    source.execute("VACUUM INTO ?", (str(tmp_path / "one.db"),))
                    with sqlite3.connect(tmp_path / "two.db") as target:
                        source.backup(target, pages=50)
                    target.close()
                source.close()
                done.set()

            thread = threading.Thread(target=back_up)
            for number in range(3000):
                here.ledger.book(record())
                if number == 1500:
                    thread.start()
                await asyncio.sleep(0)
            await until(done.is_set)
            thread.join()
            await until(lambda: here.ledger.queued == 0)
            for name in ("one.db", "two.db"):
                copy, _ = opened(tmp_path / name)
                (rows,) = copy.execute("SELECT count(*) FROM usage").fetchone()
                assert copy.execute("SELECT coalesce(sum(requests), 0) FROM totals").fetchone() == (rows,)
                copy.close()
            assert len(await here.all_ids()) == await here.requests() == 3000

    run(work())


def test_whoever_is_cancelled_leaves_no_transaction_behind(tmp_path: Path) -> None:
    def work_of(number: int) -> object:
        def work(connection: sqlite3.Connection) -> None:
            for part in range(3):
                connection.execute("INSERT INTO counters VALUES (?, ?)", (f"{number}/{part}", b""))
            if number % 7 == 0:
                raise ValueError("on purpose")

        return work

    async def work() -> None:
        database = await Database.open(tmp_path / "gproxyd.db")
        chance = random.Random(9)
        finished, broken = set(), set()

        async def one(number: int) -> None:
            try:
                await database.write(work_of(number))  # type: ignore[arg-type]
                finished.add(number)
            except ValueError:
                broken.add(number)

        tasks = []
        for number in range(400):
            tasks.append(asyncio.ensure_future(one(number)))
            await asyncio.sleep(chance.random() * 0.0004)
            if chance.random() < 0.6:
                chance.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(finished) < 350
        assert not await database.write(lambda connection: connection.total_changes < 0)
        rows = [name for (name,) in await database.read("SELECT name FROM counters")]
        whole = {int(name.partition("/")[0]) for name in rows}
        assert len(rows) == 3 * len(whole)
        assert whole >= finished
        assert not any(number % 7 == 0 for number in whole)
        writer = database._writer
        assert not await writer._execute(lambda: writer._conn.in_transaction)  # type: ignore[no-untyped-call]
        other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None, timeout=0)
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        other.close()
        await database.close()

    run(work())


def test_an_opening_that_is_cancelled_leaves_no_thread_behind(tmp_path: Path) -> None:
    async def work() -> None:
        for delay in (0, 0.0005, 0.001, 0.002, 0.004, 0.008):
            task = asyncio.ensure_future(Database.open(tmp_path / "gproxyd.db"))
            await asyncio.sleep(delay)
            task.cancel()
            try:
                await (await task).close()
            except asyncio.CancelledError:
                continue

    before = threading.active_count()
    run(work())
    assert threading.active_count() == before
    other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None, timeout=0)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")  # nobody else has it open
    other.execute("COMMIT")
    other.close()


def test_what_breaks_in_a_transaction_undoes_it_and_keeps_its_name(tmp_path: Path) -> None:
    async def work() -> None:
        database = await Database.open(tmp_path / "gproxyd.db")

        def half(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO counters VALUES ('a', x'')")
            connection.execute("INSERT INTO nowhere VALUES (1)")

        with pytest.raises(Unavailable, match="nowhere"):
            await database.write(half)
        assert await database.read("SELECT * FROM counters") == []
        await database.close()
        with pytest.raises(Unavailable, match="closed"):
            await database.write(half)
        with pytest.raises(Unavailable, match="closed"):
            await database.read("SELECT 1")
        await database.close()

    run(work())


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_nothing_is_written_to_a_file_that_nobody_will_find_again(tmp_path: Path, how: str) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            (tmp_path / "gproxyd.db").rename(tmp_path / "elsewhere.db")
            if how == "replaced":
                (tmp_path / "gproxyd.db").write_bytes((tmp_path / "elsewhere.db").read_bytes())
                (tmp_path / "gproxyd.db").chmod(0o600)
            one = record()
            here.ledger.book(one)
            await until(lambda: here.told.count("usage_store_refuses"))
            await here.ledger.stop(0.1)
            await here.database.close()
        for suffix in ("-wal", "-shm"):  # they fit the other file
            companion(tmp_path / "gproxyd.db", suffix).unlink(missing_ok=True)
        async with store(tmp_path) as here:
            assert await here.all_ids() == [one.id]

    run(work())


def test_only_one_at_a_time_goes_through_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "BUSY", 0.1)
    one, two = Gate(tmp_path / "lock"), Gate(tmp_path / "lock")
    with one, pytest.raises(Unavailable), two:
        raise AssertionError("both are in")
    with two:
        pass
    one.close()
    two.close()


def test_a_step_that_was_begun_is_begun_again(tmp_path: Path) -> None:
    first = ("CREATE TABLE a (x)", "INSERT INTO a VALUES (1)")
    second = ("ALTER TABLE a ADD COLUMN y", "UPDATE a SET y = x + 1", "INSERT INTO nowhere VALUES (1)")
    connection = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    with pytest.raises(sqlite3.OperationalError):
        schema.migrate(connection, (first, second))
    assert connection.execute("SELECT * FROM a").fetchall() == [(1,)]
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    for _ in range(2):
        schema.migrate(connection, (first, second[:2]))
        assert connection.execute("SELECT * FROM a").fetchall() == [(1, 2)]
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()


def test_a_link_to_the_file_is_followed_and_its_log_lies_beside_the_file(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "gproxyd.db").symlink_to(tmp_path / "disk" / "gproxyd.db")
        async with store(tmp_path) as here:
            here.ledger.book(record())
            await until(lambda: here.ledger.queued == 0)
            assert here.database.wal_bytes > 0
            assert (tmp_path / "gproxyd.db").is_symlink()
            assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == [
                *("gproxyd.db", "gproxyd.db-lock", "gproxyd.db-shm", "gproxyd.db-wal")
            ]

    run(work())
