"""Everything a request may need of one configuration: immutable, taken once at the door, carried through.

A reload makes another snapshot; requests that run keep theirs, so none ever sees two configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Protocol

from gproxyd.config import Config
from gproxyd.policy.callers import Caller, Callers, digest
from gproxyd.routing import providers
from gproxyd.routing.credentials import CredentialPool, Key
from gproxyd.routing.names import Aliases
from gproxyd.routing.providers import Provider
from gproxyd.secrets import SecretError
from gproxyd.vendors.catalogue import Vendor

PRIMARY = "client-token"
"""The secret that, if it exists, is the key of an implicit admin `primary`."""


class Secrets(Protocol):
    """Where keys come from, by name; no key of that name: an empty tuple."""

    def get(self, name: str) -> Sequence[Key]: ...


@dataclass(frozen=True)
class Snapshot:
    """One configuration at work. `warnings` are for the administrator, `known` is the lane's."""

    config: Config
    providers: Mapping[str, Provider]
    aliases: Aliases
    callers: Callers
    trusted: tuple[IPv4Network | IPv6Network, ...]
    warnings: tuple[str, ...]
    known: dict[Any, Any] = field(default_factory=dict, repr=False)  # it holds callers' keys

    @cached_property
    def aliased(self) -> frozenset[str]:
        """Providers that some alias resolves into: their bodies may bear a name to replace."""
        return frozenset(provider for provider, _ in self.aliases.values())


def build(config: Config, vendors: Mapping[str, Vendor], secrets: Secrets) -> Snapshot:
    """Puts a configuration to work. A provider whose secret is missing is switched off, loudly."""
    warnings = list(config.warnings)
    at_work = {name: _provider(name, config, vendors, secrets, warnings.append) for name in config.providers}
    return Snapshot(
        config=config,
        providers=at_work,
        aliases={alias: (target.provider, target.model) for alias, target in config.aliases.items()},
        callers=_callers(config, secrets, warnings.append),
        trusted=tuple(config.server.trusted_proxies),
        warnings=tuple(warnings),
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
        if not keys:
            warn(f"providers.{name}: switched off, because it has no secret")
    usable = bool(keys) or not providers.needs_key(section, vendor)
    return providers.build(name, section, vendor, CredentialPool(keys), usable=usable)


def _callers(config: Config, secrets: Secrets, warn: Callable[[str], None]) -> Callers:
    table: dict[bytes, Caller] = {}
    for user, account in config.users.items():
        for key, held in account.keys.items():
            expires = held.expires_at.timestamp() if held.expires_at else None
            caller = Caller(user, key, account.role, held.enabled, expires)
            for one in _digests(held.digest, held.credential, secrets, f"users.{user}.keys.{key}", warn):
                if one in table:
                    warn(f"users.{user}.keys.{key}: the same key belongs to {table[one].name} already")
                table.setdefault(one, caller)
    for secret in _secret(PRIMARY, secrets, None, warn):
        table.setdefault(digest(secret.reveal().encode()), Caller("primary", PRIMARY, "admin"))
    if not table:
        warn(f"nobody can call: there is no key under 'users' and no secret '{PRIMARY}'")
    return table


def _digests(
    known: bytes | None, credential: str | None, secrets: Secrets, where: str, warn: Callable[[str], None]
) -> list[bytes]:
    if known is not None:
        return [known]
    assert credential is not None  # the schema demands one of the two
    return [digest(secret.reveal().encode()) for secret in _secret(credential, secrets, where, warn)]


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
