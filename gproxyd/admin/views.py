"""How users, keys, money and records look as JSON: times as RFC 3339, money as decimal strings.

Invariant: every member is named here. What a key is, its digest or a part of either is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gproxyd.admin.people import Person, account_of, key_account_of
from gproxyd.policy.quotas import Account, Quotas
from gproxyd.store.people import AuditLine, StoredKey, StoredUser
from gproxyd.store.reports import Grouped
from gproxyd.types import UsageRecord
from gproxyd.units import format_usd

LastUsed = Mapping[str, float]
"""When each key ("alice/laptop") was last used, in seconds since the epoch."""

_LAST = 253_402_300_799.999
"""The end of the year 9999, after which there is no date."""


def moment(at: float | None) -> str | None:
    """`2027-01-15T12:00:00Z`, with milliseconds where there are any."""
    if at is None:
        return None
    text = datetime.fromtimestamp(min(round(at, 3), _LAST), UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00").removesuffix(".000") + "Z"


def usd(nano: int | None) -> str | None:
    return None if nano is None else format_usd(nano)


def user(person: Person, quotas: Quotas, used: LastUsed) -> dict[str, Any]:
    stored = person.user
    return {
        "name": stored.name,
        "role": stored.role,
        "source": person.source,
        "permissions": stored.permissions,
        "rate_limits": stored.rate_limits,
        "quota": quota(stored, quotas),
        "keys": [key(stored, one, quotas, used) for one in stored.keys.values()],
        "created_at": moment(stored.created_at or None),
    }


def key(owner: StoredUser, held: StoredKey, quotas: Quotas, used: LastUsed) -> dict[str, Any]:
    return {
        "name": held.name,
        "enabled": held.enabled,
        "expires_at": moment(held.expires_at),
        "last_used_at": moment(used.get(f"{owner.name}/{held.name}")),
        "models": held.models,
        "endpoints": held.endpoints,
        "agents": held.agents,
        "rate_limits": held.rate_limits,
        "budget": None if held.budget_nano is None else money(quotas, key_account_of(quotas, owner, held)),
        "created_at": moment(held.created_at or None),
    }


def quota(stored: StoredUser, quotas: Quotas) -> dict[str, Any]:
    """`usd` is None where nothing limits; what was spent is told all the same."""
    return money(quotas, account_of(quotas, stored))


def money(quotas: Quotas, account: Account) -> dict[str, Any]:
    spent = quotas.spent(account)  # first: it turns the account to the present period
    return {
        "usd": usd(account.limit),
        "spent_usd": usd(spent),
        "period": account.period,
        "credit_usd": usd(account.credit),
        "remaining_usd": usd(account.remaining()),
    }


def record(one: UsageRecord) -> dict[str, Any]:
    """All its fields; the cost as nano-dollars and as dollars."""
    told = one._asdict()
    told["at"] = moment(one.at)
    return told | {"cost_usd": usd(one.cost_nanousd)}


RECORD = (*UsageRecord._fields, "cost_usd")
"""The members of a record, in their order."""


def grouped(row: Grouped) -> dict[str, Any]:
    told = row._asdict()
    return told | {"cost_usd": usd(told.pop("cost_nanousd"))}


GROUPED = (*(name for name in Grouped._fields if name != "cost_nanousd"), "cost_usd")


def audit(line: AuditLine) -> dict[str, Any]:
    return {
        "at": moment(line.at),
        "who": line.who,
        "what": line.what,
        "target": line.target,
        "detail": dict(_told(name, value) for name, value in line.detail.items()),
    }


def _told(name: str, value: Any) -> tuple[str, Any]:
    """A field of the database in the units of the outside."""
    if name == "nano" or name.endswith("_nano"):
        return f"{name.removesuffix('nano')}usd", usd(value)
    return name, moment(value) if name in ("expires_at", "created_at") else value
