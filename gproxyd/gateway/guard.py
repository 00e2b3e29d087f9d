"""What aiohttp's parsers let through although it must not pass, and what they say of what does not.

Invariants: only requests that are spoken here are queued; no byte that shares a segment with the end of a chunked body
is believed; no peer's byte stays in an error or a log.
"""

from __future__ import annotations

from typing import Any

from aiohttp.streams import StreamReader
from aiohttp.web import RequestHandler, RequestPayloadError
from aiohttp.web_protocol import _ErrInfo

from gproxyd.gateway.fitness import MOST_OF_A_HEAD, broken, fail_body, fault, unfit


class Guarded(RequestHandler):
    """aiohttp's connection with its parser's messages looked over."""

    __slots__ = ("_broken", "_chunked", "_part", "_tail")

    def __init__(self, manager: Any, **options: Any) -> None:
        super().__init__(manager, **options)
        self._broken = False  # something came that is no request: nothing more is read
        self._chunked: StreamReader | None = None  # the chunked body that is being received
        self._tail = b""  # the last four bytes that came
        self._part = bytearray()  # of a head that is not complete

    def parser_renewed(self) -> None:
        """A fresh parser waits for a request's first byte."""

    def _look_over(self, count: int) -> None:
        """The `count` messages that have just been parsed, by the rules that aiohttp's parsers do not know."""
        while not self._end_chunked(count) and count:
            message, body = self._messages[-count]
            if isinstance(message, _ErrInfo):
                return
            if status := unfit(message):
                self._drop_last(count)
                self._messages.append(broken(status))
                return
            self._chunked = body if message.chunked else None
            count -= 1

    def _end_chunked(self, count: int) -> bool:
        """Behind a chunked body another parser reads on; `count` messages follow it. Returns whether none may.

        aiohttp's parser (3.14) takes the last trailer of a request for the first header line of the next one, which
        may be its `Authorization`. So what shares a segment with the end of such a body is not believed: the
        connection ends behind the answer.
        """
        if self._chunked is None or not self._chunked._eof:
            return False
        self._chunked = None
        assert self._parser is not None
        if not count and self._tail == b"\r\n\r\n" and not self._buffer_paused:
            self._parser = type(self._parser)(
                self,
                self._loop,
                self._read_bufsize,
                max_line_size=self.max_line_size,
                max_field_size=self.max_field_size,
                max_headers=self.max_headers,
                payload_exception=RequestPayloadError,
                auto_decompress=False,
                max_msg_queue_size=self._max_msg_queue_size,
            )
            self.parser_renewed()
            return False
        self._drop_last(count)
        if self._messages:
            message, body = self._messages.pop()
            assert not isinstance(message, _ErrInfo)
            self._messages.append((message._replace(should_close=True), body))
        self.close()
        return True

    def _drop_last(self, count: int) -> None:
        for _ in range(count):
            self._messages.pop()

    def _collect(self, data: bytes) -> None:
        """More of a head that is not complete: more than a head may have is refused before its end comes."""
        self._part += data
        if len(self._part) > MOST_OF_A_HEAD:
            self._messages.append(broken(431))

    def _break_off(self, data: bytes) -> None:
        """aiohttp queues what broke the parser behind the running request; if it was that one's body, it must fail.

        The error holds every byte that broke it, in a ring of references that only the collector would undo.
        """
        self._broken = True
        found, _ = self._messages.pop()
        assert isinstance(found, _ErrInfo)
        in_a_body = self._chunked is not None and not self._chunked._eof
        status = 400 if in_a_body else max(found.status, fault(found.exc, bytes(self._part) + data))
        found.exc.__traceback__ = found.exc.__context__ = found.exc.__cause__ = None
        self._messages.append(broken(status))
        if self._chunked is not None:
            fail_body(self._chunked, self._loop)

    def log_exception(self, *args: Any, exc_info: BaseException | None = None, **options: Any) -> None:
        """A body that broke after its request was refused is nobody's bug, and has been told of."""
        if not isinstance(exc_info, RequestPayloadError):
            super().log_exception(*args, exc_info=exc_info, **options)
