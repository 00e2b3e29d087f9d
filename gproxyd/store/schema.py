"""The tables, and how an older file becomes a newer one.

Invariants: a step that was released never changes, a new one is appended; each runs in one transaction together with
the number it reaches (`PRAGMA user_version`), so a process that is killed anywhere leaves the old schema or the new.
A file of another program is recognised by its `application_id` and left alone.

Times are seconds since the epoch (REAL), days `YYYY-MM-DD` in UTC, money nano-dollars (INTEGER).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from gproxyd.types import UsageRecord

APPLICATION_ID = 0x67707264
"""`gprd`, in the header of every database of ours."""

MOST_TOKENS = 10**12
MOST_NANO = 10**15
"""More than any request has: a million dollars. Sums of bounded numbers cannot overflow in SQLite."""

TOKENS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "reasoning_tokens",
)
"""The token counts of a usage record."""

BOUNDS = {**dict.fromkeys(TOKENS, MOST_TOKENS), "cost_nanousd": MOST_NANO, "status": 999, "attempts": 10**6}
"""The whole numbers of a usage record, and the most each can be; the least is 0."""

FIELDS = UsageRecord._fields

COLUMNS = ", ".join(f'"{name}"' for name in FIELDS)
"""The fields as a list in SQL. Field n of a line in the spool is column n: fields are only ever appended."""

_NUMBERS = {"at": "REAL", "ttft_ms": "REAL", "duration_ms": "REAL", "stream": "INTEGER", "client_gone": "INTEGER"}


def _column(field: str) -> str:
    if field == "id":
        return "id TEXT NOT NULL UNIQUE"
    if field in BOUNDS:
        # A text compares greater than any number, so this refuses it too.
        return f'"{field}" INTEGER CHECK ("{field}" BETWEEN 0 AND {BOUNDS[field]} AND typeof("{field}") <> \'real\')'
    if field == "at":
        return "at REAL NOT NULL CHECK (typeof(at) = 'real')"
    return f'"{field}" {_NUMBERS.get(field, "TEXT")}'


_USAGE = f"CREATE TABLE usage (seq INTEGER PRIMARY KEY, {', '.join(map(_column, FIELDS))})"

_TOTALS = f"""CREATE TABLE totals (
    day TEXT NOT NULL, user TEXT NOT NULL, "key" TEXT NOT NULL, provider TEXT NOT NULL, model TEXT NOT NULL,
    requests INTEGER NOT NULL, errors INTEGER NOT NULL, {", ".join(f"{name} INTEGER NOT NULL" for name in TOKENS)},
    cost_nanousd INTEGER NOT NULL, unpriced INTEGER NOT NULL, last_at REAL NOT NULL,
    PRIMARY KEY (day, user, "key", provider, model)) WITHOUT ROWID"""

MIGRATIONS: Sequence[Sequence[str]] = (
    (
        f"PRAGMA application_id = {APPLICATION_ID}",
        _USAGE,
        "CREATE INDEX usage_at ON usage (at)",
        'CREATE INDEX usage_user_at ON usage ("user", at)',
        _TOTALS,
        "CREATE TABLE spool (segment TEXT PRIMARY KEY, read_to INTEGER NOT NULL) WITHOUT ROWID",
        """CREATE TABLE users (
            name TEXT PRIMARY KEY CHECK (name <> ''), role TEXT NOT NULL, permissions TEXT NOT NULL,
            rate_limits TEXT NOT NULL, quota_nano INTEGER, quota_period TEXT, created_at REAL NOT NULL
            ) WITHOUT ROWID""",
        """CREATE TABLE keys (
            "user" TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE, name TEXT NOT NULL CHECK (name <> ''),
            digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32), enabled INTEGER NOT NULL, expires_at REAL,
            models TEXT, agents TEXT, endpoints TEXT, rate_limits TEXT NOT NULL, budget_nano INTEGER,
            budget_period TEXT, created_at REAL NOT NULL, PRIMARY KEY ("user", name)) WITHOUT ROWID""",
        """CREATE TABLE credits (
            seq INTEGER PRIMARY KEY, account TEXT NOT NULL, at REAL NOT NULL,
            nano INTEGER NOT NULL CHECK (nano > 0))""",
        """CREATE TABLE audit (
            seq INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL, target TEXT NOT NULL,
            detail TEXT NOT NULL)""",
        "CREATE TABLE counters (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
        """CREATE TABLE logs (
            seq INTEGER PRIMARY KEY, request_id TEXT NOT NULL, at REAL NOT NULL, "user" TEXT, "key" TEXT, provider TEXT,
            model TEXT, status INTEGER, envelope TEXT NOT NULL)""",
        "CREATE INDEX logs_request ON logs (request_id)",
        "CREATE INDEX logs_at ON logs (at)",
        """CREATE TABLE log_bodies (
            log INTEGER NOT NULL REFERENCES logs (seq) ON DELETE CASCADE, name TEXT NOT NULL, body BLOB NOT NULL,
            PRIMARY KEY (log, name))""",
    ),
    (
        """CREATE TABLE homes (
            id BLOB PRIMARY KEY CHECK (length(id) = 16), provider TEXT NOT NULL, account TEXT NOT NULL, expires_at REAL
            ) WITHOUT ROWID""",
        "CREATE INDEX homes_expires_at ON homes (expires_at) WHERE expires_at IS NOT NULL",
    ),
)
"""Step n leads from version n to n + 1."""


def migrate(connection: sqlite3.Connection, steps: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Brings the file to the newest version. What an earlier attempt finished is not done again."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    for number in range(version, len(steps)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in (*steps[number], f"PRAGMA user_version = {number + 1}"):
                connection.execute(statement)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
