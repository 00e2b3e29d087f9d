"""Where requests of one kind go, and how their answers come back: provider, face, upstream target."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gproxyd.dialects import reasoning
from gproxyd.dialects.dialect import DIALECTS, Dialect
from gproxyd.errors import Refusal
from gproxyd.gateway.admission import Admission
from gproxyd.gateway.call import Call
from gproxyd.gateway.snapshot import Facts
from gproxyd.observe.journal import members
from gproxyd.observe.otel import Trace
from gproxyd.observe.stats import OTHER, Stats, Tally
from gproxyd.policy.callers import Caller
from gproxyd.policy.limits import Rule
from gproxyd.routing.credentials import Credential
from gproxyd.routing.health import Health, Registry
from gproxyd.routing.providers import Face, Provider
from gproxyd.types import DialectName
from gproxyd.vendors import auth
from gproxyd.vendors.catalogue import RefusedKey
from gproxyd.wire import splice
from gproxyd.wire.headers import Headers, is_request_id, request_lines, response_lines
from gproxyd.wire.http1 import request_head
from gproxyd.wire.operations import Operation
from gproxyd.wire.target import MODEL_NAME

HOME_HEADER = b"x-gproxyd-provider"

_HOMES = frozenset({"responses", "files", "batches"})
_METERED = frozenset({"chat", "completions", "responses", "messages", "generate", "embeddings"})
_FREE = frozenset({"count_tokens", "moderations", "models"})

_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_UNDERSTOOD = frozenset({"json", "path", "path+body"})
_NO_NAMES: frozenset[bytes] = frozenset()
_CODING = frozenset({b"content-encoding"})


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Where requests of one kind go, and how their answers come back. Nothing in it belongs to a single request.

    asked       the model as the client names it, `model` as the upstream does; None where none is known
    sent        the JSON text that takes the place of the request's model, None if it stays
    shown       the JSON text that replies must bear as their model, None if they keep their own
    head        the request's head as far as it is the same every time: all but the credential and the framing
    tags        response lines that name provider and model
    hold        whether a small JSON answer waits until it is whole
    redirects   whether a redirect is the client's to see
    keepalive   seconds of silence after which a stream gets a ping, 0 for never
    refusals    answers that mean that the gateway's own key was refused
    measured    whether answers tell of tokens; `metered` if they must, so that what is not told is estimated
    billed      whether a model's work is to be paid
    limited     whether the caller's money is
    member      what bears the model's name in a whole answer
    health      what is known of the upstream's model
    upstream_rules  the provider's own limits, which are among `rules`
    judged      whether an answer is on trial, because another target may answer instead; then a stream is held for
                at most `window` seconds until it bears content
    listened    whether answers tell of things that live with their vendor; `target_id` is the one that the path names
    binding     what a body must not hold that goes the short way to the first of several targets; None: anything
    most        bytes of a request that may go the short way: 0 for none
    told        what every log line of such a request says alike, as members of a JSON object
    """

    caller: Caller
    rules: tuple[Rule, ...]
    facts: Facts
    tally: Tally
    provider: Provider
    face: Face
    dialect: Dialect
    operation: Operation | None
    asked: str | None
    model: str | None
    sent: bytes | None
    shown: bytes | None
    head: bytes = field(repr=False)
    tags: bytes
    hold: bool
    redirects: bool
    keepalive: float
    refusals: tuple[RefusedKey, ...]
    measured: bool
    metered: bool
    billed: bool
    limited: bool
    member: str
    health: Health
    upstream_rules: tuple[Rule, ...]
    judged: bool
    window: float
    listened: bool
    target_id: bytes | None
    binding: re.Pattern[bytes] | None
    most: int
    told: str

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

    def reply_lines(self, call: Call, fields: Headers, *, rewritten: bool, decoded: bool) -> bytes:
        """The head's lines of an answer whose own are `fields`, for a body that may be changed, or without its coding.
        The vendor's own id of the request, if it gave one that may stand in a log, is the call's from now on."""
        vendors = b""
        own = fields.get(b"x-request-id") or fields.get(b"request-id")
        if own is not None and is_request_id(own):
            call.upstream_id = own.decode("ascii")
            vendors = b"x-gproxyd-upstream-request-id: %b\r\n" % own
        return b"%b%b%b%bx-gproxyd-attempts: %d\r\nserver-timing: gateway;dur=%.1f\r\n" % (
            response_lines(fields, rewritten=rewritten, drop=_CODING if decoded else _NO_NAMES),
            self.dialect.id_lines(call.id),
            vendors,
            self.tags,
            call.attempts,
            call.overhead_ms(),
        )

    def traced(self, trace: Trace, head: bytes) -> bytes:
        """An attempt begins: the head with the attempt's own `traceparent`."""
        return trace.attempt(head, self.provider.name, self.tally.vendor, self.model, self.face.origin)


NO_HEADERS: Mapping[str, str] = {}

ANY_SIZE = 2**31


def make(
    admission: Admission,
    provider: Provider,
    call: Call,
    stats: Stats,
    registry: Registry,
    *,
    renamed: bool,
    rewritten: bool,
    judged: bool = False,
    most: int = ANY_SIZE,
    headers: Mapping[str, str] = NO_HEADERS,
) -> Route:
    """Puts a route together. `renamed` says that replies must bear the name that the client sent; `headers` are added
    to the provider's own, in place of the client's.

    Raises Refusal (501) for a provider that does not speak the endpoint's dialect.
    """
    operation, target, model = admission.operation, admission.target, call.model
    face = _face(admission, provider)
    path = face.target(_rest(admission, model), target.query if target.marked else None, model)
    understood = renamed or (operation is not None and operation.model in _UNDERSTOOD)
    snapshot, caller = admission.snapshot, admission.caller
    facts = Facts() if model is None else snapshot.facts(provider.name, model, call.requested_model)
    label = "" if model is None else model if facts.named else OTHER
    name = call.endpoint or ""
    upstream_rules = snapshot.rules.get(provider.name, ())
    pool = provider.credentials
    return Route(
        caller=caller,
        rules=caller.rules + upstream_rules,
        facts=facts,
        tally=stats.tally(name, provider.name, label, snapshot.config.providers[provider.name].vendor),
        provider=provider,
        face=face,
        dialect=DIALECTS[admission.dialect],
        operation=operation,
        asked=call.requested_model,
        model=model,
        sent=splice.quoted(model) if model is not None and model != call.requested_model else None,
        shown=splice.quoted(call.requested_model or "") if renamed else None,
        head=request_head(
            call.method,
            path,
            face.authority,
            b"Accept-Encoding: identity\r\n" if understood else b"",
            _lines(admission, provider, face, headers, understood=understood, rewritten=rewritten),
        ),
        tags=_tags(provider, model),
        hold=_held(operation, path) and call.method != "HEAD",
        redirects=target.form == "raw",
        keepalive=snapshot.config.streams.keepalive,
        refusals=provider.refusals if face.auth != "none" else (),
        measured=operation is None or operation.model != "none",
        metered=name in _METERED and operation is not None and operation.model != "none",
        billed=name not in _FREE and (operation is None or operation.model != "none"),
        limited=any(account.limit is not None for account in caller.accounts),
        member=DIALECTS[admission.dialect].member,
        health=registry.target(provider.name, model or "", pool, snapshot.breaker_rule, named=facts.named),
        upstream_rules=upstream_rules,
        judged=judged or len(pool) > 1,
        listened=judged or name in _HOMES,
        target_id=target.id if operation is not None and operation.model == "none" else None,
        window=snapshot.config.routing.first_token_window,
        binding=reasoning.BINDING[admission.dialect] if judged else None,
        most=most,
        told=members(call.standing()),
    )


def _lines(
    admission: Admission,
    provider: Provider,
    face: Face,
    headers: Mapping[str, str],
    *,
    understood: bool,
    rewritten: bool,
) -> bytes:
    """A request's header lines: the client's that may pass, what the vendor demands, and the administrator's."""
    drop = provider.own_or_coding if understood else provider.header_names
    if headers:
        drop |= {name.lower().encode("ascii") for name in headers}
    theirs = request_lines(admission.headers, rewritten=rewritten, drop=drop)
    own = b"".join(b"%b: %b\r\n" % (key.encode(), value.encode()) for key, value in headers.items())
    return theirs + face.demanded(admission.headers) + provider.header_lines + own


def _tags(provider: Provider, model: str | None) -> bytes:
    """What tells the client who answered. The model of a raw body may be anything."""
    tags = b"x-gproxyd-provider: %b\r\n" % provider.name.encode("ascii")
    named = model is not None and MODEL_NAME.fullmatch(model)
    return tags + b"x-gproxyd-model: %b\r\n" % named[0].encode("ascii") if named else tags


def speaks(admission: Admission, provider: Provider) -> bool:
    """Whether the provider has a face for the request."""
    try:
        _face(admission, provider)
    except Refusal:
        return False
    return True


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
    face: Face | None = None
    if operation is not None and operation.dialect == "openai_chat":
        face = provider.endpoints.get(operation.name)
    if face is not None:
        return face
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
