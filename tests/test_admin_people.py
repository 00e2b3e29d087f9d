"""Users, keys and money through the admin API: made, changed, taken away, and in force at once."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gproxyd.policy.limits import Rule
from gproxyd.store import people
from tests.test_admin_api import Desk, at_desk
from tests.test_store_ledger import NOON, record

ALICE: dict[str, Any] = {
    "name": "alice",
    "role": "user",
    "permissions": ["openai-main/*", "chat-default"],
    "rate_limits": [{"model": "*", "rpm": 60, "rpd": 0, "tpm": 200000, "concurrency": 8}],
    "quota": {"usd": "25.00", "period": "month"},
}
LAPTOP: dict[str, Any] = {
    "name": "laptop",
    "enabled": True,
    "expires_at": "2031-01-01T00:00:00Z",
    "models": ["chat-*"],
    "endpoints": ["POST /v1/chat/completions"],
    "agents": ["build"],
    "rate_limits": [{"model": "*", "rpm": 5, "rpd": 0, "tpm": 0, "concurrency": 0}],
    "budget": {"usd": "1.50", "period": None},
}


async def alice(at: Desk, *keys: str) -> dict[str, str]:
    """Makes alice with keys of these names; their secrets."""
    made = await at.json("POST", "/admin/users", {**ALICE, "keys": [{"name": key} for key in keys]}, status=201)
    return {key["name"]: key["token"] for key in made["keys"]}


async def spend(at: Desk, account: str, nano: int) -> None:
    """A request that cost something."""
    at.house.quotas.reserve([at.house.quotas._accounts[account]], nano).settle(nano)


async def trail(at: Desk) -> list[tuple[str, str, dict[str, Any]]]:
    lines = (await at.json("GET", "/admin/audit"))["data"]
    assert {entry["who"] for entry in lines} <= {"warden/main"}
    return [(entry["what"], entry["target"], entry["detail"]) for entry in reversed(lines)]


def test_a_user_is_made_from_the_fields_that_are_shown_of_them(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        made = await at.json("POST", "/admin/users", ALICE, status=201)
        shown = await at.json("GET", "/admin/users/alice")
        assert made == shown
        assert {name: shown[name] for name in ("name", "role", "permissions", "rate_limits")} == {
            name: ALICE[name] for name in ("name", "role", "permissions", "rate_limits")
        }
        assert shown["source"] == "database"
        assert shown["keys"] == []
        assert shown["quota"] == {
            "usd": "25.00",
            "spent_usd": "0.00",
            "period": "month",
            "credit_usd": "0.00",
            "remaining_usd": "25.00",
        }
        now = datetime.now(UTC).timestamp()
        assert abs(datetime.fromisoformat(shown["created_at"]).timestamp() - now) < 60

    at_desk(tmp_path, work)


def test_a_key_is_made_from_the_fields_that_are_shown_of_it(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at)
        made = await at.json("POST", "/admin/users/alice/keys", LAPTOP, status=201)
        assert list(made)[:2] == ["name", "token"]
        (shown,) = (await at.json("GET", "/admin/users/alice"))["keys"]
        assert {name: shown[name] for name in LAPTOP if name != "budget"} == {
            name: value for name, value in LAPTOP.items() if name != "budget"
        }
        assert (shown["budget"]["usd"], shown["budget"]["spent_usd"]) == ("1.50", "0.00")
        assert shown["last_used_at"] is None
        assert at.house.lets_in(made["token"])

    at_desk(tmp_path, work)


def test_users_of_files_and_of_the_database_stand_in_one_list_by_name(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        for name in ("zoe", "alice", "mary"):
            await at.answer("POST", "/admin/users", {"name": name})
        users = (await at.json("GET", "/admin/users"))["data"]
        assert [(user["name"], user["source"]) for user in users] == [
            ("alice", "database"),
            ("filed", "file"),
            ("mary", "database"),
            ("warden", "file"),
            ("zoe", "database"),
        ]
        seen, cursor = [], ""
        while cursor is not None:
            page = await at.json("GET", f"/admin/users?limit=2{cursor and f'&cursor={cursor}'}")
            seen += [user["name"] for user in page["data"]]
            cursor = page["next"]
            if cursor == "filed":
                await at.answer("DELETE", "/admin/users/alice")  # a page that is read moves no other
        assert seen == ["alice", "filed", "mary", "warden", "zoe"]

    at_desk(tmp_path, work)


def test_a_revoked_key_is_refused_as_soon_as_the_answer_is_there(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        tokens = await alice(at, "one", "two", "three")
        assert all(at.house.lets_in(token) for token in tokens.values())
        await at.json("PATCH", "/admin/users/alice/keys/one", {"enabled": False})
        assert [at.house.lets_in(token) for token in tokens.values()] == [False, True, True]
        await at.json("PATCH", "/admin/users/alice/keys/one", {"enabled": True})
        assert at.house.lets_in(tokens["one"])
        assert await at.json("DELETE", "/admin/users/alice/keys/two") == {"name": "two", "deleted": True}
        assert [at.house.lets_in(token) for token in tokens.values()] == [True, False, True]
        await at.json("PATCH", "/admin/users/alice/keys/three", {"expires_at": "2020-01-01T00:00:00Z"})
        assert [at.house.lets_in(token) for token in tokens.values()] == [True, False, False]
        assert await at.json("DELETE", "/admin/users/alice") == {"name": "alice", "deleted": True}
        assert not any(at.house.lets_in(token) for token in tokens.values())

    at_desk(tmp_path, work)


def test_a_patch_of_a_user_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at)
        before = await at.json("GET", "/admin/users/alice")
        for change in (
            {"role": "read-only"},
            {"permissions": ["*"]},
            {"permissions": []},
            {"rate_limits": []},
        ):
            after = await at.json("PATCH", "/admin/users/alice", change)
            assert after == before | change
            before = after
        after = await at.json("PATCH", "/admin/users/alice", {"quota": {"usd": "3.00"}})
        assert (after["quota"]["usd"], after["quota"]["period"]) == ("3.00", None)
        after = await at.json("PATCH", "/admin/users/alice", {"quota": None})
        assert (after["quota"]["usd"], after["quota"]["remaining_usd"]) == (None, None)

    at_desk(tmp_path, work)


def test_a_patch_of_a_key_changes_what_it_names_and_null_takes_a_narrowing_away(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at)
        await at.answer("POST", "/admin/users/alice/keys", LAPTOP)
        before = (await at.json("GET", "/admin/users/alice"))["keys"][0]
        for change in (
            {"enabled": False},
            {"expires_at": None},
            {"models": ["a/*", "b"]},
            {"models": None},
            {"endpoints": None},
            {"agents": None},
            {"rate_limits": []},
            {"budget": None},
        ):
            after = await at.json("PATCH", "/admin/users/alice/keys/laptop", change)
            assert after == before | change, change
            before = after
        for empty in ({"models": []}, {"endpoints": []}, {"agents": []}, {"enabled": None}, {}, {"name": "new"}):
            assert (await at.refused("PATCH", "/admin/users/alice/keys/laptop", empty)).status == 400, empty

    at_desk(tmp_path, work)


def test_permissions_and_rate_limits_are_put_whole_as_a_list_or_as_an_object(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at)
        limits = [{"model": "a/*", "rpm": 1, "rpd": 0, "tpm": 0, "concurrency": 0}]
        for body in (["x/*"], {"permissions": ["x/*"]}):
            assert (await at.json("PUT", "/admin/users/alice/permissions", body))["permissions"] == ["x/*"]
            await at.json("PUT", "/admin/users/alice/permissions", [])
        for body in (limits, {"rate_limits": limits}):
            assert (await at.json("PUT", "/admin/users/alice/rate-limits", body))["rate_limits"] == limits
            await at.json("PUT", "/admin/users/alice/rate-limits", [])
        assert at.house.stored["alice"].rate_limits == ()
        for target in ("permissions", "rate-limits"):
            for bad in ({}, None, "*", {"permission": []}, b""):
                assert (await at.refused("PUT", f"/admin/users/alice/{target}", bad)).status == 400

    at_desk(tmp_path, work)


def test_what_is_stored_of_a_limit_is_what_a_rule_is_made_of(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.answer("POST", "/admin/users", {"name": "alice", "rate_limits": [{"rpm": 3}]})
        (limit,) = at.house.stored["alice"].rate_limits
        assert Rule("user:alice", **limit) == Rule("user:alice", rpm=3)

    at_desk(tmp_path, work)


def test_a_quota_is_put_shown_and_taken_away(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at)
        put = await at.json("PUT", "/admin/users/alice/quota", {"usd": "2.50", "period": "day"})
        assert put == await at.json("GET", "/admin/users/alice/quota")
        assert (put["usd"], put["period"], put["remaining_usd"]) == ("2.50", "day", "2.50")
        await spend(at, "user:alice", 1_250_000_000)
        shown = await at.json("GET", "/admin/users/alice/quota")
        assert (shown["spent_usd"], shown["remaining_usd"]) == ("1.25", "1.25")
        for nothing in ({"usd": None}, b"null"):
            await at.json("PUT", "/admin/users/alice/quota", {"usd": "2.50"})
            assert (await at.json("PUT", "/admin/users/alice/quota", nothing))["usd"] is None
            assert at.house.stored["alice"].quota_nano is None

    at_desk(tmp_path, work)


@pytest.mark.parametrize("name", ["alice", "filed"])
def test_a_top_up_counts_at_once_and_is_remembered_for_users_of_files_too(name: str, tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at)
        before = await at.json("GET", f"/admin/users/{name}/quota")
        told = await at.json("POST", f"/admin/users/{name}/quota/top-up", {"usd": "5.00"})
        assert told["usd"] == before["usd"]
        assert told["credit_usd"] == "5.00"
        assert float(told["remaining_usd"]) == float(before["remaining_usd"]) + 5
        assert at.house.database is not None
        ((_, nano),) = (await people.credits_by_day(at.house.database))[f"user:{name}"]
        assert nano == 5_000_000_000
        assert (await trail(at))[-1] == ("top_up", f"user:{name}", {"usd": "5.00"})

    at_desk(tmp_path, work)


@pytest.mark.parametrize("usd", ["0", "0.00", "-1", "1e3", "99999999999", 5, None])
def test_a_top_up_is_an_amount_above_zero(usd: Any, tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        error = await at.refused("POST", "/admin/users/filed/quota/top-up", {"usd": usd})
        assert (error.status, error.param) == (400, "usd")
        assert (await at.json("GET", "/admin/users/filed/quota"))["credit_usd"] == "0.00"

    at_desk(tmp_path, work)


def test_a_top_up_of_a_user_without_a_quota_is_409(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        error = await at.refused("POST", "/admin/users/warden/quota/top-up", {"usd": "1"})
        assert (error.status, error.code) == (409, "conflict")

    at_desk(tmp_path, work)


CHANGES = [
    ("PATCH", "", {"role": "admin"}),
    ("DELETE", "", None),
    ("POST", "/keys", {"name": "more"}),
    ("PATCH", "/keys/ci", {"enabled": False}),
    ("DELETE", "/keys/ci", None),
    ("PUT", "/permissions", ["*"]),
    ("PUT", "/rate-limits", []),
    ("PUT", "/quota", {"usd": "100"}),
]


@pytest.mark.parametrize(("method", "below", "body"), CHANGES)
def test_users_of_files_and_the_primary_administrator_are_changed_where_they_live(
    method: str, below: str, body: Any, tmp_path: Path
) -> None:
    async def work(at: Desk) -> None:
        for name, home in (("filed", "configuration files"), ("primary", "client-token")):
            error = await at.refused(method, f"/admin/users/{name}{below}", body)
            assert (error.status, error.code) == (409, "conflict")
            assert home in error.message
        assert (await at.refused(method, f"/admin/users/nobody{below}", body)).status == 404
        assert await trail(at) == []

    at_desk(tmp_path, work)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at, "laptop")
        for method, target, body in (
            ("POST", "/admin/users", {"name": "alice"}),
            ("POST", "/admin/users", {"name": "filed"}),
            ("POST", "/admin/users/alice/keys", {"name": "laptop"}),
        ):
            error = await at.refused(method, target, body)
            assert (error.status, error.code) == (409, "conflict"), target
        for target in ("/admin/users/bob", "/admin/users/alice/keys/phone", "/admin/users/bob/keys/laptop"):
            assert (await at.refused("DELETE", target)).status == 404

    at_desk(tmp_path, work)


def test_a_name_in_a_path_is_decoded_once(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.answer("POST", "/admin/users", {"name": "alice@example.com"})
        assert (await at.json("GET", "/admin/users/alice%40example.com"))["name"] == "alice@example.com"
        assert (await at.refused("GET", "/admin/users/alice%2540example.com")).status == 404

    at_desk(tmp_path, work)


def test_what_a_deleted_user_has_used_stays_in_the_books(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at, "laptop")
        await at.book(record(cost_nanousd=7_000_000_000))
        await at.json("DELETE", "/admin/users/alice")
        (row,) = (await at.json("GET", "/admin/usage?group_by=user"))["data"]
        assert (row["key"], row["cost_usd"]) == ("alice", "7.00")

    at_desk(tmp_path, work)


def test_when_a_key_was_last_used_is_shown(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at, "laptop", "phone")
        await at.book(record(at=NOON), record(at=NOON - 60), record(user="filed", key="ci", at=NOON + 1.5))
        keys = (await at.json("GET", "/admin/users/alice"))["keys"]
        assert [(key["name"], key["last_used_at"]) for key in keys] == [
            ("laptop", "2027-01-15T12:00:00Z"),
            ("phone", None),
        ]
        assert (await at.json("GET", "/admin/users/filed"))["keys"][0]["last_used_at"] == "2027-01-15T12:00:01.500Z"

    at_desk(tmp_path, work)


def test_every_change_leaves_a_line_that_says_who_did_what_in_the_units_of_the_outside(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at, "laptop")
        await at.json("PATCH", "/admin/users/alice", {"quota": {"usd": "2.00", "period": "day"}})
        await at.json("PATCH", "/admin/users/alice/keys/laptop", {"expires_at": "2031-01-01T00:00:00Z"})
        await at.json("DELETE", "/admin/users/alice/keys/laptop")
        await at.json("DELETE", "/admin/users/alice")
        told = await trail(at)
        assert [(what, target) for what, target, _ in told] == [
            ("create_user", "alice"),
            ("create_key", "alice/laptop"),
            ("update_user", "alice"),
            ("update_key", "alice/laptop"),
            ("delete_key", "alice/laptop"),
            ("delete_user", "alice"),
        ]
        assert told[0][2]["quota_usd"] == "25.00"
        assert told[2][2] == {"quota_usd": "2.00", "quota_period": "day"}
        assert told[3][2] == {"expires_at": "2031-01-01T00:00:00Z"}
        page = await at.json("GET", "/admin/audit?limit=4")
        rest = await at.json("GET", f"/admin/audit?limit=4&cursor={page['next']}")
        assert (len(page["data"]), len(rest["data"]), rest["next"]) == (4, 2, None)

    at_desk(tmp_path, work)


def test_callers_see_themselves_with_the_key_that_they_came_with(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at, "laptop", "phone")
        me = await at.json("GET", "/v1/me", user="alice", key="phone")
        assert me["name"] == "alice"
        assert [key["name"] for key in me["keys"]] == ["phone"]
        primary = await at.json("GET", "/v1/me", user="primary", key="client-token")
        assert (primary["name"], primary["role"]) == ("primary", "admin")
        assert (await at.refused("GET", "/v1/me", user=None, key=None)).status == 404

    at_desk(tmp_path, work)


def test_callers_see_what_is_left_of_their_money_and_their_limits(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await alice(at)
        await at.answer("POST", "/admin/users/alice/keys", LAPTOP)
        rules = [
            Rule("user:alice", **at.house.stored["alice"].rate_limits[0]),
            Rule("key:alice/laptop", **at.house.stored["alice"].keys["laptop"].rate_limits[0]),
        ]
        at.house.limiter.admit(rules, "openai-main/m").settle(50)
        await spend(at, "key:alice/laptop", 500_000_000)
        told = await at.json("GET", "/v1/me/quota", user="alice", key="laptop")
        assert told["usd"] == "25.00"
        assert told["key_budget"]["remaining_usd"] == "1.00"
        of_user, of_key = told["rate_limits"]
        assert (of_user["of"], of_user["requests"]["remaining"], of_user["tokens"]["remaining"]) == ("user", 59, 199950)
        assert (of_key["of"], of_key["requests"]["limit"], of_key["requests"]["remaining"]) == ("key", 5, 4)
        assert of_key["tokens"] is None

    at_desk(tmp_path, work)
