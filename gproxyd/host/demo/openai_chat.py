"""OpenAI's older text APIs: chat completions and completions.

Shapes: OpenAI API reference, "Chat" (object, streaming chunk, `stream_options.include_usage`) and "Completions";
`reasoning_content` is the field by which OpenAI-compatible vendors bring thoughts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from gproxyd.host.demo.answers import Answer, Object, VendorError, pretty, sse, stream
from gproxyd.host.demo.call import CREATED, Call
from gproxyd.host.demo.errors import MID_STREAM, openai_body
from gproxyd.host.demo.script import Ask, Choice, Reply, Tokens, Tool, choose, fragments, reply, text_of

FINGERPRINT = "fp_demo"
_DONE = b"[DONE]"


def chat(call: Call) -> Answer:
    """POST /v1/chat/completions."""
    body = call.json()
    said = reply(call, _read_chat(call, body))
    if body.get("stream"):
        return stream(_chat_events(call, body, said), partial(openai_error_event, call))
    choices = [_chat_choice(said, index) for index in range(_copies(body))]
    return pretty(_head(call, body, "chat.completion") | {"choices": choices, "usage": _usage(said.tokens)})


def completions(call: Call) -> Answer:
    """POST /v1/completions: one choice for each prompt, `n` times."""
    body = call.json()
    model = call.model(body)
    prompts = body.get("prompt")
    if not prompts:
        raise VendorError(400, "Missing required parameter: 'prompt'.", param="prompt")
    texts = [text_of(each) or "tokens" for each in (prompts if isinstance(prompts, list) else [prompts])]
    asks = [Ask(model, text, text, limit=body.get("max_tokens")) for text in texts for _ in range(_copies(body))]
    said = [reply(call, ask) for ask in asks]
    if body.get("stream"):
        return stream(_completion_events(call, body, said), partial(openai_error_event, call))
    choices = [_completion_choice(each.text, index, each.outcome) for index, each in enumerate(said)]
    usage = _usage(said[0].tokens)
    return pretty(_head(call, body, "text_completion") | {"choices": choices, "usage": usage})


def openai_error_event(call: Call, sent: int) -> bytes:
    """An error in the middle of a chat stream: an event that holds an error body."""
    return sse(openai_body(MID_STREAM["openai"]), call.eol())


def wanted_schema(form: object) -> Object | None:
    """The schema of `response_format` (chat) or `text.format` (responses), when JSON is asked for."""
    if not isinstance(form, dict):
        return None
    if form.get("type") == "json_schema":
        schema = form.get("json_schema", form).get("schema")
        return schema if isinstance(schema, dict) else {}
    if form.get("type") == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    return None


def read_tools(tools: object) -> tuple[Tool, ...]:
    """The functions among the tools, in chat's nested form or the flat one of responses."""
    offered = [tool for tool in tools or () if isinstance(tool, dict)] if isinstance(tools, list) else []
    functions = [tool.get("function", tool) for tool in offered if tool.get("type") == "function"]
    return tuple(Tool(str(each.get("name")), each.get("parameters") or {}) for each in functions)


def read_choice(choice: object, tools: tuple[Tool, ...]) -> tuple[Choice, str | None]:
    """`tool_choice`: "auto", "none", "required", or one function by name."""
    if isinstance(choice, dict):
        return "any", choose(tools, str(choice.get("function", choice).get("name")))
    if choice == "required":
        return "any", None
    return ("none" if choice == "none" else "auto"), None


def _read_chat(call: Call, body: Object) -> Ask:
    model = call.model(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        message = "Invalid 'messages': empty array. Expected an array with minimum length 1."
        raise VendorError(400, message, code="empty_array", param="messages")
    tools = read_tools(body.get("tools"))
    choice, chosen = read_choice(body.get("tool_choice"), tools)
    users = [message for message in messages if message.get("role") == "user"]
    last = messages[-1]
    return Ask(
        model=model,
        prompt=text_of(users[-1]) if users else "",
        spoken=text_of(messages),
        tools=tools,
        choice=choice,
        chosen=chosen,
        tool_result=text_of(last) if last.get("role") == "tool" else None,
        limit=body.get("max_completion_tokens", body.get("max_tokens")),
        schema=wanted_schema(body.get("response_format")),
    )


def _copies(body: Object) -> int:
    return int(body.get("n") or 1)


def _head(call: Call, body: Object, kind: str) -> Object:
    prefix = "cmpl-" if kind == "text_completion" else "chatcmpl-"
    return {
        "id": call.ident(prefix),
        "object": kind,
        "created": CREATED,
        "model": body["model"],
        "service_tier": "default",
        "system_fingerprint": FINGERPRINT,
    }


def _usage(tokens: Tokens) -> Object:
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.output,
        "total_tokens": tokens.total,
        "prompt_tokens_details": {"cached_tokens": tokens.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": tokens.thinking,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _chat_choice(said: Reply, index: int) -> Object:
    message: Object = {"role": "assistant", "content": said.text or None, "refusal": None, "annotations": []}
    if said.thoughts:
        message["reasoning_content"] = said.thought
    if said.calls:
        message["tool_calls"] = [
            {"id": f"call_{each.ident}", "type": "function", "function": {"name": each.name, "arguments": each.json}}
            for each in said.calls
        ]
    return {"index": index, "message": message, "logprobs": None, "finish_reason": said.outcome}


def _chat_events(call: Call, body: Object, said: Reply) -> Iterator[bytes]:
    usage_wanted = bool((body.get("stream_options") or {}).get("include_usage"))
    head = _head(call, body, "chat.completion.chunk")
    copies = range(_copies(body))

    def chunk(choices: list[Object], usage: Object | None = None) -> bytes:
        told = head | {"choices": choices} | ({"usage": usage} if usage_wanted else {})
        return sse(told, call.eol())

    for delta, finish in _chat_deltas(said):
        for index in copies:
            yield chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}])
    if usage_wanted:
        yield chunk([], _usage(said.tokens))
    yield sse(_DONE, call.eol())


def _chat_deltas(said: Reply) -> Iterator[tuple[Object, str | None]]:
    """The deltas of one choice, in order: role, thoughts, text or tool calls, and the reason for ending."""
    yield {"role": "assistant", "content": None if said.calls else "", "refusal": None}, None
    for thought in said.thoughts:
        yield {"reasoning_content": thought}, None
    for piece in said.pieces:
        yield {"content": piece}, None
    for index, each in enumerate(said.calls):
        opening = {"name": each.name, "arguments": ""}
        yield _call_delta(index, {"id": f"call_{each.ident}", "type": "function", "function": opening}), None
        for fragment in fragments(each.json):
            yield _call_delta(index, {"function": {"arguments": fragment}}), None
    yield {}, said.outcome


def _call_delta(index: int, told: Object) -> Object:
    return {"tool_calls": [{"index": index, **told}]}


def _completion_choice(text: str, index: int, finish: str | None) -> Object:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}


def _completion_events(call: Call, body: Object, said: list[Reply]) -> Iterator[bytes]:
    head = _head(call, body, "text_completion")
    for index, each in enumerate(said):
        for piece in each.pieces:
            yield sse(head | {"choices": [_completion_choice(piece, index, None)]}, call.eol())
        yield sse(head | {"choices": [_completion_choice("", index, each.outcome)]}, call.eol())
    if (body.get("stream_options") or {}).get("include_usage"):
        yield sse(head | {"choices": [], "usage": _usage(said[0].tokens)}, call.eol())
    yield sse(_DONE, call.eol())
