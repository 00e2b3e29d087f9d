"""What is known of a request: the log line in the making."""

from __future__ import annotations

import time
from typing import Any

from gproxyd.errors import UpstreamError
from gproxyd.policy.callers import Caller
from gproxyd.types import DialectName, Form
from gproxyd.wire.headers import new_request_id

_OUTCOMES = {"upstream_timeout": "upstream_timeout", "request_timeout": "refused", "invalid_request": "refused"}


class Call:
    """One request. Times are monotonic seconds, sizes bytes of bodies. The attributes of the class are the defaults.

    dialect  the caller's; None until the operation is known
    outcome  ok, refused, client_gone, upstream_error, upstream_timeout, internal_error
    reason   the word behind an outcome that is not ok (a code of the refusal, a reason of the upstream's failure)
    """

    method: str = ""
    path: str = ""
    client: str | None = None
    caller: Caller | None = None
    dialect: DialectName | None = None
    form: Form | None = None
    endpoint: str | None = None
    provider: str | None = None
    model: str | None = None
    requested_model: str | None = None
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    attempts: int = 0
    sent_at: float | None = None
    first_byte_at: float | None = None
    upstream_id: str | None = None
    outcome: str = "ok"
    reason: str | None = None
    closed: bool = False

    def __init__(self) -> None:
        self.id = new_request_id()
        self.started = time.monotonic()

    def blame(self, error: UpstreamError) -> None:
        """The exchange failed; what a client did to it is not put down to the upstream."""
        self.outcome = _OUTCOMES.get(error.code, "upstream_error")
        self.reason = error.reason

    def overhead_ms(self) -> float:
        """How long the gateway itself has held the request: until it was sent on, and since the upstream answered."""
        now = time.monotonic()
        if self.sent_at is None or self.first_byte_at is None:
            return (now - self.started) * 1000
        return (self.sent_at - self.started + now - self.first_byte_at) * 1000

    def fields(self) -> dict[str, Any]:
        """The log line: no secret, no prompt, no query."""
        now = time.monotonic()
        ttfb = None if self.first_byte_at is None else round((self.first_byte_at - self.started) * 1000, 1)
        return {
            "request_id": self.id,
            "client": self.client,
            "key": None if self.caller is None else self.caller.name,
            "method": self.method,
            "path": self.path,
            "form": self.form,
            "endpoint": self.endpoint,
            "provider": self.provider,
            "model": self.model,
            "requested_model": self.requested_model,
            "status": self.status,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "attempts": self.attempts,
            "ttfb_ms": ttfb,
            "duration_ms": round((now - self.started) * 1000, 1),
            "upstream_request_id": self.upstream_id,
            "outcome": self.outcome,
            "reason": self.reason,
        }
