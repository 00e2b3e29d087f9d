"""Envelopes: what a client and a vendor said to each other, for an administrator who wants to look it up.

Invariants: nothing is kept unless the configuration asks for it, bodies not unless it asks for those; values of headers
that may bear a credential are blanked, and so is a key in a query; bodies are cut at MAX_BODY; keeping never changes
nor holds up what passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gproxyd.config import Records
from gproxyd.gateway.call import Call
from gproxyd.types import RawHeaders

if TYPE_CHECKING:
    from gproxyd.gateway.intake import Body

MAX_BODY = 64 * 1024
"""Bytes that are kept of a body."""

BLANK = "[hidden]"

_SHOWN = frozenset(
    b"accept accept-encoding accept-language anthropic-beta anthropic-version cache-control connection content- "
    b"encoding content-length content-type date etag expect host idempotency-key openai-beta openai-processing- "
    b"ms openai-version range request-id retry-after server-timing te traceparent trailer transfer-encoding "
    b"user-agent vary x-request-id x-should-retry".split()
)
"""Headers whose values are shown; of others, the name alone, unless a prefix below says more."""

_SHOWN_PARAMETERS = frozenset({b"alt", b"limit", b"order", b"pageSize", b"provider", b"beta", b"api-version"})

LEAST_SECRET = 8
"""Bytes of a hidden value from which on it is looked for in bodies, too; shorter ones are words."""

_SHOWN_PREFIXES = (b"anthropic-ratelimit-", b"x-ratelimit-", b"x-stainless-", b"x-gproxyd-")


def wanted(records: Records) -> bool:
    """Whether anything is to be kept."""
    return records.enable_downstream_log or records.enable_upstream_log


class Piece:
    """The beginning of a body, and how long it was in all."""

    __slots__ = ("_parts", "kept", "size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.kept = 0
        self.size = 0

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self.kept < MAX_BODY:
            part = data[: MAX_BODY - self.kept]
            self._parts.append(part)
            self.kept += len(part)

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)


class Envelope:
    """One request in the making. `asked` and `answered` are bodies on the client's side, `sent` and `got` on the
    vendor's; None where they are not kept."""

    def __init__(self, records: Records) -> None:
        self._records = records
        down, up = records.enable_downstream_log_body, records.enable_upstream_log_body
        self.asked = Piece() if down and records.enable_downstream_log else None
        self.answered = Piece() if down and records.enable_downstream_log else None
        self.sent = Piece() if up and records.enable_upstream_log else None
        self.got = Piece() if up and records.enable_upstream_log else None
        self._hidden: set[bytes] = set()
        self._down: dict[str, Any] = {}
        self._up: dict[str, Any] = {}

    def received(self, method: str, path: bytes, query: bytes, headers: RawHeaders) -> None:
        """What the client sent; `query` without its key."""
        url = path + (b"?" + b"&".join(_parameter(part) for part in query.split(b"&")) if query else b"")
        self._down = {"method": method, "url": url.decode("ascii", "replace"), "headers": self._lines(headers)}

    def forwarded(self, method: str, origin: str, head: bytes, body: Body) -> None:
        """What goes to the vendor: `head` is the head on the wire, `body` may still be on its way. Each attempt begins
        anew, so that what is told is one request, the last one, and not a mixture."""
        first, *rest = head.split(b"\r\n")
        lines = (line.partition(b": ") for line in rest if line)
        bare = origin + first.split(b" ", 2)[1].partition(b"?")[0].decode("ascii")
        self._up = {"method": method, "url": bare, "headers": self._lines((name, value) for name, _, value in lines)}
        self.got = None if self.got is None else Piece()
        if self.sent is not None:
            self.sent = Piece()
            body.watch(self.sent.add)

    def told(self, status: int, headers: RawHeaders) -> None:
        """What the vendor answered."""
        self._up |= {"status": status, "response_headers": self._lines(headers)}

    def replied(self, status: int, lines: bytes) -> None:
        """What the client is answered; `lines` are those of the head."""
        pairs = (line.partition(b": ") for line in lines.split(b"\r\n") if line)
        self._down |= {"status": status, "response_headers": self._lines((name, value) for name, _, value in pairs)}

    def finish(self, call: Call) -> Mapping[str, Any]:
        """The envelope of a request that is over."""
        told: dict[str, Any] = {
            "request_id": call.id,
            "at": call.at,
            "user": None if call.caller is None else call.caller.user,
            "key": None if call.caller is None else call.caller.key,
            "provider": call.provider,
            "model": call.model,
            "status": call.status,
            "outcome": call.outcome,
            "reason": call.reason,
            "attempts": call.attempts,
            "duration_ms": round((call.ended - call.started) * 1000, 3),
            "ttft_ms": None if call.first_byte_at is None else round((call.first_byte_at - call.started) * 1000, 3),
        }
        if self._records.enable_downstream_log:
            told["downstream"] = self._down | {"request_bytes": call.bytes_in, "response_bytes": call.bytes_out}
        if self._records.enable_upstream_log and self._up:
            told["upstream"] = self._up | {"request_id": call.upstream_id}
        bodies = {
            "downstream_request": self.asked,
            "downstream_response": self.answered,
            "upstream_request": self.sent,
            "upstream_response": self.got,
        }
        for name, piece in bodies.items():
            if piece is not None:
                told[name] = self._cleaned(bytes(piece))
        told["cut"] = [name for name, piece in bodies.items() if piece is not None and piece.size > piece.kept]
        return told

    def _lines(self, pairs: Iterable[tuple[bytes, bytes]]) -> list[list[str]]:
        """Names and values in their order; values of unknown headers are hidden: any of them may be a credential."""
        told = []
        for name, value in pairs:
            lower = name.lower()
            shown = lower in _SHOWN or lower.startswith(_SHOWN_PREFIXES)
            if not shown:
                self._hidden |= {one for one in (value, value.rpartition(b" ")[2]) if len(one) >= LEAST_SECRET}
            told.append([name.decode("latin-1"), value.decode("latin-1") if shown else BLANK])
        return told

    def _cleaned(self, body: bytes) -> bytes:
        """A body without what was hidden among the headers: some servers repeat to their caller what they were sent."""
        for secret in sorted(self._hidden, key=len, reverse=True):
            body = body.replace(secret, BLANK.encode())
        return body


def _parameter(part: bytes) -> bytes:
    """A parameter of a query: its name, and its value where that says how to answer."""
    name, mark, _ = part.partition(b"=")
    return part if name in _SHOWN_PARAMETERS or not mark else name + b"=" + BLANK.encode()
