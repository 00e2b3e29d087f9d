"""The errors of gproxyd, and whose fault each one is.

    GproxydError
    ├── ConfigError      the administrator's files cannot be used; carries every problem found
    ├── Refusal          the client is told no: a status, a code and a sentence
    ├── WireError        a peer's bytes break their own protocol
    └── UpstreamError    an upstream could not be reached, or failed while it answered

Foreign exceptions (sockets, TLS, parsers) are translated into these where they are met. No message here may
hold a secret, a prompt, or bytes that a peer sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class GproxydError(Exception):
    """The root: whatever gproxyd raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration: where it stands, and what to do about it."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class ConfigError(GproxydError):
    """The configuration cannot be used. `problems` holds all that was found, in file order."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


# What a client can be told: code -> (HTTP status, the label its message begins with).
REFUSALS: Mapping[str, tuple[int, str]] = {
    "provider_prefix": (400, "provider_prefix"),
    "invalid_request": (400, "invalid_request"),
    "unauthorized": (401, "unauthorized"),
    "quota_exceeded": (402, "quota_exceeded"),
    "forbidden_model": (403, "forbidden: model"),
    "forbidden_endpoint": (403, "forbidden: endpoint"),
    "forbidden_agent": (403, "forbidden: agent"),
    "unknown_provider": (404, "unknown_provider"),
    "model_not_found": (404, "model_not_found"),
    "not_found": (404, "not_found"),
    "method_not_allowed": (405, "method_not_allowed"),
    "request_timeout": (408, "request_timeout"),
    "conflict": (409, "conflict"),
    "payload_too_large": (413, "payload_too_large"),
    "unsupported_media_type": (415, "unsupported_media_type"),
    "expectation_failed": (417, "expectation_failed"),
    "upgrade_required": (426, "upgrade_required"),
    "rate_limited": (429, "rate_limited"),
    "headers_too_large": (431, "headers_too_large"),
    "internal_error": (500, "internal_error"),
    "unsupported": (501, "unsupported"),
    "upstream_error": (502, "upstream_error"),
    "upstream_auth": (502, "upstream_error: upstream_auth"),
    "upstream_tls": (502, "upstream_error: upstream_tls"),
    "no_target": (503, "no_target"),
    "overloaded": (503, "overloaded"),
    "upstream_timeout": (504, "upstream_timeout"),
}


class Refusal(GproxydError):
    """The request is answered by the gateway itself, with an error in the caller's dialect.

    `code` is a key of REFUSALS, `text` a sentence for the reader, `headers` extra response headers, and
    `close` whether the connection must end after the answer (its framing can no longer be trusted).
    """

    def __init__(
        self,
        code: str,
        text: str,
        *,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
        param: str | None = None,
    ) -> None:
        status, label = REFUSALS[code]
        super().__init__(f"{label}: {text}")
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        self.close = close
        self.param = param

    @property
    def message(self) -> str:
        return str(self)


class WireError(GproxydError):
    """Bytes from a peer that break their protocol. The text names the rule, never the bytes."""


class UpstreamError(GproxydError):
    """An attempt at an upstream failed.

    `code` is what the client is told if this was the last attempt (a key of REFUSALS), `reason` a short word
    for the log: connect, dns, tls, protocol, closed, reset, timeout_connect, timeout_first_byte, timeout_idle, auth.
    """

    def __init__(self, reason: str, text: str, *, code: str = "upstream_error") -> None:
        super().__init__(text)
        self.reason = reason
        self.code = code

    def refusal(self) -> Refusal:
        """What the client is told."""
        return Refusal(self.code, str(self))
