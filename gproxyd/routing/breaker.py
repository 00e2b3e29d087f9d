"""A circuit breaker: one upstream model behind one key, and whether it is worth another attempt.

    closed     everything passes; so many failures in a row, or too large a share of them, open it
    open       nothing passes for `open_for`
    half-open  one attempt passes, the probe; its outcome closes or opens

Invariants: in half-open one probe is under way at most; a probe whose outcome nobody will learn gives its place back;
outcomes of what began before the breaker opened change nothing any more. While nothing fails, success costs nothing.
All times are monotonic seconds, and come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "half-open", "open"]

LEAST = 20
"""Outcomes of a window before the share of failures says anything."""

LONGEST_REST = 3600.0
"""Seconds beyond which no vendor is believed that it wants to be left alone."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a breaker opens: after `failures` in a row, or a share of `rate` failed in a `window` of seconds (a rate of
    0 is never reached). It stays open for `open_for` seconds."""

    failures: int = 5
    open_for: float = 30.0
    rate: float = 0.5
    window: float = 30.0


class Breaker:
    """One breaker. `turned` hears of every state that it enters.

    failures  in a row, up to now
    opens     how often it has opened
    retry_at  when it may be tried again, while it is open
    rests_until  until when the vendor wants to be left alone (a rate limit); 0 if it does not
    """

    __slots__ = ("_failed", "_probing", "_since", "_total", "_turned", "failures", "opens", "rests_until", "retry_at",
                 "rule", "state")  # fmt: skip

    def __init__(self, rule: Rule, turned: Callable[[State], None]) -> None:
        self.rule = rule
        self.state: State = "closed"
        self.failures = 0
        self.opens = 0
        self.retry_at = 0.0
        self.rests_until = 0.0
        self._turned = turned
        self._probing: Permit | None = None
        self._since = 0.0  # the window's beginning: the first failure of it
        self._total = self._failed = 0

    @property
    def calm(self) -> bool:
        """Closed, and nothing is being counted."""
        return self.state == "closed" and not self._total and not self.rests_until

    def admits(self, now: float) -> bool:
        """Whether `enter` would admit an attempt."""
        if self.state == "closed":
            return True
        if self.state == "open":
            return now >= self.retry_at
        return self._probing is None

    def resting(self, now: float) -> bool:
        """Whether the vendor wants to be left alone."""
        if self.rests_until and now >= self.rests_until:
            self.rests_until = 0.0
        return self.rests_until > 0.0

    def enter(self, now: float) -> Permit | None:
        """Begins an attempt, whose permit must be told its outcome; None if none may be made now."""
        if not self.admits(now):
            return None
        if self.state == "closed":
            return Permit(self, probe=False)
        if self.state == "open":
            self._turn("half-open")
        self._probing = permit = Permit(self, probe=True)
        return permit

    def rest(self, until: float, now: float) -> None:
        """The vendor wants to be left alone until then; what it said before may have been longer."""
        self.rests_until = max(self.rests_until, min(until, now + LONGEST_REST))

    # Outcomes of attempts that are no probes.

    def succeeded(self, now: float) -> None:
        if self.state == "closed" and self._total:
            self.failures = 0
            self._count(now, failed=False)

    def failed(self, now: float) -> None:
        if self.state != "closed":
            return
        self.failures += 1
        self._count(now, failed=True)
        rate = self.rule.rate
        share = bool(rate) and self._total >= LEAST and self._failed >= rate * self._total
        if self.failures >= self.rule.failures or share:
            self._open(now)

    def _count(self, now: float, *, failed: bool) -> None:
        if now - self._since > self.rule.window or not self._total:
            self._since, self._total, self._failed = now, 0, 0
            if not failed and not self.failures:
                return  # nothing has failed for a window: nothing is counted any more
        self._total += 1
        self._failed += failed

    def _open(self, now: float) -> None:
        self.opens += 1
        self.retry_at = now + self.rule.open_for
        self._total = self._failed = 0
        self._turn("open")

    def _close(self) -> None:
        self.failures = self._total = self._failed = 0
        self.rests_until = 0.0
        self._turn("closed")

    def _turn(self, state: State) -> None:
        self.state = state
        self._turned(state)

    # The probe's outcome.

    def _probe_over(self, permit: Permit, now: float, succeeded: bool | None) -> None:
        if self._probing is not permit:
            return
        self._probing = None
        if succeeded:
            self._close()
        elif succeeded is not None:
            self.failures += 1
            self._open(now)


class Permit:
    """One attempt. The first of `succeeded`, `failed` and `left` counts, later ones do nothing."""

    __slots__ = ("_breaker", "_open", "probe")

    def __init__(self, breaker: Breaker, *, probe: bool) -> None:
        self._breaker = breaker
        self._open = True
        self.probe = probe

    def succeeded(self, now: float) -> None:
        """The upstream answered as one that is well."""
        if self._ends():
            if self.probe:
                self._breaker._probe_over(self, now, True)
            else:
                self._breaker.succeeded(now)

    def failed(self, now: float) -> None:
        """The upstream is not well."""
        if self._ends():
            if self.probe:
                self._breaker._probe_over(self, now, False)
            else:
                self._breaker.failed(now)

    def left(self, now: float) -> None:
        """Nobody will learn how the attempt would have ended, or it says nothing of the upstream's health."""
        if self._ends() and self.probe:
            self._breaker._probe_over(self, now, None)

    def _ends(self) -> bool:
        was, self._open = self._open, False
        return was
