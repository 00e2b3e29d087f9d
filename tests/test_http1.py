"""The response reader: one verdict per message, however it is cut, and no word of the peer in what it says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.errors import WireError
from gproxyd.wire import http1
from gproxyd.wire.http1 import Progress, ResponseReader, request_head
from tests.support.streams import CUTS, at_cuts, byte_by_byte, cuttings, law, pieces

CANARY = b"canary-7Qz1"


class Verdict(NamedTuple):
    """How a response ended: complete, eof (complete by the end of the connection), truncated or broken."""

    end: str
    status: int | None
    body: bytes
    reusable: bool


@dataclass(frozen=True)
class Message:
    name: str
    data: bytes
    verdict: Verdict
    method: str = "GET"


def read(parts: Iterable[bytes], method: str = "GET", reader: ResponseReader | None = None) -> Verdict:
    """Feeds a reader as a connection does, and sums up what came. Its short cuts must come to the same."""
    told = list(filter(None, parts))  # a transport gives no empty bytes
    if reader is not None:
        return _read(told, method, reader, short=True)
    verdict = _read(told, method, ResponseReader(), short=False)
    assert _read(told, method, ResponseReader(), short=True) == verdict
    return verdict


def _progress(reader: ResponseReader, part: bytes, *, short: bool) -> Progress:
    """What a connection makes of bytes, by way of the short cuts or not."""
    if short and (whole := reader.whole(part)) is not None:
        return Progress(*whole, True, None)
    if short and (chunk := reader.chunk(part)) is not None:
        return Progress(None, chunk, False, None)
    return reader.feed(part)


def _read(parts: Iterable[bytes], method: str, reader: ResponseReader, *, short: bool) -> Verdict:
    reader.expect(method)
    status, body, end = None, [], ""
    for part in parts:
        progress = _progress(reader, part, short=short)
        if end:
            assert progress.error is not None
            assert not reader.reusable
            assert_silent(progress.error)
            break
        if progress.head is not None:
            assert status is None, "the head is told once"
            status = progress.head.status
        assert status is not None or not progress.body, "no body before its head"
        body.append(progress.body)
        if progress.ended:
            end = "complete"
        elif progress.error is not None:
            assert_silent(progress.error)
            return Verdict("broken", status, b"".join(body), reader.reusable)
    if not end:
        try:
            end = "eof" if reader.eof() else "?"
        except WireError as error:
            assert_silent(error)
            end = "truncated"
    return Verdict(end, status, b"".join(body), reader.reusable)


def assert_silent(error: WireError) -> None:
    assert CANARY.decode() not in repr(error)
    assert str(error).startswith(("the ", "bytes "))


def ok(lines: bytes, body: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\n%b\r\n%b" % (status, lines, body)


def done(body: bytes = b"", status: int = 200, *, reusable: bool = True) -> Verdict:
    return Verdict("complete", status, body, reusable)


def broken(status: int | None = None, body: bytes = b"") -> Verdict:
    return Verdict("broken", status, body, False)


def cut_short(status: int | None, body: bytes = b"") -> Verdict:
    return Verdict("truncated", status, body, False)


def by_eof(body: bytes, status: int = 200) -> Verdict:
    return Verdict("eof", status, body, False)


CHUNKED = b"Transfer-Encoding: chunked\r\n"
FIVE = b"Content-Length: 5\r\n"
CLOSE = b"Connection: close\r\n"

GOOD = [
    Message("length", ok(FIVE, b"hello"), done(b"hello")),
    Message("length zero", ok(b"Content-Length: 0\r\n"), done()),
    Message("length with leading zeros", ok(b"Content-Length: 0005\r\n", b"hello"), done(b"hello")),
    Message("odd case and spaces", ok(b"cONTENT-lENGTH:  \t5 \t\r\n", b"hello"), done(b"hello")),
    Message("no reason", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", done(b"hi")),
    Message("chunked", ok(CHUNKED, b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"), done(b"hello world")),
    Message("capitals", ok(b"TRANSFER-ENCODING: CHUNKED\r\n", b"A\r\n0123456789\r\n0\r\n\r\n"), done(b"0123456789")),
    Message("chunk extensions", ok(CHUNKED, b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n'), done(b"hello")),
    Message("trailers", ok(CHUNKED, b"2\r\nhi\r\n0\r\nX-Key: canary-7Qz1\r\n\r\n"), done(b"hi")),
    Message("close", ok(FIVE + CLOSE, b"hello"), done(b"hello", reusable=False)),
    Message("http/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", done(b"hi", reusable=False)),
    Message("http/1.0 kept", b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi", done(b"hi")),
    Message("204", ok(b"", status=b"204 No Content"), done(status=204)),
    Message("304 with a length", ok(FIVE, status=b"304 Not Modified"), done(status=304)),
    Message("head", ok(b"Content-Length: 1234\r\n"), done(), "HEAD"),
    Message("head, chunked", ok(CHUNKED), done(), "HEAD"),
    Message("head, close", ok(FIVE + CLOSE), done(reusable=False), "HEAD"),
    Message("error status", ok(FIVE, b"sorry", status=b"599 x"), done(b"sorry", 599)),
    Message("103 first", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + ok(FIVE, b"hello"), done(b"hello")),
    Message("64 interims", b"HTTP/1.1 100 Continue\r\n\r\n" * http1.MAX_INTERIM + ok(FIVE, b"hello"), done(b"hello")),
    Message("length in an interim", b"HTTP/1.1 103 E\r\n" + FIVE + b"\r\n" + ok(FIVE, b"hello"), done(b"hello")),
    Message("upgrade offered", ok(b"Upgrade: h2c\r\nConnection: upgrade\r\n" + FIVE, b"hello"), done(b"hello")),
    Message("latin-1 in a header", ok(b"X: \xe9\r\n" + FIVE, b"hello"), done(b"hello")),
    Message("empty lines first", b"\r\n\r\n" + ok(FIVE, b"hello"), done(b"hello")),
    Message("512 lines", ok(b"X: y\r\n" * (http1.MAX_HEADER_LINES - 1) + FIVE, b"hello"), done(b"hello")),
]  # fmt: skip

UNTIL_CLOSED = [
    Message("no framing", ok(b"", b"hello"), by_eof(b"hello")),
    Message("no framing, no body", ok(b""), by_eof(b"")),
    Message("no framing, close", ok(CLOSE, b"hello"), by_eof(b"hello")),
    Message("205 without framing", ok(b"", b"", status=b"205 Reset"), by_eof(b"", 205)),
    Message("http/1.0 until closed", b"HTTP/1.0 200 OK\r\n\r\nhello", by_eof(b"hello")),
]

STRAY = [
    Message("204 with a body", ok(FIVE, b"HELLO", status=b"204 x"), done(status=204, reusable=False)),
    Message("204, chunked with an end", ok(CHUNKED, b"0\r\n\r\n", status=b"204 x"), done(status=204, reusable=False)),
    Message("304 with a body", ok(FIVE, b"HELLO", status=b"304 x"), done(status=304, reusable=False)),
    Message("head with a body", ok(FIVE, b"HELLO"), done(reusable=False), "HEAD"),
    Message("head, chunked with a body", ok(CHUNKED, b"5\r\nHELLO\r\n0\r\n\r\n"), done(reusable=False), "HEAD"),
    Message("longer than its length", ok(FIVE, b"helloHELLO"), done(b"hello", reusable=False)),
    Message("a second response", ok(FIVE, b"hello" + ok(FIVE, b"HELLO")), done(b"hello", reusable=False)),
    Message("a second response to head", ok(FIVE, ok(FIVE, b"HELLO")), done(reusable=False), "HEAD"),
    Message("behind the last chunk", ok(CHUNKED, b"0\r\n\r\nX"), done(reusable=False)),
]  # fmt: skip

TRUNCATED = [
    Message("nothing", b"", cut_short(None)),
    Message("half a status line", b"HTTP/1.1 20", cut_short(None)),
    Message("half a head", b"HTTP/1.1 200 OK\r\nX: canary-7Qz1\r\n", cut_short(None)),
    Message("interim only", b"HTTP/1.1 100 Continue\r\n\r\n", cut_short(None)),
    Message("short of its length", ok(FIVE, b"hell"), cut_short(200, b"hell")),
    Message("no body at all", ok(FIVE), cut_short(200)),
    Message("half a chunk", ok(CHUNKED, b"5\r\nhel"), cut_short(200, b"hel")),
    Message("no last chunk", ok(CHUNKED, b"5\r\nhello\r\n"), cut_short(200, b"hello")),
    Message("half a last chunk", ok(CHUNKED, b"5\r\nhello\r\n0\r\n"), cut_short(200, b"hello")),
    Message("inside a trailer", ok(CHUNKED, b"0\r\nX: canary-7Qz1\r\n"), cut_short(200)),
]

LENGTHS = [
    *["+5", "-1", "-0", "0x5", "0o5", "5_0", "1e1", "5.0", "5,", "5,5", "5,6", ",5", "abc", "\xb2"],
    *["99999999999999999999", "18446744073709551616"],
]
CODINGS = [
    *["gzip", "identity", "gzip, chunked", "chunked, gzip", "xchunked", "chunked,", ",chunked", "chunked;q=1"],
    *['"chunked"', ""],
]


def length(text: str) -> Message:
    return Message(f"length {text}", ok(b"Content-Length: %b\r\n" % text.encode("latin-1"), b"hello"), broken())


def coding(text: str) -> Message:
    line = b"Transfer-Encoding: %b\r\n" % text.encode()
    return Message(f"coding {text}", ok(line, b"5\r\nhello\r\n0\r\n\r\n"), broken())


def status(text: str) -> Message:
    return Message(f"status {text}", ok(FIVE, b"hello", status=text.encode()), broken())


BROKEN = [
    Message("length and chunked", ok(FIVE + CHUNKED, b"5\r\nhello\r\n0\r\n\r\n"), broken()),
    Message("chunked and length", ok(CHUNKED + FIVE, b"5\r\nhello\r\n0\r\n\r\n"), broken()),
    Message("two lengths", ok(FIVE + b"Content-Length: 6\r\n", b"hello"), broken()),
    Message("the same length twice", ok(FIVE + FIVE, b"hello"), broken()),
    Message("empty length", ok(b"Content-Length:\r\n", b"hello"), broken()),
    Message("empty and good length", ok(b"Content-Length:\r\n" + FIVE, b"hello"), broken()),
    Message("length with a space", ok(b"Content-Length: 5 5\r\n", b"hello"), broken()),
    *map(length, LENGTHS),
    *map(coding, CODINGS),
    Message("chunked twice", ok(CHUNKED + CHUNKED, b"0\r\n\r\n"), broken()),
    Message("bad chunk size", ok(CHUNKED, b"canary-7Qz1\r\n"), broken(200, b"")),
    Message("signed chunk size", ok(CHUNKED, b"+5\r\nhello\r\n0\r\n\r\n"), broken(200)),
    Message("hex chunk size", ok(CHUNKED, b"0x5\r\nhello\r\n0\r\n\r\n"), broken(200)),
    Message("endless chunk size", ok(CHUNKED, b"F" * 17 + b"\r\nhello"), broken(200)),
    Message("chunk error after data", ok(CHUNKED, b"5\r\nhello\r\nzz\r\n"), broken(200, b"hello")),
    Message("chunk longer than said", ok(CHUNKED, b"5\r\nhello!!\r\n0\r\n\r\n"), broken(200, b"hello")),
    Message("LF behind a chunk", ok(CHUNKED, b"5\r\nhello\n0\r\n\r\n"), broken(200, b"hello")),
    Message("length in a trailer", ok(CHUNKED, b"2\r\nhi\r\n0\r\nContent-Length: 9\r\n\r\n"), broken(200, b"hi")),
    Message("NUL in a value", ok(b"X: canary-7Qz1\0\r\n" + FIVE, b"hello"), broken()),
    Message("NUL in a name", ok(b"canary-7Qz1\0: x\r\n" + FIVE, b"hello"), broken()),
    Message("space in a name", ok(b"canary-7Qz1 x: y\r\n" + FIVE, b"hello"), broken()),
    Message("space before the colon", ok(b"Content-Length : 5\r\n", b"hello"), broken()),
    Message("no colon", ok(b"canary-7Qz1\r\n" + FIVE, b"hello"), broken()),
    Message("folded line", ok(b"X: a\r\n canary-7Qz1\r\n" + FIVE, b"hello"), broken()),
    Message("lone LF", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", broken()),
    Message("lone CR", b"HTTP/1.1 200 OK\r\nX: a\rY: canary-7Qz1\r\n\r\n", broken()),
    Message("not HTTP", b"canary-7Qz1\r\n\r\n", broken()),
    Message("HTTP/0.9", b"<html>canary-7Qz1</html>", broken()),
    Message("a request", b"GET / HTTP/1.1\r\n\r\n", broken()),
    Message("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", broken()),
    Message("HTTP/3.7", b"HTTP/3.7 200 OK\r\n\r\n", broken()),
    Message("TLS", b"\x15\x03\x01\x00\x02\x02\x16", broken()),
    Message("unasked 101", ok(b"Upgrade: x\r\nConnection: upgrade\r\n", CANARY, status=b"101 Switching"), broken()),
    Message("101 without upgrade", ok(b"", CANARY, status=b"101 Switching"), broken()),
    *map(status, ["099 x", "600 x", "999 x", "000 x", "2000 x", "99 x", "2x0 x", "-20 x"]),
    Message("endless interims", b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, broken()),
    Message("too many lines", ok(b"X: y\r\n" * http1.MAX_HEADER_LINES + FIVE, b"hello"), broken()),
    Message("10 000 lines", ok(b"X: canary-7Qz1\r\n" * 10_000 + FIVE, b"hello"), broken()),
    Message("a long value", ok(b"X: " + b"a" * (http1.MAX_HEADER_BYTES + 1) + b"\r\n" + FIVE, b"hello"), broken()),
    Message("long values", ok((b"X: " + b"a" * 1000 + b"\r\n") * 300 + FIVE, b"hello"), broken()),
]  # fmt: skip

CORPUS = [*GOOD, *UNTIL_CLOSED, *STRAY, *TRUNCATED, *BROKEN]


def named(messages: list[Message]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("message", messages, ids=lambda message: message.name.replace(" ", "-"))


@named(CORPUS)
def test_one_verdict_however_it_is_cut(message: Message) -> None:
    large = len(message.data) > 20_000
    if large:
        assert read(pieces(message.data, range(0, len(message.data), 1000)), message.method) == message.verdict
        assert read([message.data], message.method) == message.verdict
        return
    for how, parts in cuttings(message.data, rounds=20):
        assert read(parts, message.method) == message.verdict, how


@named([message for message in CORPUS if len(message.data) < 2000])
def test_one_verdict_at_every_single_cut(message: Message) -> None:
    for cut in range(len(message.data)):
        assert read(pieces(message.data, [cut]), message.method) == message.verdict, cut


@named(GOOD)
@pytest.mark.parametrize("junk", [b"X", b"\r\n", b"HELLO", ok(FIVE, b"hello"), b"HTTP/1.1 101 x\r\n\r\n", b"\0" * 9])
def test_junk_behind_a_response_costs_the_connection_and_nothing_else(message: Message, junk: bytes) -> None:
    expected = message.verdict._replace(reusable=False)
    assert read([message.data, junk], message.method) == expected
    assert read([*byte_by_byte(message.data), junk], message.method) == expected
    behind = read([message.data + junk], message.method)
    # Empty lines between messages are nobody's (RFC 9112 section 2.2); llhttp drops what follows a `close`.
    assert behind._replace(reusable=False) == expected
    if junk.strip():
        assert not behind.reusable


@law(60)
@given(st.lists(st.sampled_from(GOOD), min_size=2, max_size=5), CUTS)
def test_responses_follow_one_another_on_a_connection(messages: list[Message], cuts: list[int]) -> None:
    reader = ResponseReader()
    for message in messages:
        assert reader.reusable
        assert read(at_cuts(message.data, cuts), message.method, reader) == message.verdict
        if not message.verdict.reusable:
            reader = ResponseReader()


@named(UNTIL_CLOSED)
def test_without_framing_whatever_comes_is_body(message: Message) -> None:
    expected = message.verdict._replace(body=message.verdict.body + b"\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
    for how, parts in cuttings(message.data + b"\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"):
        assert read(parts, message.method) == expected, how


@law(300)
@given(st.sampled_from([message for message in CORPUS if len(message.data) < 500]), st.data(), CUTS)
def test_damaged_messages_have_one_verdict_too(message: Message, data: st.DataObject, cuts: list[int]) -> None:
    """A byte changed, lost or doubled: whatever that means, it means the same at every cut."""
    text = bytearray(message.data or b"x")
    at = data.draw(st.integers(0, len(text) - 1))
    match data.draw(st.sampled_from(["change", "lose", "double"])):
        case "change":
            text[at] = data.draw(st.sampled_from(b"\r\n\0 :;,0aZ\xff"))
        case "lose":
            del text[at]
        case "double":
            text.insert(at, text[at])
    whole = read([bytes(text)], message.method)
    assert read(at_cuts(bytes(text), cuts), message.method) == whole
    assert read(byte_by_byte(bytes(text)), message.method) == whole


@law(200)
@given(st.binary(max_size=100), st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", ok(CHUNKED), ok(FIVE)]), CUTS)
def test_any_bytes_have_one_verdict(junk: bytes, before: bytes, cuts: list[int]) -> None:
    whole = read([before + junk])
    assert read(at_cuts(before + junk, cuts)) == whole


def test_bytes_that_answer_no_request() -> None:
    reader = ResponseReader()
    assert reader.reusable
    progress = reader.feed(b"HTTP/1.1 408 " + CANARY)
    assert progress.error is not None
    assert_silent(progress.error)
    assert not reader.reusable
    assert reader.eof() is False


def test_what_the_head_says() -> None:
    reader = ResponseReader()
    reader.expect("GET")
    head = reader.feed(ok(b"X-One:  a b \r\nx-one: c\r\nEmpty:\r\n" + FIVE)).head
    assert head is not None
    assert (head.status, head.framing, head.length) == (200, "length", 5)
    assert list(head.headers) == [(b"X-One", b"a b"), (b"x-one", b"c"), (b"Empty", b""), (b"Content-Length", b"5")]


@pytest.mark.parametrize(
    ("data", "method", "framing"),
    [
        (ok(FIVE), "GET", "length"),
        (ok(CHUNKED), "GET", "chunked"),
        (ok(b""), "GET", "close"),
        (ok(FIVE), "HEAD", "none"),
        (ok(FIVE, status=b"304 x"), "GET", "none"),
        (ok(b"", status=b"204 x"), "GET", "none"),
    ],
)
def test_framings(data: bytes, method: str, framing: str) -> None:
    reader = ResponseReader()
    reader.expect(method)
    head = reader.feed(data).head
    assert head is not None
    assert head.framing == framing


def test_interims_and_trailers_are_not_the_response() -> None:
    reader = ResponseReader()
    reader.expect("GET")
    progress = reader.feed(
        b"HTTP/1.1 103 x\r\nX: interim\r\n\r\n" + ok(b"Y: final\r\n" + CHUNKED, b"1\r\na\r\n0\r\nZ: trailer\r\n\r\n")
    )
    assert progress.head is not None
    assert [name for name, _ in progress.head.headers] == [b"Y", b"Transfer-Encoding"]


@pytest.mark.parametrize(
    "beginning",
    [
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 103 x\r\n\r\nHTTP/1.1 200 OK\r\nX: ",
        ok(CHUNKED, b"1\r\na\r\n0\r\nX: "),
        ok(CHUNKED, b"1\r\na\r\n0\r\n"),
    ],
    ids=["value", "name", "value behind an interim", "trailer value", "trailer name"],
)
def test_a_line_that_never_ends_is_not_collected(beginning: bytes) -> None:
    """The limits hold while a line still grows; a peer must not fill the memory with it."""
    reader = ResponseReader()
    reader.expect("GET")
    assert reader.feed(beginning).error is None
    for _ in range(64):
        error = reader.feed(b"a" * 16384).error
        if error is not None:
            assert_silent(error)
            return
    pytest.fail(f"{64 * 16384} bytes of one line were collected; the limit is {http1.MAX_HEADER_BYTES}")


ODD = [
    b"Content-Length : 2\r\n", b" Content-Length: 2\r\n", b"Content-Length: +2\r\n", b"Content-Length: 2 \r\n",
    b"Content-Length: 2\r\ncontent-length: 2\r\n", b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
    b"Content-Length: 2\r\nX: a\nY: b\r\n", b"Content-Length: 2\r\nX: a\r Y: b\r\n", b"Content-Length: 2\r\n X: a\r\n",
    b"Content-Length: 2\r\nX: \0\r\n", b"Content-Length: 2\r\nno colon\r\n", b"Content-Length: 2\r\n: empty\r\n",
    b"Content-Length: 2\r\nX Y: a\r\n", b"Content-Length: 2\r\nConnection: close\r\n", b"Content-Length: 02\r\n",
    b"Content-Length: 2\r\nUpgrade: h2c\r\n", b"Content-Length: 2\r\nX: a \r\n", b"Content-Length: 2\r\nX:\r\n",
    b"Content-Length: 2\r\nX:\ta\tb\r\n", b"Content-Length: 2\r\nX: \xe4\xff\r\n", b"Content-Length: 2\r\nX: \x7f\r\n",
]  # fmt: skip


@pytest.mark.parametrize("lines", ODD)
@pytest.mark.parametrize("body", [b"ok", b"o", b"ok!"])
def test_a_glance_at_a_whole_response_sees_what_the_parser_sees(lines: bytes, body: bytes) -> None:
    read([ok(lines, body)])


def test_most_whole_responses_and_most_events_are_read_at_a_glance() -> None:
    reader = ResponseReader()
    reader.expect("POST")
    head, body = reader.whole(ok(b"Content-Length: 2\r\nX-A: b\r\nConnection: keep-alive\r\n", b"ok")) or (None, b"")
    assert head is not None
    assert (head.fields[b"x-a"], body, reader.reusable) == (b"b", b"ok", True)
    reader.expect("POST")
    assert reader.feed(ok(CHUNKED)).head is not None
    for _ in range(2):
        assert reader.chunk(b"3\r\nabc\r\n") == b"abc"
        assert reader.chunk(b"3\r\nab") is None
        assert reader.feed(b"3\r\nab").body == b"ab"
        assert reader.chunk(b"1\r\nx\r\n") is None  # amid a chunk that is what it holds
        assert reader.feed(b"c\r\n").body == b"c"
    assert reader.chunk(b"0\r\n\r\n") is None
    assert reader.feed(b"0\r\n\r\n").ended
    assert reader.reusable


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=6), st.data(), CUTS)
def test_chunks_however_they_are_cut_and_whatever_is_put_between(
    texts: list[bytes], data: st.DataObject, cuts: list[int]
) -> None:
    framed = [b"%x\r\n%b\r\n" % (len(text), text) for text in texts]
    odd = data.draw(
        st.sampled_from([b"", b"\r\n", b"1;a=b\r\nx\r\n", b"0x1\r\nx\r\n", b"1 \r\nx\r\n", b"2\r\nx\r\n", b"1\nx\n"])
    )
    framed.insert(data.draw(st.integers(0, len(framed))), odd)
    read([ok(CHUNKED), *framed, b"0\r\n\r\n"])
    read(pieces(b"".join([ok(CHUNKED), *framed, b"0\r\n\r\n"]), cuts))


def test_a_request_head() -> None:
    lines = [b"A: b\r\n", b"Content-Length: 0\r\n"]
    head = b"POST /v1/x?y=%2F HTTP/1.1\r\nHost: [::1]:8\r\nA: b\r\nContent-Length: 0\r\n"
    assert request_head("POST", b"/v1/x?y=%2F", b"[::1]:8", *lines) == head
