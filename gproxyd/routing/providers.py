"""A provider at work: its faces, its credentials, and what waits how long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import urlsplit

from gproxyd.config.schema import Provider as ProviderConfig
from gproxyd.config.schema import Timeouts
from gproxyd.routing.credentials import CredentialPool
from gproxyd.types import DialectName, Origin
from gproxyd.vendors.catalogue import STANDARD_ROOT, AuthPlace, RefusedKey, Vendor

_VERSION = re.compile(r"/v\d+[a-z0-9]*\Z")
"""A version at the end of a base URL: what the client's own `/v1` would repeat."""


@dataclass(frozen=True)
class Face:
    """Where one dialect of a provider lives: `root` stands in the place of the client's version prefix."""

    origin: Origin
    root: bytes
    auth: AuthPlace

    @cached_property
    def authority(self) -> bytes:
        """The `Host` header of requests to this face."""
        return self.origin.authority


@dataclass(frozen=True, slots=True)
class Provider:
    """One configured provider.

    faces    dialect -> where it lives; the first is the vendor's own
    raw      what `/proxy/{provider}` stands for
    headers  lines (with CRLF) added to every request, and their names in lower case; the latter also with
             `accept-encoding`, for answers that must not come in a coding
    usable   False while its secret is missing
    tells_usage  whether its chat streams tell tokens when asked to (`stream_options`)
    """

    name: str
    faces: Mapping[DialectName, Face]
    raw: Face
    credentials: CredentialPool
    timeouts: Timeouts
    header_lines: bytes = field(repr=False)  # administrators do put keys of other services there
    header_names: frozenset[bytes]
    own_or_coding: frozenset[bytes]
    proxy: Origin | None
    refusals: tuple[RefusedKey, ...]
    origins: frozenset[Origin]
    usable: bool
    tells_usage: bool

    @property
    def dialect(self) -> DialectName:
        """The vendor's own dialect."""
        return next(iter(self.faces))

    def face_for(self, version: bytes) -> Face | None:
        """The face for an endpoint that belongs to no dialect alone: the vendor's own first."""
        for dialect, face in self.faces.items():
            if STANDARD_ROOT[dialect].encode() == version:
                return face
        return None


def build(name: str, config: ProviderConfig, vendor: Vendor, credentials: CredentialPool, *, usable: bool) -> Provider:
    """Puts together what the administrator wrote and what is known of the vendor."""
    auth: AuthPlace = config.auth or vendor.auth
    base = _base(config.base_url or vendor.base_url)
    faces: dict[DialectName, Face] = {}
    for dialect, standard in vendor.faces.items():
        if base is not None:
            root = _own_version(config.base_url, standard, dialect) or standard
            place = config.auth or vendor.face_auth.get(dialect, vendor.auth)
            faces[dialect] = Face(base[0], (base[1] + root).encode(), place)
    for dialect, url in config.dialects.items():
        origin, path = split_url(url)
        root = path if _VERSION.search(path) else path + STANDARD_ROOT[dialect]
        faces[dialect] = Face(origin, root.encode(), config.auth or vendor.face_auth.get(dialect, vendor.auth))
    raw_base = base or _base(next(iter(config.dialects.values())))
    assert raw_base is not None  # the configuration has one or the other
    raw = Face(raw_base[0], raw_base[1].encode(), auth)
    own = frozenset(key.lower().encode() for key in config.headers)
    return Provider(
        name=name,
        faces=faces,
        raw=raw,
        credentials=credentials,
        timeouts=config.timeouts,
        header_lines=b"".join(b"%b: %b\r\n" % (key.encode(), value.encode()) for key, value in config.headers.items()),
        header_names=own,
        own_or_coding=own | {b"accept-encoding"},
        proxy=split_url(config.proxy)[0] if config.proxy else None,
        refusals=vendor.refusals,
        origins=frozenset({raw.origin, *(face.origin for face in faces.values())}),
        usable=usable,
        tells_usage=vendor.stream_options,
    )


def needs_key(config: ProviderConfig, vendor: Vendor) -> bool:
    return (config.auth or vendor.auth) != "none"


def _own_version(url: str | None, root: str, dialect: DialectName) -> str | None:
    """A version at the end of a configured base URL that no client would send (`/v4`) stands for the client's own."""
    version = _VERSION.search(split_url(url)[1]) if url else None
    if version is None or version[0] in STANDARD_ROOT.values() or root != STANDARD_ROOT[dialect]:
        return None
    return version[0]


def _base(url: str | None) -> tuple[Origin, str] | None:
    """Origin and path of a base URL, without the trailing version that a face adds by itself."""
    if url is None:
        return None
    origin, path = split_url(url)
    return origin, _VERSION.sub("", path)


def split_url(url: str) -> tuple[Origin, str]:
    """Origin and path (no slash at its end) of a URL that the configuration has checked."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    scheme = "https" if parts.scheme == "https" else "http"
    port = parts.port or (443 if scheme == "https" else 80)
    return Origin(scheme, parts.hostname, port), parts.path.rstrip("/")  # type: ignore[arg-type]
