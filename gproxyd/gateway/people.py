"""Everybody who may call, from the files and from the database, as one table.

A Member is one key of one person, whichever place it comes from: what differs there ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gproxyd.config import Config, Quota, RateLimit
from gproxyd.policy.callers import Caller, Callers, Role, digest, permissions_of
from gproxyd.policy.limits import Rule
from gproxyd.policy.permissions import Globs, globs
from gproxyd.policy.quotas import Account, Period, Quotas
from gproxyd.routing.credentials import Key
from gproxyd.store.people import StoredUser

PRIMARY = "client-token"
"""The secret that, if it exists, is the key of an implicit admin `primary`."""

AT_ONCE = 200
"""Callers that are made in one turn of the loop: some milliseconds."""

Find = Callable[[str, str | None], Sequence[Key]]
"""The keys of a secret; where it was named, None for one that need not be."""


class Budget(NamedTuple):
    """An account in the making: "user:alice" or "key:alice/laptop", nano-dollars or None, day, month or None."""

    name: str
    limit: int | None
    period: Period | None


class Member(NamedTuple):
    """One key. `digest` is its SHA-256; lists that are None narrow nothing."""

    digest: bytes
    user: str
    key: str
    role: Role
    enabled: bool = True
    expires_at: float | None = None
    permissions: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] | None = None
    agents: tuple[str, ...] | None = None
    rules: tuple[Rule, ...] = ()
    budgets: tuple[Budget, ...] = ()


def of_files(config: Config, find: Find, warn: Callable[[str], None]) -> list[Member]:
    """The people of the configuration, and the built-in administrator."""
    members: list[Member] = []
    owners: dict[bytes, str] = {}
    for user, account in config.users.items():
        rules = _rules(f"user:{user}", [_plain(limit) for limit in account.rate_limits])
        budget = _budget(f"user:{user}", account.quota)
        for key, held in account.keys.items():
            where, owner = f"users.{user}.keys.{key}", f"key:{user}/{key}"
            if held.digest is not None:
                digests = [held.digest]
            else:
                assert held.credential is not None  # the schema demands one of the two
                digests = [digest(secret.reveal().encode()) for secret in find(held.credential, where)]
            for one in digests:
                if (known := owners.setdefault(one, f"{user}/{key}")) != f"{user}/{key}":
                    warn(f"{where}: the same key belongs to {known} already")
                    continue
                members.append(
                    Member(
                        digest=one,
                        user=user,
                        key=key,
                        role=account.role,
                        enabled=held.enabled,
                        expires_at=held.expires_at.timestamp() if held.expires_at else None,
                        permissions=account.permissions,
                        models=held.models,
                        endpoints=held.endpoints,
                        agents=held.agents,
                        rules=rules + _rules(owner, [_plain(limit) for limit in held.rate_limits]),
                        budgets=(budget, *([_budget(owner, held.budget)] if held.budget else ())),
                    )
                )
    for secret in find(PRIMARY, None):
        own = digest(secret.reveal().encode())
        if own not in owners:
            members.append(Member(own, "primary", PRIMARY, "admin", budgets=(Budget("user:primary", None, None),)))
    return members


def of_database(stored: Mapping[str, StoredUser]) -> Iterator[Member]:
    """The people that were made through the admin API."""
    for user, account in stored.items():
        rules = _rules(f"user:{user}", account.rate_limits)
        budget = _stored_budget(account)
        for key, held in account.keys.items():
            owner = f"key:{user}/{key}"
            own = Budget(owner, held.budget_nano, held.budget_period)  # type: ignore[arg-type]
            yield Member(
                held.digest,
                user,
                key,
                account.role,  # type: ignore[arg-type]
                held.enabled,
                held.expires_at,
                account.permissions,
                held.models,
                held.endpoints,
                held.agents,
                rules + _rules(owner, held.rate_limits) if held.rate_limits else rules,
                (budget,) if held.budget_nano is None else (budget, own),
            )


def budgets_of_files(config: Config) -> Iterator[Budget]:
    return (_budget(f"user:{user}", account.quota) for user, account in config.users.items())


def budgets_of_database(stored: Mapping[str, StoredUser]) -> Iterator[Budget]:
    return (_stored_budget(account) for account in stored.values())


def _stored_budget(user: StoredUser) -> Budget:
    return Budget(f"user:{user.name}", user.quota_nano, user.quota_period)  # type: ignore[arg-type]


def table(members: Iterable[Member], quotas: Quotas) -> Generator[None, None, Callers]:
    """The callers by the digest of their key; of two with the same key the first is believed.

    Yields again and again, so that the making of a long table holds nobody up.
    """
    callers: dict[bytes, Caller] = {}
    accounts: dict[tuple[Budget, ...], tuple[Account, ...]] = {}
    for member in members:
        if member.digest in callers:
            continue
        held = accounts.get(member.budgets)
        if held is None:
            held = accounts[member.budgets] = tuple(quotas.account(*budget) for budget in member.budgets)
        callers[member.digest] = Caller(
            user=member.user,
            key=member.key,
            role=member.role,
            enabled=member.enabled,
            expires_at=member.expires_at,
            permissions=permissions_of(member.role, member.permissions, member.models),
            endpoints=_globs(member.endpoints),
            agents=member.agents,
            rules=member.rules,
            accounts=held,
        )
        if len(callers) % AT_ONCE == 0:
            yield
    return callers


def _globs(patterns: tuple[str, ...] | None) -> Globs | None:
    return None if patterns is None else globs(patterns)


def _plain(limit: RateLimit) -> Mapping[str, Any]:
    return {name: getattr(limit, name) for name in _LIMIT}


_LIMIT = tuple(RateLimit.model_fields)


def _rules(owner: str, limits: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    return tuple(Rule(owner, **limit) for limit in limits)


def _budget(name: str, quota: Quota | None) -> Budget:
    """Every user has an account: what is spent is counted, limit or not."""
    return Budget(name, None, None) if quota is None else Budget(name, quota.usd, quota.period)
