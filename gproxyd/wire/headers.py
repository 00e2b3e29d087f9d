"""Which header lines cross the gateway, and which never do.

Lists are open: what is not named here passes, byte for byte and in its order, so tomorrow's vendor header works.
What is named here either belongs to one connection only, is a credential, or speaks of somebody's identity.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

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

_REWRITTEN = _INTEGRITY | {b"etag"}
_NONE: frozenset[bytes] = frozenset()

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Headers(dict[bytes, bytes]):
    """Header lines in wire order (`lines`), and as a mapping by lower-case name. Made once per message.

    The mapping holds a name's last value; `all` has every one.
    """

    __slots__ = ("lines",)

    def __init__(self, raw: RawHeaders) -> None:
        self.lines = [(name.lower(), name, value) for name, value in raw]
        super().__init__([(lowered, value) for lowered, _, value in self.lines])

    def all(self, name: bytes) -> Sequence[bytes]:
        """Every value, in order."""
        if name not in self:
            return ()
        if len(self) == len(self.lines):  # no name stands there twice
            return (self[name],)
        return [value for lowered, _, value in self.lines if lowered == name]

    def coding(self) -> bytes:
        """The content coding, lower case; empty for none and for `identity`."""
        if b"content-encoding" not in self:
            return b""
        coding = b",".join(self.all(b"content-encoding")).strip().lower()
        return b"" if coding == b"identity" else coding

    def media_type(self) -> bytes:
        """The content type without parameters, lower case; empty if there is none."""
        return self.get(b"content-type", b"").partition(b";")[0].strip().lower()

    def nominated(self) -> frozenset[bytes]:
        """Names that `Connection` nominates as meant for one connection (RFC 9110 section 7.6.1)."""
        if b"connection" not in self:
            return _NONE
        tokens = (token.strip().lower() for value in self.all(b"connection") for token in value.split(b","))
        return frozenset(token for token in tokens if token not in (b"close", b"keep-alive", b""))


def request_lines(headers: Headers, *, rewritten: bool, drop: frozenset[bytes] = frozenset()) -> list[bytes]:
    """The client's header lines that go upstream, each with its CRLF.

    `rewritten` says that the body no longer is what the client sent; `drop` names more that must not pass. Names
    with an underscore are dropped: some servers read `x_api_key` as `x-api-key`.
    """
    return _passing(headers, _REQUEST_VERDICTS, headers.nominated() | drop | (_INTEGRITY if rewritten else _NONE))


def response_lines(headers: Headers, *, rewritten: bool) -> list[bytes]:
    """The upstream's header lines that go to the client, each with its CRLF. Framing is the caller's to add."""
    return _passing(headers, _RESPONSE_VERDICTS, headers.nominated() | (_REWRITTEN if rewritten else _NONE))


def _passing(headers: Headers, verdicts: _Verdicts, also: frozenset[bytes]) -> list[bytes]:
    return [
        b"%b: %b\r\n" % (name, value)
        for lowered, name, value in headers.lines
        if verdicts[lowered] and lowered not in also
    ]


class _Verdicts(dict[bytes, bool]):
    """Whether a header passes, by lower-case name: decided once per name, for as many as honest peers have."""

    def __init__(self, dropped: frozenset[bytes], prefix: bytes, forbidden: bytes) -> None:
        super().__init__()
        self._dropped = dropped
        self._prefix = prefix
        self._forbidden = forbidden

    def __missing__(self, name: bytes) -> bool:
        own = name.startswith(self._prefix) or (self._forbidden and self._forbidden in name)
        verdict = name not in self._dropped and not own
        if len(self) < 1024 and len(name) < 64:
            self[name] = verdict
        return verdict


_REQUEST_VERDICTS = _Verdicts(_REQUEST, b"x-gproxy", b"_")
_RESPONSE_VERDICTS = _Verdicts(_RESPONSE, b"x-gproxyd-", b"")


def new_request_id() -> str:
    """A request id of the gateway's own: 24 hexadecimal digits behind `req_`. Unique, not secret."""
    return f"req_{_ids.getrandbits(96):024x}"


_ids = random.Random()  # noqa: S311 - seeded by the system; an id must be unique, not secret


def is_request_id(value: bytes) -> bool:
    """Whether a peer's request id may stand in a log line."""
    return _REQUEST_ID.fullmatch(value) is not None
