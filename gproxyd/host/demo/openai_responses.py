"""OpenAI Responses: create (streamed or not), retrieve, delete, cancel, input items, compaction, token counts.

Shapes and the order of events: OpenAI API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from gproxyd.host.demo.answers import Answer, Object, VendorError, json, pretty, sse, stream
from gproxyd.host.demo.call import CREATED, Call
from gproxyd.host.demo.errors import MID_STREAM
from gproxyd.host.demo.openai_chat import read_choice, read_tools, wanted_schema
from gproxyd.host.demo.script import Ask, Reply, Tokens, ToolCall, count, fragments, reply, text_of

Event = tuple[str, Object]
"""The type of a streamed event, and its fields less `type` and `sequence_number`."""

_ECHOED: Object = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}
"""What a response repeats of its request, and what it says where the request was silent."""


def create(call: Call) -> Answer:
    """POST /v1/responses."""
    body = call.json()
    said = reply(call, _read(call, body))
    output = _output(call, said)
    finished = _response(call, body) | _ending(said) | {"output": output, "usage": _usage(said.tokens)}
    if body.get("store") is not False:
        call.shelves.responses.put(finished | {"_input": _input_items(call, body)})
    if not body.get("stream"):
        return pretty(finished)
    return stream(_numbered(call, _events(call, body, said, finished)), lambda sent: _error_event(call, sent))


def retrieve(call: Call) -> Answer:
    """GET /v1/responses/{id}."""
    return pretty(_public(call.shelves.responses.take(call.place["id"])))


def delete(call: Call) -> Answer:
    """DELETE /v1/responses/{id}."""
    gone = call.shelves.responses.take(call.place["id"])
    del call.shelves.responses[gone["id"]]
    return json({"id": gone["id"], "object": "response", "deleted": True})


def cancel(call: Call) -> Answer:
    """POST /v1/responses/{id}/cancel."""
    kept = call.shelves.responses.take(call.place["id"])
    kept["status"] = "cancelled"
    return pretty(_public(kept))


def input_items(call: Call) -> Answer:
    """GET /v1/responses/{id}/input_items."""
    items = call.shelves.responses.take(call.place["id"])["_input"]
    edges = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
    return pretty({"object": "list", "data": items, **edges, "has_more": False})


def compact(call: Call) -> Answer:
    """POST /v1/responses/compact: the input's messages, and one opaque item for the rest."""
    body = call.json()
    call.model(body)
    items = _input_items(call, body)
    sealed = base64.b64encode(text_of(body.get("input")).encode()[:256]).decode()
    opaque = {"id": call.ident("cmp_"), "type": "compaction", "encrypted_content": sealed}
    tokens = Tokens(count(text_of(body.get("input"))), 0, 0, count(sealed), 0)
    told = {"id": call.ident("resp_"), "object": "response.compaction", "created_at": CREATED}
    return pretty(told | {"output": [*items, opaque], "usage": _usage(tokens)})


def input_tokens(call: Call) -> Answer:
    """POST /v1/responses/input_tokens."""
    body = call.json()
    spoken = f"{text_of(body.get('instructions'))} {text_of(body.get('input'))}".strip()
    return pretty({"object": "response.input_tokens", "input_tokens": count(spoken)})


def _read(call: Call, body: Object) -> Ask:
    model = call.model(body)
    given = body.get("input")
    if not given:
        raise VendorError(400, "Missing required parameter: 'input'.", code="missing_required_parameter", param="input")
    previous = body.get("previous_response_id")
    if previous and previous not in call.shelves.responses:
        message = f"Previous response with id '{previous}' not found."
        raise VendorError(400, message, code="previous_response_not_found", param="previous_response_id")
    items = given if isinstance(given, list) else [{"role": "user", "content": given}]
    users = [item for item in items if item.get("role") == "user"]
    last = items[-1]
    tools = read_tools(body.get("tools"))
    choice, chosen = read_choice(body.get("tool_choice"), tools)
    return Ask(
        model=model,
        prompt=text_of(users[-1]) if users else "",
        spoken=f"{text_of(body.get('instructions'))} {text_of(items)}".strip(),
        tools=tools,
        choice=choice,
        chosen=chosen,
        tool_result=text_of(last.get("output")) if last.get("type") == "function_call_output" else None,
        thinking=bool((body.get("reasoning") or {}).get("summary")),
        limit=body.get("max_output_tokens"),
        schema=wanted_schema((body.get("text") or {}).get("format")),
    )


def _response(call: Call, body: Object) -> Object:
    """The parts of a response object that do not change while it is made."""
    echoed = {key: usual if body.get(key) is None else body[key] for key, usual in _ECHOED.items()}
    return {
        "id": call.ident("resp_"),
        "object": "response",
        "created_at": CREATED,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": body["model"],
        "output": [],
        "usage": None,
        **echoed,
    }


def _public(kept: Object) -> Object:
    return {key: value for key, value in kept.items() if not key.startswith("_")}


def _ending(said: Reply) -> Object:
    if said.cut:
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"status": "completed"}


def _usage(tokens: Tokens) -> Object:
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": tokens.thinking},
        "total_tokens": tokens.total,
    }


def _input_items(call: Call, body: Object) -> list[Object]:
    given = body.get("input") or []
    items = given if isinstance(given, list) else [{"role": "user", "content": given}]
    return [_input_item(call, item, index) for index, item in enumerate(items)]


def _input_item(call: Call, item: Object, index: int) -> Object:
    content = item.get("content")
    if isinstance(content, str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        item = item | {"content": [{"type": kind, "text": content}], "status": "completed"}
    return {"id": call.ident("msg_", salt=f"input {index}"), "type": "message"} | item


def _output(call: Call, said: Reply) -> list[Object]:
    items = [_reasoning_item(call, said)] if said.thoughts else []
    if said.calls:
        return items + [_call_item(each) for each in said.calls]
    return [*items, _message_item(call, said)]


def _reasoning_item(call: Call, said: Reply) -> Object:
    sealed = base64.b64encode(said.thought.encode()).decode()
    summary = [{"type": "summary_text", "text": said.thought}]
    return {"id": call.ident("rs_"), "type": "reasoning", "summary": summary, "encrypted_content": sealed}


def _message_item(call: Call, said: Reply) -> Object:
    part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
    status = "incomplete" if said.cut else "completed"
    return {"id": call.ident("msg_"), "type": "message", "status": status, "role": "assistant", "content": [part]}


def _call_item(each: ToolCall) -> Object:
    return {
        "id": f"fc_{each.ident}",
        "type": "function_call",
        "status": "completed",
        "call_id": f"call_{each.ident}",
        "name": each.name,
        "arguments": each.json,
    }


def _events(call: Call, body: Object, said: Reply, finished: Object) -> Iterator[Event]:
    yield "response.created", {"response": _response(call, body)}
    yield "response.in_progress", {"response": _response(call, body)}
    for index, item in enumerate(finished["output"]):
        yield from _item_events(index, item, said)
    yield f"response.{finished['status']}", {"response": finished}


def _item_events(index: int, item: Object, said: Reply) -> Iterator[Event]:
    """One output item: announced empty, filled by deltas, and repeated whole."""
    place = {"item_id": item["id"], "output_index": index}
    opened = {"output_index": index, "item": item | _UNFILLED[item["type"]]}
    yield "response.output_item.added", opened
    if item["type"] == "reasoning":
        yield from _reasoning_events(place, said)
    elif item["type"] == "message":
        yield from _text_events(place, item["content"][0], said)
    else:
        yield from _arguments_events(place, item)
    yield "response.output_item.done", {"output_index": index, "item": item}


_UNFILLED: dict[str, Object] = {
    "reasoning": {"summary": []},
    "message": {"status": "in_progress", "content": []},
    "function_call": {"status": "in_progress", "arguments": ""},
}


def _reasoning_events(place: Object, said: Reply) -> Iterator[Event]:
    place = place | {"summary_index": 0}
    yield "response.reasoning_summary_part.added", place | {"part": {"type": "summary_text", "text": ""}}
    for thought in said.thoughts:
        yield "response.reasoning_summary_text.delta", place | {"delta": thought}
    yield "response.reasoning_summary_text.done", place | {"text": said.thought}
    yield "response.reasoning_summary_part.done", place | {"part": {"type": "summary_text", "text": said.thought}}


def _text_events(place: Object, part: Object, said: Reply) -> Iterator[Event]:
    place = place | {"content_index": 0}
    yield "response.content_part.added", place | {"part": part | {"text": ""}}
    for piece in said.pieces:
        yield "response.output_text.delta", place | {"delta": piece, "logprobs": []}
    yield "response.output_text.done", place | {"text": said.text, "logprobs": []}
    yield "response.content_part.done", place | {"part": part}


def _arguments_events(place: Object, item: Object) -> Iterator[Event]:
    for fragment in fragments(item["arguments"]):
        yield "response.function_call_arguments.delta", place | {"delta": fragment}
    yield "response.function_call_arguments.done", place | {"arguments": item["arguments"]}


def _numbered(call: Call, events: Iterator[Event]) -> Iterator[bytes]:
    for number, (kind, told) in enumerate(events):
        yield sse({"type": kind, "sequence_number": number} | told, call.eol(), kind)


def _error_event(call: Call, sent: int) -> bytes:
    error = MID_STREAM["openai"]
    told = {"type": "error", "code": "server_error", "message": error.message, "param": None, "sequence_number": sent}
    return sse(told, call.eol(), "error")
