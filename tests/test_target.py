"""The request target: what leaves for an upstream stays under its provider, in the client's own octets."""

from __future__ import annotations

import posixpath
import re
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gproxyd.errors import Refusal
from gproxyd.wire.target import MODEL_NAME, RESERVED, Target, has_dot_segment, parse
from tests.support.streams import law

ROOTS = ["", "/v1", "/base/v1beta"]

WORDS = """
/ / / v1 v1beta proxy p admin healthz . .. %2e %2E%2e .%2e %252e %252e%252e %2f %2F %5c \\ %252f ; ;x ..;a // ? & =
key=K KEY=K k%65y=K %6b%65%79=K provider=p x=%2F + %20 %00 %0d%0a %zz % # @ : :80 http:// HTTPS://h models %c0%ae %ff
chat/completions :generateContent * \xe9 a=b;key=K;c
"""
TOKENS = st.sampled_from([*WORDS.split(), "\0", "\x7f", " ", "\t", "\r\n"]).map(lambda token: token.encode("latin-1"))
TARGETS = st.one_of(
    st.lists(TOKENS, max_size=14).map(b"".join),
    st.lists(TOKENS, max_size=12).map(lambda tokens: b"/" + b"".join(tokens)),
    st.tuples(
        st.sampled_from([b"/v1/", b"/p/v1/", b"/proxy/p/", b"/v1beta/models/"]),
        st.lists(TOKENS, max_size=8).map(b"".join),
    ).map(b"".join),
    st.binary(max_size=30),
)


def readings(path: bytes) -> set[str]:
    """What the path may come to mean on its way: decoded up to twice, parameters dropped, back-slashes turned."""
    found = set()
    for _ in range(3):
        for text in (path, path.replace(b"\\", b"/")):
            found.add(text.decode("latin-1"))
            found.add(re.sub(rb";[^/]*", b"", text).decode("latin-1"))
        path = unquote_to_bytes(path)
    return found


@law(1000)
@given(TARGETS)
@example(b"/proxy/p/%252e%2e/%2e%252e/x")
@example(b"/p/v1/..;a=b/%2e%2e;/x")
@example(b"/v1/a%5c..%5c..%5cx")
@example(b"/proxy/p")
@example(b"http://h/v1/models")
def test_whatever_comes_it_is_refused_or_stays_under_its_provider(raw: bytes) -> None:
    try:
        target = parse(raw, b"h")
    except Refusal as refusal:  # what else it may raise fails the test
        assert (refusal.status, refusal.code, refusal.close) == (400, "invalid_request", True)  # noqa: PT017
        return
    origin = raw if raw.startswith(b"/") else b"/" + raw.split(b"/", 3)[3]
    path, _, query = origin.partition(b"?")
    assert target.path == path
    assert path.endswith(target.version + target.rest if target.form != "raw" else target.rest)
    assert re.fullmatch(rb"[!-~]*", path)
    assert not re.search(rb"[#\\]", path)
    if target.form != "local":
        assert_under_root(target)
    if target.form == "scoped":
        assert target.provider is not None
        assert target.provider not in RESERVED
        assert path == b"/%b%b%b" % (target.provider.encode(), target.version, target.rest)
    elif target.form == "raw":
        assert target.provider
        assert path == b"/proxy/%b%b" % (target.provider.encode(), target.rest)
    else:
        assert target.provider is None
        assert path == target.version + target.rest
    if target.provider is not None:
        assert "/" not in unquote_to_bytes(unquote_to_bytes(target.provider)).decode("latin-1")
    assert_query(target, query)


def assert_under_root(target: Target) -> None:
    for root in ROOTS:
        for meant in readings(target.rest):
            whole = posixpath.normpath("/" + (root + meant).lstrip("/"))
            assert whole == (root or "/") or whole.startswith(root + "/"), (root, meant)


def assert_query(target: Target, query: bytes) -> None:
    """Less the gateway's own, the parameters are the same, in their order and spelling."""
    own = {b"key", b"provider"} if target.form == "aggregated" else {b"key"}

    def is_own(piece: bytes) -> bool:
        name = unquote_to_bytes(piece.partition(b"=")[0])
        return name.lower() == b"key" or name in own

    left = re.split(rb"[&;]", target.query)
    foreign = [piece for piece in re.split(rb"[&;]", query) if not is_own(piece)]
    assert left == (foreign or [b""])
    assert len(target.query) <= len(query)
    assert not any(unquote_to_bytes(piece.partition(b"=")[0]).lower() == b"key" for piece in left)


@law(300)
@given(
    st.lists(
        st.sampled_from(
            [b"a", b"..", b".", b"%2e", b"%252e", b"...", b".a", b"/", b"\\", b"%2f", b"%5C", b";", b"%25"]
        ),
        max_size=8,
    )
)
def test_dot_segments_are_seen_as_a_server_may_see_them(tokens: list[bytes]) -> None:
    path = b"/" + b"".join(tokens)
    seen = any(segment in (".", "..") for meant in readings(path) for segment in re.split(r"[/\\]", meant))
    assert has_dot_segment(path) or not seen


# Forms.

FORMS = [
    ("/v1/chat/completions", "aggregated", None, "/v1", "/chat/completions"),
    ("/v1beta/models/m:generateContent", "aggregated", None, "/v1beta", "/models/m:generateContent"),
    ("/v1/", "aggregated", None, "/v1", "/"),
    ("/v1//x", "aggregated", None, "/v1", "//x"),
    ("/v1/files/a%2Fb", "aggregated", None, "/v1", "/files/a%2Fb"),
    ("/v1/a/v1/b", "aggregated", None, "/v1", "/a/v1/b"),
    ("/.well-known/agent-card.json", "aggregated", None, "", "/.well-known/agent-card.json"),
    ("/openai-main/v1/chat/completions", "scoped", "openai-main", "/v1", "/chat/completions"),
    ("/p/v1beta/models", "scoped", "p", "/v1beta", "/models"),
    ("/V1/v1/models", "scoped", "V1", "/v1", "/models"),
    ("/%76%31/v1/models", "scoped", "%76%31", "/v1", "/models"),
    ("/p/v1", "scoped", "p", "/v1", ""),
    ("/proxy/p/v1/chat/completions", "raw", "p", "/v1", "/v1/chat/completions"),
    ("/proxy/p/v1beta/models/m:generateContent", "raw", "p", "/v1beta", "/v1beta/models/m:generateContent"),
    ("/proxy/p/anything/at/all", "raw", "p", "", "/anything/at/all"),
    ("/proxy/p//host.example/x", "raw", "p", "", "//host.example/x"),
    ("/proxy/p/", "raw", "p", "", "/"),
    ("/proxy/p", "raw", "p", "", ""),
    ("/proxy/v1/x", "raw", "v1", "", "/x"),
    ("/proxy/p/v1x/a", "raw", "p", "", "/v1x/a"),
    ("/", "local", None, "", "/"),
    ("/v1", "local", None, "", "/v1"),
    ("/proxy", "local", None, "", "/proxy"),
    ("/healthz", "local", None, "", "/healthz"),
    ("/healthz/", "local", None, "", "/healthz/"),
    ("/admin/users/a", "local", None, "", "/admin/users/a"),
    ("/debug/pprof/heap", "local", None, "", "/debug/pprof/heap"),
    ("/api/v1/models", "local", None, "", "/api/v1/models"),
    ("/.well-known/x", "local", None, "", "/.well-known/x"),
    ("/p/v2/models", "local", None, "", "/p/v2/models"),
    ("/anything", "local", None, "", "/anything"),
    ("/%61dmin/users", "local", None, "", "/%61dmin/users"),
]


@pytest.mark.parametrize(("path", "form", "provider", "version", "rest"), FORMS)
def test_forms(path: str, form: str, provider: str | None, version: str, rest: str) -> None:
    target = parse(path.encode())
    assert (target.form, target.provider) == (form, provider)
    assert (target.version, target.rest, target.path) == (version.encode(), rest.encode(), path.encode())
    assert (target.query, target.keys, target.home) == (b"", (), None)
    assert parse(path.encode() + b"?a=%2F").query == b"a=%2F"


def test_the_reserved_words() -> None:
    words = "v1 v1beta proxy admin console debug healthz readyz statsz metrics .well-known api"
    assert frozenset(words.split()) == RESERVED


@pytest.mark.parametrize("word", sorted(RESERVED))
@pytest.mark.parametrize("rest", ["", "/x/y", "/v1/models", "/v1beta/models/m:generateContent", "/x"])
def test_no_provider_bears_a_reserved_word(word: str, rest: str) -> None:
    assert parse(f"/{word}{rest}".encode()).form in ("local", "aggregated", "raw")
    assert parse(f"/{word}{rest}".encode()).provider != word


REFUSED = [
    "", "*", "v1/models", "@evil/", ":80@evil/", ".evil/", "%40evil", "host:443", "//evil.example/v1/x", "///evil",
    "/\\evil", "\\\\evil", "/v1/../admin", "/v1/./x", "/v1/..;/admin", "/v1/%2e%2e/admin", "/v1/.%2E/x", "/..%2fadmin",
    "/v1/%252e%252e%252fadmin", "/v1/..\\x", "/v1/%5c..%5cx", "/v1/x/..", "/v1/x/.", "/v1/x/%2e", "/.", "/..",
    "/v1/x#frag", "/v1/x?#y", "/v1/x?a b", "/v1/a b", "/v1/\t", "/v1/\x00", "/v1/\x7f", "/v1/\xe9", "/v1/x?\xe9",
    "/v1/x\r\n",
    "/p%2fq/v1/models", "/p%2Fq/v1/models", "/p%5cq/v1/models", "/p%252fq/v1/models", "/p%255cq/v1/models",
    "/proxy/p%2fq/x", "/proxy//x", "/proxy/", "/proxy/%2e%2e/x", "/proxy/p/%2e%2e/x", "/proxy/p/a/..%2f..%2fx",
    "/v1beta/models/../../x:generateContent", "/v1beta/models/a%2F..:generateContent/..", "/v1beta/models/a%2f../b",
]  # fmt: skip


@pytest.mark.parametrize("raw", REFUSED)
def test_refused(raw: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse(raw.encode("latin-1"), b"h")
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    assert "evil" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/v1/...", "/v1/.../x", "/v1/.x", "/v1/x..", "/v1/a%2Eb", "/v1/x;a=..", "/v1/%c0%ae%c0%ae/x", "/v1/%zz/%"]
)
def test_what_only_resembles_a_dot_segment_passes_as_it_is(path: str) -> None:
    assert parse(path.encode()).rest == path[3:].encode()


@pytest.mark.parametrize(
    ("raw", "host"),
    [
        (b"http://127.0.0.1:8787/v1/models?a=b", b"127.0.0.1:8787"),
        (b"HTTP://Gate.Example/v1/models?a=b", b"gate.example"),
        (b"https://gate.example/v1/models?a=b", b"GATE.example"),
    ],
)
def test_an_absolute_target_that_names_this_host_is_its_path(raw: bytes, host: bytes) -> None:
    assert parse(raw, host) == parse(b"/v1/models?a=b")


@pytest.mark.parametrize(
    "raw",
    [
        b"http://evil/v1/models", b"http://h:81/v1/models", b"http://u@h/v1/models", b"http://h@evil/v1/models",
        b"ftp://h/v1",
        b"http://h", b"http://h?a", b"http:///v1/models", b"http:/v1/models", b"//h/v1/models", b"http://h//v1/models",
        b"http://h/v1/../x", b"http://h\\@evil/v1", b"http://h%00/v1",
    ],
)  # fmt: skip
def test_an_absolute_target_that_names_another_is_refused(raw: bytes) -> None:
    for host in (b"h", b""):
        with pytest.raises(Refusal):
            parse(raw, host)


# The query.


@pytest.mark.parametrize(
    ("query", "left", "keys"),
    [
        ("key=CK", "", ("CK",)),
        ("x=1&key=CK&y=2", "x=1&y=2", ("CK",)),
        ("KEY=CK&Key=CK", "", ()),
        ("k%65y=CK", "", ("CK",)),
        ("%6B%45%79=CK", "", ()),
        ("key=a&key=b", "", ("a", "b")),
        ("key", "", ("",)),
        ("key=", "", ("",)),
        ("key=a%20b%2Fc", "", ("a b/c",)),
        ("key=a=b", "", ("a=b",)),
        ("a=1;key=CK", "a=1", ("CK",)),
        (";key=CK;", ";", ("CK",)),
        ("key=CK;a=1&b", "a=1&b", ("CK",)),
        ("keys=1&akey=2&key2=3", "keys=1&akey=2&key2=3", ()),
        (*["a=%2F&b=+&c=%20&d=%zz&e=%C3%BC&&f&=g&h=1?2&i=;&j=[]"] * 2, ()),
        ("alt=sse&key=CK", "alt=sse", ("CK",)),
        ("a=key=CK", "a=key=CK", ()),
        ("a=%26key=CK", "a=%26key=CK", ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/p/v1/models", "/proxy/p/x", "/v1beta/models/m:generateContent"])
def test_the_query_less_the_key(path: str, query: str, left: str, keys: tuple[str, ...]) -> None:
    target = parse(f"{path}?{query}".encode())
    assert (target.query.decode(), tuple(key.decode() for key in target.keys)) == (left, keys)


def test_the_provider_parameter_is_the_gateways_only_where_it_picks_the_home() -> None:
    assert parse(b"/v1/files?provider=p%2D1&limit=2&provider=q").home == "p-1"
    assert parse(b"/v1/files?provider=p&limit=2").query == b"limit=2"
    for path in (b"/p/v1/files", b"/proxy/p/v1/files"):
        target = parse(path + b"?provider=q")
        assert (target.query, target.home) == (b"provider=q", None)


# Models in the path.


@law(300)
@given(
    st.from_regex(MODEL_NAME, fullmatch=True).filter(lambda name: not has_dot_segment(f"/{name}".encode())),
    st.sampled_from(["generateContent", "streamGenerateContent", "countTokens", "embedContent", "batchEmbedContents"]),
    st.sampled_from(["/v1beta", "/v1", "/p/v1beta", "/proxy/p/v1beta"]),
)
def test_a_model_in_the_path_is_taken_as_it_is_spelled(model: str, verb: str, prefix: str) -> None:
    target = parse(f"{prefix}/models/{model}:{verb}?alt=sse&key=K".encode())
    assert target.id == model.encode()
    assert target.methods["POST"].model.startswith("path")
    assert target.rest.endswith(b"/models/" + model.encode() + b":" + verb.encode())
    assert target.query == b"alt=sse"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v1/models/openai-main/gpt-4.1-mini", b"openai-main/gpt-4.1-mini"),
        ("/v1/models/p/accounts/x/models/y@001", b"p/accounts/x/models/y@001"),
        ("/v1/models/a%2Fb", b"a%2Fb"),
        ("/v1beta/models/p/m:v2:generateContent", b"p/m:v2"),
        ("/v1beta/models/p/m", b"p/m"),
        ("/v1/files/file-1/content", b"file-1"),
        ("/v1/files/a%2Fb", b"a%2Fb"),
        ("/v1/responses/resp_1/cancel", b"resp_1"),
        ("/v1/models", None),
        ("/v1/chat/completions", None),
    ],
)
def test_ids(path: str, found: bytes | None) -> None:
    assert parse(path.encode()).id == found


def test_a_remembered_path_keeps_no_query() -> None:
    first = parse(b"/v1/models?key=one&a=1")
    assert parse(b"/v1/models").keys == ()
    assert parse(b"/v1/models?b=2") != first
    assert first.keys == (b"one",)
