"""Money: nothing is reserved twice or lost, what is spent and what remains always make up the limit."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from gproxyd.errors import Refusal
from gproxyd.policy.quotas import FREE, MOST, Account, Hold, Quotas
from gproxyd.units import parse_usd

DAY = 86_400.0
NOON = datetime(2027, 1, 31, 12, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self, wall: float = NOON) -> None:
        self.wall = wall


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(lambda: clock.wall)


def fits(quotas: Quotas, accounts: tuple[Account, ...], nano: int) -> bool:
    try:
        quotas.reserve(accounts, nano).release()
    except Refusal as refusal:
        return refusal.code != "quota_exceeded"
    return True


# Reserving and settling.


@pytest.mark.parametrize("units", [1, 5, 200])
def test_a_budget_for_so_many_admits_exactly_so_many(quotas: Quotas, units: int) -> None:
    price = 123_456_789
    accounts = (quotas.account("user:alice", units * price + price - 1),)
    admitted = [quotas.reserve(accounts, price) for _ in range(units + 200) if fits(quotas, accounts, price)]
    assert len(admitted) == units
    for hold in admitted:
        hold.settle(price)
    assert quotas.held() == 0 and quotas.remaining(accounts[0]) == price - 1


def test_less_than_reserved_is_refunded_and_more_is_owed(quotas: Quotas) -> None:
    account = quotas.account("user:alice", 1000)
    quotas.reserve((account,), 600).settle(100)
    assert (quotas.spent(account), quotas.remaining(account)) == (100, 900)
    quotas.reserve((account,), 900).settle(2500)
    assert (quotas.spent(account), quotas.remaining(account), quotas.held()) == (2600, -1600, 0)
    assert not fits(quotas, (account,), 0)
    quotas.add_credit("user:alice", 1600)
    assert not fits(quotas, (account,), 0)
    quotas.add_credit("user:alice", 1)
    assert fits(quotas, (account,), 1) and not fits(quotas, (account,), 2)


def test_what_is_held_is_not_there_for_others(quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100)
    hold = quotas.reserve((account,), 60)
    assert quotas.remaining(account) == 40
    assert not fits(quotas, (account,), 41) and fits(quotas, (account,), 40)
    other = quotas.reserve((account,), 40)
    assert not fits(quotas, (account,), 0)
    hold.release()
    other.settle(40)
    assert quotas.remaining(account) == 60


@pytest.mark.parametrize("limit", [0, 10])
def test_when_nothing_remains_even_what_is_free_is_refused(quotas: Quotas, limit: int) -> None:
    account = quotas.account("user:alice", limit)
    assert fits(quotas, (account,), 0) is (limit > 0)
    if limit:
        quotas.reserve((account,), limit).settle(limit)
    assert not fits(quotas, (account,), 0)


@pytest.mark.parametrize("first", ["settle", "release"])
@pytest.mark.parametrize("second", ["settle", "release"])
def test_the_first_end_of_a_hold_counts_and_no_other(quotas: Quotas, first: str, second: str) -> None:
    account = quotas.account("user:alice", 1000)
    hold = quotas.reserve((account,), 500)
    assert hold.open
    for end in (first, second, second):
        getattr(hold, end)(*([30] if end == "settle" else []))
    assert not hold.open and quotas.held() == 0
    assert quotas.spent(account) == (30 if first == "settle" else 0)


def test_all_accounts_or_none(quotas: Quotas) -> None:
    user, key = quotas.account("user:alice", 1000), quotas.account("key:alice/ci", 10)
    for accounts in ((user, key), (key, user)):
        assert not fits(quotas, accounts, 11)
        assert quotas.held() == 0
    quotas.reserve((user, key), 10).settle(9)
    assert (quotas.spent(user), quotas.spent(key)) == (9, 9)
    assert fits(quotas, (user,), 991) and not fits(quotas, (user, key), 2)


def test_an_account_without_a_limit_counts_all_the_same(quotas: Quotas) -> None:
    account = quotas.account("user:alice", None)
    for _ in range(3):
        quotas.reserve((account,), MOST).settle(7)
    assert (quotas.spent(account), quotas.remaining(account), quotas.held()) == (21, None, 0)


def test_no_account_costs_one_shared_hold(quotas: Quotas) -> None:
    assert quotas.reserve((), 10) is FREE
    FREE.settle(10)
    FREE.release()
    assert not FREE.open and quotas.held() == 0


@pytest.mark.parametrize(("nano", "account"), [(1, "user:alice"), (1, "key:alice/laptop"), (0, "user:alice")])
def test_the_refusal_asks_clients_not_to_try_again(quotas: Quotas, nano: int, account: str) -> None:
    spent = quotas.account(account, 0)
    with pytest.raises(Refusal) as caught:
        quotas.reserve((quotas.account("user:x", None), spent), nano)
    sort, _, owner = account.partition(":")
    assert (caught.value.status, caught.value.code) == (402, "quota_exceeded")
    assert caught.value.headers == {"x-should-retry": "false"}
    assert str(caught.value) == f"quota_exceeded: the budget of the {sort} '{owner}' is spent"
    small = quotas.account("user:bob", 5)
    with pytest.raises(Refusal, match="the budget of the user 'bob' has too little left for this request"):
        quotas.reserve((small,), 6)


# Amounts.


def test_ten_million_ten_millionths_of_a_dollar_are_one_dollar(quotas: Quotas) -> None:
    account = quotas.account("user:alice", parse_usd("1.00"))
    price = parse_usd("0.0000001")
    for _ in range(10**5):
        quotas.reserve((account,), price).settle(price)
    assert quotas.spent(account) == parse_usd("0.01")
    for _ in range(99):  # and the other 9,900,000
        quotas.reserve((account,), price * 10**5).settle(sum([price] * 10**5))
    assert quotas.spent(account) == parse_usd("1.00") and quotas.remaining(account) == 0
    assert not fits(quotas, (account,), price)


@pytest.mark.parametrize("told", [-5, -(10**30), 10**30, 2**63, 0])
def test_absurd_amounts_never_give_money_and_never_crash(quotas: Quotas, told: int) -> None:
    account = quotas.account("user:alice", 100)
    quotas.reserve((account,), min(told, 100)).settle(told)
    assert 0 <= quotas.spent(account) <= MOST and quotas.held() == 0
    assert (quotas.remaining(account) or 0) <= 100
    assert fits(quotas, (account,), 1) is (told <= 0)
    assert fits(quotas, (account,), 10**30) is False


def test_credit_is_never_negative(quotas: Quotas) -> None:
    quotas.account("user:alice", 100)
    with pytest.raises(ValueError, match="not negative"):
        quotas.add_credit("user:alice", -1)
    with pytest.raises(KeyError):
        quotas.add_credit("user:nobody", 1)


# Periods.


@pytest.mark.parametrize(("period", "begin", "end"), [
    ("day", datetime(2027, 1, 31, tzinfo=UTC), datetime(2027, 2, 1, tzinfo=UTC)),
    ("month", datetime(2027, 1, 1, tzinfo=UTC), datetime(2027, 2, 1, tzinfo=UTC)),
])  # fmt: skip
def test_a_period_begins_and_ends_at_midnight_in_utc(
    clock: Clock, quotas: Quotas, period: str, begin: datetime, end: datetime
) -> None:
    account = quotas.account("user:alice", 100, period)  # type: ignore[arg-type]
    assert quotas.since(period) == begin.timestamp()  # type: ignore[arg-type]
    quotas.reserve((account,), 100).settle(100)
    quotas.add_credit("user:alice", 50)
    clock.wall = end.timestamp() - 0.001
    assert (quotas.remaining(account), quotas.spent(account)) == (50, 100)
    clock.wall = end.timestamp()
    assert (quotas.remaining(account), quotas.spent(account)) == (100, 0), "what was topped up was for the old period"
    assert quotas.since(period) == end.timestamp()  # type: ignore[arg-type]


def test_credit_given_after_midnight_belongs_to_the_new_day(clock: Clock, quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100, "day")
    clock.wall += DAY
    quotas.add_credit("user:alice", 50)
    assert quotas.remaining(account) == 150
    clock.wall += DAY
    quotas.load({"user:alice": 30})
    assert quotas.remaining(account) == 70


def test_what_has_no_period_never_begins_anew(clock: Clock, quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100)
    quotas.reserve((account,), 60).settle(60)
    quotas.add_credit("user:alice", 5)
    clock.wall += 400 * DAY
    assert (quotas.remaining(account), quotas.since(None)) == (45, 0.0)


def test_a_hold_is_settled_in_the_period_in_which_it_ends(clock: Clock, quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100, "day")
    holds = [quotas.reserve((account,), 30) for _ in range(3)]
    holds[0].settle(30)
    clock.wall += DAY
    assert (quotas.spent(account), quotas.remaining(account)) == (0, 40), "what runs is still held"
    holds[1].settle(25)
    holds[2].release()
    assert (quotas.spent(account), quotas.remaining(account), quotas.held()) == (25, 75, 0)


def test_a_hundred_settlements_across_midnight_are_booked_once_each(clock: Clock, quotas: Quotas) -> None:
    account, total = quotas.account("user:alice", 10**9, "day"), quotas.account("key:alice/ci", 10**9)
    clock.wall = datetime(2027, 2, 1, tzinfo=UTC).timestamp() - 0.5
    holds = [quotas.reserve((account, total), 10) for _ in range(100)]
    before = 0
    for hold in holds:
        hold.settle(7)
        before = max(before, quotas.spent(account))
        clock.wall += 1 / 128
    assert (before, quotas.spent(account)) == (64 * 7, 36 * 7)
    assert quotas.spent(total) == 700 and quotas.held() == 0


@pytest.mark.parametrize("period", ["day", "month"])
def test_no_period_is_granted_twice_by_a_clock_that_goes_back(clock: Clock, quotas: Quotas, period: str) -> None:
    account = quotas.account("user:alice", 100, period)  # type: ignore[arg-type]
    quotas.reserve((account,), 100).settle(100)
    for step in (-DAY, -40 * DAY, 3600.0, -3600.0, 0.0):
        clock.wall = NOON + step
        assert not fits(quotas, (account,), 0)
    clock.wall = datetime(2027, 2, 1, 1, tzinfo=UTC).timestamp()
    quotas.reserve((account,), 100).settle(100)
    for wall in (NOON, clock.wall, datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC).timestamp(), clock.wall + 3600):
        clock.wall = wall
        assert not fits(quotas, (account,), 0), "the day before has been left for good"


def test_a_day_is_granted_once_however_often_its_midnight_is_crossed(clock: Clock, quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100, "day")
    midnight = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    granted = 0
    for step in (-2.0, 1.0, -1.0, 0.0, -3600.0, 5.0, 3600.0):
        clock.wall = midnight + step
        while fits(quotas, (account,), 100):
            quotas.reserve((account,), 100).settle(100)
            granted += 1
    assert granted == 2, "once for the thirty-first, once for the first"


# Reload and restart.


def test_a_reload_keeps_what_was_spent_and_what_is_held(quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100)
    quotas.reserve((account,), 50).settle(30)
    hold = quotas.reserve((account,), 20)
    quotas.add_credit("user:alice", 5)
    assert quotas.account("user:alice", 60) is account
    assert quotas.remaining(account) == 60 + 5 - 30 - 20
    assert not fits(quotas, (account,), 16)
    quotas.account("user:alice", None)
    assert fits(quotas, (account,), 10**9)
    quotas.account("user:alice", 10)
    assert not fits(quotas, (account,), 0)
    hold.settle(1)
    assert quotas.remaining(account) == 10 + 5 - 31


def test_another_period_keeps_what_was_spent_until_the_ledger_is_asked(quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100, "month")
    quotas.reserve((account,), 50).settle(80)
    hold = quotas.reserve((account,), 10)
    quotas.account("user:alice", 100, "day")
    assert quotas.remaining(account) == 10
    quotas.load({"user:alice": 30})
    assert quotas.remaining(account) == 60
    hold.release()
    assert quotas.remaining(account) == 70


def test_what_the_ledger_tells_is_taken_over(clock: Clock, quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100, "day")
    quotas.load({"user:alice": 95, "user:gone": 10**6})
    assert quotas.remaining(account) == 5
    clock.wall += DAY
    assert quotas.remaining(account) == 100


def test_a_forgotten_account_is_settled_by_what_runs_and_found_again_until_then(quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100)
    hold = quotas.reserve((account,), 40)
    quotas.forget("user:alice")
    quotas.forget("user:nobody")
    assert "user:alice" not in quotas.accounts()
    again = quotas.account("user:alice", 200)  # the request that runs is still to be paid under that name
    assert again is account and quotas.remaining(again) == 160
    hold.settle(30)
    assert (again.spent, again.held) == (30, 0)


def test_a_forgotten_account_that_nothing_runs_on_begins_anew_for_its_name(quotas: Quotas) -> None:
    account = quotas.account("user:alice", 100)
    hold = quotas.reserve((account,), 40)
    quotas.forget("user:alice")
    hold.settle(40)
    assert (account.spent, account.held) == (40, 0)
    del account, hold
    fresh = quotas.account("user:alice", 100)
    assert (fresh.spent, quotas.remaining(fresh)) == (0, 100)


# Everything at once.


class Life(RuleBasedStateMachine):
    """Requests, top-ups, reloads and clocks in any order, beside a model of plain sums."""

    holds = Bundle("holds")
    NAMES = ("user:a", "key:a/k")
    MONEY = st.integers(0, 60)
    PERIODS = st.sampled_from([None, "day", "month"])

    @initialize(periods=st.tuples(PERIODS, PERIODS))
    def begin(self, periods: tuple[object, object]) -> None:
        self.clock = Clock()
        self.latest = self.clock.wall
        self.quotas = Quotas(lambda: self.clock.wall)
        self.periods = dict(zip(self.NAMES, periods, strict=True))
        self.limits: dict[str, int | None] = dict.fromkeys(self.NAMES, 100)
        self.accounts = tuple(self.quotas.account(name, 100, self.periods[name]) for name in self.NAMES)  # type: ignore[arg-type]
        self.spent = dict.fromkeys(self.NAMES, 0)
        self.credit = dict.fromkeys(self.NAMES, 0)
        self.live: dict[Hold, int] = {}

    def left(self, name: str) -> int | None:
        limit = self.limits[name]
        return None if limit is None else limit + self.credit[name] - self.spent[name] - sum(self.live.values())

    @rule(target=holds, nano=MONEY)
    def reserve(self, nano: int) -> Hold:
        expected = all(left is None or (left > 0 and nano <= left) for left in map(self.left, self.NAMES))
        try:
            hold = self.quotas.reserve(self.accounts, nano)
        except Refusal:
            hold = FREE
        assert (hold is not FREE) is expected
        if hold is not FREE:
            self.live[hold] = nano
        return hold

    @rule(hold=holds, nano=st.integers(-10, 90))
    def settle(self, hold: Hold, nano: int) -> None:
        hold.settle(nano)
        if self.live.pop(hold, None) is not None:
            for name in self.NAMES:
                self.spent[name] += max(0, nano)

    @rule(hold=consumes(holds))
    def release(self, hold: Hold) -> None:
        hold.release()
        self.live.pop(hold, None)

    @rule(name=st.sampled_from(NAMES), nano=MONEY)
    def top_up(self, name: str, nano: int) -> None:
        self.quotas.add_credit(name, nano)
        self.credit[name] += nano

    @rule(name=st.sampled_from(NAMES), limit=st.none() | st.integers(0, 200))
    def reload(self, name: str, limit: int | None) -> None:
        self.quotas.account(name, limit, self.periods[name])  # type: ignore[arg-type]
        self.limits[name] = limit

    @rule(step=st.sampled_from([60.0, 3600.0, -3600.0, DAY, -DAY, 31 * DAY, -31 * DAY]))
    def clock_goes_or_is_set(self, step: float) -> None:
        self.clock.wall += step
        before = datetime.fromtimestamp(self.latest, UTC)
        self.latest = max(self.latest, self.clock.wall)
        after = datetime.fromtimestamp(self.latest, UTC)
        forms = {None: "", "day": "%Y-%m-%d", "month": "%Y-%m"}
        for name, period in self.periods.items():
            if after.strftime(forms[period]) != before.strftime(forms[period]):  # type: ignore[index]
                self.spent[name] = self.credit[name] = 0

    @invariant()
    def the_sums_agree(self) -> None:
        if not hasattr(self, "quotas"):
            return
        assert self.quotas.held() == 2 * sum(self.live.values())
        for account in self.accounts:
            assert self.quotas.spent(account) == self.spent[account.name]
            assert self.quotas.remaining(account) == self.left(account.name)
            limit = self.limits[account.name]
            if limit is not None:
                assert account.spent + account.held + (account.remaining() or 0) == limit + account.credit

    def teardown(self) -> None:
        for number, hold in enumerate(list(getattr(self, "live", ()))):
            (hold.release, lambda hold=hold: hold.settle(3))[number % 2]()
        if hasattr(self, "quotas"):
            assert self.quotas.held() == 0


TestLife = Life.TestCase
TestLife.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_reserving_and_settling_is_cheap() -> None:
    """Ten times what it takes on an idle machine."""
    quotas = Quotas()
    accounts = (quotas.account("user:alice", MOST, "month"),)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5000):
            quotas.reserve(accounts, 5).settle(3)
        best = min(best, (time.perf_counter() - start) / 5000)
    assert best < 10e-6, f"{best * 1e6:.2f} µs"
