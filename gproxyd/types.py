"""Names for shapes that several rooms share."""

from __future__ import annotations

from collections.abc import Sequence
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
