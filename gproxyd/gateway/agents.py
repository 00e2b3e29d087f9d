"""Agents at work: the models that a name stands for under one configuration and catalogue, and which of them fit a
request.

A bare model that several providers offer is an agent, too, one that nobody configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gproxyd import config
from gproxyd.routing.agents import Choice, Place, expand
from gproxyd.vendors.offers import Offer, Offers
from gproxyd.vendors.prices import Price

if TYPE_CHECKING:
    from gproxyd.gateway.snapshot import Snapshot


class Member(NamedTuple):
    """One target of an agent: where it is, what is known of it, and what the configuration says beside that."""

    choice: Choice
    facts: Offer
    target: config.AgentTarget

    @property
    def place(self) -> Place:
        return self.choice.place


@dataclass(frozen=True, eq=False)
class AgentAtWork:
    """A name and its members, in the order of the configuration. `settings` are those of a bare model: the defaults."""

    name: str
    settings: config.Agent
    members: tuple[Member, ...]

    @property
    def sticks(self) -> bool:
        """Whether conversations are to stay where they are."""
        return self.settings.strategy == "sticky" or self.settings.sticky is not None

    @property
    def plain(self) -> bool:
        """Whether requests go to the first member that is well, as they are."""
        settings = self.settings
        steady = settings.strategy in ("fallback", "cost") and not self.sticks
        return steady and settings.system_prompt is None

    def asks_first(self) -> int | None:
        """How many bytes a request may have that goes to the first member without a look at what it asks for; None:
        none may, because another member can do what that one cannot."""
        if not self.plain or not self.members:
            return None
        first = min(self.members, key=_cost) if self.settings.strategy == "cost" else self.members[0]
        able = all(first.facts.capabilities >= member.facts.capabilities for member in self.members)
        special = first.target.max_output is not None or not able
        # No text has more tokens than bytes.
        return None if special else first.facts.context or 2**31


def _cost(member: Member) -> float:
    return float("inf") if member.choice.cost is None else member.choice.cost


def build(snapshot: Snapshot) -> Mapping[str, AgentAtWork]:
    """Every agent by its name, and by the aliases that lead to it."""
    catalogue = {name: snapshot.offers.of_provider(name) for name in snapshot.config.providers}
    found = {
        name: AgentAtWork(name, agent, tuple(_members(agent, catalogue, snapshot.offers)))
        for name, agent in snapshot.config.agents.items()
    }
    aliases = {alias: found[to.model] for alias, to in snapshot.config.aliases.items() if not to.provider}
    return {**found, **aliases}


def of_bare_model(snapshot: Snapshot, model: str) -> AgentAtWork | None:
    """The providers that offer a model of that id; None if none does."""
    offered = snapshot.offers.providers_of(model)
    if not offered:
        return None
    targets = [config.AgentTarget(target=f"{provider}/{model}") for provider in offered]
    members = tuple(
        _member(Place(target.target.partition("/")[0], model), target, snapshot.offers) for target in targets
    )
    return AgentAtWork(model, config.Agent(targets=tuple(targets)), members)


def places(settings: config.Config, offers: Offers) -> Mapping[str, Sequence[Place]]:
    """What each agent, and each alias of one, stands for."""
    catalogue = {name: offers.of_provider(name) for name in settings.providers}
    found = {
        name: [member.place for member in _members(agent, catalogue, offers)] for name, agent in settings.agents.items()
    }
    aliases = {alias: found[to.model] for alias, to in settings.aliases.items() if not to.provider}
    return {**found, **aliases}


def _members(agent: config.Agent, catalogue: Mapping[str, Mapping[str, Offer]], offers: Offers) -> Iterator[Member]:
    seen: set[Place] = set()
    for target in agent.targets:
        for place in expand(target.target, catalogue):
            member = _member(place, target, offers)
            if place not in seen and member.facts.capabilities.issuperset(agent.required):
                seen.add(place)
                yield member


def _member(place: Place, target: config.AgentTarget, offers: Offers) -> Member:
    facts = offers.facts(place.provider, place.model)
    return Member(Choice(place, target.weight, _of_both(facts.price)), facts, target)


def _of_both(price: Price | None) -> int | None:
    """What a million tokens in and as many out cost together."""
    if price is None or price.input is None or price.output is None:
        return None
    return price.input + price.output


def warnings(settings: config.Config, offers: Offers) -> Iterator[str]:
    """Agents that nobody could be sent to."""
    for name, found in places(settings, offers).items():
        if not found and name in settings.agents:
            yield f"agents.{name}: none of its targets is a model that is known, or can do what `required` asks for"
