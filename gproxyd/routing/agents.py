"""Agents: which of their targets is asked first, and what their targets are.

Invariants: an order names every target exactly once; a conversation that is pinned stays where its cache is warm for
as long as that place can be used; what is remembered of conversations is bounded in number and time.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from gproxyd.routing.latency import Latencies

Strategy = Literal["fallback", "round_robin", "weighted", "latency", "cost", "sticky"]

MOST_PINS = 50_000


class Place(NamedTuple):
    """A provider's model."""

    provider: str
    model: str

    def __str__(self) -> str:
        return f"{self.provider}/{self.model}"


class Choice(NamedTuple):
    """A target as strategies see it. `cost` in nano-dollars for a million tokens in and out, None = unknown."""

    place: Place
    weight: int = 1
    cost: int | None = None


def expand(text: str, catalogue: Mapping[str, Iterable[str]]) -> list[Place]:
    """What one entry of an agent's targets stands for.

    `catalogue` is provider -> the ids of its models, for every configured provider. `provider/model` stands for
    itself, whether the catalogue knows it or not; with `*` or `?` for every `provider/model` that fits; a bare model
    for every provider that offers it.
    """
    if _WILD.search(text):
        fits = _pattern(text)
        return [
            Place(provider, model)
            for provider, models in catalogue.items()
            for model in models
            if fits.fullmatch(f"{provider}/{model}")
        ]
    provider, slash, model = text.partition("/")
    if slash and provider in catalogue:
        return [Place(provider, model)]
    return [Place(name, text) for name, models in catalogue.items() if text in models]


_WILD = re.compile(r"[*?]")


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in text), re.DOTALL)


class Pins:
    """Where conversations are, by a key, each for a time. Times are monotonic seconds."""

    def __init__(self, most: int = MOST_PINS) -> None:
        self._most = most
        self._known: OrderedDict[bytes, tuple[Place, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: bytes, now: float) -> Place | None:
        found = self._known.get(key)
        if found is None:
            return None
        if now >= found[1]:
            del self._known[key]
            return None
        return found[0]

    def put(self, key: bytes, place: Place, until: float) -> None:
        self._known[key] = (place, until)
        self._known.move_to_end(key)
        while len(self._known) > self._most:
            self._known.popitem(last=False)


class Orders:
    """Puts targets in order. Remembers whose turn it is, and lives as long as the process."""

    def __init__(self, latencies: Latencies, dice: random.Random | None = None) -> None:
        self._latencies = latencies
        self._dice = dice or random.Random()  # noqa: S311 - nothing secret
        self._turns: dict[str, int] = {}
        self.pins = Pins()

    def order(
        self, agent: str, strategy: Strategy, choices: Sequence[Choice], now: float, key: bytes | None = None
    ) -> list[int]:
        """The places of the choices, the one to be asked first at the front. `key` tells conversations apart."""
        if len(choices) < 2:
            return list(range(len(choices)))
        pinned = None if key is None else self.pins.get(key, now)
        if pinned is not None and any(choice.place == pinned for choice in choices):
            return sorted(range(len(choices)), key=lambda place: choices[place].place != pinned)
        return self._BY[strategy](self, agent, choices, now, key)

    def _fallback(self, agent: str, choices: Sequence[Choice], now: float, key: bytes | None) -> list[int]:
        return list(range(len(choices)))

    def _round_robin(self, agent: str, choices: Sequence[Choice], now: float, key: bytes | None) -> list[int]:
        turn = self._turns.get(agent, -1) + 1
        self._turns[agent] = turn
        first = turn % len(choices)
        return [*range(first, len(choices)), *range(first)]

    def _weighted(self, agent: str, choices: Sequence[Choice], now: float, key: bytes | None) -> list[int]:
        # Efraimidis and Spirakis: the order of u^(1/w) is that of drawing by weight without putting back.
        drawn = {place: self._dice.random() ** (1 / one.weight) for place, one in enumerate(choices)}
        return sorted(drawn, key=lambda place: -drawn[place])

    def _latency(self, agent: str, choices: Sequence[Choice], now: float, key: bytes | None) -> list[int]:
        order = self._latencies.order([one.place for one in choices], now)
        return [[one.place for one in choices].index(place) for place in order]

    def _cost(self, agent: str, choices: Sequence[Choice], now: float, key: bytes | None) -> list[int]:
        def cost(place: int) -> float:
            known = choices[place].cost
            return math.inf if known is None else known

        return sorted(range(len(choices)), key=cost)

    def _sticky(self, agent: str, choices: Sequence[Choice], now: float, key: bytes | None) -> list[int]:
        if key is None:
            return self._weighted(agent, choices, now, key)
        # Weighted rendezvous hashing: a target that comes or goes moves only the conversations that were there.
        scores = {place: -one.weight / math.log(_share(key, one.place)) for place, one in enumerate(choices)}
        return sorted(scores, key=lambda place: -scores[place])

    _BY: Mapping[Strategy, Callable[..., list[int]]] = {
        "fallback": _fallback,
        "round_robin": _round_robin,
        "weighted": _weighted,
        "latency": _latency,
        "cost": _cost,
        "sticky": _sticky,
    }


def _share(key: bytes, place: Place) -> float:
    """A number between 0 and 1 that only the two decide."""
    digest = hashlib.blake2b(str(place).encode(), digest_size=7, key=key[:64]).digest()
    return (int.from_bytes(digest) + 1) / (2**56 + 2)
