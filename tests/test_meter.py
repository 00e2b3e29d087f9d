"""The meter: what a reply cost, read out of what passes by, and not one byte changed that the client should see."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass
from typing import get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.dialects.meter import WHOLE, Meter
from gproxyd.dialects.usage import MAX_COUNT, Usage, from_value
from gproxyd.types import DialectName
from tests.support.streams import BOM, CUTS, LINE_ENDS, at_cuts, boundaries, byte_by_byte, law
from tests.test_usage import JSON, REPLIES

DIALECTS: tuple[DialectName, ...] = get_args(DialectName)


@dataclass(frozen=True)
class Stream:
    dialect: DialectName
    events: tuple[bytes, ...]
    usage: Usage | None
    complete: bool = True
    errored: bool = False
    seen_content: bool = True

    @property
    def text(self) -> bytes:
        return b"".join(self.events)


def data(*texts: bytes) -> tuple[bytes, ...]:
    return tuple(b"data: %b\n\n" % text for text in texts)


def named(*texts: bytes) -> tuple[bytes, ...]:
    return tuple(b"event: %b\ndata: %b\n\n" % (orjson.loads(text)["type"].encode(), text) for text in texts)


def word(content: bytes, more: bytes = b"") -> bytes:
    return b'{"id":"c","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]%b}' % (content, more)


def usage_of(prompt: int, completion: int) -> bytes:
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
        prompt, completion, prompt + completion
    )  # fmt: skip


FINAL = b'{"id":"c","choices":[],"usage":%b}' % usage_of(9, 12)
DONE = b"[DONE]"
ROLE = b'{"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'
NULL = b',"usage":null'

START = (
    b'{"type":"message_start","message":{"model":"m","content":[],"usage":{"input_tokens":25,'
    b'"cache_read_input_tokens":7,"output_tokens":1,"service_tier":"standard"}}}'
)
PING = b'{"type": "ping"}'
BLOCK = b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'
DELTA = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}'
END = b'{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}'
STOP = b'{"type":"message_stop"          }'

CREATED = b'{"type":"response.created","response":{"id":"r","usage":null,"error":null,"service_tier":"auto"}}'
TEXT = b'{"type":"response.output_text.delta","delta":"Hi"}'
COMPLETED = (
    b'{"type":"response.completed","response":{"id":"r","error":null,"service_tier":"default","usage":'
    b'{"input_tokens":11,"input_tokens_details":{"cached_tokens":4},"output_tokens":6,"total_tokens":17}}}'
)


def parts(text: bytes, told: bytes, finish: bytes = b"") -> bytes:
    candidate = b'{"content":{"parts":[{"text":"%b"}]}%b,"index":0}' % (text, finish)
    return b'{"candidates":[%b],"usageMetadata":{%b},"modelVersion":"g"}' % (candidate, told)


GEMINI = (
    parts(b"Hel", b'"promptTokenCount":4,"totalTokenCount":4'),
    parts(b"lo", b'"promptTokenCount":4,"candidatesTokenCount":1,"thoughtsTokenCount":20,"totalTokenCount":25'),
    parts(b"!", b'"promptTokenCount":4,"candidatesTokenCount":3,"thoughtsTokenCount":20,"totalTokenCount":27',
          b',"finishReason":"STOP"'),
)  # fmt: skip

SPOOF = rb"{\"usage\":{\"total_tokens\":0},\"error\":{}}\n\ndata: [DONE]\n\ndata: {\"usage\":1}"
CLAUDE = Usage(25, 15, 7, service_tier="standard", cached_in_input=False)

STREAMS: dict[str, Stream] = {
    "chat": Stream("openai_chat", data(ROLE, word(b"a"), word(b"b"), DONE), None),
    "chat, usage asked for": Stream(
        "openai_chat", data(ROLE, word(b"a", NULL), word(b"b", b', "usage" : null '), FINAL, DONE), Usage(9, 12)
    ),
    "chat, no [DONE]": Stream("openai_chat", data(word(b"a"), FINAL), Usage(9, 12)),
    "chat, cut": Stream("openai_chat", data(word(b"a"), word(b"b")), None, complete=False),
    "chat, [DONE] without a space, twice": Stream(
        "openai_chat", (*data(word(b"a")), b"data:[DONE]\n\n", b"data: [DONE]\n\n"), None
    ),
    "vLLM, cumulative": Stream(
        "openai_chat", data(*(word(b"a", b',"usage":%b' % usage_of(9, n)) for n in range(1, 13)), FINAL, DONE),
        Usage(9, 12),
    ),
    "vLLM, cumulative, cut": Stream(
        "openai_chat", data(*(word(b"a", b',"usage":%b' % usage_of(9, n)) for n in range(1, 8))),
        Usage(9, 7), complete=False,
    ),
    "Azure, with an empty beginning": Stream(
        "openai_chat", data(b'{"choices":[],"prompt_filter_results":[{}]}', word(b"a"), FINAL, DONE), Usage(9, 12)
    ),
    "Groq": Stream(
        "openai_chat",
        data(word(b"a"), b'{"choices":[{"delta":{},"finish_reason":"stop"}],"x_groq":{"usage":%b}}' % usage_of(9, 3),
             DONE),
        Usage(9, 3),
    ),
    "chat, a model that writes of usage": Stream(
        "openai_chat", data(word(b"a"), word(SPOOF), FINAL, DONE), Usage(9, 12)
    ),
    "chat, tools with a member of that name": Stream(
        "openai_chat", data(word(b"a"), b'{"choices":[{"delta":{"usage":{"prompt_tokens":1}}}]}', DONE), None
    ),
    "chat, an error amid": Stream(
        "openai_chat", data(word(b"a"), b'{"error":{"message":"x"}}', DONE), None, errored=True
    ),
    "chat, an error at once": Stream(
        "openai_chat", data(b'{"object":"error","message":"x","code":500}'), None, complete=False, errored=True,
        seen_content=False,
    ),
    "chat, null errors": Stream("openai_chat", data(word(b"a", b',"error":null'), DONE), None),
    "images": Stream(
        "openai_chat",
        named(b'{"type":"image_generation.partial_image","b64_json":"AA"}',
              b'{"type":"image_generation.completed","b64_json":"AA","usage":{"input_tokens":5,"output_tokens":90}}'),
        Usage(5, 90),
    ),
    "a transcript": Stream(
        "openai_chat",
        data(b'{"type":"transcript.text.delta","delta":"x"}',
             b'{"type":"transcript.text.done","text":"x","usage":{"type":"tokens","input_tokens":5,"output_tokens":2}}'),
        Usage(5, 2),
    ),
    "responses": Stream(
        "openai_responses", named(CREATED, TEXT, TEXT, COMPLETED), Usage(11, 6, 4, service_tier="default")
    ),
    "responses, failed": Stream(
        "openai_responses",
        named(CREATED, b'{"type":"response.failed","response":{"usage":null,"error":{"code":"server_error"}}}'),
        None, errored=True, seen_content=False,
    ),
    "responses, an error": Stream(
        "openai_responses", named(CREATED, TEXT, b'{"type":"error","code":"x","message":"y"}'), None, complete=False,
        errored=True,
    ),
    "anthropic": Stream("anthropic", named(START, PING, BLOCK, DELTA, PING, DELTA, END, STOP), CLAUDE),
    "anthropic, cut": Stream(
        "anthropic", named(START, BLOCK, DELTA), Usage(25, 1, 7, service_tier="standard", cached_in_input=False),
        complete=False,
    ),
    "anthropic, nothing but a beginning": Stream(
        "anthropic", named(START, PING), Usage(25, 1, 7, service_tier="standard", cached_in_input=False),
        complete=False, seen_content=False,
    ),
    "anthropic, overloaded amid": Stream(
        "anthropic", named(START, BLOCK, DELTA, b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}'),
        Usage(25, 1, 7, service_tier="standard", cached_in_input=False), complete=False, errored=True,
    ),
    "gemini": Stream("gemini", data(*GEMINI), Usage(4, 23, reasoning_tokens=20)),
    "gemini, cut": Stream("gemini", data(*GEMINI[:2]), Usage(4, 21, reasoning_tokens=20), complete=False),
    "gemini, refused": Stream(
        "gemini", data(b'{"promptFeedback":{"blockReason":"SAFETY"},"usageMetadata":{"promptTokenCount":4}}'),
        Usage(4), seen_content=False,
    ),
    "gemini, an error": Stream(
        "gemini", data(GEMINI[0], b'{"error":{"code":503,"status":"UNAVAILABLE"}}'), Usage(4), complete=False,
        errored=True,
    ),
    "nothing": Stream("openai_chat", (), None, complete=False, seen_content=False),
    "comments": Stream("openai_chat", (b": hi\n\n", b"\n\n"), None, complete=False, seen_content=False),
}  # fmt: skip


def state(meter: Meter) -> Stream:
    return Stream(meter._dialect, (), meter.usage, meter.complete, meter.errored, meter.seen_content)


def expected(stream: Stream) -> Stream:
    return Stream(stream.dialect, (), stream.usage, stream.complete, stream.errored, stream.seen_content)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_what_a_stream_tells(stream: Stream) -> None:
    meter = Meter(stream.dialect)
    assert b"".join(meter.events(event) for event in stream.events) == stream.text
    assert state(meter) == expected(stream)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_at_once_it_tells_the_same(stream: Stream) -> None:
    meter = Meter(stream.dialect)
    assert meter.events(stream.text) == stream.text
    assert state(meter) == expected(stream)


@law(300)
@given(st.sampled_from(sorted(STREAMS)), st.sampled_from(sorted(LINE_ENDS)), st.lists(st.booleans()), st.booleans())
def test_in_any_blocks_with_any_line_ends_it_tells_the_same(
    name: str, ends: str, together: list[bool], bom: bool
) -> None:
    stream = STREAMS[name]
    text = BOM * bom + LINE_ENDS[ends](stream.text)
    blocks, start = [], 0
    for number, end in enumerate(boundaries(text)):
        if number >= len(together) or not together[number]:
            blocks.append(text[start:end])
            start = end
    meter = Meter(stream.dialect)
    assert b"".join(meter.events(block) for block in [*blocks, text[start:]]) == text
    assert state(meter) == expected(stream)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_an_unterminated_last_event_counts(stream: Stream) -> None:
    text = stream.text.rstrip(b"\n")
    meter = Meter(stream.dialect)
    assert meter.events(text) == text
    assert state(meter) == expected(stream)


@pytest.mark.parametrize("rest", [b"", b"\n", b"\r\n\r\n"])
def test_empty_lines_behind_the_end_take_it_not_back(rest: bytes) -> None:
    meter = Meter("openai_chat")
    for block in (*data(word(b"a"), DONE), rest):
        meter.events(block)
    assert meter.complete


def test_data_of_many_lines_is_one_text() -> None:
    meter = Meter("openai_chat")
    meter.events(b'data: {"choices":[],\ndata: "usage":\ndata:{"prompt_tokens":1}}\n\n')
    assert meter.usage == Usage(1)


def test_a_bom_behind_the_beginning_is_data() -> None:
    meter = Meter("openai_chat")
    meter.events(b"data: %b\n\n" % word(b"a"))
    meter.events(BOM + b"data: %b\n\n" % FINAL)
    assert meter.usage is None


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_only_the_chunk_that_bears_nothing_but_usage_is_hidden(stream: Stream) -> None:
    meter = Meter(stream.dialect, hide=True)
    shown = b"".join(meter.events(event) for event in stream.events)
    assert shown == b"".join(event for event in stream.events if event != data(FINAL)[0])
    assert state(meter) == expected(stream)


def test_it_is_hidden_from_amid_a_block_in_any_line_ends() -> None:
    for style in LINE_ENDS.values():
        events = [style(event) for event in data(ROLE, word(b"a", NULL), FINAL, DONE)]
        assert Meter("openai_chat", hide=True).events(b"".join(events)) == b"".join(events[:2] + events[3:])


def test_with_an_error_it_is_not_hidden() -> None:
    event = data(b'{"choices":[],"usage":{"prompt_tokens":1},"error":{"message":"x"}}')[0]
    assert Meter("openai_chat", hide=True).events(event) == event


def test_other_dialects_hide_nothing() -> None:
    event = data(FINAL)[0]
    assert all(Meter(dialect, hide=True).events(event) == event for dialect in DIALECTS if dialect != "openai_chat")


def test_events_are_counted() -> None:
    for style in LINE_ENDS.values():
        events = [style(event) for event in data(ROLE, *[word(b"a", NULL)] * 20, FINAL, DONE)]
        one, whole = Meter("openai_chat"), Meter("openai_chat")
        for event in events:
            one.events(event)
        whole.events(b"".join(events))
        assert one.event_count == 23
        assert whole.event_count == 23 or style is LINE_ENDS["mixed"]  # of which it is an estimate


BAD = [b"\xff\xfe\xfd\n\n", b"data: {\n\n", b"data: [1]\n\n", b'data: "usage"\n\n', b"data\n\n", b"data:\n\n",
       b'data: {"usage":{"prompt_tokens":\n\n', b"usage\n\n", b'data: {"usage":[],"choices":5,"type":{},"error":0}\n\n',
       b'data: {"candidates":[5],"promptFeedback":5,"usageMetadata":7,"response":4}\n\n', b"\n", b"\r", b"", b"x",
       b'data: {"message":{"usage":3},"type":"message_start"}\n\n', b'data: {"type":["usage"],"a":"usage"}\n\n',
       b"data: %b\n\n" % (b'{"usage":' * 5000)]  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:40]))
def test_what_is_broken_passes_and_tells_nothing(dialect: DialectName, bad: bytes) -> None:
    meter = Meter(dialect, hide=True)
    assert meter.events(bad) == bad
    assert meter.usage is None
    assert not meter.complete


@law(300)
@given(st.lists(JSON, max_size=4), st.sampled_from(DIALECTS), st.booleans())
def test_whatever_an_event_holds_the_meter_does_not_break(
    values: list[object], dialect: DialectName, hide: bool
) -> None:
    text = b"".join(b"data: %b\n\n" % orjson.dumps(value) for value in values)
    meter = Meter(dialect, hide)
    shown = meter.events(text)
    assert hide or shown == text
    usage = meter.usage
    assert usage is None or 0 <= (usage.output_tokens or 0) <= MAX_COUNT
    assert meter.complete in (True, False)


@pytest.mark.parametrize(("dialect", "value", "usage"), REPLIES.values(), ids=list(REPLIES))
def test_a_whole_reply_and_one_in_pieces_tell_what_the_vendor_tells(
    dialect: DialectName, value: object, usage: Usage | None
) -> None:
    body = orjson.dumps(value)
    whole, piecemeal = Meter(dialect), Meter(dialect)
    whole.whole(body)
    for piece in byte_by_byte(body):
        piecemeal.feed(piece)
    piecemeal.finish()
    if "response" not in value:  # an event's shape is not a reply's, but does no harm
        assert state(whole) == state(piecemeal) == Stream(dialect, (), usage)


@law(300)
@given(JSON, st.sampled_from(DIALECTS), CUTS)
def test_in_any_pieces_a_reply_tells_the_same(value: object, dialect: DialectName, cuts: list[int]) -> None:
    body = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    meter = Meter(dialect)
    for piece in at_cuts(body, cuts):
        meter.feed(piece)
    meter.finish()
    assert meter.usage == from_value(dialect, orjson.loads(body))


def test_a_long_reply_is_not_parsed_and_tells_the_same() -> None:
    text = b"word " * (WHOLE // 5)
    body = b'{"choices":[{"message":{"content":"%b"}}],"usage":%b,"service_tier":"flex"}' % (text, usage_of(5, 70))
    meter = Meter("openai_chat")
    meter.whole(body)
    assert state(meter) == Stream("openai_chat", (), Usage(5, 70, service_tier="flex"))


def test_a_long_reply_in_pieces_takes_no_memory() -> None:
    meter = Meter("openai_chat")
    meter.feed(b'{"data":[{"b64_json":"')
    tracemalloc.start()
    try:
        for _ in range(300):
            meter.feed(b"A" * 65536)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    meter.feed(b'"}],"usage":{"input_tokens":5,"output_tokens":4160}}')
    meter.finish()
    assert meter.usage == Usage(5, 4160)
    assert meter.complete
    assert peak < 2**20


ERRORS = [b'{"error":{"message":"x"}}', b'{"type":"error","error":{"type":"api_error"}}', b'[{"error":{"code":503}}]',
          b'{"error":"nope"}', b'{"object":"error","message":"x"}']  # fmt: skip


@pytest.mark.parametrize("body", ERRORS)
def test_an_error_in_place_of_an_answer(body: bytes) -> None:
    for dialect in DIALECTS:
        whole, piecemeal = Meter(dialect), Meter(dialect)
        whole.whole(body)
        piecemeal.feed(body)
        piecemeal.finish()
        for meter in (whole, piecemeal):
            assert (meter.errored, meter.seen_content, meter.usage) == (True, False, None)


@pytest.mark.parametrize("body", [b"", b"hello", b"<html>", b'{"usage":{"prompt_tokens":5', b"\xff", b"null", b"7"])
def test_what_is_no_reply_tells_nothing(body: bytes) -> None:
    whole, piecemeal = Meter("openai_chat"), Meter("openai_chat")
    whole.whole(body)
    piecemeal.feed(body)
    piecemeal.finish()
    assert (whole.usage, whole.complete, whole.errored) == (None, False, False)
    assert (piecemeal.usage, piecemeal.complete, piecemeal.errored) == (None, False, False)


def test_a_reply_cut_behind_its_usage_is_not_complete() -> None:
    meter = Meter("openai_chat")
    meter.feed(b'{"usage":{"prompt_tokens":5},"choices":[{"mess')
    meter.finish()
    assert (meter.usage, meter.complete) == (Usage(5), False)


def test_an_event_that_tells_nothing_costs_next_to_nothing() -> None:
    event, telling = data(word(b"Hello" * 40))[0], data(word(b"Hello" * 40, b',"usage":{"prompt_tokens":1}'))[0]

    def seconds(block: bytes) -> float:
        meter = Meter("openai_chat")
        meter.events(event)
        began = time.process_time()
        for _ in range(20_000):
            meter.events(block)
        return time.process_time() - began

    assert min(seconds(event) for _ in range(3)) * 4 < min(seconds(telling) for _ in range(3))
