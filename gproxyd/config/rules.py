"""The rules that span several keys. Each takes a configuration of sound shape and yields the flaws it finds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from gproxyd.config.fields import Known
from gproxyd.config.messages import key_path
from gproxyd.config.people import RateLimit, UserKey
from gproxyd.config.schema import Config, Price
from gproxyd.config.source import Flaw, KeyPath


def check(config: Config, known: Known) -> Iterator[Flaw]:
    """Every flaw that no single value shows by itself."""
    yield from _listen_twice(config)
    yield from _no_url(config, known)
    yield from _model_twice(config)
    yield from _tier_order(config)
    yield from _header_twice(config)
    yield from _limits(config)
    yield from _key_sources(config)
    yield from _key_twice(config)
    yield from _agent_names(config)
    yield from _agent_headers(config)


def _listen_twice(config: Config) -> Iterator[Flaw]:
    seen = set()
    for key, addresses in (("listen", config.server.listen), ("ops_listen", config.server.ops_listen)):
        for index, address in enumerate(addresses):
            chosen_by_kernel = address.path is None and address.port == 0
            if address in seen and not chosen_by_kernel:
                yield Flaw(("server", key, index), "is listened on already; remove it here or there")
            seen.add(address)


def _no_url(config: Config, known: Known) -> Iterator[Flaw]:
    for name, provider in config.providers.items():
        if provider.dialects or known.vendors.get(provider.vendor, True):
            continue
        if provider.vendor == "custom":
            yield Flaw(
                ("providers", name),
                "needs `dialects`: for each API that the server speaks its base URL, "
                'as in dialects: {openai_chat: "http://127.0.0.1:8000"}',
            )
        elif provider.base_url is None:
            yield Flaw(
                ("providers", name), "needs `base_url` (or `dialects`), because the vendor has no common address"
            )


def _model_twice(config: Config) -> Iterator[Flaw]:
    for name, provider in config.providers.items():
        seen = set()
        for index, model in enumerate(provider.models):
            if model.id in seen:
                yield Flaw(("providers", name, "models", index), "has the id of a model above; remove one of the two")
            seen.add(model.id)


def _tier_order(config: Config) -> Iterator[Flaw]:
    for path, price in _prices(config):
        for index, (before, tier) in enumerate(pairwise(price.above), start=1):
            if tier.tokens <= before.tokens:
                yield Flaw((*path, "above", index), "must begin at more tokens than the entry above it")


def _prices(config: Config) -> Iterator[tuple[KeyPath, Price]]:
    for name, provider in config.providers.items():
        for index, model in enumerate(provider.models):
            if model.price is not None:
                yield ("providers", name, "models", index, "price"), model.price
    for name, alias in config.aliases.items():
        if alias.price is not None:
            yield ("aliases", name, "price"), alias.price


def _header_twice(config: Config) -> Iterator[Flaw]:
    for name, provider in config.providers.items():
        seen = set()
        for header in provider.headers:
            if header.lower() in seen:
                yield Flaw(("providers", name, "headers", header), "is given already, in another spelling")
            seen.add(header.lower())


def _keys(config: Config) -> Iterator[tuple[KeyPath, UserKey]]:
    for user, account in config.users.items():
        for name, key in account.keys.items():
            yield ("users", user, "keys", name), key


def _limits(config: Config) -> Iterator[Flaw]:
    owners: list[tuple[KeyPath, tuple[RateLimit, ...]]] = [
        (("users", name), user.rate_limits) for name, user in config.users.items()
    ]
    owners += [(path, key.rate_limits) for path, key in _keys(config)]
    for path, limits in owners:
        seen = set()
        for index, limit in enumerate(limits):
            place = (*path, "rate_limits", index)
            if not (limit.rpm or limit.rpd or limit.tpm or limit.concurrency):
                yield Flaw(place, "limits nothing; give it `rpm`, `rpd`, `tpm` or `concurrency`")
            if limit.model in seen:
                yield Flaw(place, "is for the same models as an entry above; make one of the two")
            seen.add(limit.model)


def _key_sources(config: Config) -> Iterator[Flaw]:
    for path, key in _keys(config):
        given = [source for source in (key.credential, key.sha256, key.token) if source is not None]
        if len(given) != 1:
            yield Flaw(path, "needs exactly one of `credential` (the name of a secret), `sha256` and `token`")


def _key_twice(config: Config) -> Iterator[Flaw]:
    owners: dict[str | bytes, KeyPath] = {}
    for path, key in _keys(config):
        for identity in (key.credential, key.sha256, key.token):
            if identity is None:
                continue
            owner = owners.setdefault(identity, path)
            if owner != path:
                yield Flaw(path, f"is the same key as {key_path(owner)}; a key belongs to one name only")


def _agent_names(config: Config) -> Iterator[Flaw]:
    for name in config.agents:
        if name in config.aliases:
            yield Flaw(("agents", name), "is the name of an alias, too; give one of the two another name")


def _agent_headers(config: Config) -> Iterator[Flaw]:
    for name, agent in config.agents.items():
        for index, target in enumerate(agent.targets):
            lower = [header.lower() for header in target.headers]
            for header in target.headers:
                if lower.count(header.lower()) > 1:
                    yield Flaw(("agents", name, "targets", index, "headers", header), "is given in two spellings")
