"""Content codings: a compressed body passes unharmed, or is undone where it must be read; it is never blown up."""

from __future__ import annotations

import gzip
import itertools
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from tests.support import raw
from tests.support.benches import roomy as bench
from tests.support.benches import roomy_made
from tests.support.checks import Bench, chat
from tests.support.process import Process
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk, json_reply
from tests.support.running import SECRETS, Loop
from tests.support.upstream import Fin, Pause, Reset, Script, Stall, Upstream
from tests.test_events import Lag
from tests.test_streams import CONFIG, DIALECTS, EVENTS, PINGS, REQUESTS, SHOWN, played, seen, sent

__all__ = ["bench", "roomy_made"]

MIB = 1024 * 1024
CODED = b"\x1f\x8b\x08\x00 not what it says \xff\xfe" + bytes(range(256))
CODINGS = ["gzip", "br", "zstd", "deflate", "gzip, gzip", "GZIP", "x-foo"]


def raw_deflate(data: bytes) -> bytes:
    """Without zlib's frame, as some servers mean `deflate` (RFC 9110 section 8.4.1.2)."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


UNDONE: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "gzip": (b"gzip", gzip.compress),
    "upper case": (b"GZip", gzip.compress),
    "by its old name": (b"x-gzip", gzip.compress),
    "beside identity": (b"identity, gzip", gzip.compress),
    "deflate": (b"deflate", zlib.compress),
    "deflate without a frame": (b"deflate", raw_deflate),
}
"""How an upstream may compress what it was asked not to: the header's value, and what makes the bytes."""

KEPT = ["br", "zstd", "compress", "x-foo", "gzip, gzip", "br, gzip"]
"""What the gateway cannot undo, and so must not touch."""


# Requests.


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("/proxy/openai-main/v1/chat/completions", "authorization"),
        ("/proxy/openai-main/v1/anything", "authorization"),
        ("/openai-main/v1/anything", "authorization"),
        ("/proxy/anthropic-main/v1/messages", "x-api-key"),
        ("/v1beta/models/vertex-main/m:generateContent", "x-goog-api-key"),
        ("/v1beta/models/flash:generateContent", "x-goog-api-key"),
        ("/v1beta/models/flash:countTokens", "x-goog-api-key"),
    ],
)
def test_a_compressed_body_that_need_not_be_read_passes_with_its_name(
    bench: Bench, target: str, place: str, coding: str
) -> None:
    headers = [("Content-Type", "application/json"), ("Content-Encoding", coding), ("Content-Digest", "sum")]
    got, _ = bench.forwarded(raw.request(target, CODED, headers=headers), place)
    assert got.body == CODED
    assert got.header("content-encoding") == [coding.encode()]
    assert got.header("content-digest") == [b"sum"]
    chunked = [*headers, ("Transfer-Encoding", "chunked")]
    body = b"".join(chunk(CODED[at : at + 100]) for at in range(0, len(CODED), 100)) + LAST_CHUNK
    got, _ = bench.forwarded(raw.request(target, body, headers=chunked), place)
    assert (got.body, got.header("content-encoding")) == (CODED, [coding.encode()])


def test_many_members_pass_as_they_are(bench: Bench) -> None:
    body = b"".join(gzip.compress(b"%d" % number) for number in range(5000))
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
    got, _ = bench.forwarded(raw.request("/proxy/openai-main/v1/chat/completions", body, headers=headers))
    assert got.body == body


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/openai-main/v1/chat/completions"])
@pytest.mark.parametrize("name", ["identity", "Identity"])
def test_a_body_that_is_not_coded_may_say_so(bench: Bench, target: str, name: str) -> None:
    got, _ = bench.forwarded(raw.request(target, chat("chat-default"), headers=[("Content-Encoding", name)]))
    assert orjson.loads(got.body)["model"] == "gpt-4.1-mini"


@pytest.mark.parametrize("target", ["/v1/audio/transcriptions", "/openai-main/v1/images/edits"])
@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_a_compressed_form_whose_model_must_be_read_is_refused(bench: Bench, target: str, coding: str) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
    headers = [("Content-Type", "multipart/form-data; boundary=b"), ("Content-Encoding", coding)]
    data = raw.request(target, gzip.compress(form), headers=headers)
    reply = bench.ask(data)
    assert reply.status in (400, 415) and reply.complete
    assert reply.json["error"]["code"] in ("invalid_request", "unsupported_media_type")


def bomb(size: int) -> bytes:
    """Compressed zeros, `size` bytes before they are undone a thousandfold."""
    block = gzip.compress(bytes(16 * MIB), 9)
    return block * (size // len(block))


@pytest.mark.slow
def test_a_request_that_would_expand_a_thousandfold_is_not_expanded(tmp_path: Path, loop: Loop) -> None:
    body = bomb(10 * MIB)
    upstream = Upstream(loop, [json_reply(b"{}")]).start()
    config = CONFIG.format(url=upstream.url, keepalive="0s", idle="5s")
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
    with Process(tmp_path, config, SECRETS) as daemon:
        raw.send(daemon.port, REQUESTS["openai_chat"])
        before = daemon.memory()["VmHWM"]
        began = time.monotonic()
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
            reply = raw.send(daemon.port, raw.request(path, body, headers=headers))
            assert (reply.status, reply.header("connection")) == (415, "close")
        assert daemon.memory()["VmHWM"] - before < 4 * MIB
        assert len(upstream.requests) == 1
        reply = raw.send(daemon.port, raw.request("/proxy/openai-main/v1/anything", body, headers=headers))
        assert reply.status == 200 and upstream.requests[-1].body_bytes == len(body)
        assert daemon.memory()["VmHWM"] - before < 40 * MIB
        assert time.monotonic() - began < 3


# Responses that are undone, because the model's name stands in them.


def coded_reply(kind: bytes, coding: bytes, body: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Encoding: %b\r\n%bContent-Length: %d\r\n\r\n%b" % (
        kind,
        coding,
        more,
        len(body),
        body,
    )


def json_of(dialect: str, name: bytes) -> bytes:
    """The event's data alone is a reply of the same shape."""
    return (EVENTS[dialect] % name).partition(b"data: ")[2].rstrip()


WHOLE = {**REQUESTS, "gemini": REQUESTS["gemini"].replace(b":streamGenerateContent?alt=sse", b":generateContent")}
"""What is answered in one piece. Gemini has another path for it."""

INTEGRITY = b"Content-Digest: sum\r\nRepr-Digest: sum\r\nETag: sum\r\nContent-MD5: sum\r\n"


@pytest.mark.parametrize("how", UNDONE)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_compressed_json_is_undone_where_its_model_is_replaced(loop: Loop, dialect: str, how: str) -> None:
    coding, squeeze = UNDONE[how]
    body = squeeze(json_of(dialect, b"upstream-1"))
    upstream, gateway = played(loop, [coded_reply(b"application/json", coding, body, INTEGRITY)])
    reply = raw.send(gateway.port, WHOLE[dialect])
    assert (reply.status, reply.complete) == (200, True)
    assert reply.body == json_of(dialect, SHOWN[dialect])
    assert reply.header("content-encoding") is None
    assert reply.header("content-length") == str(len(reply.body))
    assert not {"content-digest", "repr-digest", "etag", "content-md5"} & {
        line.partition(b":")[0].decode().lower() for line in reply.head.split(b"\r\n")
    }
    assert upstream.requests[0].header("accept-encoding") == [b"identity"]


@pytest.mark.parametrize("how", UNDONE)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_compressed_stream_is_undone_event_by_event(loop: Loop, dialect: str, how: str) -> None:
    """However it is cut: whole, byte by byte, and in members of their own."""
    coding, squeeze = UNDONE[how]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: %b\r\n" % coding
    head += INTEGRITY + b"Transfer-Encoding: chunked\r\n\r\n"
    whole = squeeze(sent(dialect) * 3)
    members = squeeze(sent(dialect)) + squeeze(b"") + squeeze(sent(dialect) * 2)
    for pieces in ([whole], [whole[at : at + 1] for at in range(len(whole))], [members]):
        _, gateway = played(loop, [head, *map(chunk, pieces), LAST_CHUNK])
        reply = raw.send(gateway.port, REQUESTS[dialect])
        assert reply.complete and reply.body == seen(dialect) * 3, how
        assert reply.header("content-encoding") is None and reply.header("content-digest") is None


@pytest.mark.parametrize("coding", [b"gzip", b"deflate"])
def test_what_a_compressed_stream_flushes_is_there_at_once(loop: Loop, coding: bytes) -> None:
    """A flush in the midst of an event hands out nothing; its other half, at once."""
    packer = zlib.compressobj(wbits=31 if coding == b"gzip" else 15)

    def flushed(data: bytes) -> bytes:
        return chunk(packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))

    event = sent("openai_chat")
    steps: Script = []
    for _ in range(5):
        steps += [flushed(event[:30]), Pause(0.04), flushed(event[30:]), Pause(0.04)]
    head = EVENT_STREAM[:-2] + b"Content-Encoding: %b\r\n\r\n" % coding
    _, gateway = played(loop, [head, *steps, chunk(packer.flush()), LAST_CHUNK])
    arrivals: list[float] = []
    data = b""
    with raw.connect(gateway.port) as sock:
        sock.sendall(REQUESTS["openai_chat"])
        while not data.endswith(LAST_CHUNK):
            data += sock.recv(65536)
            arrivals += [time.monotonic()] * (data.count(seen("openai_chat")) - len(arrivals))
    assert raw.Reply(data, "open").body == seen("openai_chat") * 5
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert len(gaps) == 4 and min(gaps) > 0.03 and max(gaps) < 0.2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_ping_stands_between_the_events_of_a_stream_that_is_undone(loop: Loop, dialect: str) -> None:
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(sent(dialect)) + packer.flush(zlib.Z_SYNC_FLUSH)
    second = packer.compress(sent(dialect)) + packer.flush()
    head = EVENT_STREAM[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    _, gateway = played(loop, [head, chunk(first), Pause(0.3), chunk(second), LAST_CHUNK], keepalive="50ms")
    reply = raw.send(gateway.port, REQUESTS[dialect])
    assert reply.complete and PINGS[dialect] in reply.body
    assert reply.body.replace(PINGS[dialect], b"") == seen(dialect) * 2


def test_a_compressed_answer_of_nothing(loop: Loop) -> None:
    for kind in (b"application/json", b"text/event-stream"):
        _, gateway = played(loop, [coded_reply(kind, b"gzip", b"")])
        reply = raw.send(gateway.port, REQUESTS["openai_chat"])
        assert (reply.status, reply.complete, reply.body) == (200, True, b"")


# Responses that are not undone.


@pytest.mark.parametrize("coding", KEPT)
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_a_coding_that_cannot_be_undone_passes_untouched(loop: Loop, kind: bytes, coding: str) -> None:
    """With the coding's name and the checksums, and without a ping of the gateway's own in its midst."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Encoding: %b\r\nContent-Digest: sum\r\n" % (
        kind,
        coding.encode(),
    )
    framed = head + b"Transfer-Encoding: chunked\r\n\r\n"
    silence = Pause(0.25 if b"event" in kind else 0.01)
    _, gateway = played(loop, [framed, chunk(CODED[:99]), silence, chunk(CODED[99:]), LAST_CHUNK], keepalive="50ms")
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert (reply.status, reply.complete, reply.body) == (200, True, CODED)
    assert (reply.header("content-encoding"), reply.header("content-digest")) == (coding, "sum")


RAW_CHAT = REQUESTS["openai_chat"].replace(b"/v1/", b"/proxy/openai-main/v1/", 1)


@pytest.mark.parametrize("coding", ["gzip", *KEPT])
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream", b"audio/mpeg"])
@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found"])
def test_a_coding_that_the_client_may_have_passes_untouched(
    loop: Loop, kind: bytes, coding: str, status: bytes
) -> None:
    answer = coded_reply(kind, coding.encode(), CODED, INTEGRITY).replace(b"200 OK", status, 1)
    _, gateway = played(loop, [answer])
    asked = [("Accept-Encoding", "gzip, br")]
    for request in (RAW_CHAT, raw.request("/proxy/openai-main/v1/anything", {}, headers=asked)):
        reply = raw.send(gateway.port, request)
        assert (reply.status, reply.complete, reply.body) == (int(status[:3]), True, CODED)
        assert (reply.header("content-encoding"), reply.header("etag")) == (coding, "sum")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_compressed_error_of_the_vendor_passes_unchanged(loop: Loop, dialect: str) -> None:
    body = gzip.compress(b'{"error":{"message":"no","model":"upstream-1"}}')
    answer = coded_reply(b"application/json", b"gzip", body).replace(b"200 OK", b"429 Slow", 1)
    _, gateway = played(loop, [answer])
    reply = raw.send(gateway.port, WHOLE[dialect])
    assert (reply.status, reply.body, reply.header("content-encoding")) == (429, body, "gzip")


KEY_INVALID = b'{"error":{"code":400,"message":"API key not valid: pk-test","details":[{"reason":"API_KEY_INVALID"}]}}'


@pytest.mark.parametrize("target", ["/v1beta/models/vertex-main/m:generateContent", "/proxy/vertex-main/v1beta/tuned"])
@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_refusal_of_the_gateways_key_is_recognised(
    bench: Bench, target: str, status: int, coding: str
) -> None:
    """The client's own `Accept-Encoding` may have brought the compression about."""
    squeezed = UNDONE[coding][1](KEY_INVALID)
    reply = coded_reply(b"application/json", coding.encode(), squeezed)
    bench.script = [reply.replace(b"200 OK", b"%d No" % status, 1)]
    got = bench.ask(raw.request(target, {"contents": []}, headers=[("Accept-Encoding", coding)]))
    assert got.status == 502 and squeezed not in got.data
    assert got.json["error"]["details"][0]["reason"] == "UPSTREAM_AUTH"


# Broken.

BROKEN = {
    "no coding at all": lambda body: body,
    "cut short": lambda body: gzip.compress(body)[:-9],
    "a false checksum": lambda body: gzip.compress(body)[:-8] + b"\0" * 8,
    "junk behind it": lambda body: gzip.compress(body) + b"junk",
}


@pytest.mark.parametrize("how", BROKEN)
def test_json_whose_coding_is_broken_is_a_clean_error(loop: Loop, how: str) -> None:
    body = BROKEN[how](b'{"model":"upstream-1","canary-of-the-vendor":1}')
    _, gateway = played(loop, [coded_reply(b"application/json", b"gzip", body)])
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert (reply.status, reply.json["error"]["code"], reply.complete) == (502, "upstream_error", True)
    assert b"canary" not in reply.data and reply.header("content-encoding") is None
    assert gateway.request(reply.header("x-request-id") or "")["reason"] == "protocol"


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_whose_coding_breaks_ends_with_an_error_and_never_as_if_complete(
    loop: Loop, dialect: str, how: str
) -> None:
    body = BROKEN[how](sent(dialect) * 3)
    head = EVENT_STREAM[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    _, gateway = played(loop, [head, chunk(body), LAST_CHUNK])
    reply = raw.send(gateway.port, REQUESTS[dialect])
    assert reply.status == 200 and not reply.complete
    assert b"upstream_error" in reply.body and reply.body.endswith(b"\n\n")
    assert reply.body.count(seen(dialect)) <= 3


@pytest.mark.parametrize("ending", [[Fin()], [Reset()], [b"xyz\r\n", Stall()]], ids=["fin", "rst", "bad-chunk"])
def test_no_plain_word_is_put_behind_compressed_bytes(loop: Loop, ending: Script) -> None:
    """A stream that passes with its coding ends, when it breaks, without an event that no decoder could read."""
    head = EVENT_STREAM[:-2] + b"Content-Encoding: br\r\n\r\n"
    for request in (REQUESTS["openai_chat"], RAW_CHAT):
        _, gateway = played(loop, [head, chunk(CODED), Pause(0.03), *ending])
        reply = raw.send(gateway.port, request)
        assert not reply.complete and reply.body == CODED


@pytest.mark.slow
def test_an_answer_that_expands_beyond_all_bounds_costs_bounded_memory(tmp_path: Path, loop: Loop) -> None:
    upstream = Upstream(loop, lambda _: [body]).start()
    with Process(tmp_path, CONFIG.format(url=upstream.url, keepalive="0s", idle="5s"), SECRETS) as daemon:
        before = daemon.memory()["VmHWM"]
        for kind in (b"application/json", b"text/event-stream"):
            for size in (150_000, 10 * MIB):
                body = coded_reply(kind, b"gzip", bomb(size))
                reply = raw.send(daemon.port, REQUESTS["openai_chat"])
                assert daemon.memory()["VmHWM"] - before < 256 * MIB
                assert len(reply.data) < 256 * MIB and not (reply.status == 200 and reply.complete)
                assert raw.send(daemon.port, raw.request("/healthz", key=None)).status == 200


def test_an_answer_that_expands_beyond_all_bounds_does_not_hold_up_the_others(loop: Loop) -> None:
    body = coded_reply(b"application/json", b"gzip", bomb(200_000))
    with Loop() as own:
        upstream = Upstream(loop, lambda _: [body]).start()
        gateway = own.gateway(CONFIG.format(url=upstream.url, keepalive="0s", idle="5s"))
        with Lag(own) as lag:
            reply = raw.send(gateway.port, REQUESTS["openai_chat"])
        assert reply.status == 502
        assert lag.worst < 0.2


# Lengths.


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", [b"m", b"upstream-1-" + b"x" * 300], ids=["grows", "shrinks"])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("padding", [0, 400_000], ids=["held", "passing"])
def test_the_length_is_true_after_the_name_was_replaced(
    loop: Loop, dialect: str, name: bytes, framing: str, padding: int
) -> None:
    body, expected = (
        json_of(dialect, each)[:-1] + b',"p":"' + b"p" * padding + b'"}' for each in (name, SHOWN[dialect])
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    scripts: dict[str, Script] = {
        "length": [head + b"Content-Length: %d\r\n\r\n" % len(body) + body],
        "chunked": [head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(body[:9]) + chunk(body[9:]) + LAST_CHUNK],
        "close": [head + b"\r\n" + body, Fin()],
    }
    _, gateway = played(loop, scripts[framing])
    reply = raw.send(gateway.port, WHOLE[dialect])
    assert reply.complete and reply.body == expected
    framings = (reply.headers("content-length"), reply.headers("transfer-encoding"))
    assert framings == (([str(len(expected))], []) if not padding else ([], ["chunked"]))
