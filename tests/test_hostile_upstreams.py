"""Upstreams that break HTTP: one clean error before the head has left, a visible break later, nobody else harmed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import orjson
import pytest

from tests.support import raw
from tests.support.checks import Bench, check_alive, check_credential, check_error, quick_log
from tests.support.framing import CHUNKED, FILES, FIVE, LAST, answers, get, post
from tests.support.raw import Reply
from tests.support.running import Loop, until
from tests.support.upstream import EVENT_STREAM, Got, Pause, Script, Stall, chunk, json_reply

MARK = b"mark-of-the-peer"
CHUNKED_JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def made(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        bench = Bench(loop)
        until(bench.gateway.log)
        yield bench


@pytest.fixture
def bench(made: Bench) -> Bench:
    made.reset()
    made.upstream._script = lambda _: made.script
    made.upstream.requests.clear()
    made.upstream.peer_left.clear()
    return made


CALLS = {
    "a chat": post(b"Content-Length: 5\r\n", FIVE),
    "a file": get(),
    "a head": get(line=b"HEAD /openai-main/v1/files/f HTTP/1.1"),
    "an upload": post(CHUNKED, b"5\r\n%b\r\n" % FIVE, target=FILES),
    "a raw call": post(b"Content-Length: 5\r\n", FIVE, target=b"/proxy/openai-main/v1/x"),
}


def answer(lines: bytes, body: bytes = b"", status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"%b\r\nX-Mark: %b\r\n%b\r\n%b" % (status, MARK, lines, body)


FIVE_LONG = b"Content-Length: 5\r\n"
HEADS = {
    "two framings": answer(FIVE_LONG + b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    "two framings, the other way round": answer(CHUNKED + FIVE_LONG, b"5\r\nhello\r\n0\r\n\r\n"),
    "two lengths": answer(FIVE_LONG + b"Content-Length: 6\r\n", b"hello"),
    "the same length twice": answer(FIVE_LONG + FIVE_LONG, b"hello"),
    "a list of lengths": answer(b"Content-Length: 5, 5\r\n", b"hello"),
    "a signed length": answer(b"Content-Length: +5\r\n", b"hello"),
    "a negative length": answer(b"Content-Length: -1\r\n"),
    "no length": answer(b"Content-Length:\r\n"),
    "a length beyond all": answer(b"Content-Length: 18446744073709551616\r\n"),
    "an unknown coding": answer(b"Transfer-Encoding: xchunked\r\n"),
    "chunked twice": answer(b"Transfer-Encoding: chunked, chunked\r\n"),
    "chunked and identity": answer(b"Transfer-Encoding: chunked, identity\r\n"),
    "NUL in a value": answer(b"X-Y: \0\r\n" + FIVE_LONG, b"hello"),
    "NUL in a name": answer(b"X\0: y\r\n" + FIVE_LONG, b"hello"),
    "CR in a value": answer(b"X-Y: a\rb\r\n" + FIVE_LONG, b"hello"),
    "CR in the reason": answer(FIVE_LONG, b"hello", b"HTTP/1.1 200 O\rK"),
    "LF for line ends": answer(FIVE_LONG, b"hello").replace(b"\r\n", b"\n"),
    "a folded line": answer(b"X-Y: a\r\n b\r\n" + FIVE_LONG, b"hello"),
    "a space before a colon": answer(b"Content-Length : 5\r\n", b"hello"),
    "a line without a colon": answer(b"XY\r\n" + FIVE_LONG, b"hello"),
    "a line without a name": answer(b": y\r\n" + FIVE_LONG, b"hello"),
    "a value of 300 kB": answer(b"X-Y: %b\r\n" % (b"a" * 300_000) + FIVE_LONG, b"hello"),
    "10 000 lines": answer(b"X-Y: z\r\n" * 10_000 + FIVE_LONG, b"hello"),
    **{f"status {word}": answer(FIVE_LONG, b"hello", b"HTTP/1.1 %b OK" % word.encode())
       for word in ("99", "600", "999", "2000", "0", "-200", "2x0", "")},
    "no status line": answer(FIVE_LONG, b"hello", MARK),
    "HTTP/0.9": b"<html>%b</html>\r\n" % MARK,
    "HTTP/1.1 without a status": answer(FIVE_LONG, b"hello", b"HTTP/1.1"),
    "a request": b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % MARK,
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46" + MARK,
    "switching protocols": answer(b"Upgrade: x\r\nConnection: upgrade\r\n", MARK, b"HTTP/1.1 101 Switching Protocols"),
    "switching protocols, not to anything": answer(b"", MARK, b"HTTP/1.1 101 Switching Protocols"),
    "interim answers without end": answer(b"", b"", b"HTTP/1.1 100 Continue") * 5000,
    "hints without end": answer(b"", b"", b"HTTP/1.1 103 Early Hints") * 5000,
}  # fmt: skip


def ask(bench: Bench, request: bytes) -> tuple[Reply, dict[str, object], bytes]:
    """One request on a connection of its own: the answer, its line in the log, and all that was logged meanwhile."""
    before = os.path.getsize(bench.gateway.log_path)
    reply = raw.send(bench.gateway.port, request, until_complete=not request.startswith(b"HEAD"), timeout=2)
    until(bench.gateway.at_rest)
    request_id = reply.header("x-request-id") or ""
    line = bench.gateway.request(request_id)
    text = bench.gateway.log_path.read_bytes()[before:]
    assert text.count(request_id.encode()) == 1
    for each in text.splitlines():
        assert orjson.loads(each)["event"] == "request", text
    assert MARK not in text and not any(secret.encode() in text for secret in bench.secrets)
    assert reply.header("server") is None
    check_alive(bench.gateway)
    return reply, line, text


@pytest.mark.parametrize("what", HEADS)
@pytest.mark.parametrize("call", CALLS)
def test_a_head_that_is_none_is_one_clean_error(bench: Bench, call: str, what: str) -> None:
    bench.script = [HEADS[what], Stall()]
    bench.upstream._on_head = call == "an upload"
    request = CALLS[call]
    if call == "a head":
        request = request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    reply, line, _ = ask(bench, request)
    bench.upstream._on_head = False
    if call == "a head":
        assert (reply.status, reply.body) == (502, b"")
    else:
        check_error(reply, 502, "upstream_error")
    assert MARK not in reply.data and reply.header("x-mark") is None
    assert (line["outcome"], line["reason"], line["attempts"]) == ("upstream_error", "protocol", 1)
    (got,) = bench.upstream.requests
    check_credential(got, "authorization")
    assert bench.upstream.peer_left.wait(1), "a connection that broke the rules is not kept"


@pytest.mark.parametrize("call", ["a chat", "a file"])
def test_nothing_is_sent_again_on_a_connection_that_was_used_before(bench: Bench, call: str) -> None:
    replies: Iterator[Script] = iter([[json_reply(b"{}")], [HEADS["two framings"], Stall()], [json_reply(b'{"n":3}')]])
    bench.upstream._script = lambda got: next(replies)
    assert ask(bench, CALLS[call])[0].body == b"{}"
    check_error(ask(bench, CALLS[call])[0], 502, "upstream_error")
    assert len(bench.upstream.requests) == 2
    assert ask(bench, CALLS[call])[0].body == b'{"n":3}'
    first, second, third = (got.connection for got in bench.upstream.requests)
    assert first == second != third


BODIES = {
    "a size that is none": b"xyz" + MARK + b"\r\n",
    "no size": b"\r\n",
    "a signed size": b"+5\r\nhello\r\n",
    "a size beyond all": b"F" * 17 + b"\r\n",
    "more than was said": b"2\r\nhello" + MARK + b"\r\n",
    "LF behind the data": b"5\r\nhello\n0\r\n\r\n",
    "LF behind a size": b"5\nhello\r\n0\r\n\r\n",
    "a length in a trailer": b"0\r\nContent-Length: 5\r\n\r\n",
    "NUL in a trailer": b"0\r\nX: \0\r\n\r\n",
    "a trailer without a colon": b"0\r\n" + MARK + b"\r\n\r\n",
}


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("pause", [0.0, 0.02], ids=["at once", "later"])
def test_a_held_body_that_breaks_is_one_clean_error(bench: Bench, what: str, pause: float) -> None:
    bench.script = [CHUNKED_JSON + chunk(b'{"a":'), Pause(pause), BODIES[what], Stall()]
    reply, line, _ = ask(bench, CALLS["a chat"])
    check_error(reply, 502, "upstream_error")
    assert MARK not in reply.data and b'{"a":' not in reply.data
    assert (line["reason"], line["attempts"]) == ("protocol", 1) and len(bench.upstream.requests) == 1
    assert bench.upstream.peer_left.wait(1)


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("kind", ["text/event-stream", "audio/mpeg", "application/json"])
def test_a_body_that_breaks_later_is_never_complete(bench: Bench, what: str, kind: str) -> None:
    """Its good part arrives, a stream says what happened, and the last chunk never comes."""
    good = b"data: 1\n\n" if "event" in kind else b"x" * 300_000
    head = EVENT_STREAM.replace(b"text/event-stream", kind.encode())
    bench.script = [head + chunk(good), Pause(0.02), BODIES[what], Stall()]
    before = os.path.getsize(bench.gateway.log_path)
    reply = raw.send(
        bench.gateway.port, CALLS["a chat"] + LAST.replace(b"Connection: close\r\n", b""), until_complete=False
    )
    assert reply.status == 200 and reply.ended in ("fin", "rst")
    assert not reply.complete and reply.body.startswith(good)
    assert (b'"error"' in reply.body) == ("event" in kind)
    assert MARK not in reply.data and len(re.findall(rb"HTTP/1\.1 \d", reply.data)) == 1
    until(bench.gateway.at_rest)
    line = bench.gateway.request(reply.header("x-request-id") or "")
    assert (line["outcome"], line["reason"]) == ("upstream_error", "protocol")
    assert MARK not in bench.gateway.log_path.read_bytes()[before:]
    assert bench.upstream.peer_left.wait(1) and len(bench.upstream.requests) == 1
    check_alive(bench.gateway)


# Answers without a body, and with one all the same.


def tag(got: Got) -> bytes:
    return b'{"tag":"%b"}' % got.target.rpartition(b"/")[2]


BARE = {
    f"{status} {what}": b"HTTP/1.1 %b\r\n%b\r\n%b" % (status.encode(), lines, body)
    for status in ("204 No Content", "304 Not Modified", "205 Reset Content")
    for what, lines, body in (
        ("and nothing", b"Content-Length: 0\r\n" if status.startswith("205") else b"", b""),
        ("with a length", b"Content-Length: 5\r\n", b"HELLO"),
        ("in chunks", b"Transfer-Encoding: chunked\r\n", chunk(b"HELLO") + b"0\r\n\r\n"),
        ("and an answer behind it", b"Content-Length: 0\r\n", json_reply(b'{"tag":"poison"}')),
    )
}


@pytest.mark.parametrize("what", BARE)
@pytest.mark.parametrize("kind", [b"", b"Content-Type: application/json\r\n", b"Content-Type: text/event-stream\r\n"])
def test_an_answer_that_has_no_body_gets_none(bench: Bench, what: str, kind: bytes) -> None:
    """Everybody after it gets an answer of his own."""
    bare = BARE[what].replace(b"\r\n", b"\r\n" + kind, 1)
    bench.upstream._script = lambda got: [bare] if got.target.endswith(b"/bare") else [json_reply(tag(got))]
    requests = [get().replace(b"/files/f", b"/files/" + name) for name in (b"a", b"bare", b"b", b"c")]
    data = raw.send(bench.gateway.port, b"".join(requests) + LAST, until_complete=False).data
    assert b"poison" not in data
    if what.startswith("205"):  # it is framed as any other, so it is passed on as it is, well framed
        assert re.findall(rb'"tag":"(\w+)"', data) == [b"a", b"b", b"c"] and data.endswith(b"OK")
        return
    found = answers(data)
    assert [reply.status for reply in found] == [200, int(what[:3]), 200, 200, 200]
    assert found[1].header("content-length") is None and found[1].header("transfer-encoding") is None
    assert [reply.json["tag"] for reply in (found[0], *found[2:4])] == ["a", "b", "c"]
    until(bench.gateway.at_rest)
    if "HELLO" in BARE[what].decode() or "behind" in what:
        second, third = (got.connection for got in bench.upstream.requests[1:3])
        assert second != third, "stray bytes must not wait for the next request"


HEAD_ANSWERS = {
    "a length": (b"Content-Length: 1234\r\n", b""),
    "a length, and the body": (b"Content-Length: 5\r\n", b"HELLO"),
    "chunks": (b"Transfer-Encoding: chunked\r\n", b""),
    "chunks, and the body": (b"Transfer-Encoding: chunked\r\n", chunk(b"HELLO") + b"0\r\n\r\n"),
    "no framing": (b"", b""),
    "an answer behind it": (b"Content-Length: 5\r\n", json_reply(b'{"tag":"poison"}')),
}


@pytest.mark.parametrize("what", HEAD_ANSWERS)
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream", b"audio/mpeg"])
@pytest.mark.parametrize("form", [b"/openai-main/v1/files/", b"/proxy/openai-main/v1/any/"])
def test_the_answer_to_head_is_a_head(bench: Bench, what: str, kind: bytes, form: bytes) -> None:
    lines, body = HEAD_ANSWERS[what]
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n%b" % (kind, lines, body)
    bench.upstream._script = lambda got: [reply] if got.method == "HEAD" else [json_reply(tag(got))]
    one = get(line=b"HEAD %bx HTTP/1.1" % form)
    data = raw.send(bench.gateway.port, one + get(line=b"GET %by HTTP/1.1" % form) + LAST, until_complete=False).data
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"HELLO" not in data and b"poison" not in data
    assert (b"Content-Length: 1234" in head) == (what == "a length")
    assert [each.body for each in answers(rest)] == [b'{"tag":"y"}', b"OK"]
    until(bench.gateway.at_rest)
    if body:
        assert bench.upstream.requests[0].connection != bench.upstream.requests[1].connection


def test_the_listing_answers_head_by_itself(bench: Bench) -> None:
    data = raw.send(bench.gateway.port, get(line=b"HEAD /v1/models HTTP/1.1") + LAST, until_complete=False).data
    head, _, rest = data.partition(b"\r\n\r\n")
    assert re.search(rb"\r\nContent-Length: [1-9]", head) and answers(rest)[0].body == b"OK"
    assert bench.upstream.requests == []


@pytest.mark.parametrize("call", ["a chat", "a file", "an upload", "a raw call"])
def test_interim_answers_are_nobodys(bench: Bench, call: str) -> None:
    early = answer(b"Link: </x>\r\n", b"", b"HTTP/1.1 103 Early Hints")
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" + early + b"HTTP/1.1 102 Processing\r\n\r\n"
    bench.script = [interim, Pause(0.02), early + json_reply(b'{"n":1}')]
    request = CALLS[call] + (b"0\r\n\r\n" if call == "an upload" else b"")
    for _ in range(2):
        reply, line, _ = ask(bench, request)
        assert (reply.status, reply.body, line["outcome"]) == (200, b'{"n":1}', "ok")
        assert b"HTTP/1.1 1" not in reply.data and MARK not in reply.data and reply.header("link") is None
    assert bench.upstream.requests[0].connection == bench.upstream.requests[1].connection
