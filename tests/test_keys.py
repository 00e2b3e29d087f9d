"""Who may call: where a key is read from, which keys are good, and that a refusal tells nothing more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from urllib.parse import quote_from_bytes

import pytest

from tests.support import raw
from tests.support.checks import Bench, chat, quick_log
from tests.support.raw import Reply
from tests.support.running import PROVIDER_KEY, Loop

GOOD, READER, PLAIN = "ck-good-31337c0d", "ck-reader-5a5a5a5a", "ck-plain-0badf00d"
DISABLED, EXPIRED, LATER = "ck-disabled-1", "ck-expired-1", "ck-later-1"
HASHED, TOKEN = "ck-hashed-77aa", "ck-token-88bb"
QUOTED, EXPIRED_NOW = "ck' OR 1=1--\"", "ck-expired-2"
SHARED = "ck-" + "s" * 80
PRIMARY = "ck-primary-42424242"
ROTATED = ("ck-rotated-a", "ck-rotated-b")

SECRETS = {
    "provider-key": PROVIDER_KEY, "good": GOOD, "reader": READER, "plain": PLAIN, "disabled": DISABLED,
    "expired": EXPIRED, "expired-now": EXPIRED_NOW, "later": LATER, "quoted": QUOTED, "client-token": PRIMARY,
    "shared-1": SHARED + "1", "shared-2": SHARED + "2", "rotated": "\n".join(ROTATED),
}  # fmt: skip

CONFIG = f"""\
server: {{{{listen: ["127.0.0.1:0"]}}}}
providers:
  openai-main: {{{{vendor: openai, base_url: "{{vendor}}", credentials: [provider-key], models: [{{{{id: m}}}}]}}}}
  anthropic-main: {{{{vendor: anthropic, base_url: "{{vendor}}", credentials: [provider-key]}}}}
  vertex-main: {{{{vendor: gemini, base_url: "{{vendor}}", credentials: [provider-key]}}}}
endpoints: {{{{files: openai-main}}}}
users:
  ann:
    role: admin
    keys:
      good: {{{{credential: good}}}}
      disabled: {{{{credential: disabled, enabled: false}}}}
      expired: {{{{credential: expired, expires_at: 2001-01-01T00:00:00Z}}}}
      expired-now: {{{{credential: expired-now, expires_at: "2026-01-01T00:00:00+14:00"}}}}
      later: {{{{credential: later, expires_at: 2999-12-31T23:59:59Z}}}}
      hashed: {{{{sha256: {hashlib.sha256(HASHED.encode()).hexdigest()}}}}}
      token: {{{{token: {TOKEN}}}}}
      quoted: {{{{credential: quoted}}}}
      rotated: {{{{credential: rotated}}}}
  bob: {{{{role: user, permissions: ["*"],
    keys: {{{{plain: {{{{credential: plain}}}}, shared: {{{{credential: shared-1}}}}}}}}}}}}
  cat: {{{{role: read-only, permissions: ["*"],
    keys: {{{{reader: {{{{credential: reader}}}}, shared: {{{{credential: shared-2}}}}}}}}}}}}
"""

PATHS = {
    "openai_chat": ("POST", "/v1/chat/completions"),
    "openai_responses": ("POST", "/v1/responses"),
    "anthropic": ("POST", "/v1/messages"),
    "gemini": ("POST", "/v1beta/models/vertex-main/g:generateContent"),
}


@pytest.fixture(scope="module")
def bench(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        made = Bench(loop, CONFIG, SECRETS)
        made.secrets |= {HASHED, TOKEN, *ROTATED}
        made.secrets -= {SECRETS["rotated"]}
        yield made


def listing(*headers: tuple[str | bytes, str | bytes], query: str = "", method: str = "GET") -> bytes:
    return raw.request(f"/v1/models{query}", method=method, key=None, headers=headers)


def caller(bench: Bench, reply: Reply) -> object:
    """Whom the log names as the caller."""
    return bench.gateway.request(reply.header("x-request-id") or "").get("key")


# Where a key is read from.

PLACES = {
    "authorization": lambda key: [("Authorization", f"Bearer {key}")],
    "x-api-key": lambda key: [("x-api-key", key)],
    "x-goog-api-key": lambda key: [("x-goog-api-key", key)],
}
KEYS = {
    GOOD: "ann/good", LATER: "ann/later", HASHED: "ann/hashed", TOKEN: "ann/token", QUOTED: "ann/quoted",
    ROTATED[0]: "ann/rotated", ROTATED[1]: "ann/rotated", PLAIN: "bob/plain", READER: "cat/reader",
    SHARED + "1": "bob/shared", SHARED + "2": "cat/shared", PRIMARY: "primary/client-token",
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=lambda key: KEYS[key])
@pytest.mark.parametrize("place", [*PLACES, "query"])
def test_a_key_is_its_owners_wherever_it_is_presented(bench: Bench, place: str, key: str) -> None:
    if place == "query":
        reply = bench.ask(listing(query=f"?key={quote_from_bytes(key.encode())}"))
    else:
        reply = bench.ask(listing(*PLACES[place](key)))
    assert reply.status == 200, reply.data
    assert caller(bench, reply) == KEYS[key]


ORDER = ("authorization", "x-api-key", "x-goog-api-key", "query")


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_the_first_place_that_is_present_decides(bench: Bench, first: int, second: int) -> None:
    """Two different good keys, then a bad one before a good one, whatever the order of the lines."""
    if first >= second:
        return
    for keys, expected in (((GOOD, PLAIN), "ann/good"), (("ck-bad", GOOD), None), ((PLAIN, "ck-bad"), "bob/plain")):
        lines, query = [], ""
        for place, key in zip((ORDER[first], ORDER[second]), keys, strict=True):
            if place == "query":
                query = f"?key={key}"
            else:
                lines += PLACES[place](key)
        for turned in (lines, lines[::-1]):
            reply = bench.ask(listing(*turned, query=query))
            assert reply.status == (200 if expected else 401), reply.data
            assert caller(bench, reply) == expected


@pytest.mark.parametrize("place", ["Authorization", "x-api-key", "x-goog-api-key"])
@pytest.mark.parametrize("other", ["same", "bad", "empty"])
def test_a_place_that_is_there_twice_is_refused(bench: Bench, place: str, other: str) -> None:
    lines = PLACES[place.lower()](GOOD)
    value = {"same": lines[0][1], "bad": "Bearer ck-bad", "empty": ""}[other]
    for doubled in ([*lines, (place.upper(), value)], [(place.lower(), value), *lines]):
        bench.refused(listing(*doubled), 400, "invalid_request", dialect=None)
        beside = [*doubled, *PLACES["authorization" if place != "Authorization" else "x-api-key"](GOOD)]
        bench.refused(listing(*beside), 400, "invalid_request", dialect=None)


def test_a_parameter_that_is_there_twice_is_refused(bench: Bench) -> None:
    for query in (f"?key={GOOD}&key={GOOD}", f"?key=bad&key={GOOD}", f"?key={GOOD}&a&k%65y=", f"?key={GOOD};key=x"):
        bench.refused(listing(query=query), 400, "invalid_request")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (f"Bearer {GOOD}", 200), (f"bearer {GOOD}", 200), (f"BEARER {GOOD}", 200), (f"Bearer  {GOOD}", 200),
        (f"Bearer {GOOD}  ", 200), (f"  Bearer {GOOD}", 200), (f"Bearer\t{GOOD}", 401), (f"Bearer{GOOD}", 401),
        (f"Basic {GOOD}", 401), (f"Token {GOOD}", 401), (GOOD, 401), ("Bearer", 401), ("Bearer ", 401), ("", 401),
        (f"Bearer {GOOD},x", 401), (f"Bearer {GOOD} x", 401), (f'Bearer "{GOOD}"', 401), (f"Bearer '{GOOD}'", 401),
        (f"Bearer Bearer {GOOD}", 401), (f"Bearer {GOOD.upper()}", 401), (f"Bearer {GOOD[:-1]}", 401),
        (f"Bearer {GOOD}0", 401), (f"Bearer: {GOOD}", 401), (f"Bearer {GOOD}%20", 401),
    ],
)  # fmt: skip
def test_the_grammar_of_a_bearer_token(bench: Bench, value: str, status: int) -> None:
    reply = bench.ask(listing(("Authorization", value)))
    assert reply.status == status, reply.data


@pytest.mark.parametrize(
    "name", ["api-key", "Cookie", "Proxy-Authorization", "x_api_key", "X-Api-Key2", "apikey", "X-Key"]
)
def test_no_other_place_holds_a_key(bench: Bench, name: str) -> None:
    for value in (GOOD, f"Bearer {GOOD}", f"key={GOOD}"):
        bench.refused(listing((name, value)), 401, "unauthorized")


# A refusal tells nothing more.

REFUSED = {
    "missing": None, "unknown": "ck-nobody", "disabled": DISABLED, "expired": EXPIRED, "expired elsewhere": EXPIRED_NOW,
    "empty": "", "hash": hashlib.sha256(GOOD.encode()).hexdigest(), "prefix": GOOD[:-1], "suffix": GOOD[1:],
    "name": "ann/good", "vendor's": PROVIDER_KEY,
}  # fmt: skip


def _anonymous(reply: Reply) -> tuple[bytes, bytes]:
    """Head and body without what differs from one answer to the next."""
    request_id = (reply.header("x-request-id") or "").encode()
    lines = [line for line in reply.head.split(b"\r\n") if not line.lower().startswith(b"date:")]
    return b"\r\n".join(lines).replace(request_id, b"ID"), reply.body.replace(request_id, b"ID")


@pytest.mark.parametrize("dialect", PATHS)
@pytest.mark.parametrize("place", PLACES)
def test_all_refusals_look_the_same_in_every_dialect(bench: Bench, dialect: str, place: str) -> None:
    method, path = PATHS[dialect]
    answers = {}
    for why, key in REFUSED.items():
        lines = [] if key is None else PLACES[place](key)
        data = raw.request(path, chat(), method=method, key=None, headers=lines)
        reply = bench.refused(data, 401, "unauthorized", "openai_chat" if dialect == "openai_responses" else dialect)
        answers[why] = _anonymous(reply)
        assert caller(bench, reply) is None
    assert len(set(answers.values())) == 1, answers


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models", "/v1/models/openai-main/m", "/v1beta/models", "/openai-main/v1/models", "/proxy/openai-main/x",
        "/v1/files", "/v1/nothing", "/", "/nobody/v1/models", "/proxy/nobody/x", "/statsz/x", "/admin/users", "/v1/me",
        "/admin/config", "/console/x", "/debug/pprof/heap", "/v1/a2a", "/.well-known/agent-card.json", "/api/x",
        "/favicon.ico", "/robots.txt",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH", "OPTIONS"])
def test_without_a_key_every_path_says_the_same(bench: Bench, method: str, target: str) -> None:
    """Not even whether there is such an endpoint or such a provider."""
    for key in (None, DISABLED, EXPIRED, "ck-nobody"):
        bench.refused(raw.request(target, method=method, key=key), 401, "unauthorized", dialect=None)


def test_head_without_a_key(bench: Bench) -> None:
    reply = bench.ask(raw.request("/v1/models", method="HEAD", key="ck-nobody"), timeout=0.3)
    assert reply.status == 401 and reply.body == b""


# Keys as nobody makes them.

ODD_KEYS = {
    "8 KB": b"k" * 8192,
    "15 KB": b"k" * 15_000,
    "beyond ASCII": "schlüssel-é".encode(),
    "latin-1": b"\xe9\xff\x80",
    "emoji": "\U0001f511".encode(),
    "quotes": b"' OR 1=1--",
    "double quotes": b'"; DROP TABLE keys; --',
    "formats": b"%s%n{0}{__class__}%00",
    "path": b"../../etc/passwd",
    "wildcards": b"ck-%_*?",
    "json": b'{"$ne": null}',
    "brackets": b"[]",
    "null": b"null",
    "spaces": b"ck good",
    "hash": hashlib.sha256(GOOD.encode()).hexdigest().encode(),
    "upper-case hash": hashlib.sha256(GOOD.encode()).hexdigest().upper().encode(),
    "hash of a configured hash": hashlib.sha256(HASHED.encode()).hexdigest().encode(),
    "raw hash": hashlib.sha256(GOOD.encode()).digest().translate(bytes(b if b > 0x20 else 0x21 for b in range(256))),
    "good with a tail": GOOD.encode() + b"\xc2\xa0",
    "full width": "ｃｋ－ｇｏｏｄ".encode(),
}


@pytest.mark.parametrize("name", ODD_KEYS)
@pytest.mark.parametrize("place", [b"Authorization: Bearer ", b"x-api-key: ", b"x-goog-api-key: ", b"?key="])
def test_an_odd_key_is_unknown(bench: Bench, place: bytes, name: str) -> None:
    key = ODD_KEYS[name]
    if place == b"?key=":
        data = listing(query="?key=" + quote_from_bytes(key[:4096]))
    else:
        header, _, scheme = place.partition(b": ")
        data = listing((header, scheme + key))
    reply = bench.refused(data, 401, "unauthorized", dialect=None)
    assert reply.headers("www-authenticate") == ["Bearer"]


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x0B, 0x1F, 0x7F])
@pytest.mark.parametrize("place", [b"Authorization: Bearer ", b"x-api-key: "])
def test_a_control_in_a_key_is_no_valid_request(bench: Bench, place: bytes, byte: int) -> None:
    header, _, scheme = place.partition(b": ")
    for value in (b"ck-%c-x", GOOD.encode() + b"%c"):
        bench.refused(listing((header, scheme + value % byte)), 400, "invalid_request")


@pytest.mark.parametrize(
    "value", ["%00", GOOD + "%00", "%00" + GOOD, GOOD + "%0d%0a", GOOD + "%20", "+" + GOOD, "%F0%9F%94%91"]
)
def test_an_encoded_control_in_the_query_makes_another_key(bench: Bench, value: str) -> None:
    bench.refused(listing(query=f"?key={value}"), 401, "unauthorized")


def test_keys_that_share_a_long_beginning_are_different_people(bench: Bench) -> None:
    for _ in range(3):
        for tail, expected in (("1", "bob/shared"), ("2", "cat/shared"), ("3", None), ("", None)):
            reply = bench.ask(listing(("Authorization", f"Bearer {SHARED}{tail}")))
            assert (reply.status, caller(bench, reply)) == (200 if expected else 401, expected)


# Nothing is remembered from one request to the next.


def test_every_request_of_a_connection_shows_its_own_key(bench: Bench) -> None:
    wanted = [(GOOD, 200), (PLAIN, 200), (None, 401), ("ck-bad", 401), (DISABLED, 401), (READER, 200), (None, 401)]
    with raw.connect(bench.gateway.port) as sock:
        for key, status in wanted:
            sock.sendall(raw.request("/v1/models", key=key))
            assert raw.read(sock).status == status


def test_a_key_expires_while_it_is_in_use(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from gproxyd.policy import callers

    edge = 32503679999.0  # 2999-12-31T23:59:59Z
    for now, status in ((edge - 1, 200), (edge - 0.001, 200), (edge, 401), (edge + 1, 401)):
        monkeypatch.setattr(callers.time, "time", lambda now=now: now)
        reply = raw.send(bench.gateway.port, listing(("x-api-key", LATER)))
        monkeypatch.undo()
        assert reply.status == status, now


# Roles.


@pytest.mark.parametrize("place", PLACES)
def test_a_read_only_key_reads(bench: Bench, place: str) -> None:
    lines = PLACES[place](READER)
    assert bench.ask(listing(*lines)).status == 200
    assert bench.ask(listing(*lines, method="HEAD"), timeout=0.3).status == 200
    bench.forwarded(raw.request("/v1/files", key=None, headers=lines))
    bench.forwarded(raw.request("/proxy/openai-main/anything", key=None, headers=lines))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("method", "target"),
    [
        *PATHS.values(),
        ("DELETE", "/v1/files/a"),
        ("POST", "/v1/files"),
        ("PUT", "/proxy/openai-main/x"),
        ("POST", "/proxy/openai-main/x"),
        ("PATCH", "/openai-main/v1/x"),
        ("OPTIONS", "/v1/models"),
        ("GETX", "/v1/models"),
        ("get", "/v1/models"),
    ],
)
def test_a_read_only_key_writes_nothing(bench: Bench, place: str, method: str, target: str) -> None:
    """The rule belongs to the key, not to the header that bears it; and no other header changes the method."""
    override = [("X-HTTP-Method-Override", "GET"), ("X-HTTP-Method", "GET"), ("X-Method-Override", "GET")]
    before = len(bench.upstream.requests)
    reply = bench.ask(raw.request(target, chat(), method=method, key=None, headers=[*PLACES[place](READER), *override]))
    assert reply.status == 403 or (method in ("GETX", "get") and reply.status == 400), reply.data
    assert bench.upstream.requests[before:] == []
    if reply.status == 403:
        assert reply.json["error"]["message"].startswith("forbidden: endpoint")


def test_a_read_only_refusal_is_in_the_callers_dialect(bench: Bench) -> None:
    for dialect, (method, path) in PATHS.items():
        shape = "openai_chat" if dialect == "openai_responses" else dialect
        bench.refused(raw.request(path, chat(), method=method, key=READER), 403, "forbidden_endpoint", shape)


def test_a_good_key_beside_a_read_only_one_does_not_lend_its_role(bench: Bench) -> None:
    lines = [("Authorization", f"Bearer {READER}"), ("x-api-key", GOOD)]
    bench.refused(raw.request("/v1/chat/completions", chat(), key=None, headers=lines), 403, "forbidden_endpoint")


def test_the_single_token_is_the_key_of_an_administrator(bench: Bench) -> None:
    _, reply = bench.forwarded(raw.request("/v1/chat/completions", chat("openai-main/m"), key=PRIMARY))
    assert caller(bench, reply) == "primary/client-token"


def test_the_single_token_is_enough(loop: Loop) -> None:
    config = CONFIG.partition("users:")[0]
    alone = Bench(loop, config, {"provider-key": PROVIDER_KEY, "client-token": PRIMARY})
    alone.forwarded(raw.request("/v1/chat/completions", chat("openai-main/m"), key=PRIMARY))
    alone.refused(raw.request("/v1/models", key=None), 401, "unauthorized")
    alone.refused(raw.request("/v1/models", key=""), 401, "unauthorized")
    alone.refused(raw.request("/v1/models", key="client-token"), 401, "unauthorized")


def test_without_any_key_nobody_gets_in(loop: Loop) -> None:
    config = CONFIG.partition("users:")[0]
    closed = Bench(loop, config, {"provider-key": PROVIDER_KEY})
    for key in (None, "", PRIMARY, "client-token"):
        closed.refused(raw.request("/v1/models", key=key), 401, "unauthorized")
    assert any(
        line["event"] == "configuration" and "nobody can call" in line["message"] for line in closed.gateway.log()
    )


# No key is needed to ask whether the gateway lives.


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_asks_for_no_key(bench: Bench, path: str) -> None:
    odd: list[list[tuple[str | bytes, str | bytes]]] = [
        [], [("Authorization", "Bearer ck-bad")], [("x-api-key", b"\xff")], [("x-api-key", "a"), ("x-api-key", "b")],
    ]  # fmt: skip
    for lines in odd:
        reply = bench.ask(raw.request(path, key=None, headers=lines))
        assert (reply.status, reply.body) == (200, b"OK")
        assert (reply.header("content-type") or "").startswith("text/plain")
    assert bench.ask(raw.request(f"{path}?key=x&key=y", key=None)).status == 200
    bench.refused(raw.request(path, b"", key=None), 405, "method_not_allowed", dialect=None)
