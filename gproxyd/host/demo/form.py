"""multipart/form-data (RFC 7578) read as it arrives: files are hashed, and kept only while they are small.

Invariants: between two calls of `feed`, `_buffer` holds less than one delimiter, or the unfinished head of one part;
bytes of a value are counted and hashed exactly once, in order.
"""

from __future__ import annotations

import hashlib
from email.message import Message
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value

KEEP = 1 << 20
"""Bytes of a part, or of a whole body, that are kept beside its length and hash."""


class Part:
    """One field: its name, its file name if it is a file, its size and hash, and its bytes up to `KEEP`."""

    def __init__(self, head: bytes) -> None:
        message = HeaderParser().parsestr(head.decode("utf-8", "replace").strip())
        self.name = _parameter(message, "name") or ""
        self.filename = _parameter(message, "filename")
        self.content_type = message.get_content_type() if "content-type" in message else "text/plain"
        self.size = 0
        self.kept = bytearray()
        self._hash = hashlib.sha256()

    def add(self, data: bytes) -> None:
        """Take the next bytes of the value."""
        self.size += len(data)
        self._hash.update(data)
        self.kept += data[: KEEP - len(self.kept)]

    @property
    def sha256(self) -> str:
        """The hash of the whole value, in hex."""
        return self._hash.hexdigest()

    @property
    def text(self) -> str:
        """The value of a plain field."""
        return self.kept.decode("utf-8", "replace")


class FormReader:
    """Feed it a body in pieces of any size; `parts` holds what was found so far, `complete` says it ended well."""

    def __init__(self, boundary: bytes) -> None:
        self.parts: list[Part] = []
        self.complete = False
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter has no line before it; lend it the CRLF that all others have.
        self._buffer = bytearray(b"\r\n")
        self._in_head = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body; an epilogue is ignored."""
        self._buffer += data
        while not self.complete and (self._read_head() if self._in_head else self._read_value()):
            pass

    def _read_value(self) -> bool:
        found = self._buffer.find(self._delimiter)
        certain = found if found >= 0 else max(0, len(self._buffer) - len(self._delimiter) + 1)
        if self.parts:
            self.parts[-1].add(bytes(self._buffer[:certain]))
        del self._buffer[:certain]
        if found >= 0:
            del self._buffer[: len(self._delimiter)]
            self._in_head = True
        return found >= 0

    def _read_head(self) -> bool:
        if self._buffer.startswith(b"--"):
            self.complete = True
            return False
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        self.parts.append(Part(bytes(self._buffer[:end])))
        del self._buffer[: end + 4]
        self._in_head = False
        return True


def _parameter(message: Message, name: str) -> str | None:
    value = message.get_param(name, header="content-disposition")
    return None if value is None else collapse_rfc2231_value(value)
