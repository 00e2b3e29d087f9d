"""Samples put together, and written as profile.proto or text.

The format is github.com/google/pprof/proto/profile.proto: a Profile holds samples; a sample has one value per sample
type, labels, and the ids of its locations, leaf first; a location is a line of a function; every string is an index
into one table whose first entry is empty. All numbers are varints, lists of them packed, the whole is gzip.

The value that matters most stands last: pprof shows the last one unless told otherwise, and so do other readers.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gproxyd.observe.pprof.stacks import Place, Stack


class ValueType(NamedTuple):
    """What is counted, and in what."""

    type: str
    unit: str


Labels = tuple[tuple[str, str], ...]

_MAPPING = 1
"""The id of the only mapping. It says that functions, files and lines are known, or pprof would look for symbols."""

_BINARY = "gproxyd"


class Profile:
    """Samples, added up by stack and labels. Its time begins when it is made and ends with `close`."""

    def __init__(self, types: Sequence[ValueType], *, period_type: ValueType, period: int = 1) -> None:
        self.types = tuple(types)
        self._period_type = period_type
        self._period = period
        self._at = time.time_ns()
        self._began = time.monotonic_ns()
        self._duration: int | None = None
        self._comments: list[str] = []
        self._places: dict[Place, int] = {}
        self._samples: dict[tuple[tuple[int, ...], Labels], list[int]] = {}

    def add(self, stack: Stack, values: Sequence[int], labels: Labels = ()) -> None:
        """One sample: values in the order of the types, labels as (key, value)."""
        places = self._places
        key = (tuple([places.setdefault(place, len(places) + 1) for place in stack]), labels)
        sums = self._samples.get(key)
        if sums is None:
            self._samples[key] = list(values)
        else:
            sums[:] = [a + b for a, b in zip(sums, values, strict=True)]

    def comment(self, text: str) -> None:
        """A line for the reader: `pprof -comments` shows it, and the text form."""
        self._comments.append(text)

    def close(self) -> None:
        """What is measured ends here; what follows is writing."""
        if self._duration is None:
            self._duration = time.monotonic_ns() - self._began

    def encode(self) -> bytes:
        """profile.proto, gzipped."""
        self.close()
        # Readers need no seekable body, and the same samples make the same bytes.
        return gzip.compress(_Encoder(self._places).profile(self), 6, mtime=0)

    def text(self) -> str:
        """The same for people: the largest first."""
        self.close()
        seconds = (self._duration or 0) / 1e9
        lines = [" ".join(f"{kind.type}/{kind.unit}" for kind in self.types) + f" in {seconds:.3f} s"]
        lines += [f"# {comment}" for comment in self._comments]
        places = tuple(self._places)
        for (ids, labels), values in sorted(self._samples.items(), key=lambda item: item[1][::-1], reverse=True):
            marks = "".join(f" {key}={value}" for key, value in labels)
            lines += ["", " ".join(map(str, values)) + " @" + marks]
            lines += [f"#\t{place.function}{_where(place)}" for place in (places[id - 1] for id in ids)]
        return "\n".join(lines) + "\n"


def _where(place: Place) -> str:
    if not place.file:
        return ""
    return f"\t{place.file}:{place.line}" if place.line else f"\t{place.file}"


class _Encoder:
    """Writes one profile's messages; collects the strings while it does."""

    def __init__(self, places: dict[Place, int]) -> None:
        self._strings: dict[str, int] = {"": 0}
        self._places = places

    def profile(self, it: Profile) -> bytes:
        parts = [_message(1, self._value_type(kind)) for kind in it.types]
        parts += [_message(2, self._sample(ids, values, labels)) for (ids, labels), values in it._samples.items()]
        parts.append(
            _message(3, _number(1, _MAPPING) + self._string(5, _BINARY) + _number(7, 1) + _number(8, 1) + _number(9, 1))
        )
        parts += self._locations_and_functions()
        parts += [
            _number(9, it._at),
            _number(10, it._duration or 0),
            _message(11, self._value_type(it._period_type)),
            _number(12, it._period),
        ]
        parts += [self._string(13, comment) for comment in it._comments]
        parts += [_message(6, text.encode("utf-8", "replace")) for text in self._strings]
        return b"".join(parts)

    def _value_type(self, kind: ValueType) -> bytes:
        return self._string(1, kind.type) + self._string(2, kind.unit)

    def _sample(self, ids: Iterable[int], values: Iterable[int], labels: Labels) -> bytes:
        body = _packed(1, ids) + _packed(2, values)
        for key, value in labels:
            body += _message(3, self._string(1, key) + self._string(2, value))
        return body

    def _locations_and_functions(self) -> Iterable[bytes]:
        functions: dict[tuple[str, str, int], int] = {}
        for place, id_ in self._places.items():
            function = functions.setdefault(place[:3], len(functions) + 1)
            line = _number(1, function) + _number(2, place.line)
            yield _message(4, _number(1, id_) + _number(2, _MAPPING) + _message(4, line))
        for (name, file, first), id_ in functions.items():
            text = self._string(2, name) + self._string(3, name) + self._string(4, file)
            yield _message(5, _number(1, id_) + text + _number(5, first))

    def _string(self, field: int, text: str) -> bytes:
        return _number(field, self._strings.setdefault(text, len(self._strings)))


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; negative ones as 64 bits of two's complement."""
    number &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number(field: int, number: int) -> bytes:
    """A varint field. Zero is what an absent one means (proto3)."""
    return _varint(field << 3) + _varint(number) if number else b""


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _packed(field: int, numbers: Iterable[int]) -> bytes:
    return _message(field, b"".join(map(_varint, numbers)))
