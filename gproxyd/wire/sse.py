"""Server-sent events as bytes: where an event ends, and how one is written.

Source: the HTML Living Standard, section 9.2.6. A line ends in CRLF, LF or CR and in nothing else (U+2028 and its
kin are data); an empty line ends an event.
"""

from __future__ import annotations

import re

# `(?>..)` takes CRLF whole: backtracking would otherwise see an empty line between its CR and its LF.
LINE_PIECE = re.compile(rb"([^\r\n]*)((?>\r\n|\n|\r)?)")
"""A piece of a line and its end, if that has come. Matches empty at the end of the data."""

_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")

BOM = b"\xef\xbb\xbf"


def end_of_events(data: bytes, start: int = 0) -> int:
    """The offset behind the last complete event in `data`, or 0. `start` is where searching may begin."""
    if data.endswith(b"\n\n"):
        return len(data)
    if b"\r" not in data:
        return data.rfind(b"\n\n", start) + 2 if b"\n\n" in data[start:] else 0
    end = 0
    for match in _EVENT_END.finditer(data, start):
        end = match.end()
    return end


def event(data: bytes, name: str | None = None) -> bytes:
    """One event with one line of data."""
    head = b"event: %b\n" % name.encode("ascii") if name else b""
    return b"%bdata: %b\n\n" % (head, data)
