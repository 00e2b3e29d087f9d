"""The table of paths: which face answers what, in whose manners."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gproxyd.host.demo import a2a, anthropic, gemini, models
from gproxyd.host.demo import openai_chat as chat
from gproxyd.host.demo import openai_files as files
from gproxyd.host.demo import openai_json as small
from gproxyd.host.demo import openai_media as media
from gproxyd.host.demo import openai_responses as responses
from gproxyd.host.demo.answers import Answer, VendorError
from gproxyd.host.demo.call import Call, Dialect

Face = Callable[[Call], Answer]


class Route(NamedTuple):
    """`method` may be `*`; the pattern matches the whole decoded path."""

    method: str
    pattern: re.Pattern[str]
    face: Face


_TABLE: tuple[tuple[str, str, Face], ...] = (
    ("POST", "/v1/chat/completions", chat.chat),
    ("POST", "/v1/completions", chat.completions),
    ("POST", "/v1/responses", responses.create),
    ("POST", "/v1/responses/compact", responses.compact),
    ("POST", "/v1/responses/input_tokens", responses.input_tokens),
    ("GET", "/v1/responses/{id}", responses.retrieve),
    ("DELETE", "/v1/responses/{id}", responses.delete),
    ("POST", "/v1/responses/{id}/cancel", responses.cancel),
    ("GET", "/v1/responses/{id}/input_items", responses.input_items),
    ("POST", "/v1/embeddings", small.embeddings),
    ("POST", "/v1/moderations", small.moderations),
    ("POST", "/v1/rerank", small.rerank),
    ("POST", "/v1/images/generations", media.generate_images),
    ("POST", "/v1/images/edits", media.rework_images),
    ("POST", "/v1/images/variations", media.rework_images),
    ("POST", "/v1/audio/transcriptions", media.transcribe),
    ("POST", "/v1/audio/translations", media.transcribe),
    ("POST", "/v1/audio/speech", media.speak),
    ("POST", "/v1/files", files.upload),
    ("GET", "/v1/files", files.list_files),
    ("GET", "/v1/files/{id}", files.retrieve_file),
    ("DELETE", "/v1/files/{id}", files.delete_file),
    ("GET", "/v1/files/{id}/content", files.file_content),
    ("POST", "/v1/batches", files.create_batch),
    ("GET", "/v1/batches", files.list_batches),
    ("GET", "/v1/batches/{id}", files.retrieve_batch),
    ("POST", "/v1/batches/{id}/cancel", files.cancel_batch),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{id*}", models.retrieve_model),
    ("POST", "/v1/messages", anthropic.messages),
    ("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
    ("GET", "/v1beta/models", models.list_models),
    ("GET", "/v1beta/models/{id*}", models.retrieve_model),
    ("POST", "/{version}/models/{model*}:generateContent", gemini.generate),
    ("POST", "/{version}/models/{model*}:streamGenerateContent", gemini.stream_generate),
    ("POST", "/{version}/models/{model*}:countTokens", gemini.count_tokens),
    ("POST", "/{version}/models/{model*}:embedContent", gemini.embed),
    ("POST", "/{version}/models/{model*}:batchEmbedContents", gemini.batch_embed),
    ("POST", "/v1/a2a", a2a.rpc),
    ("POST", "/v1/a2a/{agent}", a2a.rpc),
    ("GET", "/.well-known/agent-card.json", a2a.agent_card),
    ("*", "/v1/echo", a2a.echo),
)
"""`{name}` is one segment of the path, `{name*}` may hold slashes, `{version}` is either of Gemini's (its newer SDKs
say `v1`)."""

_GEMINI_VERB = re.compile(r"^/v1/models/.+:\w+$")


def _compile(pattern: str) -> re.Pattern[str]:
    literal = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}").replace(r"\*}", "*}")
    literal = literal.replace("{version}", "(?:v1|v1beta)")
    segments = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", literal)
    return re.compile(re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", segments))


ROUTES = tuple(Route(method, _compile(pattern), face) for method, pattern, face in _TABLE)


def dialect_of(path: str, headers: Mapping[str, str]) -> Dialect:
    """Whose manners a request gets. Where the vendors share a path, their own headers tell them apart.

    `headers` has lower-case names.
    """
    if path.startswith("/v1beta") or _GEMINI_VERB.search(path):
        return "gemini"
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith("/v1/models"):
        return "anthropic" if "anthropic-version" in headers else "gemini" if "x-goog-api-key" in headers else "openai"
    return "openai"


def answer(call: Call) -> Answer:
    """The answer of the face that serves the path. Raises VendorError: 404, 405, or whatever the face refuses."""
    method = "GET" if call.method == "HEAD" else call.method
    allowed: set[str] = set()
    for route in ROUTES:
        match = route.pattern.fullmatch(call.path)
        if match is None:
            continue
        if route.method in {method, "*"}:
            call.place = match.groupdict()
            return route.face(call)
        allowed.add(route.method)
    if allowed:
        raise VendorError(405, f"Not allowed to {call.method} on {call.path}.", code="method_not_supported")
    raise VendorError(404, f"Invalid URL ({call.method} {call.path})")
