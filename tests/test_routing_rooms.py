"""Keys, waits, times, queues and orders: each room of routing by itself."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.errors import Refusal
from gproxyd.routing import retries
from gproxyd.routing.agents import Choice, Orders, Pins, Place, Strategy, expand
from gproxyd.routing.breaker import Rule
from gproxyd.routing.credentials import PARKED_FOR, CredentialPool
from gproxyd.routing.health import MOST_TROUBLED, Registry
from gproxyd.routing.latency import RECENT, TRY_EVERY, Latencies
from gproxyd.routing.retries import Budget, Fault, fault_of_reason, fault_of_status, wait_of
from gproxyd.routing.throttle import Throttle
from gproxyd.wire.headers import Headers

# Keys.


class Key:
    def __init__(self, name: str) -> None:
        self._name = name

    def reveal(self) -> str:
        return self._name


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pool_of(clock: Clock, *names: str) -> CredentialPool:
    return CredentialPool([Key(name) for name in names], clock)


def test_keys_are_used_in_turn_and_a_refused_one_is_left_alone_until_one_attempt_tries_it_again() -> None:
    clock = Clock()
    pool = pool_of(clock, "a", "b", "c")
    taken = []
    for _ in range(6):
        clock.now += 1
        taken.append(pool.take().place)
    assert taken == [1, 2, 3, 1, 2, 3]
    pool.park(pool.all()[1])
    for _ in range(6):
        clock.now += 1
        assert pool.take().place != 2
    clock.now += PARKED_FOR
    assert pool.take().place == 2
    assert pool.take().place != 2, "it is tried by one, whose outcome nobody knows yet"
    pool.accepted(pool.all()[1])
    again = set()
    for _ in range(3):
        clock.now += 1
        again.add(pool.take().place)
    assert again == {1, 2, 3}


def test_the_only_key_is_used_though_it_was_refused() -> None:
    clock = Clock()
    pool = pool_of(clock, "a")
    pool.park(pool.all()[0])
    assert pool.take() is pool.all()[0] and pool.fit(clock.now) == [] and pool.freed_in(clock.now) == PARKED_FOR


def test_what_is_known_of_a_key_outlives_a_reload_and_a_renewed_key_begins_anew() -> None:
    clock = Clock()
    before, after = pool_of(clock, "a", "b"), pool_of(clock, "b", "renewed")
    for one in before.all():
        before.park(one)
    after.adopt(before)
    assert [one.parked(clock.now) for one in after.all()] == [True, False]


# Waits.


def headers(**lines: str) -> Headers:
    return Headers([(name.replace("_", "-").encode(), value.encode()) for name, value in lines.items()])


GOOGLE = b"""{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [
  {"@type": "type.googleapis.com/google.rpc.QuotaFailure"},
  {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}]}}"""


@pytest.mark.parametrize(
    ("lines", "body", "expected"),
    [
        ({"retry_after": "7"}, b"", 7.0),
        ({"Retry_After": " 0 "}, b"", 0.0),
        ({"retry_after": "1.5"}, b"", 1.5),
        ({"retry_after": "7", "retry_after_ms": "250"}, b"", 0.25),
        ({"retry_after": "7", "retry_after_ms": "soon"}, b"", 7.0),
        ({"retry_after": formatdate(1_800_000_060, usegmt=True)}, b"", 60.0),
        ({"retry_after": formatdate(1_700_000_000, usegmt=True)}, b"", 0.0),
        ({"retry_after": "-1"}, b"", None),
        ({"retry_after": "later"}, b"", None),
        ({"retry_after": "999999999"}, b"", 86_400.0),
        ({"retry_after": "9" * 4000}, b"", None),
        ({"retry_after": "Fri, 31 Dec 9999 23:59:59 GMT"}, b"", 86_400.0),
        ({}, GOOGLE, 34.5),
        ({}, b"[" + GOOGLE + b"]", 34.5),
        ({"retry_after": "3"}, GOOGLE, 3.0),
        ({}, b'{"error": {"details": [{"retryDelay": "1h"}]}}', None),
        ({}, b'{"error": {"details": "retryDelay"}}', None),
        ({}, b'{"error": {"details": [null, {"retryDelay": 3}]}}', None),
        ({}, b"retryDelay", None),
        ({}, b"", None),
    ],
)
def test_a_vendor_may_say_in_many_ways_when_it_wants_to_be_asked_again(
    lines: dict[str, str], body: bytes, expected: float | None
) -> None:
    assert wait_of(headers(**lines), body, 1_800_000_000.0) == expected


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_no_answer_is_too_odd_to_be_asked_for_its_wait(body: bytes, value: bytes) -> None:
    told = wait_of(Headers([(b"Retry-After", value)]), b'{"retryDelay":' + body, 1e9)
    assert told is None or 0 <= told <= retries.LONGEST_WAIT


@pytest.mark.parametrize(
    ("status", "kind"),
    [(200, None), (400, None), (401, None), (403, None), (404, None), (408, "broken"), (409, None), (422, None),
     (429, "limited"), (500, "broken"), (502, "broken"), (503, "broken"), (504, "broken"), (529, "limited"),
     (599, "broken")],
)  # fmt: skip
def test_which_statuses_are_worth_another_attempt(status: int, kind: str | None) -> None:
    fault = fault_of_status(status, None)
    assert (None if fault is None else fault.kind) == kind
    limited = fault_of_status(status, 3.0, limited=True)
    assert limited is not None and (limited.kind, limited.wait) == ("limited", 3.0)


@pytest.mark.parametrize(
    ("reason", "kind", "again"),
    [("connect", "broken", True), ("dns", "broken", True), ("tls", "broken", True), ("reset", "broken", False),
     ("closed", "broken", False), ("timeout_connect", "broken", True), ("timeout_first_byte", "broken", False),
     ("protocol", "broken", False), ("auth", "key", True), ("client_body", "final", True),
     ("shutdown", "final", True), ("redirect", "final", True)],
)  # fmt: skip
def test_which_failures_are(reason: str, kind: str, again: bool) -> None:
    fault = fault_of_reason(reason)
    assert (fault.kind, fault.again) == (kind, again)


def test_a_pause_grows_and_is_anywhere_below_its_bound() -> None:
    dice = random.Random(3)
    for times in range(1, 20):
        bound = min(retries.LONGEST_PAUSE, retries.FIRST_PAUSE * 2 ** (times - 1))
        drawn = [retries.pause(times, dice) for _ in range(200)]
        assert 0 <= min(drawn) < bound / 5 and bound * 4 / 5 < max(drawn) <= bound


@given(st.lists(st.booleans(), max_size=3000), st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_a_budget_never_pays_more_than_its_share(asks: list[bool], share: float) -> None:
    budget, spent = Budget(), 0
    for number, asks_again in enumerate(asks, start=1):
        budget.earn(share)
        spent += asks_again and budget.spend()
        assert spent <= share * number + 1e-6


# Times to the first byte.


def test_the_fastest_target_is_asked_first_and_equals_share() -> None:
    latencies = Latencies(random.Random(5))
    for _ in range(5):
        latencies.add("slow", 2.0, 0.0)
        latencies.add("fast", 0.2, 0.0)
        latencies.add("equal", 0.2, 0.0)
    latencies.add("fast", 60.0, 0.0)  # one slow answer says little
    first = Counter(latencies.order(["slow", "fast", "equal"], 1.0)[0] for _ in range(300))
    assert set(first) == {"fast", "equal"} and min(first.values()) > 90
    assert all(latencies.order(["slow", "fast", "equal"], 1.0)[2] == "slow" for _ in range(50))


def test_an_unknown_target_is_tried_by_one_request_and_again_after_a_while() -> None:
    latencies = Latencies(random.Random(5))
    latencies.add("known", 0.5, 0.0)
    assert latencies.order(["known", "new"], 1.0) == ["new", "known"]
    assert latencies.order(["known", "new"], 1.1) == ["known", "new"]
    assert latencies.order(["known", "new"], 1.0 + TRY_EVERY) == ["new", "known"]
    latencies.add("new", 0.1, 12.0)
    assert latencies.order(["known", "new"], 12.1) == ["new", "known"]


def test_old_times_say_nothing_any_more() -> None:
    latencies = Latencies()
    latencies.add("x", 1.0, 0.0)
    latencies.add("x", 3.0, RECENT)
    assert latencies.median("x", RECENT) == 2.0
    assert latencies.median("x", RECENT + 0.1) == 3.0
    assert latencies.median("x", 3 * RECENT) is None and latencies.median("y", 0.0) is None


# Queues.


class Gate:
    """Room for so many at once."""

    def __init__(self, room: int, wait: float = 0.0) -> None:
        self.room = room
        self.wait = wait
        self.order: list[int] = []

    def admit(self, number: int) -> int:
        if self.room <= 0:
            raise Refusal("rate_limited", "full")
        self.room -= 1
        self.order.append(number)
        return number


def throttle_of(gate: Gate, most: int = 10, patience: float = 0.5) -> Throttle:
    return Throttle(lambda refused: gate.wait, most, patience)


async def _released(gate: Gate, throttle: Throttle, times: int = 1) -> None:
    for _ in range(times):
        gate.room += 1
        throttle.released()
        await asyncio.sleep(0.01)


def test_who_waits_is_served_in_the_order_of_coming() -> None:
    async def play() -> None:
        gate = Gate(1)
        throttle = throttle_of(gate)
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(throttle.get(lambda number=number: gate.admit(number))))  # type: ignore[misc]
            await asyncio.sleep(0)
        assert len(throttle) == 5 and throttle.take(lambda: gate.admit(99)) is None
        gate.room += 1  # a newcomer finds room and does not pass those who wait
        newcomer = asyncio.create_task(throttle.get(lambda: gate.admit(6)))
        await asyncio.sleep(0)
        throttle.released()
        await _released(gate, throttle, 6)
        assert [await task for task in (*tasks, newcomer)] == list(range(7)) == gate.order
        assert len(throttle) == 0

    asyncio.run(play())


def test_the_queue_is_bounded_and_so_is_every_wait() -> None:
    async def play() -> None:
        gate = Gate(0)
        throttle = throttle_of(gate, most=2, patience=0.1)
        began = asyncio.get_running_loop().time()
        tasks = [asyncio.create_task(throttle.get(lambda: gate.admit(0))) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Refusal):
            await throttle.get(lambda: gate.admit(1))
        assert asyncio.get_running_loop().time() - began < 0.08
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in results] == [Refusal, Refusal]
        assert 0.08 < asyncio.get_running_loop().time() - began < 0.4 and len(throttle) == 0

    asyncio.run(play())


def test_who_would_wait_too_long_is_told_at_once() -> None:
    async def play() -> None:
        gate = Gate(0, wait=30.0)
        began = asyncio.get_running_loop().time()
        with pytest.raises(Refusal):
            await throttle_of(gate, patience=5.0).get(lambda: gate.admit(1))
        assert asyncio.get_running_loop().time() - began < 0.1

    asyncio.run(play())


def test_a_place_that_time_frees_is_taken_without_being_told() -> None:
    async def play() -> None:
        gate = Gate(0, wait=0.05)
        task = asyncio.create_task(throttle_of(gate).get(lambda: gate.admit(1)))
        await asyncio.sleep(0.02)
        gate.room = 1
        assert await asyncio.wait_for(task, 0.3) == 1

    asyncio.run(play())


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_whoever_leaves_while_waiting_leaves_no_trace(leaves: int) -> None:
    async def play() -> None:
        gate = Gate(0)
        throttle = throttle_of(gate)
        tasks = [asyncio.create_task(throttle.get(lambda number=number: gate.admit(number))) for number in range(3)]  # type: ignore[misc]
        await asyncio.sleep(0.01)
        tasks[leaves].cancel()
        await asyncio.sleep(0.01)
        assert len(throttle) == 2
        await _released(gate, throttle, 2)
        assert gate.order == [number for number in range(3) if number != leaves] and len(throttle) == 0
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(play())


# Orders.

CATALOGUE = {"openai-main": ["gpt-4.1", "gpt-4.1-mini", "o5"], "other": ["gpt-4.1", "vendor/odd"], "empty": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openai-main/gpt-4.1", ["openai-main/gpt-4.1"]),
        ("empty/never-seen", ["empty/never-seen"]),
        ("gpt-4.1", ["openai-main/gpt-4.1", "other/gpt-4.1"]),
        ("openai-main/gpt-4*", ["openai-main/gpt-4.1", "openai-main/gpt-4.1-mini"]),
        ("*/gpt-4.?", ["openai-main/gpt-4.1", "other/gpt-4.1"]),
        ("vendor/odd", ["other/vendor/odd"]),
        ("nothing", []),
        ("openai-main/x*", []),
    ],
)
def test_what_an_entry_of_an_agent_stands_for(text: str, expected: list[str]) -> None:
    assert [str(place) for place in expand(text, CATALOGUE)] == expected


def choices(**weights: int) -> list[Choice]:
    return [Choice(Place(name, "m"), weight) for name, weight in weights.items()]


THREE = choices(a=1, b=1, c=1)


@pytest.mark.parametrize("strategy", ["fallback", "round_robin", "weighted", "latency", "cost", "sticky"])
@pytest.mark.parametrize("key", [None, b"conversation"])
def test_an_order_names_every_target_once(strategy: Strategy, key: bytes | None) -> None:
    orders = Orders(Latencies())
    for count in range(4):
        for _ in range(5):
            assert sorted(orders.order("x", strategy, THREE[:count], 0.0, key)) == list(range(count))


def test_targets_take_turns_by_agent() -> None:
    orders = Orders(Latencies())
    assert [orders.order("x", "round_robin", THREE, 0.0)[0] for _ in range(5)] == [0, 1, 2, 0, 1]
    assert orders.order("y", "round_robin", THREE, 0.0) == [0, 1, 2]
    assert orders.order("x", "round_robin", THREE, 0.0) == [2, 0, 1]


def test_weights_are_shares() -> None:
    orders = Orders(Latencies(), random.Random(7))
    weighted = choices(a=1, b=3, c=6)
    first = Counter(orders.order("x", "weighted", weighted, 0.0)[0] for _ in range(4000))
    sticky = Counter(orders.order("x", "sticky", weighted, 0.0, str(n).encode())[0] for n in range(4000))
    for counted in (first, sticky):
        assert [round(counted[place] / 4000, 1) for place in range(3)] == [0.1, 0.3, 0.6]


def test_the_cheapest_is_asked_first_and_unknown_prices_last() -> None:
    priced = [Choice(Place(name, "m"), 1, cost) for name, cost in (("a", None), ("b", 5), ("c", 2), ("d", 5))]
    assert Orders(Latencies()).order("x", "cost", priced, 0.0) == [2, 1, 3, 0]


def test_a_conversation_stays_and_a_target_that_leaves_moves_only_its_own() -> None:
    orders = Orders(Latencies())
    keys = [str(number).encode() for number in range(500)]
    homes = {key: orders.order("x", "sticky", THREE, 0.0, key)[0] for key in keys}
    assert homes == {key: orders.order("x", "sticky", THREE, 9.0, key)[0] for key in keys}
    for key in keys:
        if homes[key] != 2:
            assert orders.order("x", "sticky", THREE[:2], 0.0, key)[0] == homes[key]


def test_a_pinned_conversation_goes_where_it_was_until_its_time_is_over() -> None:
    orders = Orders(Latencies())
    orders.pins.put(b"k", Place("c", "m"), 10.0)
    for strategy in ("fallback", "round_robin", "cost", "sticky"):
        assert orders.order("x", strategy, THREE, 9.9, b"k")[0] == 2  # type: ignore[arg-type]
    assert orders.order("x", "fallback", THREE, 10.0, b"k") == [0, 1, 2]


def test_pins_are_bounded() -> None:
    pins = Pins(most=10)
    for number in range(100):
        pins.put(str(number).encode(), THREE[0].place, 1.0)
    assert len(pins) == 10 and pins.get(b"99", 0.0) and not pins.get(b"89", 0.0)


# What is known of targets.


def test_a_target_that_is_well_goes_with_its_route_and_one_that_is_not_stays() -> None:
    clock = Clock()
    registry = Registry(lambda label, state: None, clock)
    pool = pool_of(clock, "a")
    health = registry.target("p", "well", pool, Rule(), named=True)
    assert registry.find("p", "well") is health
    del health
    assert registry.find("p", "well") is None
    for number in range(MOST_TROUBLED + 10):
        ill = registry.target("p", f"m{number}", pool, Rule(), named=False)
        ill.failed(pool.all()[0], Fault("broken", "status"), clock.now)
    del ill
    assert registry.find("p", "m3") is None and registry.find("p", f"m{MOST_TROUBLED}") is not None
    assert set(registry.shown()) == {"p/other"}


def test_breakers_survive_a_reload_and_obey_its_rule() -> None:
    clock = Clock()
    turned: list[str] = []
    registry = Registry(lambda label, state: turned.append(f"{label} {state}"), clock)
    old, new = pool_of(clock, "a", "b"), pool_of(clock, "b")
    health = registry.target("p", "m", old, Rule(failures=5), named=True)
    for _ in range(4):
        for one in old.all():
            health.failed(one, Fault("broken", "status"), clock.now)
    same = registry.target("p", "m", new, Rule(failures=5, open_for=7.0), named=True)
    assert same is health and list(health.shown()) == ["p/m"]
    health.failed(new.all()[0], Fault("broken", "status"), clock.now)
    assert turned == ["p/m#2 open"] and health.ready_in(clock.now) == 7.0 and not health.closed
