"""What can be asked of the gateway: every endpoint, as a table.

An operation knows the dialect of its path, where a request names its model, and which key of `endpoints` in the
configuration is its home when it names none. Paths are relative to their version prefix (`/v1`, `/v1beta`; Google's
own client speaks both); `{x}` stands for one segment, `{x+}` for one or more. A name with `*` answers with an array
that grows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gproxyd.types import DialectName

ModelPlace = Literal["json", "path", "path+body", "multipart", "none", "listing"]
"""Where a request names its model: a JSON member, the path (and members `model` of the body that repeat the path's),
a form field, nowhere; or it asks for the list."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing a client can ask for.

    `family` is a key of `endpoints`, or None if a model is required; `growing` says that a JSON answer is a stream
    in disguise, an array that grows, and must pass as it comes.
    """

    name: str
    dialect: DialectName
    model: ModelPlace
    family: str | None = None
    growing: bool = False


_TABLE = """
POST      /v1      /chat/completions             chat         openai_chat       json       -
POST      /v1      /completions                  completions  openai_chat       json       completions
POST      /v1      /embeddings                   embeddings   openai_chat       json       embeddings
POST      /v1      /moderations                  moderations  openai_chat       json       moderations
POST      /v1      /rerank                       rerank       openai_chat       json       rerank
POST      /v1      /images/generations           images       openai_chat       json       images
POST      /v1      /images/edits                 images       openai_chat       multipart  images
POST      /v1      /images/variations            images       openai_chat       multipart  images
POST      /v1      /audio/speech                 speech       openai_chat       json       audio
POST      /v1      /audio/transcriptions         audio        openai_chat       multipart  audio
POST      /v1      /audio/translations           audio        openai_chat       multipart  audio
GET,POST  /v1      /files                        files        openai_chat       none       files
GET,DELETE /v1     /files/{id}                   files        openai_chat       none       files
GET       /v1      /files/{id}/content           files        openai_chat       none       files
GET,POST  /v1      /batches                      batches      openai_chat       none       batches
GET       /v1      /batches/{id}                 batches      openai_chat       none       batches
POST      /v1      /batches/{id}/cancel          batches      openai_chat       none       batches
POST      /v1      /responses                    responses    openai_responses  json       -
POST      /v1      /responses/compact            responses    openai_responses  json       -
POST      /v1      /responses/input_tokens       count_tokens openai_responses  json       -
GET,DELETE /v1     /responses/{id}               responses    openai_responses  none       responses
POST      /v1      /responses/{id}/cancel        responses    openai_responses  none       responses
GET       /v1      /responses/{id}/input_items   responses    openai_responses  none       responses
POST      /v1      /messages                     messages     anthropic         json       -
POST      /v1      /messages/count_tokens        count_tokens anthropic         json       -
POST      /v1      /a2a                          a2a          openai_chat       none       a2a
POST      /v1      /a2a/{agent}                  a2a          openai_chat       none       a2a
GET       /v1      /models                       models       openai_chat       listing    -
GET       /v1      /models/{id+}                 models       openai_chat       listing    -
GET       /v1beta  /models                       models       gemini            listing    -
GET       /v1beta  /models/{id+}                 models       gemini            listing    -
POST      /v1      /models/{id+}:generateContent        generate     gemini     path       -
POST      /v1      /models/{id+}:streamGenerateContent  generate*    gemini     path       -
POST      /v1      /models/{id+}:countTokens            count_tokens gemini     path+body      -
POST      /v1      /models/{id+}:embedContent           embeddings   gemini     path+body      -
POST      /v1      /models/{id+}:batchEmbedContents     embeddings   gemini     path+body      -
POST      /v1beta  /models/{id+}:generateContent        generate     gemini     path       -
POST      /v1beta  /models/{id+}:streamGenerateContent  generate*    gemini     path       -
POST      /v1beta  /models/{id+}:countTokens            count_tokens gemini     path+body      -
POST      /v1beta  /models/{id+}:embedContent           embeddings   gemini     path+body      -
POST      /v1beta  /models/{id+}:batchEmbedContents     embeddings   gemini     path+body      -
"""

AGENT_CARD = Operation("a2a", "openai_chat", "none", "a2a")
"""`GET /.well-known/agent-card.json`, the one endpoint outside a version prefix."""

Methods = Mapping[str, Operation]


_Exact = dict[tuple[bytes, bytes], dict[str, Operation]]
_Patterns = list[tuple[bytes, re.Pattern[bytes], dict[str, Operation]]]


def _read_table() -> tuple[_Exact, _Patterns]:
    exact: _Exact = {}
    patterns: dict[tuple[bytes, str], dict[str, Operation]] = {}
    for line in _TABLE.strip().splitlines():
        methods, version, path, name, dialect, place, family = line.split()
        home = None if family == "-" else family
        operation = Operation(name.rstrip("*"), dialect, place, home, name.endswith("*"))  # type: ignore[arg-type]
        by_method = dict.fromkeys(methods.split(","), operation)
        if "GET" in by_method:
            by_method["HEAD"] = operation
        if "{" in path:
            patterns.setdefault((version.encode(), path), {}).update(by_method)
        else:
            exact.setdefault((version.encode(), path.encode()), {}).update(by_method)
    compiled = [(version, _compile(path), found) for (version, path), found in patterns.items()]
    return exact, compiled


def _compile(template: str) -> re.Pattern[bytes]:
    pattern = re.escape(template)
    pattern = re.sub(r"\\{\w+\\\+\\}", "(?P<id>.+)", pattern)
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", pattern)
    return re.compile(pattern.encode())


_EXACT, _PATTERNS = _read_table()


def find(version: bytes, path: bytes) -> tuple[Methods, bytes | None]:
    """The operations at a path by method (empty: there is no such endpoint), and the id that the path names.

    Templates that end in a Gemini verb are met before the listing's, because a GET never bears a verb.
    """
    methods = _EXACT.get((version, path))
    if methods is not None:
        return methods, None
    for known, pattern, by_method in reversed(_PATTERNS):
        if known == version and (match := pattern.fullmatch(path)):
            groups = match.groupdict()
            return by_method, groups.get("id")
    return {}, None
