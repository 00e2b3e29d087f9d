"""The sockets through which everybody comes, opened here or handed over.

Invariants: whoever closes a listener that was handed over leaves it to its owner: what waits in its queue is served by
the next process; a socket file is removed only by the process that made it and gives it to nobody.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from gproxyd.config import ListenAddress
from gproxyd.gateway.door import Door
from gproxyd.host.systemd import Role, Sockets

BACKLOG = 4096
"""Connections that may wait to be accepted."""

ADMIN_SOCKET = "admin.sock"


class Listeners:
    """`addresses` says where clients, and then operators, find the daemon."""

    def __init__(self, loop: asyncio.AbstractEventLoop, given: Sockets | None = None) -> None:
        self._loop = loop
        self._given = {role: list(sockets) for role, sockets in (given or {}).items()}
        self._open: dict[Role, list[asyncio.Server]] = {}
        self._made: Path | None = None
        self.addresses: list[str] = []

    def was_given(self, role: Role) -> bool:
        return role in self._given

    async def open(self, role: Role, door: Door, wanted: Sequence[ListenAddress]) -> None:
        """What was handed over for that role; else what is wanted. Raises OSError, naming the address."""
        if role in self._given:
            await self._open_given(role, door)
            return
        for address in wanted:
            try:
                opened = await self._bound(door, address)
            except OSError as failed:
                raise OSError(f"cannot listen on {address}: {failed.strerror or failed}") from failed
            self._open.setdefault(role, []).append(opened)
            self.addresses += [f"unix:{address.path}"] if address.path else [_shown(sock) for sock in opened.sockets]

    async def open_local(self, door: Door, folder: Path | None) -> None:
        """The administrators' socket, for root and the daemon's own user: the kernel says who comes."""
        if "admin" in self._given:
            await self._open_given("admin", door)
        elif folder is not None:
            path = folder / ADMIN_SOCKET
            _remove_stale(str(path))
            self._open.setdefault("admin", []).append(await self._loop.create_unix_server(door, path))
            path.chmod(0o600)
            self._made = path

    async def _open_given(self, role: Role, door: Door) -> None:
        for sock in self._given[role]:
            if role != "admin":
                self.addresses.append(_shown(sock))
            if sock.family == socket.AF_UNIX:
                opened = await self._loop.create_unix_server(door, sock=sock, backlog=BACKLOG)
            else:
                opened = await self._loop.create_server(door, sock=sock, backlog=BACKLOG)
            self._open.setdefault(role, []).append(opened)

    async def _bound(self, door: Door, address: ListenAddress) -> asyncio.Server:
        if address.path is None:
            return await self._loop.create_server(door, address.host, address.port, backlog=BACKLOG)
        _remove_stale(address.path)
        return await self._loop.create_unix_server(door, address.path, backlog=BACKLOG)

    def descriptors(self) -> list[tuple[Role, int]]:
        """Every socket that is open, and what it is for."""
        opened = ((role, server) for role, servers in self._open.items() for server in servers)
        return [(role, sock.fileno()) for role, server in opened for sock in server.sockets]

    def close(self, *roles: Role) -> None:
        """No new connections there."""
        for role in roles:
            for server in self._open.pop(role, ()):
                server.close()

    def leave_behind(self) -> None:
        """Another process goes on with the sockets: their files stay."""
        self._made = None

    def tidy(self) -> None:
        """Removes the file of the administrators' socket."""
        if self._made is not None:
            self._made.unlink(missing_ok=True)
            self._made = None


def _shown(sock: socket.socket) -> str:
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{os.fsdecode(name)}"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _remove_stale(path: str) -> None:
    """A socket file that nobody listens on is left over from a crash; anything else is somebody's. Raises OSError."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.EEXIST, "something that is no socket stands there")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
