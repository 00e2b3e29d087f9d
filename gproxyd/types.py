"""Names for shapes that several rooms share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Literal, NamedTuple

RawHeaders = Sequence[tuple[bytes, bytes]]
"""Header lines in wire order, names as spelled by the peer, values without surrounding white space."""

DialectName = Literal["openai_chat", "openai_responses", "anthropic", "gemini"]
"""The API families that a path or a provider's face can speak."""

Form = Literal["aggregated", "scoped", "raw", "local"]
"""How a request names its provider: by model, by path, by raw path, or not at all."""


class Origin(NamedTuple):
    """Where bytes go: scheme, host and port (RFC 6454). `host` is bare: no brackets around IPv6."""

    scheme: Literal["http", "https"]
    host: str
    port: int

    @property
    def authority(self) -> bytes:
        """The `Host` header: brackets around IPv6, the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return (host if self.port == default else f"{host}:{self.port}").encode("ascii")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority.decode('ascii')}"


class Question(NamedTuple):
    """A request to the gateway itself, admitted and read whole. `query` holds the last value of each parameter.

    `who` is what an audit trail calls the caller: "user/key", or "unix:NAME" for a local one without a key; `user` and
    `key` are None for those.
    """

    who: str
    user: str | None
    key: str | None
    method: str
    path: str
    query: Mapping[str, str]
    body: bytes
    content_type: str = ""


class Answer(NamedTuple):
    """What the gateway itself answers: `body` whole, or in pieces as they come."""

    status: int
    content_type: str
    body: bytes | AsyncGenerator[bytes, None]
    headers: Mapping[str, str] = {}


class UsageRecord(NamedTuple):
    """What is booked of one request. Times: `at` in seconds since the epoch, `*_ms` in milliseconds.

    Tokens are None where nobody told them. Their meaning is the dialect's: OpenAI's and Gemini's `input_tokens`
    include cached ones, Anthropic's do not. `cost_nanousd` is None where the price is unknown.
    """

    id: str
    at: float
    request_id: str
    user: str | None
    key: str | None
    endpoint: str | None
    form: str | None
    dialect: str | None
    provider: str | None
    model: str | None
    requested_model: str | None
    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None
    cache_write_tokens: int | None
    cache_write_1h_tokens: int | None
    reasoning_tokens: int | None
    cost_nanousd: int | None
    provenance: Literal["measured", "partial", "estimated", "absent"]
    status: int
    stream: bool
    attempts: int
    ttft_ms: float | None
    duration_ms: float
    client_gone: bool
