"""What must never be told: keys, cookies, prompts and answers, in no error, no log line and no header."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from gproxyd.errors import UpstreamError
from gproxyd.gateway.router import Router
from gproxyd.observe.journal import MAX_FIELD, Journal, JournalHandler
from tests.support import raw
from tests.support.checks import quick_log
from tests.support.process import Process, run
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, PROVIDER_KEY, SECRETS, Loop, Running, until
from tests.support.upstream import EVENT_STREAM, Fin, Got, Reset, Script, Stall, Upstream, chunk, json_reply

COOKIE = "co-canary-77aa01"
PROMPT = "pr-canary-2f6be9"
ANSWER = "rs-canary-c0ffe1"
QUERY = "qs-canary-51d0aa"
REFERER = "rf-canary-900b3d"
CANARIES = [PROVIDER_KEY, CLIENT_KEY, COOKIE, PROMPT, ANSWER, QUERY, REFERER]

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
log: {{level: debug, format: {form}}}
streams: {{keepalive: 0s}}
providers:
  up: {{vendor: openai, base_url: "{url}", credentials: [provider-key], timeouts: {{first_byte: 300ms, idle: 300ms}}}}
  claude: {{vendor: anthropic, base_url: "{url}", credentials: [provider-key], timeouts: {{first_byte: 300ms}}}}
  google: {{vendor: gemini, base_url: "{url}", credentials: [provider-key], timeouts: {{first_byte: 300ms}}}}
  closed: {{vendor: openai, base_url: "http://127.0.0.1:{closed}", credentials: [provider-key]}}
  unknown: {{vendor: openai, base_url: "http://nowhere.invalid", credentials: [provider-key]}}
  untls: {{vendor: openai, base_url: "https://127.0.0.1:{port}", credentials: [provider-key]}}
aliases: {{quick: up/m}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def clean(text: bytes | str, where: str = "") -> None:
    """Nothing of what must not be told is in it."""
    data = text if isinstance(text, bytes) else text.encode()
    for canary in CANARIES:
        assert canary.encode() not in data, (where, canary, data[-3000:])


class Trap:
    """A gateway in a process of its own, whose every word is kept, and the upstream behind it."""

    def __init__(self, folder: Path, loop: Loop, *, form: str = "json", **environ: str) -> None:
        self.script: Script | Callable[[Got], Script] = [json_reply(b'{"model":"m"}')]
        self.upstream = Upstream(loop, lambda got: self.script(got) if callable(self.script) else self.script).start()
        config = CONFIG.format(url=self.upstream.url, port=self.upstream.port, closed=free_port(), form=form)
        self.daemon = Process(folder, config, SECRETS, **environ)
        self._log = folder / "log.jsonl"
        self._read = 0

    def send(self, data: bytes, where: str = "", *, told: tuple[str, ...] = ()) -> Reply:
        """Sends it; of the canaries the reply may hold those that are `told`, for it is their owner who asks."""
        reply = raw.send(self.daemon.port, data)
        shown = reply.data
        for canary in told:
            shown = shown.replace(canary.encode(), b"")
        clean(shown, where)
        return reply

    def words(self) -> str:
        """All that has been logged since it was last asked, once everything has been."""
        last = raw.send(self.daemon.port, raw.request("/v1/models")).header("x-request-id") or "?"
        until(lambda: last in self._log.read_text())
        words = self._log.read_text()[self._read :]
        self._read += len(words)
        return words


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory, loop: Loop) -> Iterator[Trap]:
    made = Trap(tmp_path_factory.mktemp("trap"), loop)
    with made.daemon:
        yield made


# Requests that are no HTTP.

KEY = b"Authorization: Bearer " + CLIENT_KEY.encode()
HOST = b"Host: h\r\nCookie: " + COOKIE.encode() + b"\r\n"
TEXT = b'{"model":"up/m","messages":"%b"}' % PROMPT.encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST
CHUNKED = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b"%x\r\n%b\r\n" % (len(TEXT), TEXT)
CK, CO, QS = CLIENT_KEY.encode(), COOKIE.encode(), QUERY.encode()

JSON = ("Content-Type", "application/json")

MALFORMED = {
    "a control in the key": POST + KEY + b"\x01\r\n\r\n",
    "a quote and a control": POST + KEY + b"'\x01\r\n\r\n",
    "NUL in the key": POST + KEY + b"\0x\r\n\r\n",
    "a folded key": POST + b"Authorization: Bearer\r\n " + CK + b"\r\n\r\n",
    "a fold behind the key": POST + KEY + b"\r\n " + CO + b"\r\n\r\n",
    "a bare CR behind the key": POST + KEY + b"\rX: y\r\n\r\n",
    "a bare LF behind the key": POST + KEY + b"\nX: " + CO + b"\n\n",
    "a space before the colon": POST + b"Authorization : Bearer " + CK + b"\r\n\r\n",
    "a name with a space": POST + b"Author ization: " + CK + b"\r\n\r\n",
    "no colon": POST + CK + b"\r\n\r\n",
    "a name that is the key": POST + CK + b"\x7f: x\r\n\r\n",
    "the key twice": POST + KEY + b"\r\n" + KEY + b"\r\n\r\n",
    "the key in the method": CK + b" /v1/models HTTP/1.1\r\n" + HOST + b"\r\n",
    "the key in the version": b"GET /v1/models HTTP/" + CK + b"\r\n" + HOST + b"\r\n",
    "the key behind the version": b"GET /v1/models HTTP/1.1 " + CK + b"\r\n" + HOST + b"\r\n",
    "the key alone": CK + b"\r\n\r\n",
    "the key in another protocol": b"\x16\x03\x01" + CK + b"\r\n\r\n",
    "a raw byte beside the key": b"GET /v1/models?key=" + CK + b"\x80\x01 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a space in the query": b"GET /v1/models?key=" + CK + b" x HTTP/1.1\r\n" + HOST + b"\r\n",
    "a fragment": b"GET /v1/models#" + CK + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "another host with a password": b"GET http://u:" + CK + b"@other/v1/models HTTP/1.1\r\n" + HOST + b"\r\n",
    "an authority": b"CONNECT " + CK + b":443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a host that is the key": b"GET /v1/models HTTP/1.1\r\nHost: " + CK + b"@h/\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: " + CK + b"\r\nHost: b\r\n\r\n",
    "a length that is the key": POST + KEY + b"\r\nContent-Length: " + CK + b"\r\n\r\n",
    "two lengths": POST + KEY + b"\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n" + TEXT,
    "two framings": POST + KEY + b"\r\nContent-Length: 5\r\n" + CHUNKED + BODY,
    "an unknown coding": POST + KEY + b"\r\nTransfer-Encoding: " + CO + b"\r\n\r\n" + TEXT,
    "a bad chunk behind the prompt": POST + KEY + b"\r\n" + CHUNKED + BODY + b"zz" + CO + b"\r\n",
    "a chunk too long": POST + KEY + b"\r\n" + CHUNKED + b"5\r\n" + TEXT + b"\r\n0\r\n\r\n",
    "a bad extension": POST + KEY + b"\r\n" + CHUNKED + b"5;\0" + CO + b"\r\n" + TEXT,
    "a bad trailer": POST + KEY + b"\r\n" + CHUNKED + BODY + b"0\r\n" + KEY + b"\x01\r\n\r\n",
    "a line too long": b"GET /v1/models?key=" + CK * 2000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a header too long": POST + KEY * 2000 + b"\r\n\r\n",
    "too many headers": POST + (b"X-A: " + CK + b"\r\n") * 300 + b"\r\n",
    "the end of the request is missing": POST + KEY + b"\r\n" + CHUNKED + BODY[:-5],
}  # fmt: skip


@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind-a-good-one"])
def test_a_malformed_request_is_quoted_nowhere(trap: Trap, behind: bool) -> None:
    before = raw.request("/v1/models") if behind else b""
    for what, data in MALFORMED.items():
        with raw.connect(trap.daemon.port, timeout=0.3 if "missing" in what else 0.6) as sock:
            sock.sendall(before + data)
            if "missing" in what:
                sock.shutdown(socket.SHUT_WR)
            reply = raw.read(sock, until_complete=not behind)
        clean(reply.data, what)
        refused = reply.data.count(b"HTTP/1.1 4") + reply.data.count(b"HTTP/1.1 5")
        assert refused == 1 or "missing" in what, (what, reply.data)
        assert b"Traceback" not in reply.data
    words = trap.words()
    clean(words)
    assert "Traceback" not in words and "aiohttp" not in words
    assert {json.loads(line)["level"] for line in words.splitlines()} <= {"debug", "info", "warning"}


REFUSED = {
    "an unknown key": raw.request("/v1/models", key=CLIENT_KEY + "x"),
    "a key in a scheme of its own": raw.request("/v1/models", key=None, headers=[("Authorization", f"K {CLIENT_KEY}")]),
    "an upgrade": raw.request("/v1/models", headers=[("Connection", "upgrade"), ("Upgrade", COOKIE)]),
    "an expectation": raw.request("/v1/models", headers=[("Expect", COOKIE)]),
    "a coding": raw.request("/v1/chat/completions", {}, headers=[("Content-Encoding", COOKIE)]),
    "a type": raw.request("/v1/chat/completions", TEXT, headers=[("Content-Type", COOKIE)]),
    "no JSON": raw.request("/v1/chat/completions", TEXT[:-1], headers=[JSON]),
    "no object": raw.request("/v1/chat/completions", [PROMPT]),
    "a model that is none": raw.request("/v1/chat/completions", {"model": [PROMPT]}),
    "a model with a space": raw.request("/v1/chat/completions", {"model": "up/ " + PROMPT}),
    "two models": raw.request("/v1/chat/completions", TEXT[:-1] + b',"model":"up/x"}', headers=[JSON]),
    "a boundary": raw.request("/v1/audio/transcriptions", TEXT, headers=[("Content-Type", "multipart/form-data")]),
    "a form": raw.request(
        "/v1/audio/transcriptions", TEXT, headers=[("Content-Type", f"multipart/form-data; boundary={COOKIE}")]
    ),
    "a home": raw.request("/v1/files", headers=[("x-gproxyd-provider", COOKIE)]),
    "a home in the query": raw.request(f"/v1/files?provider={QUERY}"),
    "a path beside a key in the query": raw.request(f"/v1/nothing?key={CLIENT_KEY}&x={QUERY}", key=None),
    "a method": raw.request(f"/v1/chat/completions?key={CLIENT_KEY}", method="PUT", key=None),
    "a trace": raw.request("/v1/models", method="TRACE", headers=[("Cookie", COOKIE)]),
    "keys twice in the query": raw.request(f"/v1/models?key={CLIENT_KEY}&key={CLIENT_KEY}", key=None),
}  # fmt: skip


def test_a_refused_request_is_quoted_nowhere(trap: Trap) -> None:
    for what, data in REFUSED.items():
        reply = trap.send(data, what)
        assert 400 <= reply.status < 500, (what, reply.data)
    clean(trap.words())


# Upstreams that fail.


def echo(got: Got) -> bytes:
    return got.raw_head.replace(b"\r\n", b" ") + got.body + ANSWER.encode()


FAILURES: dict[str, Callable[[Got], Script]] = {
    "garbage": lambda got: [echo(got) + b"\r\n\r\n"],
    "a bad status": lambda got: [b"HTTP/1.1 999 " + echo(got) + b"\r\n\r\n"],
    "a bad header": lambda got: [b"HTTP/1.1 200 OK\r\nX: " + echo(got) + b"\0\r\n\r\n"],
    "a head too large": lambda got: [b"HTTP/1.1 200 OK\r\nX: " + echo(got) * 2000 + b"\r\n\r\n"],
    "a held body cut short": lambda got: [json_reply(echo(got))[:-1], Fin()],
    "a held body reset": lambda got: [json_reply(echo(got))[:-1], Reset()],
    "a redirect": lambda got: [b"HTTP/1.1 302 F\r\nLocation: http://x/" + echo(got) + b"\r\nContent-Length: 0\r\n\r\n"],
    "a refusal of the key": lambda got: [json_reply(echo(got), status=b"401 Unauthorized")],
    "silence": lambda got: [Stall()],
    "an end": lambda got: [Fin()],
    "a reset": lambda got: [Reset()],
    "a switch of protocols": lambda got: [b"HTTP/1.1 101 " + echo(got) + b"\r\nUpgrade: x\r\n\r\n"],
}  # fmt: skip

ASKED = {
    "up": lambda name: raw.request(
        f"/{name}/v1/chat/completions?key={CLIENT_KEY}&x={QUERY}",
        TEXT,
        key=None,
        headers=[("Content-Type", "application/json"), ("Cookie", COOKIE), ("Referer", f"http://x/?{REFERER}")],
    ),
    "google": lambda name: raw.request(
        f"/{name}/v1beta/models/m:generateContent?key={CLIENT_KEY}", {"contents": PROMPT}, key=None
    ),
    "claude": lambda name: raw.request(
        f"/{name}/v1/messages?{QUERY}",
        {"model": "m", "messages": PROMPT},
        key=None,
        headers=[("x-api-key", CLIENT_KEY)],
    ),
}


def test_a_failure_of_the_upstream_is_told_by_its_kind_alone(trap: Trap) -> None:
    for what, script in FAILURES.items():
        trap.script = script
        for name, ask in ASKED.items():
            reply = trap.send(ask(name), f"{what}, {name}")
            assert reply.status in (502, 504) and reply.complete, (what, name, reply.data)
    for name in ("closed", "unknown", "untls"):
        reply = trap.send(ASKED["up"](name), name)
        assert reply.status == 502 and reply.complete, (name, reply.data)
    words = trap.words()
    clean(words)
    assert "Traceback" not in words and "nowhere.invalid" not in words
    reasons = {line.get("reason") for line in map(json.loads, words.splitlines()) if line.get("status") in (502, 504)}
    assert reasons >= {"protocol", "closed", "reset", "redirect", "auth", "connect", "dns", "tls"}
    assert all(reason.replace("_", "").isalpha() for reason in reasons)


def test_a_stream_that_breaks_is_logged_without_what_it_held(trap: Trap) -> None:
    event = chunk(b'data: {"model":"m","text":"%b"}\n\n' % ANSWER.encode())
    for ending in ([Fin()], [Reset()], [b"zz" + ANSWER.encode()], [Stall()]):
        trap.script = [EVENT_STREAM, event, *ending]
        reply = trap.send(ASKED["up"]("up"), told=(ANSWER,))
        assert not reply.complete and reply.body.count(ANSWER.encode()) == 1
    clean(trap.words())


def test_the_text_of_every_failure_is_the_gateways_own() -> None:
    """What is raised from a foreign exception says nothing of it, and neither does what it looks like."""
    try:
        try:
            raise OSError(f"http://x/?key={PROVIDER_KEY}")
        except OSError as foreign:
            raise UpstreamError("connect", "the upstream refuses connections") from foreign
    except UpstreamError as error:
        clean(f"{error} {error!r} {error.refusal()} {error.refusal()!r} {error.refusal().message}")


# What is logged of a request that works.


def test_a_log_line_holds_neither_query_nor_headers(trap: Trap) -> None:
    trap.script = [json_reply(b'{"model":"m","text":"%b"}' % ANSWER.encode())]
    names = (
        "key",
        "KEY",
        "k%65y",
        "api_key",
        "api-key",
        "token",
        "access_token",
        "sig",
        "signature",
        "X-Amz-Signature",
    )
    for name in names:
        headers = [
            ("Referer", f"https://app/?{name}={REFERER}"), ("Cookie", f"{name}={COOKIE}"), ("User-Agent", REFERER),
            ("X-Trace", QUERY), ("Origin", REFERER), ("Proxy-Authorization", f"Bearer {COOKIE}"),
        ]  # fmt: skip
        target = f"/up/v1/chat/completions?{name}={QUERY}&a={PROVIDER_KEY}"
        reply = trap.send(
            raw.request(target, TEXT, headers=[*headers, ("Content-Type", "application/json")]), told=(ANSWER,)
        )
        assert reply.status == 200
    words = trap.words()
    clean(words)
    for line in map(json.loads, words.splitlines()):
        assert line["event"] in ("ready", "request", "malformed_request", "credential_refused"), line
        assert "?" not in line.get("path", "")


def test_a_streamed_upload_leaves_nothing_of_itself(trap: Trap) -> None:
    trap.script = [json_reply(b'{"id":"f"}')]
    form = (
        f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nquick\r\n--b\r\nContent-Disposition: form-data; '
        f'name="file"; filename="{PROMPT}"\r\n\r\n{PROMPT}\r\n--b--\r\n'
    )
    headers = [("Content-Type", "multipart/form-data; boundary=b")]
    assert trap.send(raw.request("/v1/audio/transcriptions", form.encode(), headers=headers)).status == 200
    clean(trap.words())


def test_neither_arguments_nor_environment_of_the_process_hold_a_key(trap: Trap) -> None:
    for name in ("cmdline", "environ"):
        clean(Path(f"/proc/{trap.daemon.pid}/{name}").read_bytes())


# Bugs, and those who look for them.


@pytest.mark.parametrize("switch", ["PYTHONASYNCIODEBUG", "PYTHONDEVMODE"])
def test_pythons_debug_switches_are_refused(tmp_path: Path, switch: str) -> None:
    """They print reprs, and what those hold, wherever something takes too long or is not closed."""
    config = tmp_path / "gproxyd.yaml"
    config.write_text(CONFIG.format(url="http://127.0.0.1:1", port=1, closed=1, form="json"))
    done = run("serve", "--config", str(config), **{switch: "1"})
    assert done.returncode == 1
    assert "development mode" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def broken(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A gateway with a bug: an exception that quotes all it knows."""

    async def fail(router: Router) -> None:
        known = f"{PROVIDER_KEY} {CLIENT_KEY} {PROMPT}"
        raise ValueError(known) from KeyError(known)

    monkeypatch.setattr(Router, "route", fail)
    upstream = Upstream(loop, []).start()
    return loop.gateway(CONFIG.format(url=upstream.url, port=upstream.port, closed=free_port(), form="json"))


@pytest.mark.parametrize("debug", [False, True], ids=["usual", "debug"])
def test_a_bug_is_told_by_its_place_and_not_by_its_values(
    broken: Running, loop: Loop, caplog: pytest.LogCaptureFixture, debug: bool
) -> None:
    loop.loop.call_soon_threadsafe(loop.loop.set_debug, debug)
    try:
        for name, ask in ASKED.items():
            reply = raw.send(broken.port, ask(name))
            assert (reply.status, reply.complete, reply.header("connection")) == (500, True, "close")
            assert "internal_error" in reply.json["error"]["message"]
            clean(reply.data, name)
            line = broken.request(reply.header("x-request-id") or "")
            assert (line["level"], line["outcome"], line["reason"]) == ("error", "internal_error", "ValueError")
            (bug,) = [
                entry for entry in broken.log() if entry["event"] == "bug" and entry["request_id"] == line["request_id"]
            ]
            assert bug["error"] == "ValueError" and bug["where"].startswith("fail:")
    finally:
        loop.loop.call_soon_threadsafe(loop.loop.set_debug, False)
    clean(broken.log_path.read_text())
    slow = "Executing %s took %.3f seconds"  # asyncio in its debug mode, of a busy machine
    assert [record for record in caplog.records if record.msg != slow] == []


@contextlib.contextmanager
def journalled(path: Path, form: str) -> Iterator[Journal]:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    journal = Journal(level="debug", form="json" if form == "json" else "text", descriptor=descriptor)
    try:
        yield journal
    finally:
        journal.close()
        os.close(descriptor)


def test_what_the_loop_says_of_a_lost_exception_quotes_no_value(tmp_path: Path) -> None:
    """A task that nobody awaits, a callback that fails: asyncio prints what they look like, with all their values."""

    async def fail() -> None:
        raise ValueError(f"{PROVIDER_KEY} {PROMPT}")

    async def lose() -> None:
        running = asyncio.get_running_loop()
        task = running.create_task(fail())
        await asyncio.wait((task,))
        running.call_exception_handler(
            {"message": "Task exception was never retrieved", "exception": task.exception(), "future": task}
        )
        running.call_soon(lambda text: 1 // 0, CLIENT_KEY)
        await asyncio.sleep(0)

    with journalled(tmp_path / "log", "json") as journal:
        handler = JournalHandler(journal)
        logger = logging.getLogger("asyncio")
        logger.addHandler(handler)
        logger.propagate = False
        try:
            asyncio.run(lose())
        finally:
            logger.propagate = True
            logger.removeHandler(handler)
    words = (tmp_path / "log").read_text()
    clean(words)
    first = json.loads(words.splitlines()[0])
    assert (first["logger"], first["error"]) == ("asyncio", "ValueError")
    assert first["message"].startswith("Task exception was never retrieved")


def test_what_a_library_logs_is_told_without_its_arguments(tmp_path: Path) -> None:
    with journalled(tmp_path / "log", "json") as journal:
        handler = JournalHandler(journal)
        logger = logging.getLogger("library")
        logger.propagate = False
        logger.addHandler(handler)
        logger.warning("Unclosed connection to %s", f"http://x/?key={PROVIDER_KEY}")
        try:
            raise ValueError(PROMPT)
        except ValueError:
            logger.exception("it failed")
    words = (tmp_path / "log").read_text()
    clean(words)
    assert [json.loads(line).get("error") for line in words.splitlines()] == [None, "ValueError"]


# What a peer writes into the log's own form.

ODD = {
    "CR and LF": 'm\r\n{"level":"error","event":"forged"}\r\n',
    "a colour": "m\x1b[31m\x1b]0;title\x07",
    "a colour by one byte": "m\x9b31m\x90x\x9c",
    "a rubout": "m\x7f\x08\x08",
    "other ends of lines": "m\u2028level=error\u2029\x85\x0b\x0c\x1c",
    "the other direction": "m\u202egnp.exe\u2066",
    "a format": "%s%d%n%(message)s {} {0} {request_id} ${jndi:ldap://x}",
    "JSON": '"},{"level":"error"}\\',
    "quotes": "a=\"b\" c='d'",
    "NUL": "m\0x",
    "many letters": "m" * 60_000,
    "many other letters": "\u6a21" * 20_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def written(loop: Loop) -> Iterator[Running]:
    upstream = Upstream(loop, [json_reply(b"{}", headers=b"x-request-id: %s\x85\xff\r\n")]).start()
    with quick_log():
        gateway = loop.gateway(CONFIG.format(url=upstream.url, port=upstream.port, closed=free_port(), form="json"))
        until(gateway.log)  # the line that says that it is ready
        yield gateway


@pytest.mark.parametrize("what", ODD)
def test_a_peer_writes_one_whole_line_and_no_more(written: Running, what: str) -> None:
    odd = ODD[what]
    before = os.path.getsize(written.log_path)
    short = odd[:2000].encode("latin-1", "replace").replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")
    headers = [
        (b"User-Agent", bytes(byte for byte in short if byte >= 32 and byte != 127)),
        (b"X-Forwarded-For", b"1.2.3.4"),
        (b"X-Request-Id", b"\xff\xfe"),
    ]
    reply = raw.send(written.port, raw.request("/proxy/up/v1/chat/completions", {"model": odd}, headers=headers))
    assert reply.status == 200
    written.request(reply.header("x-request-id") or "")
    text = written.log_path.read_bytes()[before:]
    assert text.count(b"\n") == 1 and len(text) < 10 * MAX_FIELD
    line = orjson.loads(text)
    assert (line["event"], line["level"], line["status"]) == ("request", "info", 200)
    for name in ("model", "requested_model"):
        assert len(line[name]) <= MAX_FIELD and line[name][:1] == odd[:1]
    printed = text.decode().rstrip("\n")
    assert printed.isprintable() or printed.isascii(), ascii(printed)
    assert not any(ord(letter) < 32 or ord(letter) == 127 for letter in printed), ascii(printed)


PATHS = [
    b"/v1/%0d%0alevel=error",
    b"/v1/%1b[31m",
    b"/v1/{}%25s",
    b"/v1/" + b"p" * 15_000,
    b"/v1/%22%7d",
    b"/nothing%e2%80%a8x",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:16].decode())
def test_a_path_is_logged_as_it_was_spelled_and_cut(written: Running, path: bytes) -> None:
    before = os.path.getsize(written.log_path)
    reply = raw.send(written.port, raw.request(path))
    line = written.request(reply.header("x-request-id") or "")
    assert line["path"] == path.decode()[:MAX_FIELD]
    assert written.log_path.read_bytes()[before:].count(b"\n") == 1


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("what", ODD)
def test_a_field_is_one_printable_piece_of_one_line(tmp_path: Path, form: str, what: str) -> None:
    """Whoever reads the log on a terminal, or splits it by any of the ends of lines that there are."""
    odd = ODD[what]
    with journalled(tmp_path / "log", form) as journal:
        journal.record("info", "request", path=odd, model=odd, after="marker")
    text = (tmp_path / "log").read_bytes().decode()
    assert text.endswith("\n") and len(text) < 8 * MAX_FIELD
    line = text[:-1]
    assert line.splitlines() == [line]
    assert line.isprintable(), ascii(line)
    if form == "json":
        assert orjson.loads(line)["after"] == "marker"
    else:
        assert line.endswith(" after=marker") and line.count(" after=") == 1


def test_a_flood_of_odd_lines_is_written_in_bounded_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with journalled(tmp_path / "log", "text") as journal:
        for number in range(5000):
            journal.record("info", "request", number=number, model=ODD["many other letters"])
    assert time.monotonic() - began < 3
    assert (tmp_path / "log").read_text().count("\n") == 5000
