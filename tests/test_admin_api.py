"""The admin API's table of routes, its errors, and what every answer keeps to itself."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from gproxyd.admin.api import OWN, ROUTES, Admin
from gproxyd.admin.feed import Feed, Subscription
from gproxyd.admin.people import account_of, everybody, key_account_of
from gproxyd.config import Config
from gproxyd.config.fields import Known
from gproxyd.errors import Refusal
from gproxyd.policy.callers import Caller, authenticate, digest
from gproxyd.policy.limits import Limiter
from gproxyd.policy.quotas import Quotas
from gproxyd.store import people
from gproxyd.store.booking import book_lines
from gproxyd.store.database import Database
from gproxyd.store.logs import RequestLog
from gproxyd.store.people import StoredUser
from gproxyd.types import Answer, Question, UsageRecord
from tests.test_store_ledger import line, record

T = TypeVar("T")

FILE_TOKEN = "sk-file-0123456789abcdefXYZ"
FILE_DIGEST = digest(FILE_TOKEN.encode()).hex()
HEADER_SECRET = "header-s3cret-value"

CONFIG: dict[str, Any] = {
    "server": {"drain": "90s", "max_body": "1MiB"},
    "providers": {
        "openai-main": {
            "base_url": "http://127.0.0.1:9/v1",
            "headers": {"X-Trace-Key": HEADER_SECRET},
            "vendor": "openai",
            "timeouts": {"connect": "1500ms"},
            "models": [{"id": "gpt-4.1-mini", "context": 1000, "price": {"input": "0.40", "output": "1.60"}}],
        }
    },
    "aliases": {"chat-default": "openai-main/gpt-4.1-mini"},
    "records": {"usage_keep": "400d"},
    "users": {
        "warden": {"role": "admin", "keys": {"main": {"token": FILE_TOKEN}}},
        "filed": {
            "permissions": ["openai-main/*"],
            "rate_limits": [{"rpm": 60}],
            "quota": {"usd": "5.00", "period": "month"},
            "keys": {
                "ci": {"sha256": "ab" * 32, "expires_at": "2031-01-01T00:00:00Z", "budget": {"usd": "1.00"}},
            },
        },
    },
}


def configured(data: Mapping[str, Any] = CONFIG) -> Config:
    known = Known({"openai": True}, frozenset(data["providers"]), frozenset(data["aliases"]))
    return Config.model_validate(data, context=known)


class Daemon:
    """A house: what the daemon is to the admin API, with a real database, real quotas and real limits."""

    def __init__(self, database: Database | None) -> None:
        self.database = database
        self.logs = RequestLog(database, lambda event, **fields: None) if database else None
        self.quotas = Quotas()
        self.limiter = Limiter()
        self.config = configured()
        self.stored: dict[str, StoredUser] = {}
        self.feed = Feed()
        self.callers: dict[bytes, Caller] = {}
        self.problems: list[str] = []
        self.takes_up = asyncio.Event()
        self.takes_up.set()

    async def people_changed(self) -> None:
        await self.takes_up.wait()
        stored = await people.load(self.database) if self.database else {}
        self.stored = stored
        self.callers = {
            key.digest: Caller(user.name, key.name, "user", key.enabled, key.expires_at)
            for user in stored.values()
            for key in user.keys.values()
        }
        for person in everybody(self).values():
            account_of(self.quotas, person.user)
            for key in person.user.keys.values():
                if key.budget_nano is not None:
                    key_account_of(self.quotas, person.user, key)

    async def reload(self) -> Sequence[str]:
        return self.problems

    def providers(self) -> Sequence[Mapping[str, Any]]:
        return [
            {"name": name, "vendor": one.vendor, "usable": True, "models": len(one.models)}
            for name, one in self.config.providers.items()
        ]

    def models(self) -> Sequence[Mapping[str, Any]]:
        return [{"id": f"openai-main/model-{number}", "provider": "openai-main"} for number in range(5)]

    async def refresh_models(self) -> Mapping[str, Any]:
        return {"providers": {"openai-main": {"models": 5, "error": None}}}

    def explain(self, model: str, user: str | None, endpoint: str | None) -> Mapping[str, Any]:
        return {"model": model, "user": user, "targets": [{"provider": "openai-main", "model": "gpt-4.1-mini"}]}

    def subscribe(self) -> Subscription:
        return self.feed.subscribe()

    def lets_in(self, token: str) -> bool:
        try:
            authenticate(self.callers, token.encode())
        except Refusal:
            return False
        return True


class Desk:
    """An administrator at the admin API."""

    def __init__(self, house: Daemon) -> None:
        self.house = house
        self.admin = Admin(house)

    async def answer(
        self, method: str, target: str, body: Any = None, *, user: str | None = "warden", key: str | None = "main"
    ) -> Answer:
        path, _, query = target.partition("?")
        parameters = dict(part.split("=", 1) for part in query.split("&") if part)
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        who = "unix:root" if user is None else f"{user}/{key}"
        question = Question(who, user, key, method, path, parameters, content, "application/json")
        return await (self.admin.answer_me if path.startswith("/v1/") else self.admin.answer)(question)

    async def json(self, method: str, target: str, body: Any = None, *, status: int = 200, **who: Any) -> Any:
        answer = await self.answer(method, target, body, **who)
        assert answer.status == status
        assert isinstance(answer.body, bytes)
        return json.loads(answer.body)

    async def refused(self, method: str, target: str, body: Any = None, **who: Any) -> Refusal:
        with pytest.raises(Refusal) as caught:
            await self.answer(method, target, body, **who)
        return caught.value

    async def book(self, *records: UsageRecord) -> None:
        assert self.house.database is not None
        lines = [line(one).rstrip(b"\n") for one in records]
        await self.house.database.write(lambda connection: book_lines(connection, lines))


@asynccontextmanager
async def desk(folder: Path) -> AsyncIterator[Desk]:
    database = await Database.open(folder / "gproxyd.db")
    try:
        house = Daemon(database)
        await house.people_changed()
        yield Desk(house)
    finally:
        await database.close()


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def at_desk(folder: Path, work: Callable[[Desk], Coroutine[Any, Any, T]]) -> T:
    async def sit() -> T:
        async with desk(folder) as at:
            return await work(at)

    return run(sit())


def without_database(work: Callable[[Desk], Coroutine[Any, Any, T]]) -> T:
    async def sit() -> T:
        return await work(Desk(Daemon(None)))

    return run(sit())


CONTRACT = """
    GET/POST /admin/users
    GET/PATCH/DELETE /admin/users/{}
    POST /admin/users/{}/keys
    PATCH/DELETE /admin/users/{}/keys/{}
    PUT /admin/users/{}/permissions
    PUT /admin/users/{}/rate-limits
    GET/PUT /admin/users/{}/quota
    POST /admin/users/{}/quota/top-up
    GET /admin/usage
    GET /admin/requests
    GET /admin/requests/{}
    GET /admin/providers
    GET /admin/models
    POST /admin/models/refresh
    POST /admin/reload
    GET /admin/config
    POST /admin/explain
    GET /admin/events
    GET /admin/audit
    GET /v1/me
    GET /v1/me/usage
    GET /v1/me/quota
"""


def test_the_routes_are_those_of_the_contract() -> None:
    promised = {
        (method, pattern)
        for methods, pattern in (row.split() for row in CONTRACT.strip().splitlines())
        for method in methods.split("/")
    }
    assert {(route.method, route.pattern) for route in (*ROUTES, *OWN)} == promised


def test_every_route_that_is_no_reading_runs_to_its_end() -> None:
    reading = {("POST", "/admin/explain")}
    for route in ROUTES:
        assert route.changes == (route.method != "GET" and (route.method, route.pattern) not in reading), route


PATHS = sorted({route.pattern.replace("{}", "x") for route in (*ROUTES, *OWN)})


@pytest.mark.parametrize("path", PATHS)
def test_another_method_is_405_and_tells_those_that_are_allowed(path: str) -> None:
    async def work(at: Desk) -> None:
        error = await at.refused("TRACE", path)
        assert (error.status, error.code) == (405, "method_not_allowed")
        routes = [one for one in (*ROUTES, *OWN) if one.pattern.replace("{}", "x") == path]
        wanted = {one.method for one in routes} | ({"HEAD"} if any(one.method == "GET" for one in routes) else set())
        assert set(error.headers["Allow"].split(", ")) == wanted

    without_database(work)


UNKNOWN = ["/admin/", "/admin/users/", "/admin/users//keys", "/admin/user", "/admin/users/a/keys/b/c", "/admin/config/"]


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
@pytest.mark.parametrize("path", UNKNOWN)
def test_an_unknown_path_is_404(method: str, path: str) -> None:
    async def work(at: Desk) -> None:
        error = await at.refused(method, path)
        assert (error.status, error.code) == (404, "not_found")

    without_database(work)


def test_head_is_answered_like_get_and_streams_nothing(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        get, head = await at.answer("GET", "/admin/users"), await at.answer("HEAD", "/admin/users")
        assert get == head
        assert get.headers["Cache-Control"] == "no-store"
        assert (await at.answer("HEAD", "/admin/events")).body == b""
        assert (await at.answer("HEAD", "/admin/usage?format=csv")).body == b""

    at_desk(tmp_path, work)


BAD = [
    (b"", "must be JSON"),
    (b"{", "must be JSON"),
    (b"\xff{}", "must be JSON"),
    (b'{"name":"a","name":"b"}', "must be JSON"),
    (b'{"name":NaN}', "must be JSON"),
    (b"[" * 5000, "must be JSON"),
    (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b"{}", "'name' is required"),
    (b'{"name":""}', "'name' is no valid name"),
    (b'{"name":"../x"}', "'name' is no valid name"),
    (b'{"name":"primary"}', "'name' is the name of the built-in administrator"),
    (b'{"name":7}', "'name' must be text"),
    (b'{"name":"a","role":"owner"}', "'role' must be one of"),
    (b'{"name":"a","roles":"user"}', "'roles' is no member that is known here; did you mean `role`?"),
    (b'{"name":"a","keys":[{"name":"k","token":"x"}]}', "'keys[0].token' is no member that is known here"),
    (b'{"name":"a","permissions":"*"}', "'permissions' must be a list"),
    (b'{"name":"a","permissions":["a b"]}', "'permissions[0]' must be a model's name"),
    (b'{"name":"a","rate_limits":[{"rpm":"60"}]}', "'rate_limits[0].rpm' must be a whole number"),
    (b'{"name":"a","rate_limits":[{"rpm":-1}]}', "'rate_limits[0].rpm' must be at least 0"),
    (b'{"name":"a","rate_limits":[{"rmp":1}]}', "'rate_limits[0].rmp' is no member that is known here; did you mean"),
    (b'{"name":"a","rate_limits":[{}]}', "limits nothing"),
    (b'{"name":"a","rate_limits":[{"rpm":1},{"tpm":1}]}', "two entries for the same models"),
    (b'{"name":"a","quota":{"usd":25}}', "'quota.usd' must be an amount in US dollars"),
    (b'{"name":"a","quota":{"usd":"-1"}}', "'quota.usd' must be an amount in US dollars"),
    (b'{"name":"a","quota":{"usd":"999999999999"}}', "'quota.usd' must be at most"),
    (b'{"name":"a","quota":{"usd":"1","period":"week"}}', "'quota.period' must be one of"),
    (b'{"name":"a","keys":[{"name":"k","models":[]}]}', "'keys[0].models' must hold an entry"),
    (b'{"name":"a","keys":[{"name":"k","expires_at":"soon"}]}', "'keys[0].expires_at' must be a time"),
    (b'{"name":"a","keys":[{"name":"k"},{"name":"k"}]}', "'keys' holds two of the same name"),
]


@pytest.mark.parametrize(("body", "text"), BAD, ids=lambda value: value[:40] if isinstance(value, bytes) else "")
def test_a_bad_body_is_400_and_says_why(body: bytes, text: str) -> None:
    async def work(at: Desk) -> None:
        error = await at.refused("POST", "/admin/users", body)
        assert (error.status, error.code) == (400, "invalid_request")
        assert text in error.message
        named = re.match(r"invalid_request: '([^']+)'", error.message)
        assert error.param == (named[1] if named else None)

    without_database(work)


def test_a_bad_body_changes_nothing(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        for body, _ in BAD:
            assert (await at.refused("POST", "/admin/users", body)).status == 400
        assert at.house.database is not None
        assert await people.load(at.house.database) == {}
        assert (await people.audit(at.house.database))[0] == []

    at_desk(tmp_path, work)


def test_all_problems_of_a_body_are_told_at_once(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        error = await at.refused("POST", "/admin/users", {"name": "a", "role": 1, "quota": {}, "x": 1})
        for path in ("'role'", "'quota.usd'", "'x'"):
            assert path in error.message
        assert error.param == "role"

    at_desk(tmp_path, work)


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a", "sk-proj-0123456789abcdef": 1},
        {"name": "sk-proj-0123456789abcdef/"},
        {"name": "a", "role": "sk-proj-0123456789abcdef"},
        {"name": "a", "permissions": ["sk-proj-0123456789abcdef "]},
        {"name": "a", "quota": {"usd": "sk-proj-0123456789abcdef"}},
        {"name": "a", "keys": [{"name": "b", "expires_at": "sk-proj-0123456789abcdef"}]},
    ],
)
def test_no_message_repeats_what_may_be_a_secret_in_the_wrong_place(body: Any) -> None:
    async def work(at: Desk) -> None:
        assert "0123456789abcdef" not in (await at.refused("POST", "/admin/users", body)).message

    without_database(work)


BAD_PARAMETERS = [
    ("/admin/users?limit=0", "limit"),
    ("/admin/users?limit=1001", "limit"),
    ("/admin/users?limit=ten", "limit"),
    ("/admin/users?user=alice", "user"),
    ("/admin/users/filed?verbose=1", "verbose"),
    ("/admin/usage?usr=alice", "usr"),
    ("/admin/usage?status=ok", "status"),
    ("/admin/usage?since=yesterday", "since"),
    ("/admin/usage?group_by=colour", "group_by"),
    ("/admin/usage?format=xml", "format"),
    ("/admin/usage?cursor=nobody", "cursor"),
    ("/admin/usage?cursor=1.5:99999999999999999999", "cursor"),
    ("/admin/usage?group_by=day&cursor=x", "cursor"),
    ("/admin/models?cursor=-1", "cursor"),
    ("/v1/me/usage?user=filed", "user"),
]


def test_a_bad_or_unknown_parameter_is_400_and_never_means_all(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        for target, param in BAD_PARAMETERS:
            error = await at.refused("GET", target)
            assert (error.status, error.code, error.param) == (400, "invalid_request", param), target
        for target in ("/admin/audit?cursor=x", "/admin/requests?cursor=x"):
            assert (await at.refused("GET", target)).status == 400, target

    at_desk(tmp_path, work)


@pytest.mark.parametrize("target", ["/admin/users/filed?all=true", "/admin/users?user=filed", "/admin/users/*"])
def test_nothing_deletes_more_than_the_path_names(target: str, tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.answer("POST", "/admin/users", {"name": "alice"})
        assert (await at.refused("DELETE", target)).status in (400, 404, 405)
        assert set(at.house.stored) == {"alice"}

    at_desk(tmp_path, work)


def test_without_a_database_changes_are_503_and_the_users_of_the_files_are_still_shown() -> None:
    async def work() -> None:
        at = Desk(Daemon(None))
        for method, target, body in (
            ("POST", "/admin/users", {"name": "alice"}),
            ("POST", "/admin/users/filed/quota/top-up", {"usd": "1.00"}),
            ("GET", "/admin/usage", None),
            ("GET", "/admin/requests", None),
            ("GET", "/admin/audit", None),
        ):
            error = await at.refused(method, target, body)
            assert (error.status, error.code) == (503, "overloaded"), target
        assert [user["name"] for user in (await at.json("GET", "/admin/users"))["data"]] == ["filed", "warden"]
        assert await at.json("POST", "/admin/reload") == {"reloaded": True, "audited": False}

    run(work())


def test_a_failing_database_is_503_changes_nothing_and_leaves_the_old_people_at_work(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        token = (await at.json("POST", "/admin/users", {"name": "alice", "keys": [{"name": "k"}]}, status=201))["keys"]
        (tmp_path / "gproxyd.db").rename(tmp_path / "away.db")
        error = await at.refused("DELETE", "/admin/users/alice")
        assert (error.status, error.code) == (503, "overloaded")
        assert "gone" in error.message
        assert at.house.lets_in(token[0]["token"])

    at_desk(tmp_path, work)


def test_a_change_runs_to_its_end_when_its_asker_is_gone(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        made = await at.json("POST", "/admin/users", {"name": "alice", "keys": [{"name": "k"}]}, status=201)
        token = made["keys"][0]["token"]
        at.house.takes_up.clear()
        asking = asyncio.ensure_future(at.answer("DELETE", "/admin/users/alice/keys/k"))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert at.house.lets_in(token)
        at.house.takes_up.set()
        await at.admin.close()
        assert not at.house.lets_in(token)

    at_desk(tmp_path, work)


def test_changes_at_once_are_made_one_after_the_other(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        told = await asyncio.gather(
            *(at.answer("POST", "/admin/users", {"name": "alice"}) for _ in range(5)), return_exceptions=True
        )
        statuses = sorted(one.status for one in told if isinstance(one, Answer | Refusal))
        assert statuses == [201, 409, 409, 409, 409]

    at_desk(tmp_path, work)


def test_no_change_begins_before_the_one_before_it_is_in_force(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        assert at.house.database is not None
        at.house.takes_up.clear()
        asking = [asyncio.ensure_future(at.answer("POST", "/admin/users", {"name": name})) for name in ("a", "b")]
        await asyncio.sleep(0.05)
        assert set(await people.load(at.house.database)) == {"a"}
        at.house.takes_up.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [201, 201]

    at_desk(tmp_path, work)


def test_a_client_whose_key_stands_in_the_query_may_ask_for_everything() -> None:
    async def work(at: Desk) -> None:
        for target in ("/admin/users", "/admin/users/filed", "/admin/models"):
            assert (await at.answer("GET", f"{target}?key=gp-secret")).status == 200

    without_database(work)


def test_the_configuration_is_shown_without_secrets_and_can_be_read_back(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        shown = await at.json("GET", "/admin/config")
        text = json.dumps(shown)
        for secret in (FILE_TOKEN, FILE_DIGEST, HEADER_SECRET, "ab" * 4):
            assert secret not in text
        assert shown["server"]["drain"] == "90s"
        assert shown["server"]["max_body"] == "1MiB"
        assert shown["server"]["listen"] == ["127.0.0.1:8787"]
        assert shown["routing"]["retries"] == {"max": 3, "budget": 0.1}
        assert shown["providers"]["openai-main"]["timeouts"]["connect"] == "1500ms"
        assert shown["providers"]["openai-main"]["models"][0]["price"]["input"] == "0.40"
        assert shown["providers"]["openai-main"]["headers"] == {"X-Trace-Key": "(hidden)"}
        assert shown["users"]["filed"]["quota"] == {"usd": "5.00", "period": "month"}
        assert shown["users"]["filed"]["keys"]["ci"]["expires_at"] == "2031-01-01T00:00:00Z"
        again = json.loads(text)
        for user in again["users"].values():
            for key in user["keys"].values():
                del key["sha256"], key["token"]
        bare = at.house.config.model_dump(exclude={"users": {"__all__": {"keys": {"__all__": {"sha256", "token"}}}}})
        read = configured(again).model_dump(exclude={"users": {"__all__": {"keys": {"__all__": {"sha256", "token"}}}}})
        bare["providers"]["openai-main"]["headers"] = read["providers"]["openai-main"]["headers"]
        assert read == bare

    at_desk(tmp_path, work)


def test_a_reload_that_is_refused_is_409_with_every_problem(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        assert await at.json("POST", "/admin/reload") == {"reloaded": True, "audited": True}
        at.house.problems = ["gproxyd.yaml:3: providers.v1: is reserved", "gproxyd.yaml:9: aliases: dangles"]
        error = await at.refused("POST", "/admin/reload")
        assert (error.status, error.code) == (409, "conflict")
        assert all(problem in error.message for problem in at.house.problems)
        trail = (await at.json("GET", "/admin/audit"))["data"]
        assert [(entry["what"], entry["who"]) for entry in trail] == [
            ("reload_refused", "warden/main"),
            ("reload", "warden/main"),
        ]

    at_desk(tmp_path, work)


def test_lists_of_the_daemon_come_page_by_page(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        first = await at.json("GET", "/admin/models?limit=3")
        assert [one["id"][-1] for one in first["data"]] == ["0", "1", "2"]
        last = await at.json("GET", f"/admin/models?limit=3&cursor={first['next']}")
        assert [one["id"][-1] for one in last["data"]] == ["3", "4"]
        assert last["next"] is None
        assert (await at.json("GET", "/admin/providers"))["data"][0]["name"] == "openai-main"
        refreshed = await at.json("POST", "/admin/models/refresh")
        assert refreshed["providers"] == {"openai-main": {"models": 5, "error": None}}

    at_desk(tmp_path, work)


def test_explain_asks_for_users_that_there_are(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        told = await at.json("POST", "/admin/explain", {"model": "chat-default", "user": "filed"})
        assert told["targets"][0]["provider"] == "openai-main"
        assert (await at.refused("POST", "/admin/explain", {"model": "m", "user": "nobody"})).status == 404
        assert (await at.refused("POST", "/admin/explain", {"user": "filed"})).param == "model"

    at_desk(tmp_path, work)


def test_the_secret_of_a_key_is_in_the_answer_that_made_it_and_nowhere_else(tmp_path: Path) -> None:
    async def work(at: Desk) -> list[str]:
        made = await at.json("POST", "/admin/users", {"name": "alice", "keys": [{"name": "one"}]}, status=201)
        second = await at.json("POST", "/admin/users/alice/keys", {"name": "two"}, status=201)
        tokens = [made["keys"][0]["token"], second["token"]]
        assert all(re.fullmatch(r"gp-[A-Za-z0-9_-]{43}", token) for token in tokens)
        assert len(set(tokens)) == 2
        seen = ""
        for target in ("/admin/users", "/admin/users/alice", "/admin/audit", "/admin/config", "/admin/usage"):
            seen += json.dumps(await at.json("GET", target))
        seen += json.dumps(await at.json("GET", "/v1/me", user="alice", key="one"))
        seen += json.dumps(await at.json("PATCH", "/admin/users/alice/keys/two", {"enabled": False}))
        for token in tokens:
            for secret in (token, token[3:13], digest(token.encode()).hex(), digest(token.encode()).hex()[:8]):
                assert secret not in seen
        return tokens

    tokens = at_desk(tmp_path, work)
    for file in tmp_path.iterdir():
        assert not any(token[3:].encode() in file.read_bytes() for token in tokens), file


def test_a_listener_hears_of_finished_requests_until_it_is_no_administrator_any_more(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        answer = await at.answer("GET", "/admin/events")
        assert answer.content_type == "text/event-stream"
        assert not isinstance(answer.body, bytes)
        stream = answer.body
        assert (await anext(stream)).startswith(b":")
        at.house.feed.publish(record(request_id="req_9", cost_nanousd=1_500_000_000))
        name, data = (await anext(stream)).decode().strip().split("\n")
        assert name == "event: request"
        told = json.loads(data.removeprefix("data: "))
        assert (told["request_id"], told["cost_usd"]) == ("req_9", "1.50")
        changed = {**CONFIG, "users": {"warden": {**CONFIG["users"]["warden"], "role": "user"}}}
        at.house.config = configured(changed)
        at.house.feed.publish(record(request_id="req_10"))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    at_desk(tmp_path, work)


def test_a_quiet_stream_of_events_is_kept_alive_and_ends_when_the_gateway_stops(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        at.house.config = configured({**CONFIG, "streams": {"keepalive": "20ms"}})
        answer = await at.answer("GET", "/admin/events", user=None, key=None)
        assert not isinstance(answer.body, bytes)
        assert [await anext(answer.body) for _ in range(3)][1:] == [b": keep-alive\n\n"] * 2
        at.house.feed.close()
        with pytest.raises(StopAsyncIteration):
            await anext(answer.body)
        assert (await at.refused("GET", "/admin/events")).status == 503

    at_desk(tmp_path, work)


def test_a_slow_listener_loses_the_oldest_and_is_told_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gproxyd.admin.feed.BACKLOG", 3)

    async def work(at: Desk) -> None:
        answer = await at.answer("GET", "/admin/events")
        assert not isinstance(answer.body, bytes)
        await anext(answer.body)
        for number in range(10):
            at.house.feed.publish(record(request_id=f"req_{number}"))
        assert b'event: dropped\ndata: {"count":7}' in await anext(answer.body)
        heard = [await anext(answer.body) for _ in range(3)]
        assert [b"req_7" in heard[0], b"req_8" in heard[1], b"req_9" in heard[2]] == [True] * 3

    at_desk(tmp_path, work)


def test_listeners_are_bounded_and_those_that_are_gone_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gproxyd.admin.feed.MOST", 2)

    async def work(at: Desk) -> None:
        one, two = await at.answer("GET", "/admin/events"), await at.answer("GET", "/admin/events")
        assert (await at.refused("GET", "/admin/events")).status == 503
        del one  # it was never even begun
        three = await at.answer("GET", "/admin/events")
        for answer in (two, three):
            assert not isinstance(answer.body, bytes)
            await anext(answer.body)
            await answer.body.aclose()  # type: ignore[attr-defined]
        assert (await at.answer("GET", "/admin/events")).status == 200

    at_desk(tmp_path, work)


def test_publishing_costs_next_to_nothing_while_nobody_listens() -> None:
    feed, one = Feed(), record()
    began = time.perf_counter()
    for _ in range(10_000):
        feed.publish(one)
    assert time.perf_counter() - began < 0.5


def test_the_database_holds_digests_only(tmp_path: Path) -> None:
    async def work(at: Desk) -> str:
        made = await at.json("POST", "/admin/users", {"name": "alice", "keys": [{"name": "k"}]}, status=201)
        return str(made["keys"][0]["token"])

    token = at_desk(tmp_path, work)
    with sqlite3.connect(tmp_path / "gproxyd.db") as connection:
        rows = connection.execute("SELECT digest FROM keys").fetchall()
    connection.close()
    assert rows == [(digest(token.encode()),)]
