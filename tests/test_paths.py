"""Request targets: what is forwarded byte for byte, what is refused, and that only the configuration picks a host."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import aiohappyeyeballs
import pytest

from gproxyd import daemon
from gproxyd.errors import ConfigError, UpstreamError
from gproxyd.routing.providers import Face, split_url
from gproxyd.types import Origin
from gproxyd.upstream.dial import Dialler
from gproxyd.vendors import auth
from gproxyd.vendors.catalogue import AuthPlace
from tests.support import raw
from tests.support.checks import OK, PLACES, PROMPT, Bench, chat, quick_log
from tests.support.running import CLIENT_KEY, Loop
from tests.support.upstream import Upstream

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  openai-main: {{vendor: openai, base_url: "{vendor}", credentials: [provider-key]}}
  anthropic-main: {{vendor: anthropic, base_url: "{vendor}", credentials: [provider-key]}}
  vertex-main: {{vendor: gemini, base_url: "{vendor}", credentials: [provider-key]}}
  deep: {{vendor: openai, base_url: "{vendor}/base", credentials: [provider-key]}}
aliases: {{flash: vertex-main/gemini-1.5-flash}}
endpoints: {{files: openai-main}}
users:
  tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}
  plain: {{role: user, permissions: ["*"], keys: {{main: {{credential: plain-key}}}}}}
"""
PLAIN_KEY = "ck-plain-73c9aa01"
SECRETS = {"provider-key": "pk-test-9a3e5c7d", "client-key": CLIENT_KEY, "plain-key": PLAIN_KEY}


@pytest.fixture(scope="module")
def made(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        yield Bench(loop, CONFIG, SECRETS)


@pytest.fixture
def bench(made: Bench) -> Bench:
    made.reset()
    return made


@pytest.fixture(scope="module")
def sink(loop: Loop) -> Upstream:
    """A listener that nobody may ever call."""
    return Upstream(loop, [OK]).start()


@pytest.fixture(autouse=True)
def _nobody_called(sink: Upstream) -> Iterator[None]:
    yield
    assert sink.connections == 0


# What is forwarded as it came.

LITERAL = [
    ("/v1/files/a%2Fb", "/v1/files/a%2Fb"),
    ("/v1/files/a%2fb", "/v1/files/a%2fb"),
    ("/v1/files/%61%7E~%2B+", "/v1/files/%61%7E~%2B+"),
    ("/openai-main/v1/files/a%2Fb%3f", "/v1/files/a%2Fb%3f"),
    ("/openai-main/v1/anything/new/%41?x=%41", "/v1/anything/new/%41?x=%41"),
    ("/proxy/openai-main/a%2Fb/%2f/", "/a%2Fb/%2f/"),
    ("/proxy/openai-main/v1/files/a%2fb", "/v1/files/a%2fb"),
    ("/proxy/openai-main/", "/"),
    ("/proxy/openai-main/a//b///", "/a//b///"),
    ("/proxy/openai-main/a;b=c,d:e@f!$&'()*=", "/a;b=c,d:e@f!$&'()*="),
    # Lookalikes of dot segments.
    ("/proxy/openai-main/a..b/.../.hidden/x..;y/..z", "/a..b/.../.hidden/x..;y/..z"),
    # Nothing is decoded on the way, however deep.
    ("/proxy/openai-main/x%252e%252e%252fy", "/x%252e%252e%252fy"),
    ("/proxy/openai-main/%25%32%46", "/%25%32%46"),
    ("/proxy/openai-main/%25252e%25252e/x", "/%25252e%25252e/x"),
    ("/v1/files/%25%32%46", "/v1/files/%25%32%46"),
    # Percent-encoded controls stay percent-encoded.
    ("/v1/files/a%00b", "/v1/files/a%00b"),
    ("/v1/files/a%0d%0aX-Evil:%20y", "/v1/files/a%0d%0aX-Evil:%20y"),
    ("/v1/files/%c0%af%c0%ae", "/v1/files/%c0%af%c0%ae"),
    ("/proxy/openai-main/%00%0d%0aX-Evil:%20y?q=%0d%0aX-Evil:%20y", "/%00%0d%0aX-Evil:%20y?q=%0d%0aX-Evil:%20y"),
    ("/proxy/openai-main/%ff%zz%", "/%ff%zz%"),
    # A network path is a path.
    ("/proxy/openai-main//evil.example/v1/x", "//evil.example/v1/x"),
    ("/proxy/openai-main/@evil.example/", "/@evil.example/"),
    ("/proxy/openai-main/http://evil.example/", "/http://evil.example/"),
    # The query is the client's, too, be it empty.
    ("/proxy/openai-main/x?", "/x?"),
    ("/proxy/openai-main/x?a?b/../c", "/x?a?b/../c"),
]


@pytest.mark.parametrize(("target", "expected"), LITERAL)
def test_the_target_is_forwarded_byte_for_byte(bench: Bench, target: str, expected: str) -> None:
    got, _ = bench.forwarded(raw.request(target))
    assert got.target == expected.encode()
    assert got.header("x-evil") == []


QUERY = b"a=%2F&b=+&c=%20&d=%zz&e=%C3%BC&&f&=g&h=1?2&i=;&j=[]"


@pytest.mark.parametrize(
    ("prefix", "upstream", "method", "place"),
    [
        (b"/v1/files", b"/v1/files", "GET", "authorization"),
        (b"/openai-main/v1/files", b"/v1/files", "GET", "authorization"),
        (b"/proxy/openai-main/q", b"/q", "GET", "authorization"),
        (b"/deep/v1/files", b"/base/v1/files", "GET", "authorization"),
        (
            b"/v1beta/models/vertex-main/g-1:countTokens",
            b"/v1beta/models/g-1:countTokens",
            "POST",
            "x-goog-api-key",
        ),
        (b"/v1beta/models/flash:countTokens", b"/v1beta/models/gemini-1.5-flash:countTokens", "POST", "x-goog-api-key"),
    ],
)
def test_the_query_is_forwarded_byte_for_byte(
    bench: Bench, prefix: bytes, upstream: bytes, method: str, place: str
) -> None:
    body = b"{}" if method == "POST" else None
    got, _ = bench.forwarded(raw.request(prefix + b"?" + QUERY, body, method=method), place)
    assert got.target == upstream + b"?" + QUERY
    got, _ = bench.forwarded(
        raw.request(prefix + b"?" + QUERY + b"&key=" + CLIENT_KEY.encode(), body, method=method), place
    )
    assert got.target == upstream + b"?" + QUERY


# The client's own key in the query.

ENCODED_KEY = "".join(f"%{byte:02x}" for byte in CLIENT_KEY.encode())
BY_QUERY = [
    ("?key=CK", ""),
    ("?x=1&key=CK&y=2", "?x=1&y=2"),
    ("?key=CK&x=%2F", "?x=%2F"),
    ("?x=1&key=CK&&y=%zz", "?x=1&&y=%zz"),
    ("?k%65y=CK", ""),
    ("?%6B%65%79=CK&z", "?z"),
    ("?a=1;key=CK", "?a=1"),
    ("?a=1;key=CK;b=2", "?a=1;b=2"),
    ("?key=CK;b=2", "?b=2"),
    (f"?key={ENCODED_KEY}&a", "?a"),
]


@pytest.mark.parametrize(("query", "left"), BY_QUERY)
@pytest.mark.parametrize(("prefix", "upstream"), [("/v1/files", "/v1/files"), ("/proxy/openai-main/x", "/x")])
def test_a_key_in_the_query_admits_and_is_taken_out(
    bench: Bench, prefix: str, upstream: str, query: str, left: str
) -> None:
    got, _ = bench.forwarded(raw.request(prefix + query.replace("CK", CLIENT_KEY), key=None))
    assert got.target == (upstream + left).encode()


@pytest.mark.parametrize(
    ("query", "left"),
    [
        *BY_QUERY,
        ("?KEY=CK&a", "?a"),
        ("?a&Key=CK&kEY=CK", "?a"),
        ("?%4bEY=CK", ""),
        ("?a=1&key=CK&key=CK", "?a=1"),
        ("?key=other&b&key=CK", "?b"),
        ("?a=1&key", "?a=1"),
        ("?key=", ""),
        ("?keys=1&monkey=2&key2=3&x=key&key%20=4", "?keys=1&monkey=2&key2=3&x=key&key%20=4"),
    ],
)
def test_keys_beside_a_header_are_taken_out_all_the_same(bench: Bench, query: str, left: str) -> None:
    got, _ = bench.forwarded(raw.request("/proxy/openai-main/x" + query.replace("CK", CLIENT_KEY)))
    assert got.target == ("/x" + left).encode()


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("?KEY=CK", 401, "unauthorized"),
        ("?key=", 401, "unauthorized"),
        ("?key", 401, "unauthorized"),
        ("?key=CKx", 401, "unauthorized"),
        ("?keys=CK", 401, "unauthorized"),
        ("?k%2565y=CK", 401, "unauthorized"),
        ("?key=CK&key=CK", 400, "invalid_request"),
        ("?key=CK&k%65y=CK", 400, "invalid_request"),
        ("?key=bad&a;key=CK", 400, "invalid_request"),
    ],
)
def test_what_is_no_key_in_the_query(bench: Bench, query: str, status: int, code: str) -> None:
    bench.refused(raw.request("/v1/files" + query.replace("CK", CLIENT_KEY), key=None), status, code)


# What is refused.

DOTS = [
    b"/v1/../admin", b"/v1/./x", b"/v1/..", b"/v1/.", b"/.", b"/..", b"/../v1/models", b"/v1/..;/admin",
    b"/v1/..;a=b/admin", b"/v1/%2e%2e/admin", b"/v1/%2E%2e/admin", b"/v1/.%2e/admin", b"/v1/%2e/x", b"/..%2fadmin",
    b"/v1/..%2Fadmin", b"/v1/..%5cadmin", b"/v1/%2e%2e%2fadmin", b"/v1/%252e%252e/admin", b"/v1/%252e%252e%252fadmin",
    b"/v1/x%252f..%252fadmin", b"/v1/%25%32%65%252e/admin", b"/openai-main/v1/../../admin",
    b"/openai-main/v1/files/%2e%2e/x", b"/proxy/openai-main/..", b"/proxy/openai-main/../anthropic-main/v1/x",
    b"/proxy/openai-main/%2e%2e/anthropic-main/x", b"/proxy/openai-main/a/..;x/b", b"/proxy/../admin",
    b"/proxy/%2e%2e/admin", b"/proxy/deep/../x", b"/proxy/deep/..%2f..%2fx", b"/deep/v1/..%255c../x",
    b"/v1beta/models/../../x:generateContent", b"/v1beta/models/a%2F..%2Fb:generateContent",
]  # fmt: skip


@pytest.mark.parametrize("target", DOTS)
def test_a_dot_segment_is_refused(bench: Bench, target: bytes) -> None:
    for method in ("GET", "POST"):
        bench.refused(raw.request(target, method=method), 400, "invalid_request", dialect=None)


@pytest.mark.parametrize(
    "target",
    [
        b"\\..\\", b"\\\\evil", b"/\\evil", b"/v1\\admin", b"/v1/files/a\\b", b"//evil.example/v1/x", b"///evil",
        b"//evil.example/v1/chat/completions", b"//", b"/proxy//evil.example/x", b"/proxy//v1/x",
        b"@evil/", b":80@evil/", b".evil/", b"%40evil", b"evil", b"evil:80", b"v1/models", b"?key=x", b"*",
        b"http://evil.example/v1/models", b"HTTP://evil.example/v1/models", b"https://evil.example:443/v1/models",
        b"http://gateway.test@evil.example/v1/models", b"http://gateway.test:80@evil.example/v1/models",
        b"http://evil.example@gateway.test/v1/models", b"http://gateway.test", b"http:///v1/models",
        b"http:gateway.test/v1/models", b"file:///etc/passwd", b"ftp://gateway.test/v1/models",
        b"/v1/models#frag", b"/v1/models?#y", b"/v1/models?x=1#", b"/#/v1/models", b"/v1/files/a#?key=x",
        b"/proxy/openai-main/x#y", b"/proxy/openai-main%2fv1/x", b"/proxy/openai-main%5Cx/y", b"/open%2Fai/v1/x",
        b"/proxy/openai%252fmain/x", b"/openai-main%25%32%46/v1/x",
    ],
)  # fmt: skip
def test_a_target_that_can_be_read_in_two_ways_is_refused(bench: Bench, target: bytes) -> None:
    reply = bench.refused(raw.request(target), 400, "invalid_request", dialect=None)
    assert reply.header("connection") == "close"


@pytest.mark.parametrize(
    "target",
    [
        b"/@evil", b"/@evil.example/v1/models", b"/%40evil/v1/models", b"/proxy/openai-main@evil/x", b"/v1//evil/x",
        b"/proxy/openai-main:80@evil/x", b"/proxy/openai%2dmain/x", b"/proxy/openai-main%00/x",
        b"/OPENAI-MAIN/v1/files", b"/proxy/OpenAI-main/x", b"/%6fpenai-main/v1/files",
        b"/V1/models", b"/%761/models", b"/v1%2Fmodels",
        b"/Proxy/openai-main/x", b"/evil.example:443/v1/models", b"/openai-main", b"/proxy", b"/proxy/openai-mainx/x",
        b"/openai-main/v2/x", b"/openai-main/", b"/v1", b"/v1/",
    ],
)  # fmt: skip
def test_a_segment_that_names_nothing_leads_nowhere(bench: Bench, target: bytes) -> None:
    before = len(bench.upstream.requests)
    reply = bench.ask(raw.request(target))
    assert reply.status == 404, reply.data
    assert reply.json["error"]["code"] in {"not_found", "unknown_provider"}
    assert bench.upstream.requests[before:] == []


def test_an_absolute_target_that_names_this_host_is_its_path(bench: Bench) -> None:
    assert bench.ask(raw.request(b"http://gateway.test/v1/models")).status == 200
    got, _ = bench.forwarded(raw.request(b"HTTP://Gateway.Test/v1/files/a%2Fb?x=%2F"))
    assert got.target == b"/v1/files/a%2Fb?x=%2F"


@pytest.mark.parametrize("userinfo", [CLIENT_KEY, f"user:{CLIENT_KEY}"])
def test_a_key_in_the_authority_is_not_logged(bench: Bench, userinfo: str) -> None:
    bench.refused(raw.request(f"http://{userinfo}@gateway.test/v1/models", key=None), 400, "invalid_request")


@pytest.mark.parametrize("where", [b"/v1/files/x%by", b"/v1/files?x%by", b"/proxy/openai-main/x%by", b"/x%by"])
def test_a_byte_that_must_be_percent_encoded_is_refused(bench: Bench, where: bytes) -> None:
    for byte in (*range(0x21), *range(0x7F, 0x100)):
        before = len(bench.upstream.requests)
        reply = raw.send(bench.gateway.port, raw.request(where % bytes([byte])))
        assert reply.status == 400, (byte, reply.data)
        assert reply.header("connection") == "close"
        assert bench.upstream.requests[before:] == [], byte
    time.sleep(2.1)  # a second tells of so many broken requests only, and the last of them is looked for in the log
    bench.refused(raw.request(where % b"\xc3\xbc"), 400, "invalid_request")


# One reading of a path for the route, the key and the log.

ADMIN_SPELLINGS = [
    "/admin/keys", "/%61dmin/keys", "/%2561dmin/keys", "/ADMIN/keys", "/Admin/keys", "/aDmIn/keys", "/admin/KEYS",
    "/admin/", "/admin", "/admin;x", "/admin;x/keys", "/admin;/keys", "/admin/keys;", "/admin/keys;x=y", "/admin/keys/",
    "/admin//keys", "/admin/keys//", "/admin%2Fkeys", "/admin%2fkeys", "/admin%252Fkeys", "/admin%5Ckeys",
    "/admin\\keys", "//admin/keys", "///admin/keys", "/./admin/keys", "/admin/./keys", "/admin/../admin/keys",
    "/v1/../admin/keys", "/v1/%2e%2e/admin/keys", "/v1/..%2fadmin/keys", "/v1/..;/admin/keys", "/v1/admin/keys",
    "/v1beta/../admin/keys", "/proxy/admin/keys", "/proxy/../admin/keys", "/openai-main/../admin/keys",
    "/openai-main/admin/keys", "/proxy/openai-main/../../admin/keys", "/admin%20/keys", "/admin%00/keys",
    "/admin%09/keys", "/admin./keys", "/admin.json", "/admin/keys?", "/admin/keys?x=/../", "/%EF%BD%81dmin/keys",
    "/adm%69n/keys",
    "/admin/%6beys", "/healthz/../admin/keys", "/healthz/admin/keys", "admin/keys", "/admin/keys#x",
    "http://127.0.0.1:9/admin/keys",
]  # fmt: skip


@pytest.mark.parametrize("spelling", ADMIN_SPELLINGS)
def test_every_spelling_of_an_admin_path_is_read_once(bench: Bench, spelling: str) -> None:
    """Whoever asks, the path means the same; without a key nothing is told; nothing of it goes upstream."""
    before = len(bench.upstream.requests)
    replies = {key: bench.ask(raw.request(spelling, key=key)) for key in (None, PLAIN_KEY, CLIENT_KEY)}
    statuses = {key: reply.status for key, reply in replies.items()}
    assert bench.upstream.requests[before:] == []
    if statuses[None] == 400:  # cannot be read, so nobody was even looked up
        assert set(statuses.values()) == {400}
        return
    assert statuses[None] == 401
    assert statuses[PLAIN_KEY] in {403, 404}
    assert statuses[CLIENT_KEY] == 404  # there is no such endpoint, and no spelling reaches another one
    for reply in replies.values():
        line = bench.gateway.request(reply.header("x-request-id") or "")
        assert line["path"] == spelling.partition("?")[0]
        assert line.get("provider") is None


@pytest.mark.parametrize("spelling", ["/healthz/", "/%68ealthz", "/HEALTHZ", "/healthz;x", "/healthz/x", "/readyz/"])
def test_only_the_exact_health_paths_need_no_key(bench: Bench, spelling: str) -> None:
    bench.refused(raw.request(spelling, key=None), 401, "unauthorized")


# Nothing that a client says picks a host.


@pytest.mark.parametrize(
    "name",
    [
        "x-portkey-custom-host", "X-Forwarded-Host", "X-Forwarded-Server", "X-Original-URL", "X-Rewrite-URL",
        "X-Upstream", "X-Host", "X-HTTP-Host-Override", "X-Base-Url", "x-gproxyd-base-url", "api-base", "Forwarded",
        "Referer", "Origin",
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/openai-main/v1/chat/completions", "/proxy/openai-main/x"])
def test_a_header_picks_no_destination(bench: Bench, sink: Upstream, name: str, target: str) -> None:
    value = f"host=127.0.0.1:{sink.port}" if name == "Forwarded" else f"http://127.0.0.1:{sink.port}/v1"
    got, _ = bench.forwarded(raw.request(target, chat(), headers=[(name, value)]))
    assert got.target == ("/x" if target.startswith("/proxy") else "/v1/chat/completions").encode()


def test_the_host_header_picks_no_destination(bench: Bench, sink: Upstream) -> None:
    got, _ = bench.forwarded(raw.request("/v1/files", host=b"127.0.0.1:%d" % sink.port))
    assert got.target == b"/v1/files"


@pytest.mark.parametrize(
    "member",
    [
        "api_base",
        "base_url",
        "endpoint",
        "api_endpoint",
        "custom_host",
        "webhook",
        "webhook_url",
        "proxy",
        "host",
        "url",
    ],
)
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/openai-main/v1/chat/completions", "/proxy/openai-main/x"])
def test_a_member_of_the_body_picks_no_destination(bench: Bench, sink: Upstream, member: str, target: str) -> None:
    url = f"http://127.0.0.1:{sink.port}/v1"
    image = {"type": "image_url", "image_url": {"url": url}}
    body = chat(**{member: url, "extra_body": {member: url}, "input": [image]})
    got, _ = bench.forwarded(raw.request(target, body))
    assert url.encode() in got.body


# Redirects.

STATUSES = (301, 302, 303, 307, 308)
LOCATIONS = {
    "metadata": "Location: http://169.254.169.254/latest\r\n",
    "elsewhere": "Location: http://127.0.0.1:SINK/v1/x\r\n",
    "plain text": "Location: http://HOST/v1/x\r\n",
    "file": "Location: file:///etc/passwd\r\n",
    "relative": "Location: ../x?y\r\n",
    "network path": "Location: //127.0.0.1:SINK/\r\n",
    "missing": "",
    "twice": "Location: /a\r\nLocation: http://127.0.0.1:SINK/\r\n",
    "refresh": "Refresh: 0; url=http://127.0.0.1:SINK/\r\n",
}


@pytest.mark.parametrize(("status", "location"), [*itertools.product(STATUSES, LOCATIONS)])
def test_a_redirect_is_never_followed(bench: Bench, sink: Upstream, status: int, location: str) -> None:
    lines = LOCATIONS[location].replace("SINK", str(sink.port)).replace("HOST", bench.authority.decode()).encode()
    bench.script = [b"HTTP/1.1 %d Moved\r\n%bContent-Length: 5\r\n\r\nmoved" % (status, lines)]
    before = len(bench.upstream.requests)
    for target in ("/v1/chat/completions", "/openai-main/v1/chat/completions"):
        reply = bench.ask(raw.request(target, chat()))
        assert reply.status == 502 and reply.json["error"]["code"] == "upstream_error", reply.data
        assert reply.header("location") is None
        assert str(sink.port).encode() not in reply.data
    reply = bench.ask(raw.request("/proxy/openai-main/v1/x", chat()))
    assert (reply.status, reply.body) == (status, b"moved")
    told = [line.partition(": ")[2] for line in lines.decode().splitlines() if line.startswith("Location")]
    assert reply.headers("location") == told
    assert len(bench.upstream.requests) == before + 3


# The model in the path.


@pytest.mark.parametrize(
    "target",
    [
        "/v1beta/models/a%2F..:generateContent", "/v1beta/models/vertex-main/..:generateContent",
        "/v1beta/models/vertex-main/a%2Fb:generateContent", "/v1beta/models/vertex-main/a%3Falt=:generateContent",
        "/v1beta/models/vertex-main/a%20b:generateContent", "/v1beta/models/vertex-main/a%00:generateContent",
        "/v1beta/models/vertex-main/%0d%0a:generateContent", "/v1beta/models/vertex-main/a%23:generateContent",
        "/v1beta/models/vertex-main/:generateContent", "/v1beta/models/vertex-main/a//../b:generateContent",
        "/v1beta/models//vertex-main/a:generateContent", "/v1beta/models/%76ertex-main/a:generateContent",
        "/v1beta/models/vertex-main%2Fa:generateContent", "/vertex-main/v1beta/models/a%2Fb:generateContent",
        "/vertex-main/v1beta/models/a%3Fx:countTokens", "/vertex-main/v1beta/models/%2e%2e:countTokens",
        "/v1beta/models/a;b:generateContent", "/v1beta/models/vertex-main/" + "a" * 300 + ":generateContent",
        "/v1beta/models/vertex-main/-a'b:generateContent", "/v1beta/models/vertex-main/%E6%A8%A1:generateContent",
    ],
)  # fmt: skip
def test_a_model_in_the_path_that_no_model_is_called(bench: Bench, target: str) -> None:
    reply = bench.ask(raw.request(target, {"contents": []}))
    assert reply.status == 400, reply.data
    assert reply.json["error"]["status"] == "INVALID_ARGUMENT"


def test_a_query_does_not_stand_in_for_a_verb(bench: Bench) -> None:
    bench.refused(raw.request("/v1beta/models/a?alt=:generateContent", {}), 405, "method_not_allowed", "gemini")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/v1beta/models/vertex-main/gemini-x:generateContent", "/v1beta/models/gemini-x:generateContent"),
        ("/v1beta/models/vertex-main/tuned/a:b@001:countTokens", "/v1beta/models/tuned/a:b@001:countTokens"),
        ("/v1beta/models/flash:streamGenerateContent?a=b", "/v1beta/models/gemini-1.5-flash:streamGenerateContent?a=b"),
        ("/v1/models/vertex-main/g:generateContent", "/v1beta/models/g:generateContent"),
        ("/vertex-main/v1beta/models/g:embedContent", "/v1beta/models/g:embedContent"),
        ("/vertex-main/v1beta/models/flash:embedContent", "/v1beta/models/gemini-1.5-flash:embedContent"),
        ("/proxy/vertex-main/v1beta/models/g:embedContent", "/v1beta/models/g:embedContent"),
        ("/proxy/vertex-main/v1beta/models/flash:embedContent", "/v1beta/models/gemini-1.5-flash:embedContent"),
        ("/proxy/vertex-main/v1beta/models/a%2Fb:embedContent", "/v1beta/models/a%2Fb:embedContent"),
    ],
)  # fmt: skip
def test_the_model_in_the_path_is_replaced_alone(bench: Bench, target: str, expected: str) -> None:
    got, _ = bench.forwarded(raw.request(target, {"contents": [{"parts": [{"text": PROMPT}]}]}), "x-goog-api-key")
    assert got.target == expected.encode()


# Where a base URL and a path meet.

JOINS = [
    ("openai", "", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai", "/", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai", "/v1", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai", "/v1/", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai", "/base", "/v1/chat/completions", "/base/v1/chat/completions"),
    ("openai", "/base/", "/v1/files/a%2Fb?x=%2F", "/base/v1/files/a%2Fb?x=%2F"),
    ("openai", "/base/v1", "/v1/chat/completions", "/base/v1/chat/completions"),
    ("openai", "/base/v1/", "/v1/anything", "/base/v1/anything"),
    ("openai", "/a/b//", "/v1/chat/completions", "/a/b/v1/chat/completions"),
    ("openai", "/v1x/y", "/v1/chat/completions", "/v1x/y/v1/chat/completions"),
    ("openai", "/a%2Fb", "/v1/chat/completions", "/a%2Fb/v1/chat/completions"),
    ("openai", "/api/paas/v4", "/v1/chat/completions", "/api/paas/v4/chat/completions"),
    ("anthropic", "", "/v1/messages", "/v1/messages"),
    ("anthropic", "/v1", "/v1/messages", "/v1/messages"),
    ("gemini", "", "/v1beta/models/g:countTokens", "/v1beta/models/g:countTokens"),
    ("gemini", "/v1beta", "/v1beta/models/g:countTokens", "/v1beta/models/g:countTokens"),
    ("gemini", "/base/v1beta/", "/v1beta/models/g:countTokens", "/base/v1beta/models/g:countTokens"),
    ("gemini", "", "/v1/chat/completions", "/v1beta/openai/chat/completions"),
    ("groq", "/openai", "/v1/chat/completions", "/openai/v1/chat/completions"),
    ("groq", "/openai/v1", "/v1/chat/completions", "/openai/v1/chat/completions"),
    ("deepseek", "", "/v1/messages", "/anthropic/v1/messages"),
    ("openai_chat", "", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai_chat", "/", "/v1/embeddings", "/v1/embeddings"),
    ("openai_chat", "/v1", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai_chat", "/v1/", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai_chat", "/base", "/v1/chat/completions", "/base/v1/chat/completions"),
    ("openai_chat", "/base/", "/v1/unknown/thing", "/base/v1/unknown/thing"),
    ("openai_chat", "/api/paas/v4", "/v1/chat/completions", "/api/paas/v4/chat/completions"),
    ("openai_chat", "/api/v1beta2", "/v1/chat/completions", "/api/v1beta2/chat/completions"),
    ("openai_responses", "/x", "/v1/responses", "/x/v1/responses"),
    ("anthropic-face", "/anthropic", "/v1/messages", "/anthropic/v1/messages"),
    ("anthropic-face", "/anthropic/v1", "/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"),
    ("gemini-face", "", "/v1beta/models/g:countTokens", "/v1beta/models/g:countTokens"),
    ("gemini-face", "/g", "/v1beta/models/g:countTokens", "/g/v1beta/models/g:countTokens"),
    ("gemini-face", "/v1", "/v1beta/models/g:countTokens", "/v1/models/g:countTokens"),
]
RAW_JOINS = [
    ("openai", "", "/v1/x", "/v1/x"),
    ("openai", "/v1", "/v1/x", "/v1/x"),
    ("openai", "/base/v1/", "/v1/x", "/base/v1/x"),
    ("openai", "/base", "/any/thing?x", "/base/any/thing?x"),
    ("openai_chat", "/base", "/any", "/base/any"),
    ("openai_chat", "/v1", "/v1/models", "/v1/models"),
    ("openai_chat", "/api/paas/v4", "/v4/chat/completions", "/api/paas/v4/chat/completions"),
]


def _provider(kind: str, url: str) -> str:
    if kind.endswith("-face") or "_" in kind:
        return (
            f'{{vendor: custom, auth: bearer, dialects: {{{kind.removesuffix("-face")}: "{url}"}}, credentials: [k]}}'
        )
    return f'{{vendor: {kind}, auth: bearer, base_url: "{url}", credentials: [k]}}'


def _joining(loop: Loop, host: str) -> Bench:
    rows = [*JOINS, *RAW_JOINS]
    providers = "".join(f"  p{at}: {_provider(kind, '@' + path)}\n" for at, (kind, path, *_) in enumerate(rows))
    providers = providers.replace("{", "{{").replace("}", "}}").replace("@", "{vendor}")
    config = (
        f'server: {{{{listen: ["127.0.0.1:0"]}}}}\nproviders:\n{providers}'
        "users: {{t: {{role: admin, keys: {{k: {{credential: c}}}}}}}}\n"
    )
    return Bench(loop, config, {"k": "pk-test-9a3e5c7d", "c": CLIENT_KEY}, host=host)


@pytest.fixture(scope="module")
def joining(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        yield _joining(loop, "127.0.0.1")


@pytest.fixture(scope="module")
def joining_v6(loop: Loop) -> Bench:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    return _joining(loop, "::1")


@pytest.mark.parametrize(
    ("at", "form", "path", "expected"),
    [
        *((at, "", path, expected) for at, (_, _, path, expected) in enumerate(JOINS)),
        *((at, "/proxy", path, expected) for at, (_, _, path, expected) in enumerate(RAW_JOINS, start=len(JOINS))),
    ],
    ids=[f"{kind}{path}{'-raw' if at >= len(JOINS) else ''}-{target.partition('?')[0]}"
         for at, (kind, path, target, _) in enumerate([*JOINS, *RAW_JOINS])],
)  # fmt: skip
def test_a_base_url_and_a_path_meet(joining: Bench, at: int, form: str, path: str, expected: str) -> None:
    body = None if "/files" in path else chat("some-model")
    got, _ = joining.forwarded(raw.request(f"{form}/p{at}{path}", body))
    assert got.target == expected.encode()


@pytest.mark.parametrize("at", [0, 4, JOINS.index(("openai_chat", "/base", *JOINS[25][2:]))])
def test_an_upstream_at_an_ipv6_literal(joining_v6: Bench, at: int) -> None:
    """The Host header has brackets and the port; `forwarded` compares it with the URL's authority."""
    got, _ = joining_v6.forwarded(raw.request(f"/p{at}/v1/chat/completions", chat("some-model")))
    assert got.target == JOINS[at][3].encode()
    assert got.header("host") == [b"[::1]:%d" % joining_v6.upstream.port]


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("https://[::1]:8443/base", Origin("https", "::1", 8443), "/base"),
        ("https://[2001:db8::1]", Origin("https", "2001:db8::1", 443), ""),
        ("http://h:8080/v1/", Origin("http", "h", 8080), "/v1"),
    ],
)
def test_a_url_taken_apart(url: str, origin: Origin, path: str) -> None:
    assert split_url(url) == (origin, path)
    assert str(origin) == url.removesuffix("/").removesuffix(path)


# Configured hosts.


def _loaded(folder: Path, url: str) -> list[str]:
    path = folder / "gproxyd.yaml"
    path.write_text(f'providers: {{p: {{vendor: openai, base_url: "{url}", auth: none}}}}\n')
    try:
        daemon.load(path, {"GPROXYD_SECRETS_DIR": str(folder)})
    except ConfigError as error:
        return [problem.key for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "169.254.0.1", "[fe80::1]", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]",
        "[fd00:ec2::254]", "100.100.100.200", "metadata.google.internal", "metadata.goog", "METADATA.google.internal.",
        "2130706433", "2852039166", "127.1", "0x7f.1", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "0.0.0.0", "[::]",
        "224.0.0.1", "[ff02::1]", "127.0.0.1@evil.example", "user:pass@127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536",
        "127.0.0.1:+80", "", "[::1", "::1", "[::1]x", "[fe80::1%25eth0]", "127.0.0.1?x=y", "127.0.0.1#x",
        "127.0.0.1/a/../b", "127.0.0.1/%2e%2e/b", "exa mple", "例え.example",
         "127。0。0。1", "①②⑦.0.0.1", "evil.example\\\\@127.0.0.1",
    ],
)  # fmt: skip
def test_a_host_that_is_odd_or_never_an_upstream_is_refused_at_load(tmp_path: Path, host: str) -> None:
    assert _loaded(tmp_path, f"http://{host}") == ["providers.p.base_url"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "10.0.0.7", "192.168.1.1", "[::1]:8443", "[fd00::1]", "localhost", "vllm_1:80"],
)
def test_a_private_host_that_is_written_plainly_is_meant(tmp_path: Path, host: str) -> None:
    assert _loaded(tmp_path, f"http://{host}/base") == []


# Names that resolve to what no name should have.


class Resolving:
    """A loop whose names resolve to what a test says, one answer after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answers: list[list[str]]) -> None:
        self._loop = loop
        self.answers = answers
        self.asked = 0
        self.clock = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def time(self) -> float:
        return self._loop.time() + self.clock

    def getaddrinfo(self, host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in answer
        ]


def _dialled(
    monkeypatch: pytest.MonkeyPatch, loop: Loop, answers: list[list[str]], *, count: int = 1, step: float = 0.0
) -> list[object]:
    """What `count` connections to a name would have dialled: addresses, or the reason why none. Nothing is dialled."""
    resolving = Resolving(loop.loop, answers)
    outcomes: list[object] = []

    async def refuse(infos: list[tuple[Any, ...]], **_: object) -> socket.socket:
        outcomes.append([info[4][0] for info in infos])
        raise OSError

    async def dial() -> None:
        dialler = Dialler(resolving, resolve=resolving.getaddrinfo)  # type: ignore[arg-type]
        for _ in range(count):
            with pytest.raises(UpstreamError) as caught:
                await dialler.dial(Origin("http", "rebinding.test", 80), None, 2.0)
            if caught.value.reason != "connect":
                outcomes.append(caught.value.reason)
            resolving.clock += step

    monkeypatch.setattr(aiohappyeyeballs, "start_connection", refuse)
    loop.run(dial())
    return outcomes


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%lo", "::ffff:169.254.169.254", "0.0.0.0", "::",
        "224.0.0.1", "ff02::1", "fd00:ec2::254", "100.100.100.200", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::",
    ],
)  # fmt: skip
def test_a_name_that_resolves_to_what_is_never_an_upstream_is_not_dialled(
    monkeypatch: pytest.MonkeyPatch, loop: Loop, address: str
) -> None:
    assert _dialled(monkeypatch, loop, [[address]]) == ["dns"]


def test_of_several_addresses_only_the_usable_are_dialled(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    answers = [["169.254.169.254", "127.0.0.1", "fe80::1", "10.0.0.7"]]
    assert _dialled(monkeypatch, loop, answers) == [["127.0.0.1", "10.0.0.7"]]


def test_a_name_that_changes_its_mind_is_looked_at_every_time(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    answers = [["127.0.0.1"], ["169.254.169.254"], ["127.0.0.1"]]
    outcomes = _dialled(monkeypatch, loop, answers, count=3, step=3600)
    assert outcomes == [["127.0.0.1"], "dns", ["127.0.0.1"]]


# The guard on the way out.

HOME = Origin("https", "api.vendor.test", 443)


@pytest.mark.parametrize("place", get_args(AuthPlace))
@pytest.mark.parametrize(
    "elsewhere",
    [
        Origin("https", "evil.example", 443),
        Origin("http", "api.vendor.test", 443),
        Origin("https", "api.vendor.test", 8443),
        Origin("https", "api.vendor.test.evil.example", 443),
        Origin("https", "API.vendor.test", 443),
        Origin("https", "api.vendor.test@evil.example", 443),
    ],
)
def test_a_key_is_attached_for_its_own_origins_only(place: AuthPlace, elsewhere: Origin) -> None:
    line = auth.attach(place, "pk", HOME, {HOME})
    bearer = b"Authorization: Bearer pk\r\n"
    told = {"none": b"", "bearer": bearer, "service-account": bearer}
    told["bearer+x-goog-api-key"] = bearer + b"x-goog-api-key: pk\r\n"
    assert line == told.get(place, place.encode() + b": pk\r\n")
    with pytest.raises(auth.ForeignOrigin) as caught:
        auth.attach(place, "pk", elsewhere, {HOME})
    assert "pk" not in str(caught.value).split()
    with pytest.raises(auth.ForeignOrigin):
        auth.attach(place, "pk", HOME, ())


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("form", ["", "/proxy"])
def test_a_bug_in_the_join_does_not_send_a_key_elsewhere(
    loop: Loop, bench: Bench, sink: Upstream, name: str, form: str
) -> None:
    """The faces lead to a stranger, as a bad join would; the provider's own origins stay what they are."""
    gateway = bench.gateway.daemon.gateway
    good = gateway.snapshot
    provider = good.providers[name]
    stranger = Origin("http", "127.0.0.1", sink.port)
    faces = {dialect: Face(stranger, face.root, face.auth) for dialect, face in provider.faces.items()}
    bad = replace(provider, faces=faces, raw=Face(stranger, provider.raw.root, provider.raw.auth))
    gateway.snapshot = replace(good, providers={**good.providers, name: bad})
    version = "v1beta" if name == "vertex-main" else "v1"
    try:
        bench.refused(raw.request(f"{form}/{name}/{version}/x", chat()), 500, "internal_error", dialect=None)
    finally:
        gateway.snapshot = good
    assert any(line["event"] == "bug" and line["error"] == "ForeignOrigin" for line in bench.gateway.log())
