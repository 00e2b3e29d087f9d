"""Each dialect as data: where a reply names its model, how an error looks, what may be said in a stream.

Sources: the OpenAI API reference (error codes; streaming), Anthropic's "Errors" and "Streaming messages" pages,
Google's API design guide (google.rpc.Status and its codes) and the Gemini API reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from gproxyd.errors import Refusal
from gproxyd.types import DialectName
from gproxyd.wire import sse
from gproxyd.wire.splice import Place

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_GEMINI_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    402: "FAILED_PRECONDITION",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def _word(words: Mapping[int, str], status: int, client: str, server: str) -> str:
    return words.get(status, client if status < 500 else server)


def _openai_error(error: Refusal, request_id: str) -> dict[str, Any]:
    kind = _word(_OPENAI_TYPES, error.status, "invalid_request_error", "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _anthropic_error(error: Refusal, request_id: str) -> dict[str, Any]:
    kind = _word(_ANTHROPIC_TYPES, error.status, "invalid_request_error", "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def _gemini_error(error: Refusal, request_id: str) -> dict[str, Any]:
    status = _word(_GEMINI_STATUSES, error.status, "INVALID_ARGUMENT", "INTERNAL")
    info = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": error.code.upper(),
        "domain": "gproxyd",
        "metadata": {"request_id": request_id},
    }
    return {"error": {"code": error.status, "message": error.message, "status": status, "details": [info]}}


def _data_event(error: Refusal, request_id: str, body: Mapping[str, Any]) -> bytes:
    return sse.event(orjson.dumps(body))


def _named_event(error: Refusal, request_id: str, body: Mapping[str, Any]) -> bytes:
    return sse.event(orjson.dumps(body), "error")


def _responses_event(error: Refusal, request_id: str, body: Mapping[str, Any]) -> bytes:
    """The Responses API has a typed event of its own, flat, beside the `error` member that its SDK raises on."""
    flat = {"type": "error", "code": error.code, "message": error.message, "param": error.param, "sequence_number": 0}
    return sse.event(orjson.dumps({**flat, **body}), "error")


@dataclass(frozen=True)
class Dialect:
    """One API family.

    places       where a reply or a stream event names the model
    ping         what may stand between events while there is silence
    error_body   the JSON of an error
    error_event  the last event of a stream that failed
    id_headers   response headers that bear the request's id
    """

    name: DialectName
    places: tuple[Place, ...]
    ping: bytes
    error_json: Callable[[Refusal, str], dict[str, Any]]
    event: Callable[[Refusal, str, Mapping[str, Any]], bytes]
    id_headers: tuple[bytes, ...] = (b"x-request-id",)

    @property
    def member(self) -> str:
        """What bears the model's name in a whole reply."""
        return self.places[0][-1].decode("ascii")

    @cached_property
    def word(self) -> bytes:
        """The same, quoted."""
        return b'"%b"' % self.places[0][-1]

    def id_lines(self, request_id: str) -> bytes:
        """The request's id, in every header that the dialect's clients look at; each line with its CRLF."""
        value = request_id.encode("ascii")
        if len(self.id_headers) == 1:
            return b"%b: %b\r\n" % (self.id_headers[0], value)
        return b"".join([b"%b: %b\r\n" % (name, value) for name in self.id_headers])

    def error_body(self, error: Refusal, request_id: str) -> bytes:
        return orjson.dumps(self.error_json(error, request_id))

    def error_event(self, error: Refusal, request_id: str) -> bytes:
        return self.event(error, request_id, self.error_json(error, request_id))


_COMMENT = b": keep-alive\n\n"

DIALECTS: Mapping[DialectName, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("openai_chat", ((b"model",),), _COMMENT, _openai_error, _data_event),
        Dialect("openai_responses", ((b"model",), (b"response", b"model")), _COMMENT, _openai_error, _responses_event),
        Dialect(
            "anthropic",
            ((b"model",), (b"message", b"model")),
            sse.event(b'{"type": "ping"}', "ping"),
            _anthropic_error,
            _named_event,
            (b"x-request-id", b"request-id"),
        ),
        Dialect("gemini", ((b"modelVersion",),), _COMMENT, _gemini_error, _data_event),
    )
}
