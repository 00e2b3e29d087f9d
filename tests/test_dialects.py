"""Each dialect's errors, error events and pings, as its own clients read them."""

from __future__ import annotations

from typing import Any, get_args

import orjson
import pytest

from gproxyd.dialects.dialect import DIALECTS, Dialect
from gproxyd.errors import REFUSALS, Refusal
from gproxyd.types import DialectName
from tests.support.streams import events_of

ID = "req_0123456789abcdef01234567"
TEXTS = ["a plain sentence", 'quotes " and \\ and </script>', "line\nend\r\n\ndata: x", "ü \u2028 \U0001f600 \0", ""]

OPENAI_TYPES = {
    "invalid_request_error", "authentication_error", "insufficient_quota", "permission_error", "not_found_error",
    "rate_limit_error", "server_error",
}  # fmt: skip
ANTHROPIC_TYPES = {
    "invalid_request_error", "authentication_error", "billing_error", "permission_error", "not_found_error",
    "request_too_large", "rate_limit_error", "api_error", "overloaded_error", "timeout_error",
}  # fmt: skip
RPC_CODES = {
    "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
    "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
}  # fmt: skip

every_code = pytest.mark.parametrize("code", REFUSALS)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)


def test_there_are_four() -> None:
    assert set(DIALECTS) == set(get_args(DialectName))
    assert all(dialect.name == name for name, dialect in DIALECTS.items())


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("openai_chat", {("model",)}),
        ("openai_responses", {("model",), ("response", "model")}),
        ("anthropic", {("model",), ("message", "model")}),
        ("gemini", {("modelVersion",)}),
    ],
)
def test_where_a_reply_names_its_model(name: DialectName, places: set[tuple[str, ...]]) -> None:
    assert {tuple(member.decode() for member in place) for place in DIALECTS[name].places} == places


STATUSES = {
    "provider_prefix": 400, "invalid_request": 400, "unauthorized": 401, "quota_exceeded": 402, "forbidden_model": 403,
    "forbidden_endpoint": 403, "forbidden_agent": 403, "unknown_provider": 404, "model_not_found": 404,
    "not_found": 404, "method_not_allowed": 405, "payload_too_large": 413, "unsupported_media_type": 415,
    "rate_limited": 429, "headers_too_large": 431, "unsupported": 501, "upstream_error": 502, "upstream_auth": 502,
    "upstream_tls": 502, "no_target": 503, "overloaded": 503, "upstream_timeout": 504,
}  # fmt: skip


@pytest.mark.parametrize("code", STATUSES)
def test_the_status_of_every_promised_code(code: str) -> None:
    assert REFUSALS[code][0] == STATUSES[code]


@every_code
def test_the_label_names_the_code(code: str) -> None:
    label = REFUSALS[code][1]
    assert label in {code, code.replace("forbidden_", "forbidden: "), f"upstream_error: {code}"}


def _error(code: str, text: str = "a sentence", param: str | None = None) -> Refusal:
    return Refusal(code, text, param=param)


def _body(dialect: DialectName, error: Refusal) -> Any:
    return orjson.loads(DIALECTS[dialect].error_body(error, ID))


@every_code
@every_dialect
def test_the_message_begins_with_the_label(dialect: Dialect, code: str) -> None:
    for text in TEXTS:
        error = orjson.loads(dialect.error_body(_error(code, text), ID))["error"]
        assert error["message"] == f"{REFUSALS[code][1]}: {text}"


@every_code
@pytest.mark.parametrize("dialect", ["openai_chat", "openai_responses"])
@pytest.mark.parametrize("param", [None, "model"])
def test_openai(dialect: DialectName, code: str, param: str | None) -> None:
    body = _body(dialect, _error(code, param=param))
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] in OPENAI_TYPES
    assert (error["type"] == "server_error") is (REFUSALS[code][0] >= 500)


@every_code
def test_anthropic(code: str) -> None:
    body = _body("anthropic", _error(code))
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["request_id"]) == ("error", ID)
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] in ANTHROPIC_TYPES


@every_code
def test_gemini(code: str) -> None:
    body = _body("gemini", _error(code))
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"code", "message", "status", "details"}
    assert error["code"] == REFUSALS[code][0]
    assert error["status"] in RPC_CODES
    (info,) = error["details"]
    assert info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
    assert (info["reason"], info["metadata"]) == (code.upper(), {"request_id": ID})


@pytest.mark.parametrize(
    ("code", "openai", "anthropic", "gemini"),
    [
        ("invalid_request", "invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT"),
        ("unauthorized", "authentication_error", "authentication_error", "UNAUTHENTICATED"),
        ("quota_exceeded", "insufficient_quota", "billing_error", "FAILED_PRECONDITION"),
        ("forbidden_model", "permission_error", "permission_error", "PERMISSION_DENIED"),
        ("not_found", "not_found_error", "not_found_error", "NOT_FOUND"),
        ("payload_too_large", "invalid_request_error", "request_too_large", "INVALID_ARGUMENT"),
        ("rate_limited", "rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED"),
        ("internal_error", "server_error", "api_error", "INTERNAL"),
        ("unsupported", "server_error", "api_error", "UNIMPLEMENTED"),
        ("upstream_error", "server_error", "api_error", "UNAVAILABLE"),
        ("overloaded", "server_error", "overloaded_error", "UNAVAILABLE"),
        ("upstream_timeout", "server_error", "timeout_error", "DEADLINE_EXCEEDED"),
    ],
)
def test_the_words_of_each_vendor(code: str, openai: str, anthropic: str, gemini: str) -> None:
    assert _body("openai_chat", _error(code))["error"]["type"] == openai
    assert _body("anthropic", _error(code))["error"]["type"] == anthropic
    assert _body("gemini", _error(code))["error"]["status"] == gemini


@every_code
@every_dialect
def test_an_error_event_is_one_event(dialect: Dialect, code: str) -> None:
    """Whatever its text holds, and it says what the error's JSON says."""
    for text in TEXTS:
        error = _error(code, text)
        event = dialect.error_event(error, ID)
        assert event.endswith(b"\n\n")
        ((name, data),) = events_of(event)
        assert name == ("message" if dialect.name in ("openai_chat", "gemini") else "error")
        assert orjson.loads(data)["error"] == orjson.loads(dialect.error_body(error, ID))["error"]


@every_code
def test_the_responses_event_is_typed_as_well(code: str) -> None:
    ((_, data),) = events_of(DIALECTS["openai_responses"].error_event(_error(code, param="model"), ID))
    body = orjson.loads(data)
    assert (body["type"], body["code"], body["param"]) == ("error", code, "model")
    assert body["message"].startswith(REFUSALS[code][1])
    assert isinstance(body["sequence_number"], int)


@every_dialect
def test_a_ping_is_nothing_to_a_client(dialect: Dialect) -> None:
    assert dialect.ping.endswith(b"\n\n")
    assert b"\r" not in dialect.ping
    seen = events_of(dialect.ping)
    assert seen == ([("ping", b'{"type": "ping"}')] if dialect.name == "anthropic" else [])
    around = b"data: 1\n\n%bdata: 2\n\n" % dialect.ping
    assert [data for name, data in events_of(around) if name == "message"] == [b"1", b"2"]


def test_whose_responses_bear_which_ids() -> None:
    for dialect in DIALECTS.values():
        wanted = (b"x-request-id", b"request-id") if dialect.name == "anthropic" else (b"x-request-id",)
        assert dialect.id_headers == wanted
