"""The shape of the configuration: every key, its type and its default.

Strict and frozen: no value is coerced, no unknown key is passed over. Durations are held as float seconds, sizes as
int bytes, money as int nano-dollars, times as datetime in UTC, keys of callers as SHA-256 digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic import ValidationInfo as Info

from gproxyd.config import fields
from gproxyd.config.addresses import ListenAddress
from gproxyd.config.agents import Agent
from gproxyd.config.fields import Duration, Items, NanoUsd, ProviderRef, Size, Timeout, Url
from gproxyd.config.people import Count, User
from gproxyd.config.quirks import PathPart, Quirks
from gproxyd.config.section import Section
from gproxyd.types import DialectName

Auth = Literal["none", "bearer", "x-api-key", "x-goog-api-key", "api-key", "service-account"]
"""How a provider's key is sent: not at all, as `Authorization: Bearer`, in the header of that name, or as a token that
is fetched with it (the key of a Google service account)."""
Tokens = Annotated[int, Field(ge=1, le=10**9)]


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
    format: Literal["auto", "journal", "json", "text"] = "auto"


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


class Rates(Section):
    """Nano-dollars per million tokens; None = not given."""

    input: NanoUsd | None = None
    output: NanoUsd | None = None
    cache_read: NanoUsd | None = None
    cache_write: NanoUsd | None = None
    cache_write_1h: NanoUsd | None = None
    reasoning: NanoUsd | None = None


class Tier(Rates):
    """What a request costs whose prompt is longer than `tokens`; what is not given stays as it is below."""

    tokens: Tokens


class Price(Rates):
    """What a model costs; what is not given is unknown, save `reasoning`, which is then billed as `output`.

    `above` is in the order of rising `tokens`. `flex` and `priority` are for requests of that service tier, and what
    they do not give stays as it is without them.
    """

    above: Annotated[tuple[Tier, ...], Items] = ()
    flex: Rates | None = None
    priority: Rates | None = None


class Model(Section):
    """A model of a provider; `context` and `max_output` in tokens, None = unknown."""

    id: fields.ModelId
    context: Tokens | None = None
    max_output: Tokens | None = None
    price: Price | None = None


class Timeouts(Section):
    """Seconds until an attempt is given up: to connect, to the first byte of the reply, between two bytes, and
    between two bytes while a model thinks aloud."""

    connect: Timeout = 10.0
    first_byte: Timeout = 300.0
    idle: Timeout = 300.0
    reasoning_idle: Timeout = 600.0


class ProviderLimits(Section):
    """What may be sent to an upstream: requests and tokens per minute, requests at once; 0 = any number."""

    rpm: Count = 0
    tpm: Count = 0
    concurrency: Count = 0


class Provider(Section):
    """An upstream. `vendor` and `credentials` default to the provider's own name, `auth` None to the vendor's way.

    `project`, `location`, `api_version` and `deployments` (model -> deployment) are for vendors whose addresses have
    a place for them.
    """

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
    rate_limits: ProviderLimits = ProviderLimits()
    proxy: fields.ProxyUrl | None = None
    project: PathPart | None = None
    location: PathPart = "global"
    api_version: PathPart | None = None
    deployments: Annotated[Mapping[fields.ModelId, PathPart], fields.Section] = Field(default_factory=dict)
    quirks: Quirks = Quirks()


class Alias(Section):
    """Another name for a model; a text alone is the target. `price`, if set, counts instead of the model's own."""

    target: fields.ModelTarget
    price: Price | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any, info: Info) -> Any:
        return fields.target_alone(value, info)

    @property
    def provider(self) -> str:
        return self.target.provider

    @property
    def model(self) -> str:
        return self.target.model

    def __str__(self) -> str:
        return str(self.target)


def _defaults(provider: str) -> dict[str, Any]:
    # A wrong name is told once, as the name of the provider.
    return {"vendor": provider, "credentials": [provider] if fields.PROVIDER_NAME.fullmatch(provider) else []}


class State(Section):
    """Where people and the ledger are kept: a file of SQLite, None = `gproxyd.db` in the daemon's own place."""

    database: fields.Database | None = None

    def path(self, environ: Mapping[str, str]) -> Path:
        """The file: as configured, else in the first directory of `$STATE_DIRECTORY`, else in the working directory."""
        directory = environ.get("STATE_DIRECTORY", "").partition(":")[0]
        return self.database or Path(directory, "gproxyd.db")


class Records(Section):
    """What is kept of requests, and for how long (seconds)."""

    enable_usage: bool = True
    enable_upstream_log: bool = False
    enable_downstream_log: bool = False
    enable_upstream_log_body: bool = False
    enable_downstream_log_body: bool = False
    usage_keep: Duration = 400 * 86400.0
    log_keep: Duration = 7 * 86400.0


class Retries(Section):
    """Further attempts: at most `max` for a request, and for all together `budget` times the number of requests."""

    max: Annotated[int, Field(ge=0, le=10)] = 3
    budget: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.1


class Routing(Section):
    """How a request finds its target, and what becomes of it. `first_token_window` in seconds, 0.0 = off."""

    bare_models: Literal["reject", "catalog"] = "reject"
    on_disconnect: Literal["cancel", "drain"] = "cancel"
    first_token_window: Duration = 0.0
    retries: Retries = Retries()


class Breaker(Section):
    """A target that fails so many times in a row, or so large a share of the requests of so many seconds, is left
    alone for `open_for` seconds. A `rate` of 0 is never reached."""

    failures: Annotated[int, Field(ge=1, le=1_000_000)] = 5
    open_for: Timeout = 30.0
    rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    window: Timeout = 30.0


class Debug(Section):
    """Profiling."""

    pprof_enabled: bool = False


class Tracing(Section):
    """Spans of requests, for OpenTelemetry; `endpoint` None = none.

    `sample` is the part that is told of the requests whose callers have not decided that themselves.
    """

    endpoint: Url | None = None
    service: Annotated[str, Field(min_length=1, max_length=255)] = "gproxyd"
    sample: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    # Not in repr: they are where a collector's key goes.
    headers: Annotated[Mapping[fields.HeaderName, fields.HeaderValue], fields.Section] = Field(
        default_factory=dict, repr=False
    )


class Discovery(Section):
    """Asking vendors for their models, every so many seconds."""

    enabled: bool = True
    interval: Timeout = 3600.0


class Config(Section):
    """The whole configuration."""

    server: Server = Server()
    log: Log = Log()
    chat: Chat = Chat()
    streams: Streams = Streams()
    endpoints: Endpoints = Endpoints()
    providers: Annotated[Mapping[fields.ProviderName, Provider], fields.Section] = Field(default_factory=dict)
    aliases: Annotated[Mapping[fields.AliasName, Alias], fields.Section] = Field(default_factory=dict)
    agents: Annotated[Mapping[fields.AgentName, Agent], fields.Section] = Field(default_factory=dict)
    users: Annotated[Mapping[fields.UserName, User], fields.Section] = Field(default_factory=dict)
    state: State = State()
    records: Records = Records()
    routing: Routing = Routing()
    debug: Debug = Debug()
    tracing: Tracing = Tracing()
    breaker: Breaker = Breaker()
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
        return (*self._in_plain_text(), *self._without_permissions(), *self._without_effect())

    def _in_plain_text(self) -> Iterator[str]:
        for user, account in self.users.items():
            for key, held in account.keys.items():
                if held.token is not None:
                    yield (
                        f"users.{user}.keys.{key}: the key stands in the configuration in plain text; "
                        "use `credential` or `sha256`"
                    )

    def _without_permissions(self) -> Iterator[str]:
        for name, user in self.users.items():
            if user.role != "admin" and user.keys and not user.permissions:
                yield f"users.{name}: may call no model; give it `permissions`"
            elif user.role == "admin" and user.permissions:
                yield f"users.{name}: its `permissions` have no effect, because an admin may call every model"

    def _without_effect(self) -> Iterator[str]:
        for name, agent in self.agents.items():
            if agent.mcp:
                yield f"agents.{name}.mcp: the key belongs to a later version and has no effect in this one"
            if agent.force and agent.system_prompt is None:
                yield f"agents.{name}.force: has no effect without `system_prompt`"
