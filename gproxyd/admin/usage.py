"""What was used: records by page, sums of them, and both as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any

from gproxyd.admin import views
from gproxyd.admin.forms import MAX_PAGE, OwnUsageQuery, UsageQuery
from gproxyd.admin.house import Call, as_list, database_of, page
from gproxyd.errors import Refusal
from gproxyd.store import reports
from gproxyd.store.database import Database
from gproxyd.store.reports import Filters
from gproxyd.types import Answer, UsageRecord

PAGE = 100
"""Records of a page where no limit was given."""

_CURSOR = re.compile(r"-?[0-9.e+]{1,32}:[0-9]{1,18}")

CSV = "text/csv; charset=utf-8"


async def usage(call: Call) -> Answer:
    query: UsageQuery = call.query
    return await answer(database_of(call.house), query, _filters(query, query.user))


async def own_usage(call: Call, user: str) -> Answer:
    """The usage of one user, whatever the query says."""
    return await answer(database_of(call.house), call.query, _filters(call.query, user))


def _filters(query: OwnUsageQuery, user: str | None) -> Filters:
    """A key is named alone, or as the sums name it: "alice/laptop". Then both parts must fit."""
    owner, slash, key = (query.key or "").rpartition("/")
    if slash and user not in (None, owner):
        key = ""  # somebody else's: no key bears that name
    return Filters(
        user=(user or owner) if slash else user,
        key=query.key if not slash else key,
        provider=query.provider,
        model=query.model,
        endpoint=query.endpoint,
        status=query.status,
        since=query.start,
        until=query.end,
    )


async def answer(database: Database, query: OwnUsageQuery, filters: Filters) -> Answer:
    if query.group_by is not None:
        rows = [views.grouped(row) for row in await reports.grouped(database, query.group_by, filters)]
        return _grouped(query, rows)
    if query.cursor is not None and not _CURSOR.fullmatch(query.cursor):
        raise Refusal("invalid_request", "the cursor is none that was given out", param="cursor")
    if query.format == "csv":
        # The first page before the head: a database that refuses is a status, not half a table.
        first = await reports.usage(database, filters, query.cursor, min(query.limit or MAX_PAGE, MAX_PAGE))
        return _table(_all(database, filters, *first, query.limit))
    records, following = await reports.usage(database, filters, query.cursor, query.limit or PAGE)
    return as_list([views.record(one) for one in records], following)


def _grouped(query: OwnUsageQuery, rows: Sequence[Mapping[str, Any]]) -> Answer:
    if query.format == "csv":
        return _table((_line(views.GROUPED) + _lines(rows, views.GROUPED)).encode())
    return page(rows, query.cursor, query.limit or max(len(rows), 1))


def _table(body: bytes | AsyncGenerator[bytes, None]) -> Answer:
    return Answer(200, CSV, body, {"Content-Disposition": 'attachment; filename="usage.csv"'})


async def _all(
    database: Database, filters: Filters, records: list[UsageRecord], cursor: str | None, limit: int | None
) -> AsyncGenerator[bytes, None]:
    """All records, of which a page at a time is held; `limit` or fewer where one was given."""
    yield _line(views.RECORD).encode()
    while True:
        if records:
            yield _lines((views.record(one) for one in records), views.RECORD).encode()
        if cursor is None or limit is not None:
            return
        records, cursor = await reports.usage(database, filters, cursor, MAX_PAGE)


def _lines(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> str:
    return "".join(_line([row[name] for name in names]) for row in rows)


def _line(cells: Sequence[Any]) -> str:
    """RFC 4180."""
    buffer = io.StringIO()
    csv.writer(buffer).writerow([_cell(cell) for cell in cells])
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Clients choose the names of models, and spreadsheets take a text that begins like this for a formula."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
