"""The composition root: the only place that wires rooms together.

A life: `build` (nothing is opened), `start` (sockets), `reload` (validate first, then swap), `stop` (drain, then end).
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

import uvloop
from aiohttp.http_parser import HttpRequestParser

from gproxyd import __version__, config
from gproxyd.config import Config, ListenAddress
from gproxyd.errors import ConfigError
from gproxyd.gateway import snapshot as snapshots
from gproxyd.gateway.crowd import Crowd, room_for
from gproxyd.gateway.door import Door, Handler
from gproxyd.gateway.doorstep import ShortWay
from gproxyd.gateway.exchange import Exchanges
from gproxyd.gateway.handler import Gateway
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.observe.journal import Journal, JournalHandler, Occasional, default_form
from gproxyd.secrets import SecretStore
from gproxyd.upstream.deadlines import Deadlines
from gproxyd.upstream.dial import Dialler
from gproxyd.upstream.pool import Pool
from gproxyd.vendors.catalogue import vendors

BACKLOG = 4096
"""Connections that may wait to be accepted."""

FLUSH = 2.0
"""Seconds that answers which were broken off get to be delivered."""


def load(path: Path, environ: Mapping[str, str]) -> Snapshot:
    """A configuration at work, from its files and secrets. Raises ConfigError with every problem."""
    known = {name: vendor.base_url is not None for name, vendor in vendors().items()}
    store = SecretStore.from_environment(environ)
    built = snapshots.build(config.load(path, vendors=known), vendors(), store)
    return snapshots.with_warnings(built, store.warnings)


def journal_for(settings: Config) -> Journal:
    form = settings.log.format
    journal = Journal(level=settings.log.level, form=default_form() if form == "auto" else form)
    root = logging.getLogger()
    root.handlers[:] = [JournalHandler(journal)]
    root.setLevel(logging.WARNING)
    return journal


class Daemon:
    """One gateway process."""

    def __init__(self, snapshot: Snapshot, journal: Journal, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._journal = journal
        self._deadlines = Deadlines(loop)
        self._pool = Pool(Dialler(loop), self._deadlines, loop)
        self.gateway = Gateway(snapshot, Exchanges(self._pool, self._deadlines, journal, loop), journal)
        server = snapshot.config.server
        crowd = Crowd(room_for(server.max_connections), server.max_connections_per_address, server.trusted_proxies)
        self._told = Occasional(journal, "info")
        self._door = self._make_door(self.gateway.answer, crowd, self.gateway.lane.take)
        # Whoever watches over the gateway gets in when nobody else does any more.
        self._ops_door = self._make_door(self.gateway.answer_ops, Crowd(64, 64, server.trusted_proxies))
        self._servers: dict[Door, list[asyncio.Server]] = {self._door: [], self._ops_door: []}
        self.addresses: list[str] = []

    def _make_door(self, handler: Handler, crowd: Crowd, short_way: ShortWay | None = None) -> Door:
        return Door(
            handler,
            loop=self._loop,
            deadlines=self._deadlines,
            crowd=crowd,
            told=self._told,
            malformed=self._malformed,
            short_way=short_way,
        )

    def _malformed(self, request_id: str, client: str | None) -> None:
        self._told.record("malformed_request", request_id=request_id, client=client, status=400)

    async def start(self) -> None:
        """Opens the listeners. Raises OSError, naming the address."""
        server = self.gateway.snapshot.config.server
        for warning in self.gateway.snapshot.warnings:
            self._journal.record("warning", "configuration", message=warning)
        try:
            for door, listeners in ((self._door, server.listen), (self._ops_door, server.ops_listen)):
                for listener in listeners:
                    await self._listen(door, listener)
        except OSError:
            self._close(self._door)
            self._close(self._ops_door)
            raise
        self._journal.record("info", "ready", version=__version__, listen=" ".join(self.addresses))

    async def _listen(self, door: Door, listener: ListenAddress) -> None:
        try:
            if listener.path is not None:
                _remove_stale(listener.path)
                opened = await self._loop.create_unix_server(door, listener.path, backlog=BACKLOG)
                self.addresses.append(f"unix:{listener.path}")
            else:
                opened = await self._loop.create_server(door, listener.host, listener.port, backlog=BACKLOG)
                for sock in opened.sockets:
                    host, port = sock.getsockname()[:2]
                    self.addresses.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except OSError as failed:
            raise OSError(f"cannot listen on {listener}: {failed.strerror or failed}") from failed
        self._servers[door].append(opened)

    def _close(self, door: Door) -> None:
        """No new connections there."""
        while self._servers[door]:
            self._servers[door].pop().close()

    def reload(self, path: Path, environ: Mapping[str, str]) -> bool:
        """Reads the configuration again. A bad one changes nothing. Running requests finish on the old one."""
        try:
            snapshot = load(path, environ)
        except ConfigError as error:
            for problem in error.problems:
                self._journal.record("error", "configuration", message=str(problem))
            self._journal.record("error", "reload_refused", help="the running configuration stays")
            return False
        old = self.gateway.snapshot.config
        if (old.server.listen, old.server.ops_listen, old.log) != (
            snapshot.config.server.listen,
            snapshot.config.server.ops_listen,
            snapshot.config.log,
        ):
            self._journal.record("warning", "configuration", message="server.listen and log change at a restart only")
        for warning in snapshot.warnings:
            self._journal.record("warning", "configuration", message=warning)
        self.gateway.snapshot = snapshot
        self._journal.record("info", "reloaded")
        return True

    async def drain(self, hurry: asyncio.Event) -> None:
        """No new clients; what runs may finish for `server.drain`, unless somebody is in a hurry.

        `server.ops_listen` stays open, so that /readyz can tell of it.
        """
        self.gateway.draining = True
        self._close(self._door)
        for connection in self._door.connections:
            connection.close()  # idle ones end now, the others after their answer
        limit = self.gateway.snapshot.config.server.drain
        self._journal.record("info", "draining", in_flight=self.gateway.in_flight)
        waits = [self._loop.create_task(event.wait()) for event in (self.gateway.quiet, hurry)]
        await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def stop(self) -> None:
        """Ends what still runs as a failure that its client can see, and closes everything."""
        self._close(self._ops_door)
        self.gateway.stop_streams()
        await asyncio.wait((self._loop.create_task(self.gateway.quiet.wait()),), timeout=FLUSH)
        for door in (self._door, self._ops_door):
            await door.shutdown(0.1)
        self._pool.close()
        self._deadlines.stop()
        self._journal.record("info", "stopped")


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


def run(path: Path, environ: Mapping[str, str]) -> None:
    """Serves until a signal ends it. Raises ConfigError or OSError before anything is served."""
    if sys.flags.dev_mode or environ.get("PYTHONASYNCIODEBUG"):
        raise OSError("Python's development mode shows in answers what must not be shown; serve without it")
    snapshot = load(path, environ)
    journal = journal_for(snapshot.config)
    if HttpRequestParser.__module__ != "aiohttp._http_parser":
        journal.record("warning", "slow_parser", help="aiohttp runs without its compiled parser")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(snapshot, journal, path, environ))
    finally:
        journal.close()


async def _serve(snapshot: Snapshot, journal: Journal, path: Path, environ: Mapping[str, str]) -> None:
    loop = asyncio.get_running_loop()
    daemon = Daemon(snapshot, journal, loop)
    ending, hurry = asyncio.Event(), asyncio.Event()

    def end() -> None:
        (hurry if ending.is_set() else ending).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload, path, environ)
    await daemon.start()
    settle_memory()
    await ending.wait()
    await daemon.drain(hurry)
    await daemon.stop()


def settle_memory() -> None:
    """What start-up made stays for good, so the collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
