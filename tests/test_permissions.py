"""Who may what, through the real daemon: every endpoint, every kind of caller, and every way round that we know of.

The upstream is scripted and remembers what reached it: a refusal that it has seen anything of is none.
"""

from __future__ import annotations

import base64
import gzip
import json
import secrets
import sqlite3
import statistics
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gproxyd.admin import api
from gproxyd.wire import operations
from tests.support import raw
from tests.support.checks import quick_log
from tests.support.raw import Reply
from tests.support.running import PROVIDER_KEY, Loop, Running, until
from tests.support.upstream import Got, Pause, Upstream, json_reply

ADMIN, NOBODY, READER, LISTER, AGENTIC = "ak-admin-1", "ck-nobody-1", "ck-reader-1", "ck-lister-1", "ak-agentic-1"
DISABLED, EXPIRED, UNKNOWN = "ck-disabled-1", "ck-expired-1", "ck-unknown-1"
ANN, TARGET, ALIAS, WIDE, GLOB, HALF = "ck-ann-1", "ck-target-1", "ck-alias-1", "ck-wide-1", "ck-glob-1", "ck-half-1"
VIC = "ck-vic-1"

CONFIG = f"""\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  openai-main:
    {{vendor: openai, base_url: "URL", credentials: [provider-key], models: [{{id: small}}, {{id: small-two}},
      {{id: big}}]}}
  anthropic-main: {{vendor: anthropic, base_url: "URL", credentials: [provider-key], models: [{{id: small}},
    {{id: big}}]}}
  vertex-main: {{vendor: gemini, base_url: "URL", credentials: [provider-key], models: [{{id: small}}, {{id: big}}]}}
  plain: {{vendor: openai, base_url: "URL", credentials: [provider-key], models: [{{id: small}}, {{id: big}}]}}
aliases: {{quick: openai-main/small, clever: anthropic-main/big, flash: vertex-main/small, slow: openai-main/big}}
endpoints: {{files: openai-main, batches: openai-main, images: openai-main, audio: openai-main, rerank: openai-main,
  embeddings: openai-main, moderations: openai-main, completions: openai-main, responses: openai-main}}
users:
  root:
    role: admin
    keys:
      main: {{token: {ADMIN}}}
      disabled: {{token: {DISABLED}, enabled: false}}
      expired: {{token: {EXPIRED}, expires_at: 2001-01-01T00:00:00Z}}
      lister: {{token: {LISTER}, endpoints: ["GET /v1/models"]}}
      agentic: {{token: {AGENTIC}, agents: [build]}}
      half: {{token: {HALF}, models: ["*/small"]}}
  nobody: {{role: user, keys: {{k: {{token: {NOBODY}}}}}}}
  reader: {{role: read-only, permissions: ["*"], keys: {{k: {{token: {READER}}}}}}}
  ann: {{role: user, permissions: ["openai-main/small", "anthropic-main/small", "plain/small"],
    keys: {{k: {{token: {ANN}}}}}}}
  target: {{role: user, permissions: ["openai-main/small"], keys: {{k: {{token: {TARGET}}}}}}}
  alias: {{role: user, permissions: ["quick"], keys: {{k: {{token: {ALIAS}}}}}}}
  wide: {{role: user, permissions: ["openai-main/*", "flash"], keys: {{k: {{token: {WIDE}}}}}}}
  glob: {{role: user, permissions: ["*/small*", "cl?ver"], keys: {{k: {{token: {GLOB}}}}}}}
  vic: {{role: user, permissions: ["vertex-main/small"], keys: {{k: {{token: {VIC}}}}}}}
"""

ANSWER = json_reply(b'{"model":"m"}')
JSON = ("Content-Type", "application/json")


def answer(port: int, data: bytes | Iterable[bytes | tuple[bytes, float]]) -> Reply:
    """The answer to one request on a connection of its own."""
    if not (isinstance(data, bytes) and data.startswith(b"HEAD ")):
        return raw.send(port, data)
    with raw.connect(port) as sock:
        return raw.exchange(sock, data)


class Place:
    """A gateway and the upstream behind it."""

    def __init__(self, loop: Loop, config: str = CONFIG) -> None:
        self.upstream = Upstream(loop, self._script).start()
        self.gateway: Running = loop.gateway(config.replace("URL", self.upstream.url), {"provider-key": PROVIDER_KEY})
        self.pause = 0.0

    def _script(self, got: Got) -> list[bytes | Pause]:
        return [Pause(self.pause), ANSWER] if self.pause else [ANSWER]

    def send(self, data: bytes | Iterable[bytes | tuple[bytes, float]]) -> tuple[Reply, list[Got]]:
        """One request on a connection of its own: its answer, and what the upstream has got of it."""
        before = len(self.upstream.requests)
        reply = answer(self.gateway.port, data)
        return reply, self.upstream.requests[before:]

    def ask(
        self, target: str, body: Any = None, *, key: str | None, method: str | None = None, headers: Any = ()
    ) -> tuple[Reply, list[Got]]:
        return self.send(raw.request(target, body, key=key, method=method, headers=headers))

    def administer(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        reply, _ = self.ask(path, body, key=ADMIN, method=method)
        assert reply.status == status, reply.data
        return reply.json

    def new_user(self, **fields: Any) -> tuple[str, str]:
        """A user of the database, and the secret of their key `k`."""
        name = "user-" + secrets.token_hex(6)
        user = {"name": name, "permissions": ["*"], "keys": [{"name": "k"}], **fields}
        made = self.administer("POST", "/admin/users", user, 201)
        return name, made["keys"][0]["token"]


@pytest.fixture(scope="module")
def place(loop: Loop) -> Iterator[Place]:
    with quick_log():
        yield Place(loop)


# The whole table of routes, walked by every kind of caller (E09).

LISTINGS = ["/v1/models", "/v1beta/models", "/openai-main/v1/models", "/vertex-main/v1/models",
            "/vertex-main/v1beta/models"]  # fmt: skip
PUBLIC = ["/healthz", "/readyz", "/statsz", "/metrics"]
OWN = ["/v1/me", "/v1/me/usage", "/v1/me/quota", *LISTINGS]
FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nopenai-main/small\r\n--b--\r\n'


def _bodies() -> dict[str, tuple[Any, list[tuple[str, str]]]]:
    """Where a request names its model -> a body that does."""
    form = (FORM, [("Content-Type", "multipart/form-data; boundary=b")])
    named = {"model": "openai-main/small", "messages": []}
    return {"json": (named, []), "multipart": form, "path": ({}, []), "path+body": ({}, []), "none": (None, [])}


def _routes() -> list[tuple[str, str, Any, list[tuple[str, str]]]]:
    """(method, path, body, headers) of everything that can be asked for."""
    found: list[tuple[str, str, Any, list[tuple[str, str]]]] = []
    for line in operations._TABLE.strip().splitlines():
        methods, version, path, _, dialect, kind, _ = line.split()
        home = {"gemini": "vertex-main", "anthropic": "anthropic-main"}.get(dialect, "openai-main")
        for method in methods.split(","):
            body, headers = _bodies().get(kind, (None, []))
            body = body if method == "POST" else None
            if isinstance(body, dict) and body:
                body = body | {"model": f"{home}/small"}
            below = path.replace("{id+}", f"{home}/small").replace("{id}", "x1").replace("{agent}", "build")
            scoped = path.replace("{id+}", "small").replace("{id}", "x1").replace("{agent}", "build")
            bare = {"model": "small", "messages": []} if isinstance(body, dict) and body else body
            found += [
                (method, version + below, body, headers),
                (method, f"/{home}{version}{scoped}", bare, headers),
                (method, f"/proxy/{home}{version}{scoped}", bare, headers),
            ]
    for route in (*api.ROUTES, *api.OWN):
        path = route.pattern.replace("{}", "nobody-there")
        found.append((route.method, path, {} if route.body else None, []))
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        found += [
            (method, target, None, [])
            for target in (
                "/proxy/openai-main/anything", "/openai-main/v1/anything", "/proxy/openai-main/v1/anything",
                "/v1/nothing",
                "/", "/admin", "/admin/", "/admin/nothing", "/console", "/console/x", "/debug/pprof/",
                "/debug/pprof/heap",
                "/api/x", "/proxy/nobody/x", "/nobody/v1/models", "/.well-known/agent-card.json", "/favicon.ico",
            )
        ]  # fmt: skip
    return found


ROUTES = _routes()
ENDLESS = {"/admin/events"}


def walk(place: Place, key: str | None) -> Iterator[tuple[str, str, Reply, list[Got]]]:
    """Every route but the endless ones, asked on as few connections as the gateway keeps."""
    sock = raw.connect(place.gateway.port)
    try:
        for method, path, body, headers in ROUTES:
            if path in ENDLESS and key == ADMIN:
                continue
            before = len(place.upstream.requests)
            sock.sendall(raw.request(path, body, method=method, key=key, headers=headers))
            reply = raw.read(sock)
            yield method, path, reply, place.upstream.requests[before:]
            if reply.header("connection") == "close":
                sock.close()
                sock = raw.connect(place.gateway.port)
    finally:
        sock.close()


@pytest.mark.parametrize("key", [None, UNKNOWN, DISABLED, EXPIRED], ids=["none", "unknown", "disabled", "expired"])
def test_without_a_good_key_no_route_says_anything(place: Place, key: str | None) -> None:
    count = 0
    for method, path, reply, got in walk(place, key):
        count += 1
        assert (reply.status, got) == (401, []), (method, path, reply.data)
        assert "valid API key" in reply.json["error"]["message"]
    assert count > 200


def test_the_public_list_is_health_and_figures_and_nothing_else(place: Place) -> None:
    for path in PUBLIC:
        for key in (None, UNKNOWN, DISABLED, NOBODY, ADMIN):
            assert place.ask(path, key=key)[0].status == 200
            assert place.ask(path, b"", key=key, method="POST")[0].status == 405
        for near in (path + "/", path + "x", path.upper(), "/" + path, path.replace("z", "%7a"), path + ";x"):
            assert place.ask(near, key=None)[0].status in (400, 401) or near == path, near


def reaches_nothing(place: Place, key: str) -> None:
    """Its caller sees their own standing and the lists, and no upstream and no administration."""
    for method, path, reply, got in walk(place, key):
        if method == "GET" and path in OWN:
            assert reply.status == 200, (path, reply.data)
        else:
            assert reply.status in (400, 403, 404, 405), (method, path, reply.data)
        assert got == [], (method, path)
        if path.startswith("/admin/"):
            assert reply.status == 403, (method, path)


def test_a_user_without_permissions_reaches_no_upstream_and_no_administration(place: Place) -> None:
    reaches_nothing(place, NOBODY)


def test_a_read_only_key_gets_and_changes_nothing(place: Place) -> None:
    reached = 0
    for method, path, reply, got in walk(place, READER):
        if method != "GET" or path.startswith(("/admin/", "/debug/")):
            assert (reply.status, got) == (403, []), (method, path, reply.data)
        else:
            assert reply.status in (200, 400, 404), (method, path, reply.data)
            reached += len(got)
    assert reached > 10


def test_a_key_narrowed_to_one_endpoint_gets_that_one_only_even_an_administrators(place: Place) -> None:
    for method, path, reply, got in walk(place, LISTER):
        allowed = (method, path) == ("GET", "/v1/models")
        assert (reply.status, got) == (200 if allowed else 403, []), (method, path, reply.data)


def test_a_key_narrowed_to_agents_gets_no_model_no_provider_and_no_administration(place: Place) -> None:
    reaches_nothing(place, AGENTIC)
    for path in ("/v1/models", "/openai-main/v1/models", "/plain/v1/models"):
        assert place.ask(path, key=AGENTIC)[0].json["data"] == []


def test_an_administrator_is_refused_nowhere(place: Place) -> None:
    reached = 0
    for method, path, reply, got in walk(place, ADMIN):
        assert reply.status not in (401, 402, 403, 429, 500), (method, path, reply.data)
        reached += len(got)
    assert reached > 100


SPELLINGS = [
    "/%61dmin/users", "/ADMIN/users", "/Admin/users", "/admin/users/", "/admin;x/users", "/admin%2fusers",
    "/admin%2Fusers",
    "//admin/users", "/./admin/users", "/v1/../admin/users", "/v1/%2e%2e/admin/users", "/v1/..%2fadmin/users",
    "/admin//users", "/admin/./users", "/admin/users;x", "/admin/users%20", "/admin/users%00", "/admin/%75sers",
    "/admin\\users", "/proxy/../admin/users", "/proxy/admin/users", "/admin/v1/users", "/v1/admin/users",
    "/openai-main/v1/../../admin/users", "/healthz/../admin/users", "/admin/users.json", "/_admin/users",
]  # fmt: skip


@pytest.mark.parametrize("target", SPELLINGS)
def test_only_the_exact_spelling_reaches_the_administration(place: Place, target: str) -> None:
    """And without an administrator's key none of them does."""
    for key in (None, NOBODY):
        reply, got = place.ask(target, key=key)
        assert reply.status in (400, 401, 403, 404) and got == [], (key, reply.data)
    reply, _ = place.ask(target, key=ADMIN)
    assert b'"nobody"' not in reply.body and b"permissions" not in reply.body, reply.data


def test_the_form_of_the_target_does_not_change_what_a_narrowed_key_may(place: Place) -> None:
    """An absolute-form target that names this host is its path, for the decision too."""
    for path, status in (("/v1/models", 200), ("/v1/me", 403), ("/admin/users", 403), ("/v1beta/models", 403)):
        for target in (path, f"http://gateway.test{path}", f"HTTP://GATEWAY.TEST{path}"):
            reply, got = place.ask(target, key=LISTER)
            assert (reply.status, got) == (status, []), (target, reply.data)
    reply, _ = place.ask("http://gateway.test/v1/models?key=" + ADMIN, key=None)
    assert reply.status == 200
    line = place.gateway.request(reply.header("x-request-id") or "")
    assert line["path"] == "/v1/models"  # the string that is logged is the one that was decided upon


def test_other_headers_lend_no_right(place: Place) -> None:
    odd = [
        ("X-HTTP-Method-Override", "GET"), ("X-Original-URL", "/admin/users"), ("X-Rewrite-URL", "/admin/users"),
        ("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-User", "root"), ("X-User", "root"), ("X-Role", "admin"),
        ("Cookie", f"key={ADMIN}"), ("Proxy-Authorization", f"Bearer {ADMIN}"), ("Forwarded", "for=127.0.0.1"),
        ("x-api-key", ADMIN), ("x-goog-api-key", ADMIN), ("Host", "localhost"),
    ]  # fmt: skip
    reply, got = place.ask("/admin/users", key=NOBODY, headers=odd[:-1])
    assert (reply.status, got) == (403, [])
    reply, got = place.ask("/v1/chat/completions", {"model": "openai-main/small"}, key=READER, headers=odd[:-1])
    assert (reply.status, got) == (403, [])


# A change holds from the next request on, on connections that are open and on the short way as well (E03, E10).

CHAT = {"model": "openai-main/small", "messages": []}


def _past() -> str:
    return (datetime.now(UTC) - timedelta(seconds=1)).isoformat()


CHANGES: dict[str, tuple[str, str, Any, int]] = {
    "the key is deleted": ("DELETE", "/keys/k", None, 401),
    "the user is deleted": ("DELETE", "", None, 401),
    "the key is disabled": ("PATCH", "/keys/k", {"enabled": False}, 401),
    "the key expires": ("PATCH", "/keys/k", {"expires_at": _past()}, 401),
    "the role reads only": ("PATCH", "", {"role": "read-only"}, 403),
    "the permissions go": ("PUT", "/permissions", [], 403),
    "the permissions change": ("PUT", "/permissions", ["openai-main/big", "anthropic-main/*"], 403),
    "the key is narrowed to models": ("PATCH", "/keys/k", {"models": ["openai-main/big"]}, 403),
    "the key is narrowed to endpoints": ("PATCH", "/keys/k", {"endpoints": ["GET /v1/*"]}, 403),
    "the key is narrowed to agents": ("PATCH", "/keys/k", {"agents": ["build"]}, 403),
    "the money is taken": ("PUT", "/quota", {"usd": "0"}, 402),
    "the key's money is taken": ("PATCH", "/keys/k", {"budget": {"usd": "0"}}, 402),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["aggregated", "scoped", "raw"])
def test_a_change_holds_on_a_connection_that_is_known_to_the_short_way(place: Place, form: str, change: str) -> None:
    method, below, body, status = CHANGES[change]
    name, token = place.new_user()
    path = {"aggregated": "", "scoped": "/openai-main", "raw": "/proxy/openai-main"}[form] + "/v1/chat/completions"
    chat = raw.request(path, CHAT if form == "aggregated" else {**CHAT, "model": "small"}, key=token)
    with raw.connect(place.gateway.port) as sock:
        for _ in range(4):
            sock.sendall(chat)
            assert raw.read(sock).status == 200
        assert place.gateway.daemon.gateway.snapshot.known or form == "raw"
        place.administer(method, f"/admin/users/{name}{below}", body)
        before = len(place.upstream.requests)
        sock.sendall(chat)
        reply = raw.read(sock)
        assert reply.status == status, reply.data
        assert place.upstream.requests[before:] == []
    assert place.send(chat)[0].status == status


def test_a_right_that_is_given_back_holds_at_once_too(place: Place) -> None:
    name, token = place.new_user(permissions=[])
    chat = raw.request("/v1/chat/completions", CHAT, key=token)
    with raw.connect(place.gateway.port) as sock:
        for permissions, status in ((["*"], 200), ([], 403), (["openai-main/small"], 200), (["openai-main/smal"], 403)):
            place.administer("PUT", f"/admin/users/{name}/permissions", permissions)
            for _ in range(3):
                sock.sendall(chat)
                assert raw.read(sock).status == status
        place.administer("PUT", f"/admin/users/{name}/permissions", ["*"])
        for enabled, status in ((False, 401), (True, 200), (False, 401), (True, 200)):
            place.administer("PATCH", f"/admin/users/{name}/keys/k", {"enabled": enabled})
            sock.sendall(chat)
            assert raw.read(sock).status == status


def test_a_key_expires_between_two_requests_of_one_connection(place: Place) -> None:
    edge = datetime.now(UTC) + timedelta(milliseconds=600)
    _, token = place.new_user(keys=[{"name": "k", "expires_at": edge.isoformat()}])
    chat = raw.request("/v1/chat/completions", CHAT, key=token)
    with raw.connect(place.gateway.port) as sock:
        statuses = []
        while datetime.now(UTC) < edge + timedelta(milliseconds=200):
            asked = datetime.now(UTC)
            sock.sendall(chat)
            status = raw.read(sock).status
            statuses.append(status)
            if asked >= edge:
                assert status == 401
            elif datetime.now(UTC) < edge:
                assert status == 200
            time.sleep(0.01)
    assert {200, 401} == set(statuses)
    assert statuses == sorted(statuses)


def test_one_connection_bears_many_callers_and_remembers_none(place: Place) -> None:
    wanted = [
        (ANN, 200),
        (ANN, 200),
        (NOBODY, 403),
        (None, 401),
        (ANN, 200),
        (READER, 403),
        (UNKNOWN, 401),
        (ADMIN, 200),
    ]
    with raw.connect(place.gateway.port) as sock:
        for key, status in wanted * 3:
            sock.sendall(raw.request("/v1/chat/completions", CHAT, key=key))
            assert raw.read(sock).status == status


def test_the_short_way_asks_for_every_models_permission(place: Place) -> None:
    """The same head with another model in the body."""
    with raw.connect(place.gateway.port) as sock:
        for model, status in (("small", 200), ("small", 200), ("big", 403), ("small", 200), ("small-two", 403)) * 2:
            sock.sendall(raw.request("/v1/chat/completions", {"model": f"openai-main/{model}"}, key=ANN))
            assert raw.read(sock).status == status


def test_a_user_deleted_while_their_request_runs_pays_for_it(place: Place) -> None:
    """What was admitted is answered, and booked to the caller that it was admitted for (E14)."""
    name, token = place.new_user(quota={"usd": "1.00"})
    place.pause = 0.3
    try:
        with raw.connect(place.gateway.port) as sock:
            before = len(place.upstream.requests)
            sock.sendall(raw.request("/v1/chat/completions", CHAT, key=token))
            until(lambda: len(place.upstream.requests) > before)
            place.administer("DELETE", f"/admin/users/{name}")
            reply = raw.read(sock)
    finally:
        place.pause = 0.0
    assert reply.status == 200 and reply.complete
    path = f"/admin/usage?user={name}"
    (row,) = until(lambda: place.administer("GET", path)["data"])
    assert (row["user"], row["key"], row["status"], row["model"]) == (name, "k", 200, "small")
    until(place.gateway.at_rest)
    assert place.gateway.daemon.gateway.books.quotas.held() == 0


def test_unknown_keys_are_looked_for_in_memory_and_leave_nothing(place: Place) -> None:
    """E11: however many are tried, neither the database nor the table of callers grows."""
    database = sqlite3.connect(f"file:{place.gateway.folder}/state.db?mode=ro", uri=True)

    def count() -> list[Any]:
        counts = ("SELECT count(*) FROM usage", "SELECT count(*) FROM audit", "SELECT count(*) FROM keys")
        return [database.execute(sql).fetchone() for sql in counts]

    until(lambda: place.administer("GET", "/admin/usage?limit=1")["data"])
    ledger = place.gateway.daemon.state.ledger
    assert ledger is not None
    until(lambda: ledger.queued == 0)
    before, callers = count(), len(place.gateway.daemon.gateway.snapshot.callers)
    with raw.connect(place.gateway.port) as sock:
        for number in range(500):
            sock.sendall(raw.request("/v1/chat/completions", b"", key=f"sk-{number}-{secrets.token_hex(8)}"))
            assert raw.read(sock).status == 401
    until(lambda: ledger.queued == 0)
    assert count() == before and len(place.gateway.daemon.gateway.snapshot.callers) == callers
    database.close()


def test_refusals_take_the_same_time_whatever_is_wrong_with_the_key(place: Place) -> None:
    times: dict[str, list[float]] = {key: [] for key in (UNKNOWN, DISABLED, EXPIRED, "x" * len(UNKNOWN))}
    with raw.connect(place.gateway.port) as sock:
        for _ in range(300):
            for key, taken in times.items():
                began = time.perf_counter()
                sock.sendall(raw.request("/v1/models", key=key))
                assert raw.read(sock).status == 401
                taken.append(time.perf_counter() - began)
    medians = [statistics.median(taken) for taken in times.values()]
    assert max(medians) < 1.5 * min(medians), medians


# The decision is on the very name that was sent (E12).

NAMES: dict[str, tuple[int, ...]] = {
    "small": (200,), "small ": (400, 403), " small": (400, 403), "SMALL": (403,), "Small": (403,),
    "ｓｍａｌｌ": (400, 403), "smaIl": (403,), "small-two": (403,), "small-evil": (403,), "small/": (403,),
    "small/x": (403,),
    "smal": (403,), "big": (403,), "quick": (403,), "slow": (403,), "small*": (400, 403), "*": (400, 403),
    "small?": (400, 403), "openai-main/small": (403,), "small\u0000": (400, 403), "small\u200b": (400, 403),
    "./small": (400, 403), "../small": (400, 403), "small/../big": (400, 403), "small#big": (400, 403),
    "%73mall": (400, 403),
    "small:big": (403,), "small,big": (403,), "small\n": (400, 403), "": (400, 403), "nobody/small": (403,),
    "smаll": (400, 403),
}  # fmt: skip
"""Names as the scoped and raw forms take them -> what a caller with `openai-main/small` may be told."""


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("form", ["scoped", "raw"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank"])
def test_a_spelling_is_allowed_only_if_it_is_the_permitted_one(place: Place, form: str, path: str, name: str) -> None:
    prefix = "/openai-main" if form == "scoped" else "/proxy/openai-main"
    reply, got = place.ask(prefix + path, {"model": name, "x": 1}, key=TARGET)
    assert reply.status in NAMES[name], reply.data
    assert [json.loads(one.body)["model"] for one in got] == (["small"] if reply.status == 200 else [])


AGGREGATED: dict[str, tuple[int, ...]] = {f"openai-main/{name}": statuses for name, statuses in NAMES.items()} | {
    "small": (400,), "OpenAI-main/small": (400, 403), "openai-main//small": (403,), "/openai-main/small": (400,),
    "openai-main": (400,), "openai-main/": (400, 403), "anthropic-main/small": (403,), "plain/small": (403,),
    "openai-main%2fsmall": (400,), "openai-main\\small": (400,), "quick": (403,),
    "openai-main/openai-main/small": (403,),
}  # fmt: skip


@pytest.mark.parametrize("name", AGGREGATED, ids=ascii)
def test_an_aggregated_spelling_is_allowed_only_if_it_is_the_permitted_one(place: Place, name: str) -> None:
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/completions"):
        reply, got = place.ask(path, {"model": name, "x": 1}, key=TARGET)
        assert reply.status in AGGREGATED[name], reply.data
        assert [json.loads(one.body)["model"] for one in got] == (["small"] if reply.status == 200 else [])


@pytest.mark.parametrize(
    "segment",
    [
        "big", "small%20", "SMALL", "%73mall", "small%2f..%2fbig", "small%252f..%252fbig", "small/../big", "small%00",
        "small/big", "small,big", "quick", "flash", "vertex-main/small", "vertex-main%2fsmall",
        "tunedModels/small", "small;big",
        "models/small", "small%3Fx",
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["generateContent", "streamGenerateContent", "countTokens", "embedContent"])
def test_a_model_in_a_path_is_judged_as_it_is_spelled(place: Place, segment: str, verb: str) -> None:
    for prefix in ("/v1beta/models/", "/vertex-main/v1beta/models/", "/proxy/vertex-main/v1beta/models/"):
        reply, got = place.ask(f"{prefix}{segment}:{verb}", {}, key=VIC)
        if (prefix, segment) == ("/v1beta/models/", "vertex-main/small"):
            assert reply.status == 200 and got[0].target.endswith(b"/models/small:" + verb.encode()), reply.data
        else:
            assert reply.status in (400, 403) and got == [], (prefix, reply.data)
    for prefix in ("/vertex-main/v1beta/models/", "/proxy/vertex-main/v1beta/models/"):
        reply, got = place.ask(f"{prefix}small:{verb}", {}, key=VIC)
        assert reply.status == 200 and len(got) == 1, reply.data


# A body may not be a way round: what the upstream could read as another model than the gateway did.

LARGE = "x" * 300 * 1024


def _chunked(body: bytes, cut: int) -> bytes:
    pieces = [body[at : at + cut] for at in range(0, len(body), cut)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def form_of(*fields: tuple[str, str]) -> bytes:
    parts = (f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in fields)
    return ("".join(parts) + "--b--\r\n").encode()


ROUND: dict[str, bytes] = {
    "another model": b'{"model":"big"}',
    "twice, the good one last": b'{"model":"big","model":"small"}',
    "twice, the good one first": b'{"model":"small","model":"big"}',
    "twice the same": b'{"model":"small","model":"small"}',
    "twice, one escaped": b'{"model":"small","mod\\u0065l":"big"}',
    "twice, the other escaped": b'{"mod\\u0065l":"big","model":"small"}',
    "an escaped name": b'{"\\u006dodel":"big"}',
    "an escaped value": b'{"model":"\\u0062ig"}',
    "nested": b'{"model":{"model":"small"}}',
    "nested elsewhere": b'{"x":{"model":"small"}}',
    "a list": b'{"model":["small"]}',
    "a number": b'{"model":1}',
    "null": b'{"model":null}',
    "true": b'{"model":true}',
    "empty": b'{"model":""}',
    "none": b'{"messages":[]}',
    "an empty object": b"{}",
    "no body": b"",
    "a list of objects": b'[{"model":"small"}]',
    "a text": b'"model"',
    "two documents": b'{"model":"small"}{"model":"big"}',
    "two lines": b'{"model":"small"}\n{"model":"big"}',
    "a document with a tail": b'{"model":"small"} big',
    "a broken one": b'{"model":"small"',
    "a broken one with another": b'{"model":"small"},"model":"big"}',
    "a byte order mark": b'\xef\xbb\xbf{"model":"big"}',
    "UTF-16": '{"model":"big"}'.encode("utf-16"),
    "UTF-32": '{"model":"big"}'.encode("utf-32-le"),
    "a comment": b'{"model":"small"/*,*/,"model":"big"}',
    "single quotes": b"{'model':'big'}",
    "a trailing comma": b'{"model":"small",}',
    "NUL": b'{"model":"small\0big"}',
    "a lone surrogate": b'{"model":"small","\\ud800":1,"model":"big"}',
    "an invalid byte": b'{"model":"small","x":"\xff","model":"big"}',
    "gzip": gzip.compress(b'{"model":"big"}'),
    "large, the other last": _dump({"model": "small", "x": LARGE})[:-1] + b',"model":"big"}',
    "large, the other first": b'{"model":"big",' + _dump({"x": LARGE, "model": "small"})[1:],
    "large and nested": _dump({"x": {"model": "small"}, "y": LARGE}),
    "large and escaped": _dump({"model": "small", "x": LARGE})[:-1] + b',"\\u006d\\u006fdel":"big"}',
    "large and none": _dump({"x": LARGE}),
    "large and other": _dump({"x": LARGE, "model": "big"}),
    "large and broken": _dump({"model": "small", "x": LARGE})[:-1],
    "a form": form_of(('name="model"', "small")),
    "fields": b"model=small",
}  # fmt: skip
HEADS: dict[str, list[tuple[str, str]]] = {
    "json": [JSON],
    "json with a charset": [("Content-Type", "application/json; charset=utf-16")],
    "no type": [],
    "text": [("Content-Type", "text/plain")],
    "a form": [("Content-Type", "multipart/form-data; boundary=b")],
    "fields": [("Content-Type", "application/x-www-form-urlencoded")],
    "gzip": [JSON, ("Content-Encoding", "gzip")],
    "octets": [("Content-Type", "application/octet-stream")],
}
BEHIND = {
    "aggregated": "/v1/chat/completions",
    "scoped": "/openai-main/v1/chat/completions",
    "raw": "/proxy/openai-main/v1/chat/completions",
    "raw without aliases": "/proxy/plain/v1/chat/completions",
    "raw, unknown path": "/proxy/openai-main/v9/x",
    "scoped, unknown path": "/openai-main/v1/x",
    "raw messages": "/proxy/anthropic-main/v1/messages",
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", BEHIND)
def test_no_body_leads_round_a_permission(place: Place, form: str, head: str) -> None:
    """The caller may call `small` and nothing else; each body could be read as something else by somebody."""
    for what, body in ROUND.items():
        data = body.replace(b'"small', b'"openai-main/small') if form == "aggregated" else body
        reply, got = place.ask(BEHIND[form], data, key=ANN, headers=HEADS[head])
        assert reply.status in (400, 403, 415), (what, reply.data[:500])
        assert got == [], (what, got[0].body[:200])


@pytest.mark.parametrize("cut", [1, 7, 100_000])
@pytest.mark.parametrize("form", BEHIND)
def test_no_chunked_body_leads_round_a_permission(place: Place, form: str, cut: int) -> None:
    for what, body in ROUND.items():
        if len(body) > 1000 > cut:
            continue
        data = body.replace(b'"small', b'"openai-main/small') if form == "aggregated" else body
        head = raw.request(BEHIND[form], b"", key=ANN, headers=[JSON, ("Transfer-Encoding", "chunked")])
        for parts in ([head + _chunked(data, cut)], [(head, 0.003), _chunked(data, cut)]):
            reply, got = place.send(parts)
            assert reply.status in (400, 403, 415), (what, reply.data[:500])
            assert got == [], (what, got[0].body[:200])


@pytest.mark.parametrize("form", ["aggregated", "scoped", "raw", "raw messages"])
def test_a_chunked_body_is_judged_alike_however_it_arrives(place: Place, form: str) -> None:
    """Whether its last byte is here when the request is looked at is nobody's merit."""
    body = b'{"model":"openai-main/small"}' if form == "aggregated" else b'{"model":"small"}'
    head = raw.request(BEHIND[form], b"", key=ANN, headers=[JSON, ("Transfer-Encoding", "chunked")])
    whole = _chunked(body, 9)
    statuses = [
        place.send(parts)[0].status
        for parts in ([head + whole], [(head, 0.02), whole], [(head + whole[:9], 0.02), whole[9:]])
    ]
    assert statuses == [200, 200, 200]


DECOYS = [
    ("GET", "/v1/files"), ("GET", "/v1/files/x1"), ("GET", "/v1/files/x1/content"), ("DELETE", "/v1/files/x1"),
    ("GET", "/v1/models"), ("GET", "/v1/batches"), ("POST", "/v1/batches"), ("POST", "/v1/files"),
    ("POST", "/v1/batches/b/cancel"), ("GET", "/v1/responses/r"), ("DELETE", "/v1/responses/r"),
    ("POST", "/v1/responses/r/cancel"), ("GET", "/v1/responses/r/input_items"), ("GET", "/v1/anything"),
    ("POST", "/v1/a2a"),
    ("DELETE", "/v1/anything"), ("HEAD", "/v1/files"), ("OPTIONS", "/v1/files"), ("GET", "/v1/chat/completions"),
    ("DELETE", "/v1/chat/completions"), ("GET", "/anything"), ("GET", "/"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), DECOYS, ids=lambda value: value)
def test_a_model_in_a_body_that_nobody_reads_opens_nothing(place: Place, method: str, path: str) -> None:
    """Vendors take no model from the body there,
    so whoever may call one model may not read all files by naming it."""
    for prefix in ("/proxy/openai-main", "/openai-main", "/proxy/plain", "/plain"):
        reply, got = place.ask(prefix + path, {"model": "small"}, key=ANN, method=method)
        own = prefix in ("/openai-main", "/plain") and path == "/v1/models"
        assert got == [], (prefix, got[0].target)
        assert reply.status in ((200,) if own else (401, 403, 404, 405)), (prefix, reply.data)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/projects/p/locations/l/publishers/google/models/big:generateContent",
        "/v1beta/tunedModels/big:generateContent",
        "/openai/deployments/big/chat/completions", "/model/big/invoke", "/v1/engines/big/completions",
        "/v1beta2/models/big:predict",
        "/v1beta/models/big:somethingNew", "/v1/models/big:predict", "/v1beta/models/big:batchGenerateContent",
    ],
)  # fmt: skip
def test_a_model_in_the_body_does_not_cover_for_one_in_the_path(place: Place, path: str) -> None:
    """Deployments, tuned models, methods that are unknown here: the path decides, and a body could say anything."""
    for provider, key in (("vertex-main", VIC), ("openai-main", ANN)):
        reply, got = place.ask(f"/proxy/{provider}{path}", {"model": "small"}, key=key)
        assert reply.status in (403, 404) and got == [], reply.data


FORMS: dict[str, bytes] = {
    "other": form_of(('name="model"', "big")),
    "two": form_of(('name="model"', "small"), ('name="model"', "big")),
    "two behind a file": form_of(
        ('name="model"', "small"), ('name="file"; filename="f"', LARGE), ('name="model"', "big")
    ),
    "two with unlike quotes": form_of(('name="model"', "small"), ("name=model", "big")),
    "two, one escaped": form_of(('name="model"', "small"), ('name="mo\\del"', "big")),
    "two, one encoded": form_of(('name="model"', "small"), ("name*=utf-8''model", "big")),
    "one that is a file": form_of(('name="model"; filename="big"', "big")),
    "none": form_of(('name="x"', "small")),
    "padded": form_of(('name="model"', " small")),
    "upper case": form_of(('name="model"', "SMALL")),
    "no end": form_of(('name="model"', "big"))[:-6],
    "no form": b'{"model":"small"}',
}
"""Forms of which none may pass where only `small` is allowed."""


@pytest.mark.parametrize("what", FORMS)
@pytest.mark.parametrize("prefix", ["", "/openai-main", "/plain", "/proxy/openai-main", "/proxy/plain"])
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/images/edits"])
def test_no_form_leads_round_a_permission(place: Place, prefix: str, path: str, what: str) -> None:
    body = FORMS[what].replace(b"small", b"openai-main/small") if not prefix else FORMS[what]
    reply, got = place.ask(prefix + path, body, key=ANN, headers=HEADS["a form"])
    assert reply.status in (400, 403), reply.data[:500]
    assert not any(one.complete for one in got)  # what had begun to go is no whole request


def test_a_form_with_the_permitted_model_passes(place: Place) -> None:
    for prefix, model in (("", "openai-main/small"), ("/openai-main", "small"), ("/plain", "small")):
        body = form_of(('name="file"; filename="f"', "x"), ('name="model"', model))
        reply, got = place.ask(f"{prefix}/v1/audio/transcriptions", body, key=ANN, headers=HEADS["a form"])
        assert reply.status == 200 and b"\r\n\r\nsmall\r\n" in got[0].body, reply.data


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/v1/files"), ("POST", "/v1/files"), ("DELETE", "/v1/files/x"), ("GET", "/v1/batches"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/files?provider=anthropic-main"), ("GET", "/openai-main/v1/files/x/content"), ("GET",
        "/v1/responses/r"),
        ("GET", "/proxy/openai-main/v1/files"), ("PUT", "/proxy/openai-main/x"), ("POST", "/v1/images/generations"),
        ("POST", "/v1/rerank"), ("POST", "/v1/moderations"), ("HEAD", "/proxy/openai-main/x"),
    ],
)  # fmt: skip
def test_what_names_no_model_needs_everything_of_its_provider(place: Place, method: str, target: str) -> None:
    body = {} if method == "POST" else None
    for key in (ANN, TARGET, ALIAS, GLOB, HALF, VIC, NOBODY):
        reply, got = place.ask(target, body, key=key, method=method)
        assert (reply.status, got) == (403, []), (key, reply.data)
        reply, got = place.ask(target, body, key=key, method=method, headers=[("x-gproxyd-provider", "plain")])
        assert (reply.status, got) == (403, []), (key, reply.data)
    allowed = 403 if "anthropic" in target else 200
    assert place.ask(target, body, key=WIDE, method=method)[0].status == allowed
    assert place.ask(target, body, key=ADMIN, method=method)[0].status == 200


# Aliases need their own permission.


@pytest.mark.parametrize(
    ("key", "name", "statuses"),
    [  # aggregated, scoped, raw
        (TARGET, "quick", (403, 403, 403)), (TARGET, "openai-main/quick", (403, 403, 403)),
        (ALIAS, "quick", (200, 200, 200)), (ALIAS, "openai-main/small", (403, 403, 403)), (ALIAS, "small",
        (400, 403, 403)),
        (ALIAS, "slow", (403, 403, 403)), (WIDE, "quick", (403, 200, 200)), (WIDE, "openai-main/quick", (200,
        200, 200)),
        (WIDE, "flash", (200, 200, 200)), (GLOB, "clever", (200, 403, 403)), (GLOB, "quick", (403, 403, 403)),
        (HALF, "quick", (403, 403, 403)), (HALF, "openai-main/small", (200, 200, 200)), (ADMIN, "quick", (200,
        200, 200)),
    ],
)  # fmt: skip
def test_an_alias_inherits_nothing_from_its_target(
    place: Place, key: str, name: str, statuses: tuple[int, int, int]
) -> None:
    """In the scoped and raw forms a name that is no alias of that provider is asked about as the provider's own."""
    for prefix, status in zip(("", "/openai-main", "/proxy/openai-main"), statuses, strict=True):
        if prefix and name == "flash":
            continue
        path = "/v1beta/models/flash:generateContent" if name == "flash" else f"{prefix}/v1/chat/completions"
        reply, got = place.ask(path, {"model": name}, key=key)
        if name == "clever":
            reply, got = place.ask(f"{prefix}/v1/messages", {"model": name}, key=key)
            status = 501 if status == 403 and reply.status == 501 else status
        assert reply.status == status, (prefix, reply.data)
        assert len(got) == (status == 200)


# The list of models is exactly what the caller may call.

LISTS = {
    "openai": ("/v1/models", [], "data", "id"),
    "anthropic": ("/v1/models", [("anthropic-version", "2023-06-01")], "data", "id"),
    "gemini": ("/v1beta/models", [], "models", "name"),
}
PEOPLE = {"admin": ADMIN, "nobody": NOBODY, "ann": ANN, "target": TARGET, "alias": ALIAS, "wide": WIDE, "glob": GLOB,
          "half": HALF, "vic": VIC, "agentic": AGENTIC}  # fmt: skip
PROVIDERS = ("openai-main", "anthropic-main", "vertex-main", "plain")


def listed(place: Place, key: str, dialect: str, provider: str | None) -> set[str]:
    path, headers, member, field = LISTS[dialect]
    reply, got = place.ask(f"/{provider}{path}" if provider else path, key=key, headers=headers)
    assert (reply.status, got) == (200, []), reply.data
    return {entry[field].removeprefix("models/") for entry in reply.json[member]}


def call(place: Place, key: str, name: str, home: str, scope: str | None) -> int:
    """The status of a request for a model, in the dialect of the provider that it is at."""
    prefix = f"/{scope}" if scope else ""
    if home == "vertex-main":
        return place.ask(f"{prefix}/v1beta/models/{name}:generateContent", {}, key=key)[0].status
    path = "/v1/messages" if home == "anthropic-main" else "/v1/chat/completions"
    return place.ask(prefix + path, {"model": name}, key=key)[0].status


@pytest.mark.parametrize("who", PEOPLE)
@pytest.mark.parametrize("scope", [None, *PROVIDERS])
def test_the_list_of_models_is_what_the_caller_may_call(place: Place, who: str, scope: str | None) -> None:
    key = PEOPLE[who]
    reply, _ = place.ask(f"/{scope}/v1/models" if scope else "/v1/models", key=ADMIN)
    homes = {entry["id"]: entry["owned_by"] for entry in reply.json["data"]}
    callable_ = {name for name, home in homes.items() if call(place, key, name, home, scope) == 200}
    for dialect in LISTS:
        assert listed(place, key, dialect, scope) == callable_, dialect
    for name in homes:
        path = f"/{scope}/v1/models/{name}" if scope else f"/v1/models/{name}"
        for headers in ([], [("anthropic-version", "x")]):
            one, got = place.ask(path, key=key, headers=headers)
            assert (one.status, got) == (200 if name in callable_ else 404, []), (name, one.data)
            assert one.status != 200 or one.json["id"] == name
        one, _ = place.ask(path.replace("/v1/", "/v1beta/"), key=key)
        assert one.status == (200 if name in callable_ else 404)
    expected = {"admin": True, "nobody": False, "agentic": False}
    assert bool(callable_) == expected.get(who, bool(callable_))


def test_the_lists_of_different_people_differ_as_written(place: Place) -> None:
    assert listed(place, ANN, "openai", None) == {"openai-main/small", "anthropic-main/small", "plain/small"}
    assert listed(place, ALIAS, "openai", None) == {"quick"} == listed(place, ALIAS, "openai", "openai-main")
    assert listed(place, WIDE, "openai", None) == {
        "openai-main/small",
        "openai-main/small-two",
        "openai-main/big",
        "flash",
    }
    assert listed(place, GLOB, "anthropic", None) == {
        "openai-main/small", "openai-main/small-two", "anthropic-main/small", "vertex-main/small",
        "plain/small", "clever",
    }  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/openai-main/small", "/v1beta/models", "/v1/me", "/v1/me/usage", "/v1/me/quota"]
)
def test_head_is_get_without_its_body_for_everybody(place: Place, path: str) -> None:
    for key in (None, UNKNOWN, NOBODY, READER, LISTER, ANN, AGENTIC, ADMIN):
        got, _ = place.ask(path, key=key)
        with raw.connect(place.gateway.port) as sock:
            sock.sendall(raw.request(path, key=key, method="HEAD") + raw.request("/healthz", key=None))
            data = b""
            while not data.endswith(b"\r\n\r\nOK"):
                data += sock.recv(65536)
        head = raw.Reply(data, "fin")
        assert head.status == got.status, (key, head.data)
        assert data.count(b"HTTP/1.1 ") == 2 and data.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 200")
        if path != "/v1/me/usage" and "me" not in path:
            assert head.header("content-length") == got.header("content-length")


# What callers may know of themselves.


def test_everybody_sees_themselves_and_nobody_else(place: Place) -> None:
    for key, name in ((NOBODY, "nobody"), (READER, "reader"), (ANN, "ann"), (ADMIN, "root"), (AGENTIC, "root")):
        me = place.ask("/v1/me", key=key)[0].json
        assert me["name"] == name and len(me["keys"]) == 1
        text = json.dumps(me)
        assert not any(other in text for other in (ADMIN, NOBODY, ANN, "digest", "sha256", "token"))
        assert place.ask("/v1/me/quota", key=key)[0].json["usd"] is None
    assert {key["name"] for key in place.ask("/v1/me", key=AGENTIC)[0].json["keys"]} == {"agentic"}


def test_usage_is_ones_own_whatever_the_query_says(place: Place) -> None:
    name, token = place.new_user()
    other, others = place.new_user()
    for key in (token, others):
        assert place.ask("/v1/chat/completions", CHAT, key=key)[0].status == 200
    rows = until(lambda: place.ask("/v1/me/usage?endpoint=chat", key=token)[0].json["data"])
    until(lambda: place.administer("GET", f"/admin/usage?user={other}")["data"])
    assert {row["user"] for row in rows} == {name}
    for query in (f"user={other}", f"user={name}&user={other}", "USER=x"):
        assert place.ask(f"/v1/me/usage?{query}", key=token)[0].status == 400
    for query in (f"key={other}/k", f"key={other}%2Fk", "key=root/main"):
        reply = place.ask(f"/v1/me/usage?{query}", key=token)[0]
        assert (reply.status, reply.json["data"]) == (200, [])
    for group in ("user", "key", "provider", "model", "day"):
        sums = place.ask(f"/v1/me/usage?group_by={group}&endpoint=chat", key=token)[0].json["data"]
        assert sum(row["requests"] for row in sums) == 1, sums
    table = place.ask("/v1/me/usage?format=csv", key=token)[0]
    assert other.encode() not in table.body and name.encode() in table.body


@pytest.mark.parametrize("path", ["/v1/me", "/v1/me/usage", "/v1/me/quota"])
def test_nobody_changes_themselves(place: Place, path: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for key, status in ((ANN, 405), (ADMIN, 405), (READER, 403), (UNKNOWN, 401), (LISTER, 403)):
            reply, got = place.ask(path, {}, key=key, method=method)
            assert (reply.status, got) == (status, []), reply.data
    for near in (path + "/", path + "/x", "/v1beta/me", "/V1/me"):
        assert place.ask(near, key=ANN)[0].status == 404


# Endpoints.


@pytest.mark.parametrize(
    ("globs", "allowed", "refused"),
    [
        (["POST /v1/chat/completions"], ["POST /v1/chat/completions"],
         ["GET /v1/models", "POST /v1/completions", "POST /openai-main/v1/chat/completions",
         "POST /v1/chat/completions/",
          "POST /proxy/openai-main/v1/chat/completions", "GET /v1/me", "POST /V1/chat/completions"]),
        (["* /proxy/plain/*"], ["POST /proxy/plain/v1/chat/completions", "GET /proxy/plain/x",
        "DELETE /proxy/plain/a/b"],
         ["POST /proxy/openai-main/v1/chat/completions", "GET /proxy/plainer/x", "GET /proxy/PLAIN/x",
         "GET /v1/models",
          "POST /plain/v1/chat/completions", "GET /proxy/%70lain/x", "GET /proxy/plain"]),
        (["GET *"], [], []),
        (["GET /v1/*"], ["GET /v1/models", "HEAD /v1/models", "GET /v1/me", "GET /v1/files"],
         ["POST /v1/chat/completions", "GET /v1beta/models", "DELETE /v1/files/x", "OPTIONS /v1/models"]),
        (["HEAD /v1/models"], ["HEAD /v1/models"], ["GET /v1/models"]),
    ],
)  # fmt: skip
def test_a_key_is_narrowed_to_endpoints_by_method_and_path(
    place: Place, globs: list[str], allowed: list[str], refused: list[str]
) -> None:
    name, _ = place.new_user()
    made, _ = place.ask(f"/admin/users/{name}/keys", {"name": "narrow", "endpoints": globs}, key=ADMIN)
    if not allowed:
        assert made.status == 400  # a glob that names no path
        return
    token = made.json["token"]
    for one in allowed + refused:
        method, path = one.split()
        body = {"model": "small" if path[:4] != "/v1/" else "openai-main/small"} if method == "POST" else None
        data = raw.request(path, body, key=token, method=method)
        reply, _ = place.send(data)
        assert reply.status == (200 if one in allowed else 403), (one, reply.data)
    for path in ("/proxy/plain/../openai-main/x", "/proxy/plain/%2e%2e/openai-main/x", "/proxy/plain%2f../x"):
        reply, got = place.ask(path, key=token)
        assert reply.status == 400 and got == [], reply.data


def test_profiles_are_for_whole_administrators_and_only_where_they_are_switched_on(place: Place, loop: Loop) -> None:
    profiling = Place(loop, CONFIG + "debug: {pprof_enabled: true}\n")
    basic = {key: base64.b64encode(f"any:{key}".encode()).decode() for key in (ADMIN, ANN, UNKNOWN)}
    for path in ("/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/goroutine?debug=1"):
        for key, status in ((None, 401), (UNKNOWN, 401), (DISABLED, 401), (ANN, 403), (READER, 403), (LISTER, 403),
                            (AGENTIC, 403), (ADMIN, 200)):  # fmt: skip
            assert profiling.ask(path, key=key)[0].status == status, (path, key)
        for key, status in ((ADMIN, 200), (ANN, 403), (UNKNOWN, 401)):
            lines = [("Authorization", f"Basic {basic[key]}")]
            assert profiling.ask(path, key=None, headers=lines)[0].status == status, (path, key)
            assert profiling.ask("/v1/models", key=None, headers=lines)[0].status == 401
        assert place.ask(path, key=ADMIN)[0].status == 404
