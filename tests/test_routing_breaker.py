"""Breakers: what opens them, how few probe, and that they close again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.routing.breaker import LEAST, LONGEST_REST, Breaker, Permit, Rule, State

RULE = Rule(failures=3, open_for=10.0, rate=0.5, window=30.0)


def made(rule: Rule = RULE) -> tuple[Breaker, list[State]]:
    turned: list[State] = []
    return Breaker(rule, turned.append), turned


def attempt(breaker: Breaker, now: float, well: bool | None) -> bool:
    """One attempt from its beginning to its end. Returns whether it was allowed."""
    permit = breaker.enter(now)
    if permit is None:
        return False
    {True: permit.succeeded, False: permit.failed, None: permit.left}[well](now)
    return True


def opened(now: float = 0.0) -> tuple[Breaker, list[State]]:
    breaker, turned = made()
    for _ in range(3):
        assert attempt(breaker, now, False)
    assert breaker.state == "open"
    return breaker, turned


def test_so_many_failures_in_a_row_open_it_and_a_success_in_between_does_not_count() -> None:
    breaker, turned = made()
    for well in (False, False, True, False, False):
        attempt(breaker, 1.0, well)
    assert breaker.state == "closed" and breaker.failures == 2
    attempt(breaker, 1.0, False)
    assert (breaker.state, breaker.opens, breaker.retry_at, turned) == ("open", 1, 11.0, ["open"])


def test_a_share_of_failures_opens_it_though_none_follow_each_other() -> None:
    breaker, turned = made()
    for number in range(LEAST - 1):
        assert attempt(breaker, 0.1 * number, bool(number % 2))
    assert breaker.state == "closed"
    attempt(breaker, 2.0, False)
    assert (breaker.state, turned) == ("open", ["open"])


def test_failures_that_lie_further_apart_than_the_window_do_not() -> None:
    breaker, _ = made()
    for number in range(LEAST * 3):
        assert attempt(breaker, 20.0 * number, bool(number % 2))
    assert breaker.state == "closed"


def test_while_open_nothing_passes_and_then_exactly_one_probe_does() -> None:
    breaker, turned = opened()
    assert not attempt(breaker, 9.9, True)
    probe = breaker.enter(10.0)
    assert probe is not None and probe.probe and breaker.state == "half-open"
    assert breaker.enter(10.0) is None and breaker.enter(99.0) is None
    probe.succeeded(11.0)
    assert (breaker.state, breaker.failures, breaker.calm) == ("closed", 0, True)
    assert turned == ["open", "half-open", "closed"]
    assert attempt(breaker, 11.0, True) and attempt(breaker, 11.0, True)


def test_a_probe_that_fails_opens_it_for_as_long_again() -> None:
    breaker, turned = opened()
    assert attempt(breaker, 10.0, False)
    assert (breaker.state, breaker.retry_at, breaker.opens) == ("open", 20.0, 2)
    assert not attempt(breaker, 19.9, True) and attempt(breaker, 20.0, True)
    assert turned == ["open", "half-open", "open", "half-open", "closed"]


def test_a_probe_that_is_abandoned_gives_its_place_to_the_next() -> None:
    breaker, _ = opened()
    first = breaker.enter(10.0)
    assert first is not None
    first.left(10.5)
    second = breaker.enter(10.5)
    assert second is not None and second.probe
    first.succeeded(11.0)  # too late: it has left
    assert breaker.state == "half-open" and breaker.enter(11.0) is None
    second.succeeded(11.0)
    assert breaker.state == "closed"


def test_what_began_before_it_opened_changes_nothing_any_more() -> None:
    breaker, _ = made()
    early, late = breaker.enter(0.0), breaker.enter(0.0)
    for _ in range(3):
        attempt(breaker, 0.0, False)
    assert early is not None and late is not None and breaker.state == "open"
    early.succeeded(1.0)
    late.failed(1.0)
    assert (breaker.state, breaker.failures, breaker.retry_at) == ("open", 3, 10.0)
    probe = breaker.enter(10.0)
    breaker.succeeded(10.0)
    assert breaker.state == "half-open"
    assert probe is not None


def test_nothing_is_counted_while_nothing_fails_and_nothing_remains_after_a_window_without_failures() -> None:
    breaker, _ = made()
    for number in range(100):
        attempt(breaker, float(number), True)
    assert breaker.calm
    attempt(breaker, 100.0, False)
    assert not breaker.calm
    attempt(breaker, 101.0, True)
    assert not breaker.calm
    attempt(breaker, 131.0, True)
    assert breaker.calm


def test_the_vendors_wish_for_rest_is_kept_to_its_end_and_no_longer_than_is_believable() -> None:
    breaker, _ = made()
    breaker.rest(5.0, 0.0)
    breaker.rest(3.0, 0.0)
    assert breaker.resting(4.9) and not breaker.resting(5.0) and breaker.calm
    breaker.rest(1e9, 0.0)
    assert breaker.resting(LONGEST_REST - 1) and not breaker.resting(LONGEST_REST)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter")),
        st.tuples(st.just("end"), st.integers(0, 5), st.sampled_from([True, False, None])),
        st.tuples(st.just("wait"), st.floats(0.0, 15.0)),
    ),
    max_size=120,
)


@given(STEPS, st.integers(1, 4))
def test_whatever_happens_two_probes_are_never_under_way_and_it_recovers_in_time(
    steps: list[tuple[object, ...]], failures: int
) -> None:
    breaker, turned = made(Rule(failures=failures, open_for=10.0))
    now, running = 0.0, list[Permit]()
    for step in steps:
        before = breaker.state
        if step[0] == "enter":
            permit = breaker.enter(now)
            if permit is not None:
                running.append(permit)
                assert before != "open" or now >= breaker.retry_at
        elif step[0] == "wait":
            assert isinstance(step[1], float)
            now += step[1]
        elif running:
            assert isinstance(step[1], int)
            permit = running.pop(step[1] % len(running))
            {True: permit.succeeded, False: permit.failed, None: permit.left}[step[2]](now)  # type: ignore[index]
        probes = [one for one in running if one.probe]
        assert len(probes) <= 1
        assert (breaker.state == "half-open") or not probes
    for permit in running:
        permit.left(now)
    for before, after in zip(["closed", *turned], turned, strict=False):
        assert (before, after) in {
            ("closed", "open"),
            ("open", "half-open"),
            ("half-open", "open"),
            ("half-open", "closed"),
        }
    # The upstream is well again: after `open_for` at most one probe lies between it and everybody.
    now += 10.0
    assert attempt(breaker, now, True)
    assert breaker.state == "closed" and attempt(breaker, now, True)


@pytest.mark.parametrize("well", [True, False, None])
def test_a_permit_counts_once(well: bool | None) -> None:
    breaker, _ = made()
    permit = breaker.enter(0.0)
    assert permit is not None
    {True: permit.succeeded, False: permit.failed, None: permit.left}[well](0.0)
    for _ in range(5):
        permit.failed(0.0)
    assert breaker.failures == (1 if well is False else 0)
