"""Header lines: which cross the gateway, in either direction, and which never do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import orjson
import pytest

from tests.support import raw
from tests.support.checks import ENDPOINTS, PLACES, Bench, chat, check_error, quick_log
from tests.support.running import CLIENT_KEY, CONFIG, SECRETS, Loop
from tests.support.upstream import json_reply

CHAT = "/v1/chat/completions"
FORMS = [CHAT, f"/openai-main{CHAT}", f"/proxy/openai-main{CHAT}", "/proxy/openai-main/anything"]
OTHER_KEY = "ck-other-1d5b77e2"


@pytest.fixture(scope="module")
def made(loop: Loop) -> Iterator[Bench]:
    users = "users: {{other: {{role: user, permissions: ['*'], keys: {{main: {{credential: other-key}}}}}}, tester"
    with quick_log():
        yield Bench(loop, CONFIG.replace("users: {{tester", users), {**SECRETS, "other-key": OTHER_KEY})


@pytest.fixture
def bench(made: Bench) -> Bench:
    made.reset()
    return made


# What belongs to one connection only.

HOP_BY_HOP = [
    ("Connection", "keep-alive"),
    ("Connection", "x-nothing"),
    ("Keep-Alive", "timeout=5, max=100"),
    ("Proxy-Connection", "keep-alive"),
    ("Proxy-Authorization", "Basic dTpw"),
    ("Proxy-Authenticate", "Basic"),
    ("TE", "trailers, deflate;q=0.5"),
    ("Trailer", "X-Checksum"),
    ("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA"),
]


@pytest.mark.parametrize(("name", "value"), HOP_BY_HOP)
@pytest.mark.parametrize("target", FORMS)
def test_a_hop_by_hop_line_of_the_client_stays_here(bench: Bench, target: str, name: str, value: str) -> None:
    for spelled in (name, name.lower(), name.upper()):
        got, _ = bench.forwarded(raw.request(target, chat(), headers=[(spelled, value), ("X-Kept", "1")]))
        assert got.header(name) == []
        assert got.header("x-kept") == [b"1"]


def test_chunked_framing_of_the_client_is_made_anew(bench: Bench) -> None:
    headers = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")]
    data = b'{"model":"openai-main/m"}'
    body = b"5;x=y\r\n%b\r\n%x\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (data[:5], len(data) - 5, data[5:])
    got, _ = bench.forwarded(raw.request(CHAT, body, headers=headers))
    assert got.body == b'{"model":"m"}'
    assert got.header("transfer-encoding") == [] and got.header("content-length") == [b"13"]
    assert got.header("x-trailer") == []


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "TLS/1.0", "foo"])
@pytest.mark.parametrize("target", [*FORMS, "/v1/models", "/healthz", "/nothing"])
def test_an_upgrade_is_refused(bench: Bench, target: str, upgrade: str) -> None:
    reply = bench.refused(
        raw.request(target, headers=[("Connection", "Upgrade"), ("Upgrade", upgrade)]), 426, "upgrade_required"
    )
    assert reply.header("connection") == "close"


@pytest.mark.parametrize(("name", "value"), [*HOP_BY_HOP[1:], ("Upgrade", "h2c"), ("Connection", "upgrade, x-nothing")])
@pytest.mark.parametrize("target", FORMS)
def test_a_hop_by_hop_line_of_the_upstream_stays_there(bench: Bench, target: str, name: str, value: str) -> None:
    bench.script = [json_reply(b"{}", headers=f"{name}: {value}\r\nX-Kept: 1\r\n".encode())]
    _, reply = bench.forwarded(raw.request(target, chat()))
    assert reply.headers(name) == []
    assert reply.headers("x-kept") == ["1"]


def test_chunked_framing_of_the_upstream_is_made_anew(bench: Bench) -> None:
    bench.script = [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'2;a="b"\r\n{"\r\n6\r\na":1}\n\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a=b\r\n\r\n'
    ]
    for target in FORMS:
        _, reply = bench.forwarded(raw.request(target, chat()))
        assert reply.body == b'{"a":1}\n'
        assert b"x-sum" not in reply.data.lower() and b"set-cookie" not in reply.data.lower()
        framings = (reply.headers("content-length"), reply.headers("transfer-encoding"))
        assert framings in ((["8"], []), ([], ["chunked"]))


@pytest.mark.parametrize("target", FORMS[:3])
def test_what_the_clients_connection_line_nominates_stays_here(bench: Bench, target: str) -> None:
    nominated = "close, X-Foo ,Authorization,x-api-key, Content-Type,Content-Length,, anthropic-version, Host, Accept"
    headers = [
        ("Connection", nominated),
        ("connection", "X-Bar"),
        ("X-Foo", "1"),
        ("x-bar", "2"),
        ("anthropic-version", "2023-06-01"),
        ("Accept", "*/*"),
        ("X-Kept", "3"),
        ("Content-Type", "application/json"),
    ]
    got, reply = bench.forwarded(raw.request(target, chat(), headers=headers))
    for name in ("x-foo", "x-bar", "anthropic-version", "connection", "accept"):
        assert got.header(name) == [], name
    assert got.header("x-kept") == [b"3"]
    assert got.header("content-length") == [b"%d" % len(got.body)] and got.body
    assert reply.header("connection") == "close"


@pytest.mark.parametrize("target", FORMS)
def test_what_the_upstreams_connection_line_nominates_stays_there(bench: Bench, target: str) -> None:
    headers = (
        b"Connection: Content-Type, Retry-After,x-request-id, content-length, x-gproxyd-provider\r\n"
        b"Connection: X-Foo\r\n"
        b"Retry-After: 5\r\nx-request-id: vendor-1\r\nX-Foo: 1\r\nX-Kept: 2\r\n"
    )
    bench.script = [json_reply(b'{"a":1}', headers=headers)]
    _, reply = bench.forwarded(raw.request(target, chat()))
    for name in ("connection", "content-type", "retry-after", "x-foo"):
        assert reply.headers(name) == [], name
    assert reply.headers("x-kept") == ["2"] and reply.headers("content-length") == ["7"]
    assert len(reply.headers("x-request-id")) == 1 and reply.header("x-request-id") != "vendor-1"
    assert reply.headers("x-gproxyd-provider") == ["openai-main"]
    assert reply.body == b'{"a":1}'


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"127.0.0.1:9",
        b"a.b:4000",
        b"[::1]:1",
        b"169.254.169.254",
        b"h:4000/#@evil",
        b"user@h",
        b"a,b",
        b"",
    ],
)
@pytest.mark.parametrize("target", FORMS)
def test_the_upstream_is_told_its_own_name(bench: Bench, target: str, host: bytes) -> None:
    """`forwarded` compares the Host header with the configured authority. An odd Host may be refused as well."""
    before = len(bench.upstream.requests)
    reply = bench.ask(raw.request(target, chat(), host=host))
    assert reply.status in ((200, 400) if host not in (b"evil.example", b"127.0.0.1:9", b"a.b:4000") else (200,))
    for got in bench.upstream.requests[before:]:
        assert got.header("host") == [bench.authority]


# Credentials.

CLIENT_PLACES = ("Authorization", "x-api-key", "x-goog-api-key", "api-key", "Cookie", "Proxy-Authorization", "?key=")
KEY_PLACES = frozenset({"Authorization", "x-api-key", "x-goog-api-key", "?key="})
SUBSETS = [subset for count in range(len(CLIENT_PLACES) + 1) for subset in itertools.combinations(CLIENT_PLACES, count)]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "none")
def test_wherever_a_key_is_presented_it_stays_here(bench: Bench, subset: tuple[str, ...]) -> None:
    """`forwarded` demands exactly one credential at the upstream: the provider's, in the provider's place."""
    schemes = {"Authorization": "Bearer ", "Proxy-Authorization": "Bearer ", "Cookie": "session="}
    headers = [(name, schemes.get(name, "") + CLIENT_KEY) for name in subset if name != "?key="]
    query = f"?a=1&key={CLIENT_KEY}" if "?key=" in subset else "?a=1"
    turn = SUBSETS.index(subset) % len(PLACES)
    for provider in (list(PLACES)[turn], list(PLACES)[turn - 1]):
        data = raw.request(f"/proxy/{provider}/v1x{query}", chat(), key=None, headers=headers)
        if not KEY_PLACES & set(subset):
            bench.refused(data, 401, "unauthorized", dialect=None)
            continue
        got, _ = bench.forwarded(data, PLACES[provider])
        assert got.target == b"/v1x?a=1"


BEARER, KEY = ("Authorization", f"Bearer {CLIENT_KEY}"), ("x-api-key", CLIENT_KEY)
GOOG, BAD = ("x-goog-api-key", CLIENT_KEY), "ck-bad-00000000"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([BEARER, BEARER], 400),
        ([BEARER, ("authorization", f"Bearer {BAD}")], 400),
        ([("authorization", "Basic eA=="), BEARER], 400),
        ([KEY, ("X-API-KEY", BAD)], 400),
        ([BEARER, KEY, KEY], 400),
        ([GOOG, GOOG], 400),
        ([("Authorization", f"Bearer {BAD}"), KEY], 401),
        ([("Authorization", "Basic eA=="), KEY], 401),
        ([("Authorization", ""), KEY], 401),
        ([("Authorization", f"Bearer {BAD}, Bearer {CLIENT_KEY}")], 401),
        ([("x-api-key", BAD), GOOG], 401),
        ([("x-api-key", ""), GOOG], 401),
        ([BEARER, ("x-api-key", BAD)], 200),
        ([("x-api-key", BAD), BEARER], 200),
        ([KEY, ("x-goog-api-key", BAD)], 200),
        ([BEARER, KEY, GOOG], 200),
    ],
)
def test_of_several_credentials_the_first_place_decides(
    bench: Bench, headers: list[tuple[str, str]], status: int
) -> None:
    data = raw.request(CHAT, chat(), key=None, headers=headers)
    if status == 200:
        bench.forwarded(data)
    else:
        bench.refused(data, status, {400: "invalid_request", 401: "unauthorized"}[status])


# Who somebody claims to be.

IDENTITY = [
    "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Real-IP", "Forwarded",
    "X-Client-IP", "True-Client-IP", "CF-Connecting-IP", "X-User", "OpenAI-Organization", "OpenAI-Project",
    "x-gproxyd-provider", "x-gproxyd-user", "x-gproxy-key", "X-Gproxyd-Anything", "X-Request-Id",
]  # fmt: skip


@pytest.mark.parametrize("name", IDENTITY)
@pytest.mark.parametrize("target", FORMS)
def test_a_claimed_identity_is_not_passed_on(bench: Bench, target: str, name: str) -> None:
    got, reply = bench.forwarded(raw.request(target, chat(), headers=[(name, "10.9.8.7"), (name.lower(), "x")]))
    assert got.header(name) == []
    assert reply.header("x-request-id") not in ("10.9.8.7", "x")
    line = bench.gateway.request(reply.header("x-request-id") or "")
    assert (line["client"], line["key"], line["provider"]) == ("127.0.0.1", "tester/main", "openai-main")


@pytest.mark.parametrize("vendors", ["", "vendor-7.x_Y", "a" * 64, "a" * 65, "bad id", "b\xe4d", '"{}%s'])
def test_a_request_id_is_the_gateways_own(bench: Bench, vendors: str) -> None:
    line = b"x-request-id: " + vendors.encode("latin-1") + b"\r\n" if vendors else b""
    bench.script = [json_reply(b"{}", headers=line)]
    ids = set()
    for _ in range(3):
        _, reply = bench.forwarded(raw.request(CHAT, chat(), headers=[("X-Request-Id", "mine")]))
        ids.update(reply.headers("x-request-id"))
        told = reply.headers("x-gproxyd-upstream-request-id")
        assert told == ([vendors] if vendors in ("vendor-7.x_Y", "a" * 64) else [])
    assert len(ids) == 3 and not ids & {"mine", vendors}


@pytest.mark.parametrize(
    ("name", "value", "client"),
    [
        ("X-Forwarded-For", "203.0.113.9", "203.0.113.9"),
        ("X-Forwarded-For", "203.0.113.1, 203.0.113.9, 127.0.0.2", "203.0.113.9"),
        ("X-Real-IP", "2001:db8::9", "2001:db8::9"),
        ("X-Forwarded-For", "unknown", "127.0.0.1"),
        ("X-Forwarded-For", "203.0.113.9\\n evil", "127.0.0.1"),
        ("Forwarded", "for=203.0.113.9", "127.0.0.1"),
    ],
)
def test_a_trusted_proxy_is_believed_and_its_word_goes_no_further(
    bench: Bench, trusting: Bench, name: str, value: str, client: str
) -> None:
    got, reply = trusting.forwarded(raw.request(CHAT, chat(), headers=[(name, value)]))
    assert got.header(name) == []
    assert trusting.gateway.request(reply.header("x-request-id") or "")["client"] == client


@pytest.fixture(scope="module")
def trusting(loop: Loop) -> Bench:
    return Bench(
        loop, CONFIG.replace('listen: ["127.0.0.1:0"]', 'listen: ["127.0.0.1:0"], trusted_proxies: ["127.0.0.0/8"]')
    )


UNDERSCORED = [
    "x_api_key",
    "X_API_KEY",
    "content_length",
    "transfer_encoding",
    "Content_Type",
    "x_forwarded_for",
    "a_b",
]


@pytest.mark.parametrize("name", UNDERSCORED)
@pytest.mark.parametrize("target", FORMS)
def test_a_name_with_an_underscore_is_nobodys_alias(bench: Bench, target: str, name: str) -> None:
    got, _ = bench.forwarded(raw.request(target, chat(), headers=[(name, "1")]))
    assert got.header(name) == []
    assert got.header("content-length") == [b"%d" % len(got.body)]
    bench.refused(raw.request(target, chat(), key=None, headers=[(name, CLIENT_KEY)]), 401, "unauthorized")


# Lines that the gateway makes.

ODD_MODELS = [
    "m\r\nset-cookie: a=b", "m\n", "\r\n\r\nHTTP/1.1 200 OK", "m\0", "m\x7f", "m\x1b[31m", "m\u00e9", "\u6a21\u578b",
    "m\u2028", "\U0001f600", "m" * 10_000, "%0d%0a", "%s{}", "m b", "", "../m",
]  # fmt: skip


@pytest.mark.parametrize("model", ODD_MODELS, ids=lambda model: ascii(model)[:24])
def test_an_odd_model_on_a_raw_path_breaks_no_header(bench: Bench, model: str) -> None:
    """A raw body is the client's own business; what the gateway says about it must stay one clean line."""
    for target in (f"/proxy/openai-main{CHAT}", "/proxy/openai-main/anything"):
        data = raw.request(target, chat(model))
        got, reply = bench.forwarded(data)
        assert got.body == data.partition(b"\r\n\r\n")[2]
        assert reply.headers("set-cookie") == [] and reply.data.count(b"HTTP/1.1") == 1
        for told in reply.headers("x-gproxyd-model"):
            assert told.isascii() and told.isprintable() and len(told) < 1000
        assert reply.body == b'{"object":"demo","model":"m"}'


@pytest.mark.parametrize("model", ODD_MODELS, ids=lambda model: ascii(model)[:24])
@pytest.mark.parametrize("prefix", ["", "/openai-main"])
def test_an_odd_model_is_refused_elsewhere(bench: Bench, prefix: str, model: str) -> None:
    for dialect, path in ENDPOINTS.items():
        provider = prefix.replace("openai", "anthropic") if dialect == "anthropic" else prefix
        before = len(bench.upstream.requests)
        reply = bench.ask(raw.request(provider + path, chat(model)))
        if prefix and reply.status == 200:  # scoped: any name that can be a model's goes through
            assert model.isascii() and model.isprintable() and " " not in model
        else:
            check_error(reply, 400, _code(reply.json), dialect)
            assert bench.upstream.requests[before:] == []
        assert reply.headers("set-cookie") == [] and reply.data.count(b"HTTP/1.1") == 1


def _code(body: dict[str, dict[str, str]]) -> str:
    return body["error"]["message"].partition(":")[0]


@pytest.mark.parametrize("home", ["nope", "nope\xe9", "../openai-main", "openai-main ,x", "OPENAI-MAIN", ""])
def test_an_odd_home_is_refused(bench: Bench, home: str) -> None:
    bench.refused(raw.request("/v1/files", headers=[("x-gproxyd-provider", home)]), 404, "unknown_provider")


@pytest.mark.parametrize("target", FORMS)
def test_bytes_beyond_ascii_pass_in_header_values(bench: Bench, target: str) -> None:
    odd = bytes(range(0x80, 0x100))
    bench.script = [json_reply(b"{}", headers=b"X-Odd: a" + odd + b"b\r\nX-Empty:\r\nX-Tab: a\tb\r\n")]
    got, reply = bench.forwarded(
        raw.request(target, chat(), headers=[(b"X-Odd", b"a" + odd + b"b"), (b"User-Agent", odd)])
    )
    assert got.header("x-odd") == [b"a" + odd + b"b"] and got.header("user-agent") == [odd]
    assert reply.headers("x-odd") == [b"a".decode() + odd.decode("latin-1") + "b"]
    assert reply.headers("x-empty") == [""] and reply.headers("x-tab") == ["a\tb"]


def test_a_cookie_of_one_callers_answer_reaches_nobody(bench: Bench) -> None:
    cookies = b"Set-Cookie: session=of-the-first; Path=/\r\nSet-Cookie: b=2\r\nSet-Cookie2: c=3\r\n"
    bench.script = [json_reply(b"{}", headers=cookies)]
    for target in FORMS:
        for key in (CLIENT_KEY, OTHER_KEY, CLIENT_KEY):
            got, reply = bench.forwarded(raw.request(target, chat(), key=key))
            assert got.header("cookie") == []
            assert reply.headers("set-cookie") == []


@pytest.mark.parametrize(
    ("target", "asked", "told"),
    [
        (CHAT, None, [b"identity"]),
        (CHAT, "gzip, br", [b"identity"]),
        (f"/openai-main{CHAT}", "gzip", [b"identity"]),
        ("/v1/chat/completions?x", "zstd", [b"identity"]),
        ("/proxy/openai-main/anything", None, []),
        ("/proxy/openai-main/anything", "gzip;q=0.5, br", [b"gzip;q=0.5, br"]),
        ("/proxy/openai-main/anything", "identity", [b"identity"]),
        ("/v1/files/a/content", None, []),
        ("/v1/files/a/content", "gzip", [b"gzip"]),
    ],
)
def test_the_upstream_may_compress_only_for_whom_it_helps(
    bench: Bench, target: str, asked: str | None, told: list[bytes]
) -> None:
    headers = [] if asked is None else [("Accept-Encoding", asked)]
    got, reply = bench.forwarded(raw.request(target, None if "files" in target else chat(), headers=headers))
    assert got.header("accept-encoding") == told
    assert reply.header("content-encoding") is None


@pytest.mark.parametrize("target", FORMS)
def test_nothing_is_added_to_what_the_client_says(bench: Bench, target: str) -> None:
    data = raw.request(target, chat(), headers=[("Content-Type", "application/json")])
    got, _ = bench.forwarded(data)
    names = [name.lower() for name, _ in got.headers]
    assert sorted(set(names) - {b"accept-encoding"}) == [b"authorization", b"content-length", b"content-type", b"host"]
    assert len(names) == len(set(names))


# More that lists must not lose.


@pytest.mark.parametrize("target", FORMS)
def test_unknown_lines_pass_in_their_order(bench: Bench, target: str) -> None:
    sent = [
        ("anthropic-beta", "a-2025-01-01"), ("Anthropic-Beta", "b"), ("x-claude-code-session", "s"),
        ("openai-beta", "r=1"), ("Idempotency-Key", "k"), ("X-Stainless-Lang", "python"), ("x-b", "2"),
        ("x-a", "1"), ("x-b", "1"), ("User-Agent", "u"),
    ]  # fmt: skip
    got, _ = bench.forwarded(raw.request(target, chat(), headers=sent))
    expected = [(name.encode(), value.encode()) for name, value in sent]
    assert [pair for pair in got.headers if pair in expected] == expected


@pytest.mark.parametrize("target", FORMS)
def test_the_vendors_own_lines_pass_in_their_order(bench: Bench, target: str) -> None:
    lines = (
        "Retry-After: 7\r\nx-should-retry: true\r\nanthropic-ratelimit-requests-limit: 5\r\nLink: <a>\r\n"
        "Warning: 199 a\r\nLink: <b>\r\nx-ratelimit-remaining-tokens: 3\r\nlink: <c>\r\nopenai-processing-ms: 12\r\n"
    )  # fmt: skip
    body = b'{"error": {"message" : "slow \\u0064own"} }\n'
    bench.script = [json_reply(body, status=b"429 Slow", headers=lines.encode())]
    _, reply = bench.forwarded(raw.request(target, chat()), status=429)
    assert reply.body == body
    assert reply.headers("link") == ["<a>", "<b>", "<c>"]
    for line in lines.splitlines():
        assert line.encode() in reply.head.split(b"\r\n"), line


@pytest.mark.parametrize(
    "name",
    [
        "Strict-Transport-Security", "Alt-Svc", "Clear-Site-Data", "Public-Key-Pins", "Refresh", "Server", "Via",
        "OpenAI-Organization", "openai-project", "anthropic-organization-id", "cf-ray", "x-gproxyd-provider",
        "x-gproxyd-model", "x-gproxyd-attempts", "server-timing",
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", FORMS)
def test_what_a_vendor_says_of_itself_is_not_repeated(bench: Bench, target: str, name: str) -> None:
    bench.script = [json_reply(b"{}", headers=f"{name}: vendors-own\r\n".encode())]
    _, reply = bench.forwarded(raw.request(target, chat()))
    assert b"vendors-own" not in reply.data


@pytest.mark.parametrize("target", FORMS)
def test_no_content_type_is_invented(bench: Bench, target: str) -> None:
    bench.script = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"]
    _, reply = bench.forwarded(raw.request(target, chat()))
    assert reply.headers("content-type") == [] and reply.body == b"ok"


@pytest.mark.parametrize("target", FORMS)
def test_large_honest_heads_pass(bench: Bench, target: str) -> None:
    policy = "script-src " + "a" * 20_000
    many = "".join(f"x-many-{at}: {at}\r\n" for at in range(200))
    bench.script = [json_reply(b"{}", headers=f"Content-Security-Policy: {policy}\r\n{many}".encode())]
    _, reply = bench.forwarded(raw.request(target, chat()))
    assert reply.header("content-security-policy") == policy
    assert reply.header("x-many-199") == "199"


INTEGRITY = ["Digest", "Content-Digest", "Repr-Digest", "Content-MD5", "Signature", "Signature-Input"]


@pytest.mark.parametrize("name", [*INTEGRITY, "ETag"])
def test_a_checksum_goes_with_the_bytes_it_was_made_of(bench: Bench, name: str) -> None:
    bench.script = [json_reply(b'{"model":"m"}', headers=f"{name}: sum\r\n".encode())]
    for target, model, rewritten in (
        (CHAT, "openai-main/m", True),
        (CHAT, "chat-default", True),
        (f"/openai-main{CHAT}", "chat-default", True),
        (f"/openai-main{CHAT}", "m", False),
        (f"/proxy/openai-main{CHAT}", "m", False),
    ):
        got, reply = bench.forwarded(raw.request(target, chat(model), headers=[(name, "sum")]))
        assert reply.headers(name) == ([] if rewritten else ["sum"]), (target, model)
        assert got.header(name) == ([] if rewritten and name != "ETag" else [b"sum"]), (target, model)
        assert reply.json["model"] == (model if rewritten else "m")


@pytest.mark.parametrize("model", ["openai-main/m", "chat-default", "openai-main/" + "m" * 200])
@pytest.mark.parametrize("chunked", [False, True])
def test_lengths_are_true_after_a_rewrite(bench: Bench, model: str, chunked: bool) -> None:
    data = orjson.dumps(chat(model))
    headers = [("Content-Type", "application/json")]
    if chunked:
        headers.append(("Transfer-Encoding", "chunked"))
        data = b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
    got, reply = bench.forwarded(raw.request(CHAT, data, headers=headers))
    assert got.header("content-length") == [b"%d" % len(got.body)] and got.header("transfer-encoding") == []
    assert reply.headers("content-length") == [str(len(reply.body))]
    assert reply.json == {"object": "demo", "model": model}


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip", "br", "zstd", "deflate", "foo", "identity, gzip"])
def test_a_compressed_body_whose_model_must_be_read_is_refused(bench: Bench, coding: str) -> None:
    for dialect, path in ENDPOINTS.items():
        data = raw.request(path, chat(), headers=[("Content-Encoding", coding)])
        bench.refused(data, 415, "unsupported_media_type", dialect)
    got, _ = bench.forwarded(
        raw.request("/proxy/openai-main/anything", b"\x1f\x8bxx", headers=[("Content-Encoding", coding)])
    )
    assert (got.header("content-encoding"), got.body) == ([coding.encode()], b"\x1f\x8bxx")
