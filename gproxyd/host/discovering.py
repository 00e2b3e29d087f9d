"""The task that asks the vendors for their models, and what it has learnt of them, kept on disk.

Invariants: a vendor that cannot be asked, or whose answer is no list, changes nothing: its last good list stays, over
restarts too. A list holds only for the place that gave it: a provider that moves begins without one. Nothing that runs
on a request's path waits for anything here.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from gproxyd.gateway.snapshot import Snapshot
from gproxyd.host import asking
from gproxyd.observe.journal import Journal
from gproxyd.vendors import discovery
from gproxyd.vendors.discovery import Found, NoList

AT_ONCE = 16
"""Vendors that are asked at the same time."""

RETRY = 60.0
"""Seconds until a vendor that could not be asked is asked again, if `discovery.interval` is not shorter."""

_LARGEST = 256 * 2**20
"""Bytes of a file that is read again."""

Lists = Mapping[str, Sequence[Found]]


@dataclass(frozen=True, slots=True)
class Known:
    """What one provider's vendor listed.

    home    the address that was asked
    models  its last good list
    at      when that was (seconds since the epoch); None: there is none
    error   why the last attempt gave none; None: it did
    """

    home: str
    models: Sequence[Found] = ()
    at: float | None = None
    error: str | None = None


class Discovering:
    """Asks the vendors of the configuration that `snapshot` gives, and has `offer` told when their lists change.

    `rounds` counts how often that was done.
    """

    def __init__(
        self,
        journal: Journal,
        snapshot: Callable[[], Snapshot],
        offer: Callable[[], Awaitable[None]],
        path: Path | None,
    ) -> None:
        """`path` is the file that keeps the lists; None: they are held in memory only."""
        self._journal = journal
        self._snapshot = snapshot
        self._offer = offer
        self._path = path
        self._known: dict[str, Known] = {}
        self._due: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._asked_for: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()
        self._woken = asyncio.Event()
        self.rounds = 0

    async def start(self) -> None:
        """Offers what was known before, and asks from now on."""
        if self._path is not None:
            try:
                self._known = await asyncio.get_running_loop().run_in_executor(None, _load, self._path)
            except (OSError, ValueError) as failed:
                self._warn(f"the lists of models that were kept cannot be read ({type(failed).__name__})")
        if self.lists(self._snapshot()):
            await self._offer()
        self._task = asyncio.create_task(self._keep_asking())

    async def stop(self) -> None:
        for task in (self._task, self._asked_for):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def lists(self, snapshot: Snapshot) -> Lists:
        """The lists that hold for a configuration, by provider."""
        homes = {name: _home(snapshot, name) for name in snapshot.providers}
        return {
            name: known.models for name, known in self._known.items() if known.models and homes.get(name) == known.home
        }

    def wake(self) -> None:
        """The configuration has changed: who is new in it is asked now."""
        self._woken.set()

    def told(self, name: str) -> Mapping[str, Any]:
        """How a provider's list fares. `models` are those of its last good list, `at` seconds since the epoch."""
        known = self._known.get(name)
        if known is None or known.home != _home(self._snapshot(), name):
            return {"models": 0, "at": None, "error": _why_not(self._snapshot(), name)}
        return {"models": len(known.models), "at": known.at, "error": known.error}

    async def refresh(self) -> None:
        """Asks every vendor now. Who asks for it while that is under way waits for the same round."""
        if self._asked_for is None or self._asked_for.done():
            self._asked_for = asyncio.create_task(self._ask(None))
        await asyncio.shield(self._asked_for)

    async def _keep_asking(self) -> None:
        while True:
            self._woken.clear()
            settings = self._snapshot().config.discovery
            if settings.enabled:
                if due := self._overdue(settings.interval):
                    await self._ask(due)
                pause = min(self._due.values(), default=time.monotonic() + settings.interval) - time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(pause, 0.01) if settings.enabled else None):
                    await self._woken.wait()

    def _overdue(self, interval: float) -> list[str]:
        """The providers that it is time to ask: those that moved are new."""
        snapshot, now = self._snapshot(), time.monotonic()
        for name in self._due.keys() - snapshot.providers.keys():
            del self._due[name]
        due = []
        for name in snapshot.providers:
            known = self._known.get(name)
            moved = known is None or known.home != _home(snapshot, name)
            if moved or self._due.get(name, now) <= now:
                due.append(name)
                self._due[name] = now + interval
        return due

    async def _ask(self, names: Sequence[str] | None) -> None:
        """One round: these vendors, or all there are, at the same time. One round after the other."""
        async with self._asking:
            snapshot = self._snapshot()
            before = self.lists(snapshot)
            gate = asyncio.Semaphore(AT_ONCE)
            async with asking.session() as client:
                await asyncio.gather(
                    *(
                        self._ask_one(client, gate, snapshot, name)
                        for name in (snapshot.providers if names is None else names)
                        if _why_not(snapshot, name) is None
                    )
                )
            if self.lists(snapshot) != before:
                await self._offer()
            await self._save(snapshot)
            self.rounds += 1

    async def _ask_one(
        self, client: aiohttp.ClientSession, gate: asyncio.Semaphore, snapshot: Snapshot, name: str
    ) -> None:
        provider, home = snapshot.providers[name], _home(snapshot, name) or ""
        known = self._known.get(name)
        kept = known.models if known is not None and known.home == home else ()
        try:
            async with gate:
                models = await asking.ask(client, provider)
        except NoList as failed:
            error = str(failed)
        except Exception as bug:  # noqa: BLE001 - the last resort: a bug with one list must not end all asking
            error = f"the gateway failed ({type(bug).__name__})"
        else:
            self._known[name] = Known(home, models, time.time())
            self._journal.record("info", "discovery", provider=name, models=len(models))
            return
        self._known[name] = Known(home, kept, known.at if known is not None and kept else None, error)
        self._due[name] = min(self._due.get(name, time.monotonic()), time.monotonic() + RETRY)
        if known is None or known.error != error:
            self._warn("the vendor's list of models could not be had", provider=name, error=error)

    def _warn(self, message: str, **more: object) -> None:
        self._journal.record("warning", "discovery", message=message, **more)

    async def _save(self, snapshot: Snapshot) -> None:
        """Keeps the lists of the providers that there are."""
        if self._path is None:
            return
        kept = {name: one for name, one in self._known.items() if one.models and name in snapshot.providers}
        try:
            await asyncio.get_running_loop().run_in_executor(None, _write, self._path, kept)
        except OSError as failed:
            self._warn(f"the lists of models cannot be kept: {failed.strerror}")


def _home(snapshot: Snapshot, name: str) -> str | None:
    """The address that is asked for a provider's models."""
    provider = snapshot.providers.get(name)
    return asking.place(provider) if provider is not None else None


def _why_not(snapshot: Snapshot, name: str) -> str | None:
    """Why a provider's vendor is not asked at all."""
    if not snapshot.providers[name].usable:
        return "it is switched off: its secret is missing"
    return "its vendor tells no list" if _home(snapshot, name) is None else None


def _load(path: Path) -> dict[str, Known]:
    """The lists that were kept, read as carefully as a vendor's own. Raises OSError, ValueError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return {}
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("this is no file")
        data = file.read(_LARGEST + 1)
    told = orjson.loads(data) if len(data) <= _LARGEST else None
    if not isinstance(told, dict):
        raise ValueError("this is no file of lists")
    return {
        name: Known(one["home"], discovery.read(one["models"]), float(one["at"]))
        for name, one in told.items()
        if isinstance(one, dict)
        and isinstance(one.get("home"), str)
        and isinstance(one.get("models"), list)
        and isinstance(one.get("at"), int | float)
    }


def _write(path: Path, kept: Mapping[str, Known]) -> None:
    """All of it or nothing, for our own eyes. Raises OSError."""
    told = {name: {"home": one.home, "at": one.at, "models": discovery.write(one.models)} for name, one in kept.items()}
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(orjson.dumps(told))
            file.flush()
            os.fsync(descriptor)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
