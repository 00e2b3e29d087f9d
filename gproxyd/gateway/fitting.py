"""A request fitted to an agent's members: which of them can take it, in which order, and how it reads for each.

Invariants: a member gets the request as it would have been sent there by name, but for what the agent's configuration
says; nothing is left out of a request unless the agent allows it, and every time is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gproxyd.dialects import conversation, draft, quirks
from gproxyd.dialects.conversation import Sticky
from gproxyd.dialects.draft import Draft
from gproxyd.dialects.prompt import with_system
from gproxyd.dialects.rewrite import rewrite
from gproxyd.dialects.sift import sift
from gproxyd.dialects.trim import trim
from gproxyd.errors import Refusal
from gproxyd.gateway.admission import Admission
from gproxyd.gateway.agents import AgentAtWork, Member
from gproxyd.gateway.attempts import Leg, Passage
from gproxyd.gateway.call import Call
from gproxyd.gateway.intake import Body, Form, in_steps
from gproxyd.gateway.route import Route, make, speaks
from gproxyd.observe.stats import Stats
from gproxyd.routing.agents import Place
from gproxyd.routing.health import Registry
from gproxyd.routing.plan import Target, Terms
from gproxyd.routing.providers import Provider
from gproxyd.types import DialectName
from gproxyd.wire import outline, splice
from gproxyd.wire.outline import Outline
from gproxyd.wire.pieces import Edit

STICKY_FOR = 3600.0
"""Seconds for which a conversation stays that is told by a header, unless the configuration says otherwise."""

ANSWER = 4096
"""Tokens that are left for an answer when a request is shortened and says nothing of how long that may be."""

# dialect -> the members that bound an answer's tokens
_MOST: Mapping[DialectName, Sequence[str]] = {
    "openai_chat": ("max_completion_tokens", "max_tokens"),
    "openai_responses": ("max_output_tokens",),
    "anthropic": ("max_tokens",),
}
_GEMINI = ("generationConfig", "generation_config", "maxOutputTokens", "max_output_tokens")

Asking = Callable[[bytes, Outline, Provider], bytes]
AskingLarge = Callable[[bytes, Outline, Provider], list[Edit]]
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found out about a large request, in steps, before it is asked for."""

    needs: frozenset[str]
    tokens: int
    sticky: Sticky | None


class Fitting:
    """One request to one agent."""

    def __init__(self, agent: AgentAtWork, admission: Admission, call: Call, stats: Stats, registry: Registry) -> None:
        self._agent = agent
        self._admission = admission
        self._dialect = admission.dialect
        self._snapshot = admission.snapshot
        self._call = call
        self._stats = stats
        self._registry = registry
        self._known: _Known | None = None

    # The three places where a request names its model.

    def json(self, body: bytes, found: Outline, asking: Asking) -> Passage:
        """In a JSON body; `asking` puts in what makes a provider tell tokens. Raises Refusal."""
        fields, sent = self._common(body, found)
        chat = self._admission.operation is not None and self._admission.operation.name == "chat"

        def leg(member: Member) -> Body:
            provider = self._snapshot.providers[member.place.provider]
            text = self._for_member(member, sent, fields)
            own = found if text is body else outline.parse(text)
            text = asking(own.renamed(text, member.place.model), own, provider)
            if chat and provider.fits:
                text = quirks.fit(text, provider.quirks)
            return Body.whole(text, rewritten=True)

        return self._passage(fields, len(body), leg)

    def path(self, body: bytes, requested: str, found: Outline) -> Passage:
        """In the path, and perhaps in the body once more. Raises Refusal."""
        fields, sent = self._common(body, found)
        plain = self._admission.operation is not None and self._admission.operation.model == "path"

        def leg(member: Member) -> Body:
            text = self._for_member(member, sent, fields)
            if not plain:
                text = splice.replace_model_path(text, requested, member.place.model)
            return Body.whole(text, rewritten=text is not body)

        return self._passage(fields, len(body), leg)

    def form(self, form: Form) -> Passage:
        """In a form, which can be sent once only. Raises Refusal."""
        passage = self._passage({}, 0, lambda member: form.body(member.place.model))
        passage.legs = [one for one in passage.legs if one.health.usable(self._registry.clock())][:1] or passage.legs[
            :1
        ]
        passage.terms = Terms(0, 0.0)
        return passage

    # The same for large bodies: what takes long is done in steps, and for a member when it is asked.

    async def json_large(self, body: bytes, found: Outline, edits: list[Edit], asking: AskingLarge) -> Passage:
        """`edits` are those that hold for all members. Raises Refusal."""
        common = await self._common_large(body)
        chat = self._admission.operation is not None and self._admission.operation.name == "chat"

        async def text(member: Member) -> tuple[bytes, bool]:
            provider = self._snapshot.providers[member.place.provider]
            asked = asking(body, found, provider)
            own = await self._for_member_large(member, common, len(body))
            more = [*edits, *found.renaming(member.place.model), *asked]
            text = await in_steps(draft.written(body, own, more))
            if chat and provider.fits:
                text = await in_steps(quirks.fit_large(text, provider.quirks))
            return text, bool(asked)

        return await self._passage_large(common, len(body), text, body)

    async def path_large(self, body: bytes, requested: str) -> Passage:
        """Raises Refusal."""
        common = await self._common_large(body)
        plain = self._admission.operation is not None and self._admission.operation.model == "path"

        async def text(member: Member) -> tuple[bytes, bool]:
            own = await self._for_member_large(member, common, len(body))
            text = await in_steps(draft.written(body, own, ()))
            if not plain:
                text = await in_steps(splice.replace_model_path_large(text, requested, member.place.model))
            return text, False

        return await self._passage_large(common, len(body), text, body)

    async def _common_large(self, body: bytes) -> Draft:
        common = draft.drafted(self._dialect, await in_steps(sift(self._dialect, body)))
        settings = self._agent.settings
        if settings.system_prompt:
            common = await in_steps(draft.prompted(common, settings.system_prompt, settings.force))
        return common

    async def _passage_large(
        self, common: Draft, size: int, text: Callable[[Member], Awaitable[tuple[bytes, bool]]], body: bytes
    ) -> Passage:
        self._known = await self._learn(common, size)
        made: dict[Place, tuple[bytes, bool]] = {}

        def leg(member: Member) -> Body:
            own, self._call.hide = made.pop(member.place)
            return Body.whole(own, rewritten=own is not body)

        passage = self._passage(common.fields, size, leg)
        members = {member.place: member for member in self._agent.members}

        async def prepare(place: Place) -> None:
            made[place] = await text(members[place])

        for target in passage.legs:
            target.what.prepare = partial(prepare, Place(target.provider, target.model))
        return passage

    async def _learn(self, common: Draft, size: int) -> _Known:
        """No more than will be asked for."""
        dialect, fields, members = self._dialect, common.fields, self._agent.members
        needed: frozenset[str] = frozenset()
        if len(members) > 1:
            needed = await in_steps(conversation.needs_large(dialect, fields))
        tokens = conversation.estimate_tokens(dialect, {}, size)
        if any(one.facts.context is not None and size > one.facts.context for one in members):
            tokens = await in_steps(draft.tokens(common, size))
        sticky = await in_steps(conversation.sticky_key_large(dialect, fields)) if self._agent.sticks else None
        return _Known(needed, tokens, sticky)

    async def _for_member_large(self, member: Member, common: Draft, size: int) -> Draft:
        own = replace(common, fields=self._bounded(member, common.fields))
        context = member.facts.context
        if context is None or self._agent.settings.overflow != "trim" or size <= context:
            return own
        shorter = await in_steps(draft.shortened(own, size, context, self._budget(own.fields, context)))
        if shorter is not own:
            self._trimmed(shorter, context)
        return shorter or own

    # What holds for all members.

    def _common(self, body: bytes, found: Outline) -> tuple[Fields, bytes]:
        """All members of the request's body, and the body with the agent's own prompt in it."""
        fields = found.fields
        settings = self._agent.settings
        if settings.system_prompt is None:
            return fields, body
        prompted = with_system(self._dialect, fields, settings.system_prompt, settings.force)
        return prompted, rewrite(body, fields, prompted)

    def _passage(self, fields: Fields, size: int, body: Callable[[Member], Body]) -> Passage:
        members = self._long_enough(self._able(fields), fields, size)
        key = self._key(fields)
        orders, now = self._registry.orders, self._registry.clock()
        choices = [member.choice for member in members]
        order = orders.order(
            self._agent.name, self._agent.settings.strategy, choices, now, None if key is None else key[0]
        )
        members = [members[place] for place in order]
        retries = self._snapshot.config.routing.retries
        return Passage(
            [self._target(member, body, alone=len(members) == 1) for member in members],
            Terms(retries.max, retries.budget),
            size,
            fields,
            agent=self._agent,
            pin=key,
        )

    def _target(self, member: Member, body: Callable[[Member], Body], *, alone: bool) -> Target[Leg]:
        provider = self._snapshot.providers[member.place.provider]
        registry, place = self._registry, member.place
        named = self._snapshot.facts(*place, self._agent.name).named
        health = registry.target(*place, provider.credentials, self._snapshot.breaker_rule, named=named)
        leg = Leg(provider.name, place.model, partial(self._make, member, provider, body), None)
        return Target(provider.name, place.model, health, registry.budget(provider.name), leg)

    def _make(self, member: Member, provider: Provider, body: Callable[[Member], Body]) -> tuple[Route, Body]:
        made = body(member)
        route = make(
            self._admission,
            provider,
            self._call,
            self._stats,
            self._registry,
            renamed=True,
            rewritten=made.rewritten,
            judged=True,
            most=0 if provider.fits or self._snapshot.rules.get(provider.name) else self._agent.asks_first() or 0,
            headers=member.target.headers,
        )
        return route, made

    # Which members can take it.

    def _able(self, fields: Fields) -> list[Member]:
        """Those that are switched on, speak the request's dialect and are able to do what it asks for."""
        providers = self._snapshot.providers
        here = [member for member in self._agent.members if providers[member.place.provider].usable]
        if not here:
            raise Refusal("no_target", "no target of that agent can be used: none is switched on")
        speaking = [
            member
            for member in here
            if speaks(self._admission, providers[member.place.provider])
            and member.target.format in (None, self._dialect)
        ]
        if not speaking:
            raise Refusal("unsupported", "no target of that agent speaks this endpoint's dialect")
        if len(speaking) == 1 or not fields:
            return speaking
        needed = conversation.needs(self._dialect, fields) if self._known is None else self._known.needs
        # Of a model that nobody knows it is believed that it can.
        fit = [one for one in speaking if one.facts.mode is None or one.facts.capabilities.issuperset(needed)]
        return fit or speaking

    def _long_enough(self, members: list[Member], fields: Fields, size: int) -> list[Member]:
        """Those whose context the request fits into; if there is none, what the agent's configuration says."""
        contexts = [member.facts.context for member in members if member.facts.context is not None]
        if not fields or not contexts or size <= min(contexts):  # no text has more tokens than bytes
            return members
        known = self._known
        tokens = conversation.estimate_tokens(self._dialect, fields, size) if known is None else known.tokens
        fit = [member for member in members if member.facts.context is None or tokens <= member.facts.context]
        if len(fit) < len(members) and fit:
            self._stats.guarded("skip")
        if fit:
            return fit
        if self._agent.settings.overflow == "trim":
            return [max(members, key=lambda member: member.facts.context or 0)]
        self._stats.guarded("refuse")
        most = max(contexts)
        raise Refusal("invalid_request", f"the prompt has about {tokens} tokens, and no target takes more than {most}")

    def _for_member(self, member: Member, body: bytes, fields: Fields) -> bytes:
        """The request as that member gets it: bounded, and shortened if it must be and may."""
        changed = self._bounded(member, fields)
        context = member.facts.context
        if context is not None and self._agent.settings.overflow == "trim" and len(body) > context:
            changed = self._shortened(changed, len(body), context)
        return rewrite(body, fields, changed)

    def _bounded(self, member: Member, fields: Fields) -> Fields:
        most = member.target.max_output
        if most is None:
            return fields
        if self._dialect == "gemini":
            return _bounded_gemini(fields, most)
        names = _MOST[self._dialect]
        told = [name for name in names if isinstance(fields.get(name), int)]
        if not told:
            return {**fields, names[0]: most}
        return {**fields, **{name: most for name in told if fields[name] > most}}

    def _shortened(self, fields: Fields, size: int, context: int) -> Fields:
        if conversation.estimate_tokens(self._dialect, fields, size) <= context:
            return fields
        shorter = trim(self._dialect, fields, self._budget(fields, context))
        self._trimmed(shorter, context)
        return shorter or fields

    def _budget(self, fields: Fields, context: int) -> int:
        """Tokens that a prompt may have, so that there is room for an answer."""
        told = [fields.get(name) for name in _MOST.get(self._dialect, ())]
        answer = min([one for one in told if isinstance(one, int) and one > 0] or [ANSWER])
        return max(context - answer, context // 2)

    def _trimmed(self, shorter: object, context: int) -> None:
        """A request was to be shortened. Raises Refusal if it cannot be."""
        if shorter is None:
            self._stats.guarded("refuse")
            raise Refusal("invalid_request", f"the prompt is too long for a context of {context} tokens")
        self._stats.guarded("trim")

    # Which conversation it belongs to.

    def _key(self, fields: Fields) -> tuple[bytes, float] | None:
        agent, caller = self._agent, self._admission.caller
        if not agent.sticks:
            return None
        sticky = agent.settings.sticky
        header = None if sticky is None or sticky.header is None else sticky.header.encode("ascii")
        told = None if header is None else self._admission.headers.get(header)
        found = None
        if told is None:
            known = self._known
            found = conversation.sticky_key(self._dialect, fields) if known is None else known.sticky
        if told is None and found is None:
            return None
        ttl = sticky.ttl if sticky is not None and sticky.ttl is not None else found.ttl if found else STICKY_FOR
        parts = (
            agent.name.encode(),
            caller.name.encode(),
            told if told is not None else b"",
            found.key if found else b"",
        )
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest(), ttl


def _bounded_gemini(fields: Fields, most: int) -> Fields:
    camel, snake, name, other = _GEMINI
    place = snake if snake in fields and camel not in fields else camel
    settings = fields.get(place)
    settings = settings if isinstance(settings, dict) else {}
    spelled = other if other in settings and name not in settings else name
    told = settings.get(spelled)
    if isinstance(told, int) and told <= most:
        return fields
    return {**fields, place: {**settings, spelled: most}}
