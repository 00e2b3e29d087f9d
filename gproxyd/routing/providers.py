"""A provider at work: its faces, its credentials, and what waits how long."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from gproxyd.config.quirks import Quirks as QuirksConfig
from gproxyd.config.schema import Provider as ProviderConfig
from gproxyd.config.schema import Timeouts
from gproxyd.dialects.dialect import DIALECTS
from gproxyd.dialects.quirks import Answer, BodyError, Quirks
from gproxyd.errors import Refusal
from gproxyd.routing.credentials import CredentialPool, Key
from gproxyd.types import DialectName, Origin
from gproxyd.vendors import catalogue, oauth
from gproxyd.vendors.catalogue import STANDARD_ROOT, AuthPlace, Page, RefusedKey, Shape, Vendor
from gproxyd.wire.refrain import Refrains

_VERSION = re.compile(r"/v\d+[a-z0-9]*\Z")
"""A version at the end of a base URL: what the client's own `/v1` would repeat."""

_DEPLOYMENT = b"{deployment}"
_SETTINGS = ("project", "location", "api_version", "deployments")


@dataclass(frozen=True)
class Face:
    """Where one dialect of a provider lives: `root` stands in the place of the client's version prefix.

    defaults     headers that the vendor demands: name in lower case -> line (with CRLF), for requests without them
    query        what the query must hold, `name=value`
    deployments  model -> what stands for it in the root; None where the root has no place for it
    """

    origin: Origin
    root: bytes
    auth: AuthPlace
    defaults: Mapping[bytes, bytes] = field(default_factory=dict)
    query: bytes = b""
    deployments: Mapping[str, str] | None = None

    @cached_property
    def authority(self) -> bytes:
        """The `Host` header of requests to this face."""
        return self.origin.authority

    def target(self, rest: bytes, query: bytes | None = None, model: str | None = None) -> bytes:
        """The request target for what follows the client's version prefix. `query` is the client's, None without `?`.

        Raises Refusal (400) if the address needs a model and there is none.
        """
        root = self.root
        if self.deployments is not None and _DEPLOYMENT in root:
            if model is None:
                raise Refusal("invalid_request", "the provider needs to know the model", param="model")
            root = root.replace(_DEPLOYMENT, quote(self.deployments.get(model, model), safe="").encode("ascii"))
        path = root + rest or b"/"
        if self.query and not _holds(query or b"", self.query.partition(b"=")[0]):
            query = self.query + (b"&" + query if query else b"")
        return path if query is None else path + b"?" + query

    def demanded(self, present: Collection[bytes]) -> bytes:
        """The header lines that a request lacks whose headers have these names, in lower case."""
        if not self.defaults:
            return b""
        return b"".join(line for name, line in self.defaults.items() if name not in present)


def _holds(query: bytes, name: bytes) -> bool:
    return any(part.partition(b"=")[0] == name for part in query.split(b"&"))


class Listing(NamedTuple):
    """Where a provider's models are listed: at `face.target(path)`, in which shape, with which pages."""

    face: Face
    path: bytes
    shape: Shape
    page: Page | None


@dataclass(frozen=True, slots=True)
class Provider:
    """One configured provider.

    faces      dialect -> where it lives; the first is the vendor's own
    endpoints  operation -> where it lives, for those that have a place of their own
    raw        what `/proxy/{provider}` stands for
    listing    where its models are listed, None if they are not
    headers    lines (with CRLF) added to every request, and their names in lower case; the latter also with
               `accept-encoding`, for answers that must not come in a coding
    usable     False while its secret is missing
    tells_usage  whether its chat streams tell tokens when asked to (`stream_options`)
    quirks, fits  how it differs from OpenAI's dialect, and whether chat requests have to be fitted at all
    limited, body_errors  answers that mean a rate limit beside 429; error codes inside bodies
    mints      whether its keys are service accounts, of which a token must be had first (`oauth.ServiceAccount.ready`)
    can        dialect -> operations that the vendor is known to have; what is not there may be there all the same
    refrains   dialect -> how the events of its streams go, as far as they repeat themselves
    """

    name: str
    faces: Mapping[DialectName, Face]
    endpoints: Mapping[str, Face]
    raw: Face
    listing: Listing | None
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
    quirks: Quirks
    fits: bool
    limited: tuple[Answer, ...]
    body_errors: tuple[BodyError, ...]
    mints: bool
    can: Mapping[DialectName, frozenset[str]]
    refrains: Mapping[DialectName, Refrains] = field(repr=False)

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
    vendor = shaped(config, vendor)
    quirks = _quirks(config.quirks, vendor.quirks)
    places = _Places(config, vendor, quirks)
    faces = {dialect: face for dialect, spec in vendor.faces.items() if (face := places.face(dialect, spec))}
    faces |= {dialect: places.own(dialect, url) for dialect, url in config.dialects.items()}
    first = next(iter(faces))
    endpoints = {one: face for one, spec in vendor.endpoints.items() if (face := places.face(first, spec))}
    listing = places.listing(faces)
    raw = places.raw()
    own = frozenset(key.lower().encode() for key in config.headers)
    everywhere = (raw, *faces.values(), *endpoints.values(), *([listing.face] if listing else []))
    return Provider(
        name=name,
        faces=faces,
        endpoints=endpoints,
        raw=raw,
        listing=listing,
        credentials=credentials,
        timeouts=config.timeouts,
        header_lines=b"".join(b"%b: %b\r\n" % (key.encode(), value.encode()) for key, value in config.headers.items()),
        header_names=own,
        own_or_coding=own | {b"accept-encoding"},
        proxy=_proxy(config),
        refusals=vendor.refusals,
        origins=frozenset(face.origin for face in everywhere),
        usable=usable,
        tells_usage=quirks.stream_options,
        quirks=quirks,
        fits=quirks.fit,
        limited=quirks.limited,
        body_errors=quirks.body_errors,
        mints=_minting(config, vendor),
        can=vendor.can,
        refrains={dialect: Refrains(DIALECTS[dialect].places) for dialect in faces},
    )


def needs_key(config: ProviderConfig, vendor: Vendor) -> bool:
    return (config.auth or shaped(config, vendor).auth) != "none"


def keys_of(
    name: str, config: ProviderConfig, vendor: Vendor, secrets: Sequence[Key], warn: Callable[[str], None]
) -> Sequence[Key]:
    """The keys as the provider's requests bear them: service accounts where it has such. What is unusable is warned of
    and left out, and so is what could end up with somebody whom it is not for.
    """
    for setting in sorted(_given(config) - vendor.takes):
        warn(f"providers.{name}.{setting}: has no effect, because addresses of this vendor have no place for it")
    minting = _minting(config, shaped(config, vendor))
    keys: list[Key] = []
    for secret in secrets:
        if not minting and oauth.is_service_account(secret):
            warn(f"providers.{name}: the secret {secret!r} is a service account's; it needs `project`, or that `auth`")
            continue
        try:
            keys.append(oauth.ServiceAccount(secret, proxy=_proxy(config)) if minting else secret)
        except oauth.UnusableKey as unusable:
            warn(f"providers.{name}: the secret {secret!r} {unusable}")
    return keys


def shaped(config: ProviderConfig, vendor: Vendor) -> Vendor:
    """The vendor in the form that the provider's section asks for."""
    return vendor.shaped(_given(config))


def _given(config: ProviderConfig) -> set[str]:
    defaults = ProviderConfig.model_fields
    return {one for one in _SETTINGS if getattr(config, one) != defaults[one].get_default(call_default_factory=True)}


def _minting(config: ProviderConfig, vendor: Vendor) -> bool:
    return "service-account" in ({config.auth} if config.auth else {vendor.auth, *vendor.face_auth.values()})


def _quirks(config: QuirksConfig, known: Quirks) -> Quirks:
    """What the administrator wrote, field by field, else what is known."""
    told = config.model_dump(exclude_none=True)
    written = catalogue.quirks_of(told)
    return Quirks(**{one: getattr(written if one in told else known, one) for one in QuirksConfig.model_fields})


class _Places:
    """Where the faces of one provider are.

    A configured base URL takes the place of the vendor's, also for faces that have an origin of their own: whoever
    configures one wants all requests there.
    """

    def __init__(self, config: ProviderConfig, vendor: Vendor, quirks: Quirks) -> None:
        self._config = config
        self._vendor = vendor
        self._quirks = quirks
        self._words = {"project": config.project, "location": config.location, "api_version": config.api_version}
        url = config.base_url or vendor.base_url
        self._base = None if url is None else _base(self._filled(url), [*vendor.faces.values(), *_elsewhere(vendor)])

    def face(self, dialect: DialectName, spec: str) -> Face | None:
        """A face of the vendor, None without a base URL. `spec` is a path below the base, or a whole URL."""
        config = self._config
        spec = self._filled(spec)
        if "://" in spec:
            place, path = split_url(spec)
            if config.base_url is None:
                return self._made(dialect, place, path)
            spec = path
        if self._base is None:
            return None
        spec = _own_version(config.base_url, spec, dialect) or spec
        return self._made(dialect, self._base[0], self._base[1] + spec)

    def own(self, dialect: DialectName, url: str) -> Face:
        """A face that the configuration gives."""
        origin, path = split_url(url)
        return self._made(dialect, origin, path if _VERSION.search(path) else path + STANDARD_ROOT[dialect])

    def raw(self) -> Face:
        base = self._base or _base(next(iter(self._config.dialects.values())), ())
        return Face(base[0], base[1].encode(), self._auth(None))

    def listing(self, faces: Mapping[DialectName, Face]) -> Listing | None:
        told = self._vendor.discovery
        if told is None:
            return None
        dialect = told.face if told.face is not None and told.face in faces else next(iter(faces))
        face = faces[dialect] if told.base is None else self.face(dialect, told.base)
        if face is None or _DEPLOYMENT in face.root:
            return None
        return Listing(face, told.path.encode(), told.shape, told.page)

    def _made(self, dialect: DialectName, origin: Origin, root: str) -> Face:
        written = {key.lower() for key in self._config.headers}
        headers = {key: text for key, text in self._vendor.headers.get(dialect, {}).items() if key not in written}
        return Face(
            origin,
            root.encode(),
            self._auth(dialect),
            {key.encode(): f"{key}: {text}\r\n".encode() for key, text in headers.items()},
            self._filled(self._vendor.query).encode(),
            self._config.deployments if "{deployment}" in root else None,
        )

    def _auth(self, dialect: DialectName | None) -> AuthPlace:
        if self._config.auth is not None:
            place: AuthPlace = self._config.auth
        elif dialect is not None:
            place = self._vendor.face_auth.get(dialect, self._vendor.auth)
        else:
            place = self._vendor.auth
        both = self._quirks.both_keys and dialect == "openai_chat" and place == "bearer"
        return "bearer+x-goog-api-key" if both else place

    def _filled(self, text: str) -> str:
        """The text with the section's words in their places; that of the deployment is each request's own."""
        for word, value in self._words.items():
            if value is not None:
                text = text.replace("{" + word + "}", value)
        return text


def _elsewhere(vendor: Vendor) -> Sequence[str]:
    return tuple(vendor.endpoints.values())


def _own_version(url: str | None, root: str, dialect: DialectName) -> str | None:
    """A version at the end of a configured base URL that no client would send (`/v4`) stands for the client's own."""
    version = _VERSION.search(split_url(url)[1]) if url else None
    if version is None or version[0] in STANDARD_ROOT.values() or root != STANDARD_ROOT[dialect]:
        return None
    return version[0]


def _base(url: str, roots: Collection[str]) -> tuple[Origin, str]:
    """Origin and path of a base URL, without what a face adds by itself: one of its roots, or a version."""
    origin, path = split_url(url)
    for root in sorted(roots, key=len, reverse=True):
        if root and "://" not in root and path.endswith(root):
            return origin, path.removesuffix(root)
    return origin, _VERSION.sub("", path)


def _proxy(config: ProviderConfig) -> Origin | None:
    return split_url(config.proxy)[0] if config.proxy else None


def split_url(url: str) -> tuple[Origin, str]:
    """Origin and path (no slash at its end) of a URL that the configuration has checked."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    scheme = "https" if parts.scheme == "https" else "http"
    port = parts.port or (443 if scheme == "https" else 80)
    return Origin(scheme, parts.hostname, port), parts.path.rstrip("/")  # type: ignore[arg-type]
