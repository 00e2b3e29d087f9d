"""One request's attempts, as a generator: it says what to send where, is told what became of it, and says what next.

    plan = attempts(targets, terms, now, dice)
    step = next(plan)                     a Try
    step = plan.send(Answered())          StopIteration: the request is over
    step = plan.send(Failed(fault))       the next Try; StopIteration(value: Exhausted) if there is none
    step = plan.send(Full())              the provider's limits left no room: nothing was sent

First every target has its turn, in the order given; a further key of the same target is free, because each costs one
attempt until it is cooled or renewed. Then those that may be asked again have another turn, each paid for by the
provider's budget and after a pause. Invariants: nothing is sent that a breaker, a key's rest or `most` forbids; a
failure that is the request's own ends the plan; every permit is told its outcome exactly once, however the plan ends,
also when it is closed in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gproxyd.routing import retries
from gproxyd.routing.breaker import Permit
from gproxyd.routing.credentials import Credential
from gproxyd.routing.health import Health, Pick
from gproxyd.routing.retries import Budget, Fault

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Target(Generic[T]):
    """Where a request may go. `what` is the caller's own."""

    provider: str
    model: str
    health: Health
    budget: Budget
    what: T


@dataclass(frozen=True, slots=True)
class Terms:
    """`most` further attempts; `share` of a provider's requests may be sent again. `tried` attempts have been made
    already, in vain, the last one at `last`, which may be asked `again` or not, or with an `other_key`."""

    most: int = 3
    share: float = 0.1
    tried: int = 0
    last: tuple[str, str] | None = None
    again: bool = True
    other_key: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Try(Generic[T]):
    """An attempt to make: after so many seconds, with this key. `patient`: it may wait for room at its provider,
    because there is no other target to turn to.

    `permit` is the plan's, but may be told that the upstream is well as soon as its answer begins.
    """

    target: Target[T]
    credential: Credential
    permit: Permit
    pause: float = 0.0
    patient: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """The upstream answered, and that is the answer."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It did not. `begun`: the client has something of its answer already, so nothing else may follow."""

    fault: Fault
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Full:
    """The provider's own limits left no room: nothing was sent."""


Outcome = Answered | Failed | Full


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Nothing is left to try. `wait`: seconds until something may be tried again; `sent`: whether anything was."""

    wait: float
    sent: bool


@dataclass(slots=True)
class _State(Generic[T]):
    """What one plan has done so far."""

    left: int
    sent: int = 0
    pauses: int = 0
    earned_at: set[str] = field(default_factory=set)  # providers that were sent the request for the first time
    failed_at: set[str] = field(default_factory=set)  # providers that are not well
    again: list[Target[T]] = field(default_factory=list)
    full: list[Target[T]] = field(default_factory=list)
    waited: bool = False  # there was no room where there was nothing but to wait for it
    over: bool = False


def attempts(
    targets: Sequence[Target[T]], terms: Terms, now: Callable[[], float], dice: random.Random
) -> Generator[Try[T], Outcome, Exhausted]:
    """See above. `now` is a monotonic clock."""
    state: _State[T] = _State(left=terms.most + 1 - terms.tried, sent=terms.tried)
    alone = len(targets) == 1 and len(targets[0].health.pool) == 1
    fresh = targets if terms.last is None else _after(targets, terms, state)
    for place, target in enumerate(fresh):
        last = place == len(fresh) - 1
        yield from _turn(target, terms, state, now, dice, lenient=alone, patient=last and not state.full)
        if state.over:
            return Exhausted(0.0, sent=bool(state.sent))
    for target in tuple(state.full):  # there is time to wait now
        yield from _turn(target, terms, state, now, dice, lenient=alone, patient=True)
        if state.over:
            return Exhausted(0.0, sent=bool(state.sent))
    if not state.sent and not state.waited:  # a refused key may have been mended meanwhile
        for target in targets:
            yield from _turn(target, terms, state, now, dice, lenient=alone, patient=True, refused=True)
            if state.over:
                return Exhausted(0.0, sent=bool(state.sent))
    while state.again and state.left > 0:
        target = state.again.pop(0)
        if not target.health.usable(now()) or not target.budget.spend():
            continue
        yield from _turn(target, terms, state, now, dice, lenient=False, patient=True, paid=True)
        if state.over:
            break
    return Exhausted(min((one.health.ready_in(now()) for one in targets), default=0.0), sent=bool(state.sent))


def _after(targets: Sequence[Target[T]], terms: Terms, state: _State[T]) -> Sequence[Target[T]]:
    """An attempt at one of the targets was made before the plan began: that one has had its turn, unless the fault was
    its key's, and it has others."""
    tried = [one for one in targets if (one.provider, one.model) == terms.last]
    if terms.other_key:
        tried = [one for one in tried if len(one.health.pool) == 1]
    for one in tried:
        one.budget.earn(terms.share)
        state.earned_at.add(one.provider)
        if terms.again:
            state.failed_at.add(one.provider)
            state.again.append(one)
    return [one for one in targets if one not in tried]


def _turn(
    target: Target[T],
    terms: Terms,
    state: _State[T],
    now: Callable[[], float],
    dice: random.Random,
    *,
    lenient: bool,
    patient: bool,
    refused: bool = False,
    paid: bool = False,
) -> Generator[Try[T], Outcome, None]:
    """All attempts at one target: one, and one for each further key while it is the key's fault."""
    same = paid or target.provider in state.failed_at
    tried: set[bytes] = set()
    while state.left > 0:
        pick = target.health.pick(now(), lenient=lenient, refused=refused)
        if pick is None:
            return
        if pick.credential.tag in tried:
            target.health.left(pick.permit, now())
            return
        tried.add(pick.credential.tag)
        if same and not paid and not target.budget.spend():
            target.health.left(pick.permit, now())
            return
        pause = 0.0
        if same:
            state.pauses += 1
            pause = retries.pause(state.pauses, dice)
        if target.provider not in state.earned_at:
            state.earned_at.add(target.provider)
            target.budget.earn(terms.share)
        outcome = yield from _attempt(target, pick, pause, patient, now)
        if isinstance(outcome, Full):
            if patient:
                state.waited = True
            else:
                state.full.append(target)
            return
        state.left -= 1
        state.sent += 1
        if isinstance(outcome, Answered) or outcome.begun or not outcome.fault.retryable:
            state.over = True
            return
        if outcome.fault.kind == "broken":
            state.failed_at.add(target.provider)
            if outcome.fault.again:
                state.again.append(target)
            return
        same = paid = False  # the next key is another matter


def _attempt(
    target: Target[T], pick: Pick, pause: float, patient: bool, now: Callable[[], float]
) -> Generator[Try[T], Outcome, Outcome]:
    """One attempt; its permit is told what became of it."""
    health, (credential, permit) = target.health, pick
    told = False
    try:
        outcome = yield Try(target, credential, permit, pause, patient)
        told = True
        if isinstance(outcome, Answered):
            health.succeeded(credential, now(), permit)
        elif isinstance(outcome, Full) or outcome.fault.kind == "final":
            health.left(permit, now())
        else:
            health.failed(credential, outcome.fault, now(), permit)
        return outcome
    finally:
        if not told:  # whoever asked has left
            health.left(permit, now())
