"""Plans: which attempts follow which outcomes, and that no law is broken whatever happens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Generator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.routing.breaker import Rule
from gproxyd.routing.credentials import CredentialPool
from gproxyd.routing.health import Registry
from gproxyd.routing.plan import Answered, Exhausted, Failed, Full, Outcome, Target, Terms, Try, attempts
from gproxyd.routing.retries import Fault

RULE = Rule(failures=3, open_for=10.0)
BROKEN = Failed(Fault("broken", "status"))
ELSEWHERE = Failed(Fault("broken", "reset", again=False))
LIMITED = Failed(Fault("limited", "status_429", 7.0))
REFUSED = Failed(Fault("key", "auth"))
FINAL = Failed(Fault("final", "final"))


class Key:
    def __init__(self, name: str) -> None:
        self._name = name

    def reveal(self) -> str:
        return self._name


class Bench:
    """Providers with a pool each, and a clock."""

    def __init__(self, **keys: int) -> None:
        self.now = 100.0
        self.turned: list[tuple[str, str]] = []
        self.registry = Registry(lambda label, state: self.turned.append((label, state)), lambda: self.now)
        self.dice = random.Random(1)
        self.pools = {
            name: CredentialPool([Key(f"{name}-{number}") for number in range(count)], lambda: self.now)
            for name, count in (keys or {"a": 1, "b": 1, "c": 1}).items()
        }

    def targets(self, *names: str) -> list[Target[str]]:
        found = []
        for name in names:
            provider, _, model = name.partition("/")
            model = model or "m"
            health = self.registry.target(provider, model, self.pools[provider], RULE, named=True)
            found.append(Target(provider, model, health, self.registry.budget(provider), name))
        return found

    def run(
        self, names: Sequence[str], outcomes: Sequence[Outcome], terms: Terms | None = None
    ) -> tuple[list[Try[str]], Exhausted]:
        """All attempts, and how it ended. The last outcome stands for all that follow."""
        plan = attempts(self.targets(*names), terms or Terms(), lambda: self.now, self.dice)
        return self.play(plan, outcomes)

    @staticmethod
    def play(
        plan: Generator[Try[str], Outcome, Exhausted], outcomes: Sequence[Outcome]
    ) -> tuple[list[Try[str]], Exhausted]:
        made: list[Try[str]] = []
        try:
            made.append(next(plan))
            while True:
                outcome = outcomes[min(len(made), len(outcomes)) - 1]
                made.append(plan.send(outcome))
        except StopIteration as end:
            ended: Exhausted = end.value
            return made, ended


def seen(made: Sequence[Try[str]]) -> list[str]:
    return [f"{one.target.what}{one.credential.place if len(one.target.health.pool) > 1 else ''}" for one in made]


@pytest.mark.parametrize(
    ("names", "outcomes", "expected"),
    [
        ("a", [Answered()], ["a"]),
        ("a b c", [Answered()], ["a"]),
        ("a b c", [BROKEN, Answered()], ["a", "b"]),
        ("a b c", [LIMITED, ELSEWHERE, Answered()], ["a", "b", "c"]),
        ("a b c", [REFUSED, Answered()], ["a", "b"]),
        ("a b c", [FINAL], ["a"]),
        ("a b c", [Failed(Fault("broken", "reset"), begun=True)], ["a"]),
        ("a b c", [Full(), Answered()], ["a", "b"]),
        ("a b c", [Full(), Full(), Full(), Answered()], ["a", "b", "c", "a"]),
        ("a", [Full(), Answered()], ["a"]),
        ("a b c", [BROKEN], ["a", "b", "c"]),  # nothing is saved up for a second round
    ],
)
def test_one_target_after_another(names: str, outcomes: list[Outcome], expected: list[str]) -> None:
    made, _ = Bench().run(names.split(), outcomes)
    assert seen(made) == expected


def test_the_only_target_is_asked_to_be_patient_and_one_of_several_is_not() -> None:
    bench = Bench()
    (only,), _ = bench.run(["a"], [Answered()])
    assert only.patient
    made, _ = bench.run(["a", "b"], [Full(), Full(), Answered()])
    assert [(one.target.what, one.patient) for one in made] == [("a", False), ("b", False), ("a", True)]


def test_further_attempts_are_at_most_so_many() -> None:
    bench = Bench(a=1, b=1, c=1, d=1, e=1)
    made, ended = bench.run(["a", "b", "c", "d", "e"], [BROKEN], Terms(most=2))
    assert seen(made) == ["a", "b", "c"] and ended.sent
    made, _ = bench.run(["a", "b"], [BROKEN], Terms(most=0))
    assert seen(made) == ["a"]


def test_the_same_provider_is_asked_again_after_a_pause_and_only_as_its_budget_allows() -> None:
    bench = Bench()
    for _ in range(20):
        bench.run(["a"], [Answered()])
    made, _ = bench.run(["a"], [BROKEN, BROKEN, BROKEN, BROKEN])
    assert seen(made) == ["a", "a", "a"]  # 2.1 are saved up, and two are spent
    assert made[0].pause == 0 and all(0 < one.pause <= 0.5 for one in made[1:])
    assert bench.turned == [("a/m", "open")]


def test_another_model_of_a_provider_that_is_not_well_is_paid_for_and_of_one_that_is_limited_is_not() -> None:
    bench = Bench()
    made, _ = bench.run(["a/x", "a/y", "b"], [BROKEN, Answered()])
    assert seen(made) == ["a/x", "b"]
    made, _ = bench.run(["a/x", "a/y", "b"], [LIMITED, Answered()])
    assert seen(made) == ["a/x", "a/y"] and made[1].pause == 0


def test_what_may_have_been_read_is_not_sent_to_the_same_provider_again() -> None:
    bench = Bench()
    for _ in range(50):
        bench.run(["a", "b"], [Answered()])
    made, _ = bench.run(["a", "b"], [ELSEWHERE, ELSEWHERE])
    assert seen(made) == ["a", "b"]


def test_every_key_of_a_pool_has_its_turn_at_once_when_it_is_the_keys_fault() -> None:
    bench = Bench(a=3, b=1)
    made, _ = bench.run(["a", "b"], [REFUSED, LIMITED, Answered()])
    assert seen(made) == ["a1", "a2", "a3"] and not any(one.pause for one in made)
    made, _ = bench.run(["a", "b"], [Answered()])
    assert seen(made) == ["a3"]  # one is parked, one rests
    bench.now += 7.0
    assert seen(bench.run(["a", "b"], [Answered()])[0]) == ["a2"]
    bench.now += 60.0
    assert seen(bench.run(["a", "b"], [Answered()])[0]) == ["a1"]


def test_a_target_whose_keys_all_rest_is_passed_by_and_the_shortest_rest_is_told() -> None:
    bench = Bench(a=2, b=1)
    made, ended = bench.run(["a", "b"], [LIMITED])
    assert seen(made) == ["a1", "a2", "b"] and ended == Exhausted(7.0, sent=True)
    bench.now += 2.0
    made, ended = bench.run(["a", "b"], [Answered()])
    assert made == [] and ended == Exhausted(5.0, sent=False)


def test_where_there_is_nothing_else_a_rest_is_the_callers_to_keep() -> None:
    bench = Bench()
    bench.run(["a"], [LIMITED])
    assert seen(bench.run(["a"], [LIMITED])[0]) == ["a"]


def test_a_refused_key_is_tried_where_nothing_else_is_left() -> None:
    bench = Bench()
    bench.run(["a"], [REFUSED])
    assert seen(bench.run(["a"], [REFUSED])[0]) == ["a"]
    bench.run(["a", "b"], [REFUSED])
    assert seen(bench.run(["a", "b"], [Answered()])[0]) == ["a"]


def test_an_open_breaker_is_passed_by_and_probed_by_one() -> None:
    bench = Bench()
    for _ in range(3):
        bench.run(["a", "b"], [BROKEN, Answered()])
    assert bench.turned == [("a/m", "open")]
    assert seen(bench.run(["a", "b"], [Answered()])[0]) == ["b"]
    made, ended = bench.run(["a"], [Answered()])
    assert made == [] and ended == Exhausted(10.0, sent=False)
    bench.now += 10.0
    probing = attempts(bench.targets("a", "b"), Terms(), lambda: bench.now, bench.dice)
    assert next(probing).target.what == "a"
    assert seen(bench.run(["a", "b"], [Answered()])[0]) == ["b"]
    probing.close()  # its client has left
    assert seen(bench.run(["a", "b"], [Answered()])[0]) == ["a"]
    assert [state for _, state in bench.turned] == ["open", "half-open", "closed"]


def test_a_probe_is_over_as_soon_as_its_answer_begins() -> None:
    bench = Bench()
    for _ in range(3):
        bench.run(["a", "b"], [BROKEN, Answered()])
    bench.now += 10.0
    probing = attempts(bench.targets("a", "b"), Terms(), lambda: bench.now, bench.dice)
    next(probing).permit.succeeded(bench.now)
    assert seen(bench.run(["a", "b"], [Answered()])[0]) == ["a"]


def test_an_attempt_that_was_made_before_the_plan_counts() -> None:
    bench = Bench()
    made, _ = bench.run(["a", "b", "c"], [BROKEN], Terms(most=1, tried=1, last=("a", "m")))
    assert seen(made) == ["b"]


def test_a_dead_upstream_is_sent_a_tenth_more_at_most() -> None:
    bench = Bench()
    health = bench.targets("a")[0].health
    health.obey(Rule(failures=10**9, rate=0.0))  # no breaker helps
    bench.registry.rule = Rule()
    sent = 0
    for _ in range(1000):
        plan = attempts([Target("a", "m", health, bench.registry.budget("a"), "a")], Terms(), lambda: 0.0, bench.dice)
        sent += len(bench.play(plan, [BROKEN])[0])
    assert 1080 <= sent <= 1100


OUTCOMES = st.sampled_from([Answered(), BROKEN, ELSEWHERE, LIMITED, REFUSED, FINAL, Full()])


@given(
    st.lists(
        st.tuples(st.lists(OUTCOMES, min_size=1, max_size=12), st.floats(0.0, 12.0), st.integers(0, 5)),
        max_size=40,
    )
)
def test_no_plan_breaks_the_laws_and_all_is_well_again_once_the_upstreams_are(
    rounds: list[tuple[list[Outcome], float, int]],
) -> None:
    bench = Bench(a=1, b=2, c=1)
    names = ["a/x", "b/x", "a/y", "c/x"]
    for outcomes, wait, most in rounds:
        made, _ = bench.run(names, outcomes, Terms(most=most))
        counted = [one for one, outcome in zip(made, [*outcomes, *[outcomes[-1]] * 99], strict=False)
                   if not isinstance(outcome, Full)]  # fmt: skip
        assert len(counted) <= most + 1
        used = Counter((one.target.what, one.credential.tag) for one in counted)
        assert max(used.values(), default=0) <= most + 1
        bench.now += wait
    for wait in (3600.0, 1.0, 31.0, 1.0):  # each key once or twice, then the window of the last failure goes by
        bench.now += wait
        for target in bench.targets(*names):
            pick = target.health.pick(bench.now)
            assert pick is not None
            target.health.succeeded(pick.credential, bench.now, pick.permit)
    assert all(target.health.closed and not target.health.troubled for target in bench.targets(*names))
