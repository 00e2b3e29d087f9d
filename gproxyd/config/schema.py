"""The shape of the configuration: every key, its type and its default.

Strict and frozen: no value is coerced, no unknown key is passed over. Durations are held as float seconds, sizes as
int bytes, money as int nano-dollars, times as datetime in UTC, keys of callers as SHA-256 digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gproxyd.config import fields
from gproxyd.config.addresses import ListenAddress
from gproxyd.config.fields import Duration, Items, NanoUsd, ProviderRef, Size, Timeout, Url
from gproxyd.types import DialectName

Auth = Literal["none", "bearer", "x-api-key", "x-goog-api-key", "api-key"]
"""How a provider's key is sent: not at all, as `Authorization: Bearer`, or in the header of that name."""
Role = Literal["admin", "user", "read-only"]
Tokens = Annotated[int, Field(ge=1, le=10**9)]


class Section(BaseModel):
    """A mapping with known keys; a heading with nothing under it means the defaults."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value


class Server(Section):
    """Sockets and what passes through them. `max_body`, `max_bodies`, `max_upload` in bytes, `drain` in seconds."""

    listen: Annotated[tuple[fields.Listen, ...], Items] = (ListenAddress("127.0.0.1", 8787),)
    ops_listen: Annotated[tuple[fields.Listen, ...], Items] = ()
    max_body: Size = 64 * 2**20
    max_bodies: Size = 2**30
    max_upload: Size = 2 * 2**30
    max_connections: Annotated[int, Field(ge=1)] = 10_000
    max_connections_per_address: Annotated[int, Field(ge=1)] = 1024
    drain: Duration = 600.0
    trusted_proxies: Annotated[tuple[fields.Network, ...], Items] = ()


class Log(Section):
    """What is told to the operator, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class Chat(Section):
    """Chat completions."""

    default_stream: bool = False


class Streams(Section):
    """Streamed replies. `keepalive` in seconds, 0.0 = off."""

    keepalive: Duration = 15.0


class Endpoints(Section):
    """The provider that serves requests which name no model, by kind of endpoint."""

    files: ProviderRef | None = None
    batches: ProviderRef | None = None
    images: ProviderRef | None = None
    audio: ProviderRef | None = None
    embeddings: ProviderRef | None = None
    moderations: ProviderRef | None = None
    rerank: ProviderRef | None = None
    completions: ProviderRef | None = None
    responses: ProviderRef | None = None
    a2a: ProviderRef | None = None


class Price(Section):
    """Nano-dollars per million tokens; None = unknown."""

    input: NanoUsd | None = None
    output: NanoUsd | None = None
    cache_read: NanoUsd | None = None
    cache_write: NanoUsd | None = None
    cache_write_1h: NanoUsd | None = None


class Model(Section):
    """A model of a provider; `context` and `max_output` in tokens, None = unknown."""

    id: fields.ModelId
    context: Tokens | None = None
    max_output: Tokens | None = None
    price: Price | None = None


class Timeouts(Section):
    """Seconds until an attempt is given up: to connect, to the first byte of the reply, between two bytes."""

    connect: Timeout = 10.0
    first_byte: Timeout = 300.0
    idle: Timeout = 300.0


class Provider(Section):
    """An upstream. `vendor` and `credentials` default to the provider's own name, `auth` None to the vendor's way."""

    vendor: fields.VendorName
    base_url: Url | None = None
    dialects: Annotated[Mapping[DialectName, Url], fields.Section] = Field(default_factory=dict)
    auth: Auth | None = None
    credentials: Annotated[tuple[fields.SecretName, ...], Items]
    models: Annotated[tuple[Model, ...], Items] = ()
    timeouts: Timeouts = Timeouts()
    # Not in repr: administrators do put keys of observability vendors here.
    headers: Annotated[Mapping[fields.HeaderName, fields.HeaderValue], fields.Section] = Field(
        default_factory=dict, repr=False
    )
    proxy: fields.ProxyUrl | None = None


class UserKey(Section):
    """A key of a user: exactly one of `credential` (the name of a secret), `sha256` and `token` is set."""

    credential: fields.SecretName | None = None
    sha256: fields.Digest | None = Field(default=None, repr=False)
    token: fields.Token | None = Field(default=None, repr=False)
    enabled: bool = True
    expires_at: fields.Time | None = None

    @property
    def digest(self) -> bytes | None:
        """The SHA-256 of the key (32 bytes); None when it stands in the secret `credential`."""
        return self.sha256 or self.token

    def expired(self, now: datetime) -> bool:
        """Whether the key has run out at `now` (an aware datetime)."""
        return self.expires_at is not None and now >= self.expires_at


class User(Section):
    """A person or program that calls the gateway, and the keys it holds, by name."""

    role: Role = "user"
    keys: Annotated[Mapping[fields.KeyName, UserKey], fields.Section] = Field(default_factory=dict)


def _defaults(provider: str) -> dict[str, Any]:
    # A wrong name is told once, as the name of the provider.
    return {"vendor": provider, "credentials": [provider] if fields.PROVIDER_NAME.fullmatch(provider) else []}


# Sections that a later version gives a meaning: accepted and warned of, without effect. Only such of which nobody is
# safer or poorer: what limits, forbids or hides something stays unknown until it does so.


class State(Section):
    """Where people and the ledger are kept."""

    database: str | None = None


class Records(Section):
    """What is kept of requests, and for how long (seconds)."""

    enable_usage: bool = True
    enable_upstream_log: bool = False
    enable_downstream_log: bool = False
    enable_upstream_log_body: bool = False
    enable_downstream_log_body: bool = False
    usage_keep: Duration = 400 * 86400.0
    log_keep: Duration = 7 * 86400.0


class Debug(Section):
    """Profiling."""

    pprof_enabled: bool = False


class Discovery(Section):
    """Asking vendors for their models, every so many seconds."""

    enabled: bool = True
    interval: Timeout = 3600.0


LATER = ("state", "records", "debug", "discovery")


class Config(Section):
    """The whole configuration."""

    server: Server = Server()
    log: Log = Log()
    chat: Chat = Chat()
    streams: Streams = Streams()
    endpoints: Endpoints = Endpoints()
    providers: Annotated[Mapping[fields.ProviderName, Provider], fields.Section] = Field(default_factory=dict)
    aliases: Annotated[Mapping[fields.AliasName, fields.ModelTarget], fields.Section] = Field(default_factory=dict)
    users: Annotated[Mapping[fields.UserName, User], fields.Section] = Field(default_factory=dict)
    state: State = State()
    records: Records = Records()
    debug: Debug = Debug()
    discovery: Discovery = Discovery()

    @model_validator(mode="before")
    @classmethod
    def _named_after_provider(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("providers"), dict):
            return value
        filled = {
            name: _defaults(name) | (body or {}) if isinstance(body, dict | None) else body
            for name, body in value["providers"].items()
        }
        return value | {"providers": filled}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed and yet unwise, one sentence each."""
        plain = tuple(
            f"users.{user}.keys.{key}: the key stands in the configuration in plain text; use `credential` or `sha256`"
            for user, account in self.users.items()
            for key, held in account.keys.items()
            if held.token is not None
        )
        later = tuple(
            f"{name}: the section belongs to a later version and has no effect in this one"
            for name in LATER
            if getattr(self, name) != type(self).model_fields[name].default
        )
        return plain + later
