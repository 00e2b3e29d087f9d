"""What the handler returns to aiohttp when the answer is on the wire already."""

from __future__ import annotations

import time
from email.utils import formatdate
from functools import lru_cache
from typing import cast

from aiohttp.web import BaseRequest, StreamResponse


class Sent:
    """Tells aiohttp that the answer is on the wire already, and whether the connection goes on."""

    __slots__ = ("keep_alive",)

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: BaseRequest) -> None:
        """Nothing is left to prepare."""

    async def write_eof(self) -> None:
        """Nothing is left to write."""


SENT = cast(StreamResponse, Sent(keep_alive=True))
SENT_AND_CLOSE = cast(StreamResponse, Sent(keep_alive=False))


def date_line() -> bytes:
    """`Date` for answers of the gateway's own (RFC 9110 section 6.6.1)."""
    return _date_of(int(time.time()))


@lru_cache(maxsize=2)
def _date_of(second: int) -> bytes:
    return b"Date: %b\r\n" % formatdate(second, usegmt=True).encode("ascii")
