"""What the vendor says, whatever the dialect: a face reads its request into an `Ask` and writes the `Reply` out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import orjson

from gproxyd.host.demo.answers import Object, VendorError
from gproxyd.host.demo.call import Call

ANSWERS: Mapping[str, str] = {
    "say hello in one short sentence.": "Hello there, nice to meet you!",
    "say ok": "OK",
    "ping": "pong",
    "count to five.": "1, 2, 3, 4, 5.",
}
"""Prompts with an answer of their own, in lower case."""

THOUGHTS = ("The user wants an answer. ", "I know how to answer that. ", "I shall be brief.")
ECHO_LIMIT = 200
_MOST_DELTAS = 64
_FRAGMENT = 8
_FILLER = "and so the demo goes on "
_BYTES_PER_TOKEN = 4

Choice = Literal["auto", "none", "any"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the caller offers; `schema` is the JSON Schema of its arguments."""

    name: str
    schema: Object


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for words, without its dialect.

    `prompt` is the text of the last user message, `spoken` that of all of them (it is what the prompt costs);
    `tool_result` is set when the last message is a tool's answer; `schema` when the answer must be JSON.
    """

    model: str
    prompt: str
    spoken: str
    tools: tuple[Tool, ...] = ()
    choice: Choice = "auto"
    chosen: str | None = None
    tool_result: str | None = None
    thinking: bool = False
    limit: int | None = None
    schema: Object | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool."""

    ident: str
    name: str
    arguments: Object

    @property
    def json(self) -> str:
        """The arguments as the JSON text that most dialects carry."""
        return orjson.dumps(self.arguments).decode()


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a reply costs. `prompt` includes `cached` (read) and `written`; `output` includes `thinking`."""

    prompt: int
    cached: int
    written: int
    output: int
    thinking: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.prompt + self.output


@dataclass(frozen=True, slots=True)
class Reply:
    """What is said: thoughts first, then either tool calls or text, of which `pieces` are the deltas."""

    pieces: tuple[str, ...]
    thoughts: tuple[str, ...]
    calls: tuple[ToolCall, ...]
    cut: bool
    tokens: Tokens

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    @property
    def thought(self) -> str:
        """All thoughts; empty when there are none."""
        return "".join(self.thoughts)

    @property
    def outcome(self) -> Literal["stop", "length", "tool_calls"]:
        """Why it ended, in OpenAI's words."""
        return "tool_calls" if self.calls else "length" if self.cut else "stop"


def reply(call: Call, ask: Ask) -> Reply:
    """What the vendor says to `ask`, shaped by the call's controls."""
    calls = _tool_calls(call, ask)
    text, cut = ("", False) if calls else _text(call, ask)
    thoughts = THOUGHTS if ask.thinking or "reason" in ask.model else ()
    prompt = count(ask.spoken)
    thinking = count("".join(thoughts)) if thoughts else 0
    output = count(text) if not calls else sum(count(each.name + each.json) for each in calls)
    return Reply(
        pieces=_pieces(text, call.controls.events) if text else (),
        thoughts=thoughts,
        calls=calls,
        cut=cut,
        tokens=Tokens(prompt, cached=prompt // 4, written=prompt // 8, output=output + thinking, thinking=thinking),
    )


def count(text: str) -> int:
    """The tokens of a text: one for every four bytes begun, at least one."""
    return max(1, -(-len(text.encode()) // _BYTES_PER_TOKEN))


def fragments(arguments: str) -> list[str]:
    """A call's arguments in the pieces that a stream brings."""
    return [arguments[at : at + _FRAGMENT] for at in range(0, len(arguments), _FRAGMENT)]


def text_of(content: object) -> str:
    """The text inside any dialect's content: a string, a part, or a list of them."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(filter(None, map(text_of, content)))
    if isinstance(content, dict):
        return " ".join(filter(None, (text_of(content.get(key)) for key in ("text", "content", "parts", "output"))))
    return ""


def choose(tools: tuple[Tool, ...], name: str | None) -> str | None:
    """The name a tool choice forces. Raises VendorError (400) when no such tool was offered."""
    if name is not None and all(tool.name != name for tool in tools):
        raise VendorError(400, f"Tool choice '{name}' not found in 'tools' parameter.", param="tool_choice")
    return name


def vector(text: str, dimensions: int) -> list[float]:
    """An embedding that depends on the text alone; each value is exact as a 32-bit float."""
    raw = hashlib.shake_256(text.encode()).digest(2 * dimensions)
    return [int.from_bytes(raw[at : at + 2], "big", signed=True) / 32768 for at in range(0, len(raw), 2)]


def example(schema: Object, root: Object | None = None) -> object:
    """A value that fits a JSON Schema (or Gemini's spelling of one), as far as the usual keywords go."""
    root = schema if root is None else root
    if "$ref" in schema:
        name = str(schema["$ref"]).rsplit("/", 1)[-1]
        definitions = root.get("$defs") or root.get("definitions") or {}
        return example(definitions.get(name, {}), root)
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    if schema.get("anyOf"):
        return example(schema["anyOf"][0], root)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = str(kind[0] if isinstance(kind, list) else kind).lower()
    if kind == "object":
        return {name: _named_example(name, child, root) for name, child in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema.get("items", {}), root)]
    return {"number": 1.5, "integer": 1, "boolean": True, "null": None}.get(kind, "demo")


def _named_example(name: str, schema: Object, root: Object) -> object:
    value = example(schema, root)
    return "Paris" if value == "demo" and name in {"city", "location", "place"} else value


def _tool_calls(call: Call, ask: Ask) -> tuple[ToolCall, ...]:
    wanted = ask.prompt.lower()
    asked = "weather" in wanted and ask.tool_result is None
    if not ask.tools or ask.choice == "none" or not (asked or ask.choice == "any"):
        return ()
    tool = _pick(ask)
    arguments = example({"type": "object", **tool.schema})
    assert isinstance(arguments, dict)
    twice = 2 if re.search(r"\bboth\b", wanted) else 1
    return tuple(ToolCall(call.ident("", 24, f"tool {turn}"), tool.name, arguments) for turn in range(twice))


def _pick(ask: Ask) -> Tool:
    by_name = {tool.name: tool for tool in ask.tools}
    if ask.chosen is not None:
        return by_name[ask.chosen]
    return next((tool for tool in ask.tools if "weather" in tool.name.lower()), ask.tools[0])


def _text(call: Call, ask: Ask) -> tuple[str, bool]:
    text = _padded(_words(ask), call)
    most = None if ask.limit is None or call.controls.sized else ask.limit * _BYTES_PER_TOKEN
    if most is None or len(text.encode()) <= most:
        return text, False
    return text.encode()[:most].decode(errors="ignore"), True


def _words(ask: Ask) -> str:
    if ask.schema is not None:
        return orjson.dumps(example(ask.schema)).decode()
    if ask.tool_result is not None:
        return f"The tool answered: {ask.tool_result[:ECHO_LIMIT]}"
    return ANSWERS.get(ask.prompt.strip().lower(), f"Hello! You said: {ask.prompt[:ECHO_LIMIT]}")


def _padded(text: str, call: Call) -> str:
    missing = max((call.controls.size or 0) - len(text.encode()), (call.controls.events or 0) - len(text))
    if missing <= 0:
        return text
    return text + (" " + _FILLER * (missing // len(_FILLER) + 1))[:missing]


def _pieces(text: str, events: int | None) -> tuple[str, ...]:
    if events is None:
        if text.count(" ") < _MOST_DELTAS:
            return tuple(re.findall(r"\S+\s*|\s+", text))
        events = _MOST_DELTAS
    borders = [len(text) * turn // events for turn in range(events + 1)]
    return tuple(text[start:end] for start, end in pairwise(borders))
