"""The vendor's refusals in three dialects.

Shapes: OpenAI API reference, "Error codes"; Anthropic API reference, "Errors"; Google AIP-193 and the Gemini API's
troubleshooting page.
"""

from __future__ import annotations

from collections.abc import Mapping

from gproxyd.host.demo.answers import Answer, Object, VendorError, json
from gproxyd.host.demo.call import Call, Dialect

RETRY_AFTER = "7"

_OPENAI: Mapping[int, tuple[str, str | None]] = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("request_forbidden", "unsupported_country_region_territory"),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("service_unavailable_error", "overloaded"),
}
_ANTHROPIC: Mapping[int, str] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_GEMINI: Mapping[int, str] = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

_SENTENCES: Mapping[int, str] = {
    400: "The request could not be understood.",
    402: "Your credit balance is too low to access the API.",
    403: "Country, region, or territory not supported.",
    404: "The requested resource was not found.",
    408: "Request timed out.",
    413: "Request exceeds the maximum size.",
    429: "Rate limit reached for this model on requests per min (RPM): Limit 3, Used 3, Requested 1. "
    "Please try again in 7s.",
    500: "The server had an error while processing your request. Sorry about that!",
    503: "The engine is currently overloaded, please try again later.",
    529: "Overloaded",
}


def scripted(status: int, credential: str) -> VendorError:
    """The error that `x-demo-status` orders."""
    if status == 401:
        return unauthorized(credential)
    return VendorError(status, _SENTENCES.get(status, f"The demo vendor was asked for a {status}."))


def unauthorized(credential: str) -> VendorError:
    """The 401, which tells a part of the key that was tried, as OpenAI's does."""
    if not credential:
        return VendorError(401, "You didn't provide an API key.")
    hidden = f"{credential[:3]}{'*' * 8}{credential[-4:]}"
    return VendorError(401, f"Incorrect API key provided: {hidden}. You can find your API key in your account.")


def render(error: VendorError, call: Call) -> Answer:
    """The answer that tells `error` in the dialect of the path."""
    headers = {"retry-after": RETRY_AFTER} if error.status == 429 else {}
    body = _BODIES[call.dialect](error, call.ident("req_demo_"))
    return json(body, status=error.status, indent=call.dialect != "anthropic", headers=headers)


def openai_body(error: VendorError, request_id: str = "") -> Object:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind, code = _OPENAI.get(error.status, ("server_error" if error.status > 500 else "invalid_request_error", None))
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code or code}}


def anthropic_body(error: VendorError, request_id: str) -> Object:
    """`{"type": "error", "error": {"type", "message"}, "request_id"}`."""
    kind = _ANTHROPIC.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def gemini_body(error: VendorError, request_id: str = "") -> Object:
    """`{"error": {"code", "message", "status", "details"}}`; a 429 says in its details when to try again."""
    name = _GEMINI.get(error.status, "INTERNAL" if error.status >= 500 else "INVALID_ARGUMENT")
    told: Object = {"code": error.status, "message": error.message, "status": name}
    if error.status == 429:
        told["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{RETRY_AFTER}s"}]
    return {"error": told}


_BODIES = {"openai": openai_body, "anthropic": anthropic_body, "gemini": gemini_body}

MID_STREAM: Mapping[Dialect, VendorError] = {
    "openai": VendorError(500, _SENTENCES[500]),
    "anthropic": VendorError(529, _SENTENCES[529]),
    "gemini": VendorError(503, "The model is overloaded. Please try again later."),
}
"""What goes wrong in the middle of a stream (`x-demo-fail: error`)."""
