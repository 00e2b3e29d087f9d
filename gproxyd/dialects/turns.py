"""The shape of a conversation in each dialect: where its items stand, who speaks in one, and what an item is made of.

Invariant: whatever JSON a client sends, nothing here raises; what has another shape than the dialect's has no items.

Sources: the OpenAI API reference (chat completions; responses, input items), Anthropic's Messages API reference and
"Tool use" pages, the Gemini API reference (Content, Part).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from gproxyd.types import DialectName

Fields: TypeAlias = Mapping[str, Any]
"""Top-level members of a request's JSON object."""

Role = Literal["system", "user", "assistant", "result"]
"""Who speaks: "system" also for what must stay whatever is left out, "result" is what tools gave back."""


@dataclass(frozen=True, slots=True)
class Shape:
    """items     the members that may hold the list of items; of several spellings the first that is there
    content   the member of an item that holds its text or parts
    system    the members of a request that hold a system prompt beside the list
    beside    other members that become a part of the prompt
    """

    items: str
    content: str
    system: tuple[str, ...]
    beside: tuple[str, ...]


SHAPES: Final[Mapping[DialectName, Shape]] = {
    "openai_chat": Shape("messages", "content", (), ("tools", "functions", "response_format")),
    "openai_responses": Shape("input", "content", ("instructions",), ("tools", "text")),
    "anthropic": Shape("messages", "content", ("system",), ("tools", "output_config", "output_format")),
    # Google's servers read both spellings of a field.
    "gemini": Shape("contents", "parts", ("systemInstruction", "system_instruction"),
                    ("tools", "generationConfig", "generation_config")),
}  # fmt: skip

_SPEAKERS: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "result",
    "function": "result",
}

# What a client put into a member may be no text, and no key of a table: tuples can be asked for anything.
_KEPT = ("compaction", "compaction_summary")  # the Responses API's stand-in for all that came before it
_RESULTS = ("mcp_approval_response",)
_RESULT_PARTS = ("functionResponse", "function_response")
_CALL_PARTS = ("functionCall", "function_call")
_FIRST = 100  # parts among which results stand: vendors want them in front


def items(dialect: DialectName, fields: Fields) -> Sequence[Any]:
    """The conversation's items, oldest first. A text in their place is one item: what the user says."""
    shape = SHAPES[dialect]
    found = fields.get(shape.items)
    if isinstance(found, list):
        return found
    if isinstance(found, str) and dialect == "openai_responses":
        return ({"role": "user", "content": found},)
    return (found,) if isinstance(found, dict) else ()


def parts(dialect: DialectName, item: object) -> Sequence[Any]:
    """What an item is made of. A text in place of parts is one part."""
    content = item.get(SHAPES[dialect].content) if isinstance(item, dict) else None
    return listed(content)


def system(dialect: DialectName, fields: Fields) -> Iterator[Any]:
    """The parts of the system prompts that stand beside the items."""
    shape = SHAPES[dialect]
    for name in shape.system:
        value = fields.get(name)
        yield from parts(dialect, value) if isinstance(value, dict) and shape.content in value else listed(value)


def listed(content: object) -> Sequence[Any]:
    """Parts, of whichever form: a list, one of them alone, or a text."""
    if isinstance(content, list):
        return content
    if isinstance(content, str):
        return ({"type": "text", "text": content},)
    return () if content is None else (content,)


def role(dialect: DialectName, item: object) -> Role:
    """Who speaks in an item. What nobody knows is taken for a part of the assistant's turn."""
    if not isinstance(item, dict):
        return "assistant"
    if dialect == "openai_responses" and (kind := item.get("type", "message")) != "message":
        if kind in _KEPT:
            return "system"
        return "result" if kind in _RESULTS or str(kind).endswith("_output") else "assistant"
    name = item.get("role")
    speaker = _SPEAKERS.get(name, "assistant") if isinstance(name, str) else "assistant"
    if dialect == "gemini" and name is None:
        speaker = "user"
    if speaker == "user" and dialect in ("anthropic", "gemini") and any(map(is_result, parts(dialect, item)[:_FIRST])):
        return "result"
    return speaker


def is_result(part: object) -> bool:
    """Whether a part bears what a tool gave back to the model (Anthropic, Gemini)."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "tool_result" or any(name in part for name in _RESULT_PARTS)


def has_words(dialect: DialectName, item: object) -> bool:
    """Whether the user says something beside the results in an item (Anthropic, Gemini)."""
    found = parts(dialect, item) if role(dialect, item) == "result" and dialect in ("anthropic", "gemini") else ()
    return any(not is_result(part) for part in found)


def links(dialect: DialectName, item: object) -> Iterator[object]:
    """The ids that tie calls and their results together, wherever in an item they stand."""
    if not isinstance(item, dict):
        return
    if dialect == "openai_responses":
        for name in ("call_id", "approval_request_id"):
            yield item.get(name)
        if item.get("type") == "mcp_approval_request":
            yield item.get("id")
    elif dialect == "openai_chat":
        yield item.get("tool_call_id")
        calls = item.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            yield call.get("id") if isinstance(call, dict) else None
    else:
        for part in parts(dialect, item):
            yield from _part_links(part)


def _part_links(part: object) -> Iterator[object]:
    if not isinstance(part, dict):
        return
    kind = part.get("type")
    if kind == "tool_use":
        yield part.get("id")
    elif kind == "tool_result":
        yield part.get("tool_use_id")
    for name in (*_CALL_PARTS, *_RESULT_PARTS):
        if isinstance(call := part.get(name), dict):
            yield call.get("id")
