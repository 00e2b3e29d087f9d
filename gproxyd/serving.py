"""The process around a daemon: signals, the service manager, another process that takes over.

    SIGTERM, SIGINT   drain and end; a second one ends what still runs, a third one does not even wait for that
    SIGHUP            read the configuration again, in place
    SIGUSR2           another process takes over, with whatever code and configuration are there by now

Invariants: the manager hears READY only from a process that serves, and from one process at a time; a process that
another one has taken over from serves nobody new, and ends with exit status 0 when its last client is gone.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import resource
import signal
import sys
from collections.abc import Coroutine, MutableMapping
from pathlib import Path
from typing import Any

import uvloop
from aiohttp.http_parser import HttpRequestParser

from gproxyd.daemon import Daemon, Places, journal_for, load
from gproxyd.errors import GproxydError
from gproxyd.host.handoff import HandOverFailed, Predecessor, Successor
from gproxyd.host.systemd import Manager, Pulse, Sockets, take_sockets
from gproxyd.observe.journal import Journal
from gproxyd.observe.pprof import waits
from gproxyd.upstream.dial import tls_context
from gproxyd.vendors import models

KILLED = 128 + signal.SIGTERM
"""The exit status of a process that did not wait."""


def run(path: Path, environ: MutableMapping[str, str]) -> None:
    """Serves until a signal ends it. Raises ConfigError, StoreError or OSError before anything is served."""
    if sys.flags.dev_mode or environ.get("PYTHONASYNCIODEBUG"):
        raise OSError("Python's development mode shows in answers what must not be shown; serve without it")
    faulthandler.enable()  # a watchdog that ends a blocked process wants to know where it was: frames, no values
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an image of the memory would hold every key
    gc.disable()  # until `settle_memory`: what is made at the start stays
    manager = Manager.take(environ)
    given = take_sockets(environ, os.getpid())
    predecessor = Predecessor.take(environ)
    try:
        _run(path, environ, manager, given if predecessor is None else predecessor.sockets, predecessor)
    except (GproxydError, OSError) as error:
        if predecessor is not None:
            predecessor.refuse(str(error))
        raise


def _run(
    path: Path,
    environ: MutableMapping[str, str],
    manager: Manager,
    given: Sockets,
    predecessor: Predecessor | None,
) -> None:
    snapshot = load(path, environ)
    journal = journal_for(snapshot.config)
    if HttpRequestParser.__module__ != "aiohttp._http_parser":
        journal.record("warning", "slow_parser", help="aiohttp runs without its compiled parser")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            places = Places.of(snapshot.config, path, environ)
            daemon = Daemon(snapshot, journal, runner.get_loop(), places, given=given, predecessor=predecessor)
            runner.run(Service(daemon, journal, manager, environ, predecessor).serve(path))
    finally:
        journal.close()


class Service:
    """One daemon from its first to its last moment."""

    def __init__(
        self,
        daemon: Daemon,
        journal: Journal,
        manager: Manager,
        environ: MutableMapping[str, str],
        predecessor: Predecessor | None,
    ) -> None:
        self._daemon = daemon
        self._journal = journal
        self._manager = manager
        self._environ = environ
        self._predecessor = predecessor
        self._ending, self._hurry = asyncio.Event(), asyncio.Event()
        self._orders = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._handing_over = asyncio.Lock()
        self._reloads = 0
        self._successor: Successor | None = None

    async def serve(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(waits.Executor())  # so that waiting for it can be profiled
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload(path)))
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._begin(self._try_to_hand_over()))
        pulse = Pulse(self._manager, loop, self._daemon.well, self._daemon.status)
        self._daemon.hand_over = self._hand_over
        await self._daemon.start(warmed=warm_up)
        self._manager.ready()
        pulse.start()
        await self._ending.wait()
        await self._leave(pulse)

    async def _leave(self, pulse: Pulse) -> None:
        successor = self._successor
        if successor is None:
            self._manager.stopping()
            pulse.stay()
        await self._daemon.drain(self._hurry, handed_over=successor is not None)
        await self._daemon.stop()
        pulse.stop()
        if successor is not None:
            await successor.close()

    def _end(self) -> None:
        """Counts orders, not states: one that drains after a hand-over hears the manager's first one, too."""
        self._orders += 1
        if self._orders > 2:
            os._exit(KILLED)
        (self._ending if self._orders == 1 else self._hurry).set()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self, path: Path) -> None:
        if self._reloads == 2:
            return  # one that runs, and one that will see what changed since
        self._reloads += 1
        try:
            self._manager.reloading()
            await self._daemon.reload(path, self._environ)
            self._manager.ready()
        finally:
            self._reloads -= 1

    async def _try_to_hand_over(self) -> None:
        try:
            await self._hand_over()
        except HandOverFailed:
            return  # it is in the log

    async def _hand_over(self) -> int:
        """Returns the pid of the process that has taken over. Raises HandOverFailed."""
        try:
            if self._handing_over.locked() or self._ending.is_set():
                raise HandOverFailed("this process is on its way out, or another one is about to take over already")
            async with self._handing_over:
                return await self._hand_over_now()
        except HandOverFailed as error:
            self._journal.record("error", "hand_over_failed", message=str(error), help="nothing has changed")
            raise

    async def _hand_over_now(self) -> int:
        books = self._daemon.gateway.books
        successor = Successor(books.quotas, books.limiter, books.watchers, self._predecessor)
        environ = {**self._environ, **self._manager.environment()}
        pid = await successor.take_over(environ, self._daemon.listeners.descriptors())
        if self._ending.is_set():
            successor.give_up(signal.SIGTERM)
            raise HandOverFailed("meanwhile this process was told to end")
        self._journal.record("info", "handed_over", pid=pid)
        # Another process speaks from here on: what this one said would be taken for its words.
        self._manager.succeeded_by(pid)
        successor.say_main()
        self._successor = successor
        self._ending.set()
        return pid


def warm_up() -> None:
    """What else the first clients would wait for, while the loop does nothing else."""
    models.facts("", "")
    tls_context()
    settle_memory()


def settle_memory() -> None:
    """What start-up made stays for good, so the collector need not look at it again."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
