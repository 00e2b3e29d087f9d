"""Records into the tables, each counted once.

Invariants: the rows, the day totals they add to and the place in the file up to which it was read are one transaction;
an id that is there already adds nothing; the totals grow by what the table `usage` really got. Runs in the writer's
thread, within its transaction.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import orjson

from gproxyd.store.schema import BOUNDS, COLUMNS, FIELDS, TOKENS
from gproxyd.store.spool import read_lines

BATCH = 500
"""Rows per transaction, at most."""

_MOST_TEXT = 512

AT_ONCE = 125
"""Rows per statement. The interpreter's lock is given up and taken again around every step of a statement, and a loop
that is busy with requests pays for each change of hands: more than the row itself costs."""

_MARKS = f"({', '.join('?' * len(FIELDS))})"

_SUMMED = (*TOKENS, "cost_nanousd")
_COUNTED = ("requests", "errors", *_SUMMED, "unpriced")
_SUMS = ", ".join(f"coalesce(sum({name}), 0)" for name in _SUMMED)
_ADDED = ", ".join(f"{name} = {name} + excluded.{name}" for name in _COUNTED)

# Unpriced is what used tokens and has no price; a request that was refused costs nothing and lacks none.
_ADD_UP = f"""
    INSERT INTO totals
    SELECT date(at, 'unixepoch'), coalesce("user", ''), coalesce("key", ''), coalesce(provider, ''),
           coalesce(model, ''), count(*), coalesce(sum(status >= 400), 0), {_SUMS},
           sum(cost_nanousd IS NULL AND coalesce(input_tokens, output_tokens) IS NOT NULL), max(at)
    FROM usage WHERE seq > ? GROUP BY 1, 2, 3, 4, 5
    ON CONFLICT (day, "user", "key", provider, model) DO UPDATE SET {_ADDED}, last_at = max(last_at, excluded.last_at)
"""  # noqa: S608

_ADD_GROUP = f"""
    INSERT INTO totals VALUES ({", ".join("?" * (5 + len(_COUNTED) + 1))})
    ON CONFLICT (day, "user", "key", provider, model) DO UPDATE SET {_ADDED}, last_at = max(last_at, excluded.last_at)
"""  # noqa: S608

_BY = itemgetter(*(FIELDS.index(name) for name in ("user", "key", "provider", "model")))
_AT, _STATUS, _COST, _IN, _OUT = (
    FIELDS.index(name) for name in ("at", "status", "cost_nanousd", "input_tokens", "output_tokens")
)
_SUMMED_AT = tuple(FIELDS.index(name) for name in _SUMMED)
_DAY = 86_400

_REMEMBER = "INSERT INTO spool VALUES (?, ?) ON CONFLICT (segment) DO UPDATE SET read_to = excluded.read_to"


@dataclass(frozen=True, slots=True)
class Step:
    """What one transaction did. `read_to` is where the file was left, `ended` that nothing more can come of it."""

    read_to: int
    lines: int
    inserted: int
    unreadable: int
    ended: bool


def book_segment(connection: sqlite3.Connection, path: Path, read_to: int | None, *, growing: bool) -> Step:
    """Books the next lines of a file. `growing` says that its process still writes to it. Raises OSError."""
    if read_to is None:
        known = connection.execute("SELECT read_to FROM spool WHERE segment = ?", (path.name,)).fetchone()
        read_to = int(known[0]) if known else 0
    lines, end, more = read_lines(path, read_to, BATCH)
    inserted, unreadable = book_lines(connection, lines) if lines else (0, 0)
    if lines:
        connection.execute(_REMEMBER, (path.name, end))
    # What is left of a dead process's file without a line end was torn off in the middle.
    torn = more and not lines and not growing
    return Step(end, len(lines), inserted, unreadable + torn, ended=not growing and (torn or not more))


def retire_segment(connection: sqlite3.Connection, path: Path, wal: Path) -> None:
    """Deletes a file that is in the database as a whole. Raises OSError.

    A commit in this mode reaches the disk at the next checkpoint; the log is made safe first, lest a power cut took
    both it and the file.
    """
    try:
        descriptor = os.open(wal, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        pass  # there is no log, so all of it is in the database file
    else:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    path.unlink(missing_ok=True)
    connection.execute("DELETE FROM spool WHERE segment = ?", (path.name,))


def forget_segments(connection: sqlite3.Connection, folder: Path) -> None:
    """Forgets files that are gone."""
    for (name,) in connection.execute("SELECT segment FROM spool").fetchall():
        if not (folder / name).exists():
            connection.execute("DELETE FROM spool WHERE segment = ?", (name,))


def book_lines(connection: sqlite3.Connection, lines: Sequence[bytes]) -> tuple[int, int]:
    """(rows that were new, lines that are no records). Raises sqlite3.Error."""
    (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM usage").fetchone()
    unreadable, sums = 0, None
    try:
        rows = orjson.loads(b"[" + b",".join(lines) + b"]")
        if _insert(connection, rows) == len(rows):
            sums = _sums(rows)
    except (
        orjson.JSONDecodeError,
        sqlite3.IntegrityError,
        sqlite3.ProgrammingError,
        OverflowError,
        TypeError,
        ValueError,
    ):
        # Some line is torn, or holds what the table refuses; those before it are in already, and count once.
        rows = [row for line in lines if (row := _mended(line)) is not None]
        unreadable = len(lines) - len(rows)
        _insert(connection, rows)
    if sums is not None:
        connection.executemany(_ADD_GROUP, sums)
        return len(rows), 0
    connection.execute(_ADD_UP, (last,))
    (inserted,) = connection.execute("SELECT count(*) FROM usage WHERE seq > ?", (last,)).fetchone()
    return inserted, unreadable


def _sums(rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]] | None:
    """What rows that are all new add to the totals of their day; None if they are of several. `_ADD_UP` comes to the
    same, but reads them back and sorts them, which costs nearly as much as booking them."""
    columns = list(zip(*rows, strict=True))
    day = int(min(columns[_AT]) // _DAY)
    if max(columns[_AT]) >= (day + 1) * _DAY:
        return None
    groups: dict[tuple[Any, ...], list[Sequence[Any]]] = {}
    for row, key in zip(rows, map(_BY, rows), strict=True):
        groups.setdefault(key, []).append(row)
    name = time.strftime("%Y-%m-%d", time.gmtime(day * _DAY))
    sums = []
    for key, alike in groups.items():
        told = columns if len(groups) == 1 else list(zip(*alike, strict=True))
        unpriced = sum(
            cost is None and not (read is None and written is None)
            for cost, read, written in zip(told[_COST], told[_IN], told[_OUT], strict=True)
        )
        errors = sum(status is not None and status >= 400 for status in told[_STATUS])
        counted = (len(alike), errors, *(sum(filter(None, told[place])) for place in _SUMMED_AT), unpriced)
        sums.append((name, *("" if part is None else part for part in key), *counted, max(told[_AT])))
    return sums


def _insert(connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> int:
    """Rows that are not there yet, as few statements as may be; returns how many those were. Raises ValueError for one
    that is no record."""
    if any(len(row) != len(FIELDS) for row in rows):
        raise ValueError("a record has another number of fields")
    done = inserted = 0
    for size in (AT_ONCE, 25, 5, 1):  # few sizes, so that few statements are prepared
        while len(rows) - done >= size:
            values = tuple(chain.from_iterable(rows[done : done + size]))
            inserted += connection.execute(_statement(size), values).rowcount
            done += size
    return inserted


@cache
def _statement(rows: int) -> str:
    return f"INSERT INTO usage ({COLUMNS}) VALUES {', '.join([_MARKS] * rows)} ON CONFLICT (id) DO NOTHING"  # noqa: S608


def _mended(line: bytes) -> list[Any] | None:
    """A record that the table takes; None for a line that is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, list) or not row or not isinstance(row[0], str) or not row[0]:
        return None
    # Another version may have known fewer fields, or more: they only ever grow at the end.
    row = (row + [None] * len(FIELDS))[: len(FIELDS)]
    return list(plain(row))


def plain(record: Sequence[object]) -> tuple[Any, ...]:
    """The fields of a record as what can be written and stored: bounded numbers, text that is text."""
    return tuple(_plain_field(name, value) for name, value in zip(FIELDS, record, strict=True))


def _plain_field(name: str, value: object) -> object:
    if name in BOUNDS:
        whole = int(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else None
        return None if whole is None else min(max(whole, 0), BOUNDS[name])
    if name in ("stream", "client_gone"):
        return bool(value)
    if name in ("at", "ttft_ms", "duration_ms"):
        number = float(value) if isinstance(value, int | float) and abs(value) < 1e15 else None
        return 0.0 if number is None and name == "at" else number
    return None if value is None else str(value)[:_MOST_TEXT].encode("utf-8", "replace").decode()
