"""The control headers: how one request asks its answer to be shaped or broken. The package docstring explains each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gproxyd.host.demo.answers import VendorError

PREFIX = "x-demo-"
BEFORE_HEAD = -1
"""The `fail_after` of an exchange that breaks off before its response head."""

_FAILURES = ("close", "reset", "stall", "error")
_LINE_ENDS = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}


@dataclass(frozen=True, slots=True)
class Controls:
    """What the headers ask for. Delays are seconds, sizes bytes; None means the vendor's usual way."""

    delay: float = 0.0
    event_delay: float = 0.0
    events: int | None = None
    size: int | None = None
    status: int | None = None
    fail_after: int | None = None
    fail: str = "close"
    chunk: int | None = None
    known_length: bool = False
    eol: bytes | None = None

    @property
    def sized(self) -> bool:
        """Whether the length of the answer's text is dictated."""
        return self.events is not None or self.size is not None


def read(headers: Mapping[str, str]) -> Controls:
    """The controls among `headers`. Raises VendorError (400) for one that is unknown or cannot be read."""
    found: dict[str, Any] = {}
    for name, value in headers.items():
        header = name.lower()
        if not header.startswith(PREFIX):
            continue
        try:
            field, reader = _READERS[header.removeprefix(PREFIX)]
            found[field] = reader(value.strip().lower())
        except (KeyError, ValueError) as error:
            raise VendorError(400, f"The control header {header} has an unknown name or value.") from error
    if "fail" in found:
        found.setdefault("fail_after", 0)
    return Controls(**found)


def _whole(least: int, most: int = 1 << 40) -> Callable[[str], int]:
    def parse(value: str) -> int:
        number = int(value)
        if not least <= number <= most:
            raise ValueError(value)
        return number

    return parse


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        return allowed[allowed.index(value)]

    return parse


def _seconds(value: str) -> float:
    return _whole(0)(value) / 1000


def _fail_after(value: str) -> int:
    return BEFORE_HEAD if value == "head" else _whole(0)(value)


_READERS: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "delay": ("delay", _seconds),
    "event-delay": ("event_delay", _seconds),
    "events": ("events", _whole(1)),
    "size": ("size", _whole(0)),
    "status": ("status", _whole(400, 599)),
    "fail-after": ("fail_after", _fail_after),
    "fail": ("fail", _one_of(*_FAILURES)),
    "chunk": ("chunk", _whole(1)),
    "length": ("known_length", lambda value: _one_of("known")(value) == "known"),
    "eol": ("eol", _LINE_ENDS.__getitem__),
}
