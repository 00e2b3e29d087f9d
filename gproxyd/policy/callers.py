"""Callers: the table of keys, and which key a request presents.

Invariants: the table is immutable and holds digests only; a key is looked up by the SHA-256 of all its bytes, so a
refusal takes the same time and says the same words whether the key is missing, unknown, disabled or expired.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gproxyd.errors import Refusal
from gproxyd.wire.headers import Headers

Role = Literal["admin", "user", "read-only"]


@dataclass(frozen=True, slots=True)
class Caller:
    """A key of a user. `expires_at` is in seconds since the epoch."""

    user: str
    key: str
    role: Role
    enabled: bool = True
    expires_at: float | None = None

    @property
    def name(self) -> str:
        """What the log calls it: never the key itself."""
        return f"{self.user}/{self.key}"


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


def authenticate(callers: Callers, key: bytes | None) -> Caller:
    """The caller of a key. Raises Refusal (401), one message for missing, unknown, disabled and expired."""
    caller = callers.get(digest(key or b""))
    if caller is None or not caller.enabled or not key or _expired(caller):
        raise Refusal("unauthorized", "a valid API key is required", headers={"WWW-Authenticate": "Bearer"})
    return caller


def _expired(caller: Caller) -> bool:
    return caller.expires_at is not None and time.time() >= caller.expires_at


def authorise_method(caller: Caller, method: str) -> None:
    """Raises Refusal (403) where the caller's role does not cover the method."""
    if caller.role == "read-only" and method not in ("GET", "HEAD"):
        raise Refusal("forbidden_endpoint", "a read-only key may use GET and HEAD only")
