"""The administration of a running daemon: over TCP with an administrator's key, and over its Unix socket.

What is asked for here is asked of the real thing: the change holds for traffic, is in the audit trail, and survives.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gproxyd.admin import api
from tests.support import raw
from tests.support.checks import quick_log
from tests.support.process import Process, run
from tests.support.raw import Reply
from tests.support.running import PROVIDER_KEY, Loop, Running, until
from tests.support.upstream import Upstream, json_reply

ADMIN, ANN, POOR, READER = "ak-admin-daemon", "ck-ann-daemon", "ck-poor-daemon", "ck-reader-daemon"
HEADER = "hs-header-secret-daemon"
SECRETS = {"provider-key": PROVIDER_KEY, "admin-key": ADMIN}

CONFIG = f"""\
server: {{listen: ["127.0.0.1:0"]}}
streams: {{keepalive: 100ms}}
providers:
  openai-main:
    vendor: openai
    base_url: "URL"
    credentials: [provider-key]
    headers: {{X-Trace-Key: {HEADER}}}
    models:
      - {{id: gpt-4.1-mini, context: 1000000, max_output: 1000, price: {{input: "1.00", output: "2.00"}}}}
      - {{id: other}}
  anthropic-main: {{vendor: anthropic, base_url: "URL", credentials: [provider-key], models: [{{id: claude}}]}}
aliases: {{chat-default: openai-main/gpt-4.1-mini}}
users:
  root: {{role: admin, keys: {{main: {{credential: admin-key}}}}}}
  ann: {{role: user, permissions: ["openai-main/*"], quota: {{usd: "10.00"}}, keys: {{laptop: {{token: {ANN}}}}}}}
  poor: {{role: user, permissions: ["*"], quota: {{usd: "0.001"}}, keys: {{k: {{token: {POOR}}}}}}}
  reader: {{role: read-only, permissions: ["*"], keys: {{k: {{token: {READER}}}}}}}
"""
ANSWER = json_reply(b'{"model":"m","usage":{"prompt_tokens":1000,"completion_tokens":500}}')
COST = "0.002"
"""US dollars: 1000 tokens at 1.00, 500 at 2.00 a million."""

CHAT = {"model": "openai-main/gpt-4.1-mini", "messages": [], "max_tokens": 10}


class Place:
    """A daemon that is administered. `tcp` and `unix` are the two ways there."""

    def __init__(self, loop: Loop, config: str = CONFIG) -> None:
        self.upstream = Upstream(loop, [ANSWER]).start()
        self.text = config.replace("URL", self.upstream.url)
        self.gateway: Running = loop.gateway(self.text, SECRETS)
        self.socket = self.gateway.folder / "admin.sock"
        self.number = 0

    def tcp(self, method: str, path: str, body: Any = None, *, key: str | None = ADMIN, headers: Any = ()) -> Reply:
        data = raw.request(path, body, key=key, method=method, headers=headers)
        with raw.connect(self.gateway.port) as sock:
            return raw.exchange(sock, data)

    def unix(self, method: str, path: str, body: Any = None, *, headers: Any = ()) -> Reply:
        return over_unix(self.socket, method, path, body, headers=headers)

    def ask(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        reply = self.tcp(method, path, body)
        assert reply.status == status, reply.data
        return reply.json

    def chat(self, key: str, **more: Any) -> Reply:
        return self.tcp("POST", "/v1/chat/completions", {**CHAT, **more}, key=key)

    def name(self) -> str:
        self.number += 1
        return f"u{self.number}"

    def user(self, **fields: Any) -> tuple[str, str]:
        """A new user of the database, and the secret of their key `k`."""
        name = fields.get("name") or self.name()
        made = self.ask(
            "POST", "/admin/users", {"name": name, "permissions": ["*"], "keys": [{"name": "k"}], **fields}, 201
        )
        return name, made["keys"][0]["token"]

    def quota(self, name: str) -> dict[str, Any]:
        told: dict[str, Any] = self.ask("GET", f"/admin/users/{name}/quota")
        return told

    def booked(self) -> None:
        """Waits until every record is in the database."""
        ledger = self.gateway.daemon.state.ledger
        assert ledger is not None
        until(lambda: ledger.queued == 0)


def over_unix(path: Path, method: str, target: str, body: Any = None, *, headers: Any = ()) -> Reply:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        return raw.exchange(sock, raw.request(target, body, key=None, method=method, headers=headers))


@pytest.fixture(scope="module")
def place(loop: Loop) -> Iterator[Place]:
    with quick_log():
        yield Place(loop)


# Every route, both ways.

STEPS: list[tuple[str, str, Any, int]] = [
    ("POST", "/admin/users", {"name": "NAME", "permissions": ["openai-main/*"], "quota": {"usd": "1.00"}}, 201),
    ("GET", "/admin/users", None, 200),
    ("GET", "/admin/users/NAME", None, 200),
    ("PATCH", "/admin/users/NAME", {"role": "read-only"}, 200),
    ("PUT", "/admin/users/NAME/permissions", ["chat-default"], 200),
    ("PUT", "/admin/users/NAME/permissions", {"permissions": ["chat-default", "openai-main/*"]}, 200),
    ("PUT", "/admin/users/NAME/rate-limits", [{"rpm": 5}], 200),
    ("GET", "/admin/users/NAME/quota", None, 200),
    ("PUT", "/admin/users/NAME/quota", {"usd": "2.50", "period": "month"}, 200),
    ("POST", "/admin/users/NAME/quota/top-up", {"usd": "5.00"}, 200),
    ("POST", "/admin/users/NAME/keys", {"name": "k1", "models": ["chat-default"]}, 201),
    ("PATCH", "/admin/users/NAME/keys/k1", {"enabled": False}, 200),
    ("DELETE", "/admin/users/NAME/keys/k1", None, 200),
    ("DELETE", "/admin/users/NAME", None, 200),
    ("GET", "/admin/usage", None, 200),
    ("GET", "/admin/requests", None, 200),
    ("GET", "/admin/requests/req_0", None, 404),
    ("GET", "/admin/providers", None, 200),
    ("GET", "/admin/models", None, 200),
    ("POST", "/admin/models/refresh", None, 200),
    ("POST", "/admin/reload", None, 200),
    ("GET", "/admin/config", None, 200),
    ("POST", "/admin/explain", {"model": "chat-default"}, 200),
    ("GET", "/admin/audit", None, 200),
]  # fmt: skip


def pattern(path: str) -> str:
    parts = path.split("/")
    for index, part in enumerate(parts):
        if part in ("NAME", "k1", "req_0"):
            parts[index] = "{}"
    return "/".join(parts)


def test_the_steps_below_are_all_routes() -> None:
    asked = {(method, pattern(path)) for method, path, _, _ in STEPS} | {("GET", "/admin/events")}
    assert asked == {(route.method, route.pattern) for route in api.ROUTES}


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_every_route_answers_over_both_ways(place: Place, way: str) -> None:
    ask: Callable[..., Reply] = getattr(place, way)
    name = place.name()
    for method, path, body, status in STEPS:
        sent = json.loads(json.dumps(body).replace("NAME", name)) if body is not None else None
        reply = ask(method, path.replace("NAME", name), sent)
        assert reply.status == status, (method, path, reply.data)
        assert reply.header("content-type") == "application/json"
        assert reply.header("cache-control") == "no-store" or status >= 400
        assert reply.header("x-request-id")
        if (
            status == 200
            and method == "GET"
            and path in ("/admin/users", "/admin/usage", "/admin/audit", "/admin/models")
        ):
            assert set(reply.json) == {"data", "next"}
        if status >= 400:
            assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert ask("GET", f"/admin/users/{name}").status == 404


def test_the_shapes_are_those_of_the_contract(place: Place) -> None:
    name, _ = place.user(quota={"usd": "1.50", "period": "day"}, rate_limits=[{"model": "openai-main/*", "rpm": 3}])
    shown = place.ask("GET", f"/admin/users/{name}")
    assert (shown["name"], shown["role"], shown["source"], shown["permissions"]) == (name, "user", "database", ["*"])
    assert shown["rate_limits"][0]["rpm"] == 3
    assert {"usd": "1.50", "spent_usd": "0.00", "period": "day"}.items() <= shown["quota"].items()
    (key,) = shown["keys"]
    assert key["name"] == "k" and key["enabled"] is True and key["expires_at"] is None and key["last_used_at"] is None
    assert place.ask("GET", "/admin/users/ann")["source"] == "file"
    made = place.ask("POST", f"/admin/users/{name}/keys", {"name": "two"}, 201)
    assert made["name"] == "two" and made["token"].startswith("gp-")
    again = place.tcp("GET", f"/admin/users/{name}")
    assert made["token"].encode() not in again.body and b"digest" not in again.body


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_head_method_and_path_are_told_apart_on_every_route(place: Place, way: str) -> None:
    ask: Callable[..., Reply] = getattr(place, way)
    paths: dict[str, set[str]] = {}
    for route in api.ROUTES:
        paths.setdefault(route.pattern, set()).add(route.method)
    for template, methods in paths.items():
        path = template.replace("{}", "ann", 1).replace("{}", "laptop")
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "PROPFIND"):
            if method in methods or (method == "HEAD" and "GET" in methods):
                continue
            reply = ask(method, path)
            assert reply.status == 405, (method, path, reply.data)
            allowed = set((reply.header("allow") or "").split(", "))
            assert allowed == methods | ({"HEAD"} if "GET" in methods else set()), (path, allowed)
        if "GET" in methods:
            reply = ask("HEAD", path)
            assert reply.status == (404 if "requests/" in path else 200), (path, reply.data)
            assert reply.data.endswith(b"\r\n\r\n")
        for near in (
            path + "/",
            path + "/x/y/z",
            path.replace("/admin/", "/admin//"),
            path.replace("/admin/", "/admin/x"),
        ):
            if pattern(near.replace("ann", "NAME").replace("laptop", "k1")) not in paths:
                reply = ask("GET", near)
                assert reply.status in (404, 405), (near, reply.data)


def test_head_of_the_feed_listens_to_nothing(place: Place) -> None:
    for _ in range(40):  # more than may listen at once
        assert place.tcp("HEAD", "/admin/events").status == 200
        assert place.unix("HEAD", "/admin/events").status == 200
    until(place.gateway.at_rest)


@pytest.mark.parametrize(
    "headers",
    [
        [], [("anthropic-version", "2023-06-01")], [("x-goog-api-key", "x")], [("User-Agent", "anthropic")],
        [("Accept", "text/html")],
    ],
)  # fmt: skip
def test_errors_have_the_form_of_openai_whoever_asks(place: Place, headers: list[tuple[str, str]]) -> None:
    for method, path, key, status in (
        ("GET", "/admin/users/nobody-there", ADMIN, 404), ("GET", "/admin/nothing", ADMIN, 404),
        ("PUT", "/admin/users", ADMIN, 405), ("POST", "/admin/users", ADMIN, 400), ("GET", "/admin/users", ANN, 403),
        ("GET", "/admin/users", "wrong", 401), ("DELETE", "/admin/users/ann", ADMIN, 409),
        ("GET", "/v1/me/usage?limit=0", ANN, 400), ("GET", "/v1/me", "wrong", 401),
    ):  # fmt: skip
        reply = place.tcp(method, path, b"[" if status == 400 else None, key=key, headers=headers)
        assert reply.status == status, reply.data
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}, reply.data
    without = place.tcp("GET", "/admin/users", key=None, headers=headers)
    assert without.status == 401 and set(without.json["error"]) == {"message", "type", "param", "code"}, without.data


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'{"name":"x","name":"y"}', 400), (b"\xff", 400),
        (b'{"name":"' + b"x" * 64 + b'"}', 400), (b'{"name":"primary"}', 400), (b'{"name":"a/b"}', 400),
        (b'{"nmae":"x"}', 400),
        (b'{"name":"x","role":"god"}', 400), (b'{"name":"x","quota":{"usd":1.5}}', 400),
        (b'{"name":"x","quota":{"usd":"-1"}}', 400), (b'{"name":"x","permissions":"*"}', 400),
        (b'{"name":"root"}', 409),
        (b'{"name":"x","rate_limits":[{"rpm":-1}]}', 400), (b'{"name":"' + b" " * 1024 * 1024 + b'"}', 413),
        (b'{"name":"x","keys":[{"name":"k"},{"name":"k"}]}', 400),
        (b'{"name":"x","keys":[{"name":"k","token":"mine"}]}', 400),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused_and_changes_nothing(place: Place, body: bytes, status: int) -> None:
    for ask in (place.tcp, place.unix):
        reply = ask("POST", "/admin/users", body)
        assert reply.status == status, reply.data[:500]
    names = {user["name"] for user in place.ask("GET", "/admin/users?limit=1000")["data"]}
    assert not names & {"x", "y", "primary", "a/b"}


def test_a_chunked_body_is_a_body(place: Place) -> None:
    name = place.name()
    body = json.dumps({"name": name}).encode()
    head = raw.request("/admin/users", b"", key=ADMIN, headers=[("Transfer-Encoding", "chunked")])
    parts: list[bytes | tuple[bytes, float]] = [(head, 0.02)]
    parts += [(b"1\r\n%c\r\n" % byte, 0.0) for byte in body]
    assert raw.send(place.gateway.port, [*parts, b"0\r\n\r\n"]).status == 201
    assert place.ask("GET", f"/admin/users/{name}")["name"] == name


# Who comes by the Unix socket.


def test_the_socket_is_its_owners_alone_and_asks_for_no_key(place: Place) -> None:
    assert place.socket.stat().st_mode & 0o777 == 0o600
    assert place.unix("GET", "/admin/users").status == 200
    wrong = place.unix("GET", "/admin/users", headers=[("Authorization", "Bearer wrong")])
    assert wrong.status == 200
    for path in ("/healthz", "/readyz", "/statsz", "/metrics"):
        assert place.unix("GET", path).status == 200


def test_nothing_but_administration_goes_over_the_socket(place: Place) -> None:
    before = len(place.upstream.requests)
    for method, path in (
        ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/me"), ("GET",
        "/proxy/openai-main/v1/files"),
        ("GET", "/openai-main/v1/models"), ("GET", "/debug/pprof/"), ("GET", "/"), ("GET", "/admin"), ("GET",
        "/x/admin/users"),
    ):  # fmt: skip
        reply = place.unix(method, path, CHAT if method == "POST" else None, headers=[("x-api-key", ADMIN)])
        assert reply.status == 404, (path, reply.data)
    assert place.unix("GET", "/admin/../admin/users").status == 400
    assert place.upstream.requests[before:] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_the_kernel_says_who_comes_whatever_the_files_mode(place: Place) -> None:
    """A stranger who got hold of the socket, because somebody opened its mode, is refused all the same."""
    program = (
        "import os, socket, sys; sock = socket.socket(socket.AF_UNIX); os.chdir(sys.argv[1]); os.setgid(65534); "
        "os.setuid(65534); sock.connect('admin.sock'); "
        "sock.sendall(b'GET /admin/users HTTP/1.1\\r\\nHost: h\\r\\nConnection: close\\r\\n\\r\\n'); "
        "print(sock.recv(65536).decode())"
    )
    place.socket.chmod(0o666)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(place.gateway.folder)], capture_output=True, text=True, timeout=20
        )
    finally:
        place.socket.chmod(0o600)
    assert "HTTP/1.1 403" in done.stdout, (done.stdout, done.stderr)
    assert "ann" not in done.stdout


# The audit trail.


def test_every_change_leaves_one_line_that_says_who(place: Place) -> None:
    name = place.name()
    for way, who in (("tcp", "root/main"), ("unix", "unix:")):
        ask: Callable[..., Reply] = getattr(place, way)
        before = len(place.ask("GET", "/admin/audit?limit=1000")["data"])
        tokens = []
        for method, path, body, status in STEPS:
            sent = json.loads(json.dumps(body).replace("NAME", name)) if body is not None else None
            reply = ask(method, path.replace("NAME", name), sent)
            assert reply.status == status
            tokens += [reply.json["token"]] if "token" in reply.json else []
        lines = place.ask("GET", "/admin/audit?limit=1000")["data"]
        fresh = lines[: len(lines) - before]
        assert [line["what"] for line in reversed(fresh)] == [
            "create_user", "update_user", "update_user", "update_user", "update_user", "update_user", "top_up",
            "create_key",
            "update_key", "delete_key", "delete_user", "refresh_models", "reload",
        ]  # fmt: skip
        assert all(line["who"].startswith(who) for line in fresh), fresh
        text = json.dumps(fresh)
        assert tokens and not any(token in text or token[3:20] in text for token in tokens)
        (added,) = (line for line in fresh if line["what"] == "top_up")
        assert added["detail"] == {"usd": "5.00"}


def test_what_was_refused_is_in_no_audit_line(place: Place) -> None:
    def newest() -> Any:
        return place.ask("GET", "/admin/audit?limit=1")["data"]

    before = newest()
    for method, path, body in (
        ("DELETE", "/admin/users/ann", None), ("DELETE", "/admin/users/nobody", None), ("POST", "/admin/users",
        {"name": "root"}),
        ("POST", "/admin/users/ann/keys", {"name": "x"}), ("PATCH", "/admin/users/ann", {"role": "admin"}),
        ("POST", "/admin/users/reader/quota/top-up", {"usd": "1.00"}), ("POST", "/admin/users/ann/quota/top-up",
        {"usd": "0"}),
    ):  # fmt: skip
        assert place.tcp(method, path, body).status in (400, 404, 409)
        assert place.tcp(method, path, body, key=ANN).status == 403
    assert newest() == before


# People.


def test_people_of_the_files_cannot_be_changed(place: Place) -> None:
    def told(name: str) -> bytes:
        """All but when a key was last used, which goes on meanwhile."""
        return re.sub(rb'"last_used_at":[^,]*', b"", place.tcp("GET", f"/admin/users/{name}").body)

    for name in ("ann", "root", "primary"):
        before = told(name)
        for method, below, body in (
            ("PATCH", "", {"role": "admin"}), ("DELETE", "", None), ("POST", "/keys", {"name": "x"}),
            ("PATCH", "/keys/laptop", {"enabled": False}), ("DELETE", "/keys/laptop", None), ("PUT",
            "/permissions", ["*"]),
            ("PUT", "/rate-limits", []), ("PUT", "/quota", {"usd": "999"}),
        ):  # fmt: skip
            for ask in (place.tcp, place.unix):
                reply = ask(method, f"/admin/users/{name}{below}", body)
                assert reply.status == 409, (name, method, below, reply.data)
        assert told(name) == before
    assert place.chat(ANN).status == 200


def test_a_new_key_works_at_once_and_a_deleted_one_no_more(place: Place) -> None:
    name, first = place.user()
    for number in range(10):
        token = place.ask("POST", f"/admin/users/{name}/keys", {"name": f"n{number}"}, 201)["token"]
        assert place.chat(token).status == 200
        assert place.chat(first).status == 200
        place.ask("DELETE", f"/admin/users/{name}/keys/n{number}")
        assert place.chat(token).status == 401
    assert [key["name"] for key in place.ask("GET", f"/admin/users/{name}")["keys"]] == ["k"]


def test_changes_at_the_same_time_all_hold(place: Place) -> None:
    names = [place.name() for _ in range(12)]
    tokens: dict[str, str] = {}

    def make(name: str) -> None:
        made = place.ask("POST", "/admin/users", {"name": name, "permissions": ["*"], "keys": [{"name": "k"}]}, 201)
        tokens[name] = made["keys"][0]["token"]
        assert place.chat(tokens[name]).status == 200

    threads = [threading.Thread(target=make, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(tokens) == sorted(names)
    assert all(place.chat(token).status == 200 for token in tokens.values())


def test_a_change_is_made_even_if_its_asker_leaves(place: Place) -> None:
    """Half taken up it would be worse than either."""
    for pause in (0.0, 0.001, 0.003):
        name = place.name()
        body = {"name": name, "permissions": ["*"], "keys": [{"name": "k"}]}
        with raw.connect(place.gateway.port) as sock:
            sock.sendall(raw.request("/admin/users", body, key=ADMIN))
            time.sleep(pause)
            raw.reset(sock)
        until(place.gateway.at_rest)
        time.sleep(0.05)
        stored = place.tcp("GET", f"/admin/users/{name}")
        named = [line["target"] for line in place.ask("GET", "/admin/audit?limit=10")["data"]]
        assert (stored.status == 200) == (name in named)


# Money.


def test_a_top_up_opens_the_door_again_and_is_seen(place: Place) -> None:
    assert [place.chat(POOR).status for _ in range(2)] == [200, 402]  # the first costs more than it looked like
    assert place.ask("POST", "/admin/users/poor/quota/top-up", {"usd": "5.00"})["credit_usd"] == "5.00"
    assert place.chat(POOR).status == 200
    told = place.quota("poor")
    assert (told["usd"], told["spent_usd"], told["credit_usd"]) == ("0.001", "0.004", "5.00")
    own = place.tcp("GET", "/v1/me/quota", key=POOR).json
    assert own["remaining_usd"] == told["remaining_usd"] == "4.997"
    assert place.tcp("POST", "/admin/users/reader/quota/top-up", {"usd": "1.00"}).status == 409
    assert place.tcp("POST", "/admin/users/nobody/quota/top-up", {"usd": "1.00"}).status == 404


def test_a_lowered_quota_stops_at_once_and_a_raised_one_starts(place: Place) -> None:
    name, token = place.user(quota={"usd": "1.00"})
    for usd, status in (("1.00", 200), ("0.002", 402), ("0.10", 200), (None, 200), ("0", 402)):
        place.ask("PUT", f"/admin/users/{name}/quota", {"usd": usd})
        assert place.chat(token).status == status, usd
    assert place.quota(name)["spent_usd"] == "0.006"


def test_another_user_of_the_same_name_has_no_credit_of_the_first(place: Place) -> None:
    """Credits go with their account, and a restart would say the same."""
    name, _ = place.user(quota={"usd": "1.00"})
    place.ask("POST", f"/admin/users/{name}/quota/top-up", {"usd": "50.00"})
    place.ask("DELETE", f"/admin/users/{name}")
    body = {
        "name": name,
        "permissions": ["*"],
        "quota": {"usd": "1.00"},
        "keys": [{"name": "k", "budget": {"usd": "2.00"}}],
    }
    made = place.ask("POST", "/admin/users", body, 201)
    assert made["quota"]["credit_usd"] == "0.00", made
    assert place.quota(name)["remaining_usd"] == "1.00"


def test_what_was_spent_is_known_whatever_the_period_becomes(place: Place) -> None:
    """All of it was spent today: by day, by month and for ever it is the same."""
    name, token = place.user(quota={"usd": "1.00"})
    spent = 0
    for period in ("day", None, "month", "day", "month", None):
        for _ in range(2):
            assert place.chat(token).status == 200
            spent += 2
        place.ask(
            "PATCH", f"/admin/users/{name}", {"quota": {"usd": "1.00", "period": period}}
        )  # nothing is booked yet
        told = place.quota(name)
        assert (told["spent_usd"], told["period"]) == (f"0.{spent:03d}".rstrip("0"), period)
        place.booked()
        assert place.quota(name)["spent_usd"] == told["spent_usd"]


def test_what_was_spent_on_other_days_counts_in_its_period_only_however_often_that_changes(place: Place) -> None:
    name = place.name()
    with sqlite3.connect(place.gateway.folder / "state.db") as ledger:  # before there is an account of that name
        columns = [row[1] for row in ledger.execute("PRAGMA table_info(totals)")]
        old = dict.fromkeys(columns, 0) | {"day": "2020-01-31", "user": name, "key": "k", "provider": "p", "model": "m"}
        marks = ", ".join("?" * len(old))
        ledger.execute(f"INSERT INTO totals VALUES ({marks})", list((old | {"cost_nanousd": 5 * 10**9}).values()))
    ledger.close()
    _, token = place.user(name=name, quota={"usd": "10.00", "period": "day"})
    assert place.chat(token).status == 200
    for period in (None, "day", "month", None, "month", "day", None):
        place.ask("PUT", f"/admin/users/{name}/quota", {"usd": "10.00", "period": period})
        spent = "5.002" if period is None else COST
        assert (place.quota(name)["spent_usd"], place.quota(name)["period"]) == (spent, period)


@contextmanager
def traffic(place: Place, key: str, count: int = 3) -> Iterator[list[int]]:
    """Clients who ask without a pause; the statuses that they get."""
    over, statuses = threading.Event(), []

    def talk() -> None:
        with raw.connect(place.gateway.port) as sock:
            while not over.is_set():
                sock.sendall(raw.request("/v1/chat/completions", CHAT, key=key))
                statuses.append(raw.read(sock).status)

    threads = [threading.Thread(target=talk) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        over.set()
        for thread in threads:
            thread.join(10)


def test_a_change_does_not_wait_for_a_pause_in_the_traffic(place: Place) -> None:
    _, token = place.user()
    with traffic(place, token) as statuses:
        until(lambda: len(statuses) > 100)
        for _ in range(5):
            began = time.monotonic()
            place.user()
            assert time.monotonic() - began < 1
    assert set(statuses) == {200}


def test_no_spending_is_forgotten_while_the_period_changes_under_load(place: Place) -> None:
    name, token = place.user(quota={"usd": "1000.00"})
    with traffic(place, token) as statuses:
        for period in ("day", None, "month", "day", None, "month"):
            place.ask("PUT", f"/admin/users/{name}/quota", {"usd": "1000.00", "period": period})
            time.sleep(0.02)
    assert set(statuses) == {200}
    place.booked()
    assert float(place.quota(name)["spent_usd"]) >= round(len(statuses) * float(COST), 3)


# Usage.


def used(place: Place, count: int = 5) -> tuple[str, str]:
    name, token = place.user()
    for number in range(count):
        assert place.chat(token, model="chat-default" if number % 2 else CHAT["model"]).status == 200
    place.booked()
    return name, token


def test_filters_are_all_applied_both_ways(place: Place) -> None:
    name, token = used(place, 3)
    assert place.chat(token, model="nobody/x").status == 400
    place.booked()
    since = "2000-01-01T00:00:00Z"
    for query, count in (
        (f"user={name}", 4), (f"user={name}&status=200", 3), (f"user={name}&status=400", 1), (f"key={name}/k", 4),
        (f"key={name}%2Fk", 4), (f"key={name}/other", 0), (f"user={name}&key=k", 4), (f"user=ann&key={name}/k", 0),
        (f"user={name}&provider=openai-main", 3), (f"user={name}&provider=anthropic-main", 0),
        (f"user={name}&model=other", 0),
        (f"user={name}&model=gpt-4.1-mini", 3), (f"user={name}&endpoint=chat", 4), (f"user={name}&since={since}", 4),
        (f"user={name}&until={since}", 0), ("user=nobody", 0), ("key=nobody/k", 0),
    ):  # fmt: skip
        for ask in (place.tcp, place.unix):
            reply = ask("GET", f"/admin/usage?{query}&limit=1000")
            assert reply.status == 200 and len(reply.json["data"]) == count, (query, ask, len(reply.json["data"]))
    by_query = place.tcp("GET", f"/admin/usage?user={name}&key={ADMIN}", key=None)
    assert by_query.status == 200 and len(by_query.json["data"]) == 4  # there it is the credential
    for query in (
        "usr=x",
        "limit=0",
        "limit=x",
        "status=x",
        "group_by=prompt",
        "format=xml",
        "since=yesterday",
        "cursor=x",
    ):
        assert place.tcp("GET", f"/admin/usage?{query}").status == 400, query


def test_a_page_leads_to_the_next_and_none_is_skipped_or_shown_twice(place: Place) -> None:
    name, token = used(place, 7)
    place.chat(token)

    def pages(path: str, limit: int, between: Callable[[], object] = lambda: None) -> list[Any]:
        rows: list[Any] = []
        cursor = ""
        while True:
            page = place.ask("GET", f"{path}{'&' if '?' in path else '?'}limit={limit}{cursor}")
            assert len(page["data"]) <= limit
            rows += page["data"]
            if page["next"] is None:
                return rows
            cursor = f"&cursor={page['next']}"
            between()

    place.booked()
    for limit in (1, 2, 3, 8, 9, 1000):
        rows = pages(f"/admin/usage?user={name}", limit)
        assert len(rows) == len({row["id"] for row in rows}) == 8
        times = [datetime.fromisoformat(row["at"]) for row in rows]
        assert times == sorted(times, reverse=True)
    grown = pages(f"/admin/usage?user={name}", 2, lambda: (place.chat(token), place.booked()))
    assert len({row["id"] for row in grown}) == len(grown) == 8  # those that came later are not on later pages
    for _ in range(3):
        place.user()
    users = pages("/admin/users", 2)
    assert [user["name"] for user in users] == sorted({user["name"] for user in users}) and len(users) > 6
    made: list[str] = []
    more = pages("/admin/users", 3, lambda: made.append(place.user()[0]))
    assert {user["name"] for user in users} <= {user["name"] for user in more}
    lines = pages("/admin/audit", 7)
    assert len(lines) == len(place.ask("GET", "/admin/audit?limit=1000")["data"])
    for path in ("/admin/models", "/admin/providers"):
        assert pages(path, 1) == place.ask("GET", path)["data"] != []
    sums = pages("/admin/usage?group_by=user", 2)
    whole = place.ask("GET", "/admin/usage?group_by=user")["data"]
    # Who asks is booked for asking, too.
    assert [row for row in sums if row["key"] != "root"] == [row for row in whole if row["key"] != "root"]


def test_sums_are_the_sums_of_the_records(place: Place) -> None:
    name, token = used(place, 4)
    place.chat(token, model="nobody/x")
    place.booked()
    (row,) = [row for row in place.ask("GET", "/admin/usage?group_by=user")["data"] if row["key"] == name]
    assert {
        "requests": 5,
        "errors": 1,
        "input_tokens": 4000,
        "output_tokens": 2000,
        "cost_usd": "0.008",
    }.items() <= row.items()
    contract = {
        "key", "requests", "errors", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens",
        "reasoning_tokens", "cost_usd",
    }  # fmt: skip
    assert contract <= set(row)
    keys = place.ask("GET", f"/admin/usage?group_by=key&user={name}")["data"]
    assert [(one["key"], one["requests"]) for one in keys] == [(f"{name}/k", 5)]
    models = place.ask("GET", f"/admin/usage?group_by=model&user={name}")["data"]
    assert sum(one["requests"] for one in models) == 5
    (day,) = place.ask("GET", f"/admin/usage?group_by=day&user={name}")["data"]
    assert day["cost_usd"] == "0.008" and len(day["key"]) == 10


def test_csv_is_a_table_that_a_spreadsheet_can_be_trusted_with(place: Place) -> None:
    name, token = used(place, 3)
    body = {"model": '=cmd|" /C calc"!A0', "messages": []}
    assert place.tcp("POST", "/proxy/openai-main/v1/chat/completions", body, key=token).status == 200
    assert place.tcp("POST", "/proxy/openai-main/v1/chat/completions", {"model": 'a,"b"\r\nc'}, key=token).status == 200
    place.booked()
    for ask in (place.tcp, place.unix):
        reply = ask("GET", f"/admin/usage?user={name}&format=csv")
        assert reply.status == 200 and (reply.header("content-type") or "").startswith("text/csv")
        assert "attachment" in (reply.header("content-disposition") or "")
        header, *rows = csv.reader(io.StringIO(reply.body.decode(), newline=""))
        assert len(rows) == 5 and all(len(row) == len(header) for row in rows)
        records = [dict(zip(header, row, strict=True)) for row in rows]
        assert {one["user"] for one in records} == {name} and records[-1]["cost_usd"] == COST
        models = {one["requested_model"] for one in records}
        assert "'" + body["model"] in models and 'a,"b"\r\nc' in models
    sums = place.tcp("GET", f"/admin/usage?user={name}&format=csv&group_by=key")
    assert sums.body.count(b"\r\n") == 2 and f"{name}/k".encode() in sums.body


# Events.


class Listener:
    """A connection on which /admin/events is read."""

    def __init__(self, sock: socket.socket, key: str | None = ADMIN) -> None:
        self.sock = sock
        self.seen = b""
        sock.sendall(raw.request("/admin/events", key=key))
        self.wait(b": gproxyd")

    def wait(self, mark: bytes) -> bytes:
        while mark not in self.seen:
            data = self.sock.recv(65536)
            assert data, self.seen
            self.seen += data
        return self.seen

    def records(self) -> list[dict[str, Any]]:
        text = raw.dechunk(self.seen.partition(b"\r\n\r\n")[2])[0].decode()
        found = []
        for event in text.split("\n\n")[:-1]:
            kind, _, data = event.partition("\n")
            if kind == "event: request":
                found.append(json.loads(data.removeprefix("data: ")))
        return found

    def ended(self, seconds: float = 3) -> bool:
        self.sock.settimeout(seconds)
        while not self.seen.endswith(b"0\r\n\r\n"):
            data = self.sock.recv(65536)
            if not data:
                return True
            self.seen += data
        return True


def test_finished_requests_are_delivered_as_they_finish(place: Place) -> None:
    name, token = place.user()
    with raw.connect(place.gateway.port) as one, socket.socket(socket.AF_UNIX) as two:
        two.settimeout(5)
        two.connect(str(place.socket))
        listeners = [Listener(one), Listener(two, None)]
        assert place.chat(token).status == 200
        assert place.chat(token, model="nobody/x").status == 400
        place.booked()
        (expected, _) = sorted(place.ask("GET", f"/admin/usage?user={name}")["data"], key=lambda row: row["status"])
        for listener in listeners:
            listener.wait(b'"status":400')
            told = [record for record in listener.records() if record["user"] == name]
            assert [record["status"] for record in told] == [200, 400]
            assert told[0] == expected
            listener.wait(b": keep-alive")
            assert b"text/event-stream" in listener.seen
    until(place.gateway.at_rest)


def test_the_feed_ends_for_whoever_is_no_longer_an_administrator(place: Place) -> None:
    for method, below, body in (
        ("DELETE", "", None), ("DELETE", "/keys/k", None), ("PATCH", "/keys/k", {"enabled": False}), ("PATCH",
        "", {"role": "user"}),
    ):  # fmt: skip
        name, token = place.user(role="admin")
        with raw.connect(place.gateway.port) as sock:
            listener = Listener(sock, token)
            place.ask(method, f"/admin/users/{name}{below}", body)
            place.chat(ANN)
            assert listener.ended()
            assert not any(record["user"] == "ann" for record in listener.records())
    until(place.gateway.at_rest)


def test_listeners_who_leave_make_room(place: Place) -> None:
    for _ in range(3):
        socks = [raw.connect(place.gateway.port) for _ in range(20)]
        for sock in socks:
            Listener(sock)
        for sock in socks:
            raw.reset(sock)
        until(place.gateway.at_rest)


# The configuration.


def test_a_reload_takes_the_good_and_refuses_the_bad_with_every_problem(loop: Loop) -> None:
    place = Place(loop)
    file = place.gateway.folder / "gproxyd.yaml"
    name, token = place.user()
    secret = "sk-" + "4f" * 20
    bad = place.text.replace("vendor: openai\n", f"vendor: opnai\n    api_key: {secret}\n").replace(
        "claude}", "claude, prize: 1}"
    )
    file.write_text(bad)
    for ask in (place.tcp, place.unix):
        reply = ask("POST", "/admin/reload")
        assert reply.status == 409, reply.data
        message = reply.json["error"]["message"]
        assert "providers.openai-main.vendor" in message and "prize" in message and "api_key" in message, message
        assert secret not in message and secret[:8] not in message
        assert place.chat(token).status == 200
    file.write_text(place.text.replace("chat-default:", "chat-new:"))
    assert place.ask("POST", "/admin/reload") == {"reloaded": True, "audited": True}
    assert place.chat(token, model="chat-new").status == 200 and place.chat(token, model="chat-default").status == 400
    file.write_text(place.text + f"  {name}: {{role: user, keys: {{k: {{token: {secret}}}}}}}\n")
    reply = place.tcp("POST", "/admin/reload")
    assert reply.status == 409 and f"users.{name}" in reply.json["error"]["message"], reply.data
    whats = [line["what"] for line in place.ask("GET", "/admin/audit?limit=4")["data"]]
    assert whats == ["reload_refused", "reload", "reload_refused", "reload_refused"]
    file.unlink()
    assert place.tcp("POST", "/admin/reload").status == 409
    assert place.chat(token).status == 200
    assert secret not in place.gateway.log_path.read_text()


def test_the_configuration_is_shown_without_its_secrets_and_can_be_read_back(place: Place) -> None:
    shown = place.ask("GET", "/admin/config")
    text = json.dumps(shown)
    assert not any(secret in text for secret in (HEADER, ADMIN, ANN, POOR, PROVIDER_KEY, READER))
    assert shown["providers"]["openai-main"]["headers"] == {"X-Trace-Key": "(hidden)"}
    assert shown["users"]["ann"]["keys"]["laptop"]["token"] == "(hidden)"
    assert shown["users"]["root"]["keys"]["main"]["credential"] == "admin-key"  # a name is no secret
    assert shown["providers"]["openai-main"]["models"][0]["price"]["input"] == "1.00"
    for path in ("/admin/providers", "/admin/models", "/admin/users", "/admin/audit", "/admin/usage"):
        body = place.tcp("GET", path).body.decode()
        assert not any(secret in body for secret in (HEADER, ADMIN, ANN, POOR, PROVIDER_KEY, READER)), path


def test_explain_tells_what_the_request_itself_would_meet(place: Place) -> None:
    name, token = place.user(permissions=["chat-default"], quota={"usd": "1.00"}, rate_limits=[{"rpm": 9}])
    for model, status in (("chat-default", 200), ("openai-main/gpt-4.1-mini", 403), ("openai-main/other", 403)):
        told = place.ask("POST", "/admin/explain", {"model": model, "user": name})
        (caller,) = told["callers"]
        assert caller["may_call"] == (place.chat(token, model=model).status == 200) == (status == 200), told
        assert told["targets"][0]["provider"] == "openai-main"
    assert caller["requests_left"] == 8
    assert caller["accounts"][0]["spent_usd"] == COST
    bare = place.ask("POST", "/admin/explain", {"model": "gpt-4.1-mini"})
    assert bare["error"]["status"] == place.chat(ANN, model="gpt-4.1-mini").status == 400
    assert place.tcp("POST", "/admin/explain", {"model": "x", "user": "nobody-there"}).status == 404
    assert PROVIDER_KEY not in json.dumps(told)
    made = place.ask("POST", f"/admin/users/{name}/keys", {"name": "n", "endpoints": ["GET /v1/models"]}, 201)
    for endpoint, path, method in (
        ("POST /v1/chat/completions", "/v1/chat/completions", "POST"),
        ("HEAD /v1/models", "/v1/models", "HEAD"),
    ):
        asked = {"model": "chat-default", "user": name, "endpoint": endpoint}
        (caller,) = [one for one in place.ask("POST", "/admin/explain", asked)["callers"] if one["key"] == "n"]
        reply = place.tcp(method, path, CHAT if method == "POST" else None, key=made["token"])
        assert caller["may_call"] == (reply.status == 200), (endpoint, reply.data)
    place.ask("PATCH", f"/admin/users/{name}/keys/k", {"enabled": False})
    (caller,) = [
        one
        for one in place.ask("POST", "/admin/explain", {"model": "chat-default", "user": name})["callers"]
        if one["key"] == "k"
    ]
    assert not (caller["enabled"] and caller["may_call"])


# Listeners.


def test_ops_listen_takes_figures_and_health_and_leaves_the_administration(loop: Loop) -> None:
    place = Place(loop, CONFIG.replace('["127.0.0.1:0"]', '["127.0.0.1:0"], ops_listen: ["127.0.0.1:0"]'))
    ops = int(place.gateway.daemon.addresses[1].rpartition(":")[2])
    for path in ("/healthz", "/readyz", "/statsz", "/metrics"):
        assert raw.send(ops, raw.request(path, key=None)).status == 200
        assert raw.send(ops, raw.request(path, b"", key=None)).status == 405
        assert place.tcp("GET", path, key=None).status == 401
        assert place.tcp("GET", path).status == 404
        assert place.unix("GET", path).status == 200
    for path in ("/admin/users", "/v1/me", "/v1/models", "/admin/events", "/proxy/openai-main/x", "/console", "/"):
        for key in (None, ADMIN):
            reply = raw.send(ops, raw.request(path, key=key))
            assert reply.status == 404 and b"ann" not in reply.body, (path, reply.data)
    assert place.tcp("GET", "/admin/users").status == 200
    assert place.tcp("GET", "/v1/me").status == 200
    assert place.chat(ANN).status == 200


# Across a restart. (Real processes.)


@pytest.fixture
def process(tmp_path: Path, loop: Loop) -> Callable[[], Process]:
    upstream = Upstream(loop, [ANSWER]).start()

    def make() -> Process:
        return Process(tmp_path, CONFIG.replace("URL", upstream.url), SECRETS, RUNTIME_DIRECTORY=str(tmp_path))

    return make


def local(daemon: Process, method: str, path: str, body: Any = None, status: int = 200) -> Any:
    reply = over_unix(daemon.folder / "admin.sock", method, path, body)
    assert reply.status == status, reply.data
    return reply.json


def chat(daemon: Process, key: str) -> int:
    return raw.send(daemon.port, raw.request("/v1/chat/completions", CHAT, key=key)).status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_people_money_and_the_trail_survive_the_process(process: Callable[[], Process], number: signal.Signals) -> None:
    with process() as first:
        user = {"name": "bob", "permissions": ["openai-main/*"], "quota": {"usd": "1.00"}, "rate_limits": [{"rpd": 5}]}
        made = local(
            first, "POST", "/admin/users", {**user, "keys": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}, 201
        )
        tokens = {key["name"]: key["token"] for key in made["keys"]}
        local(first, "DELETE", "/admin/users/bob/keys/b")
        local(first, "PATCH", "/admin/users/bob/keys/c", {"enabled": False})
        local(first, "POST", "/admin/users/bob/quota/top-up", {"usd": "0.50"})
        local(first, "POST", "/admin/users", {"name": "keyless", "quota": {"usd": "1.00"}}, 201)
        local(first, "POST", "/admin/users/keyless/quota/top-up", {"usd": "3.00"})
        assert [chat(first, tokens[key]) for key in "abc"] == [200, 401, 401]
        assert chat(first, ANN) == 200
        before = local(first, "GET", "/admin/users/bob")
        keyless = local(first, "GET", "/admin/users/keyless/quota")
        trail = local(first, "GET", "/admin/audit")
        first.signal(number)
        assert first.process.wait(10) == (0 if number == signal.SIGTERM else -9)
        assert (first.folder / "admin.sock").exists() == (number == signal.SIGKILL)
    with process() as second:
        assert [chat(second, tokens[key]) for key in "abc"] == [200, 401, 401]
        after = local(second, "GET", "/admin/users/bob")
        assert (before["quota"]["spent_usd"], after["quota"]["spent_usd"]) == (COST, "0.004")
        assert after["quota"]["remaining_usd"] == "1.496" and after["quota"]["credit_usd"] == "0.50"
        for told in (before, after):
            told.pop("quota")
            for key in told["keys"]:
                key.pop("last_used_at")
        assert after == before
        assert local(second, "GET", "/admin/users/keyless/quota") == keyless
        assert local(second, "GET", "/admin/users/ann/quota")["spent_usd"] == COST
        assert local(second, "GET", "/admin/audit") == trail
        rows = until(
            lambda: [row for row in local(second, "GET", "/admin/usage?user=bob")["data"] if row["status"] == 200]
        )
        assert rows


def test_one_name_in_files_and_database_stops_a_start_with_one_message(process: Callable[[], Process]) -> None:
    with process() as first:
        local(first, "POST", "/admin/users", {"name": "twin"}, 201)
        config, folder = first.config, first.folder
        config.write_text(config.read_text() + "  twin: {role: user, keys: {k: {token: ck-twin-secret-1}}}\n")
        first.signal(signal.SIGHUP)
        first.wait_for("reload_refused")
        assert chat(first, ANN) == 200
        first.signal(signal.SIGTERM)
        assert first.process.wait(10) == 0
    environ = {"GPROXYD_SECRETS_DIR": str(folder / "secrets"), "STATE_DIRECTORY": str(folder)}
    done = run("serve", "--config", str(config), **environ)
    assert done.returncode not in (0, 2), done
    assert "users.twin" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "ck-twin-secret-1" not in done.stderr


def test_a_database_that_cannot_be_opened_stops_a_start_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "gproxyd.db").mkdir()  # a folder is no database
    (tmp_path / "gproxyd.yaml").write_text(CONFIG.replace("URL", "http://127.0.0.1:1"))
    environ = {"GPROXYD_SECRETS_DIR": str(tmp_path / "secrets"), "STATE_DIRECTORY": str(tmp_path)}
    done = run("serve", "--config", str(tmp_path / "gproxyd.yaml"), **environ)
    assert done.returncode not in (0, 2), done
    assert "gproxyd.db" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_somebody_who_listens_does_not_hold_up_the_end(process: Callable[[], Process]) -> None:
    """A feed is no request that could finish: a console left open must not cost the drain's ten minutes."""
    with process() as daemon, raw.connect(daemon.port) as sock:
        listener = Listener(sock)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert listener.ended(8)
        assert daemon.process.wait(8) == 0
        assert time.monotonic() - began < 4


def test_the_socket_of_a_dead_process_is_replaced_and_that_of_a_living_one_is_not(
    process: Callable[[], Process],
) -> None:
    with process() as first:
        path = first.folder / "admin.sock"
        first.signal(signal.SIGKILL)
        first.process.wait(10)
        assert path.exists()
    with process() as second:
        assert local(second, "GET", "/admin/users")["data"]
        environ = {"RUNTIME_DIRECTORY": str(second.folder), "STATE_DIRECTORY": str(second.folder / "other")}
        (second.folder / "other").mkdir()
        done = run(
            "serve", "--config", str(second.config), GPROXYD_SECRETS_DIR=str(second.folder / "secrets"), **environ
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert local(second, "GET", "/admin/users")["data"]
