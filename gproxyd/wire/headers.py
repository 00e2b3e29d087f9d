"""Which header lines cross the gateway, and which never do.

Lists are open: what is not named here passes, byte for byte and in its order, so tomorrow's vendor header works.
What is named here either belongs to one connection only, is a credential, or speaks of somebody's identity.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from gproxyd.types import RawHeaders

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer transfer-encoding "
    b"upgrade http2-settings".split()
)
"""RFC 9110 section 7.6.1, and what older peers use in the same sense."""

CREDENTIALS = frozenset(b"authorization x-api-key x-goog-api-key api-key cookie".split())
"""The client's credentials: read by the gateway, never forwarded."""

_FRAMING = frozenset(b"host content-length expect".split())

_IDENTITY = frozenset(
    b"forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-forwarded-port x-forwarded-server x-real-ip "
    b"x-client-ip true-client-ip cf-connecting-ip x-user x-original-url x-rewrite-url x-upstream x-request-id "
    b"openai-organization openai-project".split()
)
"""Who somebody claims to be, or where they claim the request belongs. The provider's own come from configuration."""

_INTEGRITY = frozenset(b"digest content-digest repr-digest content-md5 signature signature-input".split())
"""Checksums of a body; false as soon as one byte of it was replaced."""

_REQUEST = HOP_BY_HOP | CREDENTIALS | _FRAMING | _IDENTITY

_SITE_WIDE = frozenset(
    b"strict-transport-security alt-svc clear-site-data public-key-pins public-key-pins-report-only refresh "
    b"set-cookie server via nel report-to expect-ct".split()
)
"""What a vendor says of its own site or of the machine in front of it; false when another host repeats it."""

_ACCOUNT = frozenset(b"openai-organization openai-project anthropic-organization-id cf-ray cf-cache-status".split())
"""Whose account the gateway uses."""

_OURS = frozenset(b"x-request-id request-id content-length server-timing".split())

_RESPONSE = HOP_BY_HOP | _SITE_WIDE | _ACCOUNT | _OURS

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def nominated(headers: RawHeaders) -> frozenset[bytes]:
    """Names that `Connection` lines nominate as meant for one connection (RFC 9110 section 7.6.1)."""
    names: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            names.update(token.strip().lower() for token in value.split(b","))
    return frozenset(names - {b"close", b"keep-alive", b""})


def request_lines(headers: RawHeaders, *, rewritten: bool, drop: Iterable[bytes] = ()) -> list[bytes]:
    """The client's header lines that go upstream, each with its CRLF.

    `rewritten` says that the body no longer is what the client sent; `drop` names more that must not pass. Names
    with an underscore are dropped: some servers read `x_api_key` as `x-api-key`.
    """
    dropped = _REQUEST | nominated(headers) | frozenset(drop)
    if rewritten:
        dropped |= _INTEGRITY
    lines: list[bytes] = []
    for name, value in headers:
        lowered = name.lower()
        if lowered not in dropped and b"_" not in name and not lowered.startswith(b"x-gproxy"):
            lines.append(b"%b: %b\r\n" % (name, value))
    return lines


def response_lines(headers: RawHeaders, *, rewritten: bool) -> list[bytes]:
    """The upstream's header lines that go to the client, each with its CRLF. Framing is the caller's to add."""
    dropped = _RESPONSE | nominated(headers)
    if rewritten:
        dropped |= _INTEGRITY | {b"etag"}
    return [
        b"%b: %b\r\n" % (name, value)
        for name, value in headers
        if (lowered := name.lower()) not in dropped and not lowered.startswith(b"x-gproxyd-")
    ]


def find(headers: RawHeaders, wanted: bytes) -> list[bytes]:
    """All values of a header, in order. `wanted` is lower case."""
    return [value for name, value in headers if name.lower() == wanted]


def new_request_id() -> str:
    """A request id of the gateway's own: 24 hexadecimal digits behind `req_`."""
    return f"req_{secrets.token_hex(12)}"


def is_request_id(value: bytes) -> bool:
    """Whether a peer's request id may stand in a log line."""
    return _REQUEST_ID.fullmatch(value) is not None
