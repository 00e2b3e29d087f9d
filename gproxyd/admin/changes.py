"""Users and keys are made, changed and deleted, one change at a time.

Invariants: when a change is answered it holds: a key that was revoked is refused from the next request on; a new key's
secret is in the answer that made it and nowhere else; each change concerns the one user or key that its path names.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from gproxyd.admin import views
from gproxyd.admin.forms import KeyForm, KeyPatch, Money, UserForm, UserPatch
from gproxyd.admin.house import Call, House, as_json, database_of
from gproxyd.admin.people import Person, account_of, changeable, everybody, find, key_of, plain_limits
from gproxyd.config.section import Section
from gproxyd.errors import Refusal
from gproxyd.policy.callers import digest
from gproxyd.store import people, reports
from gproxyd.store.errors import StoreError
from gproxyd.types import Answer

T = TypeVar("T")


def new_token() -> str:
    """A key that nobody guesses: "gp-" and 256 random bits."""
    return "gp-" + secrets.token_urlsafe(32)


async def last_used(house: House) -> views.LastUsed:
    return {} if house.database is None else await reports.last_used(house.database)


async def list_users(call: Call) -> Answer:
    """The cursor is the name of the last one, so that nobody is skipped when others come and go."""
    found = everybody(call.house)
    after, limit = call.query.cursor or "", call.query.limit
    names = [name for name in found if name > after]
    used = await last_used(call.house)
    rows = [views.user(found[name], call.house.quotas, used) for name in names[:limit]]
    return as_json({"data": rows, "next": names[limit - 1] if len(names) > limit else None})


async def show_user(call: Call) -> Answer:
    return await _user(call.house, call.names[0])


async def _user(house: House, name: str) -> Answer:
    used = await last_used(house)
    return as_json(views.user(find(house, name), house.quotas, used))


async def create_user(call: Call) -> Answer:
    form: UserForm = call.body
    house = call.house
    _no_name_twice(form.keys)
    if form.name in house.config.users:
        raise Refusal("conflict", "a user of that name stands in the configuration files", param="name")
    tokens = {key.name: new_token() for key in form.keys}
    made = people.StoredUser(
        form.name,
        keys={key.name: _key(key, tokens[key.name]) for key in form.keys},
        **_fields(form),
    )
    made = await _changed(house, people.create_user(database_of(house), made, who=call.question.who))
    view = views.user(Person(made, "database"), house.quotas, {})
    for key in view["keys"]:
        key["token"] = tokens[key["name"]]
    return as_json(view, 201)


def _no_name_twice(keys: Iterable[KeyForm]) -> None:
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise Refusal("invalid_request", "'keys' holds two of the same name", param="keys")


async def change_user(call: Call) -> Answer:
    form: UserPatch = call.body
    return await _update_user(call, _given(form))


async def put_permissions(call: Call) -> Answer:
    return await _update_user(call, _fields(call.body))


async def put_rate_limits(call: Call) -> Answer:
    return await _update_user(call, _fields(call.body))


async def _update_user(call: Call, changes: dict[str, Any]) -> Answer:
    house, (name,) = call.house, call.names
    changeable(house, name)
    database = database_of(house)
    await _changed(house, people.update_user(database, name, changes, who=call.question.who))
    return await _user(house, name)


async def delete_user(call: Call) -> Answer:
    house, (name,) = call.house, call.names
    changeable(house, name)
    await _changed(house, people.delete_user(database_of(house), name, who=call.question.who))
    return as_json({"name": name, "deleted": True})


async def show_quota(call: Call) -> Answer:
    return _quota(call.house, call.names[0])


def _quota(house: House, name: str) -> Answer:
    return as_json(views.quota(find(house, name).user, house.quotas))


async def put_quota(call: Call) -> Answer:
    await _update_user(call, _money("quota", call.body))
    return _quota(call.house, call.names[0])


async def top_up(call: Call) -> Answer:
    """Credit for users of the files, too: it is money, not configuration."""
    house, (name,) = call.house, call.names
    user = find(house, name).user
    if user.quota_nano is None:
        raise Refusal("conflict", f"the user '{name}' has no quota, so there is nothing to add to")
    account = account_of(house.quotas, user)
    await people.top_up(database_of(house), account.name, call.body.usd, who=call.question.who)
    # Anew: in the meantime the files may have been read again.
    house.quotas.add_credit(account_of(house.quotas, find(house, name).user).name, call.body.usd)
    return _quota(house, name)


async def create_key(call: Call) -> Answer:
    form: KeyForm = call.body
    house, (name,) = call.house, call.names
    changeable(house, name)
    token = new_token()
    work = people.create_key(database_of(house), name, _key(form, token), who=call.question.who)
    made = await _changed(house, work)
    view = views.key(find(house, name).user, made, house.quotas, {})
    return as_json({"name": made.name, "token": token, **view}, 201)


async def change_key(call: Call) -> Answer:
    form: KeyPatch = call.body
    house, (name, key) = call.house, call.names
    key_of(changeable(house, name), key)
    work = people.update_key(database_of(house), name, key, _given(form), who=call.question.who)
    await _changed(house, work)
    user = find(house, name).user
    return as_json(views.key(user, key_of(user, key), house.quotas, await last_used(house)))


async def delete_key(call: Call) -> Answer:
    house, (name, key) = call.house, call.names
    key_of(changeable(house, name), key)
    await _changed(house, people.delete_key(database_of(house), name, key, who=call.question.who))
    return as_json({"name": key, "deleted": True})


async def _changed(house: House, work: Awaitable[T]) -> T:
    """Takes the change up, and after one that failed what the database knows: it may know better than we do."""
    try:
        done = await work
    except StoreError:
        with suppress(StoreError):  # the first error says it all
            await house.people_changed()
        raise
    try:
        await house.people_changed()
    except StoreError as error:
        text = f"the change is stored, but does not hold yet, because the database could not be read: {error}"
        raise Refusal("overloaded", text) from error
    return done


def _key(form: KeyForm, token: str) -> people.StoredKey:
    return people.StoredKey(form.name, digest(token.encode()), **_fields(form))


def _fields(form: Section, names: Iterable[str] | None = None) -> dict[str, Any]:
    """A form as columns of the database, all of it or only the members of those names."""
    columns: dict[str, Any] = {}
    for name in type(form).model_fields if names is None else names:
        value = getattr(form, name)
        if name in ("quota", "budget"):
            columns |= _money(name, value)
        elif name == "rate_limits":
            columns[name] = plain_limits(value)
        elif name == "expires_at":
            columns[name] = value.timestamp() if value else None
        elif name not in ("name", "keys"):
            columns[name] = value
    return columns


def _given(form: Section) -> dict[str, Any]:
    """What a patch names. Raises Refusal (400) where that is nothing."""
    if not form.model_fields_set:
        known = ", ".join(type(form).model_fields)
        raise Refusal("invalid_request", f"the body changes nothing; it may hold {known}")
    return _fields(form, form.model_fields_set)


def _money(name: str, value: Money | None) -> dict[str, Any]:
    if value is None or value.usd is None:
        return {f"{name}_nano": None, f"{name}_period": None}
    return {f"{name}_nano": value.usd, f"{name}_period": value.period}
