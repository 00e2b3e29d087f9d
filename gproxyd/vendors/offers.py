"""What providers offer: the models that the configuration names and those that their vendors list, with what is known.

Invariants: of each field what the configuration says counts, else what the vendor's list says, else what is known of
the vendor's model (models.yaml), and each field knows which of the three it was; a model is offered because somebody
configured or listed it, never because it is known. Immutable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from gproxyd.vendors import models
from gproxyd.vendors.discovery import Found
from gproxyd.vendors.models import ModelFacts
from gproxyd.vendors.prices import Listed, Price, configured
from gproxyd.wire.target import MODEL_NAME

Source = Literal["configured", "discovered", "built-in"]

FIELDS = ("context", "max_output", "price", "capabilities", "mode", "deprecated", "title", "created")
"""What can be known of a model."""


class Written(Protocol):
    """A model as the configuration has it."""

    @property
    def id(self) -> str: ...
    @property
    def context(self) -> int | None: ...
    @property
    def max_output(self) -> int | None: ...
    @property
    def price(self) -> Listed | None: ...


class Shop(NamedTuple):
    """A provider, as far as it offers models: whose they are, and those that the configuration names."""

    vendor: str
    written: Sequence[Written] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """One model of a provider; None = unknown.

    context, max_output  tokens
    mode                 what it is called for, as in models.yaml
    deprecated           the day from which the vendor may refuse it, "2026-11-30"
    title, created       what people call it, and since when there is one (seconds since the epoch)
    origin               who says that the provider has it: "built-in" for a model that nobody offers
    sources              field -> who says so, for fields that are known
    """

    provider: str
    id: str
    context: int | None
    max_output: int | None
    price: Price | None
    capabilities: frozenset[str]
    mode: str | None
    deprecated: str | None
    title: str | None
    created: int | None
    origin: Source | None
    sources: Mapping[str, Source]


class Offers:
    """All offers of all providers."""

    def __init__(self, shops: Mapping[str, Shop], found: Mapping[str, Sequence[Found]] | None = None) -> None:
        """`found` are the lists of the vendors, by provider; of providers that are no shop they are passed over."""
        self._shops = shops
        self._offers = {name: dict(_offers(name, shop, (found or {}).get(name, ()))) for name, shop in shops.items()}

    def __iter__(self) -> Iterator[Offer]:
        """In the order of the configuration."""
        for offers in self._offers.values():
            yield from offers.values()

    def __len__(self) -> int:
        return sum(map(len, self._offers.values()))

    def of_provider(self, name: str) -> Mapping[str, Offer]:
        """What a provider offers, by the models' own ids: the configured ones first."""
        return self._offers.get(name, {})

    def facts(self, provider: str, model: str) -> Offer:
        """What is known of a provider's model, whether it is offered or not."""
        offer = self.of_provider(provider).get(model)
        if offer is None:
            offer = _offer(provider, self._shops[provider].vendor, model, None, None)
        return offer

    def providers_of(self, model: str) -> tuple[str, ...]:
        """The providers that offer the model of that id, in the order of the configuration."""
        return self._providers.get(model, ())

    @cached_property
    def _providers(self) -> Mapping[str, tuple[str, ...]]:
        homes: dict[str, tuple[str, ...]] = {}
        for offer in self:
            homes[offer.id] = (*homes.get(offer.id, ()), offer.provider)
        return homes


def _offers(provider: str, shop: Shop, found: Sequence[Found]) -> Iterator[tuple[str, Offer]]:
    listed = {one.id: one for one in found}
    for written in shop.written:
        yield written.id, _offer(provider, shop.vendor, written.id, written, listed.pop(written.id, None))
    for one in listed.values():
        if MODEL_NAME.fullmatch(f"{provider}/{one.id}"):  # one that is too long could not be called
            yield one.id, _offer(provider, shop.vendor, one.id, None, one)


def _offer(provider: str, vendor: str, model: str, written: Written | None, found: Found | None) -> Offer:
    known = models.facts(vendor, model)
    layers: list[tuple[Source, Mapping[str, Any]]] = []
    if written is not None:
        layers.append(("configured", _configured(written)))
    if found is not None:
        layers.append(("discovered", _discovered(found, known)))
    if known is not None:
        layers.append(("built-in", _built_in(known)))
    told: dict[str, Any] = dict.fromkeys(FIELDS) | {"capabilities": frozenset()}
    sources: dict[str, Source] = {}
    for source, layer in reversed(layers):
        for field, value in layer.items():
            if value is not None:
                told[field] = value
                sources[field] = source
    return Offer(provider, model, origin=layers[0][0] if layers else None, sources=sources, **told)


def _configured(written: Written) -> Mapping[str, Any]:
    price = written.price
    return {
        "context": written.context,
        "max_output": written.max_output,
        "price": configured(price) if price is not None else None,
    }


def _discovered(found: Found, known: ModelFacts | None) -> Mapping[str, Any]:
    """A vendor that tells of some capabilities says nothing of the others, so those that are known stay."""
    usual = known.capabilities if known is not None else frozenset()
    told = found.can or found.cannot
    return {
        "context": found.context,
        "max_output": found.max_output,
        "price": found.price,
        "capabilities": (usual | found.can) - found.cannot if told else None,
        "title": found.title,
        "created": found.created,
    }


def _built_in(known: ModelFacts) -> Mapping[str, Any]:
    return {
        "context": known.context,
        "max_output": known.max_output,
        "price": known.price,
        "capabilities": known.capabilities,
        "mode": known.mode,
        "deprecated": known.deprecated,
    }
