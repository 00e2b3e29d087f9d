"""A raw request target, taken apart once, as bytes.

Route, authority to call, log line and upstream path all derive from the value made here. Nothing is decoded and
encoded again: what goes upstream are the client's own octets after the prefix, less the parameters that are the
gateway's (its key, its provider). A path that two servers could read in two ways is refused instead of repaired.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from gproxyd.errors import Refusal
from gproxyd.types import Form
from gproxyd.wire import operations
from gproxyd.wire.operations import AGENT_CARD, Methods

RESERVED = frozenset(
    [
        "v1",
        "v1beta",
        "proxy",
        "admin",
        "console",
        "debug",
        "healthz",
        "readyz",
        "statsz",
        "metrics",
        ".well-known",
        "api",
    ]
)
"""First path segments that no provider may bear."""

MODEL_NAME = re.compile(r"(?!(?:.*/)?\.\.?(?:/|\Z))[A-Za-z0-9@_~][A-Za-z0-9@_~.:/+=,\[\]-]{0,255}")
"""What a model may be called: vendors' ids, fine-tunes (`ft:..`), paths (`accounts/x/models/y`), versions (`@001`).

No segment of it is a dot segment."""

_NOT_IN_TARGET = re.compile(rb"[^\x21-\x7e]|#")
_SEPARATORS = re.compile(rb"[/\\]")
_VERSIONS = (b"v1", b"v1beta")


@dataclass(frozen=True, slots=True)
class Target:
    """What a request target says.

    form      aggregated, scoped, raw, or local (answered by the gateway itself)
    provider  the provider's name in the path (scoped, raw), else None
    path      the path as received, without its query: what is logged
    version   b"/v1", b"/v1beta", or b"" where the path has none
    rest      what follows the version prefix (aggregated, scoped), the provider (raw), or the whole path (local)
    methods   method -> operation at this path; empty where the table knows none
    id        the model or entry that the path names, as received, else None
    query     the query without `?` and without the gateway's own parameters
    marked    whether a `?` goes upstream: there is a query, or the client sent an empty one
    keys      values of `?key=`, percent-decoded, in order
    home      the value of `?provider=`, else None
    """

    form: Form
    provider: str | None
    path: bytes
    version: bytes
    rest: bytes
    methods: Methods
    id: bytes | None
    query: bytes
    keys: tuple[bytes, ...]
    home: str | None
    marked: bool = False


def parse(raw: bytes, host: bytes = b"") -> Target:
    """Takes a request target apart. `host` is the Host header, for absolute-form targets.

    Raises Refusal (400 invalid_request) for a target that is not in origin-form (RFC 9112 section 3.2.1) or whose
    path holds a dot segment, a control byte, or an encoded separator in the segment that names the provider.
    """
    if not raw.startswith(b"/"):
        raw = _origin_form(raw, host)
    path, mark, query = raw.partition(b"?")
    if not mark:
        return _parse_path(path)
    if _NOT_IN_TARGET.search(query):
        raise _bad("the query holds a byte that must be percent-encoded")
    return _with_query(_parse_path(path), query)


def _bad(text: str) -> Refusal:
    return Refusal("invalid_request", text, close=True)


def _origin_form(raw: bytes, host: bytes) -> bytes:
    """An absolute-form target that names this very host is its path; anything else is refused (RFC 9112 3.2.2)."""
    scheme, mark, rest = raw.partition(b"://")
    authority, slash, path = rest.partition(b"/")
    if not mark or scheme.lower() not in (b"http", b"https") or not slash:
        raise _bad("the request target must begin with '/'")
    if not host or authority.lower() != host.lower():
        raise _bad("the request target names another host")
    return b"/" + path


_REMEMBERED = 256
"""Bytes beyond which a path is not remembered: whoever sends thousands of long ones must not fill the memory."""


def _parse_path(path: bytes) -> Target:
    """The path alone. Few differ on a running gateway, and none holds a secret, so they are remembered."""
    return _known_path(path) if len(path) <= _REMEMBERED else _read_path(path)


def _read_path(path: bytes) -> Target:
    if _NOT_IN_TARGET.search(path) or b"\\" in path:
        raise _bad("the path holds a byte that must be percent-encoded")
    if has_dot_segment(path):
        raise _bad("the path holds a dot segment")
    first, slash, rest = path[1:].partition(b"/")
    if first in _VERSIONS and slash:
        return _versioned("aggregated", None, path, path)
    if first == b"proxy" and slash:
        return _raw(path, rest)
    if first.decode("ascii") in RESERVED or not slash:
        return _local(path)
    return _scoped(path, first, b"/" + rest)


_known_path = lru_cache(maxsize=4096)(_read_path)


def _local(path: bytes) -> Target:
    methods: Methods = {"GET": AGENT_CARD, "HEAD": AGENT_CARD} if path == b"/.well-known/agent-card.json" else {}
    form: Form = "aggregated" if methods else "local"
    return Target(form, None, path, b"", path, methods, None, b"", (), None)


def _scoped(path: bytes, provider: bytes, rest: bytes) -> Target:
    name = _provider_name(provider)
    if rest[1:].partition(b"/")[0] not in _VERSIONS:
        return Target("local", None, path, b"", path, {}, None, b"", (), None)
    return _versioned("scoped", name, path, rest)


def _raw(path: bytes, rest: bytes) -> Target:
    provider, slash, below = rest.partition(b"/")
    name = _provider_name(provider)
    upstream = slash + below
    first = below.partition(b"/")[0]
    if first not in _VERSIONS:
        return Target("raw", name, path, b"", upstream, {}, None, b"", (), None)
    version = b"/" + first
    methods, found = operations.find(version, upstream[len(version) :])
    return Target("raw", name, path, version, upstream, methods, found, b"", (), None)


def _versioned(form: Form, provider: str | None, path: bytes, below: bytes) -> Target:
    version = b"/" + below[1:].partition(b"/")[0]
    rest = below[len(version) :]
    methods, found = operations.find(version, rest)
    return Target(form, provider, path, version, rest, methods, found, b"", (), None)


def _provider_name(segment: bytes) -> str:
    decoded = unquote_to_bytes(unquote_to_bytes(segment))
    if not segment or b"/" in decoded or b"\\" in decoded:
        raise _bad("the path's provider segment is empty or holds an encoded separator")
    return segment.decode("ascii")


def has_dot_segment(path: bytes) -> bool:
    """Whether `.` or `..` stands as a segment: as it is, or percent-decoded once or twice.

    Back-slashes count as separators and `;parameters` are looked past, because some servers do the same.
    """
    for _ in range(3):
        if any(segment.partition(b";")[0] in (b".", b"..") for segment in _SEPARATORS.split(path)):
            return True
        if b"%" not in path:
            return False
        path = unquote_to_bytes(path)
    return False


def _with_query(target: Target, query: bytes) -> Target:
    """Takes the gateway's own parameters out of the query; order and spelling of the rest stay.

    `key` goes always, however it is spelled, `provider` only where it picks the home of a request. A `;` separates
    parameters for some servers, so a key behind one goes as well.
    """
    homeless = target.form == "aggregated" and any(operation.family for operation in target.methods.values())
    kept: list[bytes] = []
    keys: list[bytes] = []
    home: str | None = None
    for part in query.split(b"&"):
        foreign: list[bytes] = []
        for piece in part.split(b";"):
            spelled, _, value = piece.partition(b"=")
            name = unquote_to_bytes(spelled)
            if name.lower() == b"key":
                if name == b"key":
                    keys.append(unquote_to_bytes(value))
            elif name == b"provider" and homeless:
                home = home or unquote_to_bytes(value).decode("ascii", "replace")
            else:
                foreign.append(piece)
        if foreign:
            kept.append(b";".join(foreign))
    left = b"&".join(kept)
    return replace(target, query=left, keys=tuple(keys), home=home, marked=bool(left) or not query)
