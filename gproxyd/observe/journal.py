"""Log lines, written off the loop.

Invariants: the loop never waits for a reader of the log; what does not fit is dropped and counted, and the count is
told as soon as there is room. A line holds named fields only, never a secret, a prompt or bytes that were not cut
and escaped.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import orjson

from gproxyd.observe import native

MAX_WAITING = 10_000
MAX_FIELD = native.MAX_FIELD

GATHER = 0.05
"""Seconds for which lines are gathered before they are written."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

Fields = Mapping[str, Any]
Form = Literal["json", "text", "journal"]
"""Lines of JSON, lines of text, or entries of systemd's journal with their fields."""


class Journal:
    """Takes records (a level, an event, fields) and writes each as one line of JSON or text, or sends it to journald.

    Where no journald listens at `socket`, "journal" means JSON.

    The writer wakes a few times a second at most: a thread that is woken for every line takes the interpreter's lock
    from the loop just as often, which costs more than the line.
    """

    def __init__(
        self, *, level: str = "info", form: Form = "json", descriptor: int = 2, socket: Path = native.SOCKET
    ) -> None:
        self._threshold = _LEVELS[level]
        self._sender = _sender(socket) if form == "journal" else None
        if form == "journal" and self._sender is None:
            form = "json"
        self._render: Callable[[float, str, str, Any], bytes] = _RENDER[form]
        self.takes_json = form != "text"
        self._descriptor = descriptor
        self._waiting: deque[tuple[float, str, str, Fields | str]] = deque()
        self._dropped = 0  # lines that were lost and not told of yet
        self._torn = False  # the descriptor took a part of a line
        self.lost = 0
        """Lines that were never written, since the start."""
        self._signal = threading.Event()
        self._signalled = False
        self._closing = False
        self._writer = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._writer.start()

    def record(self, level: str, event: str, /, **fields: Any) -> None:
        """Queues one line. `event` is a short word, `fields` plain values."""
        self.put(level, event, fields)

    def put(self, level: str, event: str, fields: Fields | str) -> None:
        """As `record`, for fields that are a mapping already; it must not change afterwards."""
        if _LEVELS[level] < self._threshold:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._dropped += 1
            self.lost += 1
            return
        self._waiting.append((time.time(), level, event, fields))
        if not self._signalled:
            self._signalled = True
            self._signal.set()

    def put_members(self, level: str, event: str, rendered: str) -> None:
        """As `put`, for members of a JSON object that have been rendered already; only while `takes_json`."""
        self.put(level, event, rendered)

    def close(self) -> None:
        """Writes what waits, for five seconds at most."""
        self._closing = True
        self._signal.set()
        self._writer.join(5.0)
        if self._sender is not None and not self._writer.is_alive():
            self._sender.close()
            time.sleep(native.SETTLE)

    def _write_all(self) -> None:
        while not self._closing:
            self._signal.wait()
            self._signal.clear()
            if not self._closing:
                time.sleep(GATHER)
            self._signalled = False  # before the queue is emptied: whoever comes later signals anew
            self._write_waiting()
        self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting:
            lines = [self._render(*self._waiting.popleft()) for _ in range(min(len(self._waiting), 256))]
            told = self._dropped
            if told:
                lines.insert(0, self._render(time.time(), "warning", "log_lines_dropped", {"count": told}))
            lost = self._put(lines)
            if told and lost == len(lines):
                lost -= 1  # the count is still to be told
            else:
                self._dropped -= told
            self._dropped += lost
            self.lost += lost

    def _put(self, lines: list[bytes]) -> int:
        """Writes lines. Returns how many were not taken: by the descriptor, the last ones."""
        if self._sender is not None:
            return self._sender.send(lines)
        data = b"".join(lines)
        if self._torn:
            data = b"\n" + data  # what was taken of a line stands alone
        at = 0
        try:
            while at < len(data):
                at += os.write(self._descriptor, data[at:])
        except OSError:
            pass  # nobody reads any more, or the disk is full: the count is told when there is room
        whole = data.count(b"\n", 0, at) - (self._torn and at > 0)
        self._torn = not data.endswith(b"\n", 0, at) if at else self._torn
        return len(lines) - whole


class Occasional:
    """Events of which a peer can cause any number: at most `most` lines a second, and how many were left out."""

    def __init__(self, journal: Journal, level: str, most: int = 50) -> None:
        self._journal = journal
        self._level = level
        self._most = most
        self._second = 0
        self._written = 0
        self._left_out = 0

    def record(self, event: str, **fields: Any) -> None:
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._written = now, 0
        if self._written >= self._most:
            self._left_out += 1
            return
        self._written += 1
        left_out, self._left_out = self._left_out or None, 0
        self._journal.record(self._level, event, **fields, left_out=left_out)


def _cut(value: Any) -> Any:
    """A field's value as plain text of bounded length, whatever a peer put into it."""
    if not isinstance(value, str) or (len(value) <= MAX_FIELD and value.isprintable()):
        return value
    # JSON escapes what is below a space, and nothing else that moves a cursor or ends a line somewhere.
    return "".join(letter if letter.isprintable() or letter < " " else "\ufffd" for letter in value[:MAX_FIELD])


@lru_cache(maxsize=4)
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _stamp(at: float) -> str:
    return f"{_second(int(at))}.{int(at % 1 * 1000):03d}Z"


def members(fields: Mapping[str, Any]) -> str:
    """Fields as members of a JSON object, without its braces; those that are None are left out."""
    told = {name: _cut(value) for name, value in fields.items() if value is not None}
    return orjson.dumps(told, default=str)[1:-1].decode()


def _as_json(at: float, level: str, event: str, fields: Fields | str) -> bytes:
    if isinstance(fields, str):
        return f'{{"time":"{_stamp(at)}","level":"{level}","event":"{event}",{fields}}}\n'.encode()
    record = {"time": _stamp(at), "level": level, "event": event}
    for name, value in fields.items():
        if value is not None:
            record[name] = _cut(value) if type(value) is str else value
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE, default=str)


def _as_text(at: float, level: str, event: str, fields: Mapping[str, Any]) -> bytes:
    words = [_stamp(at), level.upper(), event]
    words += (f"{name}={_text(_cut(value))}" for name, value in fields.items() if value is not None)
    return (" ".join(words) + "\n").encode("utf-8", "replace")


def _text(value: Any) -> str:
    text = str(value)
    plain = text.isprintable() and not any(mark in text for mark in " \"'=") and text
    return text if plain else orjson.dumps(text).decode("utf-8")


def _as_entry(at: float, level: str, event: str, fields: Fields | str) -> bytes:
    told = _read(fields)
    return native.entry(_stamp(at), level, event, _sentence(event, told), told)


def _read(fields: Fields | str) -> Fields:
    """The members of a JSON object as what they say."""
    if not isinstance(fields, str):
        return fields
    try:
        read: dict[str, Any] = orjson.loads(f"{{{fields}}}")
    except ValueError:
        return {"unreadable": fields}
    return read


_TOLD = ("method", "path", "provider", "model", "status", "outcome", "duration_ms")


def _sentence(event: str, fields: Fields) -> str:
    """What `journalctl` shows of an entry."""
    if event == "request":
        method, path, provider, model, status, outcome, took = (fields.get(name) or "-" for name in _TOLD)
        line = f"{method} {path} {provider}/{model} {status} {outcome} {took} ms"
        return line if line.isprintable() else _text(_cut(line))
    if (message := fields.get("message")) is not None:
        return f"{event}: {native.shown(str(message))}"
    return " ".join([event, *(f"{name}={_text(_cut(value))}" for name, value in fields.items() if value is not None)])


_RENDER: Mapping[Form, Callable[[float, str, str, Any], bytes]] = {
    "json": _as_json,
    "text": _as_text,
    "journal": _as_entry,
}


def _sender(path: Path) -> native.Sender | None:
    try:
        return native.Sender(path)
    except OSError:
        return None  # not a machine of systemd's, or a container without its socket


def default_form() -> Form:
    """`log.format: auto`: the journal's own where systemd reads stderr, text where somebody looks on, else JSON."""
    if native.is_stream(2, os.environ.get("JOURNAL_STREAM")):
        return "journal"
    return "text" if sys.stderr.isatty() else "json"


class JournalHandler(logging.Handler):
    """Brings what libraries log into the journal: the logger's name and the message, never a traceback's values."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        level = "error" if record.levelno >= logging.ERROR else "warning"
        message = str(record.msg).partition("\n")[0].partition("(")[0]  # asyncio goes on with reprs and their values
        self._journal.record(level, "library", logger=record.name, message=message, error=error)
