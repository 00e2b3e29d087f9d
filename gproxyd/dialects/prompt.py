"""An agent's system prompt, put into a request.

Invariants: without `force` the prompt is only for requests that bring none: a client's own stands alone, nothing is
put before it or after it. With `force` it is the only one: whatever else speaks as the system is taken out, in the
middle of the conversation too. Everything else stays the very object that it was, and the request is never changed
in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gproxyd.dialects.turns import Fields
from gproxyd.types import DialectName

_SYSTEM = ("system", "developer")


def with_system(dialect: DialectName, fields: Fields, text: str, force: bool) -> Fields:
    """The request with the prompt in it; the same object if nothing changes, as for an empty prompt.

    openai_chat        the first message: of the role "developer" if that is what is replaced, else "system"
    openai_responses   `instructions`; messages of these roles in `input` count as prompts, too
    anthropic          `system`: a text, or one block if the replaced prompt marked what to cache (`cache_control`)
    gemini             `systemInstruction`, also where it was spelled `system_instruction`
    """
    return _WRITERS[dialect](fields, text, force) if text else fields


def _chat(fields: Fields, text: str, force: bool) -> Fields:
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return fields
    own = [message for message in messages if is_system(message)]
    if own and not force:
        return fields
    role = own[0]["role"] if own else "system"
    rest = [message for message in messages if not is_system(message)]
    return {**fields, "messages": [{"role": role, "content": text}, *rest]}


def _responses(fields: Fields, text: str, force: bool) -> Fields:
    items = fields.get("input")
    said = [item for item in items if is_system(item)] if isinstance(items, list) else []
    if (fields.get("instructions") or said) and not force:
        return fields
    changed = {**fields, "instructions": text}
    if said:
        changed["input"] = [item for item in fields["input"] if not is_system(item)]
    return changed


def _anthropic(fields: Fields, text: str, force: bool) -> Fields:
    own = fields.get("system")
    if own and not force:
        return fields
    marks = [mark for block in own if (mark := _mark(block))] if isinstance(own, list) else []
    system = [{"type": "text", "text": text, "cache_control": marks[-1]}] if marks else text
    changed = {**fields, "system": system}
    messages = fields.get("messages")
    if isinstance(messages, list) and any(map(is_system, messages)):
        changed["messages"] = [message for message in messages if not is_system(message)]
    return changed


def _gemini(fields: Fields, text: str, force: bool) -> Fields:
    spellings = ("systemInstruction", "system_instruction")
    if any(fields.get(name) for name in spellings) and not force:
        return fields
    rest = {name: value for name, value in fields.items() if name not in spellings}
    return {**rest, "systemInstruction": {"parts": [{"text": text}]}}


def is_system(item: object) -> bool:
    """Whether an item is a prompt."""
    return isinstance(item, dict) and item.get("role") in _SYSTEM and item.get("type", "message") == "message"


def _mark(block: object) -> Any:
    return block.get("cache_control") if isinstance(block, dict) else None


_WRITERS: Mapping[DialectName, Callable[[Fields, str, bool], Fields]] = {
    "openai_chat": _chat,
    "openai_responses": _responses,
    "anthropic": _anthropic,
    "gemini": _gemini,
}
