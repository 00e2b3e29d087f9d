"""Money: what an account may spend, what it has spent, and what running requests hold of the rest.

Nano-dollars, integers. Periods are days or months of UTC.

Invariants: nothing is reserved in one account unless it is in all; what is reserved is returned exactly once;
`spent + held + remaining == limit + credit`; an account's period never goes back, whatever the wall clock does, so
no period is granted twice. The truth may exceed what was reserved: then the account owes, and `remaining` is negative.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Literal
from weakref import WeakValueDictionary

from gproxyd.errors import Refusal

Period = Literal["day", "month"]

MOST = 10**18
"""Nano-dollars: no single amount is believed to be more than a billion dollars."""

_EPOCH = date(1970, 1, 1).toordinal()
_DAY = 86_400


class Account:
    """What one user or key may spend: "user:alice", "key:alice/laptop". Changed by its Quotas and their holds only.

    limit    nano-dollars, None = no limit (what is spent is counted all the same)
    period   in which the limit holds; None = once and for all
    credit   what was topped up in this period
    spent    in this period; what it was in the present day and month, and in all, is known beside it, so that another
             period finds the truth
    held     reserved by requests that run
    """

    __slots__ = ("__weakref__", "_sums", "credit", "held", "index", "limit", "name", "period", "spent")

    def __init__(self, name: str, limit: int | None, period: Period | None, index: int) -> None:
        self.name = name
        self.limit = limit
        self.period = period
        self.index = index  # the number of the period that the sums belong to
        self.credit = 0
        self.spent = 0
        self.held = 0
        self._sums: dict[Period | None, tuple[int, int]] = {}  # period -> (its number, what was spent in it)

    def book(self, nano: int, index: Mapping[Period | None, int]) -> None:
        """Money was spent. `index` holds the number of each present period, the account's own being `self.index`."""
        self.spent += nano
        for period, number in index.items():
            known, spent = self._sums.get(period, (number, 0))
            self._sums[period] = (number, spent + nano if known == number else nano)

    def tell(self, period: Period | None, number: int, nano: int) -> None:
        """What had been spent in a present period before."""
        self._sums[period] = (number, nano)
        if period == self.period:
            self.spent = nano

    def change(self, period: Period | None, number: int) -> None:
        """From now on the limit holds in another period."""
        known, spent = self._sums.get(period, (number, 0))
        self.period, self.index = period, number
        self.spent = spent if known == number else 0
        self.credit = 0

    def turn(self, index: int) -> None:
        """The next period: a clean sheet, but for what is still held."""
        self.index = index
        self.spent = self.credit = 0

    def remaining(self) -> int | None:
        return None if self.limit is None else self.limit + self.credit - self.spent - self.held

    def __repr__(self) -> str:
        return f"<Account {self.name}>"


class Hold:
    """What one request has reserved. The first of settle and release counts; later ones do nothing."""

    __slots__ = ("_accounts", "_nano", "_quotas")

    def __init__(self, quotas: Quotas | None, accounts: Sequence[Account], nano: int) -> None:
        self._quotas = quotas
        self._accounts = accounts
        self._nano = nano

    @property
    def open(self) -> bool:
        """Whether anything is still reserved."""
        return self._quotas is not None

    def settle(self, nano: int) -> None:
        """Books what the request has cost, into the period that it is now. Below 0 or above MOST: that bound."""
        quotas = self._quotas
        if quotas is None:
            return
        self._quotas = None
        index = quotas.index()
        cost = 0 if nano < 0 else min(nano, MOST)
        for account in self._accounts:
            if account.index != index[account.period]:
                account.turn(index[account.period])
            account.held -= self._nano
            account.book(cost, index)

    def release(self) -> None:
        """The request has cost nothing."""
        if self._quotas is None:
            return
        self._quotas = None
        for account in self._accounts:
            account.held -= self._nano


FREE = Hold(None, (), 0)
"""What a request has reserved that belongs to no account: nothing."""


class Quotas:
    """All accounts of one process. `wall` tells seconds since the epoch."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._accounts: dict[str, Account] = {}
        self._gone: WeakValueDictionary[str, Account] = WeakValueDictionary()  # requests that run have them still
        self._advance(wall())

    def account(self, name: str, limit: int | None, period: Period | None = None) -> Account:
        """The account of that name, made or brought up to date; what it has spent and what is held stay."""
        index = self.index()[period]
        account = self._accounts.get(name)
        if account is None and (account := self._gone.pop(name, None)) is not None:
            self._accounts[name] = account
        if account is None:
            account = self._accounts[name] = Account(name, limit, period, index)
        elif account.period != period:
            account.change(period, index)
        account.limit = limit
        return account

    def forget(self, name: str) -> None:
        """Drops an account whose owner is gone. Requests that run settle with it still, and so does whoever gets that
        name before they end."""
        account = self._accounts.pop(name, None)
        if account is not None:
            self._gone[name] = account

    def load(self, spent: Mapping[str, int]) -> None:
        """Takes over what accounts had spent, each since `since(its period)`; names without an account are passed over.

        What was settled in between is part of what the ledger tells, so nothing may run between its answer and this.
        """
        for name, nano in spent.items():
            if (account := self._accounts.get(name)) is not None:
                self._current(account).tell(account.period, account.index, max(0, nano))

    def tell(self, name: str, period: Period | None, nano: int) -> None:
        """What an account had spent in a present period, its own or another, before this process knew of it."""
        self._accounts[name].tell(period, self.index()[period], nano)

    def add_credit(self, name: str, nano: int) -> None:
        """Raises the limit of the account's present period. Raises KeyError, and ValueError for less than nothing."""
        if nano < 0:
            raise ValueError("credit is not negative")
        self._current(self._accounts[name]).credit += nano

    def set_credit(self, name: str, nano: int) -> None:
        """What was topped up in the account's present period, as the database has it."""
        self._current(self._accounts[name]).credit = nano

    def accounts(self) -> Mapping[str, Account]:
        """All accounts, by name."""
        return self._accounts

    def reserve(self, accounts: Sequence[Account], nano: int) -> Hold:
        """Sets money aside in all the accounts, or raises Refusal (402) and sets nothing aside.

        Refused is what does not fit, and everything once nothing remains, what is free of charge too.
        """
        if not accounts:
            return FREE
        nano = 0 if nano < 0 else min(nano, MOST)
        index = self.index()
        for account in accounts:
            if account.index != index[account.period]:
                account.turn(index[account.period])
            if account.limit is not None:
                remaining = account.limit + account.credit - account.spent - account.held
                if remaining <= 0 or nano > remaining:
                    raise _refusal(account)
        for account in accounts:
            account.held += nano
        return Hold(self, accounts, nano)

    def charge(self, accounts: Sequence[Account], nano: int) -> None:
        """Books what a request has cost for which nothing was reserved, because no account has a limit."""
        index = self.index()
        for account in accounts:
            self._current(account).book(nano, index)

    def remaining(self, account: Account) -> int | None:
        """What may still be reserved; negative where the account owes, None where it has no limit."""
        return self._current(account).remaining()

    def spent(self, account: Account) -> int:
        """What was spent in the present period."""
        return self._current(account).spent

    def held(self) -> int:
        """What is reserved in all accounts together: 0 when nothing runs."""
        return sum(account.held for account in self._accounts.values())

    def since(self, period: Period | None) -> float:
        """When the present period began, in seconds since the epoch; 0.0 for the one that never ends."""
        self.index()
        if period is None:
            return 0.0
        today = self._today if period == "day" else date.fromordinal(self._today).replace(day=1).toordinal()
        return float((today - _EPOCH) * _DAY)

    def index(self) -> Mapping[Period | None, int]:
        """Period -> the number of the present one."""
        wall = self._wall()
        if wall >= self._midnight:
            self._advance(wall)
        return self._index

    def _advance(self, wall: float) -> None:
        """Another day, always a later one: a clock that is set back waits for the midnight of the day it has left."""
        self._today = datetime.fromtimestamp(wall, UTC).toordinal()
        self._midnight = float((self._today + 1 - _EPOCH) * _DAY)
        day = date.fromordinal(self._today)
        self._index: dict[Period | None, int] = {None: 0, "day": self._today, "month": day.year * 12 + day.month}

    def _current(self, account: Account) -> Account:
        index = self.index()[account.period]
        if account.index != index:
            account.turn(index)
        return account


def _refusal(account: Account) -> Refusal:
    """Clients that know the header do not try again: waiting would not help."""
    sort, _, owner = account.name.partition(":")
    left = account.remaining()
    spent = left is None or left <= 0
    text = f"the budget of the {sort} '{owner}' " + ("is spent" if spent else "has too little left for this request")
    return Refusal("quota_exceeded", text, headers={"x-should-retry": "false"})
