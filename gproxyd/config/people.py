"""Who may call: users, their keys, and what both may do, how often and for how much money.

What narrows a key (`models`, `endpoints`, `agents`) is None where it does not narrow; a list without entries is
refused, because some would read it as "nothing" and others as "everything".
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from gproxyd.config import fields
from gproxyd.config.fields import Items, NanoUsd, Some
from gproxyd.config.section import Section

Role = Literal["admin", "user", "read-only"]
Count = Annotated[int, Field(ge=0, le=10**12)]
"""How many of something are allowed; 0 = any number."""


class RateLimit(Section):
    """A limit for the models that `model` matches: requests per minute and day, tokens per minute, requests at once."""

    model: fields.ModelGlob = "*"
    rpm: Count = 0
    rpd: Count = 0
    tpm: Count = 0
    concurrency: Count = 0


class Quota(Section):
    """Money that may be spent, in nano-dollars: once and for all (None), or in every day or month of UTC."""

    usd: NanoUsd
    period: Literal["day", "month"] | None = None


class UserKey(Section):
    """A key of a user: exactly one of `credential` (the name of a secret), `sha256` and `token` is set.

    `models`, `endpoints` and `agents` narrow the key below its user, `rate_limits` and `budget` hold beside the
    user's own.
    """

    credential: fields.SecretName | None = None
    sha256: fields.Digest | None = Field(default=None, repr=False)
    token: fields.Token | None = Field(default=None, repr=False)
    enabled: bool = True
    expires_at: fields.Time | None = None
    models: Some[fields.ModelGlob] | None = None
    endpoints: Some[fields.EndpointGlob] | None = None
    agents: Some[fields.AgentName] | None = None
    rate_limits: Annotated[tuple[RateLimit, ...], Items] = ()
    budget: Quota | None = None

    @property
    def digest(self) -> bytes | None:
        """The SHA-256 of the key (32 bytes); None when it stands in the secret `credential`."""
        return self.sha256 or self.token

    def expired(self, now: datetime) -> bool:
        """Whether the key has run out at `now` (an aware datetime)."""
        return self.expires_at is not None and now >= self.expires_at


class User(Section):
    """A person or program that calls the gateway, and the keys it holds, by name.

    `permissions` are globs over the name that a client sends as its model; none means no model, except for an admin,
    who may call them all.
    """

    role: Role = "user"
    permissions: Annotated[tuple[fields.ModelGlob, ...], Items] = ()
    rate_limits: Annotated[tuple[RateLimit, ...], Items] = ()
    quota: Quota | None = None
    keys: Annotated[Mapping[fields.KeyName, UserKey], fields.Section] = Field(default_factory=dict)
