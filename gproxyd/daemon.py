"""The composition root: the only place that wires rooms together.

A life: `build` (nothing is opened), `start` (sockets), `reload` (validate first, then swap), `stop` (drain, then end).
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import uvloop
from aiohttp.http_parser import HttpRequestParser

from gproxyd import __version__, config
from gproxyd.admin.api import Admin
from gproxyd.admin.feed import Feed
from gproxyd.config import Config, ListenAddress
from gproxyd.errors import ConfigError, GproxydError, Problem
from gproxyd.gateway import snapshot as snapshots
from gproxyd.gateway.books import Books
from gproxyd.gateway.crowd import Crowd, room_for
from gproxyd.gateway.door import Door, Handler
from gproxyd.gateway.doorstep import ShortWay
from gproxyd.gateway.exchange import Exchanges
from gproxyd.gateway.handler import Gateway
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.host.figures import figures
from gproxyd.host.house import House
from gproxyd.host.profiles import profiles
from gproxyd.host.state import State
from gproxyd.observe.journal import Journal, JournalHandler, Occasional, default_form
from gproxyd.observe.lag import LoopLag
from gproxyd.observe.pprof import waits
from gproxyd.observe.stats import Stats
from gproxyd.policy.limits import Limiter
from gproxyd.policy.quotas import Quotas
from gproxyd.secrets import SecretStore
from gproxyd.store.errors import StoreError
from gproxyd.upstream.deadlines import Deadlines
from gproxyd.upstream.dial import Dialler
from gproxyd.upstream.pool import Pool
from gproxyd.vendors.catalogue import vendors

FIXED = (
    "server.listen",
    "server.ops_listen",
    "server.max_connections",
    "server.max_connections_per_address",
    "log",
    "state",
)
"""What a reload does not change."""

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


@dataclass(frozen=True)
class Places:
    """Where a daemon's things are: its database, the folder of its admin socket, its configuration; None: nowhere."""

    state: Path | None = None
    runtime: Path | None = None
    config: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Config, path: Path, environ: Mapping[str, str]) -> Places:
        """As systemd names them, else as an administrator who starts it by hand would expect."""
        runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        return cls(settings.state.path(environ), Path(runtime) if runtime else None, path, environ)


def _refuse_twins(settings: Config, state: State) -> None:
    """One name in the files and in the database is an error. Raises ConfigError."""
    twins = sorted(settings.users.keys() & state.stored.keys())
    if twins:
        text = "is the name of a user that was made through the admin API, too; remove one of the two"
        raise ConfigError([Problem("the configuration", None, f"users.{name}", text) for name in twins])


class Daemon:
    """One gateway process. `places` says where its files and secrets are; without any, all is held in memory."""

    def __init__(
        self, snapshot: Snapshot, journal: Journal, loop: asyncio.AbstractEventLoop, places: Places | None = None
    ) -> None:
        self._loop = loop
        self._journal = journal
        self._places = places or Places()
        self._started = snapshot.config
        self._deadlines = Deadlines(loop)
        self._pool = Pool(Dialler(loop), self._deadlines, loop)
        self._stats, self._lag, self._feed = Stats(), LoopLag(), Feed()
        books = Books(journal, self._stats, Limiter(), Quotas())
        exchanges = Exchanges(self._pool, self._deadlines, books, journal, loop)
        self.gateway = Gateway(snapshot, exchanges, books, journal)
        self.state = State(journal, books.quotas, books.limiter)
        self.house = House(self.gateway, self.state, self._feed, self._reload_when_asked)
        self._admin = Admin(self.house)
        self._furnish(books)
        server = snapshot.config.server
        crowd = Crowd(room_for(server.max_connections), server.max_connections_per_address, server.trusted_proxies)
        self._told = Occasional(journal, "info")
        self._door = self._make_door(self.gateway.answer, crowd, self.gateway.lane.take)
        # Whoever watches over the gateway gets in when nobody else does any more.
        self._ops_door = self._make_door(self.gateway.answer_ops, Crowd(64, 64, server.trusted_proxies))
        self._local_door = self._make_door(self.gateway.answer_local, Crowd(64, 64, server.trusted_proxies))
        self._servers: dict[Door, list[asyncio.Server]] = {
            self._door: [],
            self._ops_door: [],
            self._local_door: [],
        }
        self._reloading = asyncio.Lock()
        self.addresses: list[str] = []

    def _furnish(self, books: Books) -> None:
        """Introduces the rooms to each other."""
        gateway, stats, admin = self.gateway, self._stats, self._admin
        stats.sources.in_flight = lambda: gateway.in_flight
        stats.sources.rate_limiters = books.limiter.snapshot
        stats.sources.log_lines_dropped = lambda: self._journal.lost
        stats.sources.providers = lambda: {
            name: {"usable": one.usable} for name, one in gateway.snapshot.providers.items()
        }
        stats.sources.usage_sink = self._sink
        books.watchers.append(self._feed.publish)
        gateway.desk.open = {**gateway.desk.open, **figures(stats, self._lag)}
        gateway.desk.admin, gateway.desk.me = admin.answer, admin.answer_me
        gateway.desk.debug = profiles(lambda: gateway.snapshot.config)

    def _sink(self) -> dict[str, int]:
        ledger = self.state.ledger
        if ledger is None:
            return {}
        return {"queued": ledger.queued, "written": ledger.written, "dropped": ledger.dropped}

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
        """Opens what outlives the process, then the listeners. Raises StoreError, ConfigError, or OSError, naming the
        address."""
        server = self.gateway.snapshot.config.server
        try:
            if self._places.state is not None:
                await self.state.open(self._places.state)
            _refuse_twins(self.gateway.snapshot.config, self.state)
            await self.house.seat(self.gateway.snapshot)
        except GproxydError:
            await self.state.close()
            raise
        self._keep_records(self.gateway.snapshot.config)
        self.state.keep(lambda: self.gateway.snapshot.config)
        self._lag.start(self._loop)
        for warning in self.gateway.snapshot.warnings:
            self._journal.record("warning", "configuration", message=warning)
        try:
            for door, listeners in ((self._door, server.listen), (self._ops_door, server.ops_listen)):
                for listener in listeners:
                    await self._listen(door, listener)
            await self._listen_locally()
        except OSError:
            for door in self._servers:
                self._close(door)
            await self.state.close()
            raise
        self._journal.record("info", "ready", version=__version__, listen=" ".join(self.addresses))

    async def _listen_locally(self) -> None:
        """The administrators' socket, for root and the daemon's own user: the kernel says who comes."""
        runtime = self._places.runtime
        if runtime is None:
            return
        path = runtime / "admin.sock"
        _remove_stale(str(path))
        self._servers[self._local_door].append(await self._loop.create_unix_server(self._local_door, path))
        path.chmod(0o600)

    def _keep_records(self, settings: Config) -> None:
        """What the configuration wants to be kept of requests."""
        self.gateway.books.ledger = self.state.ledger if settings.records.enable_usage else None
        self.gateway.books.logs = self.state.logs

    async def _reload_when_asked(self) -> Sequence[str]:
        """Reads the configuration again; what is wrong with it, if anything."""
        if self._places.config is None:
            return ["there is no configuration that could be read again"]
        return await self.reload(self._places.config, self._places.environ)

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

    async def reload(self, path: Path, environ: Mapping[str, str]) -> Sequence[str]:
        """Reads the configuration again. A bad one changes nothing. Running requests finish on the old one.

        Returns what is wrong with it; nothing, if it is in force now.
        """
        async with self._reloading:
            return await self._reload(path, environ)

    async def _reload(self, path: Path, environ: Mapping[str, str]) -> Sequence[str]:
        try:
            # In a thread, because a large file takes a while and nobody is to wait for it.
            snapshot = await self._loop.run_in_executor(None, load, path, environ)
            _refuse_twins(snapshot.config, self.state)
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            for problem in problems:
                self._journal.record("error", "configuration", message=problem)
            self._journal.record("error", "reload_refused", help="the running configuration stays")
            return problems
        for key in FIXED:
            if attrgetter(key)(self._started) != attrgetter(key)(snapshot.config):
                self._journal.record("warning", "configuration", message=f"{key}: changes at a restart only")
        for warning in snapshot.warnings:
            self._journal.record("warning", "configuration", message=warning)
        try:
            await self.house.seat(snapshot)
        except StoreError as error:
            self._journal.record("error", "reload_refused", message=str(error), help="the running configuration stays")
            return [str(error)]
        self._keep_records(snapshot.config)
        self._journal.record("info", "reloaded")
        return []

    async def drain(self, hurry: asyncio.Event) -> None:
        """No new clients; what runs may finish for `server.drain`, unless somebody is in a hurry.

        `server.ops_listen` stays open, so that /readyz can tell of it.
        """
        self.gateway.draining = True
        self._feed.close()  # whoever listens to it would never leave
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
        self._feed.close()
        await self._admin.close()
        self._close(self._ops_door)
        self._close(self._local_door)
        self.gateway.stop_streams()
        await asyncio.wait((self._loop.create_task(self.gateway.quiet.wait()),), timeout=FLUSH)
        for door in self._servers:
            await door.shutdown(0.1)
        if self._places.runtime is not None:
            (self._places.runtime / "admin.sock").unlink(missing_ok=True)
        self._lag.stop()
        await self.state.close()
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
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an image of the memory would hold every key
    gc.disable()  # until `settle_memory`: what is made at the start stays
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
    loop.set_default_executor(waits.Executor())  # so that waiting for it can be profiled
    daemon = Daemon(snapshot, journal, loop, Places.of(snapshot.config, path, environ))
    ending, hurry = asyncio.Event(), asyncio.Event()

    def end() -> None:
        (hurry if ending.is_set() else ending).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    reloads: set[asyncio.Task[Sequence[str]]] = set()

    def reload() -> None:
        if len(reloads) < 2:  # one that runs, and one that will see what changed since
            task = loop.create_task(daemon.reload(path, environ))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    await daemon.start()
    settle_memory()
    await ending.wait()
    await daemon.drain(hurry)
    await daemon.stop()


def settle_memory() -> None:
    """What start-up made stays for good, so the collector need not look at it again."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
