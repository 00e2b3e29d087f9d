"""What tokens cost: whole nano-dollars, without a float.

Invariants
- A cost is exact up to one rounding at its end, to the nearest nano-dollar, halves up. It is never negative.
- An unknown price makes an unknown cost, None, and never a zero; but only if there is something to pay with it.

Rates are nano-dollars per million tokens, as `units.parse_usd` reads "0.40".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

from gproxyd.dialects.usage import Usage

MILLION = 10**6

_DEARER = frozenset({"fast", "ultrafast"})
"""Tiers known to cost more than standard: unless their rates are known, what they cost is not."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per million tokens; None = unknown.

    Where a rate is unknown another stands in: input for what caches read and for what they write, the short-lived
    writes' for those kept an hour, output for reasoning. A rate that is no whole number, or negative, is a ValueError.
    """

    input: int | None = None
    output: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    cache_write_1h: int | None = None
    reasoning: int | None = None

    def __post_init__(self) -> None:
        for name in RATES:
            rate = getattr(self, name)
            if rate is not None and (type(rate) is not int or rate < 0):
                raise ValueError(f"{name}: a price is a whole number of nano-dollars and not negative")

    def cost(self, usage: Usage) -> int | None:
        """Nano-dollars, or None if a rate that is needed is unknown."""
        total = 0
        for tokens, rate in self._parts(usage):
            if tokens:
                if rate is None:
                    return None
                total += tokens * rate
        return (total + MILLION // 2) // MILLION

    def _parts(self, usage: Usage) -> tuple[tuple[int, int | None], ...]:
        write = _first(self.cache_write, self.input)
        uncached, output = usage.input_tokens or 0, usage.output_tokens or 0
        if usage.cached_in_input:
            uncached = max(0, uncached - usage.cached_tokens)
        thought = 0 if self.reasoning is None else min(usage.reasoning_tokens or 0, output)
        return (
            (uncached, self.input),
            (usage.cache_read_tokens or 0, _first(self.cache_read, self.input)),
            (usage.cache_write_tokens or 0, write),
            (usage.cache_write_1h_tokens or 0, _first(self.cache_write_1h, write)),
            (output - thought, self.output),
            (thought, self.reasoning),
        )

    def _worst(self, input_tokens: int, output_tokens: int) -> int:
        dearest = max(self.input or 0, self.cache_read or 0, self.cache_write or 0, self.cache_write_1h or 0)
        return input_tokens * dearest + output_tokens * max(self.output or 0, self.reasoning or 0)


@dataclass(frozen=True, slots=True)
class Price(Rates):
    """A model's rates: its own are the standard ones.

    above   (tokens, rates), ascending: once the prompt, cached or not, has more tokens, all of the request costs that
    tiers   service tier -> rates
    plain   whether there is nothing of the kind, nor a rate for reasoning: input costs this, output that

    Kinds that `above` and `tiers` leave out have been filled in by `price_of`.
    """

    above: tuple[tuple[int, Rates], ...] = ()
    tiers: Mapping[str, Rates] = field(default_factory=dict)
    plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Rates.__post_init__(self)
        known = self.input is not None and self.output is not None and self.reasoning is None
        object.__setattr__(self, "plain", known and not self.above and not self.tiers)

    def rates(self, prompt_tokens: int, tier: str | None = None) -> Rates | None:
        """The rates for a prompt of that size, cached tokens included. None: the tier is dearer, nobody said by how
        much. A tier that is not in the table is billed as standard.

        Tables do not say what a tier costs above a threshold; it is scaled as the standard rates are there.
        """
        base: Rates = self if tier is None else self.tiers.get(tier, self)
        if base is self and tier in _DEARER:
            return None
        reached = [rates for tokens, rates in self.above if prompt_tokens > tokens]
        if not reached:
            return base
        return reached[-1] if base is self else _scaled(base, reached[-1], self)


class Kinds(Protocol):
    """Rates as the configuration has them."""

    @property
    def input(self) -> int | None: ...
    @property
    def output(self) -> int | None: ...
    @property
    def cache_read(self) -> int | None: ...
    @property
    def cache_write(self) -> int | None: ...
    @property
    def cache_write_1h(self) -> int | None: ...
    @property
    def reasoning(self) -> int | None: ...


class Step(Kinds, Protocol):
    """Rates for prompts of more than so many tokens."""

    @property
    def tokens(self) -> int: ...


class Listed(Kinds, Protocol):
    """A price as the configuration has it."""

    @property
    def above(self) -> Sequence[Step]: ...
    @property
    def flex(self) -> Kinds | None: ...
    @property
    def priority(self) -> Kinds | None: ...


def configured(price: Listed) -> Price:
    """The price that an administrator wrote down: what a threshold or tier leaves out stays as it is without it."""
    standard = _plain(price)
    tiers = {"flex": price.flex, "priority": price.priority}
    return Price(
        **{name: getattr(standard, name) for name in RATES},
        above=tuple((step.tokens, _filled(_plain(step), standard)) for step in price.above),
        tiers={name: _filled(_plain(rates), standard) for name, rates in tiers.items() if rates is not None},
    )


def _plain(kinds: Kinds) -> Rates:
    return Rates(*(getattr(kinds, name) for name in RATES))


def price_of(
    standard: Rates, above: Collection[tuple[int, Rates]] = (), tiers: Mapping[str, Rates] | None = None
) -> Price:
    """A price as tables have it. What a threshold leaves out is scaled as its input is; what a tier leaves out is
    standard. Reasoning is not filled in: it costs what output does.
    """
    steps = tuple(
        (tokens, _filled(rates, _scaled(standard, rates, standard)))
        for tokens, rates in sorted(above, key=lambda step: step[0])
    )
    standards = {name: getattr(standard, name) for name in RATES}
    return Price(
        **standards, above=steps, tiers={name: _filled(rates, standard) for name, rates in (tiers or {}).items()}
    )


def cost(price: Price, usage: Usage) -> int | None:
    """What a request cost, in nano-dollars; None if a price that it takes is unknown, or nothing was told.

    Counts that were not told are taken for nothing: whoever knows better fills them in first.
    """
    read, written, cached = usage.input_tokens, usage.output_tokens, usage.cached_tokens
    if read is None and written is None and not cached:
        return None
    if price.plain and not cached and usage.service_tier is None:  # it would come to the same, as for most
        assert price.input is not None and price.output is not None  # noqa: PT018 - so says `plain`
        return ((read or 0) * price.input + (written or 0) * price.output + MILLION // 2) // MILLION
    rates = price.rates(usage.prompt_tokens, usage.service_tier)
    return None if rates is None else rates.cost(usage)


def worst(price: Price, input_tokens: int, output_tokens: int, tiers: Collection[str] | None = None) -> int:
    """The most, in nano-dollars and rounded up, that so many tokens can cost: at the dearest of their kinds, at every
    threshold that so long a prompt can reach, in any tier (or only in these, and standard). What is unknown adds
    nothing; whether that will do is for the caller to say.
    """
    if price.plain:
        return -(-price._worst(input_tokens, output_tokens) // MILLION)
    most = max(rates._worst(input_tokens, output_tokens) for rates in _reachable(price, input_tokens, tiers))
    return -(-most // MILLION)


def _reachable(price: Price, prompt: int, tiers: Collection[str] | None) -> Iterator[Rates]:
    names = [name for name in price.tiers if tiers is None or name in tiers]
    for tier in (None, *names):
        for size in (0, *(tokens + 1 for tokens, _ in price.above if prompt > tokens)):
            rates = price.rates(size, tier)
            if rates is not None:
                yield rates


RATES = tuple(each.name for each in fields(Rates))
"""The kinds of tokens that have a price, in the order of `Rates`."""


def _first(rate: int | None, other: int | None) -> int | None:
    return other if rate is None else rate


def _filled(rates: Rates, other: Rates) -> Rates:
    return replace(
        rates, **{name: _first(getattr(rates, name), getattr(other, name)) for name in RATES if name != "reasoning"}
    )


def _scaled(rates: Rates, to: Rates, standard: Rates) -> Rates:
    """The rates as much dearer as `to` is than standard, kind by kind; where that is not told, as its input is."""

    def factor(name: str) -> tuple[int, int]:
        for kind in (name, "output" if name == "reasoning" else "input"):
            above, below = getattr(to, kind), getattr(standard, kind)
            if above is not None and below:
                return above, below
        return 1, 1

    scaled = {}
    for name in RATES:
        rate = getattr(rates, name)
        if rate is not None:
            above, below = factor(name)
            scaled[name] = -(-rate * above // below)
    return Rates(**scaled)
