"""What is killed, filled up or run twice: nothing that was acknowledged is lost, and nothing counts twice.

Children are forked from a process that has loaded everything already, so that each costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gproxyd.store import schema
from gproxyd.store.database import Database
from tests.test_store_ledger import run, store

KILLS = 60

CHILDREN = '''
import asyncio, json, os, signal, sqlite3, subprocess, sys, time
from pathlib import Path
import uvloop
from gproxyd.store import booking, ledger as ledgers, opening, schema, spool
from gproxyd.store.database import Database
from gproxyd.store.ledger import Ledger
from gproxyd.types import UsageRecord

def record(name, user="alice"):
    return UsageRecord(name, time.time(), "r", user, "k", "e", "aggregated", "openai_chat", "p", "m", "m", 10, 1, None,
                       None, None, None, 5, "measured", 200, False, 1, None, 1.0, False)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def begin(folder):
    told = []
    database = await Database.open(folder / "gproxyd.db")
    ledger = Ledger(database, folder / "spool", lambda event, **fields: told.append(event))
    await ledger.start()
    return database, ledger, told

async def end(database, ledger):
    await ledger.stop(30)
    await database.close()

async def flood(folder, name, until=None):
    """Books as fast as it can and writes down what was taken, until it is killed or `until` is there."""
    spool.SEGMENT = 20_000
    database, ledger, _ = await begin(folder)
    ledger._spool._segment_bytes = ledger._spool._rotate_at = 20_000
    taken = os.open(folder / "taken", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = 0
    while until is None or not os.path.exists(until):
        for _ in range(20):
            one = f"{name}-{number}"
            ledger.book(record(one))
            os.write(taken, (one + "\\n").encode())
            number += 1
        await asyncio.sleep(0)
    await end(database, ledger)

async def fail(folder, point, name):
    """Dies at one point of the way of one record."""
    database, ledger, _ = await begin(folder)
    if point in ("BEGIN", "INSERT INTO usage", "INSERT INTO totals", "INSERT INTO spool", "COMMIT"):
        armed = []
        def trace(sql):
            if armed and sql.strip().startswith(point):
                die()
        await database.write(lambda c: c.set_trace_callback(trace))
        armed.append(True)
    if point == "after COMMIT":
        write = database.write
        async def and_die(work):
            await write(work)
            die()
        database.write = and_die
    if point == "before book":
        die()
    ledger.book(record(name))
    if point == "after book":
        die()
    await asyncio.sleep(10)

async def leave(folder):
    """Ends without a word while everything is open."""
    database, ledger, _ = await begin(folder)
    ledger.book(record("r"))

async def retire(folder, point):
    """Dies while it deletes what a dead process left."""
    if point == "fsync":
        os.fsync = lambda _: die()
    database = await Database.open(folder / "gproxyd.db")
    if point == "DELETE FROM spool":
        await database.write(lambda c: c.set_trace_callback(lambda sql: sql.startswith(point) and die()))
    ledger = Ledger(database, folder / "spool", lambda event, **fields: None)
    await ledger.start()
    await end(database, ledger)

def migrate(folder, count, steps):
    """Dies before statement number `count` of a migration; without one it gives how many there are."""
    connection = sqlite3.connect(folder / "gproxyd.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    seen = []
    def trace(sql):
        seen.append(sql)
        if len(seen) == count:
            die()
    connection.set_trace_callback(trace)
    schema.migrate(connection, steps or schema.MIGRATIONS)
    (folder / "count").write_text(str(len(seen)))
    connection.close()

async def fill(folder):
    """A disk of two megabytes: books until it is full and goes on, then the disk grows."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=True)
    ledgers.MOST_WAITING = 3000
    database, ledger, told = await begin(folder)
    booked, raised, lag, last = 0, 0, 0.0, time.monotonic()
    while ledger.dropped < 500 or "usage_store_refuses" not in told:
        for _ in range(25):
            ledger.book(record(f"x-{booked}"))
            booked += 1
        await asyncio.sleep(0.001)
        lag, last = max(lag, time.monotonic() - last), time.monotonic()
    waiting = len(ledger._waiting)
    await asyncio.sleep(1)
    dropped = ledger.dropped
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    deadline = time.monotonic() + 20
    while ledger.queued and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    rows = await database.read("SELECT count(*), count(DISTINCT id) FROM usage")
    totals = await database.read("SELECT sum(requests) FROM totals")
    check = await database.read("PRAGMA integrity_check")
    alive, queued = ledger.alive, ledger.queued
    await end(database, ledger)
    print(json.dumps({"booked": booked, "waiting": waiting, "dropped": dropped, "rows": rows[0][0],
        "distinct": rows[0][1], "totals": totals[0][0], "check": check[0][0], "told": told, "lag": lag, "alive": alive,
        "queued": queued, "unreadable": ledger.unreadable}), flush=True)

def child(what, folder, *rest):
    try:
        if what == "migrate":
            migrate(Path(folder), *rest)
        else:
            uvloop.run(globals()[what](Path(folder), *rest))
    except BaseException as error:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

if sys.argv[1:] and sys.argv[1] == "leave":
    uvloop.run(leave(Path(sys.argv[2])))
    sys.exit()
if sys.argv[1:]:
    child(*sys.argv[1:])
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
for line in sys.stdin:
    order = json.loads(line)
    if order[0] == "wait":
        answer = os.waitstatus_to_exitcode(os.waitpid(order[1], 0)[1])
    else:
        answer = os.fork() or child(*order)
    print(answer, flush=True)
'''


class Children:
    """Processes made on demand, each in the state right after its imports."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILDREN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, *order: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(one) if isinstance(one, Path) else one for one in order]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, what: str, folder: Path, *rest: Any) -> int:
        """Its process id."""
        return self._ask(what, folder, *rest)

    def wait(self, pid: int) -> int:
        """Its exit code, negative for a signal."""
        return self._ask("wait", pid)

    def run(self, what: str, folder: Path, *rest: Any) -> int:
        return self.wait(self.start(what, folder, *rest))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    made = Children()
    yield made
    made.close()


def ids_after_replay(folder: Path) -> list[str]:
    """What is in the database once the next process has started; the totals and the file itself are looked at too."""

    async def work() -> list[str]:
        async with store(folder) as here:
            ids = await here.all_ids()
            assert await here.requests() == len(ids)
            assert await here.database.read("PRAGMA integrity_check") == [("ok",)]
            assert here.database.warnings == []
            return ids

    return run(work())


def test_sixty_kills_lose_nothing_that_was_acknowledged_and_count_nothing_twice(
    tmp_path: Path, children: Children
) -> None:
    chance = random.Random(11)
    for number in range(KILLS):
        pid = children.start("flood", tmp_path, f"c{number}")
        time.sleep(0.02 + chance.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        assert children.wait(pid) == -signal.SIGKILL
        if number % 10 == 9:
            connection = sqlite3.connect(tmp_path / "gproxyd.db")
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            connection.close()
    # What was taken but not yet written down when the kill came may be there as well.
    taken = set((tmp_path / "taken").read_text().split("\n")[:-1])
    ids = ids_after_replay(tmp_path)
    assert len(taken) > 20 * KILLS
    assert taken <= set(ids)
    assert len(ids) == len(set(ids))
    assert len(ids) - len(taken) <= KILLS
    assert os.listdir(tmp_path / "spool") == []


OUTCOMES = {
    "before book": False,
    "after book": True,
    "BEGIN": True,
    "INSERT INTO usage": True,
    "INSERT INTO totals": True,
    "INSERT INTO spool": True,
    "COMMIT": True,
    "after COMMIT": True,
}
"""Where the process dies -> whether the record is there afterwards (once)."""


@pytest.mark.parametrize("point", OUTCOMES)
def test_a_process_that_dies_anywhere_on_the_way_of_a_record(tmp_path: Path, children: Children, point: str) -> None:
    for number in range(2):
        assert children.run("fail", tmp_path, point, f"r{number}") == -signal.SIGKILL
    assert ids_after_replay(tmp_path) == (["r0", "r1"] if OUTCOMES[point] else [])
    assert len(ids_after_replay(tmp_path)) == 2 * OUTCOMES[point]


@pytest.mark.parametrize("point", ["fsync", "DELETE FROM spool"])
def test_a_process_that_dies_while_it_deletes_a_file_it_has_booked(
    tmp_path: Path, children: Children, point: str
) -> None:
    assert children.run("fail", tmp_path, "after book", "r") == -signal.SIGKILL
    assert children.run("retire", tmp_path, point) == -signal.SIGKILL
    assert ids_after_replay(tmp_path) == ["r"]
    assert os.listdir(tmp_path / "spool") == []


def test_a_process_that_ends_without_closing_ends_and_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, "leave", str(tmp_path)], timeout=10, stderr=subprocess.DEVNULL
    )
    assert done.returncode == 0
    assert ids_after_replay(tmp_path) == ["r"]


def test_two_processes_on_one_database_and_one_folder(tmp_path: Path, children: Children) -> None:
    pids = [children.start("flood", tmp_path, name, str(tmp_path / "stop")) for name in ("old", "new", "killed")]
    time.sleep(0.7)
    os.kill(pids[2], signal.SIGKILL)
    time.sleep(0.2)
    (tmp_path / "stop").touch()
    assert [children.wait(pid) for pid in pids] == [0, 0, -signal.SIGKILL]
    taken = set((tmp_path / "taken").read_text().split("\n")[:-1])
    ids = ids_after_replay(tmp_path)
    assert {one.partition("-")[0] for one in taken} == {"old", "new", "killed"}
    assert len(ids) == len(set(ids))
    assert taken <= set(ids)
    assert len(ids) - len(taken) <= 1


OLDER = [["CREATE TABLE a (x)", "INSERT INTO a VALUES (1), (2)"]]
NEWER = [
    *OLDER,
    ["ALTER TABLE a ADD COLUMN y", "UPDATE a SET y = x * 2", "CREATE INDEX a_y ON a (y)"],
    ["CREATE TABLE b AS SELECT y AS z FROM a", "DROP TABLE a"],
]


def dump(path: Path) -> tuple[list[str], int]:
    connection = sqlite3.connect(path)
    try:
        return list(connection.iterdump()), connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("before", "steps"), [(None, None), (OLDER, NEWER), (None, NEWER)], ids=["ours", "next", "both"]
)
def test_a_migration_that_is_killed_at_any_statement_is_finished_by_the_next(
    tmp_path: Path, children: Children, before: Any, steps: Any
) -> None:
    def prepared(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if before:
            assert children.run("migrate", folder, 0, before) == 0
        return folder

    whole = prepared("whole")
    assert children.run("migrate", whole, 0, steps) == 0
    count = int((whole / "count").read_text())
    assert count > 8
    for number in range(1, count + 1):
        folder = prepared(str(number))
        assert children.run("migrate", folder, number, steps) == -signal.SIGKILL
        assert children.run("migrate", folder, 0, steps) == 0
        assert dump(folder / "gproxyd.db") == dump(whole / "gproxyd.db"), number
        shutil.rmtree(folder)
    assert dump(whole / "gproxyd.db")[1] == len(steps or schema.MIGRATIONS)


def test_an_opening_that_is_killed_is_repeated(tmp_path: Path, children: Children) -> None:
    assert children.run("migrate", tmp_path, 9, None) == -signal.SIGKILL

    async def work() -> None:
        database = await Database.open(tmp_path / "gproxyd.db")
        assert await database.read("SELECT count(*) FROM usage") == [(0,)]
        await database.close()

    run(work())


def namespaces() -> bool:
    command = "mount -t tmpfs none /mnt"
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, timeout=10).returncode == 0
    )


@pytest.mark.skipif(not namespaces(), reason="no small disk can be made here (unshare -rm)")
def test_a_full_disk_holds_up_nobody_and_what_had_room_lands_once(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", CHILDREN, "fill", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["waiting"] == 3000
    assert found["dropped"] >= 500
    assert found["queued"] == 0
    assert found["alive"]
    assert found["rows"] == found["distinct"] == found["totals"] == found["booked"] - found["dropped"]
    assert found["check"] == "ok"
    assert found["lag"] < 0.5
    assert sorted(found["told"]) == ["usage_records_dropped", "usage_spool_refuses", "usage_store_refuses"]
