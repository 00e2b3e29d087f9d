"""What can be called, laid out once for each configuration and catalogue, so that a list is answered from memory.

A shelf holds the entries of one form of address: all providers' (aggregated), or one provider's (scoped). Where a name
means several things there is one entry: for what a request of that name would reach (alias, then agent, then model).

Invariant: made once, in a thread if it is large, and not changed; what it remembers of callers is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from gproxyd.policy.callers import Caller
from gproxyd.policy.permissions import Permissions
from gproxyd.vendors.discovery import pricing
from gproxyd.vendors.offers import Offer, Offers
from gproxyd.vendors.prices import Price

Shape = Literal["openai", "anthropic", "gemini"]

_REMEMBERED = 256
"""Callers whose selection one shelf remembers."""


@dataclass(frozen=True, slots=True)
class Tails:
    """An entry in every shape, but for the beginning that bears its id: everything behind the id itself."""

    openai: bytes
    anthropic: bytes
    gemini: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One name that a caller may send.

    provider  where it leads; None for an agent
    facts     what is known of it
    price     what it costs by that name
    alias_of  "provider/model" if it is an alias
    names     the names of which a caller must be permitted one
    """

    id: str
    provider: str | None
    facts: Offer | None
    price: Price | None
    alias_of: str | None
    names: tuple[str, ...]
    tails: Tails
    start: bytes  # the id, for JSON: a name is plain ASCII and needs no escape

    def text(self, shape: Shape) -> bytes:
        """The entry as JSON."""
        return b'{"%b%b%b' % (HEADS[shape], self.start, getattr(self.tails, shape))


HEADS: Mapping[Shape, bytes] = {"openai": b'id":"', "anthropic": b'id":"', "gemini": b'name":"models/'}


class Shelf:
    """The entries of one form of address, by id."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self.by_id: dict[str, Entry] = {}
        for entry in entries:
            self.by_id[entry.id] = entry
        self._of_provider: dict[str | None, list[Entry]] = {}
        for entry in self.by_id.values():
            self._of_provider.setdefault(None if entry.alias_of else entry.provider, []).append(entry)
        self._chosen: dict[tuple[bool, Permissions | None, tuple[str, ...] | None], Sequence[Entry]] = {}

    def chosen(self, caller: Caller) -> Sequence[Entry]:
        """What the caller may call: models in the order of the configuration, then agents, then aliases."""
        key = (caller.role == "admin", caller.permissions, caller.agents)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._choose(caller)
            if len(self._chosen) >= _REMEMBERED:
                del self._chosen[next(iter(self._chosen))]
            self._chosen[key] = chosen
        return chosen

    def _choose(self, caller: Caller) -> Sequence[Entry]:
        chosen: list[Entry] = []
        for provider, entries in self._of_provider.items():
            if provider is not None and caller.may_provider(provider):
                chosen += entries
            else:
                chosen += (entry for entry in entries if permits(caller, entry))
        return chosen


def permits(caller: Caller, entry: Entry) -> bool:
    return any(map(caller.may_model, entry.names))


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name for a model, and what it costs by that name; None: what the model does."""

    provider: str
    model: str
    price: Price | None = None


class Shelves:
    """`everything` is the aggregated form's; `of` the scoped forms', by provider."""

    def __init__(
        self,
        offers: Offers,
        aliases: Mapping[str, Alias],
        agents: Mapping[str, Sequence[tuple[str, str]]],
        usable: Callable[[str], bool],
    ) -> None:
        """`agents` are their targets, (provider, model); `usable` says so of a provider."""
        self._offers = offers
        self._aliases = aliases
        self._agents = agents
        self._usable = usable
        self._tails: dict[tuple[str, str], Tails] = {}  # of models by their own name, for both forms
        providers = dict.fromkeys(offer.provider for offer in offers)
        providers.update(dict.fromkeys(alias.provider for alias in aliases.values()))
        self.everything = Shelf(self._aggregated())
        self.of = {name: Shelf(self._scoped(name)) for name in providers if usable(name)}
        self._tails.clear()

    def shelf(self, provider: str | None) -> Shelf:
        return self.everything if provider is None else self.of.get(provider, EMPTY)

    def _aggregated(self) -> Iterator[Entry]:
        for offer in self._offers:
            if self._usable(offer.provider):
                yield self._model(f"{offer.provider}/{offer.id}", offer)
        for name, targets in self._agents.items():
            if usable := [target for target in targets if self._usable(target[0])]:
                yield self._agent(name, usable)
        for name, alias in self._aliases.items():
            if self._usable(alias.provider):
                yield self._alias(name, alias, (name,))

    def _scoped(self, provider: str) -> Iterator[Entry]:
        for offer in self._offers.of_provider(provider).values():
            yield self._model(offer.id, offer)
        for name, alias in self._aliases.items():
            if alias.provider == provider:
                yield self._alias(name, alias, (f"{provider}/{name}", name))

    def _model(self, name: str, offer: Offer) -> Entry:
        """A model by its own name; where an alias of its provider bears that, by what the alias leads to."""
        names = (f"{offer.provider}/{offer.id}",)
        alias = self._aliases.get(offer.id)
        if alias is not None and alias.provider == offer.provider:
            return self._alias(name, alias, names)
        key = (offer.provider, offer.id)
        if key not in self._tails:
            self._tails[key] = _tails(offer.title or offer.id, offer.provider, offer, offer.price)
        return Entry(name, offer.provider, offer, offer.price, None, names, self._tails[key], name.encode("ascii"))

    def _alias(self, name: str, alias: Alias, names: tuple[str, ...]) -> Entry:
        facts = self._offers.facts(alias.provider, alias.model)
        price, target = alias.price or facts.price, f"{alias.provider}/{alias.model}"
        tails = _tails(name, alias.provider, facts, price, alias_of=target)
        return Entry(name, alias.provider, facts, price, target, names, tails, name.encode("ascii"))

    def _agent(self, name: str, targets: Sequence[tuple[str, str]]) -> Entry:
        facts = _least(name, [self._offers.facts(provider, model) for provider, model in targets])
        tails = _tails(name, "gproxyd", facts, None)
        return Entry(name, None, facts, None, None, (name,), tails, name.encode("ascii"))


def _least(name: str, targets: Sequence[Offer]) -> Offer:
    """What can be relied on whichever of the targets answers."""
    contexts = [target.context for target in targets if target.context is not None]
    outputs = [target.max_output for target in targets if target.max_output is not None]
    return Offer(
        "",
        name,
        min(contexts) if len(contexts) == len(targets) else None,
        min(outputs) if len(outputs) == len(targets) else None,
        None,
        frozenset.intersection(*(target.capabilities for target in targets)),
        targets[0].mode if len({target.mode for target in targets}) == 1 else None,
        None,
        None,
        None,
        "configured",
        {},
    )


def _tails(title: str, owner: str, facts: Offer | None, price: Price | None, alias_of: str | None = None) -> Tails:
    return Tails(
        _tail(_openai(owner, facts, price, alias_of)),
        _tail(_anthropic(title, facts)),
        _tail(_gemini(title, facts)),
    )


def _tail(members: Mapping[str, Any]) -> bytes:
    told = {name: value for name, value in members.items() if value is not None}
    return b'",' + orjson.dumps(told)[1:]


def _openai(owner: str, facts: Offer | None, price: Price | None, alias_of: str | None) -> dict[str, Any]:
    """OpenAI's model object, and what it has no members for."""
    return {
        "object": "model",
        "created": (facts and facts.created) or 0,
        "owned_by": owner,
        "context_window": facts and facts.context,
        "max_output_tokens": facts and facts.max_output,
        "capabilities": sorted(facts.capabilities) if facts is not None and facts.capabilities else None,
        "pricing": (pricing(price) or None) if price is not None else None,
        "alias_of": alias_of,
    }


def _anthropic(title: str, facts: Offer | None) -> dict[str, Any]:
    """Anthropic's model info; `created_at` is the epoch where a release date is not known."""
    created = datetime.fromtimestamp((facts and facts.created) or 0, UTC)
    retires = facts and facts.deprecated
    return {
        "type": "model",
        "display_name": title,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": facts and facts.context,
        "max_tokens": facts and facts.max_output,
        "lifecycle": "deprecated" if retires else "active",
        "retires_at": f"{retires}T00:00:00Z" if retires else None,
    }


_METHODS: Mapping[str | None, Sequence[str]] = {"embedding": ("embedContent", "batchEmbedContents", "countTokens")}
_CHAT_METHODS = ("generateContent", "streamGenerateContent", "countTokens")


def _gemini(title: str, facts: Offer | None) -> dict[str, Any]:
    mode = facts.mode if facts is not None else None
    return {
        "version": "001",
        "displayName": title,
        "inputTokenLimit": facts and facts.context,
        "outputTokenLimit": facts and facts.max_output,
        "supportedGenerationMethods": _METHODS.get(mode, _CHAT_METHODS),
    }


EMPTY = Shelf(iter(()))
