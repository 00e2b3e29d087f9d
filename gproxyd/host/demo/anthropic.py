"""Anthropic Messages: create (streamed or not) and count_tokens.

Shapes and the order of events: Anthropic API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from gproxyd.host.demo.answers import Answer, Object, VendorError, json, sse, stream
from gproxyd.host.demo.call import Call
from gproxyd.host.demo.errors import MID_STREAM, anthropic_body
from gproxyd.host.demo.script import (
    Ask,
    Choice,
    Reply,
    Tokens,
    Tool,
    ToolCall,
    choose,
    count,
    fragments,
    reply,
    text_of,
)

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CHOICES: dict[str, Choice] = {"auto": "auto", "none": "none", "any": "any", "tool": "any"}


def messages(call: Call) -> Answer:
    """POST /v1/messages."""
    body = call.json()
    ask = _read(call, body)
    if not isinstance(body.get("max_tokens"), int):
        raise VendorError(400, "max_tokens: Field required")
    said = reply(call, ask)
    blocks = _blocks(said)
    if body.get("stream"):
        return stream(_events(call, ask.model, blocks, said), lambda sent: _error_event(call))
    return json(_message(call, ask.model) | _ending(said) | {"content": blocks, "usage": _usage(said.tokens)})


def count_tokens(call: Call) -> Answer:
    """POST /v1/messages/count_tokens."""
    return json({"input_tokens": count(_read(call, call.json()).spoken)})


def _read(call: Call, body: Object) -> Ask:
    if not call.headers.get("anthropic-version"):
        raise VendorError(400, "anthropic-version: header is required")
    model = call.model(body)
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns:
        raise VendorError(400, "messages: at least one message is required")
    tools = tuple(Tool(str(each.get("name")), each.get("input_schema") or {}) for each in body.get("tools") or ())
    wanted = body.get("tool_choice") or {"type": "auto"}
    form = (body.get("output_config") or {}).get("format") or body.get("output_format") or {}
    return Ask(
        model=model,
        prompt=_last_prompt(turns),
        spoken=f"{text_of(body.get('system'))} {text_of(turns)}".strip(),
        tools=tools,
        choice=_CHOICES.get(str(wanted.get("type")), "auto"),
        chosen=choose(tools, wanted.get("name")),
        tool_result=_tool_result(turns[-1]),
        thinking=(body.get("thinking") or {}).get("type") in {"enabled", "adaptive"},
        limit=body.get("max_tokens"),
        schema=form.get("schema"),
    )


def _last_prompt(turns: list[Object]) -> str:
    """The last user message that says something; one that only brings tool results does not."""
    texts = (text_of(_parts(turn, "text")) for turn in reversed(turns) if turn.get("role") == "user")
    return next(filter(None, texts), "")


def _tool_result(turn: Object) -> str | None:
    results = _parts(turn, "tool_result")
    return text_of(results) if results else None


def _parts(turn: Object, kind: str) -> list[Object]:
    content = turn.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    return [part for part in parts if part.get("type") == kind]


def _message(call: Call, model: str) -> Object:
    return {
        "id": call.ident("msg_"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _ending(said: Reply) -> Object:
    return {"stop_reason": _STOP_REASONS[said.outcome], "stop_sequence": None}


def _usage(tokens: Tokens, output: int | None = None) -> Object:
    """`input_tokens` leaves out what the caches served or took, unlike the other dialects."""
    return {
        "input_tokens": tokens.prompt - tokens.cached - tokens.written,
        "cache_creation_input_tokens": tokens.written,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": tokens.written, "ephemeral_1h_input_tokens": 0},
        "output_tokens": tokens.output if output is None else output,
        "service_tier": "standard",
    }


def _blocks(said: Reply) -> list[Object]:
    blocks: list[Object] = []
    if said.thoughts:
        signature = base64.b64encode(said.thought.encode()).decode()
        blocks.append({"type": "thinking", "thinking": said.thought, "signature": signature})
    blocks += [_tool_block(each) for each in said.calls]
    return blocks if said.calls else [*blocks, {"type": "text", "text": said.text}]


def _tool_block(each: ToolCall) -> Object:
    return {"type": "tool_use", "id": f"toolu_{each.ident}", "name": each.name, "input": each.arguments}


def _events(call: Call, model: str, blocks: list[Object], said: Reply) -> Iterator[bytes]:
    def event(kind: str, **told: object) -> bytes:
        return sse({"type": kind, **told}, call.eol(), kind)

    yield event("message_start", message=_message(call, model) | {"usage": _usage(said.tokens, output=1)})
    yield event("ping")
    for index, block in enumerate(blocks):
        yield event("content_block_start", index=index, content_block=block | _UNFILLED[block["type"]])
        for delta in _deltas(block, said):
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    yield event("message_delta", delta=_ending(said), usage=_usage(said.tokens))
    yield event("message_stop")


_UNFILLED: dict[str, Object] = {
    "thinking": {"thinking": "", "signature": ""},
    "text": {"text": ""},
    "tool_use": {"input": {}},
}


def _deltas(block: Object, said: Reply) -> Iterator[Object]:
    if block["type"] == "thinking":
        yield from ({"type": "thinking_delta", "thinking": thought} for thought in said.thoughts)
        yield {"type": "signature_delta", "signature": block["signature"]}
    elif block["type"] == "text":
        yield from ({"type": "text_delta", "text": piece} for piece in said.pieces)
    else:
        call = next(each for each in said.calls if block["id"] == f"toolu_{each.ident}")
        yield from ({"type": "input_json_delta", "partial_json": piece} for piece in ["", *fragments(call.json)])


def _error_event(call: Call) -> bytes:
    return sse(anthropic_body(MID_STREAM["anthropic"], call.ident("req_demo_")), call.eol(), "error")
