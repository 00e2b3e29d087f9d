"""The database: one connection that writes and one that reads, each in a thread of its own.

Invariants: a transaction is one step of the writer's thread (BEGIN IMMEDIATE, the work, COMMIT or ROLLBACK), so whoever
awaits it can be cancelled at any time and no transaction is ever left open; the loop never waits for the disk; the file
that was opened is the one that is written, also when another is put into its place.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from gproxyd.store.errors import Conflict, Invalid, NotFound, StoreError, Unavailable
from gproxyd.store.opening import Gate, companion, open_reader, open_writer

__all__ = ["Conflict", "Database", "Invalid", "NotFound", "Row", "StoreError", "Unavailable"]

T = TypeVar("T")

Raw = sqlite3.Connection

Row = tuple[Any, ...]

MAX_PAGE = 1000
"""Rows that a page of any list holds at most."""


class Database:
    """An open database. `warnings` says what had to be done to the file."""

    def __init__(self, path: Path, gate: Gate, connections: tuple[Raw, Raw], warnings: list[str]) -> None:
        self.path = path
        self.wal_path = companion(path, "-wal")
        self.warnings = warnings
        self._gate = gate
        # Opened already: what fails or is cancelled while this library opens it leaves a thread or a file behind.
        self._writer, self._reader = map(_in_a_thread, connections)
        found = os.stat(path)
        self._file = (found.st_dev, found.st_ino)
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Opens the file, makes it where there is none, moves it aside where it is corrupt.

        Raises StoreError if it is of a newer version or not ours, or cannot be used where it lies; Unavailable if it
        is locked.
        """
        opening = asyncio.ensure_future(cls._open(path))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # A connection that nobody got would stay open, and its thread would keep the process from ending.
            with suppress(StoreError):
                await (await opening).close()
            raise

    @classmethod
    async def _open(cls, path: Path) -> Database:
        try:
            database = await asyncio.to_thread(cls._prepared, path)
        except (sqlite3.Error, OSError) as error:
            raise _translated(error, f"cannot use {path}") from error
        await database._writer
        await database._reader
        return database

    @classmethod
    def _prepared(cls, path: Path) -> Database:
        path = path.resolve()  # SQLite puts its other files beside the real one; and the working directory may change
        warnings: list[str] = []
        with ExitStack() as undo:
            gate = Gate(companion(path, "-lock"))
            undo.callback(gate.close)
            writer = open_writer(path, gate, warnings)
            undo.callback(writer.close)
            reader = open_reader(path)
            undo.callback(reader.close)
            database = cls(path, gate, (writer, reader), warnings)
            undo.pop_all()
            return database

    @property
    def wal_bytes(self) -> int:
        """The size of the write-ahead log: it grows for as long as somebody reads in one and the same transaction."""
        try:
            return self.wal_path.stat().st_size
        except OSError:
            return 0

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in a transaction of its own, in the writer's thread: all of it happens or nothing.

        Whoever is cancelled while it waits does not undo what was asked for. Raises Unavailable if the database
        refuses, and whatever `work` raises.
        """
        return await self._run(self._writer, partial(self._transact, work))

    async def look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work`, which only reads, in the reader's thread, on one state of the database."""
        return await self._run(self._reader, partial(_at_one_moment, work))

    async def read(self, sql: str, parameters: Sequence[object] = ()) -> list[Row]:
        """The rows of one query."""
        return await self._run(self._reader, lambda connection: connection.execute(sql, parameters).fetchall())

    async def close(self) -> None:
        """Finishes what was asked for and closes. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        await self._reader.close()  # first, so that the writer is the last and empties the log
        try:
            await _on(self._writer, self._close_writer)
        finally:
            await self._writer.close()
            self._gate.close()

    def _close_writer(self, connection: sqlite3.Connection) -> None:
        try:
            with self._gate:
                connection.close()
        except Unavailable:
            connection.close()  # somebody else is at work and keeps the log

    async def _run(self, connection: aiosqlite.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise Unavailable("the database is closed")
        try:
            return await _on(connection, work)
        except sqlite3.Error as error:
            raise _translated(error, "the database refuses") from error

    def _transact(self, work: Callable[[sqlite3.Connection], T], connection: sqlite3.Connection) -> T:
        with self._gate:
            self._look_for_file()
            if connection.in_transaction:
                connection.execute("ROLLBACK")  # what an earlier ROLLBACK could not do
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

    def _look_for_file(self) -> None:
        """What is written to a file that was moved away or deleted would be lost with it."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise Unavailable(f"the database file is gone ({error.strerror})") from error
        if (found.st_dev, found.st_ino) != self._file:
            raise Unavailable("another file was put into the database's place; a restart opens it")


def _in_a_thread(raw: Raw) -> aiosqlite.Connection:
    connection = aiosqlite.Connection(lambda: raw, 64)
    # A process that ends without `close` is not kept by a thread that waits for work. (Until 0.21 the connection itself
    # was the thread.)
    held: Any = connection
    thread: threading.Thread = getattr(held, "_thread", held)
    thread.daemon = True
    return connection


def _at_one_moment(work: Callable[[sqlite3.Connection], T], connection: sqlite3.Connection) -> T:
    connection.execute("BEGIN")
    try:
        return work(connection)
    finally:
        connection.execute("ROLLBACK")


async def _on(connection: aiosqlite.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """Runs `work` as one step of the connection's thread.

    The library's public calls are a step per statement, between which a cancelled caller leaves its transaction open.
    """
    run: Callable[..., Awaitable[T]] = connection._execute
    return await run(lambda: work(connection._conn))


def _translated(error: sqlite3.Error | OSError, what: str) -> StoreError:
    """SQLite's and the system's errors as ours."""
    if isinstance(error, OSError):
        return StoreError(f"{what}: {error.strerror}")
    return Unavailable(f"{what}: {error}")
