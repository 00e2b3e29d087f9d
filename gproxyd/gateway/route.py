"""Operation and model -> provider, face and upstream target.

The order of the rules is the public contract's: the path names the provider or the model does; a request that names
neither goes to the home that the caller or the configuration picks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gproxyd.dialects.dialect import DIALECTS, Dialect
from gproxyd.errors import Refusal
from gproxyd.gateway.admission import Admission
from gproxyd.gateway.call import Call
from gproxyd.gateway.intake import Body, Intake, outline_of
from gproxyd.routing import names
from gproxyd.routing.credentials import Credential
from gproxyd.routing.names import Resolved
from gproxyd.routing.providers import Face, Provider
from gproxyd.types import DialectName
from gproxyd.vendors import auth
from gproxyd.vendors.catalogue import RefusedKey
from gproxyd.wire import splice
from gproxyd.wire.headers import Headers, request_lines
from gproxyd.wire.http1 import request_head
from gproxyd.wire.operations import Operation
from gproxyd.wire.outline import Outline
from gproxyd.wire.target import MODEL_NAME

HOME_HEADER = b"x-gproxyd-provider"

_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_UNDERSTOOD = frozenset({"json", "path", "path+body"})


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Where requests of one kind go, and how their answers come back. Nothing in it belongs to a single request.

    asked       the model as the client names it, `model` as the upstream does; None where none is known
    shown       the JSON text that replies must bear as their model, None if they keep their own
    head        the request's head as far as it is the same every time: all but the credential and the framing
    tags        response lines that name provider and model
    hold        whether a small JSON answer waits until it is whole
    redirects   whether a redirect is the client's to see
    keepalive   seconds of silence after which a stream gets a ping, 0 for never
    refusals    answers that mean that the gateway's own key was refused
    """

    provider: Provider
    face: Face
    dialect: Dialect
    operation: Operation | None
    asked: str | None
    model: str | None
    shown: bytes | None
    head: bytes = field(repr=False)
    tags: bytes
    hold: bool
    redirects: bool
    keepalive: float
    refusals: tuple[RefusedKey, ...]

    def head_for(self, credential: Credential, length: int | None, method: str) -> bytes:
        """The whole head of a request whose body has `length` bytes (None: chunked)."""
        face = self.face
        if length is None:
            framing = b"Transfer-Encoding: chunked\r\n\r\n"
        elif length or method not in _BODILESS:
            framing = b"Content-Length: %d\r\n\r\n" % length
        else:
            framing = b"\r\n"
        key = credential.key
        if key is None:
            return self.head + auth.attach("none", "", face.origin, self.provider.origins) + framing
        return self.head + auth.attach(face.auth, key.reveal(), face.origin, self.provider.origins) + framing


def make(admission: Admission, provider: Provider, call: Call, *, renamed: bool, rewritten: bool) -> Route:
    """Puts a route together. `renamed` says that replies must bear the name that the client sent.

    Raises Refusal (501) for a provider that does not speak the endpoint's dialect.
    """
    operation, target, model = admission.operation, admission.target, call.model
    face = _face(admission, provider)
    query = b"?" + target.query if target.marked else b""
    path = (face.root + _rest(admission, model) or b"/") + query
    understood = renamed or (operation is not None and operation.model in _UNDERSTOOD)
    drop = provider.own_or_coding if understood else provider.header_names
    named = model if model is not None and MODEL_NAME.fullmatch(model) else None  # a raw body may say anything
    tags = b"x-gproxyd-provider: %b\r\n" % provider.name.encode("ascii")
    return Route(
        provider=provider,
        face=face,
        dialect=DIALECTS[admission.dialect],
        operation=operation,
        asked=call.requested_model,
        model=model,
        shown=splice.quoted(call.requested_model or "") if renamed else None,
        head=request_head(
            call.method,
            path,
            face.authority,
            b"Accept-Encoding: identity\r\n" if understood else b"",
            request_lines(admission.headers, rewritten=rewritten, drop=drop),
            provider.header_lines,
        ),
        tags=tags if named is None else tags + b"x-gproxyd-model: %b\r\n" % named.encode("ascii"),
        hold=_held(operation, path) and call.method != "HEAD",
        redirects=target.form == "raw",
        keepalive=admission.snapshot.config.streams.keepalive,
        refusals=provider.refusals if face.auth != "none" else (),
    )


def _held(operation: Operation | None, path: bytes) -> bool:
    """Whether a small JSON answer waits until it is whole: not where it grows, nor where it is somebody's file."""
    if operation is None or operation.model == "none":
        return False
    return not operation.growing or b"alt=sse" in path  # events were asked for, so JSON does not grow


def _rest(admission: Admission, model: str | None) -> bytes:
    """What follows the face's root; the path's model replaced where it has one."""
    target, operation = admission.target, admission.operation
    rest = target.rest
    if model is None or operation is None or operation.model not in ("path", "path+body"):
        return rest
    assert target.id is not None
    before, _, verb = rest.rpartition(b":")
    return before[: len(before) - len(target.id)] + model.encode("ascii") + b":" + verb


def _face(admission: Admission, provider: Provider) -> Face:
    target, operation = admission.target, admission.operation
    if target.form == "raw":
        return _raw_face(admission, provider)
    if not target.version:
        return provider.raw
    face: Face | None
    if operation is None or operation.family is not None:
        # Paths that several dialects share: the caller's own if the provider has it, else whichever fits.
        told: DialectName | None = admission.dialect if operation is not None else None
        face = provider.faces.get(told) if told is not None and told != "openai_chat" else None
        face = face or provider.face_for(target.version)
    else:
        face = provider.faces.get(operation.dialect)
    if face is None:
        raise Refusal("unsupported", f"the provider '{provider.name}' does not speak this endpoint's dialect")
    return face


def _raw_face(admission: Admission, provider: Provider) -> Face:
    """The raw base; the key goes where the face that the path falls into wants it."""
    raw = provider.raw
    path = raw.root + admission.target.rest
    first = admission.operation.dialect if admission.operation is not None else provider.dialect
    order = sorted(provider.faces.items(), key=lambda item: (-len(item[1].root), item[0] != first))
    for _, face in order:
        if face.origin == raw.origin and path.startswith(face.root + b"/"):
            return Face(raw.origin, raw.root, face.auth)
    return raw


class Router:
    """Finds the route of one request, reading as much of its body as that takes."""

    def __init__(self, admission: Admission, headers: Headers, intake: Intake, call: Call) -> None:
        self._admission = admission
        self._snapshot = admission.snapshot
        self._target = admission.target
        self._operation = admission.operation
        self._headers = headers
        self._intake = intake
        self._call = call
        self._server = self._snapshot.config.server

    async def route(self) -> tuple[Route, Body]:
        """Raises Refusal."""
        operation = self._operation
        place = operation.model if operation is not None else "none"
        if place in ("path", "path+body"):
            return await self._by_path()
        if self._target.form == "raw" or (operation is None and self._target.form == "scoped"):
            return await self._untouched()
        if place == "json":
            return await self._by_json()
        if place == "multipart":
            return await self._by_form()
        provider = self._in_path() or self._home()
        return self._to(provider, self._intake.stream(self._server.max_upload))

    # Who.

    def _provider(self, name: str) -> Provider:
        provider = self._snapshot.providers.get(name)
        if provider is None:
            raise Refusal("unknown_provider", "no provider of that name is configured")
        self._call.provider = name
        if not provider.usable:
            raise Refusal("no_target", f"the provider '{name}' is switched off: its secret is missing")
        return provider

    def _in_path(self) -> Provider | None:
        return self._provider(self._target.provider) if self._target.provider is not None else None

    def _home(self) -> Provider:
        """The provider of a request that names no model: the caller's choice, else the configuration's."""
        family = self._operation.family if self._operation is not None else None
        if family is None:
            raise Refusal("invalid_request", "the request names no 'model'", param="model")
        chosen = self._headers.get(HOME_HEADER)
        name = chosen.decode("ascii", "replace") if chosen is not None else self._target.home
        if name is None:
            name = getattr(self._snapshot.config.endpoints, family)
        if name is None:
            if self._operation is not None and self._operation.model in ("json", "multipart"):
                raise Refusal("invalid_request", "the request names no 'model'", param="model")
            raise Refusal(
                "provider_prefix",
                f"this endpoint needs to know its provider: send the header x-gproxyd-provider, the parameter "
                f"?provider=, call '/{{provider}}/v1/...', or have endpoints.{family} configured",
            )
        return self._provider(name)

    def _resolve(self, requested: str) -> Resolved:
        self._call.requested_model = requested
        if self._target.provider is not None:
            resolved = names.within(requested, self._target.provider, self._snapshot.aliases)
        else:
            resolved = names.aggregated(requested, self._snapshot.aliases, self._snapshot.providers)
        self._call.model = resolved.model
        return resolved

    # The body.

    async def _by_json(self) -> tuple[Route, Body]:
        self._intake.demand_json()
        provider = self._in_path()
        body = await self._intake.read(self._server.max_body)
        found = await outline_of(body)
        if not found.models:
            sent = self._with_stream(body, found)
            return self._to(provider or self._home(), Body.whole(sent, rewritten=sent is not body))
        if found.models > 1:
            raise Refusal("invalid_request", "'model' must not be there twice", param="model")
        resolved = self._resolve(names.check(found.model))
        sent = found.renamed(body, resolved.model) if resolved.model != self._call.requested_model else body
        sent = self._with_stream(sent, found)
        whole = Body.whole(sent, rewritten=sent is not body)
        return self._to(provider or self._provider(resolved.provider), whole, resolved)

    def _with_stream(self, body: bytes, found: Outline) -> bytes:
        """`chat.default_stream`: a chat request that says nothing of `stream` asks for one."""
        asked = self._operation is None or self._operation.name != "chat" or found.has_stream
        if asked or not self._snapshot.config.chat.default_stream:
            return body
        brace = body.index(b"{") + 1
        return body[:brace] + (b'"stream":true,' if found.members else b'"stream":true') + body[brace:]

    async def _by_path(self) -> tuple[Route, Body]:
        """Gemini: `/models/{model}:verb`, the model with its slashes."""
        assert self._target.id is not None
        provider = self._in_path()
        requested = self._target.id.decode("ascii")
        if self._target.form == "raw":
            resolved = names.within(requested, self._target.provider or "", self._snapshot.aliases)
            self._call.model, self._call.requested_model = resolved.model, requested
        else:
            resolved = self._resolve(names.check(requested))
        provider = provider or self._provider(resolved.provider)
        assert self._operation is not None
        if self._operation.model == "path" or resolved.model == requested:
            return self._to(provider, self._intake.stream(self._server.max_body), resolved)
        body = await self._intake.read(self._server.max_body)
        renamed = splice.replace_model_path(body, requested, resolved.model)
        return self._to(provider, Body.whole(renamed, rewritten=renamed != body), resolved)

    async def _by_form(self) -> tuple[Route, Body]:
        provider = self._in_path()
        if provider is not None and provider.name not in self._snapshot.aliased:
            return self._to(provider, self._intake.stream(self._server.max_upload))
        form = await self._intake.form(self._server.max_upload)
        if form.model is None:
            return self._to(provider or self._home(), form.body(None))
        resolved = self._resolve(names.check(form.model))
        return self._to(provider or self._provider(resolved.provider), form.body(resolved.model), resolved)

    async def _untouched(self) -> tuple[Route, Body]:
        """A body of which nothing is known passes, unless it is JSON and bears an alias of this very provider."""
        provider = self._in_path()
        assert provider is not None
        intake, limit = self._intake, self._server.max_body
        known = self._operation is not None and self._operation.model == "json"
        small = intake.complete or (intake.length is not None and intake.length <= limit)
        if not (intake.present and small and intake.is_json() and (known or provider.name in self._snapshot.aliased)):
            return self._to(provider, intake.stream(self._server.max_upload))
        body = await intake.read(limit)
        whole = Body.whole(body, rewritten=False)
        try:
            found = await outline_of(body)
        except Refusal:
            return self._to(provider, whole)
        requested = found.model
        if not isinstance(requested, str):
            return self._to(provider, whole)
        resolved = names.within(requested, provider.name, self._snapshot.aliases)
        self._call.requested_model = self._call.model = requested
        if resolved.renamed:
            if found.models > 1:
                raise Refusal("invalid_request", "'model' must not be there twice", param="model")
            self._call.model = resolved.model
            whole = Body.whole(found.renamed(body, resolved.model), rewritten=True)
        return self._to(provider, whole, resolved)

    # Where.

    def _to(self, provider: Provider, body: Body, resolved: Resolved | None = None) -> tuple[Route, Body]:
        renamed = resolved is not None and resolved.renamed
        return make(self._admission, provider, self._call, renamed=renamed, rewritten=body.rewritten), body
