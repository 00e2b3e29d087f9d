"""What these rooms need of the daemon, and what a handler is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import orjson

from gproxyd.admin.feed import Subscription
from gproxyd.config import Config
from gproxyd.errors import Refusal
from gproxyd.policy.limits import Limiter
from gproxyd.policy.quotas import Quotas
from gproxyd.store.database import Database
from gproxyd.store.logs import RequestLog
from gproxyd.store.people import StoredUser
from gproxyd.types import Answer, Question

JSON = "application/json"


class House(Protocol):
    """The daemon, as far as it is administered.

    database  None where there is none
    logs      None where no envelopes are kept
    config    the running configuration
    stored    the people of the database, as they were last loaded
    """

    @property
    def database(self) -> Database | None: ...

    @property
    def logs(self) -> RequestLog | None: ...

    @property
    def quotas(self) -> Quotas: ...

    @property
    def limiter(self) -> Limiter: ...

    @property
    def config(self) -> Config: ...

    @property
    def stored(self) -> Mapping[str, StoredUser]: ...

    async def people_changed(self) -> None:
        """Reads the people of the database again. When it returns, `stored` and the table of keys are the new ones.

        Credits are not among it: whoever tops up adds them to the account. Raises StoreError.
        """

    async def reload(self) -> Sequence[str]:
        """Reads the configuration again. Returns its problems; if there are any, the running one stays."""

    def providers(self) -> Sequence[Mapping[str, Any]]: ...

    def models(self) -> Sequence[Mapping[str, Any]]: ...

    async def refresh_models(self) -> Mapping[str, Any]: ...

    def explain(self, model: str, user: str | None, endpoint: str | None) -> Mapping[str, Any]: ...

    def subscribe(self) -> Subscription:
        """Raises Refusal (503) where too many listen already."""


class Call(NamedTuple):
    """One request to a handler: what stood in the path at the places of the pattern, the parameters and the body."""

    house: House
    question: Question
    names: tuple[str, ...]
    query: Any
    body: Any


Handler = Callable[[Call], Awaitable[Answer]]


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, JSON, orjson.dumps(value))


def as_list(rows: Sequence[Any], following: str | None = None) -> Answer:
    return as_json({"data": rows, "next": following})


def page(rows: Sequence[Any], cursor: str | None, limit: int) -> Answer:
    """A page of a list that is held whole; the cursor is the place in it."""
    start = place(cursor)
    end = start + limit
    return as_list(rows[start:end], str(end) if end < len(rows) else None)


def place(cursor: str | None) -> int:
    """Raises Refusal (400)."""
    if cursor is None:
        return 0
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
        raise Refusal("invalid_request", "the cursor is none that was given out", param="cursor")
    return int(cursor)


def database_of(house: House) -> Database:
    """Raises Refusal (503)."""
    if house.database is None:
        raise Refusal("overloaded", "there is no database at the moment, so this can be neither read nor changed")
    return house.database
