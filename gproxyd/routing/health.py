"""What is known of upstream models: their breakers, their rest, their speed. It outlives configurations.

Invariants: a target of which nothing is wrong costs one attribute to ask and nothing to tell; what is kept of targets
that are well goes with the last route to them, and what is kept of the others is bounded.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypedDict
from weakref import WeakValueDictionary

from gproxyd.routing.agents import Orders
from gproxyd.routing.breaker import Breaker, Permit, Rule, State
from gproxyd.routing.credentials import Credential, CredentialPool
from gproxyd.routing.latency import Latencies
from gproxyd.routing.retries import Budget, Fault, rest

MOST_TROUBLED = 1024
"""Targets that are not well and remembered though no route leads to them any more."""

Turned = Callable[[str, State], None]
"""Hears of a target, by its label, and the state that its breaker has entered."""


class Pick(NamedTuple):
    """A key that may be used now, and the breaker's permit to do so."""

    credential: Credential
    permit: Permit


class Health:
    """One provider's model, and its breaker for each key.

    label     what figures call it: "openai-main/gpt-4.1-mini", or "openai-main/other" for a model that nobody knows
    closed    no breaker is open, and no key rests: everything may pass unasked
    troubled  success must be told, because something had failed
    """

    __slots__ = ("__weakref__", "_breakers", "_limited", "_registry", "closed", "label", "model", "pool", "provider",
                 "rule", "troubled")  # fmt: skip

    def __init__(self, registry: Registry, provider: str, model: str, label: str, pool: CredentialPool) -> None:
        self._registry = registry
        self._breakers: dict[bytes, Breaker] = {}
        self._limited: dict[bytes, int] = {}  # how often in a row a key was limited without being told for how long
        self.provider = provider
        self.model = model
        self.label = label
        self.pool = pool
        self.rule = registry.rule
        self.closed = True
        self.troubled = False

    # Before an attempt.

    def pick(self, now: float, *, lenient: bool = False, refused: bool = False) -> Pick | None:
        """The key for an attempt that begins now; None if there is none that may be used.

        `lenient`: a key that rests is used all the same, because there is nothing else and its caller knows as much;
        `refused`: so is one that the vendor has refused.
        """
        for credential in (*self.pool.fit(now), *(self.pool.parked() if refused else ())):
            breaker = self._breakers.get(credential.tag)
            if breaker is None:
                breaker = self._breakers[credential.tag] = self._breaker(credential)
            if breaker.resting(now) and not lenient:
                continue
            permit = breaker.enter(now)
            if permit is not None:
                self.pool.use(credential, now)
                self._look(now)
                return Pick(credential, permit)
        return None

    def ready_in(self, now: float) -> float:
        """Seconds until an attempt may be made: 0 if one may now."""
        waits = []
        for credential in self.pool.fit(now):
            breaker = self._breakers.get(credential.tag)
            if breaker is None:
                return 0.0
            opens = breaker.retry_at if breaker.state == "open" else now
            waits.append(max(0.0, opens - now, breaker.rests_until - now))
        return min(waits, default=self.pool.freed_in(now))

    def usable(self, now: float) -> bool:
        """Whether an attempt may be made now."""
        if self.closed:
            return True
        for credential in self.pool.fit(now):
            breaker = self._breakers.get(credential.tag)
            if breaker is None or (breaker.admits(now) and not breaker.resting(now)):
                return True
        return False

    def _breaker(self, credential: Credential) -> Breaker:
        label = self.label if len(self.pool) == 1 else f"{self.label}#{credential.place}"
        turned = self._registry.turned  # and not this object, which must go when nobody needs it any more
        return Breaker(self.rule, lambda state: turned(label, state))

    # After it.

    def succeeded(self, credential: Credential, now: float, permit: Permit | None = None) -> None:
        """The upstream answered as one that is well."""
        self.pool.accepted(credential)
        self._limited.pop(credential.tag, None)
        breaker = self._breakers.get(credential.tag)
        if permit is not None:
            permit.succeeded(now)
        elif breaker is not None:
            breaker.succeeded(now)
        self._look(now)

    def failed(self, credential: Credential, fault: Fault, now: float, permit: Permit | None = None) -> None:
        """The attempt brought no answer to be proud of."""
        breaker = self._breakers.get(credential.tag)
        if breaker is None:
            breaker = self._breakers[credential.tag] = self._breaker(credential)
        if fault.kind == "broken":
            if permit is not None:
                permit.failed(now)
            else:
                breaker.failed(now)
            if fault.wait is not None:
                breaker.rest(now + fault.wait, now)
        elif permit is not None:
            permit.left(now)
        if fault.kind == "limited":
            times = self._limited[credential.tag] = self._limited.get(credential.tag, 0) + 1
            breaker.rest(now + (rest(times) if fault.wait is None else fault.wait), now)
        elif fault.kind == "key":
            self.pool.park(credential)
        self._look(now)

    def left(self, permit: Permit | None, now: float) -> None:
        """Nobody learns how the attempt would have ended."""
        if permit is not None:
            permit.left(now)
            self._look(now)

    def _look(self, now: float) -> None:
        """Sets what is asked at every request, from what changes at few."""
        breakers = self._breakers.values()
        self.closed = all(one.state == "closed" and not one.resting(now) for one in breakers)
        self.troubled = not all(one.calm for one in breakers) or bool(self._limited)
        self._registry.note(self)

    # For those who look on.

    def shown(self) -> Mapping[str, Breaker]:
        """The breakers by the key's place in the pool, as far as there are any."""
        several = len(self.pool) > 1
        return {
            f"{self.label}#{credential.place}" if several else self.label: self._breakers[credential.tag]
            for credential in self.pool.all()
            if credential.tag in self._breakers
        }

    def take_pool(self, pool: CredentialPool) -> None:
        """The configuration was read again: keys that are gone take their breakers with them."""
        self.pool = pool
        tags = {credential.tag for credential in pool.all()}
        for tag in self._breakers.keys() - tags:
            del self._breakers[tag]
            self._limited.pop(tag, None)

    def obey(self, rule: Rule) -> None:
        self.rule = rule
        for breaker in self._breakers.values():
            breaker.rule = rule


@dataclass(frozen=True, slots=True)
class Shown:
    """A breaker as it is shown; `retry_in` in seconds, None unless it is open."""

    state: State
    failures: int
    opens: int
    retry_in: float | None
    rests_for: float | None


class Told(TypedDict):
    """A breaker as figures tell it. `retry_at` in RFC 3339, None unless it is open."""

    state: State
    failures: int
    opens: int
    retry_at: str | None


class Registry:
    """All targets of the process. `turned` hears of breakers that enter another state."""

    def __init__(self, turned: Turned, clock: Callable[[], float] = time.monotonic) -> None:
        self.turned = turned
        self.clock = clock
        self.rule = Rule()
        self.latencies = Latencies()
        self.orders = Orders(self.latencies)
        self._targets: WeakValueDictionary[tuple[str, str], Health] = WeakValueDictionary()
        self._troubled: OrderedDict[tuple[str, str], Health] = OrderedDict()
        self._pools: dict[str, CredentialPool] = {}
        self._budgets: dict[str, Budget] = {}

    def target(self, provider: str, model: str, pool: CredentialPool, rule: Rule, *, named: bool) -> Health:
        """What is known of a provider's model, for a route that leads there. `named`: figures may name it."""
        self._take_pool(provider, pool)
        health = self._targets.get((provider, model))
        if health is None:
            label = f"{provider}/{model if named else 'other'}"
            health = self._targets[provider, model] = Health(self, provider, model, label, pool)
        if health.pool is not pool:
            health.take_pool(pool)
        if health.rule is not rule:
            health.obey(rule)
        return health

    def _take_pool(self, provider: str, pool: CredentialPool) -> None:
        before = self._pools.get(provider)
        if before is not pool:
            if before is not None:
                pool.adopt(before)
            self._pools[provider] = pool

    def budget(self, provider: str) -> Budget:
        """What one provider may be sent again."""
        budget = self._budgets.get(provider)
        if budget is None:
            budget = self._budgets[provider] = Budget()
        return budget

    def note(self, health: Health) -> None:
        """Keeps what is not well, though no route may lead there any more."""
        key = (health.provider, health.model)
        if health.closed and not health.troubled:
            self._troubled.pop(key, None)
            return
        self._troubled[key] = health
        self._troubled.move_to_end(key)
        if len(self._troubled) > MOST_TROUBLED:
            self._troubled.popitem(last=False)

    def find(self, provider: str, model: str) -> Health | None:
        return self._targets.get((provider, model))

    def shown(self) -> dict[str, Shown]:
        """Every breaker by its label, those that are well too; of equal labels the one that is worst."""
        now = self.clock()
        told: dict[str, Shown] = {}
        for health in tuple(self._targets.values()):
            for label, breaker in health.shown().items():
                if label not in told or _RANK[breaker.state] > _RANK[told[label].state]:
                    told[label] = _show(breaker, now)
        return told

    def shown_of(self, health: Health) -> dict[str, Shown]:
        """The breakers of one target, by their labels."""
        now = self.clock()
        return {label: _show(breaker, now) for label, breaker in health.shown().items()}

    def statsz(self, wall: Callable[[float], str]) -> dict[str, Told]:
        """For `/statsz`; `wall` writes the moment that lies so many seconds ahead."""
        return {
            label: Told(
                state=one.state,
                failures=one.failures,
                opens=one.opens,
                retry_at=None if one.retry_in is None else wall(one.retry_in),
            )
            for label, one in self.shown().items()
        }


_RANK: Mapping[State, int] = {"closed": 0, "half-open": 1, "open": 2}


def _show(breaker: Breaker, now: float) -> Shown:
    retry = max(0.0, breaker.retry_at - now) if breaker.state == "open" else None
    rests = breaker.rests_until - now if breaker.resting(now) else None
    return Shown(breaker.state, breaker.failures, breaker.opens, retry, rests)
