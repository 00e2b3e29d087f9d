"""Rate limits: rules, the windows they are held against, and what a running request holds of them.

Invariants: a request is admitted by all rules that match its model or by none, and a refused one has taken nothing;
whatever a request holds (its place, its token estimate) is returned exactly once, and counts in whichever process it
runs; windows belong to an owner and a model glob, not to a rule, so changed rules apply at once to what was counted
before; windows in which nothing counts and nothing runs are forgotten.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from gproxyd.errors import Refusal
from gproxyd.policy import saved
from gproxyd.policy.permissions import Globs, globs
from gproxyd.policy.standing import Room, Standing, header_fields, header_lines
from gproxyd.policy.windows import FINE, Window
from gproxyd.types import DialectName

Kind = Literal["rpm", "rpd", "tpm", "concurrency"]

MINUTE, DAY = 60.0, 86_400.0

MOST_TOKENS = 10**12
"""No request is believed to have used more."""


@dataclass(frozen=True)
class Rule:
    """What one owner may do with the models that a glob matches. 0 = any number.

    owner        "user:alice", "key:alice/laptop" or "provider:openai-main"
    rpm, rpd     requests in any minute, any day
    tpm          tokens in any minute
    concurrency  requests at once
    """

    owner: str
    model: str = "*"
    rpm: int = 0
    rpd: int = 0
    tpm: int = 0
    concurrency: int = 0
    id: str = field(init=False, compare=False, repr=False)
    glob: Globs | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.owner} {self.model}")
        object.__setattr__(self, "glob", None if self.model == "*" else globs((self.model,)))

    def limit(self, kind: Kind) -> int:
        allowed: int = getattr(self, kind)
        return allowed

    def name(self, kind: Kind) -> str:
        """How a message calls the rule: "alice: rpm 60 for *"."""
        return f"{self.owner.partition(':')[2]}: {kind} {self.limit(kind)} for {self.model}"


class RateLimited(Refusal):
    """429, with the rule that is hard to meet the longest. `wait` in whole seconds."""

    def __init__(self, rule: Rule, kind: Kind, wait: int, standing: dict[str, str]) -> None:
        text = f"the limit '{rule.name(kind)}' is reached; try again in {wait} s"
        super().__init__("rate_limited", text, headers={"Retry-After": str(wait), **standing})
        self.rule = rule
        self.kind = kind
        self.wait = wait


class _Meter:
    """What counts against the rules of one owner and model glob; `rule` is the one that was met last."""

    __slots__ = ("day", "held", "minute", "rule", "running", "tokens")

    def __init__(self) -> None:
        self.rule: Rule | None = None
        self.minute = Window(MINUTE)
        self.day = Window(DAY)
        self.tokens = Window(MINUTE)
        self.running = 0
        self.held = 0  # tokens that running requests are expected to use

    def windows(self) -> dict[str, Window]:
        return {"rpm": self.minute, "rpd": self.day, "tpm": self.tokens}

    def admits(self, rule: Rule, now: float) -> bool:
        # Written out three times: it runs for every rule of every request, and a call for each would double its time.
        if rule.rpm:
            minute = self.minute
            if now >= minute.due:
                minute.expire(now)
            if minute.total >= rule.rpm:
                return False
        if rule.rpd:
            day = self.day
            if now >= day.due:
                day.expire(now)
            if day.total >= rule.rpd:
                return False
        if rule.tpm:
            tokens = self.tokens
            if now >= tokens.due:
                tokens.expire(now)
            if tokens.total + self.held >= rule.tpm:
                return False
        return not rule.concurrency or self.running < rule.concurrency

    def expire(self, now: float) -> None:
        for window in (self.minute, self.day, self.tokens):
            window.expire(now)

    def take(self, rule: Rule, tokens: int, now: float) -> None:
        self.running += 1
        self.held += tokens
        if rule.rpm:
            self.minute.add(now, 1, rule.rpm <= FINE)
        if rule.rpd:
            self.day.add(now, 1, rule.rpd <= FINE)

    def give_back(self, rule: Rule, at: float) -> None:
        if rule.rpm:
            self.minute.give_back(at)
        if rule.rpd:
            self.day.give_back(at)

    def in_the_way(self, rule: Rule, now: float) -> Iterator[tuple[float, Kind]]:
        """What keeps a request out by this rule, and until when: `now` if that is when a running one ends."""
        self.expire(now)
        if rule.rpm and self.minute.total >= rule.rpm:
            yield self.minute.ready(rule.rpm - 1), "rpm"
        if rule.rpd and self.day.total >= rule.rpd:
            yield self.day.ready(rule.rpd - 1), "rpd"
        if rule.tpm and self.tokens.total + self.held >= rule.tpm:
            ready = self.tokens.ready(rule.tpm - self.held - 1)
            yield (ready if ready != math.inf else now), "tpm"
        if rule.concurrency and self.running >= rule.concurrency:
            yield now, "concurrency"

    def idle(self, now: float) -> bool:
        self.expire(now)
        return not self.running and self.minute.due == self.day.due == self.tokens.due == math.inf

    def used(self, kind: Kind) -> int:
        if kind == "concurrency":
            return self.running
        return self.windows()[kind].total + (self.held if kind == "tpm" else 0)

    def room(self, rule: Rule, kind: Kind, now: float) -> Room:
        limit = rule.limit(kind)
        window = self.windows()[kind]
        return Room(limit, max(0, limit - self.used(kind)), window.reset(now))


_Taken = list[tuple[_Meter, Rule]]

Held = tuple[int, int]
"""What running requests hold of one owner and model glob: places, and tokens."""

NOTHING: Held = (0, 0)


class Hold:
    """What one admitted request holds. The first of settle, release and cancel counts; later ones do nothing."""

    __slots__ = ("_at", "_now", "_taken", "_tokens")

    def __init__(self, now: Callable[[], float], at: float, taken: _Taken | None, tokens: int) -> None:
        self._now = now
        self._at = at
        self._taken = taken
        self._tokens = tokens

    @property
    def open(self) -> bool:
        """Whether anything is still held."""
        return self._taken is not None

    def settle(self, tokens: int) -> None:
        """The request is over and used `tokens`; what is beyond belief is cut to 0 or MOST_TOKENS."""
        for meter, rule in self._end():
            if rule.tpm and tokens > 0:
                meter.tokens.add(self._now(), min(tokens, MOST_TOKENS), False)

    def release(self) -> None:
        """The request is over and used no tokens; it still counts as a request."""
        self._end()

    def cancel(self) -> None:
        """The request never was one: nothing of it counts."""
        for meter, rule in self._end():
            meter.give_back(rule, self._at)

    def _end(self) -> Sequence[tuple[_Meter, Rule]]:
        taken = self._taken
        if taken is None:
            return ()
        self._taken = None
        for meter, _ in taken:
            meter.running -= 1
            meter.held -= self._tokens
        return taken


FREE = Hold(time.monotonic, 0.0, None, 0)
"""What a request holds to which no rule applies: nothing."""


class Limiter:
    """All windows of one process. `now` is a monotonic clock, `wall` tells seconds since the epoch.

    Windows run on `now`, so steps of the wall clock change nothing but the dates in Anthropic's headers.
    """

    _FEW = 1024

    def __init__(self, now: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._now = now
        self._wall = wall
        self._meters: dict[str, _Meter] = {}
        self._elsewhere: dict[str, Held] = {}
        self._many = self._FEW  # as soon as there are so many meters, the idle ones are forgotten

    def admit(self, rules: Sequence[Rule], model: str, tokens: int = 0, dialect: DialectName = "openai_chat") -> Hold:
        """Admits a request that is expected to use `tokens`, or raises RateLimited (429) and takes nothing.

        Tokens: a request is admitted while those used in the last minute and those held by running requests are
        below the limit, so a request larger than the limit can pass, and nobody's second one behind it.
        """
        if not rules:
            return FREE
        now = self._now()
        if len(self._meters) >= self._many:
            self.forget_idle()
        taken: _Taken = []
        for rule in rules:
            if rule.glob is not None and not rule.glob.match(model):
                continue
            meter = self._meters.get(rule.id) or self._new(rule.id)
            if not meter.admits(rule, now):
                raise self._refusal(rules, model, dialect, now)
            meter.rule = rule
            if taken:
                _put(taken, meter, rule)
            else:
                taken.append((meter, rule))
        if not taken:
            return FREE
        tokens = min(max(tokens, 0), MOST_TOKENS)
        for meter, rule in taken:
            meter.take(rule, tokens, now)
        return Hold(self._now, now, taken, tokens)

    def _new(self, name: str) -> _Meter:
        meter = self._meters[name] = _Meter()
        return meter

    def _refusal(self, rules: Sequence[Rule], model: str, dialect: DialectName, now: float) -> RateLimited:
        """Of all that is in the way, what takes longest; whoever waits that long meets none of the others."""
        (ready, kind), rule = max(
            (
                (obstacle, rule)
                for rule, meter in self._matching(rules, model)
                if meter is not None
                for obstacle in meter.in_the_way(rule, now)
            ),
            key=lambda found: found[0][0],
        )
        # Both the difference and the sum are rounded: a second more only where the sum would come too early.
        seconds = max(1, math.ceil(ready - now - 1e-9))
        seconds += now + seconds < ready
        standing = header_fields(self.standing(rules, model), dialect, self._wall())
        return RateLimited(rule, kind, seconds, standing)

    def _matching(self, rules: Sequence[Rule], model: str) -> Iterator[tuple[Rule, _Meter | None]]:
        for rule in rules:
            if rule.glob is None or rule.glob.match(model):
                yield rule, self._meters.get(rule.id)

    def standing(self, rules: Sequence[Rule], model: str) -> Standing:
        """How much of the tightest limits on requests and on tokens is left."""
        now = self._now()
        rooms: dict[Kind, list[Room]] = {"rpm": [], "rpd": [], "tpm": []}
        for rule, meter in self._matching(rules, model):
            shown = meter or _Meter()
            shown.expire(now)
            for kind, found in rooms.items():
                if rule.limit(kind):
                    found.append(shown.room(rule, kind, now))
        return Standing.tightest(rooms["rpm"] + rooms["rpd"], rooms["tpm"])

    def header_lines(self, rules: Sequence[Rule], model: str, dialect: DialectName) -> list[bytes]:
        """The same as response header lines, in the spelling of the dialect's vendor; none where nothing limits."""
        return header_lines(self.standing(rules, model), dialect, self._wall()) if rules else []

    def forget_idle(self) -> None:
        """Forgets the windows in which nothing counts and nothing runs."""
        now = self._now()
        self._meters = {name: meter for name, meter in self._meters.items() if not meter.idle(now)}
        self._many = max(self._FEW, 2 * len(self._meters))

    def running(self) -> int:
        """Places and tokens that are held now, over all rules: 0 when nothing runs."""
        return sum(meter.running + meter.held for meter in self._meters.values())

    def held(self, name: str) -> Held:
        """What is held of "OWNER GLOB", here and elsewhere."""
        meter = self._meters.get(name)
        return NOTHING if meter is None else (meter.running, meter.held)

    def all_held(self) -> dict[str, Held]:
        """The same of all of which anything is held."""
        return {name: (meter.running, meter.held) for name, meter in self._meters.items() if meter.running}

    def hold_elsewhere(self, held: Mapping[str, Held]) -> None:
        """Another process's requests hold this of what is named, whatever was said of it before."""
        for name, (running, tokens) in held.items():
            before = self._elsewhere.pop(name, NOTHING)
            meter = self._meters.get(name) or self._new(name)
            meter.running += running - before[0]
            meter.held += tokens - before[1]
            if running:
                self._elsewhere[name] = (running, tokens)

    def free_elsewhere(self) -> None:
        """The other process is gone, and with it all that its requests held."""
        self.hold_elsewhere(dict.fromkeys(self._elsewhere, NOTHING))

    def snapshot(self) -> dict[str, Any]:
        """For `/statsz`: what is left by provider and model glob; of users and keys only sums, and no name."""
        now = self._now()
        told: dict[str, Any] = {"providers": {}, "user": {}, "key": {}}
        for meter in self._meters.values():
            rule = meter.rule
            if rule is None:
                continue
            meter.expire(now)
            sort, _, owner = rule.owner.partition(":")
            for kind in ("rpm", "rpd", "tpm", "concurrency"):
                limit, used = rule.limit(kind), meter.used(kind)
                if limit and sort == "provider":
                    place = told["providers"].setdefault(owner, {}).setdefault(rule.model, {})
                    place[kind] = {"limit": limit, "remaining": max(0, limit - used)}
                elif limit:
                    sums = told.setdefault(sort, {}).setdefault(kind, {"active": 0, "exhausted": 0})
                    sums["active"] += used > 0
                    sums["exhausted"] += used >= limit
        return told

    # Across a restart.

    def dump(self) -> bytes:
        """All that counts now, for `restore`. What running requests hold is not in it: they die with the process."""
        self.forget_idle()
        windows = {name: {kind: w.saved() for kind, w in m.windows().items()} for name, m in self._meters.items()}
        return saved.dump(windows, self._now(), self._wall())

    def restore(self, data: bytes) -> bool:
        """Takes over what another process dumped; to be called before anything is admitted.

        Returns whether it did: what is no dump, in whatever part, restores nothing.
        """
        now = self._now()
        found = saved.load(data, now, self._wall(), {"rpm": MINUTE, "rpd": DAY, "tpm": MINUTE})
        for name, kinds in (found or {}).items():
            if name not in self._meters:
                meter = self._new(name)
                for kind, window in meter.windows().items():
                    window.restore(*kinds[kind], now)
        return found is not None


def _put(taken: _Taken, meter: _Meter, rule: Rule) -> None:
    """A second rule for the same windows counts nothing twice."""
    for index, (known, other) in enumerate(taken):
        if known is meter:
            taken[index] = (meter, _both(other, rule))
            return
    taken.append((meter, rule))


@lru_cache(maxsize=1024)
def _both(one: Rule, other: Rule) -> Rule:
    """Of each kind the smaller limit, where there is one."""
    return replace(
        one,
        rpm=min(filter(None, (one.rpm, other.rpm)), default=0),
        rpd=min(filter(None, (one.rpd, other.rpd)), default=0),
        tpm=min(filter(None, (one.tpm, other.tpm)), default=0),
        concurrency=min(filter(None, (one.concurrency, other.concurrency)), default=0),
    )
