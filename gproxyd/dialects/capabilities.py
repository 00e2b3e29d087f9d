"""What a model must be able to do for a request, in the words of `vendors/models.yaml`.

Invariants: nothing here raises; at most MOST_PARTS parts of a conversation are looked at. Only what a request fails
without counts as a need: a cache's mark is a wish, parallel tool calls are another; a model that has neither serves.

Sources: the OpenAI API reference (chat completions, responses), Anthropic's Messages API reference and tool use pages,
the Gemini API reference (GenerateContentRequest, Part, Tool).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import chain
from typing import Any, Final

from gproxyd.dialects.turns import Fields, items, listed, role
from gproxyd.dialects.usage import at
from gproxyd.types import DialectName

MOST_PARTS: Final = 20_000

NEEDS: Final = frozenset(
    {"vision", "audio_in", "audio_out", "pdf", "tools", "json_schema", "reasoning", "web_search", "computer_use"}
)
"""All that `needs` may answer."""

_PARTS = {
    "image": "vision",
    "image_url": "vision",
    "input_image": "vision",
    "computer_screenshot": "vision",
    "video_url": "vision",
    "input_audio": "audio_in",
    "audio_url": "audio_in",
    "file": "pdf",
    "input_file": "pdf",
    "document": "pdf",
}
_MIME = {"image": "vision", "video": "vision", "audio": "audio_in"}
_PLAIN_SOURCES = ("text", "content")
_CALLS = ("tool_calls", "function_call", "call_id")  # of an item
_INNER = ("content", "output", "source", "parts")  # where items and parts have parts: results of tools, documents
_GEMINI_DATA = ("inlineData", "inline_data", "fileData", "file_data")
_GEMINI_RESULTS = ("functionResponse", "function_response")

_TOOL_WORDS = (("web_search", "web_search"), ("computer", "computer_use"))
_GEMINI_TOOLS = {
    "googleSearch": "web_search",
    "google_search": "web_search",
    "googleSearchRetrieval": "web_search",
    "google_search_retrieval": "web_search",
    "enterpriseWebSearch": "web_search",
    "computerUse": "computer_use",
    "computer_use": "computer_use",
}

_CONFIG = ("generationConfig", "generation_config")
_SCHEMAS: Mapping[DialectName, tuple[tuple[str, ...], ...]] = {
    "openai_chat": (("response_format",),),
    "openai_responses": (("text", "format"),),
    "anthropic": (("output_config", "format"), ("output_format",)),
    "gemini": (),
}
_GEMINI_SCHEMAS = ("responseSchema", "response_schema", "responseJsonSchema", "response_json_schema")
_PAUSE = 256  # parts that are looked at at once
_OFF = (None, "none", "off", "disabled", False, 0)


def needs(dialect: DialectName, fields: Fields) -> frozenset[str]:
    """The capabilities that a request uses, of NEEDS.

    Calls and results in the history count as tools, because vendors refuse them with models that have none; a file
    that is only referred to by its id counts as a PDF.
    """
    return _with_the_rest(dialect, fields, {*_in_parts(dialect, fields), *_in_tools(dialect, fields)})


def needs_large(dialect: DialectName, fields: Fields) -> Generator[None, None, frozenset[str]]:
    """The same in steps."""
    found: set[str] = set()
    for n, need in enumerate(chain(_in_parts(dialect, fields), _in_tools(dialect, fields))):
        found.add(need)
        if not need or n % _PAUSE == 0:
            yield None
    return _with_the_rest(dialect, fields, found)


def _with_the_rest(dialect: DialectName, fields: Fields, found: set[str]) -> frozenset[str]:
    found.discard("")
    if any(at(fields, (*place, "type")) == "json_schema" for place in _SCHEMAS[dialect]):
        found.add("json_schema")
    if _thinks(dialect, fields):
        found.add("reasoning")
    if "audio" in _modalities(fields):
        found.add("audio_out")
    if dialect == "gemini" and any(at(fields, (config, name)) for config in _CONFIG for name in _GEMINI_SCHEMAS):
        found.add("json_schema")
    return frozenset(found)


def _modalities(fields: Fields) -> set[str]:
    names = ("responseModalities", "response_modalities")
    places = (("modalities",), *((config, name) for config in _CONFIG for name in names))
    told = [value for place in places if isinstance(value := at(fields, place), list)]
    return {word.lower() for words in told for word in words if isinstance(word, str)}


def _thinks(dialect: DialectName, fields: Fields) -> bool:
    if dialect == "gemini":
        for config in _CONFIG:
            thinking = at(fields, (config, "thinkingConfig")) or at(fields, (config, "thinking_config"))
            if isinstance(thinking, dict) and thinking:
                budget = thinking.get("thinkingBudget", thinking.get("thinking_budget"))
                return budget != 0
        return False
    effort, reasoning, thinking = (fields.get(name) for name in ("reasoning_effort", "reasoning", "thinking"))
    if isinstance(reasoning, dict) and reasoning:
        return reasoning.get("effort", "default") not in _OFF and reasoning.get("enabled", True) is not False
    if isinstance(thinking, dict):
        return thinking.get("type") not in _OFF
    return isinstance(effort, str) and effort not in _OFF


def _in_tools(dialect: DialectName, fields: Fields) -> Iterator[str]:
    if fields.get("functions"):
        yield "tools"
    if isinstance(fields.get("web_search_options"), dict):
        yield "web_search"
    tools = fields.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, dict):
            continue
        if dialect == "gemini":
            yield from (_GEMINI_TOOLS.get(name, "tools") for name in tool)
        else:
            kind = str(tool.get("type"))
            yield next((need for word, need in _TOOL_WORDS if kind.startswith(word)), "tools")


def _in_parts(dialect: DialectName, fields: Fields) -> Iterator[str]:
    left = MOST_PARTS
    for item in items(dialect, fields):
        if role(dialect, item) == "result" or (isinstance(item, dict) and any(item.get(name) for name in _CALLS)):
            yield "tools"
        left -= 1
        if left % _PAUSE == 0:
            yield ""  # who cannot look at everything at once has a pause
        waiting = _inside(item)
        while waiting and left > 0:
            left -= 1
            if left % _PAUSE == 0:
                yield ""
            part = waiting.pop()
            if isinstance(part, dict):
                yield from _of_part(part)
                waiting += _inside(part)
        if left <= 0:
            return


def _inside(part: object) -> list[Any]:
    """The parts of an item, or of a part."""
    if not isinstance(part, dict):
        return []
    inner = [one for name in _INNER if not isinstance(value := part.get(name), str) for one in listed(value)]
    for name in _GEMINI_RESULTS:
        if isinstance(result := part.get(name), dict):
            inner += listed(result.get("parts"))
    return inner


def _of_part(part: Mapping[str, Any]) -> Iterator[str]:
    kind = part.get("type")
    need = _PARTS.get(kind) if isinstance(kind, str) else None
    if need == "pdf":
        if at(part, ("source", "type")) not in _PLAIN_SOURCES and not _is_text_file(part):
            yield need
    elif need:
        yield need
    if kind in ("tool_use", "tool_result") or "functionCall" in part or "function_call" in part:
        yield "tools"
    for name in _GEMINI_DATA:
        if isinstance(data := part.get(name), dict):
            mime = str(data.get("mimeType") or data.get("mime_type") or "")
            if mime == "application/pdf":
                yield "pdf"
            elif word := _MIME.get(mime.partition("/")[0]):
                yield word


def _is_text_file(part: Mapping[str, Any]) -> bool:
    """Whether an OpenAI file is of plain text, by what its data URL says."""
    data = part.get("file_data") or at(part, ("file", "file_data"))
    return isinstance(data, str) and data.startswith("data:text/")
