"""What a failed attempt means, when another is worth it, and how many of them there may be.

Sources: RFC 9110 section 10.2.3 (Retry-After: seconds or a date); `retry-after-ms` is what OpenAI's and Azure's
services send beside it; Google's APIs say it in the body (google.rpc.RetryInfo, `retryDelay`: "3.5s").
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

import orjson

from gproxyd.wire.headers import Headers

Kind = Literal["limited", "key", "broken", "final"]

ANSWERS_AGAIN = frozenset({408, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 527, 530})
"""Statuses of an upstream that is not well (beyond 504: what its front ends say of it)."""

LIMITED = frozenset({429, 529})
"""Statuses of a vendor that wants fewer requests."""

ELSEWHERE = frozenset({"closed", "reset", "protocol", "timeout_first_byte", "timeout_idle", "bug"})
"""Failures after which the upstream may be at work all the same: it is not asked a second time, another one is."""

ONCE_MORE = frozenset({"connect", "dns", "tls", "timeout_connect", "html", "empty", "error_event", "status"})
"""Failures after which the same upstream may be asked again."""

LONGEST_WAIT = 86_400.0

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds that a pause before the same provider is at most: the first time, and ever."""

FIRST_REST, LONGEST_REST = 1.0, 30.0
"""Seconds for which a target is left alone that is limited and does not say for how long."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What became of an attempt that brought no answer to be proud of.

    kind    limited: the key has had its share; key: the vendor refuses it; broken: the upstream is not well;
            final: it is the request's own fault, or the client's, and no upstream would answer otherwise
    reason  a word for the log and the figures
    wait    seconds after which the vendor wants to be asked again, None if it does not say
    again   whether the same upstream may be asked again, too
    """

    kind: Kind
    reason: str
    wait: float | None = None
    again: bool = True

    @property
    def retryable(self) -> bool:
        return self.kind != "final"


FINAL = Fault("final", "final")


def fault_of_status(status: int, wait: float | None, *, limited: bool = False) -> Fault | None:
    """What a status means; None if it is an answer like others. `limited`: the vendor's own way to say 429."""
    if limited or status in LIMITED:
        return Fault("limited", f"status_{status}", wait)
    if status >= 500 or status == 408:
        return Fault("broken", "status", wait, again=status in ANSWERS_AGAIN)
    return None


def fault_of_reason(reason: str) -> Fault:
    """What the reason of an UpstreamError means."""
    if reason == "auth":
        return Fault("key", reason)
    if reason in ONCE_MORE:
        return Fault("broken", reason)
    if reason in ELSEWHERE:
        return Fault("broken", reason, again=False)
    return Fault("final", reason)


_SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_DELAY = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)s")


def wait_of(headers: Headers, body: bytes, wall: float) -> float | None:
    """Seconds after which the vendor wants to be asked again. `wall` is the time in seconds since the epoch.

    A date that has gone by is no time at all; what is absurd, or not understood, is passed by.
    """
    milliseconds = headers.get(b"retry-after-ms", b"").strip()
    if _SECONDS.fullmatch(milliseconds):
        return min(float(milliseconds) / 1000, LONGEST_WAIT)
    text = headers.get(b"retry-after", b"").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), LONGEST_WAIT)
    if text:
        return _until(text, wall)
    return _delay_of(body)


def _until(text: bytes, wall: float) -> float | None:
    try:
        moment = parsedate_to_datetime(text.decode("ascii")).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
    return min(max(0.0, moment - wall), LONGEST_WAIT)


def _delay_of(body: bytes) -> float | None:
    """Google's `retryDelay` among the error's details."""
    if b"retryDelay" not in body:
        return None
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    part = value[0] if isinstance(value, list) and value else value
    error = part.get("error") if isinstance(part, Mapping) else None
    details = error.get("details") if isinstance(error, Mapping) else None
    for detail in details if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, Mapping) else None
        found = _DELAY.fullmatch(delay) if isinstance(delay, str) else None
        if found is not None:
            return min(float(found[1]), LONGEST_WAIT)
    return None


def pause(times: int, dice: random.Random) -> float:
    """Seconds before the same provider is asked again, the `times`-th time (from 1): exponential, with full jitter."""
    return dice.uniform(0.0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(times - 1, 16)))


def rest(times: int) -> float:
    """Seconds for which a target is left alone that was limited `times` times in a row and did not say how long."""
    return min(LONGEST_REST, FIRST_REST * float(2 ** min(times - 1, 16)))


class Budget:
    """How many further attempts one provider may be sent: a share of its requests, and no more, however they fail.

    Each request earns its share; what is saved up is bounded, so that a quiet day does not pay for a storm.
    """

    SAVED = 20.0

    __slots__ = ("_saved",)

    def __init__(self) -> None:
        self._saved = 0.0

    def earn(self, share: float) -> None:
        """A request was sent for the first time."""
        self._saved = min(self.SAVED, self._saved + share)

    def spend(self) -> bool:
        """Whether a request may be sent again; if so, that is paid for."""
        if self._saved < 1.0 - 1e-9:
            return False
        self._saved -= 1.0
        return True
