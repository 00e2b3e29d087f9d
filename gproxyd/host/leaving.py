"""How a process that stops parts with its clients.

Invariants: no request that has begun is cut here; a connection is ended only when nothing runs on it, nothing of a
request has come, and its client has been quiet for a while, so that no request crosses the end on its way: everybody
else hears `Connection: close` with the next answer, which is the gateway's business while it drains.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
from collections.abc import Callable, Sequence
from typing import cast

from gproxyd.gateway.door import Door
from gproxyd.gateway.doorstep import DoorProtocol
from gproxyd.gateway.handler import Gateway

QUIET = 0.5
"""Seconds of silence after which a client is taken to have nothing on its way."""

LOOK_EVERY = 0.05


async def see_off(
    gateway: Gateway, doors: Sequence[Door], hurry: asyncio.Event, limit: float, alone: Callable[[], bool]
) -> None:
    """Waits until nothing runs, nobody is connected to the doors and `alone` agrees; `limit` seconds at most, and not
    for somebody in a hurry."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + limit
    while not hurry.is_set() and (left := ends - loop.time()) > 0:
        for door in doors:
            for connection in tuple(door.connections):
                _end_if_idle(cast(DoorProtocol, connection), loop.time())
        if not gateway.in_flight and not any(door.connections for door in doors) and alone():
            return
        try:
            async with asyncio.timeout(min(LOOK_EVERY, left)):
                await hurry.wait()
        except TimeoutError:
            continue


def _end_if_idle(connection: DoorProtocol, now: float) -> None:
    """What aiohttp's own `close` cannot do: its idle connections stay open, and busy ones end unannounced."""
    waiter = connection._waiter  # its task's: while there is none, a request is at work or about to be
    if waiter is None or waiter.done() or connection._messages:
        return
    if connection._began is not None and not connection._silent:
        return  # a head is on its way, and has its own deadline
    idle_since = connection._next_keepalive_close_time - connection._keepalive_timeout
    if now - idle_since >= QUIET and not _has_more(connection):
        connection.force_close()


def _has_more(connection: DoorProtocol) -> bool:
    """Whether bytes wait in the kernel that the loop has not read yet."""
    sock = None if connection.transport is None else connection.transport.get_extra_info("socket")
    if sock is None:
        return False
    try:
        waiting = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
    except OSError:
        return False
    return any(waiting)
