"""Everything a request may need of one configuration: immutable, taken once at the door, carried through.

A reload makes another snapshot; requests that run keep theirs, so none ever sees two configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from itertools import chain
from typing import Any, NamedTuple, Protocol

from gproxyd.config import Config
from gproxyd.config import Price as ConfiguredPrice
from gproxyd.config import Provider as ProviderSection
from gproxyd.gateway import agents, people
from gproxyd.gateway.agents import AgentAtWork
from gproxyd.gateway.people import Member
from gproxyd.gateway.shelves import Alias, Shelves
from gproxyd.policy.callers import Callers
from gproxyd.policy.limits import Rule
from gproxyd.policy.quotas import Quotas
from gproxyd.routing import providers
from gproxyd.routing.breaker import Rule as BreakerRule
from gproxyd.routing.credentials import CredentialPool, Key
from gproxyd.routing.names import Aliases
from gproxyd.routing.providers import Provider
from gproxyd.secrets import SecretError
from gproxyd.store.people import StoredUser
from gproxyd.vendors import prices
from gproxyd.vendors.catalogue import Vendor
from gproxyd.vendors.discovery import Found
from gproxyd.vendors.offers import Offers, Shop
from gproxyd.vendors.prices import Price


class Secrets(Protocol):
    """Where keys come from, by name; no key of that name: an empty tuple."""

    def get(self, name: str) -> Sequence[Key]: ...


@dataclass(frozen=True)
class Snapshot:
    """One configuration at work.

    members   the people of the files; `callers` are these and those of the database
    rules     provider -> its rate limits, as far as it has any
    offers    the models that are configured or were discovered, with what is known of them
    shelves   what can be called, laid out for lists
    warnings  for the administrator
    known     the lane's memory
    """

    config: Config
    providers: Mapping[str, Provider]
    aliases: Aliases
    members: Sequence[Member]
    callers: Callers
    rules: Mapping[str, tuple[Rule, ...]]
    trusted: tuple[IPv4Network | IPv6Network, ...]
    offers: Offers
    shelves: Shelves
    warnings: tuple[str, ...]
    known: dict[Any, Any] = field(default_factory=dict, repr=False)  # it holds callers' keys

    @cached_property
    def aliased(self) -> frozenset[str]:
        """Providers that some alias resolves into: their bodies may bear a name to replace."""
        return frozenset(provider for provider, _ in self.aliases.values())

    @cached_property
    def agents(self) -> Mapping[str, AgentAtWork]:
        """Names that stand for several models, the aliases among them that lead to one."""
        return agents.build(self)

    @cached_property
    def breaker_rule(self) -> BreakerRule:
        """When a breaker opens, and for how long."""
        breaker = self.config.breaker
        return BreakerRule(breaker.failures, breaker.open_for, breaker.rate, breaker.window)

    def facts(self, provider: str, model: str, asked: str | None) -> Facts:
        """What is known of a provider's model: what the configuration says, else the vendor, else what everybody knows.

        `asked` is the name that the client used: an alias may have a price of its own.
        """
        offer = self.offers.facts(provider, model)
        price = self._alias_price(provider, model, asked)
        return Facts(
            offer.context,
            offer.max_output,
            prices.configured(price) if price is not None else offer.price,
            # A vendor's list alone makes no name known: it may change as often as the vendor likes.
            named=offer.origin == "configured" or offer.mode is not None or (provider, model) in self.aliases.values(),
        )

    def _alias_price(self, provider: str, model: str, asked: str | None) -> ConfiguredPrice | None:
        """The price of the alias that led to the model, if one did: by its name, or as `provider/alias`."""
        for name in (asked or "", (asked or "").removeprefix(f"{provider}/")):
            alias = self.config.aliases.get(name)
            if alias is not None and (alias.provider, alias.model) == (provider, model):
                return alias.price
        return None


class Facts(NamedTuple):
    """`context` and `max_output` in tokens; None = unknown. `named` says that the model is one that is known here."""

    context: int | None = None
    max_output: int | None = None
    price: Price | None = None
    named: bool = False


def with_people(
    snapshot: Snapshot, stored: Mapping[str, StoredUser], quotas: Quotas
) -> Generator[None, None, Snapshot]:
    """The same configuration with everybody who may call now, and their accounts. Yields like `people.table`."""
    names = set()
    for budget in chain(people.budgets_of_files(snapshot.config), people.budgets_of_database(stored)):
        names.add(quotas.account(*budget).name)  # also of those who have no key yet
        if len(names) % people.AT_ONCE == 0:
            yield
    everybody = []
    for member in chain(snapshot.members, people.of_database(stored)):
        everybody.append(member)
        names.update(budget.name for budget in member.budgets)
        if len(everybody) % people.AT_ONCE == 0:
            yield
    for name in quotas.accounts().keys() - names:
        quotas.forget(name)
    callers = yield from people.table(everybody, quotas)
    return replace(snapshot, callers=callers, known={})


def build(config: Config, vendors: Mapping[str, Vendor], secrets: Secrets) -> Snapshot:
    """Puts a configuration to work. A provider whose secret is missing is switched off, loudly."""
    warnings = list(config.warnings)
    members = people.of_files(
        config, lambda name, where: _secret(name, secrets, where, warnings.append), warnings.append
    )
    if not members:
        warnings.append(f"nobody can call: there is no key under 'users' and no secret '{people.PRIMARY}'")
    at_work = {name: _provider(name, config, vendors, secrets, warnings.append) for name in config.providers}
    aliases = {alias: (target.provider, target.model) for alias, target in config.aliases.items() if target.provider}
    offers = _offers(config, {})
    return Snapshot(
        config=config,
        providers=at_work,
        aliases=aliases,
        members=members,
        callers={},
        rules={name: rules for name, section in config.providers.items() if (rules := _rules(name, section))},
        trusted=tuple(config.server.trusted_proxies),
        offers=offers,
        shelves=_shelves(config, at_work, aliases, offers),
        warnings=(*warnings, *agents.warnings(config, offers)),
    )


def with_offers(snapshot: Snapshot, found: Mapping[str, Sequence[Found]]) -> Snapshot:
    """The same configuration with what the vendors' lists say, by provider. Takes a while: it is for a thread."""
    offers = _offers(snapshot.config, found)
    shelves = _shelves(snapshot.config, snapshot.providers, snapshot.aliases, offers)
    return replace(snapshot, offers=offers, shelves=shelves, known={})


def _offers(config: Config, found: Mapping[str, Sequence[Found]]) -> Offers:
    shops = {name: Shop(section.vendor, section.models) for name, section in config.providers.items()}
    return Offers(shops, found)


def _shelves(config: Config, at_work: Mapping[str, Provider], aliases: Aliases, offers: Offers) -> Shelves:
    priced = {name: config.aliases[name].price for name in aliases}
    return Shelves(
        offers,
        {
            name: Alias(*target, prices.configured(price) if (price := priced[name]) is not None else None)
            for name, target in aliases.items()
        },
        agents.places(config, offers),
        lambda name: at_work[name].usable,
    )


def with_warnings(snapshot: Snapshot, more: Sequence[str]) -> Snapshot:
    """The same configuration with more to tell the administrator."""
    return replace(snapshot, warnings=(*snapshot.warnings, *more))


def _provider(
    name: str, config: Config, vendors: Mapping[str, Vendor], secrets: Secrets, warn: Callable[[str], None]
) -> Provider:
    section = config.providers[name]
    vendor = vendors[section.vendor]
    keys: list[Key] = []
    if providers.needs_key(section, vendor):
        for credential in section.credentials:
            keys.extend(_secret(credential, secrets, f"providers.{name}", warn))
        keys = list(providers.keys_of(name, section, vendor, keys, warn))
        if not keys:
            warn(f"providers.{name}: switched off, because it has no secret")
    usable = bool(keys) or not providers.needs_key(section, vendor)
    return providers.build(name, section, vendor, CredentialPool(keys), usable=usable)


def _rules(name: str, section: ProviderSection) -> tuple[Rule, ...]:
    limits = section.rate_limits
    if not (limits.rpm or limits.tpm or limits.concurrency):
        return ()
    return (Rule(f"provider:{name}", "*", rpm=limits.rpm, tpm=limits.tpm, concurrency=limits.concurrency),)


def _secret(name: str, secrets: Secrets, where: str | None, warn: Callable[[str], None]) -> Sequence[Key]:
    """The keys of a secret. One that is missing (unless `where` is None) or unusable is warned of, by its name."""
    try:
        found = secrets.get(name)
    except SecretError as unusable:
        warn(f"{where or name}: {unusable}")
        return ()
    if not found and where is not None:
        warn(f"{where}: the secret '{name}' is missing")
    return found
