"""Another configuration for a running daemon: all of it at once or nothing,
and nobody who is being served notices."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw
from tests.support.checks import quick_log
from tests.support.process import Process, run
from tests.support.raw import Reply
from tests.support.running import PROVIDER_KEY, Loop, Running, until
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Fin, Got, Pause, Script, Upstream, chunk, json_reply

ADMIN, ANN = "ak-admin-reload", "ck-ann-reload"
SECOND_KEY = "pk-second-reload-55"
CANARY = "sk-canary" + "7d" * 16
SECRETS = {"provider-key": PROVIDER_KEY, "second-key": SECOND_KEY}

CONFIG = f"""\
discovery: {{enabled: false}}
server: {{listen: ["127.0.0.1:0"]}}
providers:
  main:
    vendor: openai
    base_url: "URL"
    credentials: [provider-key]
    headers: {{X-Version: one}}
    models: [{{id: small, price: {{input: "1.00", output: "1.00"}}}}]
aliases: {{chat: main/small}}
users:
  root: {{role: admin, keys: {{k: {{token: {ADMIN}}}}}}}
  ann: {{role: user, permissions: ["chat", "main/*"], keys: {{k: {{token: {ANN}}}}}}}
"""
USAGE = b'"usage":{"prompt_tokens":1000,"completion_tokens":1000}'
ANSWER = json_reply(b'{"model":"m",%b}' % USAGE)
CHAT = {"model": "chat", "messages": [], "max_tokens": 1}


class Place:
    """A daemon in this process and its file."""

    def __init__(self, loop: Loop, config: str = CONFIG, script: Script | Callable[[Got], Script] = ()) -> None:  # type: ignore[assignment]
        self.loop = loop
        self.upstream = Upstream(loop, script or [ANSWER]).start()
        self.text = config.replace("URL", self.upstream.url)
        self.gateway: Running = loop.gateway(self.text, SECRETS)
        self.file = self.gateway.folder / "gproxyd.yaml"

    def write(self, text: str) -> None:
        """As an editor does: the file is the old one or the new one."""
        new = self.file.with_suffix(".new")
        new.write_text(text.replace("URL", self.upstream.url))
        new.rename(self.file)

    def reload(self, text: str | None = None, status: int = 200) -> Any:
        if text is not None:
            self.write(text)
        return self.ask("POST", "/admin/reload", status=status)

    def ask(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        reply = raw.send(self.gateway.port, raw.request(path, body, key=ADMIN, method=method))
        assert reply.status == status, reply.data
        return reply.json

    def chat(self, key: str = ANN, **more: Any) -> Reply:
        return raw.send(self.gateway.port, raw.request("/v1/chat/completions", {**CHAT, **more}, key=key))

    def told(self) -> list[str]:
        """What the log says of the configuration so far."""
        return [line["message"] for line in self.gateway.log() if line["event"] == "configuration"]


@pytest.fixture
def place(loop: Loop) -> Iterator[Place]:
    with quick_log():
        yield Place(loop)


# A file that cannot be used (I01 to I04).

BOMB = "a: &a [x, x]\n" + "".join(
    "{1}: &{1} [{0}]\n".format(", ".join([f"*{chr(97 + n)}"] * 10), chr(98 + n)) for n in range(20)
)

BAD: dict[str, tuple[str, str]] = {
    "no YAML": (f'users: {{x: "{CANARY}\n', "gproxyd.yaml"),
    "a broken line": (f"users:\n  token: {CANARY}: x: [\n", "gproxyd.yaml:"),
    "a tab": (f"users:\n\ttoken: {CANARY}\n", "gproxyd.yaml:2"),
    "a control byte": (f"users: \x01{CANARY}\n", "gproxyd.yaml"),
    "an unknown key": (f"users: {{ann: {{rate_limt: {CANARY}}}}}\n", "users.ann.rate_limt"),
    "a key that is a secret": (f"users: {{ann: {{{CANARY}: 1}}}}\n", "users.ann"),
    "a user that is a secret": (f"users: {{ {CANARY}: {{rôle: x}}}}\n", "users"),
    "twice the same key": (f"users: {{ann: {{}}}}\nusers: {{bob: {{keys: {{k: {{token: {CANARY}}}}}}}}}\n", "users"),
    "a text for a number": (f'users: {{ann: {{rate_limits: [{{rpm: "{CANARY}"}}]}}}}\n',
    "users.ann.rate_limits[0].rpm"),
    "a quoted number": ('users: {ann: {rate_limits: [{rpm: "10"}]}}\n', "users.ann.rate_limits[0].rpm"),
    "less than nothing": ("users: {ann: {rate_limits: [{rpm: -1}]}}\n", "users.ann.rate_limits[0].rpm"),
    "not a number": ("routing: {retries: {budget: .nan}}\n", "routing.retries.budget"),
    "money as a float": ("users: {ann: {quota: {usd: 1.5}}}\n", "users.ann.quota.usd"),
    "a secret's name that is a secret": (f"users: {{ann: {{keys: {{k: {{credential: {CANARY}}}}}}}}}\n",
    "users.ann.keys.k"),
    "a digest that is a secret": (f"users: {{ann: {{keys: {{k: {{sha256: {CANARY}}}}}}}}}\n",
    "users.ann.keys.k.sha256"),
    "two secrets": (f"users: {{ann: {{keys: {{k: {{token: {CANARY}, credential: x}}}}}}}}\n", "users.ann.keys.k"),
    "a URL with a password": (f'providers: {{p: {{vendor: openai, base_url: "http://u:{CANARY}@h"}}}}\n',
    "providers.p.base_url"),
    "a proxy with a password": (f'providers: {{p: {{vendor: openai, proxy: "http://u:{CANARY}@h:1"}}}}\n',
    "providers.p.proxy"),
    "a header with a key": (f"providers: {{p: {{vendor: openai, headers: {{Authorization: {CANARY}}}}}}}\n",
    "providers.p.headers"),
    "a reserved name": ("providers: {admin: {vendor: openai}}\n", "providers.admin"),
    "a dangling name": ("aliases: {x: nowhere/y}\n", "aliases.x"),
    "an object": (f"users: !!python/object/apply:os.system ['echo {CANARY}']\n", "gproxyd.yaml"),
    "a new object": (f"users: !!python/object/new:str ['{CANARY}']\n", "gproxyd.yaml"),
    "an alias bomb": (BOMB, "gproxyd.yaml"),
    "a loop": ("users: &a {x: *a}\n", "gproxyd.yaml"),
    "a deep one": ("users: " + "[" * 100_000 + "\n", "gproxyd.yaml"),
    "a large one": (f"users: # {CANARY}\n" + "#" * (8 * 2**20) + "\n", "gproxyd.yaml"),
    "bytes": ("\udcff\udcfe\n", "gproxyd.yaml"),
    "two documents": (f"users: {{}}\n---\nusers: {{ann: {CANARY}}}\n", "gproxyd.yaml"),
    "a list": (f"- {CANARY}\n", "gproxyd.yaml"),
    "a text": (f"{CANARY}\n", "gproxyd.yaml"),
}  # fmt: skip


def write_raw(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))


def no_part_of_a_secret(text: str) -> None:
    """Neither a canary nor so much of it that the rest could be guessed."""
    for secret in (CANARY, PROVIDER_KEY, SECOND_KEY, ADMIN, ANN):
        assert secret not in text and secret[:12] not in text, text[:2000]


@pytest.mark.parametrize(
    "what", ["no YAML", "a broken line", "an unknown key", "a text for a number", "an object", "an alias bomb", "bytes"]
)
def test_a_daemon_does_not_start_with_a_bad_file(tmp_path: Path, what: str) -> None:
    """One message with the place, no traceback, and nothing of what stands there."""
    text, place = BAD[what]
    write_raw(tmp_path / "gproxyd.yaml", text)
    began = time.monotonic()
    done = run("serve", "--config", str(tmp_path / "gproxyd.yaml"))
    assert time.monotonic() - began < 15
    assert done.returncode == 78
    assert done.stderr.startswith("gproxyd: the configuration has") and place in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    no_part_of_a_secret(done.stderr)


def test_a_bad_file_changes_nothing_and_is_told_without_its_secrets(place: Place) -> None:
    before = place.ask("GET", "/admin/config")
    snapshot = place.gateway.daemon.gateway.snapshot
    for what, (text, where) in BAD.items():
        write_raw(place.file, text)
        began = time.monotonic()
        refused = place.ask("POST", "/admin/reload", status=409)
        assert time.monotonic() - began < 5, what
        message = refused["error"]["message"]
        assert where in message, (what, message[:500])
        no_part_of_a_secret(json.dumps(refused))
        assert len(message) < 20_000, (what, len(message))
        assert place.gateway.daemon.gateway.snapshot is snapshot
        assert place.chat().status == 200
    assert place.ask("GET", "/admin/config") == before
    until(lambda: sum(line["event"] == "reload_refused" for line in place.gateway.log()) == len(BAD))
    text = place.gateway.log_path.read_text()
    no_part_of_a_secret(text)
    assert "Traceback" not in text
    place.reload(place.text)  # and it takes the next good one
    assert place.gateway.daemon.gateway.snapshot is not snapshot


def test_a_file_that_is_gone_or_cannot_be_read_changes_nothing(place: Place) -> None:
    place.file.unlink()
    place.reload(status=409)
    place.file.mkdir()
    place.reload(status=409)
    assert place.chat().status == 200
    place.file.rmdir()
    place.reload(place.text)


def test_all_problems_are_told_at_once(place: Place) -> None:
    bad = (
        place.text.replace("vendor: openai", "vendor: opnai")
        .replace("role: user", "role: usr")
        .replace("chat: main/", "chat: man/")
    )
    message = place.reload(bad, 409)["error"]["message"]
    assert all(part in message for part in ("providers.main.vendor", "users.ann.role", "aliases.chat", "did you mean"))


# What runs goes on (I05, I06, I07).

SLOW: Script = [
    EVENT_STREAM,
    chunk(b'data: {"model":"small","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'),
    Pause(1.2),
    chunk(b'data: {"model":"small","choices":[],%b}\n\ndata: [DONE]\n\n' % USAGE),
    LAST_CHUNK,
]


def _slow(got: Got) -> Script:
    return SLOW if b'"stream"' in got.body else [ANSWER]


def open_streams(port: int, count: int, key: str = ANN) -> list[tuple[Any, bytes]]:
    """Streams whose first event is here."""
    socks = [raw.connect(port, timeout=10) for _ in range(count)]
    for sock in socks:
        sock.sendall(raw.request("/v1/chat/completions", {**CHAT, "stream": True}, key=key))
    found = []
    for sock in socks:
        seen = b""
        while b'"content":"a"' not in seen:
            seen += sock.recv(65536)
        found.append((sock, seen))
    return found


def test_a_hundred_streams_keep_their_provider_key_and_price_through_a_sighup(tmp_path: Path, loop: Loop) -> None:
    upstream = Upstream(loop, _slow).start()
    text = CONFIG.replace("URL", upstream.url)
    with Process(tmp_path, text, SECRETS) as daemon:

        def ask(path: str) -> Any:
            return raw.send(daemon.port, raw.request(path, key=ADMIN)).json

        streams = open_streams(daemon.port, 100)
        other = (
            text.replace("provider-key", "second-key")
            .replace('"1.00"', '"5.00"')
            .replace("X-Version: one", "X-Version: two")
        )
        daemon.config.write_text(
            other.replace("chat: main/small", "chat-two: main/small").replace('"chat",', '"chat-two",')
        )
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reloaded")
        renewed = raw.send(daemon.port, raw.request("/v1/chat/completions", {**CHAT, "model": "chat-two"}, key=ANN))
        assert renewed.status == 200
        assert raw.send(daemon.port, raw.request("/v1/chat/completions", CHAT, key=ANN)).status in (400, 403)
        for sock, seen in streams:
            whole = raw.read(sock, seen=seen)
            sock.close()
            assert whole.complete and b"[DONE]" in whole.body
            assert (
                whole.body.count(b'"model":"chat"') == whole.body.count(b'"model"') == 1
            )  # that of usage was not asked for
        ran, newest = upstream.requests[:100], upstream.requests[100]
        assert {got.header("authorization")[0] for got in ran} == {b"Bearer " + PROVIDER_KEY.encode()}
        assert {got.header("x-version")[0] for got in ran} == {b"one"}
        assert (newest.header("authorization"), newest.header("x-version")) == (
            [b"Bearer " + SECOND_KEY.encode()],
            [b"two"],
        )
        rows = until(
            lambda: (rows := ask("/admin/usage?limit=200&user=ann&status=200")["data"]) and len(rows) == 101 and rows
        )
        costs = sorted((row["requested_model"], row["cost_usd"]) for row in rows)
        assert costs == [("chat", "0.002")] * 100 + [("chat-two", "0.01")]


def test_a_stream_outlives_its_provider_its_user_and_its_alias(place: Place) -> None:
    place.upstream._script = _slow
    streams = open_streams(place.gateway.port, 3)
    gone = re.sub(
        r"providers:.*?aliases",
        "providers: {other: {vendor: openai, base_url: 'URL', credentials: [second-key]}}\naliases",
        place.text,
        flags=re.S,
    )
    gone = gone.replace("chat: main/small", "chat: other/small")
    place.reload(re.sub(r"\n  ann:.*", "", gone))
    assert place.chat().status == 401
    assert place.chat(ADMIN).header("x-gproxyd-provider") == "other"
    assert place.chat(ADMIN, model="main/small").status == 400
    for sock, seen in streams:
        whole = raw.read(sock, seen=seen)
        sock.close()
        assert whole.complete and b"[DONE]" in whole.body
    rows = until(
        lambda: (rows := place.ask("GET", "/admin/usage?user=ann&status=200")["data"]) and len(rows) == 3 and rows
    )
    assert {(row["provider"], row["cost_usd"]) for row in rows} == {("main", "0.002")}
    until(place.gateway.at_rest)


def test_a_connection_known_to_the_short_way_sees_the_new_configuration_with_its_next_request(place: Place) -> None:
    chat = raw.request("/v1/chat/completions", CHAT, key=ANN)
    with raw.connect(place.gateway.port) as sock:

        def status() -> int:
            sock.sendall(chat)
            return raw.read(sock).status

        assert [status() for _ in range(3)] == [200] * 3
        assert place.gateway.daemon.gateway.snapshot.known
        place.reload(place.text.replace("provider-key", "second-key"))
        assert status() == 200
        assert place.upstream.requests[-1].header("authorization") == [b"Bearer " + SECOND_KEY.encode()]
        place.reload(place.text.replace('["chat", "main/*"]', '["main/*"]'))
        assert [status(), status()] == [403, 403]
        place.reload(place.text)
        assert [status(), status()] == [200, 200]
        place.reload(place.text.replace(ANN, "another-key"))
        assert [status(), status()] == [401, 401]
        place.reload(
            place.text.replace("keys: {k: {token: " + ANN + "}}", "keys: {k: {token: " + ANN + ", enabled: false}}")
        )
        assert [status(), status()] == [401, 401]


def test_a_storm_of_signals_ends_with_the_last_file_and_costs_nobody_a_request(tmp_path: Path, loop: Loop) -> None:
    upstream = Upstream(loop, [ANSWER]).start()
    text = CONFIG.replace("URL", upstream.url)
    with Process(tmp_path, text, SECRETS) as daemon:
        statuses: list[int] = []
        over = threading.Event()

        def talk() -> None:
            with raw.connect(daemon.port) as sock:
                while not over.is_set():
                    sock.sendall(raw.request("/v1/chat/completions", {**CHAT, "model": "main/small"}, key=ANN))
                    statuses.append(raw.read(sock).status)

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{daemon.pid}/fd"))

        talker = threading.Thread(target=talk)
        talker.start()
        try:
            until(lambda: len(statuses) > 10)
            before = descriptors()
            for number in range(100):
                new = daemon.config.with_suffix(".new")
                new.write_text(text.replace("chat: main", f"chat-{number}: main"))
                new.rename(daemon.config)
                daemon.signal(signal.SIGHUP)
                time.sleep(0.002)
            last = raw.request("/v1/models/chat-99", key=ADMIN)
            until(lambda: raw.send(daemon.port, last).status == 200)
        finally:
            over.set()
            talker.join(10)
        assert set(statuses) == {200} and len(statuses) > 50
        events = [line["event"] for line in daemon.log()]
        assert 2 <= events.count("reloaded") <= 100 and "reload_refused" not in events
        assert descriptors() <= before + 4
        assert not any(
            line["level"] in ("warning", "error") and line["event"] != "configuration" for line in daemon.log()
        )


def test_reloads_at_the_same_time_follow_one_another(place: Place) -> None:
    answers: list[int] = []

    def ask() -> None:
        answers.append(raw.send(place.gateway.port, raw.request("/admin/reload", b"", key=ADMIN)).status)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == [200] * 10


def test_nobody_waits_while_a_large_file_is_read(loop: Loop) -> None:
    """Three thousand users take a good part of a second to check; streams go on meanwhile."""
    place = Place(loop)
    users = "".join(
        f'  u{n}: {{permissions: ["main/*"], rate_limits: [{{rpm: 60}}], keys: {{k: {{sha256: "{n:064x}"}}}}}}\n'
        for n in range(3000)
    )
    place.write(place.text + users)
    slowest, over = 0.0, threading.Event()

    def ping() -> None:
        nonlocal slowest
        with raw.connect(place.gateway.port, timeout=20) as sock:
            while not over.is_set():
                began = time.monotonic()
                sock.sendall(raw.request("/healthz", key=None))
                assert raw.read(sock).status == 200
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.002)

    pinger = threading.Thread(target=ping)
    pinger.start()
    began = time.monotonic()
    with raw.connect(place.gateway.port, timeout=20) as sock:
        sock.sendall(raw.request("/admin/reload", b"", key=ADMIN))
        assert raw.read(sock).status == 200
    took = time.monotonic() - began
    over.set()
    pinger.join(20)
    assert slowest < took / 2, (slowest, took)


# No request sees two configurations (I08).


def version(number: int) -> str:
    """Each version has a model, a price, a provider key, a header and a permission of its own."""
    key, price = (("provider-key", "1.00"), ("second-key", "3.00"))[number]
    name = ("a", "b")[number]
    return f"""\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  main: {{vendor: openai, base_url: "URL", credentials: [{key}], headers: {{X-Version: "{name}"}},
    models: [{{id: model-{name}, price: {{input: "{price}", output: "{price}"}}}}]}}
aliases: {{chat: main/model-{name}, only-{name}: main/model-{name}}}
users:
  root: {{role: admin, keys: {{k: {{token: {ADMIN}}}}}}}
  ann: {{role: user, permissions: ["chat", "only-{name}"], keys: {{k: {{token: {ANN}}}}}}}
"""


def test_no_request_sees_the_one_configuration_and_the_other(loop: Loop) -> None:
    def echo(got: Got) -> Script:
        fields = (got.header("authorization")[0], got.header("x-version")[0], json.loads(got.body)["model"].encode())
        return [json_reply(b'{"model":"m","seen":"%b",%b}' % (b" ".join(fields), USAGE))]

    place = Place(loop, version(0), echo)
    whole = [f"Bearer {PROVIDER_KEY} a model-a", f"Bearer {SECOND_KEY} b model-b"]
    found: list[tuple[str, str, int]] = []
    over = threading.Event()

    def talk(path: str, models: list[str]) -> None:
        with raw.connect(place.gateway.port) as sock:
            turn = 0
            while not over.is_set():
                turn += 1
                model = models[turn % len(models)]
                sock.sendall(raw.request(path, {"model": model}, key=ANN))
                reply = raw.read(sock)
                seen = reply.json["seen"] if reply.status == 200 else ""
                found.append((reply.header("x-request-id") or "", seen, reply.status))
                if reply.status == 200 and model != "chat":
                    assert seen.endswith(model[-1]), (model, seen)  # nobody got there by the other's permission

    threads = [
        threading.Thread(target=talk, args=("/v1/chat/completions", ["chat"])),
        threading.Thread(target=talk, args=("/main/v1/chat/completions", ["chat", "only-a", "only-b"])),
        threading.Thread(target=talk, args=("/proxy/main/v1/chat/completions", ["only-a", "chat", "only-b"])),
    ]
    for thread in threads:
        thread.start()
    try:
        for turn in range(60):
            place.reload(version(turn % 2))
    finally:
        over.set()
        for thread in threads:
            thread.join(10)
    served = {request_id: seen for request_id, seen, status in found if status == 200}
    assert set(served.values()) == set(whole) and len(served) > 100
    assert {status for *_, status in found} <= {200, 400, 403}
    ledger = place.gateway.daemon.state.ledger
    assert ledger is not None
    until(lambda: ledger.queued == 0)
    rows, cursor = [], ""
    while cursor is not None:
        page = place.ask("GET", f"/admin/usage?user=ann&status=200&limit=1000{cursor}")
        rows += page["data"]
        cursor = f"&cursor={page['next']}" if page["next"] else None  # type: ignore[assignment]
    assert len(rows) == len(served)
    for row in rows:
        number = whole.index(served[row["request_id"]])
        assert (row["model"], row["cost_usd"]) == (("model-a", "0.002"), ("model-b", "0.006"))[number], row


def test_a_new_model_is_seen_and_callable_at_once_by_whom_a_glob_lets(place: Place) -> None:
    assert place.chat(model="main/new").status == 200  # not in the list, and the vendor may know it
    place.reload(place.text.replace("{id: small,", "{id: new}, {id: small,"))
    listed = [entry["id"] for entry in raw.send(place.gateway.port, raw.request("/v1/models", key=ANN)).json["data"]]
    assert "main/new" in listed
    assert place.chat(model="main/new").status == 200


def test_a_reload_and_a_change_of_people_do_not_undo_each_other(loop: Loop) -> None:
    """A key that was revoked stays so whatever the files bring, and what they bring stays whoever is revoked."""
    place = Place(loop)
    text = place.text
    for turn in range(40):
        made = place.ask(
            "POST", "/admin/users", {"name": f"db{turn}", "permissions": ["*"], "keys": [{"name": "k"}]}, 201
        )
        token = made["keys"][0]["token"]
        assert place.chat(token).status == 200
        fields = "role: user, permissions: ['*'], quota: {usd: '1.00'}"
        text += f"  file{turn}: {{{fields}, keys: {{k: {{token: ck-file-{turn}}}}}}}\n"
        place.write(text)
        daemon = place.gateway.daemon

        async def both(daemon: Any = daemon, turn: int = turn) -> None:
            import asyncio

            from gproxyd.store import people

            async def revoke() -> None:
                await asyncio.sleep(0.0005 * (turn % 20))
                await people.delete_user(daemon.state.database, f"db{turn}", who="test")
                await daemon.house.people_changed()

            told, _ = await asyncio.gather(daemon.reload(place.file, daemon._places.environ), revoke())
            assert not told

        loop.run(both())
        assert place.chat(token).status == 401, turn
        assert place.chat(f"ck-file-{turn}").status == 200, turn


# What cannot be changed while it runs is said (I11).

LISTEN = 'listen: ["127.0.0.1:0"]'
FIXED = {
    "server.listen": (LISTEN, 'listen: ["127.0.0.1:0", "127.0.0.1:0"]'),
    "server.ops_listen": (LISTEN, LISTEN + ', ops_listen: ["127.0.0.1:0"]'),
    "server.max_connections": (LISTEN, LISTEN + ", max_connections: 17"),
    "server.max_connections_per_address": (LISTEN, LISTEN + ", max_connections_per_address: 17"),
    "log": ("server:", "log: {level: error}\nserver:"),
    "state": ("server:", 'state: {database: "sqlite:///nowhere/else.db"}\nserver:'),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_needs_a_restart_is_warned_of_and_the_rest_applies(place: Place, name: str) -> None:
    old, new = FIXED[name]
    assert old in place.text
    text = place.text.replace(old, new, 1).replace("chat: main", "chat-two: main").replace('["chat"', '["chat-two"')
    for count in (1, 2):  # as long as it is not in force
        place.reload(text)
        assert place.chat(model="chat-two").status == 200
        warnings = until(
            lambda count=count: (told := [one for one in place.told() if name in one]) and len(told) >= count and told
        )
        assert "restart" in warnings[-1], warnings
    assert place.chat(model="chat").status == 400
    before = len(place.told())
    place.reload(place.text)
    time.sleep(0.05)
    assert not any("restart" in one for one in place.told()[before:])


def test_the_listeners_are_looked_at_by_where_they_are(place: Place) -> None:
    """`ops_listen` that is not open yet takes nothing away from the main listener, or nobody could ask any more."""
    place.reload(place.text.replace(*FIXED["server.ops_listen"], 1))
    for path in ("/healthz", "/readyz", "/statsz", "/metrics"):
        assert raw.send(place.gateway.port, raw.request(path, key=None)).status == 200, path


# What was counted stays counted (I12).


def test_windows_money_and_figures_survive_a_reload_and_a_lower_limit_applies_at_once(place: Place) -> None:
    limits = 'permissions: ["chat", "main/*"], quota: {{usd: "{usd}"}}, rate_limits: [{{rpm: {rpm}}}]'

    def text(usd: str, rpm: int, keys: str = "") -> str:
        changed = place.text.replace('permissions: ["chat", "main/*"]', limits.format(usd=usd, rpm=rpm))
        return changed + keys

    place.reload(text("1.00", 10))
    assert [place.chat().status for _ in range(4)] == [200] * 4
    figures = json.loads(raw.send(place.gateway.port, raw.request("/statsz", key=None)).body)["models"]["main/small"]
    place.reload(text("1.00", 5))
    assert (
        json.loads(raw.send(place.gateway.port, raw.request("/statsz", key=None)).body)["models"]["main/small"]
        == figures
    )
    assert place.ask("GET", "/admin/users/ann/quota")["spent_usd"] == "0.008"
    assert [place.chat().status for _ in range(2)] == [200, 429]
    place.reload(text("1.00", 3))
    assert place.chat().status == 429
    place.reload(text("0.01", 100))
    assert place.chat().status == 402  # 5 times 0.002
    place.reload(text("0.011", 100))
    assert [place.chat().status for _ in range(2)] == [200, 402]
    place.reload(place.text)  # without limits
    assert [place.chat().status for _ in range(3)] == [200] * 3
    place.reload(text("1.00", 7))
    assert place.ask("GET", "/admin/users/ann/quota")["spent_usd"] == "0.018"


def test_a_providers_own_limit_survives_too(place: Place) -> None:
    limited = place.text.replace("headers: {X", "rate_limits: {rpm: RPM}\n    headers: {X")
    place.reload(limited.replace("RPM", "3"))
    assert [place.chat().status for _ in range(4)] == [200, 200, 200, 429]
    place.reload(limited.replace("RPM", "4"))
    assert [place.chat().status for _ in range(2)] == [200, 429]


def test_a_user_who_is_taken_out_and_put_back_has_spent_what_they_spent(place: Place) -> None:
    text = place.text.replace('permissions: ["chat", "main/*"]', 'permissions: ["*"], quota: {usd: "0.003"}')
    place.reload(text)
    assert [place.chat().status for _ in range(3)] == [200, 200, 402]
    place.reload(re.sub(r"\n  ann:.*", "", text))
    assert place.chat().status == 401
    place.reload(text)
    assert place.chat().status == 402
    assert place.ask("GET", "/admin/users/ann/quota")["spent_usd"] == "0.004"


def test_people_of_the_database_are_not_the_files_business(place: Place) -> None:
    made = place.ask("POST", "/admin/users", {"name": "bob", "permissions": ["chat"], "keys": [{"name": "k"}]}, 201)
    token = made["keys"][0]["token"]
    place.ask("POST", "/admin/users/bob/quota/top-up", {"usd": "1"}, 409)
    for text in (
        place.text,
        place.text.replace("role: user", "role: read-only"),
        re.sub(r"\n  ann:.*", "", place.text),
    ):
        place.reload(text)
        assert place.chat(token).status == 200
    place.ask("DELETE", "/admin/users/bob")
    place.reload(place.text)
    assert place.chat(token).status == 401


# Secrets are read again as well (I09).


def test_a_rotated_secret_is_taken_up_and_one_that_is_gone_switches_its_provider_off(place: Place) -> None:
    file = place.gateway.folder / "secrets" / "provider-key"
    file.write_text("pk-rotated-1\r\n")
    assert place.chat().status == 200
    assert place.upstream.requests[-1].header("authorization") == [b"Bearer " + PROVIDER_KEY.encode()]
    place.reload()
    assert place.chat().status == 200
    assert place.upstream.requests[-1].header("authorization") == [b"Bearer pk-rotated-1"]
    file.unlink()
    place.reload()
    refused = place.chat()
    assert refused.status == 503 and b"secret" in refused.body
    assert any("'provider-key' is missing" in one for one in until(place.told))
    file.write_text("pk\x01broken\n")
    place.reload()
    assert place.chat().status == 503
    file.write_text(PROVIDER_KEY)
    place.reload()
    assert place.chat().status == 200
    text = place.gateway.log_path.read_text()
    assert "pk-rotated-1" not in text and "broken" not in text


def test_an_upstream_that_fails_during_a_reload_is_told_as_ever(place: Place) -> None:
    place.upstream._script = lambda got: [EVENT_STREAM, SLOW[1], Pause(0.3), Fin()]
    ((sock, seen),) = open_streams(place.gateway.port, 1)
    place.reload(place.text.replace("one", "two"))
    reply = raw.read(sock, seen=seen)
    sock.close()
    assert not reply.complete and b'"error"' in reply.body
    until(place.gateway.at_rest)
