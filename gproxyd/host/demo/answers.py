"""What a face hands back: a head and the pieces of a body, before controls shape them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

Object = dict[str, Any]
"""A JSON object."""

SSE_TYPE = "text/event-stream; charset=utf-8"


class VendorError(Exception):
    """The vendor refuses: a status and a sentence, put into the dialect of the path by `errors.render`."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. `pieces` of a streamed one are its events; a plain one has a single piece.

    `error` makes the dialect's error event, given how many events went before. `chunked` leaves the length of a
    plain body unannounced, as vendors do for audio.
    """

    pieces: Iterable[bytes]
    content_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    streamed: bool = False
    chunked: bool = False
    error: Callable[[int], bytes] | None = None


def json(value: object, *, status: int = 200, indent: bool = False, headers: Mapping[str, str] | None = None) -> Answer:
    """A JSON body; `indent` as OpenAI and Gemini print theirs."""
    body = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else 0)
    return Answer((body,), "application/json", status, headers or {})


def pretty(value: object) -> Answer:
    """A JSON body the way OpenAI and Gemini send it: indented by two spaces."""
    return json(value, indent=True)


def plain(data: bytes, content_type: str, *, chunked: bool = False) -> Answer:
    """A body of any other kind."""
    return Answer((data,), content_type, chunked=chunked)


def stream(events: Iterable[bytes], error: Callable[[int], bytes], content_type: str = SSE_TYPE) -> Answer:
    """A streamed body, one piece for each event."""
    return Answer(events, content_type, headers={"cache-control": "no-cache"}, streamed=True, error=error)


def sse(value: object, eol: bytes, event: str | None = None) -> bytes:
    """One event of a stream (WHATWG HTML, 9.2.5): an optional `event` line, `data`, a blank line."""
    data = value if isinstance(value, bytes) else orjson.dumps(value)
    name = b"" if event is None else b"event: " + event.encode() + eol
    return name + b"data: " + data + eol + eol
