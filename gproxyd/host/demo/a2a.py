"""An Agent2Agent agent that repeats what it is told, and the echo of plain HTTP requests.

Shapes: A2A protocol specification 0.3, "Agent Card", `message/send` and `message/stream`; JSON-RPC 2.0.
"""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from gproxyd.host.demo.answers import Answer, Object, json, sse, stream
from gproxyd.host.demo.call import Call
from gproxyd.host.demo.script import text_of

_INTERNAL_ERROR = {"code": -32603, "message": "Internal error"}


def agent_card(call: Call) -> Answer:
    """GET /.well-known/agent-card.json."""
    skill = {"id": "echo", "name": "Echo", "description": "Repeats what it is told.", "tags": ["demo"]}
    return json(
        {
            "protocolVersion": "0.3.0",
            "name": "Demo agent",
            "description": "An agent that repeats what it is told.",
            "url": f"{call.base}/v1/a2a",
            "preferredTransport": "JSONRPC",
            "version": "1.0.0",
            "capabilities": {"streaming": True, "pushNotifications": False},
            "defaultInputModes": ["text/plain"],
            "defaultOutputModes": ["text/plain"],
            "skills": [skill],
        }
    )


def rpc(call: Call) -> Answer:
    """POST /v1/a2a[/{agent}]: messages are answered in kind, any other method with its own name and parameters."""
    try:
        request = orjson.loads(call.body)
    except orjson.JSONDecodeError:
        return _refusal(None, -32700, "Parse error")
    if not isinstance(request, dict) or request.get("jsonrpc") != "2.0" or not isinstance(request.get("method"), str):
        return _refusal(None, -32600, "Invalid Request")
    if request["method"] == "message/stream":
        return stream(_events(call, request), lambda sent: sse(_envelope(request, error=_INTERNAL_ERROR), call.eol()))
    if request["method"] == "message/send":
        return json(_envelope(request, result=_message(call, request)))
    told = {"agent": call.place.get("agent"), "method": request["method"], "params": request.get("params")}
    return json(_envelope(request, result=told))


def echo(call: Call) -> Answer:
    """Any method on /v1/echo: the request as it arrived."""
    seen = call.seen
    return json(
        {
            "method": seen.method,
            "target": seen.target.decode("latin-1"),
            "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in seen.headers],
            "body_bytes": seen.body_bytes,
            "body_sha256": seen.body_sha256,
        }
    )


def _refusal(ident: object, code: int, message: str) -> Answer:
    return json({"jsonrpc": "2.0", "id": ident, "error": {"code": code, "message": message}})


def _envelope(request: Object, **told: object) -> Object:
    return {"jsonrpc": "2.0", "id": request.get("id"), **told}


def _message(call: Call, request: Object) -> Object:
    params = request.get("params") or {}
    said = f"Echo: {text_of(params.get('message'))}"
    return {
        "kind": "message",
        "messageId": call.ident("msg-"),
        "contextId": call.ident("ctx-"),
        "role": "agent",
        "parts": [{"kind": "text", "text": said}],
        "metadata": {"agent": call.place.get("agent")},
    }


def _events(call: Call, request: Object) -> Iterator[bytes]:
    task: Object = {"taskId": call.ident("task-"), "contextId": call.ident("ctx-")}
    message = _message(call, request)
    status = {"kind": "status-update", **task, "status": {"state": "working"}, "final": False}
    ended = {"kind": "status-update", **task, "status": {"state": "completed", "message": message}, "final": True}
    for event in (status, ended):
        yield sse(_envelope(request, result=event), call.eol())
