"""Windows as bytes, so that what was counted survives a restart.

Invariants: what is no dump in whatever part restores nothing; nothing restored lies in the future; no clock that was
set back or forward while nobody looked makes anything count shorter than it must.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import orjson

Entries = tuple[list[float], list[int]]
"""Times, rising, and how much happened at each."""

_VERSION = 1
_MOST_ENTRIES = 4096
_MOST_COUNT = 2**62


def dump(windows: Mapping[str, Mapping[str, Entries]], now: float, wall: float) -> bytes:
    """Name -> kind -> entries on the clock `now`, as JSON; `wall` in seconds since the epoch."""
    return orjson.dumps({"version": _VERSION, "now": now, "wall": wall, "windows": windows})


def load(data: bytes, now: float, wall: float, kinds: Mapping[str, float]) -> dict[str, dict[str, Entries]] | None:
    """What was dumped, on this process's clock `now`; None if it is no dump. `kinds`: kind -> length of its window."""
    try:
        value = orjson.loads(data)
        if value["version"] != _VERSION:
            return None
        then = _number(value["now"])
        shift = now - _elapsed(then, _number(value["wall"]), now, wall) - then
        return {
            _name(name): {kind: _entries(held[kind], then, shift) for kind in kinds}
            for name, held in value["windows"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _elapsed(then: float, wall_then: float, now: float, wall: float) -> float:
    """Seconds between dump and restore: the wall clock's, but never less than none.

    A monotonic clock that has gone on since then is most likely the same one (no reboot lies between), and it cannot
    be set: where it tells of less time, it is believed.
    """
    elapsed = max(0.0, wall - wall_then)
    return min(elapsed, now - then) if now >= then else elapsed


def _entries(value: Any, then: float, shift: float) -> Entries:
    times, counts = value
    if not isinstance(times, list) or not isinstance(counts, list) or len(times) != len(counts):
        raise ValueError("not two lists of one length")
    if len(times) > _MOST_ENTRIES or any(type(n) is not int or not 0 <= n <= _MOST_COUNT for n in counts):
        raise ValueError("not counts")
    numbers = [_number(moment) for moment in times]
    if any(one > other for one, other in pairwise([*numbers, then])):
        raise ValueError("not in order")
    return [moment + shift for moment in numbers], counts


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e12:
        raise ValueError("not a time")
    return float(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or " " not in value:
        raise ValueError("not a window's name")
    return value
