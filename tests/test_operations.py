"""The table of endpoints: every one that the interface promises to forward, and no other."""

from __future__ import annotations

import pytest

from gproxyd.config import Endpoints
from gproxyd.wire import operations
from gproxyd.wire.target import parse

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

# The requests of some verbs may repeat the model in their body.
GEMINI_VERBS = {
    "generateContent": "path",
    "streamGenerateContent": "path",
    "countTokens": "path+body",
    "embedContent": "path+body",
    "batchEmbedContents": "path+body",
}

# method(s), path -> dialect, where the model is named, home
PROMISED: list[tuple[str, str, str, str, str | None]] = [
    ("POST", "/v1/chat/completions", "openai_chat", "json", None),
    ("POST", "/v1/messages", "anthropic", "json", None),
    ("POST", "/v1/messages/count_tokens", "anthropic", "json", None),
    *(("POST", f"/v1beta/models/m:{verb}", "gemini", place, None) for verb, place in GEMINI_VERBS.items()),
    *(("POST", f"/v1beta/models/p/a/b:{verb}", "gemini", place, None) for verb, place in GEMINI_VERBS.items()),
    ("POST", "/v1/responses", "openai_responses", "json", None),
    ("POST", "/v1/responses/compact", "openai_responses", "json", None),
    ("POST", "/v1/responses/input_tokens", "openai_responses", "json", None),
    ("GET DELETE", "/v1/responses/resp_1", "openai_responses", "none", "responses"),
    ("POST", "/v1/responses/resp_1/cancel", "openai_responses", "none", "responses"),
    ("GET", "/v1/responses/resp_1/input_items", "openai_responses", "none", "responses"),
    ("GET", "/v1/models", "openai_chat", "listing", None),
    ("GET", "/v1/models/m", "openai_chat", "listing", None),
    ("GET", "/v1/models/p/a/b", "openai_chat", "listing", None),
    ("GET", "/v1beta/models", "gemini", "listing", None),
    ("GET", "/v1beta/models/p/m", "gemini", "listing", None),
    ("POST", "/v1/embeddings", "openai_chat", "json", "embeddings"),
    ("POST", "/v1/moderations", "openai_chat", "json", "moderations"),
    ("POST", "/v1/rerank", "openai_chat", "json", "rerank"),
    ("POST", "/v1/completions", "openai_chat", "json", "completions"),
    ("POST", "/v1/images/generations", "openai_chat", "json", "images"),
    ("POST", "/v1/images/edits", "openai_chat", "multipart", "images"),
    ("POST", "/v1/images/variations", "openai_chat", "multipart", "images"),
    ("POST", "/v1/audio/transcriptions", "openai_chat", "multipart", "audio"),
    ("POST", "/v1/audio/translations", "openai_chat", "multipart", "audio"),
    ("POST", "/v1/audio/speech", "openai_chat", "json", "audio"),
    ("GET POST", "/v1/files", "openai_chat", "none", "files"),
    ("GET DELETE", "/v1/files/file-1", "openai_chat", "none", "files"),
    ("GET", "/v1/files/file-1/content", "openai_chat", "none", "files"),
    ("GET POST", "/v1/batches", "openai_chat", "none", "batches"),
    ("GET", "/v1/batches/b", "openai_chat", "none", "batches"),
    ("POST", "/v1/batches/b/cancel", "openai_chat", "none", "batches"),
    ("POST", "/v1/a2a", "openai_chat", "none", "a2a"),
    ("POST", "/v1/a2a/agent", "openai_chat", "none", "a2a"),
    ("GET", "/.well-known/agent-card.json", "openai_chat", "none", "a2a"),
]


@pytest.mark.parametrize(("methods", "path", "dialect", "place", "family"), PROMISED, ids=lambda value: str(value))
def test_every_promised_endpoint(methods: str, path: str, dialect: str, place: str, family: str | None) -> None:
    found = parse(path.encode()).methods
    for method in METHODS:
        operation = found.get(method)
        if method in methods.split() or (method == "HEAD" and "GET" in methods):
            assert operation is not None, method
            assert (operation.dialect, operation.model, operation.family) == (dialect, place, family)
        else:
            assert operation is None, method


@pytest.mark.parametrize("path", [path for _, path, *_ in PROMISED if path.startswith("/v1")])
def test_scoped_and_raw_paths_mean_the_same(path: str) -> None:
    here = parse(path.encode())
    for prefix in (b"/p", b"/proxy/p"):
        there = parse(prefix + path.encode())
        assert (there.methods, there.id) == (here.methods, here.id)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat", "/v1/chat/completions/", "/v1/chat/completions/x", "/v1//chat/completions", "/v1/Chat/completions",
        "/v1/chat%2Fcompletions", "/v1beta/chat/completions", "/v1/files/", "/v1/files/a/b", "/v1/files/a/content/x",
        "/v1/batches/b/c/cancel", "/v1/responses/", "/v1/responses/r/x", "/v1/models/", "/v1/a2a/a/b", "/v1/realtime",
        "/v1beta/files", "/v1/messages/batches", "/v1/", "/v1beta/models/",
    ],
)  # fmt: skip
def test_what_only_resembles_an_endpoint_is_none(path: str) -> None:
    assert parse(path.encode()).methods == {}


@pytest.mark.parametrize("path", ["/v1beta/models/m:unknownVerb", "/v1beta/models/m:generatecontent"])
def test_an_unknown_verb_takes_no_post(path: str) -> None:
    assert "POST" not in parse(path.encode()).methods


def test_googles_client_may_say_v1() -> None:
    for verb in GEMINI_VERBS:
        assert parse(f"/v1/models/m:{verb}".encode()).methods == parse(f"/v1beta/models/m:{verb}".encode()).methods


def test_every_home_can_be_configured() -> None:
    homes = {family for *_, family in PROMISED if family is not None}
    assert homes <= set(Endpoints.model_fields)


def test_nothing_is_in_the_table_that_is_not_promised() -> None:
    promised = set()
    for methods, path, *_ in PROMISED:
        target = parse(path.encode())
        promised |= {(method, target.methods[method]) for method in methods.split()}
    held = set()
    for line in operations._TABLE.strip().splitlines():
        methods, version, path, *_ = line.split()
        found, _ = operations.find(version.encode(), path.replace("{id+}", "m").replace("{id}", "m").encode())
        held |= {(method, found[method]) for method in methods.split(",")}
    assert held <= promised
