"""What callers may know of themselves: their user, the key that they came with, their usage, what is left of it all."""

from __future__ import annotations

from typing import Any

from gproxyd.admin import views
from gproxyd.admin.changes import last_used
from gproxyd.admin.house import Call, as_json
from gproxyd.admin.people import Person, asker
from gproxyd.admin.usage import own_usage
from gproxyd.policy.limits import Limiter, Rule
from gproxyd.policy.standing import Room
from gproxyd.store.people import Json, StoredKey
from gproxyd.types import Answer, Question


async def me(call: Call) -> Answer:
    """The user, with no other key than the caller's own."""
    person = asker(call.house, call.question)
    told = views.user(person, call.house.quotas, await last_used(call.house))
    return as_json(told | {"keys": [key for key in told["keys"] if key["name"] == call.question.key]})


async def usage(call: Call) -> Answer:
    return await own_usage(call, asker(call.house, call.question).user.name)


async def quota(call: Call) -> Answer:
    """The user's money; beside it the key's own, and what is left of the rate limits of both."""
    house = call.house
    person = asker(house, call.question)
    key = _own_key(person, call.question)
    told = views.quota(person.user, house.quotas)
    own = views.key(person.user, key, house.quotas, {})["budget"] if key else None
    limits = [_standing(house.limiter, "user", f"user:{person.user.name}", one) for one in person.user.rate_limits]
    if key is not None:
        owner = f"key:{person.user.name}/{key.name}"
        limits += [_standing(house.limiter, "key", owner, one) for one in key.rate_limits]
    return as_json(told | {"key_budget": own, "rate_limits": limits})


def _own_key(person: Person, question: Question) -> StoredKey | None:
    return person.user.keys.get(question.key) if question.key is not None else None


def _standing(limiter: Limiter, sort: str, owner: str, limit: Json) -> dict[str, Any]:
    """What is left of one limit: of requests that of the minute or the day, whichever is tighter."""
    # Every glob matches its own text, so the rule is met by the name that it bears itself.
    standing = limiter.standing([Rule(owner, **limit)], limit["model"])
    return {
        "of": sort,
        "model": limit["model"],
        "requests": _room(standing.requests),
        "tokens": _room(standing.tokens),
    }


def _room(room: Room | None) -> dict[str, float] | None:
    if room is None:
        return None
    return {"limit": room.limit, "remaining": room.remaining, "reset_seconds": round(room.reset, 3)}
