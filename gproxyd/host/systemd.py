"""What a service manager tells a daemon and wants to hear: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).

Invariants: where there is no manager, nothing here does anything; one that does not listen holds nobody up; a
descriptor that was handed over is used for what its name says, or the start fails with a sentence that names it.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Literal

Role = Literal["http", "ops", "admin"]
"""What a listening socket is for: clients, operators (`server.ops_listen`), administrators of this machine."""

Sockets = Mapping[Role, list[socket.socket]]

ROLES: tuple[Role, ...] = ("http", "ops", "admin")

FIRST = 3
"""The descriptor at which those that are handed over begin."""

PATIENCE = 5.0
"""Seconds for which a message waits for the manager that must not be lost."""

LOOK_EVERY = 2.0
"""Seconds between two looks at what the daemon is busy with."""

STAY = 30.0
"""Seconds by which each look puts off the end of the manager's patience while the daemon stops."""

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_UNIT = re.compile(r"[\w.:-]+?(?:-(ops|admin))?(?:@[^/]*)?\.socket")


class Manager:
    """The manager's ear. `watchdog` is in how many seconds it wants to hear of the daemon; None: whenever."""

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self._address = f"\0{address[1:]}" if address is not None and address.startswith("@") else address
        self.watchdog = watchdog

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Manager:
        """As the environment tells, which then tells nobody else: no program that is started from here speaks to it."""
        address, usec, pid = (environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        ours = not pid or pid == str(os.getpid())
        watched = address and ours and usec.isascii() and usec.isdigit() and int(usec) > 0
        return cls(address or None, int(usec) / 1e6 if watched else None)

    def environment(self) -> dict[str, str]:
        """What leads another process to the same ear."""
        if self._address is None:
            return {}
        told = {"NOTIFY_SOCKET": f"@{self._address[1:]}" if self._address.startswith("\0") else self._address}
        if self.watchdog is not None:
            told["WATCHDOG_USEC"] = str(round(self.watchdog * 1e6))
        return told

    @property
    def listens(self) -> bool:
        return self._address is not None

    def tell(self, *assignments: str, surely: bool = False) -> None:
        """Sends `NAME=value` lines, in one datagram. `surely` waits for a manager that is busy."""
        if self._address is None:
            return
        text = "\n".join(line.replace("\n", " ") for line in assignments).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ear:
                ear.settimeout(PATIENCE if surely else 0.0)
                ear.sendto(text, self._address)
        except OSError:
            return  # it is away or does not listen; the daemon's work does not depend on it

    def reloading(self) -> None:
        """Another configuration is being read; `ready` ends it."""
        # Without the time, in the same datagram, newer managers wait for ever.
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", surely=True)

    def ready(self) -> None:
        self.tell("READY=1", surely=True)

    def stopping(self) -> None:
        self.tell("STOPPING=1", surely=True)

    def succeeded_by(self, pid: int) -> None:
        """Another process is the daemon now; this one has nothing more to say."""
        self.tell(f"MAINPID={pid}", "READY=1", surely=True)
        self.silence()

    def silence(self) -> None:
        self._address = self.watchdog = None


class Pulse:
    """Tells the manager from the loop itself that the loop turns, and what it is busy with.

    well    whether the manager is to believe that the daemon works
    status  one line for people
    """

    def __init__(
        self,
        manager: Manager,
        loop: asyncio.AbstractEventLoop,
        well: Callable[[], bool],
        status: Callable[[], str],
    ) -> None:
        self._manager = manager
        self._loop = loop
        self._well = well
        self._status = status
        self._told = ""
        self._handle: asyncio.TimerHandle | None = None
        self._stays = False

    def start(self) -> None:
        """Begins; does nothing where nobody listens."""
        if self._manager.listens and self._handle is None:
            self._beat()

    def stay(self) -> None:
        """The daemon takes its time to stop: from here on that is asked for, too."""
        self._stays = True
        self.stop()
        self.start()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _beat(self) -> None:
        # Twice as often as asked for would do; a writer that begins anew just then may miss one.
        limit = self._manager.watchdog
        self._handle = self._loop.call_later(LOOK_EVERY if limit is None else min(limit / 4, LOOK_EVERY), self._beat)
        told = []
        if limit is not None and self._well():
            told.append("WATCHDOG=1")
        if self._stays:
            told.append(f"EXTEND_TIMEOUT_USEC={round(STAY * 1e6)}")
        if (status := self._status()) != self._told:
            self._told = status
            told.append(f"STATUS={status}")
        if told:
            self._manager.tell(*told)


def take_sockets(environ: MutableMapping[str, str], pid: int) -> dict[Role, list[socket.socket]]:
    """The listening sockets that were handed over, by what they are for; none, where they are not meant for `pid`.

    The environment forgets them. Raises OSError for what cannot be listened on, and for a name that says nothing.
    """
    meant, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if meant != str(pid) or not (count.isascii() and count.isdigit()):
        return {}
    called = names.split(":") if names else []
    found: dict[Role, list[socket.socket]] = {}
    for place in range(int(count)):
        name = called[place] if place < len(called) else "unknown"
        found.setdefault(_role(name), []).append(adopt(FIRST + place, name))
    return found


def adopt(descriptor: int, name: str) -> socket.socket:
    """A descriptor from elsewhere as a listening socket that no other program inherits. Raises OSError."""
    try:
        os.set_inheritable(descriptor, False)
        taken = socket.socket(fileno=descriptor)
    except OSError as error:
        raise OSError(f"descriptor {descriptor} ({name}) was handed over but is no socket ({error.strerror})") from None
    listens = taken.type == socket.SOCK_STREAM and taken.family in _FAMILIES
    if not listens or not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        taken.detach()
        raise OSError(f"descriptor {descriptor} ({name}) was handed over but is no stream socket that listens")
    taken.setblocking(False)
    return taken


def _role(name: str) -> Role:
    """What a socket is for by its FileDescriptorName=, which is its unit's name where none was given."""
    for role in ROLES:
        if name == role:
            return role
    if name in ("", "unknown"):
        return "http"
    unit = _UNIT.fullmatch(name)
    if unit is None:
        raise OSError(f"a socket was handed over as {name!r}; FileDescriptorName= must be one of {', '.join(ROLES)}")
    return "ops" if unit[1] == "ops" else "admin" if unit[1] == "admin" else "http"
