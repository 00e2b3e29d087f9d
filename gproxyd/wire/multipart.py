"""The `model` field of a form (multipart/form-data, RFC 7578) that is never held whole.

Invariants:
- the scanner keeps no more than one part's head, or one boundary's length of a part's body;
- a form has at most one `model`: two readers of a second one could see two different models.
"""

from __future__ import annotations

import re

from gproxyd.errors import Refusal

MAX_PARTS = 1000
MAX_PART_HEAD = 16 * 1024
MAX_VALUE = 512
MAX_BOUNDARY_LINE = 256

_BOUNDARY = re.compile(
    rb""";[ \t]*boundary=(?:"([^"\\]{1,70})"|([!#-'*+\-.0-9A-Z^_`a-z|~{}/:=?]{1,70}))[ \t]*(?=;|\Z)""", re.IGNORECASE
)
_ANY_BOUNDARY = re.compile(rb"[;\s]boundary\s*=", re.IGNORECASE)
_PARAMETER = rb"""[ \t]*;[ \t]*([!#-'*+\-.0-9A-Z^_`a-z|~]+)=(?:"((?>(?:[^"\\]|\\.)*))"|([^";\s]*+))"""
_DISPOSITION = re.compile(rb"content-disposition:[ \t]*form-data(?>(?:%b)*)[ \t;]*" % _PARAMETER, re.IGNORECASE)
_EACH_PARAMETER = re.compile(_PARAMETER)


def _names_model(head: bytes) -> bool:
    """Whether a part's head names the field `model`. Raises Refusal where another reader could see another name."""
    lines = head.split(b"\r\n")
    if any(line[:1] in (b" ", b"\t") for line in lines):
        raise _broken("a line of a part's head is folded")
    named = [line for line in lines if line[:19].lower() == b"content-disposition"]
    if not named:
        return False
    if len(named) > 1 or _DISPOSITION.fullmatch(named[0]) is None:
        raise _broken("the head of a part cannot be read in one way only")
    names = [quoted or plain for key, quoted, plain in _EACH_PARAMETER.findall(named[0]) if key.lower() == b"name"]
    starred = any(key.lower() == b"name*" for key, _, _ in _EACH_PARAMETER.findall(named[0]))
    if len(names) != 1 or starred or (b"\\" in names[0] and re.sub(rb"\\(.)", rb"\1", names[0]) == b"model"):
        raise _broken("the head of a part cannot be read in one way only")
    return bool(names[0] == b"model")


def boundary(content_type: bytes) -> bytes:
    """The boundary that a Content-Type names (RFC 2046 section 5.1.1: 1 to 70 characters). Raises Refusal."""
    if content_type.partition(b";")[0].strip().lower() != b"multipart/form-data":
        raise Refusal("unsupported_media_type", "this endpoint takes multipart/form-data")
    match = _BOUNDARY.search(content_type)
    if match is None or len(_ANY_BOUNDARY.findall(content_type)) > 1:
        raise Refusal("invalid_request", "the form has no valid boundary")
    return match[1] or match[2]


class FormScanner:
    """Reads a form as it passes. After the field has been met, `value` is its text and `span` where it stands."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._buffer = b"\r\n"  # so that the first boundary looks like all others
        self._offset = -2  # where the buffer begins, counted from the form's first byte
        self._step = self._preamble
        self._parts = 0
        self._value_at: int | None = None
        self.value: str | None = None
        self.span = (0, 0)
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Takes the next bytes. Raises Refusal for a form that breaks its rules."""
        if self.ended:
            return  # an epilogue means nothing (RFC 2046 section 5.1.1)
        self._buffer += data
        while self._step():
            pass

    def finish(self) -> None:
        """The form's bytes are all there. Raises Refusal if its last boundary is not."""
        if not self.ended:
            raise _broken("it has no closing boundary")

    def _drop(self, count: int) -> None:
        self._buffer = self._buffer[count:]
        self._offset += count

    def _preamble(self) -> bool:
        return self._to_delimiter()

    def _to_delimiter(self) -> bool:
        """Looks for the next boundary; what stands before it is a part's body."""
        found = self._buffer.find(self._delimiter)
        if found < 0:
            if self._value_at is None:
                self._drop(max(0, len(self._buffer) - len(self._delimiter)))
            elif len(self._buffer) > 2 + MAX_VALUE + len(self._delimiter):
                raise _broken("its field 'model' is too long")
            return False
        if self._value_at is not None:
            if found == 0:  # the blank line's own CRLF: there is no line for a value
                raise _broken("its field 'model' is empty")
            self._take_value(self._buffer[2:found])
        self._drop(found + len(self._delimiter))
        self._step = self._behind_delimiter
        return True

    def _take_value(self, value: bytes) -> None:
        if len(value) > MAX_VALUE:
            raise _broken("its field 'model' is too long")
        assert self._value_at is not None
        self.span = (self._value_at, self._value_at + len(value))
        self.value = value.decode("utf-8", "replace")
        self._value_at = None

    def _behind_delimiter(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer.startswith(b"--"):
            self.ended = True
            self._buffer = b""
            return False
        line = self._buffer.find(b"\r\n", 0, MAX_BOUNDARY_LINE)
        if line < 0 and len(self._buffer) < MAX_BOUNDARY_LINE:
            return False
        if line < 0 or self._buffer[:line].strip(b" \t"):
            raise _broken("something follows a boundary on its line")
        self._drop(line)
        self._step = self._part_head
        return True

    def _part_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_PART_HEAD)
        if end < 0:
            if len(self._buffer) >= MAX_PART_HEAD:
                raise _broken("the head of a part is too long")
            return False
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _broken("it has too many parts")
        head = self._buffer[2:end]
        # The blank line's own CRLF stays in the buffer: an empty body's boundary begins with it.
        self._drop(end + 2)
        if _names_model(head):
            if self.value is not None:
                raise _broken("it has more than one field 'model'")
            self._value_at = self._offset + 2
        self._step = self._to_delimiter
        return True


def _broken(text: str) -> Refusal:
    return Refusal("invalid_request", f"the form cannot be used: {text}")
