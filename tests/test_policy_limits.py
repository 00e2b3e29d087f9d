"""Rate limits: never more than allowed in any window, nothing held at rest, the wait that is told is the true one."""

from __future__ import annotations

import math
import random
import time
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from gproxyd.errors import Refusal
from gproxyd.policy.limits import DAY, FREE, MINUTE, Hold, Limiter, RateLimited, Rule
from gproxyd.policy.windows import FINE, Window


class Clock:
    """Both clocks of a machine. `go` is time going by, `wall` alone can be set."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.wall = 1_800_000_000.0

    def go(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def limiter(self) -> Limiter:
        return Limiter(lambda: self.now, lambda: self.wall)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return clock.limiter()


def tries(limiter: Limiter, rules: tuple[Rule, ...], count: int, model: str = "m", tokens: int = 0) -> list[Hold]:
    """The holds of those of `count` requests that were admitted."""
    holds = []
    for _ in range(count):
        try:
            holds.append(limiter.admit(rules, model, tokens))
        except RateLimited:
            continue
    return holds


def refused(limiter: Limiter, rules: tuple[Rule, ...], model: str = "m", tokens: int = 0) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        limiter.admit(rules, model, tokens)
    return caught.value


# How many.


@pytest.mark.parametrize("kind", ["rpm", "rpd", "concurrency"])
@pytest.mark.parametrize("limit", [1, 7, 199, 300])
def test_exactly_as_many_as_allowed_of_two_hundred_more(limiter: Limiter, kind: str, limit: int) -> None:
    rules = (Rule("user:alice", **{kind: limit}),)  # type: ignore[arg-type]
    assert len(tries(limiter, rules, limit + 200)) == limit


@pytest.mark.parametrize(("kind", "length"), [("rpm", MINUTE), ("rpd", DAY)])
def test_the_window_slides(clock: Clock, limiter: Limiter, kind: str, length: float) -> None:
    rules = (Rule("user:alice", **{kind: 4}),)  # type: ignore[arg-type]
    assert len(tries(limiter, rules, 3)) == 3
    clock.go(length / 2)
    assert len(tries(limiter, rules, 3)) == 1
    clock.go(length / 2 - 0.25)
    assert len(tries(limiter, rules, 3)) == 0
    clock.go(0.25)
    assert len(tries(limiter, rules, 9)) == 3, "the three of the beginning have left, the one of the middle has not"
    clock.go(length / 2)
    assert len(tries(limiter, rules, 9)) == 1


def test_no_burst_at_the_turn_of_the_minute(clock: Clock, limiter: Limiter) -> None:
    rules = (Rule("user:alice", rpm=10),)
    clock.go(59.9)
    first = len(tries(limiter, rules, 10))
    clock.go(0.2)
    assert (first, len(tries(limiter, rules, 10))) == (10, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 2000), st.lists(st.floats(0, 20), min_size=1, max_size=60), st.integers(1, 200), st.floats(0, 1e6)
)
@example(FINE + 1, [0.2] * 60, 200, 0.1)
@example(1, [59.99999999999999, 60.0, 0.0], 1, 0.1)
def test_never_more_than_the_limit_in_any_window(limit: int, steps: list[float], burst: int, begin: float) -> None:
    """Whatever the limit and the rhythm; and what waits a grain longer than a window is always let in."""
    clock = Clock(begin)
    limiter = clock.limiter()
    rules = (Rule("user:alice", rpm=limit),)
    at: list[float] = []
    for step in steps:
        clock.go(step)
        at += [clock.now] * len(tries(limiter, rules, burst))
        recent = sum(1 for one in at if one + MINUTE > clock.now)
        assert recent <= limit
        late = MINUTE / FINE if limit > FINE else 0.0
        if sum(1 for one in at if one + MINUTE + late > clock.now) < limit:
            assert tries(limiter, rules, 1), "refused although there is room"
            at.append(clock.now)


def test_a_clock_that_leaps_fills_the_window_once(clock: Clock, limiter: Limiter) -> None:
    """After a suspended night there is one minute's allowance, not a night's."""
    rules = (Rule("user:alice", rpm=5),)
    assert len(tries(limiter, rules, 50)) == 5
    clock.go(3600)
    assert len(tries(limiter, rules, 50)) == 5


@pytest.mark.parametrize("step", [-3600.0, 3600.0, 86_400.0, -86_400.0, 1.0, -1e9])
def test_the_wall_clock_moves_no_window(clock: Clock, limiter: Limiter, step: float) -> None:
    rules = (Rule("user:alice", rpm=2, rpd=3),)
    tries(limiter, rules, 2)
    clock.wall += step
    assert refused(limiter, rules).headers["Retry-After"] == "60"
    clock.go(60)
    assert len(tries(limiter, rules, 3)) == 1
    assert refused(limiter, rules).headers["Retry-After"] == str(86_400 - 60)


def test_a_monotonic_clock_that_errs_backwards_gives_nothing_away(clock: Clock, limiter: Limiter) -> None:
    rules = (Rule("user:alice", rpm=3),)
    for _ in range(3):
        limiter.admit(rules, "m")
        clock.now -= 10
    assert refused(limiter, rules).wait >= 60
    clock.now += 29
    assert refused(limiter, rules)
    assert clock.limiter().restore(limiter.dump()) is False, "what lies in the future is not believed"
    clock.now += 1
    assert clock.limiter().restore(limiter.dump())


# All rules or none.


def test_a_refused_request_has_taken_nothing(limiter: Limiter) -> None:
    wide, narrow = Rule("user:alice", rpm=10, rpd=10, tpm=1000, concurrency=10), Rule("key:alice/ci", "x*", rpm=1)
    limiter.admit((wide, narrow), "x", 5).settle(5)
    for _ in range(50):
        refused(limiter, (wide, narrow), "x", 5)
        refused(limiter, (narrow, wide), "x", 5)
    assert limiter.running() == 0
    assert len(tries(limiter, (wide,), 50, tokens=5)) == 9


def test_a_rule_holds_for_the_models_it_matches_and_counts_them_together(limiter: Limiter) -> None:
    rules = (Rule("user:alice", "openai-*", rpm=2), Rule("user:alice", "chat", rpm=1))
    assert len(tries(limiter, rules, 9, "anthropic-main/claude")) == 9
    assert len(tries(limiter, rules, 1, "openai-main/a")) == 1
    assert len(tries(limiter, rules, 9, "openai-main/b")) == 1
    assert len(tries(limiter, rules, 9, "openai-main/a")) == 0
    assert len(tries(limiter, rules, 9, "chat")) == 1


def test_owners_do_not_share_a_window(limiter: Limiter) -> None:
    for owner in ("user:alice", "user:bob", "key:alice/ci", "provider:alice"):
        assert len(tries(limiter, (Rule(owner, rpm=3),), 9)) == 3


def test_two_rules_for_one_glob_count_a_request_once_and_the_smaller_limit_holds(limiter: Limiter) -> None:
    rules = (Rule("user:a", rpm=5), Rule("user:a", rpm=9, tpm=100), Rule("user:a", concurrency=4))
    holds = tries(limiter, rules, 20, tokens=3)
    assert len(holds) == 4
    for hold in holds:
        hold.settle(10)
    assert limiter.running() == 0
    assert len(tries(limiter, rules, 20)) == 1
    standing = limiter.standing(rules, "m")
    assert standing.requests is not None and (standing.requests.limit, standing.requests.remaining) == (5, 0)
    assert standing.tokens is not None and standing.tokens.remaining == 60


def test_what_no_rule_concerns_costs_one_shared_hold(limiter: Limiter) -> None:
    assert limiter.admit((), "m", 5) is FREE
    assert limiter.admit((Rule("user:a", "x", rpm=1),), "m", 5) is FREE
    for end in (FREE.settle, FREE.settle):
        end(10)
    FREE.release()
    FREE.cancel()
    assert limiter.running() == 0 and not FREE.open


# What a hold does.


@pytest.mark.parametrize("first", ["settle", "release", "cancel"])
@pytest.mark.parametrize("second", ["settle", "release", "cancel"])
def test_the_first_end_of_a_hold_counts_and_no_other(limiter: Limiter, first: str, second: str) -> None:
    rules = (Rule("user:alice", rpm=10, rpd=20, tpm=100, concurrency=5),)
    hold = limiter.admit(rules, "m", 30)
    assert hold.open
    for end in (first, second, second):
        getattr(hold, end)(*([7] if end == "settle" else []))
    assert not hold.open and limiter.running() == 0
    standing = limiter.standing(rules, "m")
    assert standing.requests is not None and standing.tokens is not None
    assert standing.requests.remaining == (10 if first == "cancel" else 9)
    assert standing.tokens.remaining == (93 if first == "settle" else 100)


def test_a_place_is_free_as_soon_as_its_request_ends(limiter: Limiter) -> None:
    rules = (Rule("user:alice", concurrency=2),)
    one, two = tries(limiter, rules, 5)
    assert refused(limiter, rules).wait == 1
    for hold in (one, two, one):
        hold.release()
    assert len(tries(limiter, rules, 5)) == 2


def test_a_cancelled_request_gives_its_own_slot_back_and_no_later_one(clock: Clock, limiter: Limiter) -> None:
    rules = (Rule("user:alice", rpm=3),)
    first = limiter.admit(rules, "m")
    clock.go(30)
    limiter.admit(rules, "m")
    first.cancel()
    assert len(tries(limiter, rules, 9)) == 2
    old = Clock()
    limiter = old.limiter()
    kept = limiter.admit(rules, "m")
    old.go(60)
    assert len(tries(limiter, rules, 9)) == 3
    kept.cancel()
    assert len(tries(limiter, rules, 9)) == 0, "its slot was free already"


# Tokens.


def test_the_first_request_is_admitted_however_large_and_the_next_waits_for_the_truth(limiter: Limiter) -> None:
    rules = (Rule("user:alice", tpm=100),)
    hold = limiter.admit(rules, "m", 10**6)
    assert refused(limiter, rules).kind == "tpm"
    hold.settle(99)
    hold = limiter.admit(rules, "m", 1)
    refused(limiter, rules)
    hold.settle(1)
    assert refused(limiter, rules).wait == 60


def test_the_truth_counts_from_when_it_is_known(clock: Clock, limiter: Limiter) -> None:
    rules = (Rule("user:alice", tpm=100),)
    hold = limiter.admit(rules, "m", 60)
    clock.go(600)
    assert len(tries(limiter, rules, 1, tokens=60)) == 1, "60 of 100 are held"
    refused(limiter, rules)
    hold.settle(100)
    assert refused(limiter, rules).wait in (1, 60)
    clock.go(59)
    refused(limiter, rules)
    clock.go(1)
    assert len(tries(limiter, rules, 1)) == 1


def test_a_hundred_settlements_across_the_edge_of_a_window_are_counted_once_each(
    clock: Clock, limiter: Limiter
) -> None:
    rules = (Rule("user:alice", tpm=10**9),)
    holds = [limiter.admit(rules, "m", 10) for _ in range(100)]
    clock.go(MINUTE - 0.5)
    for hold in holds:
        hold.settle(7)
        clock.go(0.01)
    standing = limiter.standing(rules, "m")
    assert standing.tokens is not None and standing.tokens.remaining == 10**9 - 700
    clock.go(MINUTE - 1 + 0.005)
    standing = limiter.standing(rules, "m")
    assert standing.tokens is not None and standing.tokens.remaining >= 10**9 - 700
    clock.go(1 + MINUTE / FINE)
    standing = limiter.standing(rules, "m")
    assert standing.tokens is not None and standing.tokens.remaining == 10**9


@pytest.mark.parametrize("told", [10**18, 2**63, -5, 0])
def test_absurd_numbers_of_tokens_do_no_more_harm_than_a_minute(clock: Clock, limiter: Limiter, told: int) -> None:
    rules = (Rule("user:alice", tpm=100),)
    for _ in range(3):
        limiter.admit(rules, "m", told).settle(told)
        standing = limiter.standing(rules, "m")
        assert standing.tokens is not None and standing.tokens.remaining == (100 if told <= 0 else 0)
        if told <= 0:
            assert limiter._meters["user:alice *"].tokens.total == 0
        assert len(tries(limiter, rules, 1)) == (told <= 0)
        clock.go(61)
    assert limiter.admit(rules, "m", -(10**18)).open
    limiter.dump()


# A reload.


def test_changed_rules_apply_to_what_was_counted_before(clock: Clock, limiter: Limiter) -> None:
    old = Rule("user:alice", rpm=10, concurrency=10)
    holds = tries(limiter, (old,), 6)
    lowered = replace(old, rpm=6, concurrency=10)
    assert refused(limiter, (lowered,)).kind == "rpm"
    assert refused(limiter, (replace(old, rpm=3),)).wait == 60
    assert refused(limiter, (replace(old, rpm=0, concurrency=6),)).kind == "concurrency"
    raised = replace(old, rpm=8)
    assert len(tries(limiter, (raised,), 9)) == 2
    for hold in holds:
        hold.settle(1)
    assert limiter.running() == 2
    clock.go(60)
    assert len(tries(limiter, (lowered,), 9)) == 6


# The wait that is told.


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["*", "m*", "m"]), st.integers(0, 6), st.integers(0, 9), st.integers(0, 400)),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.tuples(st.floats(0, 45), st.integers(0, 120)), min_size=1, max_size=40),
    st.floats(0, 1e5),
)
def test_whoever_waits_as_told_is_admitted(
    limits: list[tuple[str, int, int, int]], requests: list[tuple[float, int]], begin: float
) -> None:
    """And a second less would have been too little, where the window is exact."""
    clock = Clock(begin)
    limiter = clock.limiter()
    rules = tuple(
        Rule(f"user:{index}", model, rpm=rpm, rpd=rpd, tpm=tpm) for index, (model, rpm, rpd, tpm) in enumerate(limits)
    )
    for step, tokens in requests:
        clock.go(step)
        wait = attempt(limiter, rules, tokens)
        if wait is None:
            continue
        assert wait >= 1
        told_at = clock.now
        if wait > 1:
            clock.go(wait - 1 - 1e-6)
            refused(limiter, rules)
        clock.now = told_at + wait  # in one step: two would round twice, and may end in front of it
        assert attempt(limiter, rules, tokens) is None


def test_a_wait_just_above_whole_seconds_is_not_rounded_down(clock: Clock, limiter: Limiter) -> None:
    rules = (Rule("user:alice", rpm=1),)
    limiter.admit(rules, "m")
    clock.go(30 - 2e-10)
    wait = refused(limiter, rules).wait
    clock.go(wait)
    assert wait <= 31 and attempt(limiter, rules, 0) is None


def attempt(limiter: Limiter, rules: tuple[Rule, ...], tokens: int) -> int | None:
    """The seconds to wait, or None if the request was admitted; it is over at once."""
    try:
        limiter.admit(rules, "m", tokens).settle(tokens)
    except RateLimited as error:
        return int(error.headers["Retry-After"])
    return None


def test_the_refusal_names_the_rule_that_takes_longest_and_no_other_secret(limiter: Limiter) -> None:
    rules = (Rule("user:alice", rpm=1), Rule("key:alice/ci", "openai-*", rpd=1), Rule("provider:openai-main", rpm=1))
    limiter.admit(rules, "openai-main/x")
    error = refused(limiter, rules, "openai-main/x")
    assert (error.status, error.code, error.kind, error.rule) == (429, "rate_limited", "rpd", rules[1])
    assert str(error) == ("rate_limited: the limit 'alice/ci: rpd 1 for openai-*' is reached; try again in 86400 s")
    assert error.headers["Retry-After"] == "86400"
    assert isinstance(error, Refusal)


# What the headers say.


def test_openais_headers(clock: Clock, limiter: Limiter) -> None:
    rules = (Rule("user:alice", rpm=60, rpd=5000, tpm=150_000),)
    assert limiter.header_lines(rules, "m", "openai_chat") == [
        b"x-ratelimit-limit-requests: 60\r\n", b"x-ratelimit-remaining-requests: 60\r\n",
        b"x-ratelimit-reset-requests: 0s\r\n", b"x-ratelimit-limit-tokens: 150000\r\n",
        b"x-ratelimit-remaining-tokens: 150000\r\n", b"x-ratelimit-reset-tokens: 0s\r\n",
    ]  # fmt: skip
    limiter.admit(rules, "m", 16).settle(16)
    clock.go(0.5)
    limiter.admit(rules, "m", 20)
    for dialect in ("openai_chat", "openai_responses", "gemini"):
        assert limiter.header_lines(rules, "m", dialect) == [  # type: ignore[arg-type]
            b"x-ratelimit-limit-requests: 60\r\n", b"x-ratelimit-remaining-requests: 58\r\n",
            b"x-ratelimit-reset-requests: 1m0s\r\n", b"x-ratelimit-limit-tokens: 150000\r\n",
            b"x-ratelimit-remaining-tokens: 149964\r\n", b"x-ratelimit-reset-tokens: 1m0s\r\n",
        ]  # fmt: skip


def test_anthropics_headers_tell_times(clock: Clock, limiter: Limiter) -> None:
    rules = (Rule("user:alice", rpm=1, tpm=100),)
    limiter.admit(rules, "m", 16).settle(16)
    clock.go(30.5)
    reset = datetime.fromtimestamp(clock.wall + 29.5, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()
    expected = [
        b"anthropic-ratelimit-requests-limit: 1\r\n", b"anthropic-ratelimit-requests-remaining: 0\r\n",
        b"anthropic-ratelimit-requests-reset: %b\r\n" % reset, b"anthropic-ratelimit-tokens-limit: 100\r\n",
        b"anthropic-ratelimit-tokens-remaining: 84\r\n", b"anthropic-ratelimit-tokens-reset: %b\r\n" % reset,
    ]  # fmt: skip
    assert limiter.header_lines(rules, "m", "anthropic") == expected
    clock.go(-0.25)
    assert limiter.header_lines(rules, "m", "anthropic") == expected
    clock.wall += 0.5
    later = datetime.fromtimestamp(clock.wall + 29.75 + 0.5, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()
    assert later in limiter.header_lines(rules, "m", "anthropic")[2], "rounded up: never before the time"
    clock.wall -= 0.5
    with pytest.raises(RateLimited) as caught:
        limiter.admit(rules, "m", 0, "anthropic")
    told = [f"{name}: {value}\r\n".encode() for name, value in caught.value.headers.items()]
    assert told == [b"Retry-After: 30\r\n", *expected]


@pytest.mark.parametrize(
    ("gone", "text"),
    [(0.0, "24h0m0s"), (1.0, "23h59m59s"), (86_399.875, "125ms"), (86_340.0, "1m0s"), (86_341.0, "59s"),
     (86_399.0, "1s"), (82_800.5, "1h0m0s"), (86_399.9999, "1ms"), (86_399.00001, "1s")],
)  # fmt: skip
def test_spans_are_written_as_go_writes_them(clock: Clock, limiter: Limiter, gone: float, text: str) -> None:
    rules = (Rule("user:alice", rpd=2),)
    limiter.admit(rules, "m")
    clock.go(gone)
    assert b"x-ratelimit-reset-requests: %b\r\n" % text.encode() in limiter.header_lines(rules, "m", "openai_chat")


def test_where_nothing_limits_no_header_is_sent(limiter: Limiter) -> None:
    for rules in ((), (Rule("user:a", concurrency=3),), (Rule("user:a", "x", rpm=3),)):
        assert limiter.header_lines(rules, "m", "anthropic") == []


# What `/statsz` says.


def test_the_snapshot_names_providers_and_nobody_else(limiter: Limiter) -> None:
    provider = Rule("provider:openai-main", rpm=10, tpm=1000, concurrency=4)
    user, key, other = Rule("user:alice", rpm=1), Rule("key:alice/laptop", rpm=5), Rule("user:bob", rpm=5, rpd=9)
    limiter.admit((provider, user, key), "m", 30)
    limiter.admit((other,), "m")
    told = limiter.snapshot()
    assert told == {
        "providers": {
            "openai-main": {
                "*": {
                    "rpm": {"limit": 10, "remaining": 9},
                    "tpm": {"limit": 1000, "remaining": 970},
                    "concurrency": {"limit": 4, "remaining": 3},
                }
            }
        },
        "user": {"rpm": {"active": 2, "exhausted": 1}, "rpd": {"active": 1, "exhausted": 0}},
        "key": {"rpm": {"active": 1, "exhausted": 0}},
    }
    assert b"alice" not in orjson.dumps(told) and b"bob" not in orjson.dumps(told)


# Memory.


def test_idle_windows_are_forgotten(clock: Clock, limiter: Limiter) -> None:
    running = limiter.admit((Rule("user:busy", tpm=10),), "m", 0)
    for number in range(20_000):
        limiter.admit((Rule(f"user:{number}", rpm=5),), "m").settle(1)
        clock.go(0.5)
    assert len(limiter._meters) <= 1100
    running.settle(11)
    assert refused(limiter, (Rule("user:busy", tpm=10),)).kind == "tpm", "what runs is not forgotten"
    clock.go(61)
    limiter.forget_idle()
    assert len(limiter._meters) == 0


def test_forgetting_between_two_rules_of_one_request_loses_no_count(clock: Clock, limiter: Limiter) -> None:
    alice = Rule("user:alice", rpm=1)
    limiter.admit((alice,), "m").release()
    for number in range(limiter._FEW - 1):
        limiter.admit((Rule(f"user:{number}", rpm=5),), "m").release()
    clock.go(61)
    limiter.admit((alice, Rule("key:alice/new", rpm=5)), "m")
    refused(limiter, (alice,))


def test_a_day_of_steady_requests_takes_little_memory(clock: Clock) -> None:
    """Whatever the limit, an entry is 16 bytes and a window has at most some hundreds."""
    limiter = clock.limiter()
    rules = (Rule("user:alice", rpm=100_000, rpd=1_000_000, tpm=10**9),)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            limiter.admit(rules, "m", 10).settle(10)
            clock.go(10)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 40_000


def test_a_window_holds_few_entries_when_its_limit_shrinks_and_grows() -> None:
    window = Window(MINUTE)
    now = 0.0
    for number in range(20_000):
        now += 0.003 if number % 3 else 0.4
        window.expire(now)
        if window.total < FINE:
            window.add(now, 1, number % 700 < 300)
        else:
            window.add(now, 1, False)
        assert len(window._times) - window._head <= 2 * FINE + 2
        assert len(window._times) <= 3 * FINE + 3


# A restart.


def restarted(clock: Clock, limiter: Limiter, reboot: bool = False) -> Limiter:
    data = limiter.dump()
    if reboot:
        clock.now = 3.0
    other = clock.limiter()
    assert other.restore(data)
    return other


RULES = (Rule("user:alice", rpm=10, rpd=20, tpm=100, concurrency=3),)


@pytest.mark.parametrize("reboot", [False, True])
@pytest.mark.parametrize("away", [0.0, 20.0, 61.0, 3600.0])
def test_a_restart_loses_no_count_and_gives_no_burst(clock: Clock, limiter: Limiter, away: float, reboot: bool) -> None:
    for hold in tries(limiter, RULES, 3, tokens=10):
        hold.settle(20)
    data = limiter.dump()
    if reboot:
        clock.now = 2.0 - away  # the monotonic clock begins at the boot, while the wall clock goes on
    clock.go(away)
    other = clock.limiter()
    assert other.restore(data)
    standing = other.standing(RULES, "m")
    assert standing.requests is not None and standing.tokens is not None
    assert standing.tokens.remaining == (40 if away < 60 else 100)
    assert standing.requests.remaining == (7 if away < 60 else 10)
    day = other.standing((Rule("user:alice", rpd=20),), "m").requests
    assert day is not None and (day.remaining, day.reset) == (17, DAY - away)


def test_what_a_dead_process_held_is_free_once_and_its_requests_stay_counted(clock: Clock, limiter: Limiter) -> None:
    holds = tries(limiter, RULES, 9, tokens=10)
    assert len(holds) == 3 and limiter.running() > 0
    other = restarted(clock, limiter)
    assert other.running() == 0
    for hold in holds:
        hold.cancel()
    standing = other.standing(RULES, "m")
    assert standing.requests is not None and standing.requests.remaining == 7


@pytest.mark.parametrize("reboot", [False, True])
@pytest.mark.parametrize("step", [-1e6, -3600.0, -1.0, 1.0, 3600.0, 1e6])
def test_a_clock_step_across_a_restart_gives_nothing_and_takes_nothing(step: float, reboot: bool) -> None:
    clock = Clock()
    limiter = clock.limiter()
    tries(limiter, (Rule("user:alice", rpm=3),), 3)
    clock.go(5)
    data = limiter.dump()
    clock.wall += step
    if reboot:
        clock.now = 1.0
    other = clock.limiter()
    assert other.restore(data)
    if reboot and step > 0:
        return  # no clock of the new boot can tell a step from time spent off
    assert refused(other, (Rule("user:alice", rpm=3),)).wait == 55


def test_many_restarts_add_nothing_up(clock: Clock, limiter: Limiter) -> None:
    tries(limiter, RULES, 3)
    for _ in range(20):
        clock.go(1)
        limiter = restarted(clock, limiter)
    assert limiter.restore(limiter.dump()), "what is there already stays as it is"
    standing = limiter.standing(RULES, "m")
    assert standing.requests is not None and standing.requests.remaining == 7


GARBAGE = [
    b"", b"null", b"[]", b"{}", b"\xff", b"{", b'"x"', b"1", b'{"version":2}', b'{"version":1}',
    b'{"version":1,"now":0,"wall":0,"windows":[]}', b'{"version":1,"now":null,"wall":0,"windows":{}}',
    b'{"version":1,"now":true,"wall":0,"windows":{}}', b'{"version":1,"now":1e300,"wall":0,"windows":{}}',
    b'{"version":1,"now":0,"wall":"0","windows":{}}',
]  # fmt: skip


@pytest.mark.parametrize("data", GARBAGE)
def test_garbage_restores_nothing(limiter: Limiter, data: bytes) -> None:
    assert not limiter.restore(data)
    assert limiter._meters == {}


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("rpm", [[1.0], []]), ("rpm", [[2.0, 1.0], [1, 1]]), ("rpm", [[1.0], [-1]]), ("rpm", [[1.0], [1.5]]),
        ("rpm", [[1.0], [True]]), ("rpm", [[1.0], ["1"]]), ("rpm", [["x"], [1]]), ("rpm", [[1e9], [1]]), ("rpm", []),
        ("rpm", [[1.0] * 5000, [1] * 5000]), ("rpm", [[1.0], [2**63]]), ("rpm", None), ("rpm", "ab"), ("rpm", {}),
        ("day", [[1.0], [1]]), ("rpm", [{"a": 1}, [1]]),
    ],
)  # fmt: skip
def test_one_false_entry_restores_nothing_at_all(clock: Clock, kind: str, entries: object) -> None:
    limiter = clock.limiter()
    for owner in ("user:a", "user:b"):
        limiter.admit((Rule(owner, rpm=5, rpd=5),), "m")
    value = orjson.loads(limiter.dump())
    good = orjson.dumps(value)
    window = value["windows"]["user:b *"]
    window.pop("rpm")
    window[kind] = entries
    fresh = clock.limiter()
    assert not fresh.restore(orjson.dumps(value)) and fresh._meters == {}
    assert fresh.restore(good) and len(fresh._meters) == 2


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_dump_with_broken_bytes_never_crashes(data: st.DataObject) -> None:
    clock = Clock()
    limiter = clock.limiter()
    tries(limiter, RULES, 3, tokens=10)
    dumped = bytearray(limiter.dump())
    for _ in range(data.draw(st.integers(1, 3))):
        dumped[data.draw(st.integers(0, len(dumped) - 1))] = data.draw(st.integers(32, 126))
    fresh = clock.limiter()
    if fresh.restore(bytes(dumped[: data.draw(st.integers(0, len(dumped)))])):
        fresh.snapshot()
        with_room = tries(fresh, RULES, 20)
        assert len(with_room) <= 3
    else:
        assert fresh._meters == {}


# Everything at once.


class Life(RuleBasedStateMachine):
    """Requests, reloads, clocks and restarts in any order, beside a model that remembers every single request."""

    holds = Bundle("holds")

    @initialize(
        limits=st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=2, max_size=2),
    )
    def begin(self, limits: list[tuple[int, int, int, int]]) -> None:
        self.clock = Clock()
        self.limiter = self.clock.limiter()
        self.at: dict[str, list[tuple[float, int, int]]] = {"user:a *": [], "key:a/k m*": []}  # time, request, day too
        self.used: dict[str, list[tuple[float, int]]] = {"user:a *": [], "key:a/k m*": []}
        self.live: dict[Hold, tuple[int, dict[str, Rule], float]] = {}
        self.serial = 0
        self.reload(limits)

    @rule(limits=st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=2, max_size=2))
    def reload(self, limits: list[tuple[int, int, int, int]]) -> None:
        self.rules = tuple(
            Rule(owner, model, rpm=rpm, rpd=rpd and rpd + 3, tpm=tpm * 10, concurrency=concurrency)
            for (owner, model), (rpm, rpd, tpm, concurrency) in zip(
                (("user:a", "*"), ("key:a/k", "m*")), limits, strict=True
            )
        )

    def matching(self, model: str) -> dict[str, Rule]:
        return {rule.id: rule for rule in self.rules if rule.model == "*" or model.startswith("m")}

    def fits(self, rule: Rule) -> bool:
        now = self.clock.now
        mine = [live for live in self.live.values() if rule.id in live[1]]
        counted = {
            kind: sum(1 for at, _, kinds in self.at[rule.id] if kinds & bit and at + length > now)
            for kind, bit, length in (("rpm", 1, MINUTE), ("rpd", 2, DAY))
        }
        tokens = sum(count for at, count in self.used[rule.id] if at + MINUTE > now) + sum(live[0] for live in mine)
        return not (
            (rule.rpm and counted["rpm"] >= rule.rpm)
            or (rule.rpd and counted["rpd"] >= rule.rpd)
            or (rule.tpm and tokens >= rule.tpm)
            or (rule.concurrency and len(mine) >= rule.concurrency)
        )

    @rule(target=holds, model=st.sampled_from(["m", "m/x", "other"]), tokens=st.integers(0, 30))
    def request(self, model: str, tokens: int) -> Hold:
        matching = self.matching(model)
        expected = all(self.fits(one) for one in matching.values())
        try:
            hold = self.limiter.admit(self.rules, model, tokens)
        except RateLimited:
            hold = FREE
        if hold is FREE and matching:
            assert not expected, "refused although every rule had room"
            return FREE
        assert expected, "admitted although a rule had no room"
        self.serial += 1
        for name, one in matching.items():
            kinds = (1 if one.rpm else 0) | (2 if one.rpd else 0)
            self.at[name].append((self.clock.now, self.serial, kinds))
        self.live[hold] = (tokens, matching, self.serial)
        return hold

    @rule(hold=holds, tokens=st.integers(-5, 40))
    def settle(self, hold: Hold, tokens: int) -> None:
        hold.settle(tokens)
        if (live := self.live.pop(hold, None)) is not None:
            for name, one in live[1].items():
                if one.tpm:
                    self.used[name].append((self.clock.now, max(0, tokens)))

    @rule(hold=consumes(holds))
    def release(self, hold: Hold) -> None:
        hold.release()
        self.live.pop(hold, None)

    @rule(hold=consumes(holds))
    def cancel(self, hold: Hold) -> None:
        hold.cancel()
        if (live := self.live.pop(hold, None)) is not None:
            for name in live[1]:
                self.at[name] = [one for one in self.at[name] if one[1] != live[2]]

    @rule(seconds=st.sampled_from([0.25, 1.0, 29.5, 30.0, 60.0, 61.0, 3600.0, 43_200.0, 86_400.0]))
    def wait(self, seconds: float) -> None:
        self.clock.go(seconds)

    @rule(step=st.sampled_from([-86_400.0, -3600.0, 3600.0, 86_400.0]))
    def set_wall_clock(self, step: float) -> None:
        self.clock.wall += step

    @rule()
    def forget(self) -> None:
        self.limiter.forget_idle()

    @rule()
    def restart(self) -> None:
        self.limiter = restarted(self.clock, self.limiter)
        self.live.clear()

    @invariant()
    def held_is_what_runs(self) -> None:
        if hasattr(self, "limiter"):
            assert self.limiter.running() == sum(len(live[1]) * (1 + live[0]) for live in self.live.values())

    def teardown(self) -> None:
        for number, hold in enumerate(list(getattr(self, "live", ()))):
            (hold.release, hold.cancel, lambda hold=hold: hold.settle(3))[number % 3]()
        if hasattr(self, "limiter"):
            assert self.limiter.running() == 0


TestLife = Life.TestCase
TestLife.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


# What it costs.


def test_admitting_and_settling_is_cheap() -> None:
    """A tenth of a millisecond would be a scandal; what is measured is told beside the limit, which is generous."""
    limiter = Limiter()
    rules = (Rule("user:alice", rpm=10**9),)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5000):
            limiter.admit(rules, "m", 5).settle(5)
        best = min(best, (time.perf_counter() - start) / 5000)
    assert best < 10e-6, f"{best * 1e6:.2f} µs"


def test_a_random_long_run_never_breaks_the_limit() -> None:
    chance = random.Random(20270101)
    clock = Clock()
    limiter = clock.limiter()
    rules = (Rule("user:alice", rpm=400),)
    at: list[float] = []
    for _ in range(60_000):
        clock.go(chance.choice([0.0, 0.001, 0.1, 0.3]))
        at += [clock.now] * len(tries(limiter, rules, 1))
    behind = 0
    for index, one in enumerate(at):
        while at[behind] + MINUTE <= one:
            behind += 1
        assert index - behind + 1 <= 400
    assert len(at) > 0.95 * 400 * (clock.now - 1000) / MINUTE, "and hardly anything is refused in vain"
