"""The composition root: the only place that wires rooms together.

A life: `build` (nothing is opened), `start` (sockets), `reload` (validate first, then swap), `stop` (drain, then end).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import orjson

from gproxyd import __version__, config
from gproxyd.admin.api import Admin
from gproxyd.admin.feed import Feed
from gproxyd.config import Config
from gproxyd.errors import ConfigError, GproxydError, Problem, Refusal
from gproxyd.gateway import snapshot as snapshots
from gproxyd.gateway.books import Books
from gproxyd.gateway.crowd import Crowd, room_for
from gproxyd.gateway.door import Door, Handler
from gproxyd.gateway.doorstep import ShortWay
from gproxyd.gateway.exchange import Exchanges
from gproxyd.gateway.handler import Gateway
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.host.figures import figures
from gproxyd.host.handoff import HandOverFailed, Predecessor
from gproxyd.host.house import House
from gproxyd.host.leaving import see_off
from gproxyd.host.listeners import Listeners
from gproxyd.host.profiles import profiles
from gproxyd.host.state import State
from gproxyd.host.systemd import Sockets
from gproxyd.observe.journal import Journal, JournalHandler, Occasional, default_form
from gproxyd.observe.lag import LoopLag
from gproxyd.observe.otel import opened
from gproxyd.observe.stats import Stats
from gproxyd.policy.limits import Limiter
from gproxyd.policy.quotas import Quotas
from gproxyd.secrets import SecretStore
from gproxyd.store.errors import StoreError
from gproxyd.types import Answer, Question
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
    "tracing",
)
"""What a reload does not change."""

HAND_OVER = "/admin/handoff"
"""Asked by the service manager on this machine, and by nobody else."""

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
    """One gateway process. `places` says where its files and secrets are; without any, all is held in memory.

    given        sockets to listen on that somebody else has opened
    predecessor  the process that this one takes over from
    hand_over    has another process take over and returns its pid, or raises HandOverFailed; None where nobody can
    """

    def __init__(
        self,
        snapshot: Snapshot,
        journal: Journal,
        loop: asyncio.AbstractEventLoop,
        places: Places | None = None,
        *,
        given: Sockets | None = None,
        predecessor: Predecessor | None = None,
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
        self._doors = (self._door, self._ops_door, self._local_door)
        self.listeners = Listeners(loop, given)
        self._predecessor = predecessor
        self.hand_over: Callable[[], Awaitable[int]] | None = None
        self._reloading = asyncio.Lock()

    @property
    def addresses(self) -> Sequence[str]:
        """Where clients, and then operators, find it."""
        return self.listeners.addresses

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
        stats.sources.predecessors = lambda: int(self._predecessor is not None and not self._predecessor.gone.is_set())
        stats.sources.traces = lambda: {} if (t := gateway.tracing) is None else {"sent": t.sent, "lost": t.lost}
        books.watchers.append(self._feed.publish)
        gateway.desk.open = {**gateway.desk.open, **figures(stats, self._lag)}
        gateway.desk.admin, gateway.desk.me = self._administer, admin.answer_me
        gateway.desk.debug = profiles(lambda: gateway.snapshot.config)

    def well(self) -> bool:
        """Whether it works: the loop asks, so the loop turns; and records reach the database, or wait for it."""
        return self.state.ledger is None or self.state.ledger.alive

    def status(self) -> str:
        """One line for people."""
        doing = "draining" if self.gateway.draining else "serving" if self.well() else "serving, but the ledger stands"
        streams = len(self.gateway.exchanges.relays)
        return f"{doing}: {self.gateway.in_flight} requests in flight, {streams} of them being answered"

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

    def _malformed(self, request_id: str, client: str | None, status: int) -> None:
        self._told.record("malformed_request", request_id=request_id, client=client, status=status)

    async def start(self, *, warmed: Callable[[], None] = lambda: None) -> None:
        """Opens what outlives the process, then the listeners; `warmed` is called when all but these is there.

        Raises StoreError, ConfigError, or OSError, naming the address.
        """
        before = self._predecessor
        try:
            if before is not None and (counted := await before.limits()) is not None:
                self.gateway.books.limiter.restore(counted)  # first: the database knows no better
            if self._places.state is not None:
                await self.state.open(self._places.state)
            _refuse_twins(self.gateway.snapshot.config, self.state)
            await self.house.seat(self.gateway.snapshot)
            self.gateway.tracing = opened(self.gateway.snapshot.config.tracing, self._journal)
            if before is not None:
                await before.accounts(self.gateway.books.quotas, self.gateway.books.limiter)
        except GproxydError:
            await self.state.close()
            raise
        self._keep_records(self.gateway.snapshot.config)
        self.gateway.exchanges.homes = self.state.homes
        await self.house.stock(self._places.state, self._journal)
        self.state.keep(lambda: self.gateway.snapshot.config)
        self._lag.start(self._loop)
        for warning in self.gateway.snapshot.warnings:
            self._journal.record("warning", "configuration", message=warning)
        warmed()
        await self._open_doors()
        if before is not None:
            await before.serve(self.gateway.books.quotas, self.gateway.books.limiter)
        self._journal.record("info", "ready", version=__version__, listen=" ".join(self.addresses))

    async def _open_doors(self) -> None:
        server, listeners = self.gateway.snapshot.config.server, self.listeners
        if listeners.was_given("ops"):
            self.gateway.ops_elsewhere = True
        try:
            await listeners.open("http", self._door, server.listen)
            await listeners.open("ops", self._ops_door, server.ops_listen)
            await listeners.open_local(self._local_door, self._places.runtime)
        except OSError:
            listeners.close("http", "ops", "admin")
            await self.house.close()
            await self.state.close()
            raise

    async def _administer(self, question: Question) -> Answer:
        """Everything below /admin/. Raises Refusal."""
        if question.path != HAND_OVER or question.method != "POST" or question.user is not None:
            return await self._admin.answer(question)
        if self.hand_over is None:
            raise Refusal("unsupported", "no other process can take over from this one")
        try:
            pid = await self.hand_over()
        except HandOverFailed as error:
            raise Refusal("conflict", str(error)) from error
        return Answer(200, "application/json", orjson.dumps({"handed_over": True, "pid": pid}))

    def _keep_records(self, settings: Config) -> None:
        """What the configuration wants to be kept of requests."""
        self.gateway.books.ledger = self.state.ledger if settings.records.enable_usage else None
        self.gateway.books.logs = self.state.logs

    async def _reload_when_asked(self) -> Sequence[str]:
        """Reads the configuration again; what is wrong with it, if anything."""
        if self._places.config is None:
            return ["there is no configuration that could be read again"]
        return await self.reload(self._places.config, self._places.environ)

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

    async def drain(self, hurry: asyncio.Event, *, handed_over: bool = False) -> None:
        """No new clients; what runs may finish for `server.drain`, unless somebody is in a hurry.

        `server.ops_listen` stays open, so that /readyz can tell of it; but where another process has taken over,
        operators and administrators find that one. A process that this one took over from is waited for, too.
        """
        self.gateway.draining = True
        self._feed.close()  # whoever listens to it would never leave
        self.listeners.close("http", *(("ops", "admin") if handed_over else ()))
        if handed_over:
            self.listeners.leave_behind()
            self.state.hand_over()
        server, before = self.gateway.snapshot.config.server, self._predecessor
        self._journal.record("info", "draining", in_flight=self.gateway.in_flight)
        doors = self._doors if handed_over else (self._door,)
        alone = (lambda: True) if before is None else before.gone.is_set
        await see_off(self.gateway, doors, hurry, server.drain, alone)

    async def stop(self) -> None:
        """Ends what still runs as a failure that its client can see, and closes everything."""
        self._feed.close()
        await self._admin.close()
        self.listeners.close("ops", "admin")
        self.gateway.stop_streams()
        await asyncio.wait((self._loop.create_task(self.gateway.quiet.wait()),), timeout=FLUSH)
        for door in self._doors:
            await door.shutdown(0.1)
        self.listeners.tidy()
        self._lag.stop()
        await self.house.close()
        await self.state.close()
        if self.gateway.tracing is not None:
            await self._loop.run_in_executor(None, self.gateway.tracing.close)
        if self._predecessor is not None:
            self._predecessor.close()
        self._pool.close()
        self._deadlines.stop()
        self._journal.record("info", "stopped")
