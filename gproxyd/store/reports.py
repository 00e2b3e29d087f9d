"""What was used, by whom, and what it cost.

Invariants: a page is one short read, so no report keeps the write-ahead log from being emptied; cursors are keys, not
counts, so what is booked meanwhile neither repeats nor skips a row; whatever a caller asks for is a parameter of a
statement that is written here.

Times are seconds since the epoch, money nano-dollars. The totals of a day outlive its rows.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from gproxyd.store.database import MAX_PAGE, Database, Row
from gproxyd.store.errors import Invalid
from gproxyd.store.schema import COLUMNS, FIELDS, TOKENS
from gproxyd.types import UsageRecord

DAY = 86_400

By = Literal["user", "key", "provider", "model", "day"]


@dataclass(frozen=True, slots=True)
class Filters:
    """Which records. `since` is part of the range, `until` is not."""

    user: str | None = None
    key: str | None = None
    provider: str | None = None
    model: str | None = None
    endpoint: str | None = None
    status: int | None = None
    since: float | None = None
    until: float | None = None


class Grouped(NamedTuple):
    """The sum of some records. `key` is None for what has none; of keys it is "user/key".

    `unpriced` counts the requests that used tokens whose price is unknown. `cost_nanousd` leaves these out, and is None
    where nothing else cost anything: an unknown price is never 0.
    """

    key: str | None
    requests: int
    errors: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cache_write_1h_tokens: int
    reasoning_tokens: int
    cost_nanousd: int | None
    unpriced: int


EVERYTHING = Filters()

_LAST_DAY = 253_402_300_800.0
"""The end of the year 9999."""

_CURSOR = re.compile(r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e[+-]?[0-9]{1,3})?):([0-9]{1,18})")

_SAME = ("user", "key", "provider", "model", "endpoint", "status")
_BOOLEANS = (FIELDS.index("stream"), FIELDS.index("client_gone"))

_GROUPS: dict[str, str] = {
    "user": "nullif(\"user\", '')",
    "key": "nullif(coalesce(\"user\", '') || '/' || coalesce(\"key\", ''), '/')",
    "provider": "nullif(provider, '')",
    "model": "nullif(model, '')",
    "day": "day",
}
_SUMS = (*TOKENS, "cost_nanousd")
_FROM_TOTALS = ", ".join(f"coalesce(sum({name}), 0)" for name in ("requests", "errors", *_SUMS, "unpriced"))
_FROM_ROWS = (
    "count(*), coalesce(sum(status >= 400), 0), "
    + ", ".join(f"coalesce(sum({name}), 0)" for name in _SUMS)
    + ", coalesce(sum(cost_nanousd IS NULL AND coalesce(input_tokens, output_tokens) IS NOT NULL), 0)"
)


async def usage(
    database: Database, filters: Filters = EVERYTHING, cursor: str | None = None, limit: int = 100
) -> tuple[list[UsageRecord], str | None]:
    """One page of records, newest first, and the cursor of the next one. Raises Invalid for a broken cursor."""
    limit = min(max(limit, 1), MAX_PAGE)
    where, values = _where(filters, "at", float)
    if cursor is not None:
        where.append("(at, seq) < (?, ?)")
        values.extend(_position(cursor))
    rows = await database.read(
        f"SELECT seq, {COLUMNS} FROM usage {_all(where)} ORDER BY at DESC, seq DESC LIMIT ?",  # noqa: S608
        (*values, limit + 1),
    )
    following = None
    if len(rows) > limit:
        rows.pop()
        following = f"{rows[-1][1 + FIELDS.index('at')]!r}:{rows[-1][0]}"
    return [_record(row[1:]) for row in rows], following


async def each(database: Database, filters: Filters = EVERYTHING, page: int = MAX_PAGE) -> AsyncIterator[UsageRecord]:
    """Every record, newest first, however many: a page at a time is held."""
    cursor = None
    while True:
        records, cursor = await usage(database, filters, cursor, page)
        for record in records:
            yield record
        if cursor is None:
            return


async def grouped(database: Database, by: By, filters: Filters = EVERYTHING) -> list[Grouped]:
    """Sums by user, key, provider, model or day; the dearest first (what is unknown costs least), days in their order.

    Whole days (UTC) without an endpoint or a status come from the totals, which outlive the records.
    """
    if by not in _GROUPS:
        raise Invalid("usage is grouped by user, key, provider, model or day")
    if filters.endpoint is None and filters.status is None and _is_day(filters.since) and _is_day(filters.until):
        table, sums, group = "totals", _FROM_TOTALS, _GROUPS[by]
        where, values = _where(filters, "day", _day)
    else:
        table, sums, group = "usage", _FROM_ROWS, _GROUPS[by].replace("day", "date(at, 'unixepoch')")
        where, values = _where(filters, "at", float)
    order = "1" if by == "day" else f"{1 + Grouped._fields.index('cost_nanousd')} DESC, 2 DESC, 1"
    rows = await database.read(
        f"SELECT {group}, {sums} FROM {table} {_all(where)} GROUP BY 1 ORDER BY {order}",  # noqa: S608
        values,
    )
    return [_known(Grouped(*row)) for row in rows]


def _known(sums: Grouped) -> Grouped:
    """The totals of a day do not tell an answer that is free from a request that was refused; beside what is unpriced,
    neither makes a sum."""
    return sums._replace(cost_nanousd=None) if sums.unpriced and not sums.cost_nanousd else sums


async def spent(database: Database, since_day: str | None = None) -> dict[tuple[str, str], int]:
    """What has been spent since the beginning of a day ("2027-01-31", UTC), or ever: nano-dollars by ("user", NAME)
    and ("key", "NAME/KEY")."""
    rows = await database.read(
        'SELECT "user", "key", sum(cost_nanousd) FROM totals WHERE day >= ? AND "user" <> \'\' GROUP BY 1, 2',
        (since_day or "",),
    )
    amounts: dict[tuple[str, str], int] = {}
    for user, key, nano in rows:
        amounts["user", user] = amounts.get(("user", user), 0) + nano
        if key:
            amounts["key", f"{user}/{key}"] = nano
    return amounts


async def last_used(database: Database) -> dict[str, float]:
    """When each key ("NAME/KEY") was last used."""
    rows = await database.read(
        """SELECT "user" || '/' || "key", max(last_at) FROM totals WHERE "user" <> '' AND "key" <> '' GROUP BY 1"""
    )
    return dict(rows)


async def prune(database: Database, before: float, at_a_time: int = MAX_PAGE) -> int:
    """Deletes the records from before a moment, little by little, and says how many. The totals stay."""
    sql = "DELETE FROM usage WHERE seq IN (SELECT seq FROM usage WHERE at < ? ORDER BY at LIMIT ?)"
    return await delete_in_turns(database, sql, before, at_a_time)


async def delete_in_turns(database: Database, sql: str, before: float, at_a_time: int) -> int:
    """Runs a statement that deletes at most so many rows until none is left, letting others write in between."""
    count = 0
    while True:
        deleted = await database.write(lambda connection: connection.execute(sql, (before, at_a_time)).rowcount)
        count += deleted
        if deleted < at_a_time:
            return count


def _where(filters: Filters, time: str, moment: Callable[[float], object]) -> tuple[list[str], list[object]]:
    """Conditions and their values; `time` is the column that `since` and `until` speak of."""
    asked: tuple[tuple[str, object], ...] = (
        *((f'"{name}" = ?', getattr(filters, name)) for name in _SAME),
        (f"{time} >= ?", None if filters.since is None else moment(filters.since)),
        (f"{time} < ?", None if filters.until is None else moment(filters.until)),
    )
    return [text for text, value in asked if value is not None], [value for _, value in asked if value is not None]


def _all(conditions: list[str]) -> str:
    return f"WHERE {' AND '.join(conditions)}" if conditions else ""


def _is_day(moment: float | None) -> bool:
    return moment is None or (moment % DAY == 0 and 0 <= moment < _LAST_DAY)


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")


def _position(cursor: str) -> tuple[float, int]:
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise Invalid("the cursor is none that was given out")
    return float(match[1]), int(match[2])


def _record(row: Row) -> UsageRecord:
    fields = list(row)
    for index in _BOOLEANS:
        fields[index] = bool(fields[index])
    return UsageRecord(*fields)
