"""What an upstream sends, in slices: so that however fast it is, everybody else has a turn.

Invariants:
- of what has come at once at most `slice` bytes are looked at in one turn of the loop, and nothing more is read before
  the rest has been;
- while it is paused nothing is looked at;
- what has come before the end of a connection is looked at before its end is told.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod

SLICE = 32 * 1024
"""Bytes that are looked at in one turn: some milliseconds, however dense they are. libuv reads up to 32 times 250 KB in
one, if so much is there."""

CODED_SLICE = 4096
"""The same of what is inflated on its way: a byte may become a thousand."""


class Sliced(asyncio.Protocol):
    """The receiving side of a connection. `look_at` is called with the slices."""

    __slots__ = ("_awaited", "_loop", "_reading_paused", "_rest", "_secure", "_stopped", "_transport", "slice")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.slice = SLICE
        self._transport: asyncio.Transport | None = None
        self._secure = False
        self._rest = b""  # what has come and was not looked at yet
        self._awaited = False  # the next turn looks at it
        self._reading_paused = False  # by whom the slices are for
        self._stopped = False  # the transport does not read

    @abstractmethod
    def look_at(self, data: bytes) -> None:
        """Takes the next slice."""

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def pause_reading(self) -> None:
        self._reading_paused = True
        self._stop()

    def resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._go_on_soon()

    def data_received(self, data: bytes) -> None:
        if not self._rest and len(data) <= self.slice:
            self.look_at(data)
            return
        self._rest += data
        self._stop()
        if not self._awaited and not self._reading_paused:
            self._go_on()

    def flush(self) -> None:
        """The connection has ended: what is left is looked at now, paused or not."""
        rest, self._rest = self._rest, b""
        if rest:
            self.look_at(rest)

    def later(self, data: bytes, end: int) -> bytes:
        """What stands in front of `end` in a slice; the rest is looked at in slices to come."""
        self._rest = data[end:] + self._rest
        self._stop()
        self._go_on_soon()
        return data[:end]

    def forget(self) -> None:
        """What is left is of no interest."""
        self._rest = b""

    def _go_on_soon(self) -> None:
        if not self._awaited:
            self._awaited = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._awaited = False
        if self._reading_paused:
            return
        data, self._rest = self._rest[: self.slice], self._rest[self.slice :]
        if data:
            self.look_at(data)
        self._continue()

    def _continue(self) -> None:
        if self._reading_paused:
            return
        if self._rest:
            self._go_on_soon()
        else:
            self._start()

    def _stop(self) -> None:
        """Nothing more is read.

        A paused TLS transport goes on reading from its socket, and if the connection ends before it is resumed, what it
        has read is lost (uvloop's sslproto, as of 0.23). So it may hold nothing: then it does not see the end either.
        """
        if not self._stopped and self.open:
            assert self._transport is not None
            self._stopped = True
            self._transport.pause_reading()
            if self._secure:
                self._transport.set_read_buffer_limits(1, 0)  # type: ignore[attr-defined]  # TLS has it

    def _start(self) -> None:
        if self._stopped and self.open:
            assert self._transport is not None
            self._stopped = False
            self._transport.resume_reading()
            if self._secure:
                self._loop.call_soon(self._widen)  # when that layer has given out what it held

    def _widen(self) -> None:
        if not self._stopped and self.open:
            assert self._transport is not None
            self._transport.set_read_buffer_limits()  # type: ignore[attr-defined]
