"""Callers: the table of keys, which key a request presents, and what its caller may do.

Invariants: the table is immutable and holds digests only; a key is looked up by the SHA-256 of all its bytes, so a
refusal takes the same time and says the same words whether the key is missing, unknown, disabled or expired; a key
that has expired stays so while the process lives, whatever its clock does. No refusal repeats what the client sent.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gproxyd.errors import Refusal
from gproxyd.policy.limits import Rule
from gproxyd.policy.permissions import Globs, Permissions
from gproxyd.policy.quotas import Account
from gproxyd.wire.headers import Headers

Role = Literal["admin", "user", "read-only"]


@dataclass(frozen=True, slots=True)
class Caller:
    """A key of a user, and all that holds for it.

    expires_at   seconds since the epoch; None = never
    permissions  the models it may name; None = all for an admin, none for others
    endpoints    globs over "METHOD /path"; None = all
    agents       nothing but these agents; None = not narrowed
    rules        the user's rate limits and the key's own
    accounts     the user's money and the key's own
    """

    user: str
    key: str
    role: Role
    enabled: bool = True
    expires_at: float | None = None
    permissions: Permissions | None = None
    endpoints: Globs | None = None
    agents: tuple[str, ...] | None = None
    rules: tuple[Rule, ...] = ()
    accounts: tuple[Account, ...] = ()

    @property
    def name(self) -> str:
        """What the log calls it: never the key itself."""
        return f"{self.user}/{self.key}"

    def may_model(self, name: str) -> bool:
        """Whether it may call the model, alias or agent of that name: the name that the client sent."""
        if self.agents is not None and name not in self.agents:
            return False
        return self.role == "admin" if self.permissions is None else self.permissions.may(name)

    def may_provider(self, provider: str) -> bool:
        """Whether it may send a provider what names no model."""
        if self.agents is not None:
            return False
        return self.role == "admin" if self.permissions is None else self.permissions.covers_provider(provider)


def permissions_of(role: Role, globs: Sequence[str], models: Sequence[str] | None) -> Permissions:
    """What a key may name: its user's globs (an admin's are `*`), narrowed to `models` where the key is."""
    return Permissions(("*",) if role == "admin" else globs, models)


Callers = Mapping[bytes, Caller]
"""SHA-256 of a key -> its caller."""


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


_PLACES = (b"authorization", b"x-api-key", b"x-goog-api-key")


def presented_key(headers: Headers, query_keys: Sequence[bytes]) -> bytes | None:
    """The key that a request presents: the first place that is present decides, even if what it holds is no key.

    Raises Refusal (400) if that place is there twice: two readers could take two different callers from it.
    """
    found = [place for place in _PLACES if place in headers]
    for place in found:
        if len(headers.all(place)) > 1:
            raise Refusal("invalid_request", f"the header {place.decode()} must not be there twice", close=True)
    if found:
        value = headers[found[0]]
        return _bearer(value) if found[0] == b"authorization" else value
    if len(query_keys) > 1:
        raise Refusal("invalid_request", "the parameter 'key' must not be there twice", close=True)
    return query_keys[0] if query_keys else None


def _bearer(value: bytes) -> bytes | None:
    """RFC 6750 section 2.1; the scheme's case does not matter (RFC 9110 section 11.1)."""
    scheme, _, key = value.partition(b" ")
    return key.strip(b" ") if scheme.lower() == b"bearer" else None


class Expiry:
    """Which keys have expired: by the wall clock, or by the time that has gone by since the process began.

    So a wall clock that is set back makes no key younger. One that leaps ahead and returns does no harm to keys that
    nobody used meanwhile; those that were refused stay refused. What is remembered is bounded by the keys that there
    are: a key that is given another date is looked at anew.
    """

    def __init__(self, wall: Callable[[], float], now: Callable[[], float]) -> None:
        self._wall = wall
        self._now = now
        self._began = wall() - now()
        self._expired: set[tuple[bytes, float]] = set()

    def expired(self, key: bytes, at: float) -> bool:
        """Whether the key of that digest has expired, which it does at `at` (seconds since the epoch)."""
        if (key, at) in self._expired:
            return True
        if max(self._wall(), self._began + self._now()) < at:
            return False
        self._expired.add((key, at))
        return True


_EXPIRY = Expiry(lambda: time.time(), lambda: time.monotonic())


def authenticate(callers: Callers, key: bytes | None, expiry: Expiry = _EXPIRY) -> Caller:
    """The caller of a key. Raises Refusal (401), one message for missing, unknown, disabled and expired."""
    presented = digest(key or b"")
    caller = callers.get(presented)
    if (
        caller is None
        or not caller.enabled
        or not key
        or (caller.expires_at is not None and expiry.expired(presented, caller.expires_at))
    ):
        raise Refusal("unauthorized", "a valid API key is required", headers={"WWW-Authenticate": "Bearer"})
    return caller


def authorise_method(caller: Caller, method: str) -> None:
    """Raises Refusal (403) where the caller's role does not cover the method."""
    if caller.role == "read-only" and method not in ("GET", "HEAD"):
        raise Refusal("forbidden_endpoint", "a read-only key may use GET and HEAD only")


def authorise_endpoint(caller: Caller, method: str, path: str) -> None:
    """Raises Refusal (403) where the key is narrowed to other endpoints. `path` as received, without its query.

    HEAD is allowed where GET is: it asks for less of the same.
    """
    endpoints = caller.endpoints
    if endpoints is None or endpoints.match(f"{method} {path}"):
        return
    if method != "HEAD" or not endpoints.match(f"GET {path}"):
        raise Refusal("forbidden_endpoint", "this key may not use that endpoint")


def authorise_model(caller: Caller, name: str) -> None:
    """Raises Refusal (403) where the caller may not call what bears that name, exactly as the client sent it."""
    if not caller.may_model(name):
        raise Refusal("forbidden_model", "this key may not call that model", param="model")


def authorise_provider(caller: Caller, provider: str) -> None:
    """Raises Refusal (403) where the caller may not send a provider what names no model."""
    if not caller.may_provider(provider):
        raise Refusal("forbidden_model", "without naming a model, this key may not call that provider")


def authorise_agent(caller: Caller, name: str) -> None:
    """Raises Refusal (403) where the caller may not call the agent of that name."""
    if not caller.may_model(name):
        raise Refusal("forbidden_agent", "this key may not call that agent")
