"""One client connection: aiohttp's own, with what it lacks.

aiohttp's own answer to a malformed request quotes the offending line, secrets included, and logs it with a traceback;
here it is a constant. And whoever writes straight into the transport must hear when the client takes nothing.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import BaseRequest, StreamResponse
from aiohttp.web_protocol import _ErrInfo

from gproxyd.gateway.call import new_request_id
from gproxyd.gateway.crowd import Bucket
from gproxyd.gateway.fitness import CROWDED, REFUSALS, UNKNOWN, answer, owed_after
from gproxyd.gateway.guard import Guarded
from gproxyd.gateway.lookout import Lookout, Patience
from gproxyd.gateway.passengers import Passenger, Writable
from gproxyd.gateway.sent import SENT_AND_CLOSE

if TYPE_CHECKING:
    from gproxyd.gateway.door import Door
    from gproxyd.gateway.lane import Known

WRITE_HIGH_WATER = 64 * 1024
"""Bytes that may wait for a client before its upstream is no longer read."""

CLOSE_GRACE = 5.0
"""Seconds for which a connection that is being closed may still deliver what was written."""

USER_TIMEOUT_MS = 30_000
"""How long written bytes may stay unacknowledged before the kernel gives a vanished client up (tcp(7))."""

FIRST_BYTE_DEADLINE = 30.0
"""Seconds for which a new connection may say nothing at all."""

HEAD_DEADLINE = 10.0
"""Seconds within which a request's head must be complete once it has begun, however it trickles in."""

MAX_REQUESTS = 100_000
"""Requests on one connection, which then ends: none lives for ever."""

MOST_LINGERING = 32 * 1024 * 1024
"""Bytes of a request that was refused which are still read, so that its sender reads the refusal."""

MOST_TURNS = 8
"""Turns of the loop for which bytes wait for the request before them to be put aside."""

MOST_EARLY = 64 * 1024
"""Bytes that wait so: more may be thousands of requests, which the parser takes a few at a time."""

LAST_WORDS = 0.01
"""Seconds for which a connection stays whose client said something and left before that was looked at."""

Malformed = Callable[[str, str | None, int], None]
BODY_GRACE = 0.05
"""Seconds for which a head waits for its body: a client without TCP_NODELAY sends it 40 ms later."""

ShortWay = Callable[["DoorProtocol", bytes], "bool | None"]
"""Begins to answer a request, if these bytes are one whole, or returns False; None if they may be once more is here."""


class DoorProtocol(Guarded):
    """One client connection. `client` is its peer's address, None for a Unix socket.

    aiohttp's task for the connection sleeps until a request is queued. A request that goes the short way is answered
    without waking it, nor is it shown to aiohttp's parser: the task's future is put aside meanwhile, so that nothing
    takes the connection for idle either.

    known  what the short way remembers of the head that came last; `head` the last one that the parser has read, with
           its bytes, where they are known
    """

    __slots__ = (
        "_began",
        "_bucket",
        "_door",
        "_early",
        "_grace",
        "_lingered",
        "_lookout",
        "_malformed",
        "_owed",
        "_passenger",
        "_rest",
        "_short_way",
        "_silent",
        "_sleeper",
        "client",
        "head",
        "known",
        "patience",
        "writer",
    )

    def __init__(self, manager: Door, *, malformed: Malformed, short_way: ShortWay | None, **options: Any) -> None:
        super().__init__(manager, **options)
        self._door = manager
        self._malformed = malformed
        self._short_way = short_way
        self._owed = UNKNOWN if short_way is None else 0  # bytes until the parser stands between two requests
        self._early = b""  # what came before the request before was put aside, or before the rest of its own request
        self._rest: asyncio.TimerHandle | None = None  # until when that rest is waited for
        self.known: Known | None = None
        self.head: tuple[RawRequestMessage, bytes] | None = None
        self._passenger: Passenger | None = None
        self._sleeper: asyncio.Future[None] | None = None  # what aiohttp's task waits for, while it must not wake
        self.client: str | None = None
        self._bucket: Bucket | None = None
        self._began: float | None = None  # since when a request's head is awaited
        self._lingered = 0  # bytes that came while nobody wanted any
        self._silent = True  # nothing at all has come yet
        self._grace: asyncio.TimerHandle | None = None
        self._lookout = Lookout(self._loop)
        self.patience = Patience(self._loop)
        self.writer: Writable | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        peer = self.peername
        self.client = str(peer[0]) if isinstance(peer, tuple) else None
        self._bucket = self._door.crowd.enter(peer)
        if self._bucket is None:
            self._turn_away()
            return
        self._await_head()
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        self._end_rest()
        self._lookout.end()
        self.patience.end()
        if self._bucket is not None:
            self._door.crowd.leave(self._bucket)
            self._bucket = None
        self._door.deadlines.release(self)
        passenger, self._passenger = self._passenger, None
        if passenger is not None:
            passenger.client_left()
        super().connection_lost(exc)

    def _turn_away(self) -> None:
        """Too many connections: said at once, and nothing is read."""
        assert self.transport is not None
        request_id = new_request_id(time.time())
        lines = b"Retry-After: 1\r\nx-request-id: %b\r\n" % request_id.encode("ascii")
        self.transport.write(answer(CROWDED, lines, request_id))
        self.force_close()
        self._door.told.record("connections_refused")

    def _await_head(self) -> None:
        self._began = self._loop.time()
        self._door.deadlines.watch(self)

    def tick(self, now: float) -> None:
        """A head that does not come in time ends the connection (the attack is called slow loris)."""
        limit = FIRST_BYTE_DEADLINE if self._silent else HEAD_DEADLINE
        if self._began is not None and now - self._began > limit:
            self.force_close()

    def abort_later(self) -> None:
        """After a close: gives the client some seconds to take the rest, then ends it."""
        if self.transport is not None and self._grace is None:
            self._grace = self._loop.call_later(CLOSE_GRACE, self.transport.abort)

    @property
    def goes_on(self) -> bool:
        """Whether another request may follow the one that is answered now."""
        return self._request_count < MAX_REQUESTS

    @property
    def goes_on_after_next(self) -> bool:
        """The same of one not counted yet."""
        return self._request_count + 1 < MAX_REQUESTS

    @property
    def client_paused(self) -> bool:
        return self._paused

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self.patience.begin(self.transport)
        if self.writer is not None:
            self.writer.client_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.patience.end()
        if self.writer is not None:
            self.writer.client_resumed()

    def _pause_transport_reading(self) -> None:
        super()._pause_transport_reading()
        self._lookout.begin(self.transport)

    def _resume_transport_reading(self) -> None:
        super()._resume_transport_reading()
        self._lookout.end()

    def data_received(self, data: bytes) -> None:
        if self._early:
            self._early += data
            if self._rest is not None:
                self._begin(self._early)
            elif len(self._early) > MOST_EARLY:
                self._again(0)
        elif not data or self._owed or self._messages or self._close or self._short_way is None:
            self._parse(data)  # nothing at all: aiohttp goes on with what its parser has
        elif self._waiter is None:
            self._early = data
            self._loop.call_soon(self._again, MOST_TURNS)
        else:
            self._begin(data)

    def _begin(self, data: bytes) -> None:
        """A request that nothing stands before: by the short way, or the long one, or once more of it is here."""
        taken = self._short_way is not None and self._short_way(self, data)
        if taken is None:
            self._early = data
            if self._rest is None:
                self._rest = self._loop.call_later(BODY_GRACE, self._give_up_rest)
            return
        if self._rest is not None:
            self._end_rest()
            self._early = b""
        if not taken:
            self._parse(data)

    def _give_up_rest(self) -> None:
        self._rest = None
        data, self._early = self._early, b""
        self._parse(data)

    def _end_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def eof_received(self) -> bool | None:  # type: ignore[override]  # as asyncio has it
        """A client that ends its side has left, but what it said last is told of all the same: it begins, and ends."""
        if self.transport is None or not (self._early or self._messages):
            return None
        if self._early:
            self._end_rest()
            data, self._early = self._early, b""
            self._parse(data)
        self._loop.call_later(LAST_WORDS, self.transport.close)
        return True

    def _again(self, turns: int) -> None:
        """A request may be here before aiohttp's task has put the one before aside: that takes some turns."""
        if self._waiter is None and turns and self.transport is not None:
            self._loop.call_soon(self._again, turns - 1)
            return
        data, self._early = self._early, b""
        if self.transport is None or not data:
            return
        if self._waiter is not None and not self._messages and not self._close:
            self._begin(data)
        else:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        """The long way: through aiohttp's parser, and by its task."""
        if self._silent:
            self._silent = False
            self._began = self._loop.time()
        if self._broken:
            return
        self._tail = data[-4:] if len(data) > 3 else (self._tail + data)[-4:]
        count = self._request_count
        sleeper, self._waiter = self._waiter, None  # nobody wakes before the messages have been looked over
        if sleeper is None and self._current_request is None and self._passenger is None:
            self._lingered += len(data)
            if self._lingered > MOST_LINGERING:
                self.force_close()
                return
        try:
            super().data_received(data)
        except (HttpProcessingError, ValueError, AssertionError):
            # What the parser lets through of its libraries' errors is a malformed request all the same.
            self._waiter = sleeper
            self._refuse_malformed(400)
            self.force_close()
            return
        if self._upgraded:
            self._message_tail = b""  # no protocol but ours is ever spoken: what follows such a request is not kept
        self._count_owed(data, self._request_count - count)
        self._look_over(self._request_count - count)
        self._waiter = sleeper
        if not self._messages and not self._close:
            if self._began is None and sleeper is not None and self._current_request is None:
                self._await_head()  # the first bytes of another head on a connection that was idle
            if self._began is not None:
                self._collect(data)
        if self._messages:
            self._lingered = 0
            if self._began is not None:
                self._began = None
                self._door.deadlines.release(self)
            if isinstance(self._messages[-1][0], _ErrInfo):
                self._break_off(data)
            self._part.clear()
            if sleeper is not None:
                self._wake(sleeper)
        elif self._close and sleeper is not None:
            sleeper.cancel()

    @staticmethod
    def _wake(sleeper: asyncio.Future[None]) -> None:
        if not sleeper.done():
            sleeper.set_result(None)

    def parser_renewed(self) -> None:
        self._owed = 0 if self._short_way is not None else UNKNOWN

    def _count_owed(self, data: bytes, begun: int) -> None:
        last = self._messages[-1][0] if begun else None
        message = None if isinstance(last, _ErrInfo) else last
        self._owed = owed_after(self._owed, data, begun, message)
        if message is not None:
            self.head = (message, data[: data.find(b"\r\n\r\n") + 4]) if self._owed >= 0 else None

    def board(self, passenger: Passenger) -> None:
        """The request that came last is answered on the short way; what follows it waits."""
        self._request_count += 1
        self._passenger = passenger
        self._sleeper, self._waiter = self._waiter, None
        if self._began is not None:
            self._silent, self._began = False, None
            self._door.deadlines.release(self)

    def alight(self, *, keep: bool) -> None:
        """It has been answered. `keep` says whether another may follow."""
        self._passenger = None
        sleeper, self._sleeper = self._sleeper, None
        self._waiter = sleeper
        if self.transport is None or self._parser is None or sleeper is None:
            return
        if not keep or self._close:
            self.force_close()
            return
        self._door.requests_count += 1
        self._keepalive = True
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        if self._messages:
            self._wake(sleeper)

    def unboard(self, data: bytes) -> bool:
        """It goes the long way after all, as if nothing had been. Returns False where something has followed it."""
        if self._owed or self._messages or self._sleeper is None:
            return False
        self._passenger = None
        self._request_count -= 1
        self._waiter, self._sleeper = self._sleeper, None
        self._parse(data)
        return True

    def _process_keepalive(self) -> None:
        if self._early and self._rest is not None:  # half a request is here: nobody is idle
            self._keepalive_handle = self._loop.call_later(self._keepalive_timeout, self._process_keepalive)
            return
        super()._process_keepalive()
        if self._passenger is not None and self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_later(self._keepalive_timeout, self._process_keepalive)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """A constant answer, whatever was wrong: the peer's bytes appear neither in it nor in the log."""
        self._refuse_malformed(status if status in REFUSALS else 400)
        return SENT_AND_CLOSE

    def _refuse_malformed(self, status: int) -> None:
        request_id = new_request_id(time.time())
        if self.transport is not None:
            line = b"x-request-id: %b\r\n" % request_id.encode("ascii")
            self.transport.write(answer(REFUSALS[status], line, request_id))
        self._malformed(request_id, self.client, status)
