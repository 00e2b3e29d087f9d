"""Providers, models, the configuration, and why a request would go where."""

from __future__ import annotations

from gproxyd.admin import settings
from gproxyd.admin.house import Call, as_json, page
from gproxyd.admin.people import PRIMARY, find
from gproxyd.errors import Refusal
from gproxyd.store import people
from gproxyd.store.errors import StoreError
from gproxyd.types import Answer


async def providers(call: Call) -> Answer:
    return page(call.house.providers(), call.query.cursor, call.query.limit)


async def models(call: Call) -> Answer:
    return page(call.house.models(), call.query.cursor, call.query.limit)


async def refresh_models(call: Call) -> Answer:
    told = await call.house.refresh_models()
    return as_json({**told, "audited": await _audited(call, "refresh_models")})


async def reload(call: Call) -> Answer:
    """A configuration with problems changes nothing: 409, with all of them."""
    if problems := await call.house.reload():
        await _audited(call, "reload_refused")
        raise Refusal("conflict", f"the running configuration stays, because of the new one: {'; '.join(problems)}")
    return as_json({"reloaded": True, "audited": await _audited(call, "reload")})


async def _audited(call: Call, what: str) -> bool:
    """Whether a line in the audit trail could be written. A reload may be what brings the database back."""
    if call.house.database is None:
        return False
    try:
        await people.write_audit(call.house.database, call.question.who, what, "", {})
    except StoreError:
        return False
    return True


async def config(call: Call) -> Answer:
    return as_json(settings.shown(call.house.config))


async def explain(call: Call) -> Answer:
    asked = call.body
    if asked.user not in (None, PRIMARY):
        find(call.house, asked.user)
    return as_json(call.house.explain(asked.model, asked.user, asked.endpoint))
