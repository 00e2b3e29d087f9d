"""Streams as vendors send them, ways to cut bytes, and a plain reader of server-sent events to judge by.

In a template `<<NAME>>` stands where a dialect names the model; every other mention of that name is a decoy. What
comes from the upstream and what the client must get are both made from it by substitution, so no parser is its own
judge here.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st

from gproxyd.types import DialectName

_MARK = re.compile(rb"<<([^<>]*)>>")

BOM = b"\xef\xbb\xbf"


def law(examples: int) -> settings:
    """A property's settings: the same examples on every run, and a blob to replay what failed."""
    return settings(max_examples=examples, derandomize=True, deadline=None, print_blob=True)


@dataclass(frozen=True)
class Stream:
    """One recorded body. `template` has LF as its line ends and `<<NAME>>` where the model is named."""

    name: str
    dialect: DialectName
    kind: Literal["events", "json"]
    template: bytes

    @property
    def upstream(self) -> bytes:
        return _MARK.sub(rb"\1", self.template)

    def shown(self, name: bytes) -> bytes:
        """What the client gets when it must see `name`."""
        return _MARK.sub(lambda _: name, self.template)

    def with_line_ends(self, style: str) -> Stream:
        return Stream(f"{self.name} {style}", self.dialect, self.kind, LINE_ENDS[style](self.template))


def windows(stream: Stream, width: int = 3) -> Iterator[Stream]:
    """The stream a few events at a time."""
    events = stream.template.split(b"\n\n")
    for at in range(0, len(events), width):
        assert not at or not events[at].startswith(BOM), "behind the beginning of a stream a BOM is data"
        tail = b"\n\n" if at + width < len(events) else b""
        text = b"\n\n".join(events[at : at + width]) + tail
        yield Stream(f"{stream.name}, events {at} to {at + width}", stream.dialect, stream.kind, text)


def _mixed(text: bytes) -> bytes:
    """Every kind of line end in turn. A lone LF behind a CR would be half of a CRLF, so there it becomes one."""
    out: list[bytes] = []
    ends = (b"\r\n", b"\n", b"\r")
    for index, line in enumerate(lines := text.split(b"\n")):
        out.append(line)
        if index < len(lines) - 1:
            end = ends[(index * 7 // 3) % 3]
            out.append(b"\r\n" if end == b"\n" and not line and out[-2:-1] == [b"\r"] else end)
    return b"".join(out)


LINE_ENDS: dict[str, Callable[[bytes], bytes]] = {
    "LF": lambda text: text,
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "CR": lambda text: text.replace(b"\n", b"\r"),
    "mixed": _mixed,
}


# Cuts.


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`data` cut at these offsets."""
    edges = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def random_pieces(data: bytes, seed: int, most: int = 40) -> list[bytes]:
    """`data` cut at random; the same seed cuts the same."""
    rng = random.Random(seed)
    return pieces(data, (rng.randrange(len(data) + 1) for _ in range(rng.randint(1, most))))


def cuttings(data: bytes, rounds: int = 10) -> Iterator[tuple[str, list[bytes]]]:
    """Whole, byte by byte, and at random cuts; with a name that tells how to do it again."""
    yield "whole", [data]
    yield "byte by byte", list(byte_by_byte(data))
    for seed in range(rounds):
        yield f"random_pieces(seed={seed})", random_pieces(data, seed)


CUTS = st.lists(st.integers(0, 10**6), max_size=12)


def at_cuts(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` at hypothesis' own cuts (`CUTS`), whatever its length."""
    return pieces(data, (cut % (len(data) + 1) for cut in cuts))


# A reader of server-sent events, line by line and slow (HTML Living Standard, section 9.2.6).


def lines_of(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The complete lines, each with the offset behind its end."""
    start = at = 0
    while at < len(data):
        if data[at] in b"\r\n":
            width = 2 if data[at : at + 2] == b"\r\n" else 1
            yield data[start:at], at + width
            start = at = at + width
        else:
            at += 1


def boundaries(data: bytes) -> list[int]:
    """The offsets behind every empty line."""
    return [end for line, end in lines_of(data) if not line]


def events_of(data: bytes) -> list[tuple[str, bytes]]:
    """(name, data) of every complete event, as a browser would dispatch it."""
    found: list[tuple[str, bytes]] = []
    name, texts = b"", []
    for line, _ in lines_of(data.removeprefix(BOM)):
        if not line:
            if texts:
                found.append((name.decode() or "message", b"\n".join(texts)))
            name, texts = b"", []
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            texts.append(value)
        elif field == b"event":
            name = value
    return found


# What vendors send.


def _data(*texts: str) -> bytes:
    return b"".join(b"data: %b\n\n" % text.encode() for text in texts)


def _named(*texts: str) -> bytes:
    """Events that bear their JSON's `type` as their name."""
    out = []
    for text in texts:
        name = re.search(r'"type": ?"([a-z_.]+)"', text)
        assert name is not None
        out.append(f"event: {name[1]}\ndata: {text}\n\n".encode())
    return b"".join(out)


def _chat(rest: str, model: str = "gpt-4.1-mini-2025-04-14") -> str:
    return (
        '{"id":"chatcmpl-BkQ1","object":"chat.completion.chunk","created":1750000000,'
        f'"model":"<<{model}>>","service_tier":"default","system_fingerprint":"fp_38647f5e19",{rest}}}'
    )


def _delta(delta: str, finish: str = "null") -> str:
    return f'"choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}],"usage":null'


def _call(index: int, text: str) -> str:
    return _chat(_delta(f'{{"tool_calls":[{{"index":{index},"function":{{"arguments":{text}}}}}]}}'))


CHAT_TOOLS = _data(
    _chat(_delta('{"role":"assistant","content":null,"refusal":null}')),
    _chat(
        _delta('{"tool_calls":[{"index":0,"id":"call_9","type":"function","function":{"name":"pick","arguments":""}}]}')
    ),
    _call(0, r'"{\""'),
    _call(0, r'"model\":\"gpt-4.1-mini-2025-04-14\",\"a\":{\"model\":\"x\"}"'),
    _call(0, r'"}"'),
    _call(1, r'"\"model\": \"gpt-4.1-mini-2025-04-14\""'),
    _chat(_delta("{}", '"tool_calls"')),
    _chat('"choices":[],"usage":{"prompt_tokens":82,"completion_tokens":17,"total_tokens":99}'),
    "[DONE]",
)

CHAT_TEXT = _data(
    _chat(_delta('{"role":"assistant","content":""}')),
    _chat(_delta(r'{"content":"Say \"model\":\"gpt-4.1-mini-2025-04-14\"\n\ndata: [DONE]\\"}')),
    _chat(_delta('{"content":"\u2028\u2029\u0085 \U0001f600\U00020bb7 ü"}')),
    _chat(_delta('{"content":"\x0b\x0c\x1c\x1d\x1e\x7f"}')),  # not JSON, and yet not line ends
    _chat(_delta(r'{"content":"\ud83d\ude00 \u006d\u006Fdel \u2028"}')),
    _chat(_delta("{}", '"stop"')),
    "[DONE]",
)

AZURE = _data(
    '{"choices":[],"created":0,"id":"","model":"<<>>","object":"","prompt_filter_results":[{"prompt_index":0,'
    '"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}}}]}',
    '{"choices":[{"content_filter_results":{},"delta":{"content":"","refusal":null,"role":"assistant"},'
    '"finish_reason":null,"index":0,"logprobs":null}],"created":1750000000,"id":"chatcmpl-Az1",'
    '"model":"<<gpt-4o-2024-11-20>>","object":"chat.completion.chunk","system_fingerprint":"fp_ee1d74bde0"}',
    '{"choices":[{"content_filter_offsets":{"check_offset":44},"content_filter_results":{"violence":'
    '{"filtered":false,"severity":"safe"}},"delta":{},"finish_reason":"stop","index":0}],"created":1750000000,'
    '"id":"chatcmpl-Az1","model":"<<gpt-4o-2024-11-20>>","object":"chat.completion.chunk"}',
    "[DONE]",
)


def _vllm(text: str, tokens: int) -> str:
    return (
        '{"id":"chatcmpl-v1","object":"chat.completion.chunk","created":1750000000,'
        '"model":"<<meta-llama/Llama-3.3-70B-Instruct>>","choices":[{"index":0,"delta":{"content":"' + text + '"},'
        f'"logprobs":null,"finish_reason":null}}],"usage":{{"prompt_tokens":9,"total_tokens":{9 + tokens},'
        f'"completion_tokens":{tokens}}}}}'
    )


VLLM = _data(
    _vllm("", 0), _vllm("The", 1), _vllm(" model", 2), _vllm(" is meta-llama/Llama-3.3-70B-Instruct", 9), "[DONE]"
)

OPENROUTER = (
    b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n"
    + _data(
        '{"id":"gen-1","provider":"DeepSeek","model":"<<deepseek/deepseek-r1>>","object":"chat.completion.chunk",'
        '"choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":"Hm","reasoning_details":'
        '[{"type":"reasoning.text","model":"deepseek/deepseek-r1","text":"Hm"}]},"finish_reason":null}]}'
    )
    + b": OPENROUTER PROCESSING\n\n"
    + _data(
        '{"id":"gen-1","provider":"DeepSeek","model":"<<deepseek/deepseek-r1>>","choices":[],'
        '"error":{"code":502,"message":"Upstream","metadata":{"model":"deepseek/deepseek-r1"}}}',
        "[DONE]",
    )
)


def _response(kind: str, number: int, status: str, output: str = "[]", usage: str = "null") -> str:
    return (
        f'{{"type":"{kind}","sequence_number":{number},"response":{{"id":"resp_1","object":"response",'
        f'"status":"{status}","model":"<<gpt-5-2025-08-07>>","output":{output},"reasoning":{{"effort":"low"}},'
        '"tools":[{"type":"image_generation","model":"gpt-image-1"},{"type":"function","name":"f","parameters":'
        '{"type":"object","properties":{"model":{"type":"string"}}}}],"metadata":{"model":"gpt-5-2025-08-07"},'
        f'"usage":{usage}}}}}'
    )


RESPONSES = _named(
    _response("response.created", 0, "in_progress"),
    _response("response.in_progress", 1, "in_progress"),
    '{"type":"response.output_item.added","sequence_number":2,"output_index":0,"item":{"id":"rs_1",'
    '"type":"reasoning","encrypted_content":"gAAAA/+==","summary":[]}}',
    '{"type":"response.reasoning_summary_text.delta","sequence_number":3,"item_id":"rs_1","delta":"I am a model"}',
    '{"type":"response.output_item.added","sequence_number":4,"output_index":1,"item":{"id":"msg_1","type":"message",'
    '"status":"in_progress","content":[],"role":"assistant"}}',
    '{"type":"response.content_part.added","sequence_number":5,"item_id":"msg_1","part":{"type":"output_text",'
    '"annotations":[],"text":""}}',
    '{"type":"response.output_text.delta","sequence_number":6,"delta":"{\\"response\\":{\\"model\\":\\"m\\"}}"}',
    '{"type":"response.output_text.done","sequence_number":7,"text":"done","logprobs":[]}',
    '{"type":"response.function_call_arguments.delta","sequence_number":8,"delta":"{\\"model\\":"}',
    '{"type":"response.function_call_arguments.done","sequence_number":9,"arguments":"{\\"model\\":\\"m\\"}"}',
    '{"type":"response.output_item.done","sequence_number":10,"item":{"type":"function_call","model":"m","name":"f"}}',
    _response(
        "response.completed",
        11,
        "completed",
        '[{"type":"message","model":"gpt-5-2025-08-07","response":{"model":"m"}}]',
        '{"input_tokens":36,"output_tokens":87,"output_tokens_details":{"reasoning_tokens":64}}',
    ),
)

ANTHROPIC = _named(
    '{"type":"message_start","message":{"id":"msg_01","type":"message","role":"assistant",'
    '"model":"<<claude-sonnet-5-20260101>>","content":[],"stop_reason":null,"stop_sequence":null,'
    '"usage":{"input_tokens":377,"cache_read_input_tokens":0,"output_tokens":1,"service_tier":"standard"}}}',
    '{"type": "ping"}',
    '{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"\\"message\\":"}}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"EqQBCgIYAh+/="}}',
    '{"type":"content_block_stop","index":0}',
    '{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"toolu_1","name":"f",'
    '"input":{"message":{"model":"claude-sonnet-5-20260101"}}}}',
    '{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta",'
    '"partial_json":"{\\"model\\": \\"claude-sonnet-5-20260101\\""}}',
    '{"type":"content_block_stop","index":1}',
    '{"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"output_tokens":65}}',
    '{"type":"message_stop"}',
)

ANTHROPIC_ERROR = _named(
    '{"type":"message_start","message":{"model":"<<claude-haiku-5>>","id":"msg_02","type":"message","content":[]}}',
    '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded","model":"claude-haiku-5"}}',
)


def _gemini(parts: str, tokens: int, finish: str = "") -> str:
    return (
        f'{{"candidates": [{{"content": {{"parts": [{parts}],"role": "model"}},{finish}"index": 0}}],'
        f'"usageMetadata": {{"promptTokenCount": 7,"candidatesTokenCount": {tokens},"totalTokenCount": {7 + tokens}}},'
        '"modelVersion": "<<gemini-2.5-flash>>"'
    )


GEMINI = _data(
    _gemini('{"text": "Hi"}', 2) + "}",
    _gemini(r'{"text": "\"modelVersion\": \"gemini-2.5-flash\"}"}', 9) + ',"responseId": "abc"}',
    _gemini('{"functionCall": {"name": "f","args": {"modelVersion": "gemini-2.5-flash"}}}', 12) + "}",
    _gemini('{"text": "","thoughtSignature": "CpwBAVSoXO4="}', 12, '"finishReason": "STOP",') + "}",
)

ODDITIES = (
    b'\xef\xbb\xbf:comment "model":"m"\n\n'
    b"retry: 3000\n\n"
    b'id: 7\nevent: chunk\ndata:{"model":"<<m>>","choices":[]}\n\n'  # no space
    b'data:  {"mod\\u0065l" : "<<m>>"}\n\n'  # two spaces, an escaped spelling
    b'data: {"choices":[{"model":"m"},\ndata:  2],\ndata: "model":\ndata:\ndata: "<<m>>"}\n\n'  # one event, five lines
    b'data: {"model":"<<m>>","model":"<<\\"\\\\m>>"}\n\n'
    b'data\n\ndata:\n\ndata: {"a":"\xff\xfe\xf0\x9f","model":"<<m\xff>>"}\n\n'  # not UTF-8
    b'data: {"model":null}\n\ndata: {"model":{"model":"m"}}\n\ndata: {"model":["m"]}\n\ndata: "model"\n\n'
    b'Data: {"model":"m"}\n\n data: {"model":"m"}\n\ndatas: {"model":"m"}\n\n\n\n'
    b'data: {\'model\': m\n\ndata: "model":"m"\n\ndata: }}]]{\n\n'
    b"data: [DONE]\n\ndata:[DONE]\n\n"
    b'data: {"model":"<<m>>"}\n\n'  # after the end
    b'\xef\xbb\xbfdata: {"model":"m"}\n\n'  # a second BOM belongs to the field's name
    b'data: {"usage":{},"model":"<<m>>"}'  # no line end at all
)

LEGACY = _data(
    '{"id":"cmpl-1","object":"text_completion","created":1,"choices":[{"text":"model","index":0,"logprobs":null,'
    '"finish_reason":null}],"model":"<<gpt-3.5-turbo-instruct>>"}',
    '{"id":"cmpl-1","object":"text_completion","created":1,"choices":[{"text":"","index":0,"finish_reason":"stop"}],'
    '"model":"<<gpt-3.5-turbo-instruct>>"}',
    "[DONE]",
)

GEMINI_ARRAY = b"[" + b",\n".join(line[6:] for line in GEMINI.split(b"\n") if line) + b"\n]\n"

CHAT_JSON = (
    '{\n  "id": "chatcmpl-BkQ2",\n  "object": "chat.completion",\n  "created": 1750000000,\n'
    '  "model": "<<gpt-4.1-mini-2025-04-14>>",\n  "choices": [{"index": 0, "message": {"role": "assistant",\n'
    '    "content": "\\"model\\": \\"gpt-4.1-mini-2025-04-14\\" ü\U0001f600",\n    "model": "decoy"},\n'
    '    "finish_reason": "stop"}],\n  "usage": {"prompt_tokens": 19, "cost": 1.0e-5, "big": 9007199254740993}\n}\n'
).encode()

ANTHROPIC_JSON = (
    b'{"model":"<<claude-sonnet-5-20260101>>","id":"msg_03","type":"message","role":"assistant","content":'
    b'[{"type":"tool_use","id":"toolu_2","name":"f","input":{"model":"claude-sonnet-5-20260101"}}],'
    b'"stop_reason":"tool_use","usage":{"input_tokens":3,"output_tokens":5}}'
)

RESPONSES_JSON = (
    b'{"id":"resp_2","object":"response","model":"<<gpt-5-2025-08-07>>","output":[{"type":"message","content":'
    b'[{"type":"output_text","text":"hi","model":"decoy"}]}],"tools":[{"model":"gpt-image-1"}],"usage":null}'
)

STREAMS = [
    Stream("chat with tool calls", "openai_chat", "events", CHAT_TOOLS),
    Stream("chat whose text tries", "openai_chat", "events", CHAT_TEXT),
    Stream("azure", "openai_chat", "events", AZURE),
    Stream("vllm", "openai_chat", "events", VLLM),
    Stream("openrouter", "openai_chat", "events", OPENROUTER),
    Stream("legacy completions", "openai_chat", "events", LEGACY),
    Stream("oddities", "openai_chat", "events", ODDITIES),
    Stream("responses", "openai_responses", "events", RESPONSES),
    Stream("anthropic", "anthropic", "events", ANTHROPIC),
    Stream("anthropic, failing", "anthropic", "events", ANTHROPIC_ERROR),
    Stream("gemini", "gemini", "events", GEMINI),
    Stream("gemini array", "gemini", "json", GEMINI_ARRAY),
    Stream("chat json", "openai_chat", "json", CHAT_JSON),
    Stream("anthropic json", "anthropic", "json", ANTHROPIC_JSON),
    Stream("responses json", "openai_responses", "json", RESPONSES_JSON),
]

EVENT_STREAMS = [stream for stream in STREAMS if stream.kind == "events"]
JSON_BODIES = [stream for stream in STREAMS if stream.kind == "json"]
