"""What is known of a request: the log line in the making, and what it holds while it runs."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from gproxyd.dialects.meter import Meter, Reading
from gproxyd.errors import UpstreamError
from gproxyd.policy import limits, quotas
from gproxyd.policy.callers import Caller
from gproxyd.types import DialectName, Form

if TYPE_CHECKING:
    from gproxyd.gateway.envelopes import Envelope
    from gproxyd.gateway.route import Route
    from gproxyd.observe.otel import Trace

_OUTCOMES = {"upstream_timeout": "upstream_timeout", "request_timeout": "refused", "invalid_request": "refused"}

Provenance = Literal["measured", "partial", "estimated", "absent"]


_ids = random.Random()  # noqa: S311 - seeded by the system; an id must be unique, not secret


def new_request_id(at: float) -> str:
    """A request id: 24 hexadecimal digits behind `req_`, unique, not secret. `at` in seconds since the epoch.

    The first half is the time: ids that rise are cheap to file, because an index grows at its end only.
    """
    return f"req_{int(at * 1000):012x}{_ids.getrandbits(48):012x}"


class Call:
    """One request. Times are monotonic seconds, sizes bytes of bodies. The attributes of the class are the defaults.

    at       when it began, in seconds since the epoch
    dialect  the caller's; None until the operation is known
    outcome  ok, refused, client_gone, upstream_error, upstream_timeout, internal_error
    reason   the word behind an outcome that is not ok (a code of the refusal, a reason of the upstream's failure)
    money    what is reserved of the caller's quota, and `place` of its rate limits
    envelope what client and vendor said, if that is to be kept
    trace    what is noted for OpenTelemetry, if it is traced
    heard_out  whether the upstream is to be heard to its end if the client leaves
    draining whether the client has left and the upstream is heard to its end
    hide     whether the gateway asked for a usage event that the client did not ask for
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
    route: Route | None = None
    status: int = 0
    stream: bool = False
    hide: bool = False
    bytes_in: int = 0
    bytes_out: int = 0
    attempts: int = 0
    sent_at: float | None = None
    first_byte_at: float | None = None
    upstream_status: int = 0
    upstream_id: str | None = None
    outcome: str = "ok"
    reason: str | None = None
    meter: Meter | Reading | None = None
    money: quotas.Hold = quotas.FREE
    place: limits.Hold = limits.FREE
    provenance: Provenance = "absent"
    cost: int | None = None
    envelope: Envelope | None = None
    trace: Trace | None = None
    heard_out: bool = False
    draining: bool = False
    closed: bool = False
    ended: float = 0.0

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        # All of them are the object's own: Python finds those many times faster than what only its class has.
        self.__dict__.update(known or _DEFAULTS)
        self.at = time.time()
        self.id = new_request_id(self.at)
        self.started = time.monotonic()

    def like(self, route: Route) -> Mapping[str, Any]:
        """What another one of the kind, on that route, knows from the beginning."""
        return {**_DEFAULTS, **{name: getattr(self, name) for name in _ALIKE}, "route": route}

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

    def standing(self) -> dict[str, Any]:
        """What a log line says of where a request goes: the same for every one with the same head and model."""
        return {
            "key": None if self.caller is None else self.caller.name,
            "method": self.method,
            "path": self.path,
            "form": self.form,
            "endpoint": self.endpoint,
            "provider": self.provider,
            "model": self.model,
            "requested_model": self.requested_model,
        }

    def fields(self) -> dict[str, Any]:
        """The log line: no secret, no prompt, no query."""
        first = self.first_byte_at
        return {
            "request_id": self.id,
            "client": self.client,
            **self.standing(),
            "status": self.status,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "attempts": self.attempts,
            "ttfb_ms": None if first is None else round((first - self.started) * 1000, 1),
            "duration_ms": round((self.ended - self.started) * 1000, 1),
            "upstream_request_id": self.upstream_id,
            "outcome": self.outcome,
            "reason": self.reason,
        }

    def line(self, standing: str) -> str:
        """The same as members of a JSON object, for a request that was answered; `standing` is rendered already.

        Nothing here needs to be escaped: ids, addresses and numbers.
        """
        assert self.first_byte_at is not None
        client = f'"client":"{self.client}",' if self.client else ""
        upstream = f'"upstream_request_id":"{self.upstream_id}",' if self.upstream_id else ""
        reason = f',"reason":"{self.reason}"' if self.reason else ""
        return (
            f'"request_id":"{self.id}",{client}{standing},"status":{self.status},'
            f'"bytes_in":{self.bytes_in},"bytes_out":{self.bytes_out},"attempts":{self.attempts},'
            f'"ttfb_ms":{(self.first_byte_at - self.started) * 1000:.1f},'
            f'"duration_ms":{(self.ended - self.started) * 1000:.1f},{upstream}"outcome":"{self.outcome}"{reason}'
        )


_DEFAULTS: Mapping[str, Any] = {name: getattr(Call, name) for name in Call.__annotations__}


_ALIKE = tuple("method path caller dialect form endpoint provider model requested_model heard_out".split())  # noqa: SIM905
