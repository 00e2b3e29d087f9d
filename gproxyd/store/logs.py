"""Envelopes of requests, for those who ask for them.

Invariants: whoever puts an envelope never waits; what waits is bounded in number and in bytes, and what is dropped is
counted. Unlike the ledger this may lose its last moments with the process.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from gproxyd.store.database import MAX_PAGE, Database, Row
from gproxyd.store.errors import Unavailable
from gproxyd.store.gathering import Gatherer
from gproxyd.store.ledger import Warn
from gproxyd.store.people import seq_of
from gproxyd.store.reports import delete_in_turns

MOST_WAITING = 2_000
MOST_BYTES = 32 * 2**20
BATCH = 100

_COLUMNS = ("request_id", "at", "user", "key", "provider", "model", "status")
_SHOWN = ", ".join(f'"{name}"' for name in _COLUMNS)
_MARKS = ", ".join("?" * len(_COLUMNS))
_INSERT = f"INSERT INTO logs ({_SHOWN}, envelope) VALUES ({_MARKS}, ?)"  # noqa: S608


@dataclass(frozen=True, slots=True)
class _Entry:
    columns: tuple[Any, ...]
    envelope: str
    bodies: tuple[tuple[str, bytes], ...]

    @property
    def size(self) -> int:
        return len(self.envelope) + sum(len(body) for _, body in self.bodies)


class RequestLog(Gatherer):
    """Takes envelopes: `request_id`, `at`, `user`, `key`, `provider`, `model`, `status`, and whatever else is to be
    kept of a request; values that are bytes are kept as bodies.

    queued   envelopes that are not in the database yet
    written  envelopes that the database got
    dropped  envelopes that are lost
    """

    REFUSED = "request_log_refused"
    DROPPED = "request_log_dropped"

    def __init__(self, database: Database, warn: Warn) -> None:
        super().__init__(database, warn)
        self._waiting: deque[_Entry] = deque()
        self._bytes = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def put(self, envelope: Mapping[str, Any]) -> None:
        """Queues one envelope, which must not change afterwards."""
        try:
            entry = _entry(envelope)
        except TypeError:
            self.dropped += 1  # not JSON
            return
        if len(self._waiting) >= MOST_WAITING or self._bytes + entry.size > MOST_BYTES:
            self.dropped += 1
            return
        self._waiting.append(entry)
        self._bytes += entry.size
        self._woken()

    async def _write_waiting(self) -> None:
        while self._waiting:
            entries = [self._waiting.popleft() for _ in range(min(len(self._waiting), BATCH))]
            try:
                await self._database.write(partial(_insert, entries=entries))
            except Unavailable:
                self._waiting.extendleft(reversed(entries))
                raise
            self._bytes -= sum(entry.size for entry in entries)
            self.written += len(entries)

    async def find(self, request_id: str) -> dict[str, Any] | None:
        """The newest envelope of that id, with its bodies; None if there is none."""
        return await self._database.look(partial(_find, request_id=request_id))

    async def list(
        self, cursor: str | None = None, limit: int = 100, *, user: str | None = None, status: int | None = None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """One page without envelopes and bodies, newest first, and the cursor of the next one. Raises Invalid."""
        limit = min(max(limit, 1), MAX_PAGE)
        rows = await self._database.read(
            f'SELECT seq, {_SHOWN} FROM logs WHERE seq < ? AND (? IS NULL OR "user" = ?) '  # noqa: S608
            "AND (? IS NULL OR status = ?) ORDER BY seq DESC LIMIT ?",
            (seq_of(cursor), user, user, status, status, limit + 1),
        )
        following = str(rows[limit - 1][0]) if len(rows) > limit else None
        return [dict(zip(_COLUMNS, row[1:], strict=True)) for row in rows[:limit]], following

    async def prune(self, before: float) -> int:
        """Deletes what is older than a moment, little by little, and says how many."""
        sql = "DELETE FROM logs WHERE seq IN (SELECT seq FROM logs WHERE at < ? ORDER BY at LIMIT ?)"
        return await delete_in_turns(self._database, sql, before, BATCH)


def _entry(envelope: Mapping[str, Any]) -> _Entry:
    rest = {name: value for name, value in envelope.items() if name not in _COLUMNS}
    bodies = tuple((name, rest.pop(name)) for name in list(rest) if isinstance(rest[name], bytes))
    return _Entry(tuple(envelope.get(name) for name in _COLUMNS), orjson.dumps(rest).decode(), bodies)


def _insert(connection: sqlite3.Connection, entries: list[_Entry]) -> None:
    for entry in entries:
        log = connection.execute(_INSERT, (*entry.columns, entry.envelope)).lastrowid
        connection.executemany("INSERT INTO log_bodies VALUES (?, ?, ?)", [(log, *body) for body in entry.bodies])


def _find(connection: sqlite3.Connection, request_id: str) -> dict[str, Any] | None:
    row: Row | None = connection.execute(
        f"SELECT seq, envelope, {_SHOWN} FROM logs WHERE request_id = ? ORDER BY seq DESC LIMIT 1",  # noqa: S608
        (request_id,),
    ).fetchone()
    if row is None:
        return None
    seq, envelope, *columns = row
    bodies = connection.execute("SELECT name, body FROM log_bodies WHERE log = ?", (seq,)).fetchall()
    return {**dict(zip(_COLUMNS, columns, strict=True)), **orjson.loads(envelope), **dict(bodies)}
