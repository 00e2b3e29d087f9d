"""Operation and model -> provider, face and upstream target.

The order of the rules is the public contract's: the path names the provider or the model does; a request that names
neither goes to the home that the caller or the configuration picks.
"""

from __future__ import annotations

from dataclasses import dataclass

from gproxyd.dialects.dialect import DIALECTS, Dialect
from gproxyd.errors import Refusal
from gproxyd.gateway.call import Call
from gproxyd.gateway.intake import Body, Intake, outline_of
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.routing import names
from gproxyd.routing.names import Resolved
from gproxyd.routing.providers import Face, Provider
from gproxyd.wire import splice
from gproxyd.wire.headers import Headers
from gproxyd.wire.operations import Operation
from gproxyd.wire.outline import Outline
from gproxyd.wire.target import Target

HOME_HEADER = b"x-gproxyd-provider"


@dataclass(slots=True)
class Route:
    """Where one request goes. `shown` is the model's name that replies must bear, None if they keep their own."""

    provider: Provider
    face: Face
    target: bytes
    dialect: Dialect
    body: Body
    shown: str | None
    operation: Operation | None


class Router:
    """Finds the route of one request, reading as much of its body as that takes."""

    def __init__(
        self,
        snapshot: Snapshot,
        target: Target,
        operation: Operation | None,
        headers: Headers,
        intake: Intake,
        call: Call,
    ) -> None:
        self._snapshot = snapshot
        self._target = target
        self._operation = operation
        self._headers = headers
        self._intake = intake
        self._call = call
        self._server = snapshot.config.server

    async def route(self) -> Route:
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

    async def _by_json(self) -> Route:
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

    async def _by_path(self) -> Route:
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

    async def _by_form(self) -> Route:
        provider = self._in_path()
        if provider is not None and provider.name not in self._snapshot.aliased:
            return self._to(provider, self._intake.stream(self._server.max_upload))
        form = await self._intake.form(self._server.max_upload)
        if form.model is None:
            return self._to(provider or self._home(), form.body(None))
        resolved = self._resolve(names.check(form.model))
        return self._to(provider or self._provider(resolved.provider), form.body(resolved.model), resolved)

    async def _untouched(self) -> Route:
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

    def _to(self, provider: Provider, body: Body, resolved: Resolved | None = None) -> Route:
        face = self._face(provider)
        shown = self._call.requested_model if resolved is not None and resolved.renamed else None
        query = b"?" + self._target.query if self._target.marked else b""
        path = (face.root + self._rest(resolved) or b"/") + query
        assert self._call.dialect is not None  # admission has set it
        return Route(provider, face, path, DIALECTS[self._call.dialect], body, shown, self._operation)

    def _rest(self, resolved: Resolved | None) -> bytes:
        """What follows the face's root; the path's model replaced where it has one."""
        rest = self._target.rest
        if resolved is None or self._operation is None or self._operation.model not in ("path", "path+body"):
            return rest
        assert self._target.id is not None
        before, _, verb = rest.rpartition(b":")
        return before[: len(before) - len(self._target.id)] + resolved.model.encode("ascii") + b":" + verb

    def _face(self, provider: Provider) -> Face:
        if self._target.form == "raw":
            return self._raw_face(provider)
        if not self._target.version:
            return provider.raw
        operation = self._operation
        if operation is None or operation.family is not None:
            # Paths that several dialects share: the caller's own if the provider has it, else whichever fits.
            told = self._call.dialect if operation is not None and self._call.dialect != "openai_chat" else None
            face = provider.faces.get(told) if told is not None else None
            face = face or provider.face_for(self._target.version)
        else:
            face = provider.faces.get(operation.dialect)
        if face is None:
            raise Refusal("unsupported", f"the provider '{provider.name}' does not speak this endpoint's dialect")
        return face

    def _raw_face(self, provider: Provider) -> Face:
        """The raw base; the key goes where the face that the path falls into wants it."""
        raw = provider.raw
        path = raw.root + self._target.rest
        first = self._operation.dialect if self._operation is not None else provider.dialect
        order = sorted(provider.faces.items(), key=lambda item: (-len(item[1].root), item[0] != first))
        for _, face in order:
            if face.origin == raw.origin and path.startswith(face.root + b"/"):
                return Face(raw.origin, raw.root, face.auth)
        return raw
