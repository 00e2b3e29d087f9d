"""An HTTP/1.1 client's side of one connection, without the connection: bytes in, what they mean out.

Invariants:
- one response is read at a time, begun by `expect()`; bytes that come when none is expected are an error;
- a response is complete only if its own framing says so (RFC 9112 section 6.3); a peer that leaves early has
  truncated it, except where the framing *is* the end of the connection;
- `reusable` is true only after a complete response with no stray byte behind it.

The parser is llhttp (httptools) in its strict mode. It knows no HEAD, so the answer to one ends at its head and the
parser is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from gproxyd.errors import WireError
from gproxyd.types import RawHeaders
from gproxyd.wire.headers import Headers

MAX_HEADER_LINES = 512
MAX_HEADER_BYTES = 256 * 1024
MAX_INTERIM = 64

_PLAIN = b"HTTP/1.1 200 OK\r\n"
# A whole header line between two line ends; its value neither begins nor ends with white space.
_LINE = re.compile(rb"\n([!#$%&'*+.^_`|~0-9A-Za-z-]++):[ \t]*+((?>(?:[!-~\x80-\xff]++|[ \t]++(?!\r))*))\r(?=\n)")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,7})\r\n")
_KEPT_ALIVE = frozenset({b"keep-alive", b"Keep-Alive"})

_NO_FIELDS = Headers(())

BodyFraming = Literal["length", "chunked", "close", "none"]


class ResponseHead(NamedTuple):
    """Status and headers of a final response, as lines and by name. `length` is set where `framing` is "length"."""

    status: int
    headers: RawHeaders
    fields: Headers
    framing: BodyFraming
    length: int | None


class Progress(NamedTuple):
    """What one call of `feed` brought. `body` holds all body bytes of the call; `error` comes after what is good."""

    head: ResponseHead | None
    body: bytes
    ended: bool
    error: WireError | None


def request_head(method: str, target: bytes, authority: bytes, *lines: bytes) -> bytes:
    """The head of a request in origin-form, but for its end: more lines may follow. `lines` end in CRLF each."""
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b" % (method.encode("ascii"), target, authority, b"".join(lines))


class ResponseReader:
    """Reads the responses of one connection, one after another."""

    __slots__ = (
        "_body",
        "_chunk_over",
        "_chunked",
        "_ended",
        "_final",
        "_fresh",
        "_head",
        "_headers",
        "_interim",
        "_keep",
        "_length",
        "_method",
        "_parser",
        "_stray",
        "_telling",
        "_told",
        "between",
        "reusable",
    )

    def __init__(self) -> None:
        self._parser = HttpResponseParser(self)
        self._ended = True
        self._stray = False
        self._method = ""
        self.reusable = True
        self._fresh = False  # nothing of the response has come
        self.between = False  # the parser stands before a chunk's size

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._interim = 0
        self._keep = False
        self._length: int | None = None
        self._chunked = False
        self._chunk_over = False
        self._final = False
        self._head: ResponseHead | None = None
        self._told = False
        self._telling = 0  # bytes of heads, chunk sizes and trailers since anything came of them
        self._body: list[bytes] = []

    def expect(self, method: str) -> None:
        """Begins the response to a request of `method`. The one before must have ended."""
        assert self._ended
        assert not self._stray
        self._method = method
        self._ended = False
        self._fresh = True
        self.between = False
        self.reusable = False

    def whole(self, data: bytes) -> tuple[ResponseHead, bytes] | None:
        """A response that is here in one piece: 200, a length, no name twice, and no transfer coding. What most are.

        None for all others: they are for `feed`, which sees the same bytes as if nobody had looked. A peer that
        breaks the rules is one of them, for only what is plainly well-formed passes here.
        """
        if not self._fresh or self._method == "HEAD" or not data.startswith(_PLAIN):
            return None
        end = data.find(b"\r\n\r\n")
        lines = _LINE.findall(data, 16, end + 2)
        if len(lines) != data.count(b"\n", 17, end + 2):
            return None  # some line is not one
        fields = Headers(lines)
        size = len(data) - end - 4
        if not fields.plain or fields[b"content-length"] != b"%d" % size:
            return None
        if len(lines) > MAX_HEADER_LINES or end > MAX_HEADER_BYTES // 2:
            return None
        if b"connection" in fields and fields[b"connection"] not in _KEPT_ALIVE:
            return None
        self._fresh, self._ended, self.reusable = False, True, True
        return ResponseHead(200, lines, fields, "length", size), data[end + 4 :]

    def chunk(self, data: bytes) -> bytes | None:
        """What is in a chunk, if `data` is just one, and not the last: what most events come in.

        None for all else, which is for `feed`: its parser, between two chunks, is where it would be had it read this.
        """
        found = _CHUNK.match(data) if self.between else None
        if found is None:
            return None
        begin, size = found.end(), int(found[1], 16)
        if not size or len(data) != begin + size + 2 or not data.endswith(b"\r\n"):
            return None
        return data[begin:-2]

    def feed(self, data: bytes) -> Progress:
        """Takes what the peer sent. After an error nothing more may be fed."""
        if self._ended:
            self._stray, self.reusable = True, False
            return Progress(None, b"", False, WireError("bytes arrived that answer no request"))
        if self._fresh:
            self._fresh = False
            self._reset()
        error: WireError | None = None
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            error = WireError("the peer switched protocols unasked")
        except HttpParserError as broken:
            error = _own_error(broken)
        self.between = self._chunk_over and not self._ended and error is None and data.endswith(b"\r\n")
        if self._told and not self._ended and error is None and len(self._body) == 1:  # more of a body, nothing else
            body = self._body.pop()
            self._telling = 0
            return Progress(None, body, False, None)
        head = self._untold_head()
        body = b"".join(self._body) if len(self._body) != 1 else self._body[0]
        self._body.clear()
        self._telling = 0 if head is not None or body else self._telling + len(data)
        if self._telling > 2 * MAX_HEADER_BYTES and error is None:
            error = WireError("the response has a line without end")
        return self._progress(head, body, error)

    def _untold_head(self) -> ResponseHead | None:
        head = self._head
        if self._told or head is None:
            return None
        self._told = True
        self._headers, self._head = [], head._replace(headers=(), fields=_NO_FIELDS)  # a stream may stay for long
        return head

    def _progress(self, head: ResponseHead | None, body: bytes, error: WireError | None) -> Progress:
        if self._ended:  # the callbacks have seen the end; an error after it is about stray bytes
            self._finish(stray=error is not None)
            return Progress(head, body, True, None)
        return Progress(head, body, False, error)

    def _finish(self, *, stray: bool) -> None:
        self._stray = self._stray or stray
        self.reusable = self._keep and not self._stray
        if self._method == "HEAD" and self.reusable:
            self._parser = HttpResponseParser(self)

    def eof(self) -> bool:
        """The peer ended the connection: whether that completes the response. Raises WireError if it truncates it."""
        if self._ended:
            return False
        head = None if self._fresh else self._head
        if head is not None and head.framing == "close":
            self._ended = True
            return True
        where = "in the body" if head is not None else "before the head was complete"
        raise WireError(f"the connection ended {where} of the response")

    # What llhttp calls.

    def on_message_begin(self) -> None:
        if self._ended:
            self._stray = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._final:  # trailers say nothing that the gateway would believe or forward
            self._headers.append((name, value))

    def _read_headers(self) -> Headers:
        """What the lines of a complete head say of its framing."""
        if len(self._headers) > MAX_HEADER_LINES or sum(map(len, chain(*self._headers))) > MAX_HEADER_BYTES:
            raise WireError("the response head is too large")
        self._headers = [(name, value.strip(b" \t")) for name, value in self._headers]
        fields = Headers(self._headers)
        if b"content-length" in fields:
            self._length = _content_length(fields.all(b"content-length"))
        if b"transfer-encoding" in fields:
            if [value.lower() for value in fields.all(b"transfer-encoding")] != [b"chunked"]:
                raise WireError("the response has an unknown transfer coding")
            self._chunked = True
        return fields

    def on_headers_complete(self) -> None:
        if self._ended:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise WireError("the peer sends interim responses without end")
            return
        if not 200 <= status <= 599 or self._parser.get_http_version() not in ("1.1", "1.0"):
            raise WireError("the response has no valid status line")
        fields = self._read_headers()
        if self._chunked and self._length is not None:
            raise WireError("the response has two framings")
        self._final = True
        self._chunk_over = self._chunked
        self._head = ResponseHead(status, self._headers, fields, self._framing(status), self._length)
        if self._method == "HEAD":
            self._complete()

    def _complete(self) -> None:
        """Asked inside the callback: llhttp forgets a message's keep-alive as soon as it is over."""
        self._ended = True
        self._keep = self._parser.should_keep_alive()

    def _framing(self, status: int) -> BodyFraming:
        if self._method == "HEAD" or status in (204, 304):
            return "none"
        if self._chunked:
            return "chunked"
        return "close" if self._length is None else "length"

    def on_body(self, data: bytes) -> None:
        if self._ended:
            self._stray = True
        else:
            self._body.append(data)

    def on_chunk_header(self) -> None:
        self._chunk_over = False

    def on_chunk_complete(self) -> None:
        self._chunk_over = True

    def on_message_complete(self) -> None:
        if self._ended:
            return
        if self._final:
            self._complete()
        else:  # an interim response is over; the next head starts afresh
            self._headers = []
            self._length, self._chunked = None, False


def _content_length(values: Sequence[bytes]) -> int:
    """RFC 9110 section 8.6: once, and digits only. `int()` alone would take `1_0`, ` 5 ` and other scripts' digits."""
    if len(values) != 1 or not values[0].isdigit() or len(values[0]) > 18:
        raise WireError("the response has no valid length")
    return int(values[0])


def _own_error(error: HttpParserError) -> WireError:
    """llhttp's texts quote the peer, so only our own pass."""
    cause = error.__context__
    return cause if isinstance(cause, WireError) else WireError("the response is not valid HTTP/1.1")
