"""Users and keys from the files and from the database, as one.

A user of the files is shown as the database would hold it, so that whoever looks need not know the difference; digests
are left out. Whoever changes does: `changeable` refuses what the database is not the home of.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from gproxyd.admin.house import House
from gproxyd.config import RateLimit, User, UserKey
from gproxyd.errors import Refusal
from gproxyd.policy.quotas import Account, Quotas
from gproxyd.store.people import StoredKey, StoredUser
from gproxyd.types import Question

PRIMARY = "primary"
"""The administrator whose key is a credential, and who stands in no list of users."""


class Person(NamedTuple):
    """`source` is "file" or "database"."""

    user: StoredUser
    source: str


def everybody(house: House) -> dict[str, Person]:
    """All users by name, in the order of their names."""
    found = {name: Person(user, "database") for name, user in house.stored.items()}
    found |= {name: Person(_of_file(name, user), "file") for name, user in house.config.users.items()}
    return dict(sorted(found.items()))


def find(house: House, name: str) -> Person:
    """The user of that name. Raises Refusal (404)."""
    if name in house.config.users:
        return Person(_of_file(name, house.config.users[name]), "file")
    if name in house.stored:
        return Person(house.stored[name], "database")
    raise Refusal("not_found", "there is no user of that name")


def changeable(house: House, name: str) -> StoredUser:
    """A user of the database. Raises Refusal (404, 409)."""
    if name == PRIMARY:
        raise Refusal("conflict", "'primary' is the administrator of the credential 'client-token'; change that file")
    found = find(house, name)
    if found.source == "file":
        raise Refusal("conflict", f"the user '{name}' stands in the configuration files; change it there and reload")
    return found.user


def key_of(user: StoredUser, name: str) -> StoredKey:
    """Raises Refusal (404)."""
    if name not in user.keys:
        raise Refusal("not_found", f"the user '{user.name}' has no key of that name")
    return user.keys[name]


def asker(house: House, question: Question) -> Person:
    """Who asks. Raises Refusal (404) for a local caller, who is nobody's user."""
    if question.user is None:
        raise Refusal("not_found", "you came without a key, so there is no user to tell about")
    if question.user == PRIMARY:
        return Person(StoredUser(PRIMARY, "admin"), "file")
    return find(house, question.user)


def still_admin(house: House, question: Question) -> bool:
    """Whether the caller, who was an administrator when the request began, still is one."""
    if question.user in (None, PRIMARY):
        return True
    try:
        user = asker(house, question).user
        key = key_of(user, question.key or "")
    except Refusal:
        return False
    return user.role == "admin" and key.enabled and (key.expires_at is None or time.time() < key.expires_at)


def account_of(quotas: Quotas, user: StoredUser) -> Account:
    return quotas.account(f"user:{user.name}", user.quota_nano, user.quota_period)  # type: ignore[arg-type]


def key_account_of(quotas: Quotas, user: StoredUser, key: StoredKey) -> Account:
    return quotas.account(f"key:{user.name}/{key.name}", key.budget_nano, key.budget_period)  # type: ignore[arg-type]


def plain_limits(limits: tuple[RateLimit, ...]) -> tuple[dict[str, str | int], ...]:
    """As the database holds them."""
    return tuple(limit.model_dump() for limit in limits)


def _of_file(name: str, user: User) -> StoredUser:
    return StoredUser(
        name,
        user.role,
        user.permissions,
        plain_limits(user.rate_limits),
        user.quota.usd if user.quota else None,
        user.quota.period if user.quota else None,
        keys={key: _key_of_file(key, held) for key, held in user.keys.items()},
    )


def _key_of_file(name: str, key: UserKey) -> StoredKey:
    return StoredKey(
        name,
        b"",
        key.enabled,
        key.expires_at.timestamp() if key.expires_at else None,
        key.models,
        key.agents,
        key.endpoints,
        plain_limits(key.rate_limits),
        key.budget.usd if key.budget else None,
        key.budget.period if key.budget else None,
    )
