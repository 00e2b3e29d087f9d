"""Gemini: generate, stream (events or a JSON array), count, embed.

Shapes: Gemini API reference, "Generating content", "Counting tokens", "Embeddings". Google ends the lines of its
event streams with CRLF, and sends a JSON array in pieces when `alt=sse` is not asked for. Requests are protobuf's
JSON, whose parsers take a field in lowerCamelCase or by its snake_case name; Google's own SDK sends both in one body.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import orjson

from gproxyd.host.demo.answers import Answer, Object, VendorError, pretty, sse, stream
from gproxyd.host.demo.call import Call
from gproxyd.host.demo.errors import MID_STREAM, gemini_body
from gproxyd.host.demo.script import Ask, Choice, Reply, Tokens, Tool, ToolCall, choose, count, reply, text_of, vector

DIMENSIONS = 256
_CRLF = b"\r\n"
_FINISH = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP"}
_MODES: dict[str, Choice] = {"NONE": "none", "ANY": "any"}


def generate(call: Call) -> Answer:
    """POST :generateContent."""
    said = reply(call, _read(call))
    return pretty(_response(call, said, _parts(said), _FINISH[said.outcome], said.tokens.output))


def stream_generate(call: Call) -> Answer:
    """POST :streamGenerateContent, as events with `?alt=sse`, else as an array."""
    said = reply(call, _read(call))
    chunks = _chunks(call, said)
    error = gemini_body(MID_STREAM["gemini"])
    if call.query.get("alt") == "sse":
        eol = call.eol(_CRLF)
        return stream((sse(each, eol) for each in chunks), lambda sent: sse(error, eol), "text/event-stream")
    return stream(_array(chunks), lambda sent: _element(error, first=sent == 0) + b"\r\n]", "application/json")


def count_tokens(call: Call) -> Answer:
    """POST :countTokens, of `contents` or of a whole `generateContentRequest`."""
    body = call.json()
    call.known_model(call.place["model"])
    inner = _field(body, "generateContentRequest") or body
    total = count(_spoken(inner))
    return pretty({"totalTokens": total, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": total}]})


def embed(call: Call) -> Answer:
    """POST :embedContent."""
    call.known_model(call.place["model"])
    return pretty({"embedding": _embedding(call.json())})


def batch_embed(call: Call) -> Answer:
    """POST :batchEmbedContents."""
    call.known_model(call.place["model"])
    requests = call.json().get("requests")
    if not isinstance(requests, list) or not requests:
        raise VendorError(400, "* BatchEmbedContentsRequest.requests: must not be empty")
    return pretty({"embeddings": [_embedding(each) for each in requests]})


def _embedding(request: Object) -> Object:
    size = _field(request, "outputDimensionality") or DIMENSIONS
    return {"values": vector(text_of(request.get("content")), size)}


def _field(message: object, name: str) -> Any:
    """A field by either of its names; None when it, or the message, is absent."""
    if not isinstance(message, dict):
        return None
    snake = re.sub("[A-Z]", lambda capital: "_" + capital[0].lower(), name)
    return message.get(name, message.get(snake))


def _spoken(body: Object) -> str:
    return f"{text_of(_field(body, 'systemInstruction'))} {text_of(body.get('contents'))}".strip()


def _read(call: Call) -> Ask:
    body = call.json()
    model = call.known_model(call.place["model"])
    contents = body.get("contents")
    if not isinstance(contents, list) or not contents:
        raise VendorError(400, "* GenerateContentRequest.contents: contents is not specified")
    config = _field(body, "generationConfig")
    calling = _field(_field(body, "toolConfig"), "functionCallingConfig")
    allowed = _field(calling, "allowedFunctionNames") or [None]
    tools = _tools(body)
    return Ask(
        model=model,
        prompt=_last_prompt(contents),
        spoken=_spoken(body),
        tools=tools,
        choice=_MODES.get(str(_field(calling, "mode")), "auto"),
        chosen=choose(tools, allowed[0]),
        tool_result=_tool_result(contents[-1]),
        thinking=bool(_field(_field(config, "thinkingConfig"), "includeThoughts")),
        limit=_field(config, "maxOutputTokens"),
        schema=_schema(config),
    )


def _schema(config: object) -> Object | None:
    schema = _field(config, "responseJsonSchema") or _field(config, "responseSchema")
    if schema is None and _field(config, "responseMimeType") == "application/json":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    return schema if isinstance(schema, dict) else None


def _tools(body: Object) -> tuple[Tool, ...]:
    declared = [each for tool in body.get("tools") or () for each in _field(tool, "functionDeclarations") or ()]
    return tuple(Tool(each["name"], _parameters(each)) for each in declared)


def _parameters(declaration: Object) -> Object:
    return _field(declaration, "parametersJsonSchema") or declaration.get("parameters") or {}


def _last_prompt(contents: list[Object]) -> str:
    """The last user content that says something; `role` may be missing, and is then the user's."""
    users = (each for each in reversed(contents) if each.get("role", "user") == "user")
    return next(filter(None, map(text_of, users)), "")


def _tool_result(content: Object) -> str | None:
    found = [_field(part, "functionResponse") for part in content.get("parts") or ()]
    told = next(filter(None, found), None)
    return None if told is None else orjson.dumps(told.get("response")).decode()


def _response(call: Call, said: Reply, parts: list[Object], finish: str | None, output: int) -> Object:
    candidate: Object = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
    return {
        "candidates": [candidate],
        "usageMetadata": _usage(said.tokens, output),
        "modelVersion": call.place["model"],
        "responseId": call.ident("", 22),
    }


def _usage(tokens: Tokens, output: int) -> Object:
    """`promptTokenCount` includes the cached ones; `candidatesTokenCount` leaves out the thoughts."""
    told: Object = {
        "promptTokenCount": tokens.prompt,
        "candidatesTokenCount": max(0, output - tokens.thinking),
        "totalTokenCount": tokens.prompt + output,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": tokens.prompt}],
    }
    if tokens.cached:
        told["cachedContentTokenCount"] = tokens.cached
    if tokens.thinking:
        told["thoughtsTokenCount"] = tokens.thinking
    return told


def _parts(said: Reply) -> list[Object]:
    """All parts of an unstreamed answer: the thoughts, then what follows them, which bears their signature."""
    parts: list[Object] = [{"text": said.thought, "thought": True}] if said.thoughts else []
    calls = [_call_part(each) for each in said.calls]
    return parts + _signed(calls or [{"text": said.text}], said)


def _call_part(each: ToolCall) -> Object:
    return {"functionCall": {"id": each.ident, "name": each.name, "args": each.arguments}}


def _signed(parts: list[Object], said: Reply) -> list[Object]:
    if not said.thoughts:
        return parts
    signature = base64.b64encode(said.thought.encode()).decode()
    return [parts[0] | {"thoughtSignature": signature}, *parts[1:]]


def _chunks(call: Call, said: Reply) -> Iterator[Object]:
    """The stream's responses: every one is whole, counts the tokens so far, and the last tells the reason."""
    spoken = [_call_part(each) for each in said.calls] or [{"text": piece} for piece in said.pieces or ("",)]
    parts = [{"text": thought, "thought": True} for thought in said.thoughts] + _signed(spoken, said)
    last = len(parts) - 1
    for turn, part in enumerate(parts):
        finish = _FINISH[said.outcome] if turn == last else None
        output = said.tokens.output if turn == last else said.tokens.output * (turn + 1) // len(parts)
        yield _response(call, said, [part], finish, output)


def _array(chunks: Iterator[Object]) -> Iterator[bytes]:
    """The same as one JSON array: `[{...}`, `,\\r\\n{...}`, ..., `]`."""
    for turn, chunk in enumerate(chunks):
        yield _element(chunk, first=turn == 0)
    yield b"\r\n]"


def _element(value: Object, *, first: bool) -> bytes:
    return (b"[" if first else b",\r\n") + orjson.dumps(value, option=orjson.OPT_INDENT_2)
