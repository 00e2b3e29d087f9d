"""The ledger: one record per request, never lost and never in the way.

Invariants: `book` returns with the record in the spool, where a kill cannot reach it (a power cut takes what the system
had not yet put on disk), and neither waits, raises nor asks the database; what the disk refuses waits in memory,
bounded and counted; one writer task moves everything into the database, and whatever it has not moved is moved by the
next process that finds it. Memory stays bounded however long the database is away: the spool file is the queue.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from orjson import OPT_APPEND_NEWLINE as _NEWLINE
from orjson import dumps

from gproxyd.store.booking import BATCH, Step, book_lines, book_segment, forget_segments, plain, retire_segment
from gproxyd.store.database import Database, Unavailable
from gproxyd.store.spool import Segment, Spool

MOST_WAITING = 10_000
"""Records that wait in memory while the disk takes none."""

LONGEST_LINE = 16 * 1024

GATHER = 0.1
"""Seconds for which records are gathered before they are moved."""

IDLE = 30.0
"""Seconds after which an idle writer looks for what dead processes left."""

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between tries while the database refuses."""

PATIENCE = 5.0
"""Seconds without progress after which a start goes on without the rest."""

RESTART = 0.5
"""Seconds after which a writer that died begins again."""

ALARM_EVERY = 60.0

WAL_ALARM = 128 * 2**20
"""Bytes of write-ahead log that mean that some reader keeps it from being emptied."""

T = TypeVar("T")

Warn = Callable[..., None]
"""(event, fields by name): a line in the log."""


class Alarms:
    """Says each thing at most once a minute."""

    def __init__(self, warn: Warn) -> None:
        self._warn = warn
        self._told: dict[str, float] = {}

    def __call__(self, event: str, **fields: Any) -> bool:
        """Whether it was said."""
        now = time.monotonic()
        if now - self._told.get(event, -ALARM_EVERY) < ALARM_EVERY:
            return False
        self._told[event] = now
        self._warn(event, **fields)
        return True


class Ledger:
    """Takes a record of every request.

    queued      records that are not in the database yet (this process's own)
    written     rows that the database got
    dropped     records that are lost: neither disk nor memory had room
    unreadable  lines that were torn by a power cut or a kill, and are no records
    """

    def __init__(self, database: Database | None, folder: Path, warn: Warn) -> None:
        self._database = database
        self._folder = folder
        self._spool = Spool(folder)
        self._warn = warn
        self._alarm = Alarms(warn)
        self._waiting: deque[bytes] = deque()
        self._together: list[bytes] | None = None
        self._wake = asyncio.Event()
        self._woken = False
        self._caught_up = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._next_look = 0.0
        self._steps = 0
        self._told_dropped = 0
        self.queued = 0
        self.written = 0
        self.dropped = 0
        self.unreadable = 0

    @property
    def alive(self) -> bool:
        """Whether the writer is at work."""
        return self._task is not None and not self._task.done()

    def book(self, record: Sequence[Any]) -> None:
        """Writes down a record, the fields of a UsageRecord, on the event loop's thread.

        Waits for nothing but the system call; never raises.
        """
        try:
            line = dumps(record[:], None, _NEWLINE)  # the slice is a plain tuple, which orjson takes
            if len(line) > LONGEST_LINE:
                line = dumps(plain(record), None, _NEWLINE)
        except TypeError:
            line = dumps(plain(record), None, _NEWLINE)
        self.queued += 1
        if self._together is not None:
            self._together.append(line)
            return
        self._append(line)

    def together(self) -> None:
        """Records that are booked from now on go to the spool with one write, when `commit` is called: in the same turn
        of the loop, and before anybody is told what they are about."""
        self._together = []

    def commit(self) -> None:
        lines, self._together = self._together, None
        if not lines:
            return
        try:
            self._spool.append(b"".join(lines))
        except OSError:
            for line in lines:  # some of them may fit
                self._append(line)
        else:
            self._wake_writer()

    def _append(self, line: bytes) -> None:
        try:
            self._spool.append(line)
        except OSError:
            self._hold(line)
        self._wake_writer()

    def _wake_writer(self) -> None:
        if not self._woken:
            self._woken = True
            self._wake.set()

    def _hold(self, line: bytes) -> None:
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(line)
        else:
            self.dropped += 1
            self.queued -= 1

    async def start(self) -> None:
        """Begins, and moves what dead processes left into the database, so that totals read afterwards are whole.

        Returns without it if the database refuses for a while: the writer goes on with it.
        """
        self._open_spool()
        self._wake.set()
        self._begin()
        steps, since = self._steps, time.monotonic()
        while self._database and not self._caught_up.is_set() and time.monotonic() - since < PATIENCE:
            await self._rest(self._caught_up, 0.1)
            if steps != self._steps:
                steps, since = self._steps, time.monotonic()

    async def stop(self, deadline: float = 5.0) -> None:
        """Moves what is left, for `deadline` seconds at most; the rest waits on disk for the next process."""
        self._stopping.set()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=deadline)
            self._task.cancel()
            await asyncio.wait((self._task,))
        self._to_spool()
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._tell_dropped()
        try:
            self._spool.close()
        except OSError as error:
            self._warn("usage_spool_refuses", error=str(error.strerror))

    def _begin(self) -> None:
        if not self._stopping.is_set():
            self._task = asyncio.get_running_loop().create_task(self._write_all())
            self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A writer that dies is told of and begins again; nothing is lost by it."""
        error = None if task.cancelled() else task.exception()
        if not self._stopping.is_set():
            self._warn("usage_writer_died", error=type(error).__name__ if error else "cancelled")
            self._wake.set()
            asyncio.get_running_loop().call_later(RESTART, self._begin)

    async def _write_all(self) -> None:
        pause = FIRST_PAUSE
        while True:
            await self._rest(self._wake, IDLE)
            if self._caught_up.is_set():
                await self._rest(self._stopping, GATHER)
            self._woken = False  # before the files are read: whoever comes later wakes anew
            self._wake.clear()
            try:
                await self._move_all()
            except Unavailable as error:
                self._alarm("usage_store_refuses", error=str(error), queued=self.queued)
                # Who stops gives it a deadline, within which it is worth trying more often.
                await self._rest(self._stopping, pause)
                await asyncio.sleep(FIRST_PAUSE)
                pause = min(2 * pause, LONGEST_PAUSE)
                self._wake.set()
                continue
            pause = FIRST_PAUSE
            self._caught_up.set()
            if self._stopping.is_set():
                return

    @staticmethod
    async def _rest(until: asyncio.Event, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await until.wait()
        except TimeoutError:
            return

    async def _move_all(self) -> None:
        """Until nothing is left. Raises Unavailable."""
        self._open_spool()
        self._to_spool()
        self._tell_dropped()
        while self._waiting:
            await self._book_waiting()
        more = time.monotonic() >= self._next_look and self._adopt()
        await self._move_segments()
        while more:  # so many at a time
            more = self._adopt()
            await self._move_segments()
        if not self._caught_up.is_set():
            await self._write(partial(forget_segments, folder=self._folder))
        if self._database is not None and (size := self._database.wal_bytes) > WAL_ALARM:
            self._alarm("database_log_large", bytes=size, help="somebody reads in a transaction that does not end")

    async def _move_segments(self) -> None:
        for segment in tuple(self._spool.segments):
            try:
                await self._move(segment)
            except FileNotFoundError:
                self._gone(segment)
            except OSError as error:
                self._alarm("usage_spool_unreadable", file=segment.path.name, error=str(error.strerror))

    async def _move(self, segment: Segment) -> None:
        while True:
            growing = segment is self._spool.current
            if growing and segment.read_to == self._spool.size:
                return
            step = await self._write(partial(book_segment, path=segment.path, read_to=segment.read_to, growing=growing))
            segment.read_to = step.read_to
            self._count(step, own=self._spool.is_own(segment))
            if step.ended:
                await self._write(partial(retire_segment, path=segment.path, wal=self._wal()))
                self._spool.retire(segment)
                return
            if growing and not step.lines:
                return  # a torn part, until the next line ends it

    async def _book_waiting(self) -> None:
        """What the disk does not take goes straight into the database, which may lie on another one."""
        lines = [line.rstrip(b"\n") for line in islice(self._waiting, BATCH)]
        inserted, unreadable = await self._write(partial(book_lines, lines=lines))
        for _ in lines:
            self._waiting.popleft()
        self._count(Step(0, len(lines), inserted, unreadable, False), own=True)

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._database is None:
            raise Unavailable("there is no database")
        return await self._database.write(work)

    def _wal(self) -> Path:
        assert self._database is not None
        return self._database.wal_path

    def _count(self, step: Step, *, own: bool) -> None:
        self._steps += 1
        self.written += step.inserted
        self.unreadable += step.unreadable
        if own:
            self.queued = max(0, self.queued - step.lines + step.unreadable)
        if step.unreadable:
            self._alarm("usage_lines_unreadable", count=self.unreadable)

    def _gone(self, segment: Segment) -> None:
        """Somebody deleted the file."""
        self._alarm("usage_spool_deleted", file=segment.path.name)
        if segment is not self._spool.current:
            self._spool.retire(segment)
            return
        try:
            self._spool.begin_anew()
        except OSError as error:
            self._alarm("usage_spool_refuses", error=str(error.strerror))
        self._wake.set()

    def _open_spool(self) -> None:
        try:
            self._spool.open()
        except OSError as error:
            self._alarm("usage_spool_refuses", error=str(error.strerror), waiting=len(self._waiting))

    def _adopt(self) -> bool:
        """Whether dead processes left something."""
        self._next_look = time.monotonic() + IDLE
        try:
            return bool(self._spool.adopt())
        except OSError as error:
            self._alarm("usage_spool_unreadable", file=self._folder.name, error=str(error.strerror))
            return False

    def _to_spool(self) -> None:
        """What waits in memory goes to disk as soon as the disk takes it."""
        try:
            while self._waiting:
                self._spool.append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._alarm("usage_spool_refuses", error=str(error.strerror), waiting=len(self._waiting))

    def _tell_dropped(self) -> None:
        if self.dropped > self._told_dropped and self._alarm("usage_records_dropped", count=self.dropped):
            self._told_dropped = self.dropped
