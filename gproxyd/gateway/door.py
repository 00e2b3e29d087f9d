"""aiohttp's low-level server: one `DoorProtocol` for every connection, each with the same limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp.web import BaseRequest, Server, StreamResponse

from gproxyd.gateway.crowd import Crowd
from gproxyd.gateway.doorstep import DoorProtocol, Malformed, ShortWay
from gproxyd.gateway.fitness import MAX_LINE, MAX_LINES
from gproxyd.observe.journal import Occasional
from gproxyd.upstream.deadlines import Deadlines

_OPTIONS: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,
    "keepalive_timeout": 75.0,
    "lingering_time": 3.0,
    "max_field_size": MAX_LINE,
    "max_headers": MAX_LINES,
    "max_line_size": MAX_LINE,
    "read_bufsize": 64 * 1024,
}

Handler = Callable[[BaseRequest], Awaitable[StreamResponse]]


class Door(Server):
    """Makes a DoorProtocol for every connection. `malformed(request_id, client, status)` hears of broken requests."""

    def __init__(
        self,
        handler: Handler,
        *,
        loop: asyncio.AbstractEventLoop,
        deadlines: Deadlines,
        crowd: Crowd,
        told: Occasional,
        malformed: Malformed,
        short_way: ShortWay | None = None,
    ) -> None:
        super().__init__(handler, handler_cancellation=True, loop=loop)
        self._short_way = short_way
        self.deadlines = deadlines
        self.crowd = crowd
        self.told = told
        self._malformed = malformed

    def __call__(self) -> DoorProtocol:
        return DoorProtocol(self, loop=self._loop, malformed=self._malformed, short_way=self._short_way, **_OPTIONS)
