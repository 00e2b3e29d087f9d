"""Request bodies: what is refused, what passes byte for byte, and what forms may look like."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import orjson
import pytest

from gproxyd.gateway import intake
from tests.support import raw
from tests.support.benches import roomy, roomy_made
from tests.support.checks import ENDPOINTS, PROMPT, Bench, chat, check_error, quick_log
from tests.support.running import CONFIG, Loop
from tests.support.upstream import Got, json_reply

__all__ = ["roomy", "roomy_made"]

CHAT = "/v1/chat/completions"
MIB = 1024 * 1024
JSON = [("Content-Type", "application/json")]
CHUNKED = [*JSON, ("Transfer-Encoding", "chunked")]
PREFIXES = {"aggregated": "", "scoped": "/openai-main", "raw": "/proxy/openai-main"}


@pytest.fixture(scope="module")
def made(loop: Loop) -> Iterator[Bench]:
    limits = 'listen: ["127.0.0.1:0"], max_body: 1MiB, max_upload: 4MiB'
    with quick_log():
        yield Bench(loop, CONFIG.replace('listen: ["127.0.0.1:0"]', limits))


@pytest.fixture
def bench(made: Bench) -> Bench:
    """A gateway that takes 1 MiB of JSON and 4 MiB of anything else."""
    made.reset()
    return made


def posted(target: str, body: bytes) -> bytes:
    return raw.request(target, body, headers=JSON)


def in_chunks(body: bytes, size: int = 4096) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def with_model(text: str | bytes) -> bytes:
    """A chat body with more members, given as JSON text."""
    data = text.encode() if isinstance(text, str) else text
    return b'{"model":"openai-main/m","messages":[{"role":"user","content":"%b"}],%b}' % (PROMPT.encode(), data)


# What is no JSON object is refused, in every dialect.

NESTED = 100_000
NOT_JSON = {
    "nested arrays": b"[" * NESTED,
    "nested arrays, closed": b"[" * NESTED + b"]" * NESTED,
    "nested objects": b'{"a":' * NESTED + b"1" + b"}" * NESTED,
    "nested beside a model": b'{"model":"openai-main/m","messages":' + b"[" * NESTED + b"]" * NESTED + b"}",
    "NaN": with_model('"temperature":NaN'),
    "Infinity": with_model('"max_tokens":Infinity'),
    "minus infinity": with_model('"max_tokens":-Infinity'),
    "leading zero": with_model('"max_tokens":01'),
    "plus": with_model('"max_tokens":+1'),
    "hexadecimal": with_model('"max_tokens":0x10'),
    "bare point": with_model('"max_tokens":1.'),
    "invalid UTF-8": with_model(b'"user":"\xff"'),
    "overlong UTF-8": with_model(b'"user":"\xc0\xaf"'),
    "a surrogate in UTF-8": with_model(b'"user":"\xed\xa0\x80"'),
    "cut UTF-8": with_model(b'"user":"\xf0\x9f\x98"'),
    "a byte order mark": b"\xef\xbb\xbf" + with_model('"n":1'),
    "UTF-16": with_model('"n":1').decode().encode("utf-16"),
    "UTF-16 without a mark": with_model('"n":1').decode().encode("utf-16-le"),
    "UTF-32": with_model('"n":1').decode().encode("utf-32"),
    "a raw line end in a string": with_model(b'"user":"a\nb"'),
    "a raw NUL in a string": with_model(b'"user":"a\0b"'),
    "empty": b"",
    "null": b"null",
    "true": b"true",
    "a number": b"1",
    "an array": b"[]",
    "an array with an object": b'[{"model":"openai-main/m"}]',
    "a string": b'"x"',
    "white space": b" \r\n\t ",
    "two objects": b'{"model":"openai-main/m"}{}',
    "two lines": b'{"model":"openai-main/m"}\n{"model":"openai-main/n"}',
    "something behind": b'{"model":"openai-main/m"}x',
    "a NUL behind": b'{"model":"openai-main/m"}\0',
    "a comment": b'{"model":"openai-main/m"/* x */}',
    "a line comment": b'{"model":"openai-main/m"} // x',
    "a comma too many": b'{"model":"openai-main/m",}',
    "single quotes": b"{'model':'openai-main/m'}",
    "no quotes": b"{model:1}",
    "cut short": b'{"model":"openai-main/m"',
    "a form": b"model=openai-main/m&n=1",
    "garbage": bytes(range(256)),
}


@pytest.mark.parametrize("name", NOT_JSON)
@pytest.mark.parametrize("dialect", ENDPOINTS)
def test_what_is_no_json_object_is_refused(bench: Bench, dialect: str, name: str) -> None:
    shape = "anthropic" if dialect == "anthropic" else "openai_chat"
    before = time.monotonic()
    bench.refused(posted(ENDPOINTS[dialect], NOT_JSON[name]), 400, "invalid_request", shape)
    bench.refused(posted("/openai-main" + CHAT, NOT_JSON[name]), 400, "invalid_request")
    assert time.monotonic() - before < 1


@pytest.mark.parametrize("name", ["nested arrays", "invalid UTF-8", "empty", "an array", "two objects", "garbage"])
def test_a_raw_body_is_the_clients_own_business(bench: Bench, name: str) -> None:
    for target in (f"/proxy/openai-main{CHAT}", "/proxy/openai-main/anything"):
        got, _ = bench.forwarded(posted(target, NOT_JSON[name]))
        assert got.body == NOT_JSON[name]


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", "*/*",
     "application/octet-stream", "text/json", "json"],
)  # fmt: skip
@pytest.mark.parametrize("dialect", ENDPOINTS)
def test_what_does_not_call_itself_json_is_refused(bench: Bench, dialect: str, kind: str) -> None:
    data = raw.request(ENDPOINTS[dialect], chat(), headers=[("Content-Type", kind)])
    bench.refused(data, 415, "unsupported_media_type", "anthropic" if dialect == "anthropic" else "openai_chat")


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;x",
        "application/vnd.x+json",
    ],
)
def test_what_calls_itself_json(bench: Bench, kind: str) -> None:
    got, _ = bench.forwarded(raw.request(CHAT, chat(), headers=[("Content-Type", kind)]))
    assert got.header("content-type") == [kind.encode()]


def test_a_body_without_a_type_is_taken_for_json(bench: Bench) -> None:
    got, _ = bench.forwarded(raw.request(CHAT, b'{"model":"openai-main/m"}'))
    assert (got.body, got.header("content-type")) == (b'{"model":"m"}', [])


# Values that readers disagree on pass as they are, or are refused; never are they reckoned with.

ODD_VALUES = [
    "-0", "-0.0", "1e999", "-1e999", "1e-999", "1E+2", "1000000000000000000", "-1", "9007199254740993", "1.0", "true",
    '"5"', "null", "[]", "{}", "0.1e1", "18446744073709551616", "9" * 5000, "0." + "1" * 5000, "1e" + "9" * 20,
]  # fmt: skip


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: value[:20])
@pytest.mark.parametrize("member", ["max_tokens", "temperature", "n", "stream"])
def test_an_odd_number_passes_as_it_is_or_is_refused(bench: Bench, member: str, value: str) -> None:
    before = len(bench.upstream.requests)
    body = with_model(f'"{member}":{value}')
    reply = bench.ask(posted(CHAT, body))
    if reply.status == 400:
        check_error(reply, 400, "invalid_request")
        assert bench.upstream.requests[before:] == []
    else:
        assert reply.status == 200, reply.data
        (got,) = bench.upstream.requests[before:]
        asked = b"{" + ASKED + b"," if (member, value) == ("stream", "true") else b"{"
        assert got.body == asked + body.replace(b"openai-main/m", b"m").removeprefix(b"{")


@pytest.mark.parametrize("text", [r"\ud800", r"\udc00x", r"\udfff\ud800", r"\ud800A", r"\uD83D"])
@pytest.mark.parametrize(
    "place", ['"model":"openai-main/%s"', '"model":"openai-main/m","user":"%s"', '"%s":1,"model":"openai-main/m"']
)
def test_half_a_surrogate_pair_breaks_nothing(bench: Bench, place: str, text: str) -> None:
    for prefix in PREFIXES.values():
        for path in ENDPOINTS.values():
            reply = bench.ask(posted(prefix + path, b"{%b}" % (place % text).encode()))
            assert reply.status in ((200,) if prefix.startswith("/proxy") else (200, 400)), reply.data


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\u0000\u001f\u007f", r"\u2028\u2029", r"\b\f\n\r\t\/\\\""])
def test_escapes_pass_as_they_are(bench: Bench, text: str) -> None:
    body = with_model(f'"user":"{text}"')
    got, _ = bench.forwarded(posted(CHAT, body))
    assert got.body == body.replace(b"openai-main/m", b"m")


# Which member is the model.

TWICE = [
    '{"model":"openai-main/a","model":"openai-main/b"}',
    '{"model":"openai-main/a","model":"openai-main/a"}',
    r'{"mod\u0065l":"openai-main/a","model":"openai-main/b"}',
    r'{"model":"openai-main/a","mod\u0065l":"openai-main/b"}',
    r'{"\u006d\u006F\u0064\u0065\u006c":"openai-main/a","messages":[],"model":"openai-main/b"}',
    r'{"mode\u006C":"openai-main/a","m\u006fdel":"openai-main/b"}',
    '{"model":"openai-main/a","messages":[{"model":"x"}],"model":"openai-main/b"}',
    '{"model":null,"model":"openai-main/b"}',
    '{"model":"openai-main/b","model":{"a":1}}',
    '{"model" : "openai-main/a" ,\n "model"\t:"openai-main/b"}',
]


@pytest.mark.parametrize("text", TWICE)
@pytest.mark.parametrize("prefix", ["", "/openai-main"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/responses"])
def test_two_models_are_refused(bench: Bench, path: str, prefix: str, text: str) -> None:
    bench.refused(posted(prefix + path, text.encode()), 400, "invalid_request")


def test_two_models_are_refused_for_other_dialects(bench: Bench) -> None:
    for text in TWICE:
        bench.refused(posted("/v1/messages", text.encode()), 400, "invalid_request", "anthropic")


def test_two_models_of_which_a_raw_body_means_an_alias_are_refused(bench: Bench) -> None:
    for first, second in (("x", "chat-default"), ("chat-default", "chat-default")):
        body = f'{{"model":"{first}","model":"{second}"}}'.encode()
        bench.refused(posted(f"/proxy/openai-main{CHAT}", body), 400, "invalid_request")


DECOYS = [
    ('{"metadata":{"model":"x/y"},"model":"%s"}', "behind a member"),
    ('{"model":"%s","metadata":{"model":"x/y"}}', "in front of a member"),
    (
        '{"messages":[{"model":"x/y","content":"\\"model\\":\\"z\\""}],"model":"%s","tools":[{"model":{"model":1}}]}',
        "in a list",
    ),
    ('{"a":"{\\"model\\":\\"x\\"}","model":"%s","b":["model","model"],"c":"model"}', "in a string"),
    ('{"a":{"b":{"c":[[{"model":"x"}]]}},"model":"%s"}', "deep"),
    ('{"Model":"x","MODEL":"y","model ":"z"," model":"w","model":"%s","models":["q"]}', "almost"),
    ('{"model\\u0000":"x","model":"%s","model.":1}', "with a tail"),
    ('{"\\"model":"x","model":"%s","model\\"":"y"}', "with a quote"),
    (r'{"x":"\\","mod\u0065l":"%s","y":"\\\""}', "escaped"),
    ('{"x":"model","model"  \n:\t "%s"\r\n}', "spaced"),
]


@pytest.mark.parametrize(("text", "why"), DECOYS, ids=[why for _, why in DECOYS])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/responses"])
def test_only_the_models_own_place_counts(bench: Bench, path: str, text: str, why: str) -> None:
    for prefix, name, upstream in (
        ("", "openai-main/gpt-x", "gpt-x"),
        ("", "chat-default", "gpt-4.1-mini"),
        ("/openai-main", "chat-default", "gpt-4.1-mini"),
        ("/openai-main", "gpt-x", "gpt-x"),
        ("/proxy/openai-main", "chat-default", "gpt-4.1-mini"),
        ("/proxy/openai-main", "gpt-x", "gpt-x"),
    ):
        got, _ = bench.forwarded(posted(prefix + path, (text % name).encode()))
        assert got.body == (text % upstream).encode(), prefix


@pytest.mark.parametrize("size", [5 * MIB, 40_000])
def test_a_model_behind_much_else(roomy: Bench, size: int) -> None:
    filler = b'model\\":' * (size // 8)
    body = b'{"messages":[{"role":"user","content":"%b","model":"no"}],"model":"openai-main/m"}' % filler
    got, _ = roomy.forwarded(posted(CHAT, body))
    assert got.body == body.replace(b"openai-main/m", b"m")
    assert got.header("content-length") == [b"%d" % len(got.body)]


NO_MODELS = [
    None, 1, 1.5, True, False, [], {}, ["openai-main/m"], {"id": "openai-main/m"}, "", " ", "m" * 10_240, "a\r\nb",
    "a\0b", "../", "openai-main/../x", "openai-main/..", "openai-main/.", "./m", "\U0001f600", "a b", "/", "//", "-m",
    "openai-main/\U0001f600", "openai-main/m\u200b", " openai-main/m", "openai-main/m ", "openai-main/\uff4d",
    "openai-main/%2e%2e/x", "openai-main/a?b", "openai-main/a#b", "openai-main/a\\b", "openai-main/a;b",
    "openai-main/${x}", "openai-main/<m>",
]  # fmt: skip


@pytest.mark.parametrize("model", NO_MODELS, ids=lambda model: ascii(model)[:30])
@pytest.mark.parametrize("dialect", ENDPOINTS)
def test_what_no_model_is_called_is_refused(bench: Bench, dialect: str, model: object) -> None:
    """The log is safe as well: `refused` reads its lines as JSON."""
    shape = "anthropic" if dialect == "anthropic" else "openai_chat"
    before = len(bench.upstream.requests)
    reply = bench.ask(posted(ENDPOINTS[dialect], orjson.dumps(chat(model))))
    assert reply.status == 400, reply.data
    label = reply.json["error"]["message"].partition(":")[0]
    assert label in {"invalid_request", "provider_prefix"}
    check_error(reply, 400, label, shape)
    assert bench.upstream.requests[before:] == []


@pytest.mark.parametrize("model", ["", "a b", None, 1, "\U0001f600", "../x", "a\r\nb", "m" * 300])
def test_what_no_model_is_called_is_refused_in_the_scoped_form(bench: Bench, model: object) -> None:
    bench.refused(posted("/openai-main" + CHAT, orjson.dumps(chat(model))), 400, "invalid_request")


def test_no_model_at_all(bench: Bench) -> None:
    for dialect, path in ENDPOINTS.items():
        shape = "anthropic" if dialect == "anthropic" else "openai_chat"
        reply = bench.ask(posted(path, b'{"messages":[]}'))
        assert reply.status == 400
        check_error(reply, 400, reply.json["error"]["message"].partition(":")[0], shape)


# One field replaced, every other byte kept.

NASTY = (
    b'\n{ "z" : 9007199254740993,\t"a":1.0, "b":1, "e":1E+2,"f":-0.0 ,'
    b'"s":"\\/\\u00e9\xc3\xa9\\u0041\\ud83d\\ude00\x7f",'
    b'\r\n"metadata":{"model":"decoy","model":"decoy"},"messages":[ {"model":"decoy",'
    b'"role":"user","content":"\\"model\\":\\"x\\""} ],'
    b'"a":2,"model" :  "%b"  , "n":18446744073709551616,"":null,"stream":false,"arr":[1.10,[],{ }],'
    b'"k\\u0065y":"\\b"}  \r\n\r\n'
)
NASTY_REPLY = (
    b' {"id":"a\\/b","model" : "gpt-x","n":9007199254740993,"f":1.0,"g":1.10,"choices":[{"model":"gpt-x",'
    b'"t":"\\"model\\":1"}],"u":"\\u00e9\xc3\xa9", "usage":{"model":"gpt-x"},"z":null}\n\n'
)


@pytest.mark.parametrize(
    ("target", "name", "upstream", "shown"),
    [
        ("/v1/chat/completions", "openai-main/gpt-x", "gpt-x", "openai-main/gpt-x"),
        ("/v1/chat/completions", "chat-default", "gpt-4.1-mini", "chat-default"),
        ("/v1/chat/completions", "openai-main/chat-default", "gpt-4.1-mini", "openai-main/chat-default"),
        ("/openai-main/v1/chat/completions", "gpt-x", "gpt-x", "gpt-x"),
        ("/openai-main/v1/chat/completions", "chat-default", "gpt-4.1-mini", "chat-default"),
        ("/openai-main/v1/chat/completions", "smart", "smart", "gpt-x"),
        ("/proxy/openai-main/v1/chat/completions", "gpt-x", "gpt-x", "gpt-x"),
        ("/proxy/openai-main/v1/chat/completions", "chat-default", "gpt-4.1-mini", "chat-default"),
        ("/proxy/openai-main/anything", "gpt-x", "gpt-x", "gpt-x"),
        ("/proxy/openai-main/anything", "openai-main/gpt-x", "openai-main/gpt-x", "gpt-x"),
        ("/v1/embeddings", "openai-main/gpt-x", "gpt-x", "openai-main/gpt-x"),
        ("/v1/responses", "chat-default", "gpt-4.1-mini", "chat-default"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_every_other_byte_is_kept(
    bench: Bench, target: str, name: str, upstream: str, shown: str, chunked: bool
) -> None:
    bench.script = [json_reply(NASTY_REPLY)]
    body = NASTY % name.encode()
    data = raw.request(target, in_chunks(body, 7), headers=CHUNKED) if chunked else posted(target, body)
    got, reply = bench.forwarded(data)
    assert got.body == NASTY % upstream.encode()
    assert reply.body == NASTY_REPLY.replace(b"gpt-x", shown.encode(), 1)


def test_every_other_byte_is_kept_however_the_body_arrives(bench: Bench) -> None:
    data = posted(CHAT, NASTY % b"chat-default")
    for cut in (1, 40, len(data) - len(NASTY) + 90, len(data) - 5):
        got, _ = bench.forwarded([(data[:cut], 0.01), data[cut:]])
        assert got.body == NASTY % b"gpt-4.1-mini"
    got, _ = bench.forwarded([data[at : at + 1] for at in range(len(data))])
    assert got.body == NASTY % b"gpt-4.1-mini"


# Sizes.


@pytest.mark.parametrize("dialect", ENDPOINTS)
def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_read(bench: Bench, dialect: str) -> None:
    shape = "anthropic" if dialect == "anthropic" else "openai_chat"
    for sent in (b"", b"x" * 1000):
        began = time.monotonic()
        data = raw.request(ENDPOINTS[dialect], sent, headers=[*JSON, ("Content-Length", str(100 * MIB))])
        reply = bench.refused(data, 413, "payload_too_large", shape)
        assert time.monotonic() - began < 1
        assert reply.header("connection") == "close"
        assert bench.gateway.request(reply.header("x-request-id") or "")["bytes_in"] == 0


def test_a_refusal_is_readable_while_the_client_still_sends(bench: Bench) -> None:
    data = raw.request(CHAT, b"", headers=[*JSON, ("Content-Length", str(100 * MIB))])
    bench.refused([data, b"x" * 4 * MIB], 413, "payload_too_large")


@pytest.mark.parametrize("target", [CHAT, "/openai-main" + CHAT])
def test_a_chunked_body_is_refused_at_the_limit(bench: Bench, target: str) -> None:
    head = raw.request(target, b"", headers=CHUNKED)
    piece = b"%x\r\n%b\r\n" % (65536, b" " * 65536)
    reply = bench.refused([head, *([piece] * 40)], 413, "payload_too_large")
    assert reply.header("connection") == "close"
    assert bench.gateway.request(reply.header("x-request-id") or "")["bytes_in"] <= MIB + 256 * 1024


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_limit_is_exact(bench: Bench, chunked: bool, over: int) -> None:
    start, end = b'{"model":"openai-main/m","a":"', b'"}'
    body = start + b"a" * (MIB + over - len(start) - len(end)) + end
    data = raw.request(CHAT, in_chunks(body, 65536), headers=CHUNKED) if chunked else posted(CHAT, body)
    if over:
        bench.refused(data, 413, "payload_too_large")
    else:
        got, _ = bench.forwarded(data)
        assert got.body_bytes == MIB - len("openai-main/")


def test_an_upload_has_a_limit_of_its_own(bench: Bench) -> None:
    big = b"x" * (3 * MIB)
    got, _ = bench.forwarded(raw.request("/proxy/openai-main/upload", big, headers=[("Content-Type", "audio/wav")]))
    assert got.body == big
    data = raw.request("/proxy/openai-main/upload", b"", headers=[("Content-Length", str(4 * MIB + 1))])
    bench.refused(data, 413, "payload_too_large")


def test_many_large_bodies_that_are_refused_leave_nothing_behind(bench: Bench) -> None:
    socks = [raw.connect(bench.gateway.port) for _ in range(32)]
    data = raw.request(CHAT, b"", headers=[*JSON, ("Content-Length", str(100 * MIB))])
    for sock in socks:
        sock.sendall(data)
    for sock in socks:
        assert raw.read(sock).status == 413
        sock.close()
    bench.forwarded(posted(CHAT, with_model('"n":1')))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("members", lambda: b",".join(b'"k%d":%d' % (at, at) for at in range(200_000))),
        ("elements", lambda: b'"input":[' + b",".join([b"1"] * 1_000_000) + b"]"),
        ("objects", lambda: b'"input":[' + b",".join([b'{"model":"x"}'] * 100_000) + b"]"),
        ("a picture", lambda: b'"image":"' + b"QUJD" * (4 * MIB) + b'"'),
        ("escapes", lambda: b'"text":"' + rb"\u006d\"" * MIB + b'"'),
    ],
)
def test_a_flood_of_members_is_taken_in_bounded_time(roomy: Bench, name: str, make: Callable[[], bytes]) -> None:
    body = with_model(make())
    began = time.monotonic()
    got, _ = roomy.forwarded(posted(CHAT, body), timeout=10)
    assert got.body_bytes == len(body) - len("openai-main/")
    assert time.monotonic() - began < 5


# The stream flag.

ASKED = b'"stream_options":{"include_usage":true}'
"""What the gateway adds to a chat stream whose client does not ask for usage."""


@pytest.mark.parametrize("value", ["true", "false", '"true"', "1", "0", "null", "[]", "{}", None])
@pytest.mark.parametrize("prefix", PREFIXES.values())
def test_the_stream_flag_is_the_vendors_to_read(bench: Bench, prefix: str, value: str | None) -> None:
    model = "m" if prefix else "openai-main/m"
    rest = "" if value is None else f',"stream":{value}'
    got, reply = bench.forwarded(posted(prefix + CHAT, f'{{"model":"{model}"{rest}}}'.encode()))
    asked = ASKED + b"," if value == "true" and not prefix.startswith("/proxy") else b""
    assert got.body == b"{" + asked + f'"model":"m"{rest}}}'.encode()
    assert reply.json["object"] == "demo"  # JSON came, so JSON goes on, whatever was asked for


@pytest.fixture(scope="module")
def streaming(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        yield Bench(loop, CONFIG + "chat: {{default_stream: true}}\n")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"openai-main/m"}', b'{%b,"stream":true,"model":"m"}' % ASKED),
        (b' \n{ "model":"openai-main/m"}', b' \n{%b,"stream":true, "model":"m"}' % ASKED),
        (b'{"model":"openai-main/m","stream":false}', b'{"model":"m","stream":false}'),
        (b'{"stream":true,"model":"openai-main/m"}', b'{%b,"stream":true,"model":"m"}' % ASKED),
        (
            b'{"model":"openai-main/m","a":{"stream":false}}',
            b'{%b,"stream":true,"model":"m","a":{"stream":false}}' % ASKED,
        ),
        (rb'{"model":"openai-main/m","str\u0065am":false}', rb'{"model":"m","str\u0065am":false}'),
        (b'{"model":"openai-main/m","stream":null}', b'{"model":"m","stream":null}'),
    ],
)
def test_an_absent_stream_flag_means_what_is_configured(streaming: Bench, body: bytes, expected: bytes) -> None:
    assert streaming.forwarded(posted(CHAT, body))[0].body == expected
    got, _ = streaming.forwarded(posted("/v1/embeddings", b'{"model":"openai-main/m"}'))
    assert got.body == b'{"model":"m"}'


# Forms.

AUDIO = "/v1/audio/transcriptions"
SOUND = bytes(range(256)) * 8


def part(name: str, value: bytes, more: bytes = b"", head: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="%b"%b\r\n%b\r\n%b' % (name.encode(), more, head, value)


def file_part(value: bytes = SOUND) -> bytes:
    return part("file", value, b'; filename="a.wav"', b"Content-Type: audio/wav\r\n")


def model_part(name: str = "openai-main/whisper-x") -> bytes:
    return part("model", name.encode())


def form(*parts: bytes, boundary: bytes = b"XbX", end: bytes = b"--\r\n", preamble: bytes = b"") -> bytes:
    body = b"".join(b"--%b\r\n%b\r\n" % (boundary, each) for each in parts)
    return preamble + body + b"--" + boundary + end


def upload(
    body: bytes, boundary: str = "XbX", *, target: str = AUDIO, chunked: bool = False, length: int | None = None
) -> bytes:
    headers = [("Content-Type", f"multipart/form-data; boundary={boundary}")]
    if chunked:
        headers.append(("Transfer-Encoding", "chunked"))
        body = in_chunks(body)
    if length is not None:
        headers.append(("Content-Length", str(length)))
    return raw.request(target, body, headers=headers)


def check_form(got: Got, expected: bytes, *, chunked: bool) -> None:
    assert got.body == expected
    assert got.complete
    framing = (got.header("content-length"), got.header("transfer-encoding"))
    assert framing == (([], [b"chunked"]) if chunked else ([b"%d" % len(expected)], []))


INNER = form(part("model", b"inner"), boundary=b"inner")
MIXED = b"Content-Type: multipart/mixed; boundary=inner\r\n"
PARAMETER = b'; filename="a; name=model;.wav"'
ALMOST = (part("models", b"x"), part("xmodel", b"y"), part("model[]", b"z"), part(" model", b"w"))

GOOD_FORMS = {
    "model first": (form(model_part("M"), file_part()), "XbX"),
    "model last": (form(file_part(), model_part("M")), "XbX"),
    "model between": (form(part("language", b"en"), model_part("M"), file_part()), "XbX"),
    "a preamble and an epilogue": (form(model_part("M"), preamble=b"hello\r\n", end=b"--\r\nbye--XbX\r\n"), "XbX"),
    "blanks behind a boundary": (form(model_part("M")).replace(b"--XbX\r\n", b"--XbX \t\r\n", 1), "XbX"),
    "no line end at the end": (form(model_part("M"), end=b"--"), "XbX"),
    "a quoted boundary": (form(file_part(), model_part("M"), boundary=b"a b:c=(d)"), '"a b:c=(d)"'),
    "a boundary of 70 characters": (form(model_part("M"), boundary=b"b" * 70), "b" * 70),
    "a charset behind the boundary": (form(model_part("M"), file_part()), "XbX; charset=utf-8"),
    "a nested form": (form(model_part("M"), part("mixed", INNER, b"", MIXED)), "XbX"),
    "a nested form in front": (form(part("mixed", INNER, b"", MIXED), model_part("M")), "XbX"),
    "near boundaries in a file": (form(file_part(b"\r\n--Xb\r\n-XbX\r\nXbX--\r--XbX\n--XbX"), model_part("M")), "XbX"),
    "a lower-case head": (form(model_part("M").replace(b"Content-Disposition", b"content-disposition")), "XbX"),
    "a name without quotes": (form(model_part("M").replace(b'"model"', b"model")), "XbX"),
    "a type of its own": (form(part("model", b"M", b"", b"Content-Type: text/plain\r\n")), "XbX"),
    "a file called model": (form(part("file", SOUND, b'; filename="model"'), model_part("M")), "XbX"),
    "a file whose name looks like a parameter": (form(part("file", SOUND, PARAMETER), model_part("M")), "XbX"),
    "fields that are almost the model": (form(*ALMOST, model_part("M")), "XbX"),
    "a field in other case": (form(part("Model", b"x"), model_part("M")), "XbX"),
    "an empty file": (form(file_part(b""), model_part("M")), "XbX"),
    "900 small parts": (form(*[part(f"p{at}", b"v") for at in range(900)], model_part("M")), "XbX"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_FORMS)
@pytest.mark.parametrize("chunked", [False, True])
def test_the_model_of_a_form_is_replaced_alone(bench: Bench, name: str, chunked: bool) -> None:
    template, boundary = GOOD_FORMS[name]
    body = template.replace(b"\r\n\r\nM\r\n", b"\r\n\r\nopenai-main/whisper-x\r\n")
    expected = template.replace(b"\r\n\r\nM\r\n", b"\r\n\r\nwhisper-x\r\n")
    assert body != expected
    got, reply = bench.forwarded(upload(body, boundary, chunked=chunked))
    check_form(got, expected, chunked=chunked)
    assert reply.json["model"] == "openai-main/whisper-x"


@pytest.mark.parametrize(
    ("target", "name", "upstream"),
    [
        (AUDIO, "whisper", "whisper-1"),
        ("/v1/audio/translations", "openai-main/whisper", "whisper-1"),
        ("/v1/images/edits", "openai-main/gpt-image-1", "gpt-image-1"),
        ("/v1/images/variations", "openai-main/a-longer-name-than-before", "a-longer-name-than-before"),
        ("/openai-main" + AUDIO, "whisper", "whisper-1"),
        ("/openai-main" + AUDIO, "whisper-9", "whisper-9"),
        ("/proxy/openai-main" + AUDIO, "whisper-9", "whisper-9"),
        ("/proxy/openai-main/upload", "openai-main/x", "openai-main/x"),
    ],
)
def test_a_form_in_every_form_of_address(bench: Bench, target: str, name: str, upstream: str) -> None:
    for parts in ((model_part(name), file_part()), (file_part(), model_part(name))):
        got, _ = bench.forwarded(upload(form(*parts), target=target))
        check_form(got, form(*parts).replace(model_part(name), model_part(upstream)), chunked=False)


def test_a_form_without_a_model_goes_home(bench: Bench) -> None:
    body = form(file_part())
    got, _ = bench.forwarded(upload(body))
    check_form(got, body, chunked=False)


def test_a_form_however_it_arrives(bench: Bench) -> None:
    body = form(file_part(b"\r\n--Xb" * 3), model_part(), part("language", b"en"))
    data = upload(body)
    head = len(data) - len(body)
    for cut in range(head + 1, len(data), 3):
        got, _ = bench.forwarded([(data[:cut], 0.001), data[cut:]])
        check_form(got, body.replace(b"openai-main/", b""), chunked=False)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_file_in_front_of_the_model_arrives_whole(bench: Bench, chunked: bool) -> None:
    """More than is kept in memory, so it waits in a file until its model is known."""
    sound = hashlib.shake_256(b"sound").digest(3 * MIB)
    assert len(sound) > 2 * intake.SPOOL_AFTER
    body = form(part("language", b"en"), file_part(sound), model_part("whisper"), part("prompt", PROMPT.encode()))
    got, reply = bench.forwarded(upload(body, chunked=chunked), timeout=10)
    check_form(got, body.replace(b"\r\n\r\nwhisper\r\n", b"\r\n\r\nwhisper-1\r\n"), chunked=chunked)
    assert reply.json["model"] == "whisper"


def test_a_large_file_behind_the_model_arrives_whole(bench: Bench) -> None:
    sound = hashlib.shake_256(b"more sound").digest(3 * MIB)
    body = form(model_part("whisper"), file_part(sound))
    got, _ = bench.forwarded(upload(body), timeout=10)
    check_form(got, body.replace(b"\r\n\r\nwhisper\r\n", b"\r\n\r\nwhisper-1\r\n"), chunked=False)


BAD_FORMS = {
    "two models": (form(model_part(), file_part(), model_part()), "XbX"),
    "two models, one quoted": (form(model_part(), model_part().replace(b'"model"', b"model")), "XbX"),
    "two models, last": (form(file_part(), model_part(), model_part("openai-main/y")), "XbX"),
    "10 000 tiny parts": (form(*[part("p", b"")] * 10_000, model_part()), "XbX"),
    "10 000 tiny parts behind the model": (form(model_part(), *[part("p", b"")] * 10_000), "XbX"),
    "a boundary of 71 characters": (form(model_part(), boundary=b"b" * 71), "b" * 71),
    "a quoted boundary of 71 characters": (form(model_part(), boundary=b"b" * 71), '"' + "b" * 71 + '"'),
    "an empty boundary": (form(model_part(), boundary=b""), ""),
    "an empty quoted boundary": (form(model_part(), boundary=b""), '""'),
    "an open quote": (form(model_part()), '"XbX'),
    "another boundary": (form(model_part()), "YyY"),
    "no end": (form(file_part(), end=b"")[:-5], "XbX"),
    "no end, model first": (form(model_part(), file_part(), end=b"")[:-5], "XbX"),
    "no end behind the model": (form(file_part(), end=b"\r\n") + model_part(), "XbX"),
    "only the beginning of an end": (form(file_part(), end=b"-"), "XbX"),
    "nothing": (b"", "XbX"),
    "something behind a boundary": (form(model_part()).replace(b"--XbX\r\n", b"--XbXy\r\n", 1), "XbX"),
    "an empty model": (form(part("model", b""), file_part()), "XbX"),
    "an empty model, last": (form(file_part(), part("model", b"")), "XbX"),
    "an empty model without a line end": (
        b'--XbX\r\nContent-Disposition: form-data; name="model"\r\n\r\n--XbX--\r\n',
        "XbX",
    ),
    "a model of 10 KB": (form(part("model", b"m" * 10_240)), "XbX"),
    "a model without an end": (form(file_part(), end=b"\r\n") + part("model", b"m" * 100_000), "XbX"),
    "a model that is no name": (form(model_part("openai-main/../x"), file_part()), "XbX"),
    "a model in another script": (form(part("model", "openai-main/ｗ".encode())), "XbX"),
    "a model that is no UTF-8": (form(part("model", b"openai-main/\xff")), "XbX"),
    "a model with a line end": (form(part("model", b"openai-main/x\r\nX-Evil: 1")), "XbX"),
    "a head without an end": (b"--XbX\r\nContent-Disposition: form-data" + b"x" * 100_000, "XbX"),
    "no form at all": (b"x" * 10_000, "XbX"),
}


@pytest.mark.parametrize("name", BAD_FORMS)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_that_cannot_be_used_is_refused(bench: Bench, name: str, chunked: bool) -> None:
    """An end that never comes is only noticed at the end; the upstream never gets a complete request of it."""
    body, boundary = BAD_FORMS[name]
    before = len(bench.upstream.requests)
    began = time.monotonic()
    reply = bench.ask(upload(body, boundary, chunked=chunked))
    assert time.monotonic() - began < 2
    check_error(reply, 400, "invalid_request")
    assert [got for got in bench.upstream.requests[before:] if got.complete] == []


def test_a_refused_form_leaves_no_file_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tempfile.SpooledTemporaryFile[bytes]] = []

    def spool(max_size: int) -> tempfile.SpooledTemporaryFile[bytes]:
        opened.append(tempfile.SpooledTemporaryFile(max_size))  # noqa: SIM115
        return opened[-1]

    monkeypatch.setattr(intake, "tempfile", SimpleNamespace(SpooledTemporaryFile=spool))
    large = form(file_part(b"x" * (2 * MIB)), part("model", b""))
    for body in (large, form(file_part(), end=b""), form(model_part("no such name")), form(model_part(), model_part())):
        check_error(bench.ask(upload(body)), 400, "invalid_request")
    bench.forwarded(upload(form(model_part(), file_part())))
    still_open = [spooled.closed for spooled in opened].count(False)
    for spooled in opened:
        spooled.close()
    assert (len(opened), still_open) == (5, 0)


@pytest.mark.parametrize(
    "kind",
    ["multipart/mixed; boundary=XbX", "application/json", "text/plain", "", "multipart/form-datax; boundary=XbX"],
)
def test_what_is_no_form_is_refused(bench: Bench, kind: str) -> None:
    data = raw.request(AUDIO, form(model_part()), headers=[("Content-Type", kind)])
    bench.refused(data, 415, "unsupported_media_type")


def test_a_form_without_a_boundary_is_refused(bench: Bench) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; charset=utf-8", "multipart/form-data;"):
        data = raw.request(AUDIO, form(model_part()), headers=[("Content-Type", kind)])
        bench.refused(data, 400, "invalid_request")


def test_a_form_that_says_it_is_too_long_is_refused_before_it_is_read(bench: Bench) -> None:
    for target in (AUDIO, "/openai-main" + AUDIO, "/v1/files"):
        reply = bench.refused(upload(b"--XbX\r\n", target=target, length=100 * MIB), 413, "payload_too_large")
        assert bench.gateway.request(reply.header("x-request-id") or "")["bytes_in"] == 0


def test_a_chunked_form_is_refused_at_the_limit(bench: Bench) -> None:
    reply = bench.ask(upload(form(file_part(b"x" * (5 * MIB)), model_part()), chunked=True), timeout=10)
    check_error(reply, 413, "payload_too_large")
