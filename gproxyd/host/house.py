"""The daemon as it is administered: what the admin room may ask of it, and what operators are shown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gproxyd.admin.feed import Feed, Subscription
from gproxyd.config import Config
from gproxyd.errors import Refusal
from gproxyd.gateway.handler import Gateway
from gproxyd.gateway.snapshot import Snapshot, with_offers, with_people
from gproxyd.host import explaining
from gproxyd.host.discovering import Discovering
from gproxyd.host.state import State
from gproxyd.observe.journal import Journal
from gproxyd.policy.limits import Limiter
from gproxyd.policy.quotas import Quotas
from gproxyd.store.database import Database
from gproxyd.store.logs import RequestLog
from gproxyd.store.people import StoredUser

T = TypeVar("T")


class House:
    """Implements `admin.house.House` over the rooms that the daemon has made."""

    def __init__(
        self, gateway: Gateway, state: State, feed: Feed, reload: Callable[[], Awaitable[Sequence[str]]]
    ) -> None:
        self._gateway = gateway
        self._state = state
        self._feed = feed
        self._reload = reload
        self._seating = asyncio.Lock()
        self._discovering: Discovering | None = None

    @property
    def database(self) -> Database | None:
        return self._state.database

    @property
    def logs(self) -> RequestLog | None:
        return self._state.logs

    @property
    def quotas(self) -> Quotas:
        return self._gateway.books.quotas

    @property
    def limiter(self) -> Limiter:
        return self._gateway.books.limiter

    @property
    def config(self) -> Config:
        return self._gateway.snapshot.config

    @property
    def stored(self) -> Mapping[str, StoredUser]:
        return self._state.stored

    async def people_changed(self) -> None:
        async with self._seating:
            await self._state.read_people()
            await self._seat(self._gateway.snapshot)

    async def seat(self, snapshot: Snapshot) -> None:
        """Puts a configuration in force, with everybody who may call and what they have left. Raises StoreError.

        One after the other: who changes people meanwhile sees the configuration that is in force by then.
        """
        async with self._seating:
            await self._seat(await self._stocked(snapshot))
        if self._discovering is not None:
            self._discovering.wake()

    async def stock(self, database: Path | None, journal: Journal) -> None:
        """Offers what the vendors listed before, and asks them from now on. The lists are kept beside the database."""
        path = database.with_name(database.name + ".models") if database is not None else None
        self._discovering = Discovering(journal, lambda: self._gateway.snapshot, self._restock, path)
        await self._discovering.start()

    async def close(self) -> None:
        """Asks nobody any more."""
        if self._discovering is not None:
            await self._discovering.stop()

    async def _restock(self) -> None:
        """Puts the vendors' lists in force, in the configuration that is in force by then."""
        async with self._seating:
            self._gateway.snapshot = await self._stocked(self._gateway.snapshot)

    async def _stocked(self, snapshot: Snapshot) -> Snapshot:
        if self._discovering is None:
            return snapshot
        lists = self._discovering.lists(snapshot)
        return await asyncio.get_running_loop().run_in_executor(None, with_offers, snapshot, lists)

    async def _seat(self, snapshot: Snapshot) -> None:
        before = set(self.quotas.accounts())
        seated = await _in_turns(with_people(snapshot, self._state.stored, self.quotas))
        for name in before - self.quotas.accounts().keys():
            self._state.forget(name)
        await self._state.settle_accounts(self.quotas.accounts())
        self._gateway.snapshot = seated

    async def reload(self) -> Sequence[str]:
        return await self._reload()

    def providers(self) -> Sequence[Mapping[str, Any]]:
        listed = self._discovering.told if self._discovering is not None else None
        return explaining.providers(self._gateway.snapshot, listed)

    def models(self) -> Sequence[Mapping[str, Any]]:
        return explaining.models(self._gateway.snapshot)

    async def refresh_models(self) -> Mapping[str, Any]:
        """Asks every vendor now. Raises Refusal (503) before `stock`."""
        if self._discovering is None:
            raise Refusal("overloaded", "the gateway is starting; ask again in a moment")
        await self._discovering.refresh()
        return {"providers": {name: self._discovering.told(name) for name in self._gateway.snapshot.providers}}

    def explain(self, model: str, user: str | None, endpoint: str | None) -> Mapping[str, Any]:
        registry = self._gateway.exchanges.registry
        return explaining.explain(self._gateway.snapshot, self.quotas, self.limiter, registry, model, user, endpoint)

    def subscribe(self) -> Subscription:
        return self._feed.subscribe()


async def _in_turns(steps: Generator[None, None, T]) -> T:
    """Takes the steps one by one, everybody else in between."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: T = end.value
            return made
        await asyncio.sleep(0)
