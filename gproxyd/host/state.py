"""What outlives the process, opened, kept and closed: people, money, limits, the ledger, envelopes.

Invariants: nobody is served before what dead processes left is in the ledger and the accounts know of it; a database
that fails later stops nobody. Without a place for the file everything is held in memory only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from gproxyd.config import Config
from gproxyd.observe.journal import Journal
from gproxyd.policy.limits import Limiter
from gproxyd.policy.quotas import Account, Period, Quotas
from gproxyd.store import people, reports
from gproxyd.store.database import Database
from gproxyd.store.errors import StoreError
from gproxyd.store.homes import Homes
from gproxyd.store.ledger import Ledger
from gproxyd.store.logs import RequestLog
from gproxyd.store.people import StoredUser

SAVE_EVERY = 5.0
"""Seconds between two savings of what rate limits have counted: what a killed process may forget."""

PRUNE_EVERY = 3600.0

CATCH_UP = 2.0
"""Seconds for which the ledger is waited for."""

_COUNTERS = "limits"

PERIODS: tuple[Period | None, ...] = (None, "day", "month")


class State:
    """`stored` are the people of the database, as they were last read."""

    def __init__(self, journal: Journal, quotas: Quotas, limiter: Limiter) -> None:
        self._journal = journal
        self._quotas = quotas
        self._limiter = limiter
        self._keeper: asyncio.Task[None] | None = None
        self._counts = True  # whether what rate limits have counted is this process's to save
        self._gone: set[str] = set()  # accounts whose last spending may still be on its way to the database
        self._periods: dict[str, Period | None] = {}  # of accounts that know what they have spent
        self.database: Database | None = None
        self.ledger: Ledger | None = None
        self.logs: RequestLog | None = None
        self.homes: Homes | None = None
        self.stored: Mapping[str, StoredUser] = {}

    def _warn(self, event: str, /, **fields: object) -> None:
        self._journal.record("warning", event, **fields)

    async def open(self, path: Path) -> None:
        """Raises StoreError if the file cannot be used."""
        self.database = await Database.open(path)
        for warning in self.database.warnings:
            self._warn("database", message=warning)
        self.ledger = Ledger(self.database, path.with_name(path.name + ".spool"), self._warn)
        await self.ledger.start()
        self.logs = RequestLog(self.database, self._warn)
        self.logs.start()
        self.homes = Homes(self.database, self._warn)
        self.homes.start()
        self.stored = await people.load(self.database)
        counted = await people.load_counters(self.database, _COUNTERS)
        if counted is not None and not self._limiter.restore(counted):
            self._warn("database", message="what rate limits had counted could not be read, and counts anew")

    def keep(self, config: Callable[[], Config]) -> None:
        """Saves and prunes from now on. `config` gives the running configuration."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep(config))

    async def _keep(self, config: Callable[[], Config]) -> None:
        pruned = time.monotonic() - PRUNE_EVERY
        while True:
            await asyncio.sleep(SAVE_EVERY)
            try:
                await self._save()
                if time.monotonic() - pruned >= PRUNE_EVERY:
                    pruned = time.monotonic()
                    await self._prune(config())
            except StoreError as error:
                self._warn("database", message=str(error))

    async def _save(self) -> None:
        if self.database is not None:
            await people.save_counters(self.database, _COUNTERS, self._limiter.dump())

    async def _prune(self, config: Config) -> None:
        assert self.database is not None
        assert self.logs is not None
        now = time.time()
        await reports.prune(self.database, now - config.records.usage_keep)
        await self.logs.prune(now - config.records.log_keep)
        if self.homes is not None:
            await self.homes.prune()

    def hand_over(self) -> None:
        """Another process counts and prunes from here on: what this one saved would overwrite what that one knows."""
        self._counts = False
        if self._keeper is not None:
            self._keeper.cancel()

    async def read_people(self) -> None:
        """Reads the people of the database again. Raises StoreError."""
        if self.database is not None:
            self.stored = await people.load(self.database)

    async def settle_accounts(self, accounts: Mapping[str, Account]) -> None:
        """Tells accounts that are new here what was spent, and those that have another period what was topped up in it.

        Raises StoreError.
        """
        changed = {name: account.period for name, account in accounts.items() if self._is_changed(account)}
        if self.database is None or not changed:
            return
        new = changed.keys() - self._periods.keys()
        if any(name in self._gone or name.startswith("key:") for name in new):  # such a name may have spent already
            await self._caught_up()
        credits = await people.credits_by_day(self.database)
        days = {period: self._first_day(period) for period in PERIODS}
        for period in PERIODS if new else ():
            for (sort, owner), nano in (await reports.spent(self.database, days[period])).items():
                if (name := f"{sort}:{owner}") in new:
                    self._quotas.tell(name, period, nano)
        for name, period in changed.items():
            day = days[period]
            total = sum(nano for at, nano in credits.get(name, ()) if day is None or at >= day)
            self._quotas.set_credit(name, total)
        self._periods.update(changed)
        self._gone -= changed.keys()

    def _first_day(self, period: Period | None) -> str | None:
        since = self._quotas.since(period)
        return datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d") if since else None

    def forget(self, name: str) -> None:
        """An account is gone; one of the same name must be told anew what was spent under it."""
        self._periods.pop(name, None)
        self._gone.add(name)

    def _is_changed(self, account: Account) -> bool:
        return account.name not in self._periods or self._periods[account.name] != account.period

    async def _caught_up(self) -> None:
        """What was booked until now is in the database, too (what comes meanwhile need not be); or that is away."""
        ledger, ends = self.ledger, time.monotonic() + CATCH_UP
        if ledger is None:
            return
        moved = ledger.written + ledger.queued
        while ledger.queued and ledger.written < moved and time.monotonic() < ends:  # noqa: ASYNC110 - this is rare
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Writes what is left, and closes."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self.ledger is not None:
            await self.ledger.stop()
        if self.logs is not None:
            await self.logs.stop()
        if self.homes is not None:
            await self.homes.stop()
        if self.database is not None:
            try:
                if self._counts:
                    await self._save()
            except StoreError as error:
                self._warn("database", message=str(error))
            await self.database.close()
            self.database = None
