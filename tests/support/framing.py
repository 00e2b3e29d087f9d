"""Requests that two servers might read in two ways, and what this gateway makes of each.

Every message is bytes. Its verdict says how many requests the upstream sees, what the client is told, and whether the
connection goes on. The two parsers of aiohttp may differ where both are safe; then `python` is the verdict of the one
in Python, and `why` says what it is that only one of them minds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY

CRLF = b"\r\n"
HOST = b"Host: gateway.test\r\n"
KEY = b"Authorization: Bearer %b\r\n" % CLIENT_KEY.encode()
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHAT = b"/openai-main/v1/chat/completions"
FILES = b"/openai-main/v1/files"
FIVE = b"{   }"
"""A body of five bytes that is whole JSON, so that every endpoint takes it."""

SMUGGLED = b"GET /openai-main/v1/files/smuggled HTTP/1.1\r\n%b%b\r\n" % (HOST, KEY)
"""A request that would be answered, were it not inside of another one."""

LAST = b"GET /healthz HTTP/1.1\r\nHost: gateway.test\r\nConnection: close\r\n\r\n"


class Seen(NamedTuple):
    """A request as the upstream must see it."""

    method: str
    target: bytes
    body: bytes = b""


class Verdict(NamedTuple):
    """`statuses` of the answers in their order; `seen` upstream; whether another request may follow.

    `lingers`: the gateway looks for the rest of a body that it does not want before it ends the connection.
    """

    statuses: tuple[int, ...]
    seen: tuple[Seen, ...] = ()
    goes_on: bool = False
    lingers: bool = False


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    verdict: Verdict
    python: Verdict | None = None
    why: str = ""

    def by(self, parser: str) -> Verdict:
        return self.python if parser == "python" and self.python is not None else self.verdict


MALFORMED = Verdict((400,))
TOO_LARGE = Verdict((431,))
GET_SEEN = Seen("GET", b"/v1/files/f")
GET_PASSES = Verdict((200,), (GET_SEEN,), goes_on=True)


def passes(target: bytes = CHAT, body: bytes = FIVE, *, goes_on: bool = True) -> Verdict:
    return Verdict((200,), (Seen("POST", target.removeprefix(b"/openai-main"), body),), goes_on)


def post(lines: bytes, body: bytes = b"", *, target: bytes = CHAT, version: bytes = b"HTTP/1.1") -> bytes:
    return b"POST %b %b\r\n%b%b%b%b\r\n%b" % (target, version, HOST, KEY, JSON, lines, body)


def get(lines: bytes = b"", *, line: bytes = b"GET /openai-main/v1/files/f HTTP/1.1", host: bytes = HOST) -> bytes:
    return b"%b\r\n%b%b%b\r\n" % (line, host, KEY, lines)


def bad(name: str, data: bytes, python: Verdict | None = None, why: str = "") -> Case:
    return Case(name, data, MALFORMED, python, why)


def length(value: bytes, body: bytes = FIVE) -> bytes:
    return post(b"Content-Length: %b\r\n" % value, body)


def coding(value: bytes) -> bytes:
    return post(b"Transfer-Encoding: %b\r\n" % value, b"5\r\n%b\r\n0\r\n\r\n" % FIVE)


def field(line: bytes) -> bytes:
    return get(line + CRLF)


def chunks(data: bytes, target: bytes = CHAT) -> bytes:
    return post(CHUNKED, data, target=target)


FIVE_CHUNKED = b"5\r\n%b\r\n0\r\n\r\n" % FIVE
TOO_LONG = Verdict((413,), lingers=True)

TWO_FRAMINGS = [
    bad("a length, then chunked", post(b"Content-Length: 6\r\n" + CHUNKED, b"0\r\n\r\nX")),
    bad("chunked, then a length", post(CHUNKED + b"Content-Length: 6\r\n", b"0\r\n\r\nX")),
    bad(
        "chunked, a length, and a request behind it", post(CHUNKED + b"Content-Length: 4\r\n", b"0\r\n\r\n" + SMUGGLED)
    ),
    bad(
        "a length over a request",
        post(b"Content-Length: %d\r\n" % (5 + len(SMUGGLED)) + CHUNKED, b"0\r\n\r\n" + SMUGGLED),
    ),
    bad("a length of nothing and chunked", post(b"Content-Length: 0\r\n" + CHUNKED, FIVE_CHUNKED)),
    bad("an empty coding and a length", post(b"Transfer-Encoding:\r\nContent-Length: 5\r\n", FIVE)),
    bad("an empty coding and a request behind it", post(b"Transfer-Encoding:\r\n", SMUGGLED)),
    bad("identity and a length", post(b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n", FIVE)),
    bad("an unknown coding and a length", post(b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n", FIVE)),
    bad("two lengths", post(b"Content-Length: 5\r\nContent-Length: 6\r\n", FIVE)),
    bad("the same length twice", post(b"Content-Length: 5\r\nContent-Length: 5\r\n", FIVE)),
    bad("the same length twice, in two cases", post(b"Content-Length: 5\r\ncontent-length: 5\r\n", FIVE)),
    bad("no length and a good one", post(b"Content-Length:\r\nContent-Length: 5\r\n", FIVE)),
    bad("a good length and none", post(b"Content-Length: 5\r\nContent-Length:\r\n", FIVE)),
    bad("chunked twice", post(CHUNKED + CHUNKED, FIVE_CHUNKED)),
    bad("chunked and something else in two lines", post(CHUNKED + b"Transfer-Encoding: identity\r\n", FIVE_CHUNKED)),
]

BROKEN_LENGTHS = [
    b"5, 5", b"5,6", b"5,", b",5", b"5 5", b"+5", b"-1", b"-0", b"0x5", b"0o5", b"5_0", b'"5"', b"1e1", b"5.0", b"5;",
    b"a", "٥".encode(), "²".encode(), b"\xb2", b"", b" ", b"5\x0b", b"5\x0c", b"5\0", b"\x0b5",
]  # fmt: skip

LENGTHS = [
    *(bad(f"a length of {value!r}", length(value)) for value in BROKEN_LENGTHS),
    bad("a length of 2**64", length(b"18446744073709551616"), TOO_LONG, "a number without bound is merely too long"),
    bad("a length of forty digits", length(b"9" * 40), TOO_LONG, "a number without bound is merely too long"),
    bad("a length of five thousand digits", length(b"9" * 5000)),
    Case("a length of 2**64 - 1", length(b"18446744073709551615"), Verdict((413,)), TOO_LONG, "it waits for the body"),
    Case("a length of 2**63", length(b"9223372036854775808"), TOO_LONG),
    Case("a length with zeros in front", length(b"0005"), passes()),
    Case("a length with spaces around", length(b" \t5 \t"), passes()),
    Case("a length in capitals", post(b"CONTENT-LENGTH: 5\r\n", FIVE), passes()),
]

BROKEN_CODINGS = [
    b"xchunked", b"chunkedx", b"chunked, identity", b"identity", b"gzip", b"gzip, chunked", b"chunked, chunked",
    b",chunked", b", chunked", b"chunked,", b"chunked ,", b"\x0bchunked", b"chunked\x0c", b"chunked\0",
    b"chunked\x01", "chun\u212aed".encode(), b"chunked;q=1", b'"chunked"', b"", b"chunked chunked",
    b"identity, chunked",
]  # fmt: skip

CODINGS = [
    *(bad(f"a coding of {value!r}", coding(value)) for value in BROKEN_CODINGS),
    bad("a space before the colon of the coding", post(b"Transfer-Encoding : chunked\r\n", FIVE_CHUNKED)),
    bad("a tab before the colon of the coding", post(b"Transfer-Encoding\t: chunked\r\n", FIVE_CHUNKED)),
    bad("a space before the name of the coding", post(b"X: y\r\n Transfer-Encoding: chunked\r\n", FIVE_CHUNKED)),
    bad("a folded coding", post(b"Transfer-Encoding:\r\n chunked\r\n", FIVE_CHUNKED)),
    bad("chunked in HTTP/1.0", post(CHUNKED, FIVE_CHUNKED, version=b"HTTP/1.0")),
    bad(
        "chunked in HTTP/1.0 that asks to be kept",
        post(CHUNKED + b"Connection: keep-alive\r\n", FIVE_CHUNKED, version=b"HTTP/1.0"),
    ),
    Case(
        "an underscore in the name of the coding",
        post(b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n", FIVE),
        passes(),
    ),
    Case("chunked in capitals", coding(b"CHUNKED"), passes()),
    Case("chunked behind spaces", coding(b" \t chunked"), passes()),
    Case("chunked before spaces", coding(b"chunked  "), passes()),
    bad("chunked before a tab", coding(b"chunked\t"), passes(), "white space before a line end means nothing"),
]

FOLDED = [
    bad("a folded line", field(b"X-Y: a\r\n b")),
    bad("a line folded with a tab", field(b"X-Y: a\r\n\tb")),
    bad("a folded key", get(b"", host=HOST + b"Authorization: Bearer\r\n %b\r\n" % CLIENT_KEY.encode())),
    bad("a folded Host", get(host=b"Host: gateway.test\r\n .evil.example\r\n")),
    bad("a folded line of spaces", field(b"X-Y: a\r\n  ")),
]

LINE_ENDS = [
    bad("LF behind the request line", get().replace(b" HTTP/1.1\r\n", b" HTTP/1.1\n")),
    bad("LF behind a header", get().replace(HOST, b"Host: gateway.test\n")),
    bad("LF behind the last header", get(b"X-Y: z\n")),
    bad("LF everywhere", get().replace(CRLF, b"\n")),
    bad("LF behind the head", get()[:-2] + b"\n"),
    bad("CR behind the request line", get().replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r")),
    bad("CR behind a header", get().replace(HOST, b"Host: gateway.test\r")),
    bad("CR everywhere", get().replace(CRLF, b"\r")),
    bad("CR CR LF behind the request line", get().replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\r\n")),
    bad("CR CR LF behind a header", get().replace(HOST, b"Host: gateway.test\r\r\n")),
    bad("CR CR LF behind the head", get()[:-2] + b"\r\r\n"),
    bad("CR in a value", field(b"X-Y: a\rTransfer-Encoding: chunked")),
    bad("LF in a value", field(b"X-Y: a\nTransfer-Encoding: chunked")),
    bad("LF behind the size of a chunk", chunks(b"5\n%b\r\n0\r\n\r\n" % FIVE)),
    bad("CR behind the size of a chunk", chunks(b"5\r%b\r\n0\r\n\r\n" % FIVE)),
    bad("CR CR LF behind the size of a chunk", chunks(b"5\r\r\n%b\r\n0\r\n\r\n" % FIVE)),
    bad("LF behind the data of a chunk", chunks(b"5\r\n%b\n0\r\n\r\n" % FIVE)),
    bad("CR behind the data of a chunk", chunks(b"5\r\n%b\r0\r\n\r\n" % FIVE)),
    bad("LF behind the last chunk", chunks(b"5\r\n%b\r\n0\n\r\n" % FIVE)),
    bad("LF behind a trailer", chunks(b"5\r\n%b\r\n0\r\nX-T: 1\n\r\n" % FIVE)),
    bad("LF at the very end of chunks", chunks(b"5\r\n%b\r\n0\r\nX-T: 1\r\n\n" % FIVE)),
    Case("empty lines in front", b"\r\n\r\n" + get(), GET_PASSES),
    Case(
        "LF in front", b"\n" + get(), GET_PASSES, MALFORMED, "an empty line may have lost its CR (RFC 9112 section 2.2)"
    ),
]

FIELDS = [
    bad("a space before the colon", field(b"X-Y : z")),
    bad("a tab before the colon", field(b"X-Y\t: z")),
    bad("a space before the colon of the length", post(b"Content-Length : 5\r\n", FIVE)),
    bad("a space before the colon of the key", get(host=HOST + b"Authorization : Bearer x\r\n")),
    bad("no colon", field(b"X-Y")),
    bad("no name", field(b": z")),
    bad("a space instead of a name", field(b" : z")),
    bad("a space before the first header", get(host=b" " + HOST)),
    bad("a tab before the first header", get(host=b"\t" + HOST)),
    bad("a tab in a name", field(b"X\tY: z")),
    bad("a name beyond ASCII", field("X-Ü: z".encode())),
    bad("a byte beyond ASCII in a name", field(b"X-\xff: z")),
    *(bad(f"{chr(byte)!r} in a name", field(b"X%cY: z" % byte)) for byte in b'\0\x01\x0b\x7f"(),/;<=>?@[\\]{}'),
    *(
        bad(f"byte {byte} in a value", field(b"X-Y: a%cb" % byte))
        for byte in (*range(9), *range(11, 13), *range(14, 32), 127)
    ),
    Case("bytes beyond ASCII in a value", field(b"X-Y: \xff\xc3\xbc"), GET_PASSES),
    Case("an empty value", field(b"X-Y:"), GET_PASSES),
    Case("a tab in a value", field(b"X-Y: a\tb"), GET_PASSES),
    Case("every character of a token in a name", field(b"!#$%&'*+-.^`|~09azAZ: z"), GET_PASSES),
]

SIZES = [
    b"0x5",
    b"+5",
    b"-5",
    b"5_0",
    b"5 ",
    b" 5",
    b"\t5",
    b"",
    b" ",
    "٥".encode(),
    b"g",
    b"5 5",
    b"5,",
    b"\x0b5",
    b"5\0",
    b"-0",
]
WAITS = Verdict(())


def broken_chunks(target: bytes) -> list[Case]:
    """Bodies that are no chunks, for an endpoint that reads them whole or one that passes them on as they come."""
    lies = {
        "seven bytes in a chunk of five": b"5\r\n{     }\r\n0\r\n\r\n",
        "four bytes in a chunk of five": b"5\r\n{  }\r\n0\r\n\r\n",
        "no line end behind the data": b"5\r\n%b0\r\n\r\n" % FIVE,
        "something else than a line end behind the data": b"5\r\n%bXX0\r\n\r\n" % FIVE,
        "no line end behind the data, and a request": b"5\r\n%b%b" % (FIVE, SMUGGLED),
        "a bad end of the last chunk": b"5\r\n%b\r\n0\r\nXX" % FIVE + CRLF,
        "a request instead of the end": b"5\r\n%b\r\n0\r\n%b" % (FIVE, SMUGGLED),
        "LF in an extension": b"5;a\nb\r\n%b\r\n0\r\n\r\n" % FIVE,
        "LF and a size in an extension": b"5;\n3c\r\n%b\r\n0\r\n\r\n" % FIVE,
        "LF in an extension of the last chunk": b"5\r\n%b\r\n0;\n\r\n\r\n" % FIVE,
        "a trailer without a colon": b"5\r\n%b\r\n0\r\nX-T\r\n\r\n" % FIVE,
        "a trailer with a space before its colon": b"5\r\n%b\r\n0\r\nX-T : 1\r\n\r\n" % FIVE,
        "a folded trailer": b"5\r\n%b\r\n0\r\nX-T: 1\r\n 2\r\n\r\n" % FIVE,
        "NUL in a trailer": b"5\r\n%b\r\n0\r\nX-T: \0\r\n\r\n" % FIVE,
        "two hundred trailers": b"5\r\n%b\r\n0\r\n%b\r\n" % (FIVE, b"X-T: 1\r\n" * 200),
        "a trailer of 20 kB": b"5\r\n%b\r\n0\r\nX-T: %b\r\n\r\n" % (FIVE, b"a" * 20_000),
    }
    where = " (streamed)" if target == FILES else ""
    lenient = {
        "CR in an extension": b"5;a\rb\r\n%b\r\n0\r\n\r\n" % FIVE,
        "NUL in an extension": b"5;a\0b\r\n%b\r\n0\r\n\r\n" % FIVE,
        "a bracket in an extension": b"5;a[b\r\n%b\r\n0\r\n\r\n" % FIVE,
        "a bare CR in an extension's string": b'5;a="\r"\r\n%b\r\n0\r\n\r\n' % FIVE,
    }
    return [
        *(
            bad(f"a chunk of {size!r}{where}", chunks(b"%b\r\n%b\r\n0\r\n\r\n" % (size, FIVE), target))
            for size in SIZES
        ),
        *(bad(name + where, chunks(data, target)) for name, data in lies.items()),
        *(
            bad(name + where, chunks(data, target), passes(target), "an extension is skipped up to its CRLF, unread")
            for name, data in lenient.items()
        ),
        bad(f"a chunk beyond all{where}", chunks(b"F" * 17 + b"\r\n" + FIVE, target), WAITS, "it waits for that much"),
    ]


def trailer(line: bytes) -> bytes:
    return chunks(b"5\r\n%b\r\n0\r\n%b\r\n\r\n" % (FIVE, line))


CHUNK_BODIES = [
    *broken_chunks(CHAT),
    *broken_chunks(FILES),
    Case("chunks", chunks(b"2\r\n{ \r\n3\r\n  }\r\n0\r\n\r\n"), passes()),
    Case("chunks of one byte", chunks(b"".join(b"1\r\n%c\r\n" % byte for byte in FIVE) + b"0\r\n\r\n"), passes()),
    Case("a size with zeros in front", chunks(b"0005\r\n%b\r\n00\r\n\r\n" % FIVE), passes()),
    Case("no data at all", chunks(b"0\r\n\r\n", FILES), passes(FILES, b"")),
    Case("an extension", chunks(b"5;a=b\r\n%b\r\n0;c\r\n\r\n" % FIVE), passes()),
    Case("an extension with a string", chunks(b'5;a="q\\"x;y"\r\n%b\r\n0\r\n\r\n' % FIVE), passes()),
    Case("an extension of 4 KiB", chunks(b"5;%b\r\n%b\r\n0\r\n\r\n" % (b"a" * 4096, FIVE)), passes()),
]

TRAILERS = [
    Case("a trailer", trailer(b"X-Trailer: t"), passes()),
    *(
        Case(f"the trailer {line.decode()}", trailer(line), passes())
        for line in (
            b"Authorization: Bearer ck-wrong",
            b"x-api-key: ck-wrong",
            b"x-gproxyd-provider: nobody",
            b"Expect: foo",
            b"Connection: close",
            b"Connection: x-kept",
            b"Cookie: a=b",
            b"X-Trailer: 1\r\nX-Trailer: 2",
        )
    ),
    bad("a length in a trailer", trailer(b"Content-Length: 5"), passes(), "a trailer is not looked at"),
]

SPACES = "words may be parted by more than one space (RFC 9112 section 3)"
TARGETS = [
    bad("no target", get(line=b"GET HTTP/1.1")),
    bad("an empty target", get(line=b"GET  HTTP/1.1")),
    Case(
        "two spaces before the target",
        get(line=b"GET  /openai-main/v1/files/f HTTP/1.1"),
        GET_PASSES,
        MALFORMED,
        SPACES,
    ),
    Case(
        "two spaces behind the target",
        get(line=b"GET /openai-main/v1/files/f  HTTP/1.1"),
        GET_PASSES,
        MALFORMED,
        SPACES,
    ),
    bad("a space in the target", get(line=b"GET /openai-main/v1/files/f g HTTP/1.1")),
    bad("a tab before the target", get(line=b"GET\t/openai-main/v1/files/f HTTP/1.1")),
    bad("a tab behind the target", get(line=b"GET /openai-main/v1/files/f\tHTTP/1.1")),
    bad("a space behind the version", get(line=b"GET /openai-main/v1/files/f HTTP/1.1 ")),
    bad("a space before the method", get(line=b" GET /openai-main/v1/files/f HTTP/1.1")),
    bad("another host", get(line=b"GET http://127.0.0.1:9/v1/models HTTP/1.1")),
    bad("another host, and Host agrees with neither", get(line=b"GET https://evil.example/v1/models HTTP/1.1")),
    bad("a user before the host", get(line=b"GET http://a:b@gateway.test/openai-main/v1/files/f HTTP/1.1")),
    bad("an authority for GET", get(line=b"GET gateway.test:443 HTTP/1.1")),
    bad("an asterisk for GET", get(line=b"GET * HTTP/1.1")),
    Case("this host", get(line=b"GET http://gateway.test/openai-main/v1/files/f HTTP/1.1"), GET_PASSES),
    Case("this host in capitals", get(line=b"GET HTTP://GATEWAY.TEST/openai-main/v1/files/f HTTP/1.1"), GET_PASSES),
    Case("an asterisk for OPTIONS", get(line=b"OPTIONS * HTTP/1.1"), Verdict((405,), goes_on=True)),
    Case(
        "CONNECT",
        get(line=b"CONNECT gateway.test:443 HTTP/1.1"),
        Verdict((405,)),
        Verdict((405,), lingers=True),
        "it takes what follows for a body",
    ),
    Case(
        "CONNECT to a path",
        get(line=b"CONNECT /openai-main/v1/files/f HTTP/1.1"),
        Verdict((405,)),
        Verdict((405,), lingers=True),
        "it takes what follows for a body",
    ),
    Case("TRACE", get(line=b"TRACE /openai-main/v1/files/f HTTP/1.1"), Verdict((405,))),
]

HOSTS = [
    bad("no Host", get(host=b"")),
    bad("Host twice, the same", get(host=HOST + HOST)),
    bad("Host twice, different", get(host=HOST + b"Host: evil.example\r\n")),
    bad("Host twice, in two cases", get(host=HOST + b"hOST: gateway.test\r\n")),
    bad("a space before the colon of Host", get(host=b"Host : gateway.test\r\n")),
    *(
        Case(f"the Host {value[:24]!r}", get(host=b"Host: %b\r\n" % value), GET_PASSES)
        for value in (
            b"",
            b"a,b",
            b"user@h",
            b"h/path",
            b"h:4000/#@evil.example",
            "bücher.example".encode(),
            b"\xff",
            b"a" * 8192,
            b"127.0.0.1:9",
            b"[::1",
            b"h:99999999",
            b"h h",
        )
    ),
    Case(
        "no Host in HTTP/1.0", get(line=b"GET /openai-main/v1/files/f HTTP/1.0", host=b""), Verdict((200,), (GET_SEEN,))
    ),
]

VERSIONS = [
    *(
        bad(f"version {version.decode()}", get(line=b"GET /openai-main/v1/files/f " + version))
        for version in (
            b"HTTP/0.9",
            b"HTTP/1.2",
            b"HTTP/01.1",
            b"HTTP/1.10",
            b"http/1.1",
            b"HTTP/2.0",
            b"HTTP/3",
            b"HTTP/1",
            b"HTTP/1,1",
            b"HTTP/11",
            b"HTTPS/1.1",
            b"HTTP /1.1",
            b"ICE/1.0",
            b"HTTP/1.1x",
        )
    ),
    Case(
        "RTSP/1.0",
        get(line=b"GET /openai-main/v1/files/f RTSP/1.0"),
        Verdict((200,), (GET_SEEN,)),
        MALFORMED,
        "the other one reads it as if it were HTTP/1.0",
    ),
    bad("HTTP/0.9", b"GET /openai-main/v1/files/f\r\n"),
    bad("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    bad("the preface of HTTP/2, and a frame", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0\r\n"),
    bad("TLS", bytes.fromhex("1603010200010001fc0303") + bytes(range(64)) + CRLF),
    bad("bytes of no meaning", bytes(range(128, 256)) + CRLF),
    bad("NUL", bytes(64) + CRLF),
    bad("an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    bad("SSH", b"SSH-2.0-OpenSSH_9.6\r\n"),
    bad("SMTP", b"EHLO gateway.test\r\n"),
    bad("a form's boundary", b"--frontier\r\nContent-Disposition: form-data\r\n\r\n"),
    Case("HTTP/1.0", get(line=b"GET /openai-main/v1/files/f HTTP/1.0"), Verdict((200,), (GET_SEEN,))),
]

LOWER = Verdict((200,), (GET_SEEN,), goes_on=True)
METHODS = [
    bad(
        "get", get(line=b"get /openai-main/v1/files/f HTTP/1.1"), LOWER, "it takes a method in any case, and means GET"
    ),
    bad(
        "GeT", get(line=b"GeT /openai-main/v1/files/f HTTP/1.1"), LOWER, "it takes a method in any case, and means GET"
    ),
    bad("a method of marks", get(line=b'G=":<>(e) /openai-main/v1/files/f HTTP/1.1')),
    bad("a method beyond ASCII", get(line="GÉT /openai-main/v1/files/f HTTP/1.1".encode())),
    bad("a method with NUL", get(line=b"G\0T /openai-main/v1/files/f HTTP/1.1")),
    *(
        bad(
            f"an unknown method of {len(name)} letters",
            get(line=b"%b /v1/chat/completions HTTP/1.1" % name),
            Verdict((405,), goes_on=True),
            "it knows no list of methods",
        )
        for name in (b"FOO", b"A" * 1024)
    ),
    Case("PROPFIND", get(line=b"PROPFIND /v1/chat/completions HTTP/1.1"), Verdict((405,), goes_on=True)),
    Case("PUT where there is only POST", get(line=b"PUT /v1/chat/completions HTTP/1.1"), Verdict((405,), goes_on=True)),
    Case("another method in a header", get(b"X-HTTP-Method-Override: DELETE\r\nX-HTTP-Method: DELETE\r\n"), GET_PASSES),
]

UPGRADES = [
    *(
        Case(f"an upgrade to {name}{where}", message, Verdict((426,), lingers=bool(where)))
        for name in ("websocket", "h2c", "foo", "TLS/1.0", "websocket, h2c")
        for where, message in (
            ("", get(f"Connection: Upgrade\r\nUpgrade: {name}\r\n".encode())),
            (" that nobody nominates", get(f"Upgrade: {name}\r\n".encode())),
            (
                " with a request for a body",
                post(
                    b"Connection: Upgrade\r\nUpgrade: %b\r\nContent-Length: %d\r\n" % (name.encode(), len(SMUGGLED)),
                    SMUGGLED,
                ),
            ),
            (
                " with a request in a chunk",
                post(
                    b"Connection: Upgrade\r\nUpgrade: %b\r\n%b" % (name.encode(), CHUNKED),
                    b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
                ),
            ),
        )
    ),
    Case(
        "an upgrade with settings of HTTP/2",
        get(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"),
        Verdict((426,)),
    ),
]

BEHIND = [
    Case(
        "a request for a body",
        post(
            b"Content-Length: %d\r\nContent-Type: text/plain\r\n" % len(SMUGGLED),
            SMUGGLED,
            target=b"/proxy/openai-main/v1/x",
        ).replace(JSON, b""),
        Verdict((200,), (Seen("POST", b"/v1/x", SMUGGLED),), goes_on=True),
    ),
    Case("two requests", get() * 2, Verdict((200, 200), (GET_SEEN, GET_SEEN), goes_on=True)),
    Case(
        "one with a body, one without",
        length(b"5") + get(),
        Verdict((200, 200), (*passes().seen, GET_SEEN), goes_on=True),
    ),
    Case(
        "one that is refused, one that is not",
        get(line=b"GET /v1/nothing HTTP/1.1") + get(),
        Verdict((404, 200), (GET_SEEN,), goes_on=True),
    ),
    Case("no key, then a key", get().replace(KEY, b"") + get(), Verdict((401, 200), (GET_SEEN,), goes_on=True)),
    Case("a key, then none", get() + get().replace(KEY, b""), Verdict((200, 401), (GET_SEEN,), goes_on=True)),
    Case(
        "a body for GET",
        get(b"Content-Length: 5\r\n") + FIVE,
        Verdict((200,), (Seen("GET", b"/v1/files/f", FIVE),), goes_on=True),
    ),
    Case(
        "an expectation in HTTP/1.0",
        post(b"Expect: 100-continue\r\nContent-Length: 5\r\n", FIVE, version=b"HTTP/1.0"),
        passes(goes_on=False),
    ),
    Case("another expectation", get(b"Expect: 200-ok\r\n"), Verdict((417,))),
]

LINE, COUNT, TOTAL = 16 * 1024, 128, 64 * 1024
"""What the gateway takes: bytes of the target, bytes of a header, headers, bytes of all headers."""


def target_of(size: int) -> bytes:
    return b"/openai-main/v1/files/f?" + b"a" * (size - 24)


def seen_target(size: int) -> Verdict:
    return Verdict((200,), (Seen("GET", target_of(size).removeprefix(b"/openai-main")),), goes_on=True)


def filled(total: int) -> bytes:
    """Header lines of 8 KB at most that come to `total` bytes, names included."""
    lines = []
    while total > 8010:
        lines.append(b"X-Y: %b\r\n" % (b"a" * 7997))
        total -= 8000
    return b"".join(lines) + b"X-Y: %b\r\n" % (b"a" * (total - 3))


def large(name: str, data: bytes) -> Case:
    return Case(name, data, TOO_LARGE)


OWN = len(HOST + KEY) - 2 * len(b": \r\n")
LIMITS = [
    Case("a target of 8000 bytes", get(line=b"GET %b HTTP/1.1" % target_of(8000)), seen_target(8000)),
    Case("a target of 16 000 bytes", get(line=b"GET %b HTTP/1.1" % target_of(16_000)), seen_target(16_000)),
    large("a target that is too long", get(line=b"GET %b HTTP/1.1" % target_of(LINE + 1))),
    large("a target of 60 kB", get(line=b"GET %b HTTP/1.1" % target_of(60_000))),
    Case("a header of 16 000 bytes", field(b"X-Y: " + b"a" * 16_000), GET_PASSES),
    large("a header that is too long", field(b"X-Y: " + b"a" * (LINE + 1))),
    large("a name of 60 kB", field(b"a" * 60_000 + b": x")),
    bad("a method of 60 kB", b"A" * 60_000 + get(), TOO_LARGE, "it looks at the line's length first"),
    Case("126 headers", get(b"".join(b"X-%d: y\r\n" % at for at in range(COUNT - 4))), GET_PASSES),
    large("129 headers", get(b"".join(b"X-%d: y\r\n" % at for at in range(COUNT - 1)))),
    large("10 000 headers", get(b"X: y\r\n" * 10_000)),
    Case("headers of 64 KiB together", get(filled(TOTAL - OWN)), GET_PASSES),
    large("headers of 64 KiB and a byte together", get(filled(TOTAL - OWN + 1))),
    large("120 headers of 8 kB", get((b"X-Y: " + b"a" * 8000 + CRLF) * 120)),
]

GROUPS = {
    "two framings": TWO_FRAMINGS,
    "lengths": LENGTHS,
    "codings": CODINGS,
    "folded lines": FOLDED,
    "line ends": LINE_ENDS,
    "fields": FIELDS,
    "chunks": CHUNK_BODIES,
    "trailers": TRAILERS,
    "targets": TARGETS,
    "hosts": HOSTS,
    "versions": VERSIONS,
    "methods": METHODS,
    "upgrades": UPGRADES,
    "one behind another": BEHIND,
    "limits": LIMITS,
}
CORPUS = [case for group in GROUPS.values() for case in group]


def answers(data: bytes) -> list[Reply]:
    """Everything that came on a connection, one reply for each answer; interim ones are replies, too."""
    replies = []
    while data:
        head, mark, rest = data.partition(b"\r\n\r\n")
        assert mark and head.startswith(b"HTTP/1.1 "), data
        told = Reply(head + mark, "open").header("content-length")
        size = int(told) if told is not None else 0
        assert len(rest) >= size, data
        replies.append(Reply(head + mark + rest[:size], "open"))
        data = rest[size:]
    return replies


_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[\x21-\x7e]*) HTTP/1\.1")
_FIELD_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ((?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)"
)


class Sent(NamedTuple):
    """A request that a strict reader understands. `body` has no framing any more."""

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


def read_strictly(data: bytes) -> list[Sent]:
    """All requests on a connection to an upstream, by the letter of RFC 9112. Raises ValueError for anything else."""
    found = []
    while data:
        head, mark, data = data.partition(b"\r\n\r\n")
        if not mark:
            raise ValueError("a head without its end")
        first, *lines = head.split(CRLF)
        line = _REQUEST_LINE.fullmatch(first)
        fields = [_FIELD_LINE.fullmatch(each) for each in lines]
        if line is None or None in fields:
            raise ValueError(f"not a head: {head!r}")
        headers = [(match[1], match[2]) for match in fields if match]
        body, data = _body(headers, data)
        found.append(Sent(line[1].decode(), line[2], headers, body))
    return found


def _body(headers: list[tuple[bytes, bytes]], data: bytes) -> tuple[bytes, bytes]:
    lengths = [value for name, value in headers if name.lower() == b"content-length"]
    codings = [value for name, value in headers if name.lower() == b"transfer-encoding"]
    hosts = [value for name, value in headers if name.lower() == b"host"]
    if len(hosts) != 1 or len(lengths) + len(codings) > 1:
        raise ValueError(f"not one Host and one framing at most: {headers!r}")
    if lengths:
        size = int(lengths[0])
        if lengths[0] != b"%d" % size or len(data) < size:
            raise ValueError("a length that is none, or a body that is not whole")
        return data[:size], data[size:]
    if not codings:
        return b"", data
    if codings != [b"chunked"]:
        raise ValueError(f"an unknown coding: {codings!r}")
    body = []
    while True:
        told, mark, data = data.partition(CRLF)
        size = int(told, 16)
        if not mark or told != b"%x" % size or data[size : size + 2] != CRLF:
            raise ValueError("chunks that are none, or not whole")
        body.append(data[:size])
        data = data[size + 2 :]
        if not size:
            return b"".join(body), data
