"""How a caller stands towards its rate limits, in the headers that each vendor's clients read.

    OpenAI     x-ratelimit-limit-requests: 60        x-ratelimit-remaining-requests: 59
               x-ratelimit-reset-requests: 6m0s      and the same with `-tokens`
    Anthropic  anthropic-ratelimit-requests-limit: 60
               anthropic-ratelimit-requests-remaining: 59
               anthropic-ratelimit-requests-reset: 2027-01-01T00:00:00Z     and the same with `-tokens-`

`reset` is when the limit is back at its initial state: for OpenAI a span of time as Go writes it, for Anthropic a
time (RFC 3339). Gemini's API has no such headers; its callers get OpenAI's.

Sources: OpenAI's guide "Rate limits" (rate limits in headers), Anthropic's page "Rate limits" (response headers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from gproxyd.types import DialectName


class Room(NamedTuple):
    """What is left of one limit. `reset`: seconds until all of it is there again."""

    limit: int
    remaining: int
    reset: float


class Standing(NamedTuple):
    """The tightest limits on requests and on tokens; None where there is none."""

    requests: Room | None
    tokens: Room | None

    @classmethod
    def tightest(cls, requests: Sequence[Room], tokens: Sequence[Room]) -> Standing:
        """Of each, the limit of which least is left; of equals the one that takes longer to come back."""
        return cls(_tightest(requests), _tightest(tokens))


def _tightest(rooms: Sequence[Room]) -> Room | None:
    return min(rooms, key=lambda room: (room.remaining, -room.reset), default=None)


def header_fields(standing: Standing, dialect: DialectName, wall: float) -> dict[str, str]:
    """Header name -> value. `wall` is the time, in seconds since the epoch."""
    fields: dict[str, str] = {}
    for sort, room in zip(("requests", "tokens"), standing, strict=True):
        if room is None:
            continue
        if dialect == "anthropic":
            prefix = f"anthropic-ratelimit-{sort}"
            fields[f"{prefix}-limit"] = str(room.limit)
            fields[f"{prefix}-remaining"] = str(room.remaining)
            fields[f"{prefix}-reset"] = _moment(wall + room.reset)
        else:
            fields[f"x-ratelimit-limit-{sort}"] = str(room.limit)
            fields[f"x-ratelimit-remaining-{sort}"] = str(room.remaining)
            fields[f"x-ratelimit-reset-{sort}"] = _span(room.reset)
    return fields


def header_lines(standing: Standing, dialect: DialectName, wall: float) -> list[bytes]:
    """The same as header lines, with their line ends."""
    return [f"{name}: {value}\r\n".encode("ascii") for name, value in header_fields(standing, dialect, wall).items()]


def _span(seconds: float) -> str:
    """As Go writes a duration, rounded up: "0s", "120ms", "59s", "6m0s", "23h59m1s"."""
    if 0 < seconds < 1 and (milliseconds := math.ceil(seconds * 1000)) < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _moment(wall: float) -> str:
    return datetime.fromtimestamp(math.ceil(wall), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
