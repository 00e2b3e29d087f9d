"""Users, keys, credits, audit and counters: a change and its line in the trail, or neither."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gproxyd.store import people, reports
from gproxyd.store.database import Conflict, Database, Invalid, NotFound, StoreError
from gproxyd.store.people import StoredKey, StoredUser
from tests.test_store_ledger import record, run, store, until

TOKEN = "sk-live-7d1f0c9b2a"
DIGEST = hashlib.sha256(TOKEN.encode()).digest()

LAPTOP = StoredKey(
    name="laptop",
    digest=DIGEST,
    expires_at=1_900_000_000.0,
    models=("chat-*",),
    agents=("build",),
    endpoints=("POST /v1/chat/completions",),
    rate_limits=({"model": "*", "rpm": 5},),
    budget_nano=10**9,
    budget_period="day",
)
ALICE = StoredUser(
    name="alice",
    role="user",
    permissions=("openai-main/*", "chat-default"),
    rate_limits=({"model": "*", "rpm": 60, "concurrency": 8},),
    quota_nano=25 * 10**9,
    quota_period="month",
)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def with_database(folder: Path, work: Callable[[Database], Awaitable[None]]) -> None:
    async def opened() -> None:
        database = await Database.open(folder / "gproxyd.db")
        try:
            await work(database)
        finally:
            await database.close()

    run(opened())


async def trail(database: Database) -> list[tuple[str, str, str]]:
    return [(line.who, line.what, line.target) for line in (await people.audit(database))[0]]


def test_what_was_created_is_loaded_again(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        alice = await people.create_user(database, ALICE, who="admin/default")
        key = await people.create_key(database, "alice", LAPTOP, who="admin/default")
        bob = await people.create_user(
            database, StoredUser("bob", keys={"a": StoredKey("a", digest("b"))}), who="admin/default"
        )
        assert await people.load(database) == {"alice": replace(alice, keys={"laptop": key}), "bob": bob}
        assert abs(alice.created_at - time.time()) < 10
        assert (alice.permissions, key.models) == (ALICE.permissions, LAPTOP.models)

    with_database(tmp_path, work)


def test_changes_change_what_they_name(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        await people.create_user(database, replace(ALICE, keys={"laptop": LAPTOP}), who="admin")
        await people.update_user(database, "alice", {"quota_nano": None, "permissions": ["*"]}, who="admin")
        await people.update_key(
            database, "alice", "laptop", {"enabled": False, "models": None, "agents": []}, who="admin"
        )
        alice = (await people.load(database))["alice"]
        assert (alice.quota_nano, alice.permissions, alice.role) == (None, ("*",), "user")
        laptop = alice.keys["laptop"]
        assert (laptop.enabled, laptop.models, laptop.agents, laptop.digest) == (False, None, (), DIGEST)

    with_database(tmp_path, work)


WRONG: dict[str, tuple[type[StoreError], Callable[[Database], Awaitable[Any]]]] = {
    "the name is taken": (Conflict, lambda db: people.create_user(db, ALICE, who="w")),
    "the key's name is taken": (
        Conflict,
        lambda db: people.create_key(db, "alice", replace(LAPTOP, digest=digest("x")), who="w"),
    ),
    "the key is in use": (Conflict, lambda db: people.create_key(db, "bob", replace(LAPTOP, name="x"), who="w")),
    "a user brings a key that is in use": (
        Conflict,
        lambda db: people.create_user(db, StoredUser("carol", keys={"laptop": LAPTOP}), who="w"),
    ),
    "another key is given the same secret": (
        Conflict,
        lambda db: people.update_key(db, "bob", "spare", {"digest": DIGEST}, who="w"),
    ),
    "nobody of that name": (NotFound, lambda db: people.update_user(db, "carol", {"role": "admin"}, who="w")),
    "the case differs": (NotFound, lambda db: people.delete_user(db, "Alice", who="w")),
    "a key for nobody": (
        NotFound,
        lambda db: people.create_key(db, "carol", replace(LAPTOP, digest=b"x" * 32), who="w"),
    ),
    "no such key": (NotFound, lambda db: people.update_key(db, "alice", "x", {}, who="w")),
    "somebody else's key": (NotFound, lambda db: people.delete_key(db, "bob", "laptop", who="w")),
    "delete without a name": (NotFound, lambda db: people.delete_user(db, "", who="w")),
    "delete everybody": (NotFound, lambda db: people.delete_user(db, "%", who="w")),
    "delete keys without a name": (NotFound, lambda db: people.delete_key(db, "alice", "", who="w")),
    "a user without a name": (Invalid, lambda db: people.create_user(db, StoredUser(""), who="w")),
    "a name with a slash": (Invalid, lambda db: people.create_user(db, StoredUser("a/b"), who="w")),
    "a key without a name": (
        Invalid,
        lambda db: people.create_key(db, "alice", StoredKey("", b"x" * 32), who="w"),
    ),
    "a key that is no digest": (
        Invalid,
        lambda db: people.create_key(db, "alice", StoredKey("x", TOKEN.encode()), who="w"),
    ),
    "a field that is not there": (Invalid, lambda db: people.update_user(db, "alice", {"quota": 1}, who="w")),
    "a field that is SQL": (Invalid, lambda db: people.update_user(db, "alice", {'role" = "admin': 1}, who="w")),
    "a new name": (Invalid, lambda db: people.update_key(db, "alice", "laptop", {"name": "x"}, who="w")),
    "an account of nobody": (Invalid, lambda db: people.top_up(db, "user:", 1, who="w")),
    "an account of no kind": (Invalid, lambda db: people.top_up(db, "alice", 1, who="w")),
    "an account of half a key": (Invalid, lambda db: people.top_up(db, "key:alice", 1, who="w")),
    "a top-up of nothing": (Invalid, lambda db: people.top_up(db, "user:alice", 0, who="w")),
    "a top-up that takes": (Invalid, lambda db: people.top_up(db, "user:alice", -1, who="w")),
    "an absurd top-up": (Invalid, lambda db: people.top_up(db, "user:alice", 2**63, who="w")),
}


def test_what_cannot_be_done_changes_nothing_and_leaves_no_trace(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        await people.create_user(database, replace(ALICE, keys={"laptop": LAPTOP}), who="admin")
        await people.create_user(
            database, StoredUser("bob", keys={"spare": StoredKey("spare", digest("spare"))}), who="admin"
        )
        before = await people.load(database), await trail(database), await people.credits_by_day(database)
        for what, (error, attempt) in WRONG.items():
            with pytest.raises(error):
                await attempt(database)
            after = await people.load(database), await trail(database), await people.credits_by_day(database)
            assert after == before, what

    with_database(tmp_path, work)


def test_every_change_is_in_the_trail_with_who_made_it(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        await people.create_user(database, ALICE, who="admin/default")
        await people.create_key(database, "alice", LAPTOP, who="admin/default")
        await people.update_user(database, "alice", {"quota_nano": None}, who="eve/x")
        await people.update_key(database, "alice", "laptop", {"digest": digest("new")}, who="eve/x")
        await people.top_up(database, "user:alice", 5, who="eve/x")
        await people.delete_key(database, "alice", "laptop", who="eve/x")
        await people.delete_user(database, "alice", who="eve/x")
        await people.write_audit(database, "root", "reload", "", {"ok": True})
        assert list(reversed(await trail(database))) == [
            ("admin/default", "create_user", "alice"),
            ("admin/default", "create_key", "alice/laptop"),
            ("eve/x", "update_user", "alice"),
            ("eve/x", "update_key", "alice/laptop"),
            ("eve/x", "top_up", "user:alice"),
            ("eve/x", "delete_key", "alice/laptop"),
            ("eve/x", "delete_user", "alice"),
            ("root", "reload", ""),
        ]
        found, cursor = await people.audit(database, limit=3)
        while cursor is not None:
            page, cursor = await people.audit(database, cursor, 3)
            found += page
        assert [line.what for line in found] == [what for _, what, _ in await trail(database)]
        assert [line.detail for line in found[3:6]] == [{"nano": 5}, {"digest": "changed"}, {"quota_nano": None}]
        with pytest.raises(Invalid):
            await people.audit(database, "-1")

    with_database(tmp_path, work)


def test_a_key_is_kept_as_its_digest_only_and_that_is_shown_nowhere(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        await people.create_user(database, ALICE, who="admin")
        made = await people.create_key(database, "alice", LAPTOP, who="admin")
        await people.update_key(database, "alice", "laptop", {"digest": digest("other")}, who="admin")
        lines, _ = await people.audit(database)
        shown = repr(made) + repr(lines) + repr(await people.load(database))
        for secret in (DIGEST, digest("other")):
            assert secret.hex() not in shown
            assert repr(secret)[2:-1] not in shown

    with_database(tmp_path, work)
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert digest("other") in on_disk
    assert TOKEN.encode() not in on_disk


def test_a_deleted_user_leaves_usage_behind_and_takes_keys_and_credits_along(tmp_path: Path) -> None:
    async def work() -> None:
        async with store(tmp_path) as here:
            await people.create_user(here.database, replace(ALICE, keys={"laptop": LAPTOP}), who="admin")
            await people.create_user(here.database, StoredUser("alice2"), who="admin")
            for account in ("user:alice", "key:alice/laptop", "user:alice2", "key:alice2/laptop"):
                await people.top_up(here.database, account, 7, who="admin")
            here.ledger.book(record())
            await until(lambda: here.ledger.queued == 0)
            await people.delete_user(here.database, "alice", who="admin")
            assert set(await people.load(here.database)) == {"alice2"}
            assert await here.database.read("SELECT count(*) FROM keys") == [(0,)]
            assert set(await people.credits_by_day(here.database)) == {"user:alice2", "key:alice2/laptop"}
            assert (await reports.spent(here.database))["user", "alice"] == 56_000
            again = await people.create_user(here.database, ALICE, who="admin")
            assert again.keys == {}

    run(work())


def test_credits_are_summed_by_day(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        for nano in (1, 2, 3):
            await people.top_up(database, "user:alice", nano, who="admin")
        await people.top_up(database, "key:alice/laptop", 5, who="admin")
        await database.write(
            lambda connection: connection.execute("UPDATE credits SET at = at - 86400 WHERE nano = 1").rowcount
        )
        found = await people.credits_by_day(database)
        assert [nano for _, nano in found["user:alice"]] == [1, 5]
        assert [day for day, _ in found["user:alice"]] == sorted(day for day, _ in found["user:alice"])
        assert [nano for _, nano in found["key:alice/laptop"]] == [5]

    with_database(tmp_path, work)


def test_two_who_create_the_same_at_once_get_one_user(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        attempts = [people.create_user(database, ALICE, who=f"w{number}") for number in range(20)]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert sum(isinstance(result, StoredUser) for result in results) == 1
        assert sum(isinstance(result, Conflict) for result in results) == 19
        assert len(await trail(database)) == 1

    with_database(tmp_path, work)


def test_counters_come_back_as_they_were_saved_last(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        assert await people.load_counters(database, "limits") is None
        for value in (b"first", b"\x00\xff" * 1000):
            await people.save_counters(database, "limits", value)
        await people.save_counters(database, "other", b"")
        assert await people.load_counters(database, "limits") == b"\x00\xff" * 1000
        assert await people.load_counters(database, "other") == b""

    with_database(tmp_path, work)


def test_ten_thousand_users_with_five_keys_each_are_loaded_within_a_second(tmp_path: Path) -> None:
    async def work(database: Database) -> None:
        def fill(connection: Any) -> None:
            connection.executemany(
                "INSERT INTO users VALUES (?, 'user', ?, ?, 25, 'month', 1.0)",
                [(f"u{n}", '["openai-main/*","chat-default"]', '[{"model":"*","rpm":60}]') for n in range(10_000)],
            )
            connection.executemany(
                "INSERT INTO keys VALUES (?, ?, ?, 1, NULL, NULL, NULL, NULL, '[]', NULL, NULL, 1.0)",
                [(f"u{n // 5}", f"k{n % 5}", digest(str(n))) for n in range(50_000)],
            )

        await database.write(fill)
        best = 10.0
        for _ in range(3):
            begun = time.perf_counter()
            users = await people.load(database)
            best = min(best, time.perf_counter() - begun)
        assert len(users) == 10_000
        assert all(len(user.keys) == 5 for user in users.values())
        assert best < 1.0

    with_database(tmp_path, work)
