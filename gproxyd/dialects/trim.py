"""A conversation made to fit: the oldest of it is left out.

Invariants
- What stays is unchanged, in its order; the request is never changed in place.
- A tool's result stays exactly if its call does. What an assistant said in one go (reasoning, calls) and the results
  that follow stay or go together, so reasoning is never without what it led to.
- The system's items, what the user said last and the newest round stay. A conversation that began with the user, or
  whose speakers took turns, still does.
- No less would do: with the last that was left out it would not fit.

Whole turns go first, oldest first: what the user said, and all up to what they said next. Then, of the last turn,
rounds go: what the assistant said in one go, with the results. An agent that works for hours on one question has no
others.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gproxyd.dialects.turns import SHAPES, Fields, Role, has_words, items, links, role
from gproxyd.dialects.weight import weights
from gproxyd.types import DialectName
from gproxyd.wire.spans import at_once

_PAUSE = 512  # items that are looked at at once


def trim(dialect: DialectName, fields: Fields, budget_tokens: int) -> Fields | None:
    """The request with so little left out that its prompt has `budget_tokens` at most, as `weights` counts.

    The same object if it has already; None if it has more even with all left out that may be.
    """
    fixed, each = weights(dialect, fields)
    excess = fixed + sum(each) - budget_tokens
    if excess <= 0:
        return fields
    conversation = items(dialect, fields)
    dropped = at_once(left_out(dialect, conversation, each, excess))
    if dropped is None:
        return None
    rest = [item for n, item in enumerate(conversation) if n not in dropped]
    return {**fields, SHAPES[dialect].items: rest}


def left_out(
    dialect: DialectName, conversation: Sequence[Any], each: Sequence[int], excess: int
) -> Generator[None, None, set[int] | None]:
    """Which items are left out to save `excess` tokens, `each` being those of every item; None if that is not enough.
    In steps."""
    dropped: set[int] = set()
    for block in (yield from _droppable(dialect, conversation)):
        yield from _now_and_then(len(dropped), len(block))
        dropped.update(block)
        excess -= sum(each[n] for n in block)
        if excess <= 0:
            return dropped
    return None


def _now_and_then(before: int, more: int = 1) -> Iterator[None]:
    """A pause, where so many more pass a milestone."""
    if before // _PAUSE != (before + more) // _PAUSE:
        yield None


@dataclass(frozen=True, slots=True)
class _Reading:
    """Who speaks in each item, and `tied[n]`: a call before item n has a result in it or behind it."""

    dialect: DialectName
    items: Sequence[Any]
    roles: Sequence[Role]
    tied: Sequence[bool]


def _droppable(dialect: DialectName, conversation: Sequence[Any]) -> Generator[None, None, list[list[int]]]:
    """What can be left out, as positions of items, in the order in which it goes."""
    roles: list[Role] = []
    for item in conversation:
        roles.append(role(dialect, item))
        yield from _now_and_then(len(roles))
    reading = _Reading(dialect, conversation, roles, (yield from _tied(dialect, conversation, roles)))
    *older, last = yield from _turns(reading)
    return [turn for turn in older if turn] + (yield from _rounds(reading, last))


def _tied(
    dialect: DialectName, conversation: Sequence[Any], roles: Sequence[Role]
) -> Generator[None, None, list[bool]]:
    spans: list[list[int]] = []
    latest: dict[str, list[int]] = {}  # some clients give the same id to one call after the other
    for n, item in enumerate(conversation):
        yield from _now_and_then(n)
        for link in links(dialect, item):
            if not isinstance(link, str) or not link:
                continue
            if roles[n] == "assistant" or link not in latest:
                latest[link] = [n, n]
                spans.append(latest[link])
            latest[link][1] = n
    steps = [0] * (len(conversation) + 1)
    for first, last in spans:
        steps[first + 1] += 1
        steps[last + 1] -= 1
    return [depth > 0 for depth in accumulate(steps[:-1])]


def _turns(reading: _Reading) -> Generator[None, None, list[list[int]]]:
    """The conversation without the system, cut before each thing the user said, unless a call and its result are on
    either side. Several such things in a row are one.
    """
    turns: list[list[int]] = [[]]
    before: Role = "user"
    for n, who in enumerate(reading.roles):
        yield from _now_and_then(n)
        if who == "system":
            continue
        if who == "user" and before != "user" and not reading.tied[n]:
            turns.append([])
        turns[-1].append(n)
        before = who
    return turns


def _rounds(reading: _Reading, turn: Sequence[int]) -> Generator[None, None, list[list[int]]]:
    """The rounds of the last turn that may go: neither the newest, nor that in which the user spoke last."""
    rounds: list[list[int]] = []
    before: Role = "user"
    thinks = any(_kind(reading.items[n]) == "reasoning" for n in turn)
    for place, n in enumerate(turn):
        yield from _now_and_then(place)
        who = reading.roles[n]
        if who != "user":
            begins = who == "assistant" and before != "assistant" and not reading.tied[n]
            if not rounds or (begins and not (thinks and _led_to(reading.items[n]))):
                rounds.append([])
            rounds[-1].append(n)
        before = who
    yield None
    spoken: list[list[int]] = []
    for one in reversed(rounds):
        yield from _now_and_then(one[0], len(one))
        if any(has_words(reading.dialect, reading.items[n]) for n in one):
            spoken.append(one)
            break
    kept = rounds[-1:] + spoken
    return [one for one in rounds if one not in kept]


def _kind(item: object) -> object:
    return item.get("type") if isinstance(item, dict) else None


def _led_to(item: object) -> bool:
    """Whether an item of the Responses API may ask for the reasoning before it: those with an id of the vendor's do."""
    return isinstance(item, dict) and _kind(item) != "reasoning" and bool(item.get("id"))
