"""Finds the route of a request, reading as much of its body as that takes.

The order of the rules is the public contract's: the path names the provider or the model does; a request that names
neither goes to the home that the caller or the configuration picks. Then: may the caller, and can they afford it?
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gproxyd.dialects import bonds, identity, quirks
from gproxyd.errors import Refusal
from gproxyd.gateway import agents
from gproxyd.gateway.admission import Admission
from gproxyd.gateway.agents import AgentAtWork
from gproxyd.gateway.attempts import Leg, Passage
from gproxyd.gateway.books import Books
from gproxyd.gateway.call import Call
from gproxyd.gateway.fitting import Fitting
from gproxyd.gateway.homing import Homes, home_of
from gproxyd.gateway.intake import Body, Intake, in_steps, outline_of
from gproxyd.gateway.route import HOME_HEADER, make
from gproxyd.policy.callers import authorise_agent, authorise_model, authorise_provider
from gproxyd.routing import names
from gproxyd.routing.health import Registry
from gproxyd.routing.names import Resolved
from gproxyd.routing.plan import Target, Terms
from gproxyd.routing.providers import Provider
from gproxyd.wire import inject, outline, splice
from gproxyd.wire.headers import Headers
from gproxyd.wire.outline import Outline
from gproxyd.wire.pieces import Edit, edited


class Router:
    """Finds the route of one request, reading as much of its body as that takes."""

    def __init__(
        self,
        admission: Admission,
        headers: Headers,
        intake: Intake,
        call: Call,
        books: Books,
        registry: Registry,
        homes: Homes | None,
    ) -> None:
        self._homes = homes
        self._pinned: str | None = None
        self._books = books
        self._registry = registry
        self._admission = admission
        self._snapshot = admission.snapshot
        self._target = admission.target
        self._operation = admission.operation
        self._headers = headers
        self._intake = intake
        self._call = call
        self._server = self._snapshot.config.server

    async def route(self) -> Passage:
        """Everywhere the request may go, and what it may cost set aside. Raises Refusal."""
        operation = self._operation
        if operation is not None and operation.model == "none" and self._target.id is not None:
            asked = identity.asked(operation, self._target.id, {})
            self._pinned = await home_of(self._homes, asked)
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
        authorise_provider(self._admission.caller, provider.name)
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
        if name is None and self._pinned in self._snapshot.providers:
            name = self._pinned
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

    def _agent(self, requested: str) -> AgentAtWork | None:
        """The agent of that name, or the providers of a bare model where that is allowed. Raises Refusal (403)."""
        snapshot = self._snapshot
        if self._target.provider is not None or requested in snapshot.aliases:
            return None
        agent = snapshot.agents.get(requested)
        if agent is not None:
            self._call.requested_model = self._call.model = requested
            if requested in snapshot.config.agents:
                authorise_agent(self._admission.caller, requested)
            else:
                authorise_model(self._admission.caller, requested)  # an alias of one, which needs its own permission
            return agent
        provider, slash, _ = requested.partition("/")
        if snapshot.config.routing.bare_models == "reject" or (slash and provider in snapshot.providers):
            return None
        agent = agents.of_bare_model(snapshot, requested)
        if agent is not None:
            self._call.requested_model = self._call.model = requested
            authorise_model(self._admission.caller, requested)
        return agent

    def _resolve(self, requested: str) -> Resolved:
        self._call.requested_model = requested
        if self._target.provider is not None:
            resolved = names.within(requested, self._target.provider, self._snapshot.aliases)
        else:
            resolved = names.aggregated(requested, self._snapshot.aliases, self._snapshot.providers)
        self._call.model = resolved.model
        self._permit(requested, resolved)
        return resolved

    def _permit(self, requested: str, resolved: Resolved) -> None:
        """By the name that the client sent; scoped and raw requests are asked about as `provider/model`, too.

        An alias inherits nothing from its target: its own name must be allowed, or everything of that form.
        """
        caller, provider = self._admission.caller, self._target.provider
        if provider is None:
            authorise_model(caller, requested)
        elif not (resolved.renamed and caller.may_model(requested)):
            authorise_model(caller, f"{provider}/{requested}")

    # The body.

    async def _by_json(self) -> Passage:
        self._intake.demand_json()
        provider = self._in_path()
        body = await self._intake.read(self._server.max_body)
        found = await outline_of(body)
        if not found.models:
            provider = provider or self._home()
            authorise_provider(self._admission.caller, provider.name)
            if len(body) > outline.LARGE:
                whole = await self._large(body, self._stream_asked(body, found), [])
                return self._to(provider, whole, fields=found.fields)
            sent = self._with_stream(body, found)
            return self._to(provider, Body.whole(sent, rewritten=sent is not body), fields=found.fields)
        if found.models > 1:
            raise Refusal("invalid_request", "'model' must not be there twice", param="model")
        name = names.check(found.model)
        agent = self._agent(name)
        if agent is not None:
            return await self._by_agent(agent, body, found)
        resolved = self._resolve(name)
        provider = provider or self._provider(resolved.provider)
        if len(body) > outline.LARGE:
            edits = found.renaming(resolved.model) if resolved.model != self._call.requested_model else []
            edits += self._stream_asked(body, found)
            whole = await self._large(body, edits, self._usage_asked(body, found, provider), provider)
            return self._to(provider, whole, resolved, found.fields)
        sent = found.renamed(body, resolved.model) if resolved.model != self._call.requested_model else body
        sent = self._with_stream(sent, found)
        asking = self._with_usage(sent, found, provider)
        if provider.fits and self._operation is not None and self._operation.name == "chat":
            asking = quirks.fit(asking, provider.quirks)
        whole = Body.whole(asking, rewritten=sent is not body)
        return self._to(provider, whole, resolved, found.fields)

    async def _by_agent(self, agent: AgentAtWork, body: bytes, found: Outline) -> Passage:
        """A request to an agent: the members that fit it, in the order in which they are to be asked."""
        fitting = Fitting(agent, self._admission, self._call, self._books.stats, self._registry)
        large = len(body) > outline.LARGE
        if large:
            passage = await fitting.json_large(body, found, self._stream_asked(body, found), self._usage_asked)
        else:
            sent = self._with_stream(body, found)
            found = found if sent is body else outline.parse(sent)  # its model stands elsewhere now
            passage = fitting.json(sent, found, self._with_usage)
        if self._homes is not None and self._operation is not None and len(passage.legs) > 1:
            dialect, fields = self._admission.dialect, passage.fields
            if large:
                bound_to = await in_steps(bonds.bonds_large(self._operation, dialect, fields))
            else:
                bound_to = bonds.bonds(self._operation, dialect, fields)
            home = await home_of(self._homes, bound_to)
            # What lives with one vendor, or was thought by it, no other one can read.
            bound = [leg for leg in passage.legs if leg.provider == home]
            passage.legs, passage.usual = (bound, False) if bound else (passage.legs, True)
        return await self._ready(passage)

    def _with_stream(self, body: bytes, found: Outline) -> bytes:
        """`chat.default_stream`: a chat request that says nothing of `stream` asks for one."""
        asked = self._operation is None or self._operation.name != "chat" or found.has_stream
        if asked or not self._snapshot.config.chat.default_stream:
            return body
        return inject.member(body, b'"stream":true', empty=not found.members)

    def _with_usage(self, body: bytes, found: Outline, provider: Provider) -> bytes:
        """A chat stream tells its tokens only if asked to: where the client does not ask, the gateway does."""
        if self._operation is None or self._operation.name != "chat" or not provider.tells_usage:
            return body
        streams = found.fields.get("stream", self._snapshot.config.chat.default_stream)
        if streams is not True:
            return body
        asking = inject.usage_asked(body, found.fields)
        self._call.hide = asking is not body
        return asking

    # The same for large bodies, of which every part that changes is told before the whole is copied, once and in steps.

    def _stream_asked(self, body: bytes, found: Outline) -> list[Edit]:
        asked = self._operation is None or self._operation.name != "chat" or found.has_stream
        if asked or not self._snapshot.config.chat.default_stream:
            return []
        return [outline.first_member(body, b'"stream":true', empty=not found.members)]

    def _usage_asked(self, body: bytes, found: Outline, provider: Provider) -> list[Edit]:
        if self._operation is None or self._operation.name != "chat" or not provider.tells_usage:
            return []
        streams = found.fields.get("stream", self._snapshot.config.chat.default_stream)
        edits = outline.usage_asked(body, found) if streams is True else []
        self._call.hide = bool(edits)
        return edits

    async def _large(
        self, body: bytes, edits: list[Edit], asking: list[Edit], provider: Provider | None = None
    ) -> Body:
        """The body as it goes on; `asking` is what the gateway does for its own sake."""
        text = await in_steps(edited(body, edits + asking)) if edits or asking else body
        if provider is not None and provider.fits and self._operation is not None and self._operation.name == "chat":
            text = await in_steps(quirks.fit_large(text, provider.quirks))
        return Body.whole(text, rewritten=bool(edits))

    async def _by_path(self) -> Passage:
        """Gemini: `/models/{model}:verb`, the model with its slashes."""
        assert self._target.id is not None
        provider = self._in_path()
        requested = self._target.id.decode("ascii")
        if self._target.form == "raw":
            resolved = names.within(requested, self._target.provider or "", self._snapshot.aliases)
            self._call.model, self._call.requested_model = resolved.model, requested
            self._permit(requested, resolved)
        else:
            agent = self._agent(names.check(requested))
            if agent is not None:
                return await self._by_path_to(agent, requested)
            resolved = self._resolve(requested)
        provider = provider or self._provider(resolved.provider)
        assert self._operation is not None
        plain = self._operation.model == "path" or resolved.model == requested
        if plain and all(account.limit is None for account in self._admission.caller.accounts):
            return self._to(provider, self._intake.stream(self._server.max_body), resolved)
        body = await self._intake.read(self._server.max_body)
        renamed = body if plain else await self._renamed_within(body, requested, resolved.model)
        return self._to(provider, Body.whole(renamed, rewritten=renamed is not body), resolved, await _fields_of(body))

    async def _renamed_within(self, body: bytes, old: str, new: str) -> bytes:
        if len(body) <= outline.LARGE:
            return splice.replace_model_path(body, old, new)
        return await in_steps(splice.replace_model_path_large(body, old, new))

    async def _by_path_to(self, agent: AgentAtWork, requested: str) -> Passage:
        body = await self._intake.read(self._server.max_body)
        fitting = Fitting(agent, self._admission, self._call, self._books.stats, self._registry)
        found = await outline_of(body)
        if len(body) > outline.LARGE:
            return await self._ready(await fitting.path_large(body, requested))
        return self._held(fitting.path(body, requested, found))

    async def _by_form(self) -> Passage:
        provider = self._in_path()
        whole = provider is not None and self._admission.caller.may_provider(provider.name)
        if provider is not None and whole and provider.name not in self._snapshot.aliased:
            return self._to(provider, self._intake.stream(self._server.max_upload))
        form = await self._intake.form(self._server.max_upload)
        if form.model is None:
            provider = provider or self._home()
            authorise_provider(self._admission.caller, provider.name)
            return self._to(provider, form.body(None))
        agent = self._agent(names.check(form.model))
        if agent is not None:
            fitting = Fitting(agent, self._admission, self._call, self._books.stats, self._registry)
            return self._held(fitting.form(form))
        resolved = self._resolve(form.model)
        return self._to(provider or self._provider(resolved.provider), form.body(resolved.model), resolved)

    async def _untouched(self) -> Passage:
        """A body of which nothing is known passes, unless it is JSON and bears an alias of this very provider."""
        provider = self._in_path()
        assert provider is not None
        intake, limit = self._intake, self._server.max_body
        caller = self._admission.caller
        known = self._operation is not None and self._operation.model == "json"
        whole_provider = caller.may_provider(provider.name)
        if not known:  # what nobody here can read may name any model, wherever it likes
            authorise_provider(caller, provider.name)
        looked_at = known or provider.name in self._snapshot.aliased
        # Who may not send this provider everything must name a model, however long it takes to read it.
        small = not whole_provider or intake.complete or (intake.length is not None and intake.length <= limit)
        if not (intake.present and small and intake.is_json() and looked_at):
            authorise_provider(caller, provider.name)
            return self._to(provider, intake.stream(self._server.max_upload))
        body = await intake.read(limit)
        whole = Body.whole(body, rewritten=False)
        try:
            found = await outline_of(body)
        except Refusal:
            authorise_provider(caller, provider.name)
            return self._to(provider, whole)
        requested = found.model
        if not isinstance(requested, str):
            authorise_provider(caller, provider.name)
            return self._to(provider, whole, fields=found.fields)
        resolved = names.within(requested, provider.name, self._snapshot.aliases)
        self._call.requested_model = self._call.model = requested
        if found.models > 1 and (resolved.renamed or not whole_provider):
            raise Refusal("invalid_request", "'model' must not be there twice", param="model")
        self._permit(requested, resolved)
        if resolved.renamed:
            self._call.model = resolved.model
            if len(body) > outline.LARGE:
                whole = await self._large(body, found.renaming(resolved.model), [])
            else:
                whole = Body.whole(found.renamed(body, resolved.model), rewritten=True)
        return self._to(provider, whole, resolved, found.fields)

    # Where.

    def _to(
        self,
        provider: Provider,
        body: Body,
        resolved: Resolved | None = None,
        fields: Mapping[str, object] = MappingProxyType({}),
    ) -> Passage:
        """The only way, once what the request may cost has been set aside. Raises Refusal (402, 429, 501)."""
        renamed = resolved is not None and resolved.renamed
        call, registry = self._call, self._registry
        route = make(
            self._admission, provider, call, self._books.stats, registry, renamed=renamed, rewritten=body.rewritten
        )
        call.route = route
        leg = Leg(provider.name, route.model, None, (route, body))
        legs = [Target(provider.name, route.model or "", route.health, registry.budget(provider.name), leg)]
        retries = self._snapshot.config.routing.retries
        return self._held(Passage(legs, Terms(retries.max, retries.budget), body.length or 0, fields))

    async def _ready(self, passage: Passage) -> Passage:
        """The same, when what takes long is done."""
        if passage.legs[0].what.prepare is not None:
            await passage.legs[0].what.ready(self._call)
        return self._held(passage)

    def _held(self, passage: Passage) -> Passage:
        """Sets aside what the request may cost where it will be sent first."""
        leg = passage.legs[0].what
        route, _ = leg.take(self._call)
        passage.size = self._intake.length or passage.size
        passage.hold(leg, route, self._call, self._books)
        return passage


async def _fields_of(body: bytes) -> Mapping[str, object]:
    """The members of a body, for what it may cost; of one that nobody here can read there are none."""
    try:
        return (await outline_of(body)).fields
    except Refusal:
        return {}
