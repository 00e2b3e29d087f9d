"""Which header lines cross the gateway, and which never do.

Lists are open: what is not named here passes, byte for byte and in its order, so tomorrow's vendor header works.
What is named here either belongs to one connection only, is a credential, or speaks of somebody's identity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter

from gproxyd.types import RawHeaders

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer transfer-encoding "
    b"upgrade http2-settings".split()
)
"""RFC 9110 section 7.6.1, and what older peers use in the same sense."""

CREDENTIALS = frozenset(b"authorization x-api-key x-goog-api-key api-key cookie".split())
"""The client's credentials: read by the gateway, never forwarded."""

FRAMING = frozenset(b"host content-length expect".split())
"""What the gateway itself says of the request it sends."""

_IDENTITY = frozenset(
    b"forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-forwarded-port x-forwarded-server x-real-ip "
    b"x-client-ip true-client-ip cf-connecting-ip x-user x-original-url x-rewrite-url x-upstream x-request-id "
    b"openai-organization openai-project".split()
)
"""Who somebody claims to be, or where they claim the request belongs. The provider's own come from configuration."""

_INTEGRITY = frozenset(b"digest content-digest repr-digest content-md5 signature signature-input".split())
"""Checksums of a body; false as soon as one byte of it was replaced."""

_REQUEST = HOP_BY_HOP | CREDENTIALS | FRAMING | _IDENTITY

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

_OLD_NAMES = {b"x-gzip": b"gzip", b"x-compress": b"compress"}
"""RFC 9110 sections 8.4.1.1 and 8.4.1.3."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Headers(dict[bytes, bytes]):
    """Header lines in wire order (`names`, `texts`), and as a mapping by lower-case name. Made once per message.

    `plain` says that no name stands there twice, and that a length alone frames the body.

    The mapping holds a name's last value; `all` has every one. A peer sends the same names in the same order all
    day, so what depends on names alone is worked out once for each list of names and remembered.
    """

    __slots__ = ("_lowered", "_usual", "names", "plain", "texts")

    def __init__(self, raw: RawHeaders) -> None:
        names: tuple[bytes, ...]
        texts: tuple[bytes, ...]
        names, texts = zip(*raw) if raw else ((), ())  # noqa: B905 - they are pairs
        self.names, self.texts = names, texts
        self._usual = len(b"".join(names)) < _USUAL  # what one peer makes up is not remembered
        self._lowered, self.plain = _shape(names) if self._usual else _shape.__wrapped__(names)
        super().__init__(zip(self._lowered, texts))  # noqa: B905 - as long as each other

    def all(self, name: bytes) -> Sequence[bytes]:
        """Every value, in order."""
        if name not in self:
            return ()
        if len(self) == len(self.names):  # no name stands there twice
            return (self[name],)
        return [text for lowered, text in zip(self._lowered, self.texts, strict=True) if lowered == name]

    def passing(self, verdict: Verdict, also: frozenset[bytes]) -> bytes:
        """The lines that may pass, each with its CRLF; names in `also` or nominated by `Connection` may not."""
        plan = _plan if self._usual else _plan.__wrapped__
        template, pick = plan(self.names, verdict, also, self.nominated())
        return template % pick(self.texts)

    def coding(self) -> bytes:
        """The content coding, lower case; empty for none and for `identity`."""
        if b"content-encoding" not in self:
            return b""
        names = (name.strip() for name in b",".join(self.all(b"content-encoding")).lower().split(b","))
        return b", ".join(_OLD_NAMES.get(name, name) for name in names if name not in (b"", b"identity"))

    def media_type(self) -> bytes:
        """The content type without parameters, lower case; empty if there is none."""
        text = self.get(b"content-type", b"")
        return text if text in _USUAL_TYPES else text.partition(b";")[0].strip().lower()

    def nominated(self) -> frozenset[bytes]:
        """Names that `Connection` nominates as meant for one connection (RFC 9110 section 7.6.1)."""
        if b"connection" not in self:
            return _NONE
        tokens = (token.strip().lower() for value in self.all(b"connection") for token in value.split(b","))
        return frozenset(token for token in tokens if token not in (b"close", b"keep-alive", b""))


_FRAMED_OTHERWISE = frozenset({b"transfer-encoding", b"upgrade", b"trailer"})

_USUAL_TYPES = frozenset({b"application/json", b"text/event-stream"})

_USUAL = 2048
"""Bytes of all names together that a message may have and still be remembered."""

Verdict = Callable[[bytes], bool]
"""Whether a header passes, by its lower-case name."""


@lru_cache(maxsize=1024)
def _shape(names: tuple[bytes, ...]) -> tuple[tuple[bytes, ...], bool]:
    """The names in lower case, and whether they are plain ones."""
    lowered = tuple(map(bytes.lower, names))
    told = set(lowered)
    return lowered, len(told) == len(names) and b"content-length" in told and told.isdisjoint(_FRAMED_OTHERWISE)


@lru_cache(maxsize=1024)
def _plan(
    names: tuple[bytes, ...], verdict: Verdict, also: frozenset[bytes], nominated: frozenset[bytes]
) -> tuple[bytes, Callable[[tuple[bytes, ...]], tuple[bytes, ...]]]:
    """A template of the lines that pass, and what picks their values out of all values."""
    kept = [
        index
        for index, name in enumerate(_shape(names)[0])
        if verdict(name) and name not in also and name not in nominated
    ]
    template = b"".join(names[index].replace(b"%", b"%%") + b": %b\r\n" for index in kept)
    if len(kept) > 1:
        return template, itemgetter(*kept)
    return template, lambda texts: tuple(texts[index] for index in kept)


def _request_verdict(name: bytes) -> bool:
    """Names with an underscore do not pass: some servers read `x_api_key` as `x-api-key`."""
    return name not in _REQUEST and b"_" not in name and not name.startswith(b"x-gproxy")


def _response_verdict(name: bytes) -> bool:
    return name not in _RESPONSE and not name.startswith(b"x-gproxyd-")


def request_lines(headers: Headers, *, rewritten: bool, drop: frozenset[bytes] = _NONE) -> bytes:
    """The client's header lines that go upstream, each with its CRLF.

    `rewritten` says that the body no longer is what the client sent; `drop` names more that must not pass.
    """
    return headers.passing(_request_verdict, drop | _INTEGRITY if rewritten else drop)


def response_lines(headers: Headers, *, rewritten: bool, drop: frozenset[bytes] = _NONE) -> bytes:
    """The upstream's header lines that go to the client, each with its CRLF. Framing is the caller's to add."""
    return headers.passing(_response_verdict, drop | _REWRITTEN if rewritten else drop)


def is_request_id(value: bytes) -> bool:
    """Whether a peer's request id may stand in a log line."""
    return _REQUEST_ID.fullmatch(value) is not None
