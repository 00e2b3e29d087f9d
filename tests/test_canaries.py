"""Nothing that must not be told is found anywhere: a varied suite of requests, then a search of all that is left.

Canaries are put wherever a secret or a private word can stand: keys of all kinds, cookies, prompts, answers, files.
Then the log, the database and its companions, the spool, the figures, the profiles and every answer of the
administration are searched for them, as they are, in part, in base64, in hexadecimal and as digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import resource
import signal
import socket
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gproxyd.admin import api
from tests.support import raw
from tests.support.process import Process
from tests.support.raw import Reply
from tests.support.running import Loop, until
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Fin, Got, Script, Stall, Upstream, chunk, json_reply


def canary(kind: str) -> str:
    """A word that is like no other in any of its parts."""
    return f"{kind}-{hashlib.sha256(kind.encode()).hexdigest()[:32]}"


PK, PK2, AK, CK, TK, HK, POOR, DISABLED = map(canary, ("pk", "pq", "ak", "ck", "tk", "hk", "poor", "disabled"))
CO, OH, QS, HS, PR, RS, FI = map(canary, ("co", "oh", "qs", "hs", "pr", "rs", "fi"))

KEYS = (PK, PK2, AK, CK, TK, HK, POOR, DISABLED)
"""What opens something."""
PRIVATE = (CO, OH, QS, HS, PR, RS, FI)
"""Cookies, other headers, queries, the configuration's headers, prompts, answers, files."""

CONFIG = f"""\
server: {{listen: ["127.0.0.1:0"], max_body: 64KiB}}
log: {{level: debug, format: json}}
debug: {{pprof_enabled: true}}
streams: {{keepalive: 100ms}}
RECORDS
providers:
  openai-main:
    vendor: openai
    base_url: "URL"
    credentials: [provider-key]
    headers: {{X-Trace-Key: {HS}}}
    models: [{{id: gpt-4.1-mini, max_output: 100, price: {{input: "1.00", output: "1.00"}}}}]
    timeouts: {{first_byte: 300ms, idle: 300ms}}
  anthropic-main: {{vendor: anthropic, base_url: "URL", credentials: [provider-key], timeouts: {{first_byte: 300ms}}}}
  vertex-main: {{vendor: gemini, base_url: "URL", credentials: [provider-key], timeouts: {{first_byte: 300ms}}}}
  closed: {{vendor: openai, base_url: "http://127.0.0.1:1", credentials: [provider-key]}}
aliases:
  {{chat: openai-main/gpt-4.1-mini, smart: anthropic-main/claude, flash: vertex-main/gemini, whisper: openai-main/w}}
endpoints: {{files: openai-main, batches: openai-main, audio: openai-main, responses: openai-main}}
users:
  root: {{role: admin, keys: {{main: {{credential: admin-key}}}}}}
  ann:
    role: user
    permissions: ["*"]
    keys:
      credential: {{credential: client-key}}
      token: {{token: {TK}}}
      hash: {{sha256: {hashlib.sha256(HK.encode()).hexdigest()}}}
      disabled: {{token: {DISABLED}, enabled: false}}
  poor:
    role: user
    permissions: ["*"]
    quota: {{usd: "0.0000001"}}
    rate_limits: [{{model: chat, rpm: 1}}]
    keys: {{k: {{token: {POOR}}}}}
"""
SECRETS = {"provider-key": f"{PK}\n{PK2}\n", "admin-key": AK, "client-key": CK}
ALL_RECORDS = "records: {enable_downstream_log: true, enable_upstream_log: true}"
ALL_BODIES = (
    "records: {enable_downstream_log: true, enable_upstream_log: true, enable_downstream_log_body: true, "
    "enable_upstream_log_body: true}"
)


def echo(got: Got) -> bytes:
    """All that the vendor was told, keys included."""
    return got.raw_head.replace(b"\r\n", b" ").replace(b'"', b"'") + b" " + got.body.replace(b'"', b"'")


def vendor(got: Got) -> Script:
    """What the vendor does is in the path or the body."""
    told = b"%b %b" % (RS.encode(), got.target + got.body)
    cookie = b"Set-Cookie: s=%b\r\nX-Odd: %b\r\n" % (CO.encode(), RS.encode())
    for mark, script in {
        b"refuse": [
            json_reply(b'{"error":{"message":"Incorrect API key provided: %b"}}' % echo(got), status=b"401 No")
        ],
        b"forbid": [json_reply(b'{"error":{"message":"%b"}}' % RS.encode(), status=b"403 Forbidden")],
        b"quote": [json_reply(b'{"error":{"message":"%b"}}' % echo(got), status=b"400 Bad Request")],
        b"fail": [json_reply(b'{"error":{"message":"%b"}}' % RS.encode(), status=b"500 Oops", headers=cookie)],
        b"garbage": [echo(got) + RS.encode() + b"\r\n\r\n"],
        b"redirect": [b"HTTP/1.1 302 F\r\nLocation: http://x/%b\r\nContent-Length: 0\r\n\r\n" % PK.encode()],
        b"silence": [Stall()],
        b"cut": [EVENT_STREAM, chunk(b'data: {"x":"%b"}\n\n' % RS.encode()), Fin()],
        b"broken": [json_reply(RS.encode() * 20)[:-9], Fin()],
    }.items():
        if mark in told:
            return list(script)
    if b'"stream"' in got.body or b"streamGenerate" in got.target:
        data = b'data: {"model":"m","id":"%b","choices":[{"delta":{"content":"%b"}}]}\n\n' % (RS.encode(), RS.encode())
        return [EVENT_STREAM, chunk(data), chunk(b"data: [DONE]\n\n"), LAST_CHUNK]
    return [
        json_reply(
            b'{"model":"m","text":"%b","usage":{"prompt_tokens":5,"completion_tokens":5}}' % RS.encode(), headers=cookie
        )
    ]


FORM = (
    f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b\r\nContent-Disposition: form-data; '
    f'name="file"; filename="{FI}"\r\nContent-Type: {FI}\r\n\r\n{FI}\r\n--b--\r\n'
).encode()


class Trap:
    """A daemon of its own process, its upstream, and all that it leaves."""

    def __init__(self, folder: Path, loop: Loop, records: str) -> None:
        self.upstream = Upstream(loop, vendor).start()
        config = CONFIG.replace("URL", self.upstream.url).replace("RECORDS", records)
        self.daemon = Process(folder, config, SECRETS, RUNTIME_DIRECTORY=str(folder))
        self.folder = folder
        self.tokens: list[str] = []
        self.seen: list[tuple[str, bytes]] = []

    def send(self, data: bytes | list[bytes | tuple[bytes, float]], *, timeout: float = 2) -> Reply:
        return raw.send(self.daemon.port, data, timeout=timeout)

    def admin(self, method: str, path: str, body: Any = None, *, local: bool = False, headers: Any = ()) -> Reply:
        data = raw.request(path, body, method=method, key=None if local else AK, headers=headers)
        if not local:
            reply = self.send(data)
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(str(self.folder / "admin.sock"))
                sock.sendall(data)
                reply = raw.read(sock)
        self.seen.append((f"{method} {path}", reply.data))
        return reply


def words() -> list[tuple[str | bytes, str | bytes]]:
    """Headers that many clients send, each with something private."""
    return [
        ("Cookie", f"session={CO}"), ("Referer", f"https://app/?q={OH}"), ("X-Api-Secret", OH),
        ("X-Custom-Token", OH),
        ("Content-Type", "application/json"), ("Origin", f"https://{OH}"), ("Proxy-Authorization", f"Bearer {CO}"),
    ]  # fmt: skip


def chats(key: str | None) -> Iterator[bytes]:
    """Requests in every form and dialect, and with every mishap."""
    prompt = [{"role": "user", "content": PR}]
    for mishap in ("", "refuse", "forbid", "quote", "fail", "garbage", "redirect", "cut", "broken"):
        said = {"messages": [*prompt, {"role": "user", "content": mishap}], "metadata": {"user_id": PR}}
        for stream in ({}, {"stream": True}):
            for path, model in (
                ("/v1/chat/completions", "chat"), ("/openai-main/v1/chat/completions", "gpt-4.1-mini"),
                ("/proxy/openai-main/v1/chat/completions", "gpt-4.1-mini"), ("/v1/messages", "smart"),
                ("/v1/responses", "openai-main/gpt-4.1-mini"), ("/proxy/anthropic-main/v1/messages", "claude"),
            ):  # fmt: skip
                yield raw.request(path, {"model": model, **said, **stream}, key=key, headers=words()[:4])
        contents = {"contents": [{"parts": [{"text": PR + mishap}]}]}
        for verb in ("generateContent", "streamGenerateContent?alt=sse"):
            yield raw.request(f"/v1beta/models/flash:{verb}", contents, key=key, headers=words())
    yield raw.request("/v1/chat/completions", {"model": "closed/m", "messages": prompt}, key=key)
    yield raw.request(
        "/v1/audio/transcriptions", FORM, key=key, headers=[("Content-Type", "multipart/form-data; boundary=b")]
    )
    for method, path in (
        ("GET", "/v1/files/x"), ("DELETE", "/v1/files/x"), ("GET", "/proxy/openai-main/x"), ("GET", "/v1/models"),
        ("GET", "/v1/me"), ("GET", "/v1/me/usage"), ("GET", "/v1/me/quota"), ("GET", "/v1/responses/r"),
    ):  # fmt: skip
        target = f"{path}?limit=2&access_token={QS}&sig={QS}&api_key={QS}&X-Goog-Signature={QS}&sv=1"
        yield raw.request(target if "/me/" not in path else path, key=key, method=method, headers=words())


def refusals() -> Iterator[bytes]:
    """What never gets anywhere."""
    said = {"model": "chat", "messages": PR}
    text = json.dumps(said).encode()
    for key in (None, CK + "x", CK[:-1], DISABLED, hashlib.sha256(CK.encode()).hexdigest(), PK):
        yield raw.request("/v1/chat/completions", said, key=key, headers=words()[:4])
    yield raw.request("/v1/chat/completions", text[:-1], key=CK, headers=words())
    yield raw.request("/v1/chat/completions", [PR], key=CK)
    yield raw.request("/v1/chat/completions", {"model": [PR]}, key=CK)
    yield raw.request("/v1/chat/completions", {"model": f"chat {PR}"}, key=CK)
    yield raw.request("/v1/chat/completions", text[:-1] + b',"model":"x"}', key=CK, headers=words()[4:5])
    yield raw.request("/v1/chat/completions", {"model": "chat", "x": PR * 8000}, key=CK)
    yield raw.request(f"/v1/chat/completions?key={CK}&key={CK}", said, key=None)
    yield raw.request(f"/v1/chat/completions?key={CK}x&q={QS}", said, key=None)
    yield raw.request(f"/v1/nothing?token={QS}", said, key=CK)
    yield raw.request("/v1/chat/completions", method="PUT", key=CK, headers=words())
    yield raw.request("/v1/chat/completions", said, key=POOR)
    yield raw.request("/v1/chat/completions", said, key=CK, headers=[("x-api-key", AK), ("X-API-KEY", PK)])
    yield raw.request("/v1/files", key=CK, headers=[("x-gproxyd-provider", "nobody"), ("Cookie", CO)])
    yield raw.request(f"/v1/files?provider={QS}", key=CK)
    yield raw.request("/v1/chat/completions", text, key=CK, headers=[("Content-Encoding", CO)])
    yield raw.request("/v1/chat/completions", said, key=CK, headers=[("Expect", CO)])
    yield raw.request("/v1/chat/completions", said, key=CK, headers=[("Upgrade", CO), ("Connection", "upgrade")])
    yield b"GET /v1/models HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + CK.encode() + b"\x01\r\n\r\n"
    yield b"GET /v1/models HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer\r\n " + CK.encode() + b"\r\n\r\n"
    yield b"GET http://u:" + CK.encode() + b"@other/v1 HTTP/1.1\r\nHost: h\r\n\r\n"
    yield CK.encode() + b" / HTTP/1.1\r\nHost: h\r\n\r\n"


def blunders() -> Iterator[tuple[str, str, Any]]:
    """What administrators do in haste: secrets in places that are not for them."""
    yield "POST", "/admin/users", {"name": "bob", "token": CK}
    yield "POST", "/admin/users", {"name": f"bob {CK}"}
    yield "POST", "/admin/users", {CK: "bob"}
    yield "POST", "/admin/users", {"name": "bob", "role": AK}
    yield "POST", "/admin/users", {"name": "bob", "permissions": [f"a b {PK}"]}
    yield "POST", "/admin/users", {"name": "bob", "quota": {"usd": CK}}
    yield "POST", "/admin/users", {"name": "bob", "quota": {CK: "1"}}
    yield (
        "POST",
        "/admin/users",
        {"name": "bob", "keys": [{"name": "k", "sha256": hashlib.sha256(CK.encode()).hexdigest()}]},
    )
    yield "POST", "/admin/users", {"name": "bob", "keys": [{"name": "k", "expires_at": CK}]}
    yield "POST", "/admin/users", {"name": "bob", "rate_limits": [{CK: 1}]}
    yield "POST", "/admin/users", json.dumps({"name": "bob", "x": CK}).encode()[:-1]
    yield "GET", f"/admin/usage?user={CK}", None
    yield "GET", f"/admin/usage?{CK}=1", None
    yield "GET", f"/admin/usage?cursor={CK}", None
    yield "GET", f"/admin/usage?group_by={CK}", None
    yield "POST", "/admin/explain", {"model": "chat", "user": CK}
    yield "POST", "/admin/explain", {"model": f"x {PR}"}
    yield "PATCH", "/admin/users/ann", {"role": CK}


def exercise(trap: Trap) -> None:
    """The suite: all that people, vendors and administrators do."""
    for key in (CK, TK, HK, AK):
        for data in chats(key):
            trap.send(data)
    for data in refusals():
        reply = trap.send(data)
        assert 400 <= reply.status < 500, reply.data
        trap.seen.append(("refusal", reply.data))
    for _ in range(3):
        reply = trap.send(raw.request("/v1/chat/completions", {"model": "chat", "messages": PR}, key=POOR))
        trap.seen.append(("poor", reply.data))
        assert reply.status in (402, 429), reply.data
    made = trap.send(
        raw.request("/admin/users", {"name": "new", "permissions": ["*"], "keys": [{"name": "a"}]}, key=AK)
    )
    more = trap.send(raw.request("/admin/users/new/keys", {"name": "b"}, key=AK))
    trap.tokens = [made.json["keys"][0]["token"], more.json["token"]]
    for token in trap.tokens:
        for data in list(chats(token))[:8]:
            trap.send(data)
    for method, path, body in blunders():
        for local in (False, True):
            reply = trap.admin(method, path, body, local=local)
            assert reply.status >= 400 or "user=" in path, (path, reply.data)
    config = trap.daemon.config.read_text()
    bad = f'users: {{ann: {{keys: {{k: {{tokn: {CK}, credential: "{AK} {PR}"}}}}}}}}\n{PK}: {PK2}\n'
    for text in (bad, f"{CK}: [\n", config):
        trap.daemon.config.write_text(text)
        trap.admin("POST", "/admin/reload", local=text == bad)
    trap.daemon.signal(signal.SIGHUP)


def gather(trap: Trap) -> list[tuple[str, bytes]]:
    """All that can be asked for, and all files."""
    found = list(trap.seen)
    open_paths = ("/healthz", "/readyz", "/statsz", "/metrics")
    found += ((path, trap.send(raw.request(path, key=None)).data) for path in open_paths)
    for route in api.ROUTES:
        if route.method == "GET" and route.pattern != "/admin/events":
            for local in (False, True):
                path = route.pattern.replace("{}", "ann")
                trap.admin("GET", path + ("?limit=1000" if route.query is not api.Nothing else ""), local=local)
    for query in ("group_by=user", "group_by=key", "group_by=model", "format=csv", "format=csv&group_by=key"):
        trap.admin("GET", f"/admin/usage?{query}")
    for row in trap.admin("GET", "/admin/requests?limit=1000").json["data"]:
        trap.admin("GET", f"/admin/requests/{row['request_id']}")
    for model in ("chat", "openai-main/gpt-4.1-mini", "nobody/x"):
        trap.admin("POST", "/admin/explain", {"model": model, "user": "ann"})
    for path in (
        "",
        "cmdline",
        "goroutine?debug=1",
        "heap?debug=1",
        "block?debug=1&seconds=1",
        "mutex?debug=1&seconds=1",
        "goroutine",
        "heap",
    ):
        reply = trap.send(raw.request(f"/debug/pprof/{path}", key=AK), timeout=10)
        assert reply.status in (200, 404), reply.data
        found.append((path, reply.body))
    for key in (CK, trap.tokens[0]):
        own = ("/v1/me", "/v1/me/usage", "/v1/me/quota", "/v1/models")
        found += ((path, trap.send(raw.request(path, key=key)).data) for path in own)
    found += trap.seen + list(files(trap.folder))
    for name in ("cmdline", "environ"):
        found.append((name, Path(f"/proc/{trap.daemon.pid}/{name}").read_bytes()))
    return found


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file that the daemon has written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "secrets" not in path.parts and path.name != "gproxyd.yaml":
            yield str(path.relative_to(folder)), path.read_bytes()


def spellings(secret: str) -> Iterator[tuple[str, bytes]]:
    """A secret as it is and as it might be disguised."""
    data = secret.encode()
    yield "plain", data
    yield "the beginning", data[:12]
    yield "the end", data[-10:]
    yield "base64", base64.b64encode(data).rstrip(b"=")[:-2]
    yield "hexadecimal", data.hex().encode()
    yield "reversed", data[::-1]


def search(found: Iterable[tuple[str, bytes]], secrets: Iterable[str]) -> None:
    look = [(secret, how, data) for secret in secrets for how, data in spellings(secret)]
    for where, text in found:
        for secret, how, data in look:
            at = text.find(data)
            assert at < 0, (where, secret, how, text[max(0, at - 200) : at + 100])


def digests(keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for key in keys:
        for name in ("sha256", "sha1", "md5"):
            digest = hashlib.new(name, key.encode()).digest()
            yield key, digest
            yield key, digest.hex().encode()
            yield key, base64.b64encode(digest).rstrip(b"=")


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory, loop: Loop) -> Iterator[tuple[Trap, list[tuple[str, bytes]]]]:
    """Usage is kept, envelopes without bodies are kept, the log tells all."""
    old = os.umask(0)  # the daemon minds its modes itself, and whether its memory may be written to a file
    core = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (core[1], core[1]))
    try:
        made = Trap(tmp_path_factory.mktemp("trap"), loop, ALL_RECORDS)
        with made.daemon:
            os.umask(old)
            resource.setrlimit(resource.RLIMIT_CORE, core)
            exercise(made)
            found = gather(made)
            until(lambda: any(line["event"] == "reloaded" for line in made.daemon.log()))
            yield made, found
    finally:
        os.umask(old)
        resource.setrlimit(resource.RLIMIT_CORE, core)


Found = tuple[Trap, list[tuple[str, bytes]]]


def test_the_suite_has_been_through_it_all(trap: Found) -> None:
    """Or the search below would find nothing in nothing."""
    made, found = trap
    log = made.daemon.log()
    requests = [line for line in log if line["event"] == "request"]
    assert {line["status"] for line in requests} >= {200, 302, 400, 401, 402, 403, 404, 405, 409, 413, 500, 502}
    assert {line["outcome"] for line in requests} >= {"ok", "refused", "upstream_error"}
    bodies = b" ".join(got.body for got in made.upstream.requests)
    heads = b" ".join(got.raw_head for got in made.upstream.requests)
    assert all(word.encode() in bodies for word in (PR, FI)) and all(
        word.encode() in heads for word in (PK, PK2, HS, QS)
    )
    assert not any(key.encode() in heads + bodies for key in (AK, CK, TK, HK, POOR, CO, *made.tokens))
    database = sqlite3.connect(f"file:{made.folder}/gproxyd.db?mode=ro", uri=True)
    for table in ("usage", "totals", "users", "keys", "audit", "request_logs"):
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if table in names:
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] > 0, table
    database.close()
    assert {name for name, _ in found} >= {
        "log.jsonl",
        "gproxyd.db",
        "/metrics",
        "/statsz",
        "GET /admin/config",
        "cmdline",
    }


def test_no_key_is_anywhere(trap: Found) -> None:
    made, found = trap
    search(found, (*KEYS, *made.tokens))


def test_nothing_private_is_anywhere(trap: Found) -> None:
    search(trap[1], PRIVATE)


def test_a_digest_of_a_key_is_in_the_database_and_nowhere_else(trap: Found) -> None:
    """That of keys that the database holds; of others not even there."""
    made, found = trap
    stored = b"".join(text for name, text in found if name.startswith("gproxyd.db"))
    for token in made.tokens:
        assert hashlib.sha256(token.encode()).digest() in stored
    for where, text in found:
        for key, digest in digests((*KEYS, *made.tokens)):
            if not (where.startswith("gproxyd.db") and key in made.tokens):
                assert digest not in text, (where, key)


def test_callers_are_named_to_administrators_only(trap: Found) -> None:
    """`/metrics` and `/statsz` ask for no key, so they tell of models and providers and not of people."""
    for where, text in trap[1]:
        if where in ("/metrics", "/statsz", "/healthz", "/readyz"):
            body = text.partition(b"\r\n\r\n")[2]
            assert not any(
                name in body for name in (b"ann", b"poor", b"root", b"credential", b"127.0.0.1", b"X-Trace-Key")
            ), where


def test_files_are_their_owners_alone(trap: Found) -> None:
    made, _ = trap
    ours = [path for path in made.folder.rglob("*") if "secrets" not in path.parts]
    ours = [path for path in ours if path.name not in ("gproxyd.yaml", "log.jsonl")]
    assert {"gproxyd.db", "gproxyd.db-wal", "admin.sock"} <= {path.name for path in ours}
    for path in ours:
        mode = path.lstat().st_mode
        assert stat.S_IMODE(mode) == (0o700 if path.is_dir() else 0o600), (path, oct(mode))


def test_a_line_of_the_log_holds_only_what_is_on_the_list(trap: Found) -> None:
    """An allow-list: whatever a later version adds must be thought about here."""
    allowed = {
        "time", "level", "event", "request_id", "client", "method", "path", "endpoint", "form", "dialect", "key",
        "provider",
        "model", "requested_model", "status", "outcome", "reason", "attempts", "stream", "bytes_in", "bytes_out",
        "ttfb_ms",
        "duration_ms", "upstream_id", "upstream_request_id", "input_tokens", "output_tokens", "cost_usd",
        "provenance",
        "upstream_status", "cost_nanousd", "tokens",
    }  # fmt: skip
    lines = [line for line in trap[0].daemon.log() if line["event"] == "request"]
    assert set().union(*lines) <= allowed, set().union(*lines) - allowed
    assert {line["key"] for line in lines if line.get("key")} >= {
        "ann/credential",
        "ann/token",
        "ann/hash",
        "root/main",
        "new/a",
    }
    assert not any("?" in line["path"] for line in lines)


def test_a_usage_record_holds_only_what_the_contract_names(trap: Found) -> None:
    contract = {
        "id", "at", "request_id", "user", "key", "endpoint", "form", "dialect", "provider", "model", "requested_model",
        "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens",
        "reasoning_tokens", "cost_nanousd", "provenance", "status", "stream", "attempts", "ttft_ms", "duration_ms",
        "client_gone", "cost_usd",
    }  # fmt: skip
    text = next(text for where, text in trap[1] if where == "GET /admin/usage?limit=1000")
    rows = Reply(text, "fin").json["data"]
    assert rows and all(set(row) == contract for row in rows)


def test_a_refusal_of_the_gateways_own_key_is_a_bad_gateway_without_the_vendors_words(trap: Found) -> None:
    made, _ = trap
    for path, model in (
        ("/v1/chat/completions", "chat"),
        ("/v1/messages", "smart"),
        ("/proxy/openai-main/v1/chat/completions", "m"),
    ):
        said = {"model": model, "messages": [{"role": "user", "content": f"refuse {PR}"}]}
        reply = made.send(raw.request(path, said, key=CK))
        assert reply.status in (502, 503) and b"Incorrect" not in reply.data, reply.data
        search([(path, reply.data)], (*KEYS, *PRIVATE))
    told = [line for line in made.daemon.log() if line["event"] == "credential_refused"]
    assert told and all(line["level"] in ("warning", "error") for line in told)


def test_the_process_leaves_no_image_of_its_memory(trap: Found) -> None:
    """A core dump would hold every key."""
    pid = trap[0].daemon.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    (core,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4] == "0", core


# Bodies are kept where an administrator asks for them; keys are not even then.


def test_envelopes_with_bodies_hold_words_and_no_key(tmp_path: Path, loop: Loop) -> None:
    made = Trap(tmp_path, loop, ALL_BODIES)
    with made.daemon:
        exercise(made)
        until(lambda: len(made.admin("GET", "/admin/requests?limit=1000").json["data"]) > 50)
        time.sleep(0.3)
        found = gather(made)
        kept = b"".join(text for name, text in found if name.startswith("gproxyd.db"))
        assert PR.encode() in kept and RS.encode() in kept  # that is what it is for
        # Not even where a vendor repeats in its own words what it was told.
        search(found, (AK, CK, TK, HK, POOR, DISABLED, HS, CO, *made.tokens))
        search(found, (PK, PK2))
        elsewhere = [(name, text) for name, text in found if not name.startswith(("gproxyd.db", "GET /admin/requests"))]
        search(elsewhere, PRIVATE)
        whole = [text for name, text in found if name.startswith("GET /admin/requests/req_")]
        assert any(b'"headers":[' in text for text in whole)
        # Switched off again, nothing more is kept.
        made.daemon.config.write_text(made.daemon.config.read_text().replace(ALL_BODIES, ""))
        assert made.admin("POST", "/admin/reload").status == 200
        last = made.send(raw.request("/v1/chat/completions", {"model": "chat", "messages": []}, key=CK))
        time.sleep(0.3)
        assert made.admin("GET", f"/admin/requests/{last.header('x-request-id')}").status == 404


def test_nothing_is_kept_of_words_unless_it_is_asked_for(tmp_path: Path, loop: Loop) -> None:
    made = Trap(tmp_path, loop, "")
    with made.daemon:
        for data in list(chats(CK))[:14]:
            made.send(data)
        time.sleep(0.3)
        assert made.admin("GET", "/admin/requests").json["data"] == []
        search(files(tmp_path), (*KEYS, *PRIVATE))


def test_a_killed_process_leaves_nothing_in_its_spool_either(tmp_path: Path, loop: Loop) -> None:
    made = Trap(tmp_path, loop, "")
    with made.daemon:
        for data in list(chats(CK))[:14]:
            made.send(data)
        made.daemon.signal(signal.SIGKILL)
        made.daemon.process.wait(10)
    left = list(files(tmp_path))
    assert any(".spool/" in name for name, _ in left), [name for name, _ in left]
    search(left, (*KEYS, *PRIVATE))
