"""Users and keys made through the admin API, their credits, the audit trail, and saved counters.

Invariants: a change and its line in the audit trail are one transaction; of a key only the SHA-256 is kept, and that is
in no audit line and no `repr`; a name that is empty matches nothing. What a deleted user has used stays in the ledger,
credits go with their account.

Times are seconds since the epoch, money nano-dollars.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import orjson

from gproxyd.store.database import MAX_PAGE, Database
from gproxyd.store.errors import Conflict, Invalid, NotFound

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key. Lists that are None narrow nothing; `budget_period` is None (ever), "day" or "month"."""

    name: str
    digest: bytes = field(repr=False)
    enabled: bool = True
    expires_at: float | None = None
    models: tuple[str, ...] | None = None
    agents: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] | None = None
    rate_limits: tuple[Json, ...] = ()
    budget_nano: int | None = None
    budget_period: str | None = None
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class StoredUser:
    """A user. `quota_period` is None (ever), "day" or "month"; `keys` by name."""

    name: str
    role: str = "user"
    permissions: tuple[str, ...] = ()
    rate_limits: tuple[Json, ...] = ()
    quota_nano: int | None = None
    quota_period: str | None = None
    created_at: float = 0.0
    keys: Mapping[str, StoredKey] = field(default_factory=dict)


class AuditLine(NamedTuple):
    """Who did what to whom. `detail` holds no secret."""

    at: float
    who: str
    what: str
    target: str
    detail: Json


_USER = tuple(one.name for one in fields(StoredUser) if one.name != "keys")
_KEY = tuple(one.name for one in fields(StoredKey))
_FIXED = {"name", "created_at"}
_LISTS = {"permissions", "rate_limits", "models", "agents", "endpoints"}


def _stored(name: str, value: Any) -> Any:
    """A field as its column holds it."""
    return orjson.dumps(value).decode() if name in _LISTS and value is not None else value


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


async def load(database: Database) -> dict[str, StoredUser]:
    """Everybody, by name."""
    return await database.look(_load)


def _load(connection: sqlite3.Connection) -> dict[str, StoredUser]:
    lists: dict[str, Any] = {}
    keys: dict[str, dict[str, StoredKey]] = {}
    for user, *row in connection.execute(f'SELECT "user", {_quoted(_KEY)} FROM keys ORDER BY "user", name'):  # noqa: S608
        row[2] = bool(row[2])
        row[4:8] = [_list(text, lists) for text in row[4:8]]
        keys.setdefault(user, {})[row[0]] = StoredKey(*row)
    users: dict[str, StoredUser] = {}
    rows = connection.execute(f"SELECT {_quoted(_USER)} FROM users ORDER BY name")  # noqa: S608
    for name, role, permissions, limits, nano, period, created_at in rows:
        of_user = keys.get(name, {})
        users[name] = StoredUser(
            name, role, _list(permissions, lists), _list(limits, lists), nano, period, created_at, of_user
        )
    return users


def _list(text: str | None, known: dict[str, Any]) -> Any:
    """A JSON list as a tuple. Most users have the same few, which are read and held once."""
    if text is None:
        return None
    if text not in known:
        known[text] = tuple(orjson.loads(text))
    return known[text]


async def create_user(database: Database, user: StoredUser, *, who: str) -> StoredUser:
    """Adds a user with their keys. Raises Conflict if the name or a key is taken, Invalid for no name."""

    def work(connection: sqlite3.Connection) -> StoredUser:
        made = replace(user, created_at=user.created_at or time.time())
        _named(user.name)
        if _exists(connection, user.name):
            raise Conflict(f"there is a user {user.name!r} already")
        _insert(connection, "users", {name: getattr(made, name) for name in _USER})
        _audit(connection, who, "create_user", user.name, {name: getattr(made, name) for name in _USER})
        made = replace(made, keys={key.name: _add_key(connection, user.name, key, who) for key in user.keys.values()})
        return made

    return await database.write(work)


async def update_user(database: Database, name: str, changes: Json, *, who: str) -> None:
    """Changes fields of a user: anything but `name`, `created_at` and `keys`. Raises NotFound, Invalid."""
    _known(changes, _USER)

    def work(connection: sqlite3.Connection) -> None:
        if not _exists(connection, name):
            raise NotFound(f"there is no user {name!r}")
        _update(connection, "users", changes, {"name": name})
        _audit(connection, who, "update_user", name, changes)

    await database.write(work)


async def delete_user(database: Database, name: str, *, who: str) -> None:
    """Deletes a user with their keys and credits. Raises NotFound."""

    def work(connection: sqlite3.Connection) -> None:
        if not _exists(connection, name):
            raise NotFound(f"there is no user {name!r}")
        names = [key for (key,) in connection.execute('SELECT name FROM keys WHERE "user" = ?', (name,)).fetchall()]
        for account in (f"user:{name}", *(f"key:{name}/{key}" for key in names)):
            connection.execute("DELETE FROM credits WHERE account = ?", (account,))
        connection.execute("DELETE FROM users WHERE name = ?", (name,))
        _audit(connection, who, "delete_user", name, {"keys": names})

    await database.write(work)


async def create_key(database: Database, user: str, key: StoredKey, *, who: str) -> StoredKey:
    """Adds a key to a user. Raises NotFound, Conflict if its name or the key itself is taken, Invalid."""

    def work(connection: sqlite3.Connection) -> StoredKey:
        if not _exists(connection, user):
            raise NotFound(f"there is no user {user!r}")
        return _add_key(connection, user, key, who)

    return await database.write(work)


async def update_key(database: Database, user: str, name: str, changes: Json, *, who: str) -> None:
    """Changes fields of a key: anything but `name` and `created_at`; a new `digest` makes it another secret.

    Raises NotFound, Conflict, Invalid.
    """
    _known(changes, _KEY)

    def work(connection: sqlite3.Connection) -> None:
        _find_key(connection, user, name)
        if "digest" in changes:
            _unused(connection, changes["digest"])
        _update(connection, "keys", changes, {"user": user, "name": name})
        _audit(connection, who, "update_key", f"{user}/{name}", changes)

    await database.write(work)


async def delete_key(database: Database, user: str, name: str, *, who: str) -> None:
    """Deletes a key and its credits. Raises NotFound."""

    def work(connection: sqlite3.Connection) -> None:
        _find_key(connection, user, name)
        connection.execute('DELETE FROM keys WHERE "user" = ? AND name = ?', (user, name))
        connection.execute("DELETE FROM credits WHERE account = ?", (f"key:{user}/{name}",))
        _audit(connection, who, "delete_key", f"{user}/{name}", {})

    await database.write(work)


async def top_up(database: Database, account: str, nano: int, *, who: str) -> None:
    """Adds money to what an account may spend. `account` is "user:NAME" or "key:NAME/KEY". Raises Invalid."""
    kind, _, name = account.partition(":")
    if kind not in ("user", "key") or not name or (kind == "key" and not all(name.partition("/"))):
        raise Invalid('an account is "user:NAME" or "key:NAME/KEY"')
    if not 0 < nano < 2**62:
        raise Invalid("a top-up is an amount above zero")

    def work(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO credits (account, at, nano) VALUES (?, ?, ?)", (account, time.time(), nano))
        _audit(connection, who, "top_up", account, {"nano": nano})

    await database.write(work)


async def credits_by_day(database: Database) -> dict[str, list[tuple[str, int]]]:
    """Top-ups by account: (day in UTC, nano-dollars), oldest first."""
    rows = await database.read(
        "SELECT account, date(at, 'unixepoch'), sum(nano) FROM credits GROUP BY 1, 2 ORDER BY 1, 2"
    )
    found: dict[str, list[tuple[str, int]]] = {}
    for account, day, nano in rows:
        found.setdefault(account, []).append((day, nano))
    return found


async def write_audit(database: Database, who: str, what: str, target: str, detail: Json) -> None:
    """Adds a line to the audit trail. `detail` is plain JSON without secrets."""
    await database.write(partial(_audit, who=who, what=what, target=target, detail=detail))


async def audit(database: Database, cursor: str | None = None, limit: int = 100) -> tuple[list[AuditLine], str | None]:
    """One page of the audit trail, newest first, and the cursor of the next one. Raises Invalid."""
    before = seq_of(cursor)
    limit = min(max(limit, 1), MAX_PAGE)
    rows = await database.read(
        "SELECT seq, at, who, what, target, detail FROM audit WHERE seq < ? ORDER BY seq DESC LIMIT ?",
        (before, limit + 1),
    )
    lines = [
        AuditLine(at, who, what, target, orjson.loads(detail)) for _, at, who, what, target, detail in rows[:limit]
    ]
    return lines, str(rows[limit - 1][0]) if len(rows) > limit else None


def seq_of(cursor: str | None) -> int:
    """The number below which a page begins. Raises Invalid."""
    if cursor is None:
        return 2**63 - 1
    if not cursor.isascii() or not cursor.isdigit() or len(cursor) > 18:
        raise Invalid("the cursor is none that was given out")
    return int(cursor)


async def save_counters(database: Database, name: str, value: bytes) -> None:
    """Keeps what a limiter wants to have back after a restart."""
    sql = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    await database.write(lambda connection: connection.execute(sql, (name, value)).rowcount)


async def load_counters(database: Database, name: str) -> bytes | None:
    """What was saved last under that name."""
    rows = await database.read("SELECT value FROM counters WHERE name = ?", (name,))
    return rows[0][0] if rows else None


def _audit(connection: sqlite3.Connection, who: str, what: str, target: str, detail: Json) -> None:
    shown = {name: "changed" if name == "digest" else value for name, value in detail.items()}
    connection.execute(
        "INSERT INTO audit (at, who, what, target, detail) VALUES (?, ?, ?, ?, ?)",
        (time.time(), who, what, target, orjson.dumps(shown).decode()),
    )


def _named(name: str) -> None:
    if not name or "/" in name:
        raise Invalid("a name is not empty and holds no slash")


def _known(changes: Json, names: tuple[str, ...]) -> None:
    unknown = sorted(set(changes) - set(names) | set(changes) & _FIXED)
    if unknown:
        raise Invalid(f"cannot be changed: {', '.join(unknown)}")


def _exists(connection: sqlite3.Connection, user: str) -> bool:
    return connection.execute("SELECT 1 FROM users WHERE name = ?", (user,)).fetchone() is not None


def _find_key(connection: sqlite3.Connection, user: str, name: str) -> None:
    if connection.execute('SELECT 1 FROM keys WHERE "user" = ? AND name = ?', (user, name)).fetchone() is None:
        raise NotFound(f"there is no key {user}/{name}")


def _unused(connection: sqlite3.Connection, digest: bytes) -> None:
    if len(digest) != 32:
        raise Invalid("a key is stored as its SHA-256")
    if connection.execute("SELECT 1 FROM keys WHERE digest = ?", (digest,)).fetchone() is not None:
        raise Conflict("that key is in use already")


def _add_key(connection: sqlite3.Connection, user: str, key: StoredKey, who: str) -> StoredKey:
    _named(key.name)
    _unused(connection, key.digest)
    if connection.execute('SELECT 1 FROM keys WHERE "user" = ? AND name = ?', (user, key.name)).fetchone() is not None:
        raise Conflict(f"there is a key {user}/{key.name} already")
    made = replace(key, created_at=key.created_at or time.time())
    values = {name: getattr(made, name) for name in _KEY}
    _insert(connection, "keys", {"user": user, **values})
    _audit(connection, who, "create_key", f"{user}/{key.name}", {n: v for n, v in values.items() if n != "digest"})
    return made


def _insert(connection: sqlite3.Connection, table: str, values: Json) -> None:
    marks = ", ".join("?" * len(values))
    connection.execute(
        f"INSERT INTO {table} ({_quoted(tuple(values))}) VALUES ({marks})",  # noqa: S608
        [_stored(name, value) for name, value in values.items()],
    )


def _update(connection: sqlite3.Connection, table: str, changes: Json, where: Json) -> None:
    if not changes:
        return
    names = ", ".join(f'"{name}" = ?' for name in changes)
    which = " AND ".join(f'"{name}" = ?' for name in where)
    connection.execute(
        f"UPDATE {table} SET {names} WHERE {which}",  # noqa: S608
        [*(_stored(name, value) for name, value in changes.items()), *where.values()],
    )
