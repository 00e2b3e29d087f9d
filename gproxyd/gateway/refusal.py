"""The gateway's own errors on the wire, in the caller's dialect."""

from __future__ import annotations

import re

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.errors import Refusal
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.sent import date_line
from gproxyd.types import DialectName
from gproxyd.wire.headers import Headers


def write(call: Call, down: Downstream, error: Refusal) -> None:
    """Answers with an error. Its connection ends where the error says so."""
    dialect = DIALECTS[call.dialect or "openai_chat"]
    body = dialect.error_body(error, call.id)
    lines = [date_line(), b"Content-Type: application/json\r\n", dialect.id_lines(call.id)]
    lines += (b"%b: %b\r\n" % (name.encode("ascii"), value.encode("ascii")) for name, value in error.headers.items())
    if call.provider is not None:
        lines.append(b"x-gproxyd-provider: %b\r\n" % call.provider.encode("ascii"))
    if call.attempts:
        lines.append(b"x-gproxyd-attempts: %d\r\n" % call.attempts)
    if error.close:
        down.close_after()
    down.whole(error.status, b"".join(lines), body)


_SHARED = re.compile(r"/v1/(?:models|files|batches)(?:/|\Z)")
"""Paths that several dialects have in common."""


def guess_dialect(path: str, headers: Headers) -> DialectName:
    """The caller's dialect where the path alone does not tell: by its shape, else by what only one client sends."""
    if "/v1beta" in path:
        return "gemini"
    if "/v1/messages" in path:
        return "anthropic"
    if "/v1/responses" in path:
        return "openai_responses"
    if "/v1/" in path and not _SHARED.search(path):
        return "openai_chat"
    return dialect_of_headers(headers) or "openai_chat"


def dialect_of_headers(headers: Headers) -> DialectName | None:
    """Who calls a path that several dialects share: each client's key has a header of its own."""
    if b"anthropic-version" in headers:
        return "anthropic"
    if b"authorization" in headers:
        return None
    if b"x-api-key" in headers:
        return "anthropic"
    return "gemini" if b"x-goog-api-key" in headers else None
