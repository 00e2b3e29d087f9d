"""Envelopes of requests, and the audit trail."""

from __future__ import annotations

import base64
from typing import Any

from gproxyd.admin import views
from gproxyd.admin.house import Call, as_json, as_list, database_of
from gproxyd.errors import Refusal
from gproxyd.store import people
from gproxyd.types import Answer


async def list_requests(call: Call) -> Answer:
    """Without envelopes and bodies; empty where none are kept."""
    database_of(call.house)
    if call.house.logs is None:
        return as_list([])
    query = call.query
    rows, following = await call.house.logs.list(query.cursor, query.limit, user=query.user, status=query.status)
    return as_list([_shown(row) for row in rows], following)


async def show_request(call: Call) -> Answer:
    database_of(call.house)
    found = None if call.house.logs is None else await call.house.logs.find(call.names[0])
    if found is None:
        raise Refusal("not_found", "no envelope of that request is kept; `records` in the configuration says what is")
    return as_json(_shown(found))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _body(value) for name, value in row.items()} | {"at": views.moment(row["at"])}


def _body(value: Any) -> Any:
    """A body as text, or in base64 where it is none."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode("ascii")}


async def audit(call: Call) -> Answer:
    lines, following = await people.audit(database_of(call.house), call.query.cursor, call.query.limit)
    return as_list([views.audit(line) for line in lines], following)
