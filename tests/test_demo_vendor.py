"""The embedded vendor against the vendors' own SDKs, and its control headers against bare sockets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import io
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import anthropic
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors
from google.genai import types as genai_types

from gproxyd.host.demo import DemoVendor, Seen
from gproxyd.host.demo.form import FormReader
from gproxyd.host.demo.script import example

KEY = "sk-demo-0123456789abcd"
HELLO = "Say hello in one short sentence."
HELLO_ANSWER = "Hello there, nice to meet you!"
WEATHER = "What is the weather in Paris?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
ARGUMENTS = {"city": "Paris", "days": 1}


@contextmanager
def running(**options: object) -> Iterator[tuple[DemoVendor, str]]:
    """A vendor on a loop of its own thread, and its base URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    vendor = DemoVendor(**options)  # type: ignore[arg-type]
    try:
        yield vendor, asyncio.run_coroutine_threadsafe(vendor.start(), loop).result(5)
    finally:
        asyncio.run_coroutine_threadsafe(vendor.stop(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[DemoVendor, str]]:
    with running(remember=1000) as vendor_and_base:
        yield vendor_and_base


@pytest.fixture(scope="module")
def base(served: tuple[DemoVendor, str]) -> str:
    return served[1]


@pytest.fixture
def seen(served: tuple[DemoVendor, str]) -> deque[Seen]:
    """The live record, with the requests of this test alone."""
    served[0].seen.clear()
    return served[0].seen


@pytest.fixture(scope="module")
def oai(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(base: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=base, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def gemini(base: str) -> Iterator[genai.Client]:
    client = genai.Client(api_key=KEY, http_options=genai_types.HttpOptions(base_url=base))
    yield client
    client.close()


def eventually(true: Callable[[], bool], within: float = 2.0) -> bool:
    deadline = time.monotonic() + within
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def fetch(
    base: str, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of one request."""
    host = base.removeprefix("http://")
    with closing(http.client.HTTPConnection(host, timeout=5)) as connection:
        sent = {"content-type": "application/json", **(headers or {})}
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        with connection.getresponse() as response:
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def raw(base: str, path: str, body: object, *headers: str) -> tuple[bytes, bytes, str]:
    """Head and body as they come from the socket, and how it ended: "eof" or "reset"."""
    host, port = base.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {len(data)}"]
    head = "\r\n".join([*lines, "Content-Type: application/json", *headers, "", ""]).encode()
    received, end = bytearray(), "eof"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head + data)
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except ConnectionResetError:
            end = "reset"
    told, _, rest = bytes(received).partition(b"\r\n\r\n")
    return told, rest, end


def chunks(body: bytes) -> list[bytes]:
    """The chunks of a chunked body; the last is empty if the body was ended properly."""
    found = []
    while body:
        size, _, body = body.partition(b"\r\n")
        found.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return found


def chat_body(content: str = HELLO, **more: object) -> dict[str, object]:
    return {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": content}], **more}


def claude_body(**more: object) -> dict[str, object]:
    return chat_body(**more) | {"model": "claude-sonnet-5", "max_tokens": 100}


CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
GENERATE, STREAM = (
    "/v1beta/models/gemini-2.5-flash:generateContent",
    "/v1beta/models/gemini-2.5-flash:streamGenerateContent",
)
GEMINI_BODY = {"contents": [{"parts": [{"text": HELLO}]}]}
VERSION = {"anthropic-version": "2023-06-01"}

STREAMS = [
    pytest.param(CHAT, chat_body(stream=True), id="chat"),
    pytest.param("/v1/completions", {"model": "m", "prompt": HELLO, "stream": True}, id="completions"),
    pytest.param(RESPONSES, {"model": "m", "input": HELLO, "stream": True}, id="responses"),
    pytest.param(MESSAGES, claude_body(stream=True), id="messages"),
    pytest.param(f"{STREAM}?alt=sse", GEMINI_BODY, id="gemini"),
    pytest.param(STREAM, GEMINI_BODY, id="gemini-array"),
]


class TestOpenAIChat:
    def test_text(self, oai: openai.OpenAI) -> None:
        told = oai.chat.completions.create(model="gpt-4.1-mini", messages=[{"role": "user", "content": HELLO}], n=2)
        assert [choice.message.content for choice in told.choices] == [HELLO_ANSWER] * 2
        assert told.model == "gpt-4.1-mini" and told.choices[0].finish_reason == "stop"
        assert told.usage is not None and told.usage.prompt_tokens_details is not None
        assert told.usage.prompt_tokens == 8 and told.usage.prompt_tokens_details.cached_tokens == 2

    def test_stream(self, oai: openai.OpenAI) -> None:
        asked = {"model": "demo-reasoner", "messages": [{"role": "user", "content": "Good morning"}]}
        with oai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            told = list(stream)
        deltas = [chunk.choices[0].delta for chunk in told if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == "Hello! You said: Good morning"
        assert sum(bool(getattr(delta, "reasoning_content", None)) for delta in deltas) == 3
        assert {chunk.model for chunk in told} == {"demo-reasoner"}
        assert not told[-1].choices and told[-1].usage is not None
        assert told[-1].usage.completion_tokens_details.reasoning_tokens == 18
        assert told[-2].choices[0].finish_reason == "stop"

    @pytest.mark.parametrize("calls", [1, 2])
    def test_tool_calls(self, oai: openai.OpenAI, calls: int) -> None:
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
        asked = {"role": "user", "content": WEATHER + (" Ask both." if calls == 2 else "")}
        told = oai.chat.completions.create(model="m", messages=[asked], tools=tools)
        found = told.choices[0].message.tool_calls
        assert told.choices[0].finish_reason == "tool_calls" and len(found) == calls
        assert json.loads(found[0].function.arguments) == ARGUMENTS

        with oai.chat.completions.stream(model="m", messages=[asked], tools=tools) as stream:
            streamed = stream.get_final_completion().choices[0].message.tool_calls
        assert [call.function.arguments for call in streamed] == [call.function.arguments for call in found]
        assert len({call.id for call in streamed}) == calls

        result = {"role": "tool", "tool_call_id": found[0].id, "content": "sunny"}
        later = oai.chat.completions.create(model="m", messages=[asked, told.choices[0].message, result], tools=tools)
        assert later.choices[0].message.content == "The tool answered: sunny"

    @pytest.mark.parametrize(
        ("choice", "finish"),
        [
            ("auto", "stop"),
            ("none", "stop"),
            ("required", "tool_calls"),
            ({"type": "function", "function": {"name": "clock"}}, "tool_calls"),
        ],
    )
    def test_tool_choice(self, oai: openai.OpenAI, choice: object, finish: str) -> None:
        tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("first", "clock")]
        told = oai.chat.completions.create(**chat_body(), tools=tools, tool_choice=choice)
        assert told.choices[0].finish_reason == finish
        if isinstance(choice, dict):
            assert told.choices[0].message.tool_calls[0].function.name == "clock"

    def test_limit_and_structured_output(self, oai: openai.OpenAI) -> None:
        cut = oai.chat.completions.create(**chat_body("a long story"), max_completion_tokens=2)
        assert cut.choices[0].message.content == "Hello! Y" and cut.choices[0].finish_reason == "length"
        shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
        told = oai.chat.completions.create(**chat_body(), response_format=shape)
        assert json.loads(told.choices[0].message.content) == ARGUMENTS

    def test_completions(self, oai: openai.OpenAI) -> None:
        told = oai.completions.create(model="m", prompt=["ping", "x"])
        assert [choice.text for choice in told.choices] == ["pong", "Hello! You said: x"]
        with oai.completions.create(model="m", prompt=HELLO, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == HELLO_ANSWER


class TestOpenAIResponses:
    def test_life(self, oai: openai.OpenAI) -> None:
        told = oai.responses.create(model="m", input=HELLO, metadata={"a": "b"})
        assert told.output_text == HELLO_ANSWER and told.status == "completed" and told.metadata == {"a": "b"}
        assert oai.responses.retrieve(told.id) == told
        (item,) = oai.responses.input_items.list(told.id).data
        assert item.content[0].text == HELLO
        assert (
            oai.responses.create(model="m", input="more", previous_response_id=told.id).previous_response_id == told.id
        )
        assert oai.responses.cancel(told.id).status == "cancelled"
        oai.responses.delete(told.id)
        with pytest.raises(openai.NotFoundError):
            oai.responses.retrieve(told.id)

    def test_stream(self, oai: openai.OpenAI) -> None:
        with oai.responses.stream(model="demo-reasoner", input=HELLO) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
        assert [kind for kind in dict.fromkeys(kinds) if "output_text" in kind or "content_part" in kind] == [
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
        ]
        assert kinds[-1] == "response.completed" and final.output_text == HELLO_ANSWER
        assert final.output[0].type == "reasoning" and final.usage.output_tokens_details.reasoning_tokens == 18

    def test_function_calls(self, oai: openai.OpenAI) -> None:
        tools = [{"type": "function", "name": "get_weather", "parameters": SCHEMA}]
        with oai.responses.create(model="m", input=WEATHER, tools=tools, stream=True) as stream:
            events = list(stream)
        pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert len(pieces) > 1 and json.loads("".join(pieces)) == ARGUMENTS
        (call,) = events[-1].response.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        asked = [{"role": "user", "content": WEATHER}, call.model_dump(exclude_none=True), result]
        assert oai.responses.create(model="m", input=asked, tools=tools).output_text == "The tool answered: sunny"

    def test_counts_and_compaction(self, oai: openai.OpenAI) -> None:
        assert oai.responses.input_tokens.count(model="m", input=HELLO).input_tokens == 8
        assert [item.type for item in oai.responses.compact(model="m", input=HELLO).output] == ["message", "compaction"]


class TestOpenAIRest:
    @pytest.mark.parametrize("asked", [{}, {"encoding_format": "float"}])
    def test_embeddings(self, oai: openai.OpenAI, asked: dict[str, str]) -> None:
        told = oai.embeddings.create(model="m", input=["a", "b", "a"], dimensions=8, **asked)
        vectors = [each.embedding for each in told.data]
        assert vectors[0] == vectors[2] != vectors[1] and len(vectors[0]) == 8
        assert (
            vectors[0]
            == oai.embeddings.create(model="m", input="a", dimensions=8, encoding_format="float").data[0].embedding
        )

    def test_moderations(self, oai: openai.OpenAI) -> None:
        told = oai.moderations.create(input=["peace", "attack!"])
        assert [each.flagged for each in told.results] == [False, True] and told.results[1].categories.violence

    def test_rerank(self, base: str) -> None:
        asked = {"model": "m", "query": "red fox", "documents": ["a dog", "a red fox", "red"], "top_n": 2}
        status, _, body = fetch(base, "POST", "/v1/rerank", asked)
        assert status == 200 and [each["index"] for each in json.loads(body)["results"]] == [1, 2]

    def test_images(self, oai: openai.OpenAI) -> None:
        picture = oai.images.generate(model="gpt-image-1", prompt="a pixel").data[0].b64_json
        assert base64.b64decode(picture).startswith(b"\x89PNG")
        edited = oai.images.edit(model="gpt-image-1", image=("p.png", b"abc", "image/png"), prompt="brighter")
        assert hashlib.sha256(b"abc").hexdigest() in edited.data[0].revised_prompt

    # OpenAI's SDK calls its translations endpoint deprecated; gateways must still carry it.
    @pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
    def test_audio(self, oai: openai.OpenAI) -> None:
        sound = bytes(range(256)) * 40
        for api in (oai.audio.transcriptions, oai.audio.translations):
            told = api.create(model="whisper-1", file=("a.wav", sound))
            assert told.text == f"{len(sound)} bytes, sha256 {hashlib.sha256(sound).hexdigest()}"
            assert told.model == "whisper-1"
        with oai.audio.transcriptions.create(model="whisper-1", file=("a.wav", sound), stream=True) as stream:
            assert [event.type for event in stream][-1] == "transcript.text.done"
        size = {"x-demo-size": "5000"}
        spoken = oai.audio.speech.create(model="tts", voice="alloy", input="hi", extra_headers=size)
        assert len(spoken.read()) == 5000

    @pytest.mark.parametrize("size", [0, 5, 300_000, 2_000_000])
    def test_files(self, oai: openai.OpenAI, size: int) -> None:
        content = (b"\r\n--x" * (size // 5 + 1))[:size]
        kept = oai.files.create(file=("näme.jsonl", io.BytesIO(content)), purpose="batch")
        assert (kept.bytes, kept.filename, kept.purpose) == (size, "näme.jsonl", "batch")
        assert kept.sha256 == hashlib.sha256(content).hexdigest()
        assert kept.id in [each.id for each in oai.files.list(purpose="batch")]
        assert oai.files.retrieve(kept.id) == kept
        if size <= 1 << 20:
            assert oai.files.content(kept.id).read() == content
        assert oai.files.delete(kept.id).deleted
        with pytest.raises(openai.NotFoundError):
            oai.files.content(kept.id)

    def test_batches(self, oai: openai.OpenAI) -> None:
        made = oai.batches.create(input_file_id="file-1", endpoint=CHAT, completion_window="24h")
        assert oai.batches.retrieve(made.id) == made and made.id in [each.id for each in oai.batches.list()]
        assert oai.batches.cancel(made.id).status == "cancelling"

    def test_models(self, oai: openai.OpenAI) -> None:
        assert "gpt-4.1-mini" in [model.id for model in oai.models.list()]
        assert oai.models.retrieve("gpt-4.1-mini").owned_by == "system"
        with pytest.raises(openai.NotFoundError):
            oai.models.retrieve("nobody/knows")


class TestAnthropic:
    ASKED = {"model": "claude-sonnet-5", "max_tokens": 100}

    def test_text(self, claude: anthropic.Anthropic) -> None:
        told = claude.messages.create(**self.ASKED, messages=[{"role": "user", "content": HELLO}])
        assert told.content[0].text == HELLO_ANSWER and told.stop_reason == "end_turn"
        spent = told.usage
        assert (spent.input_tokens, spent.cache_creation_input_tokens, spent.cache_read_input_tokens) == (5, 1, 2)
        counted = claude.messages.count_tokens(model="claude-sonnet-5", messages=[{"role": "user", "content": HELLO}])
        assert counted.input_tokens == 8

    @pytest.mark.parametrize("thinking", [{"type": "enabled", "budget_tokens": 2000}, {"type": "adaptive"}])
    def test_thinking_stream(self, claude: anthropic.Anthropic, thinking: dict[str, object]) -> None:
        asked = [{"role": "user", "content": [{"type": "text", "text": "Good morning"}]}]
        with claude.messages.stream(**self.ASKED, messages=asked, thinking=thinking) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        assert final.content[0].signature and final.content[1].text == "Hello! You said: Good morning"
        assert final.usage.output_tokens == 18 + 8

    def test_order_of_events(self, base: str) -> None:
        _, _, body = fetch(base, "POST", MESSAGES, claude_body(stream=True), VERSION)
        names = [line.removeprefix("event: ") for line in body.decode().splitlines() if line.startswith("event")]
        delta = ["content_block_delta"] * 6
        assert names == [
            *("message_start", "ping", "content_block_start"),
            *delta,
            *("content_block_stop", "message_delta", "message_stop"),
        ]

    def test_tools(self, claude: anthropic.Anthropic) -> None:
        tools = [{"name": "get_weather", "input_schema": SCHEMA}]
        asked = {"role": "user", "content": WEATHER}
        with claude.messages.stream(**self.ASKED, messages=[asked], tools=tools) as stream:
            told = stream.get_final_message()
        (block,) = told.content
        assert told.stop_reason == "tool_use" and block.name == "get_weather" and block.input == ARGUMENTS
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]}
        turns = [asked, {"role": "assistant", "content": told.content}, result]
        later = claude.messages.create(**self.ASKED, messages=turns, tools=tools)
        assert later.content[0].text == "The tool answered: sunny"
        forced = {"type": "tool", "name": "get_weather"}
        again = claude.messages.create(**self.ASKED, messages=turns, tools=tools, tool_choice=forced)
        assert again.stop_reason == "tool_use"

    def test_models(self, claude: anthropic.Anthropic) -> None:
        assert "claude-sonnet-5" in [model.id for model in claude.models.list()]
        assert claude.models.retrieve("claude-sonnet-5").display_name == "Claude Sonnet 5"


class TestGemini:
    def test_text(self, gemini: genai.Client) -> None:
        told = gemini.models.generate_content(model="gemini-2.5-flash", contents=HELLO)
        assert told.text == HELLO_ANSWER and told.model_version == "gemini-2.5-flash"
        assert told.usage_metadata.prompt_token_count == 8 and told.usage_metadata.cached_content_token_count == 2
        assert gemini.models.count_tokens(model="gemini-2.5-flash", contents=HELLO).total_tokens == 8

    def test_stream_with_thoughts(self, gemini: genai.Client) -> None:
        config = genai_types.GenerateContentConfig(thinking_config=genai_types.ThinkingConfig(include_thoughts=True))
        stream = gemini.models.generate_content_stream(model="gemini-2.5-pro", contents="Good morning", config=config)
        told = list(stream)
        parts = [chunk.candidates[0].content.parts[0] for chunk in told]
        assert "".join(part.text for part in parts if not part.thought) == "Hello! You said: Good morning"
        assert sum(bool(part.thought) for part in parts) == 3 and any(part.thought_signature for part in parts)
        assert told[-1].candidates[0].finish_reason == "STOP" and told[-1].usage_metadata.thoughts_token_count == 18

    def test_tools(self, gemini: genai.Client) -> None:
        declared = genai_types.FunctionDeclaration(name="get_weather", parameters_json_schema=SCHEMA)
        config = genai_types.GenerateContentConfig(tools=[genai_types.Tool(function_declarations=[declared])])
        told = gemini.models.generate_content(model="gemini-2.5-flash", contents=WEATHER, config=config)
        (call,) = told.function_calls
        assert call.name == "get_weather" and call.args == ARGUMENTS
        answer = genai_types.Part.from_function_response(name="get_weather", response={"sky": "blue"})
        turns = [
            genai_types.Content(role="user", parts=[genai_types.Part(text=WEATHER)]),
            told.candidates[0].content,
            genai_types.Content(role="user", parts=[answer]),
        ]
        later = gemini.models.generate_content(model="gemini-2.5-flash", contents=turns, config=config)
        assert later.text == 'The tool answered: {"sky":"blue"}'

    def test_embeddings_and_models(self, gemini: genai.Client) -> None:
        told = gemini.models.embed_content(model="gemini-embedding-001", contents=["a", "b"])
        assert [len(each.values) for each in told.embeddings] == [256, 256]
        assert "models/gemini-1.5-flash" in [model.name for model in gemini.models.list()]
        assert gemini.models.get(model="gemini-1.5-flash").input_token_limit == 1_048_576

    def test_array(self, base: str) -> None:
        status, headers, body = fetch(base, "POST", STREAM, GEMINI_BODY)
        assert status == 200 and headers["content-type"].startswith("application/json")
        texts = [each["candidates"][0]["content"]["parts"][0]["text"] for each in json.loads(body)]
        assert "".join(texts) == HELLO_ANSWER and b"},\r\n{" in body.replace(b"\n}", b"}")


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, openai.BadRequestError),
            (401, openai.AuthenticationError),
            (403, openai.PermissionDeniedError),
            (404, openai.NotFoundError),
            (413, openai.APIStatusError),
            (429, openai.RateLimitError),
            (503, openai.InternalServerError),
        ],
    )
    def test_openai(self, oai: openai.OpenAI, status: int, kind: type[openai.APIStatusError]) -> None:
        with pytest.raises(kind) as caught:
            oai.chat.completions.create(**chat_body(), extra_headers={"x-demo-status": str(status)})
        assert caught.value.status_code == status and caught.value.request_id.startswith("req_demo_")
        assert (caught.value.response.headers.get("retry-after") == "7") == (status == 429)
        if status == 401:
            assert "Incorrect API key provided: sk-********abcd" in caught.value.message

    @pytest.mark.parametrize(
        ("status", "kind"), [(401, "authentication_error"), (429, "rate_limit_error"), (529, "overloaded_error")]
    )
    def test_anthropic(self, claude: anthropic.Anthropic, status: int, kind: str) -> None:
        with pytest.raises(anthropic.APIStatusError) as caught:
            claude.messages.create(
                model="m",
                max_tokens=5,
                messages=[{"role": "user", "content": "x"}],
                extra_headers={"x-demo-status": str(status)},
            )
        assert (caught.value.status_code, caught.value.type) == (status, kind) and caught.value.request_id

    @pytest.mark.parametrize(("status", "kind"), [(400, "INVALID_ARGUMENT"), (429, "RESOURCE_EXHAUSTED")])
    def test_gemini(self, gemini: genai.Client, status: int, kind: str) -> None:
        options = genai_types.HttpOptions(headers={"x-demo-status": str(status)})
        config = genai_types.GenerateContentConfig(http_options=options)
        with pytest.raises(genai_errors.ClientError) as caught:
            gemini.models.generate_content(model="gemini-2.5-pro", contents="x", config=config)
        assert (caught.value.code, caught.value.status) == (status, kind)

    def test_unknown_model(self, oai: openai.OpenAI, claude: anthropic.Anthropic, gemini: genai.Client) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            oai.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
        assert caught.value.code == "model_not_found"
        for call in (
            lambda: oai.embeddings.create(model="nope", input="x"),
            lambda: oai.audio.transcriptions.create(model="nope", file=("a.wav", b"x")),
            lambda: oai.responses.create(model="nope", input="x"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(model="nope", max_tokens=5, messages=[{"role": "user", "content": "x"}])
        with pytest.raises(genai_errors.ClientError, match="NOT_FOUND"):
            gemini.models.generate_content(model="nope", contents="x")

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            (CHAT, {"model": "m", "messages": []}, 400),
            (CHAT, {"messages": [{"role": "user", "content": "x"}]}, 400),
            (CHAT, {"model": "m", "messages": ["x"]}, 400),
            (CHAT, [], 400),
            (RESPONSES, {"model": "m"}, 400),
            (MESSAGES, {"model": "m", "max_tokens": 5}, 400),
            (MESSAGES, {"model": "m", "messages": [{"role": "user", "content": "x"}]}, 400),
            (GENERATE, {"contents": []}, 400),
            ("/v1/nothing", {}, 404),
            ("/v1beta/nothing", {}, 404),
            ("/v1/models", {}, 405),
        ],
    )
    def test_shapes(self, base: str, path: str, body: object, status: int) -> None:
        told, _, answer = fetch(base, "POST", path, body, VERSION if path == MESSAGES else {})
        error = json.loads(answer)["error"]
        assert told == status and error["message"]
        assert ("status" in error) == path.startswith("/v1beta")

    def test_keys(self) -> None:
        with running(keys=[KEY]) as (_, base):
            places: list[dict[str, str]] = [
                {"authorization": f"Bearer {KEY}"},
                {"x-api-key": KEY},
                {"x-goog-api-key": KEY},
                {"api-key": KEY},
            ]
            assert [fetch(base, "GET", "/v1/models", headers=place)[0] for place in places] == [200] * 4
            assert fetch(base, "GET", f"/v1/models?key={KEY}")[0] == 200
            refused: list[dict[str, str]] = [{}, {"x-api-key": "wrong-key"}, {**places[0], "x-api-key": "another"}]
            assert [fetch(base, "GET", "/v1/models", headers=place)[0] for place in refused] == [401] * 3
            status, _, body = fetch(base, "POST", MESSAGES, {}, VERSION)
            assert status == 401 and json.loads(body)["error"]["type"] == "authentication_error"


class TestControls:
    @pytest.mark.parametrize(("path", "body"), STREAMS)
    def test_events_and_size(self, base: str, path: str, body: object) -> None:
        _, _, usual = fetch(base, "POST", path, body, VERSION)
        _, _, more = fetch(base, "POST", path, body, VERSION | {"x-demo-events": "150"})
        _, _, large = fetch(base, "POST", path, body, VERSION | {"x-demo-size": "9000"})
        mark = b'"delta":' if b'"delta":' in usual else b'"text":'
        assert more.count(mark) >= 150 > usual.count(mark) and len(large) > 9000
        assert fetch(base, "POST", path, body, VERSION)[2] == usual, "the same request, other bytes"

    @pytest.mark.parametrize(("path", "body"), STREAMS)
    @pytest.mark.parametrize("size", [1, 7, 4096])
    def test_chunk(self, base: str, path: str, body: object, size: int) -> None:
        whole = fetch(base, "POST", path, body, VERSION)[2]
        _, rest, _ = raw(base, path, body, f"x-demo-chunk: {size}", "anthropic-version: x")
        found = chunks(rest)
        assert b"".join(found) == whole and found[-1] == b""
        assert {len(chunk) for chunk in found[:-2]} <= {size} and 0 < len(found[-2]) <= size

    @pytest.mark.parametrize(("path", "body"), STREAMS)
    def test_known_length(self, base: str, path: str, body: object) -> None:
        _, usual, whole = fetch(base, "POST", path, body, VERSION)
        _, headers, again = fetch(base, "POST", path, body, VERSION | {"x-demo-length": "known"})
        assert usual["transfer-encoding"] == "chunked" and "content-length" not in usual
        assert headers["content-length"] == str(len(whole)) and again == whole

    def test_plain_bodies(self, base: str) -> None:
        _, headers, whole = fetch(base, "POST", CHAT, chat_body())
        assert headers["content-length"] == str(len(whole)) and "set-cookie" not in headers
        head, rest, _ = raw(base, CHAT, chat_body(), "x-demo-chunk: 10")
        assert b"chunked" in head and b"".join(chunks(rest)) == whole and len(chunks(rest)[0]) == 10
        head, rest, _ = raw(base, CHAT, chat_body(), "x-demo-chunk: 10", "x-demo-length: known")
        assert b"chunked" not in head and rest == whole

    @pytest.mark.parametrize(("eol", "mark"), [("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r")])
    def test_line_ends(self, oai: openai.OpenAI, base: str, eol: str, mark: str) -> None:
        asked = {"x-demo-eol": eol}
        body = fetch(base, "POST", CHAT, chat_body(stream=True), asked)[2].decode()
        assert body.endswith(f"data: [DONE]{mark}{mark}")
        with oai.chat.completions.create(**chat_body(), stream=True, extra_headers=asked) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == HELLO_ANSWER

    @pytest.mark.parametrize(("path", "body"), STREAMS)
    @pytest.mark.parametrize(("how", "end"), [("close", "eof"), ("reset", "reset")])
    def test_break_off(self, base: str, seen: deque[Seen], path: str, body: object, how: str, end: str) -> None:
        whole = fetch(base, "POST", path, body, VERSION)[2]
        _, rest, ended = raw(base, path, body, f"x-demo-fail: {how}", "x-demo-fail-after: 3", "anthropic-version: x")
        found = chunks(rest)
        assert ended == end and len(found) == 3 and whole.startswith(b"".join(found))
        assert not seen[-1].finished and not seen[-1].client_gone

    def test_break_off_plain(self, base: str) -> None:
        head, rest, end = raw(base, CHAT, chat_body(), "x-demo-fail-after: 20")
        assert b"Content-Length" in head and len(rest) == 20 and end == "eof"
        assert raw(base, CHAT, chat_body(), "x-demo-fail: close")[1:] == (b"", "eof")
        assert raw(base, CHAT, chat_body(), "x-demo-fail-after: head") == (b"", b"", "eof")

    @pytest.mark.parametrize(
        ("path", "body", "mark"),
        [
            (CHAT, chat_body(stream=True), b'data: {"error":'),
            (RESPONSES, {"model": "m", "input": HELLO, "stream": True}, b"event: error"),
            (MESSAGES, claude_body(stream=True), b"event: error"),
            (f"{STREAM}?alt=sse", GEMINI_BODY, b'data: {"error":'),
            (STREAM, GEMINI_BODY, b'"UNAVAILABLE"'),
        ],
    )
    def test_error_event(self, base: str, path: str, body: object, mark: bytes) -> None:
        asked = VERSION | {"x-demo-fail": "error", "x-demo-fail-after": "2"}
        told = fetch(base, "POST", path, body, asked)[2]
        assert mark in told and b"[DONE]" not in told and b"message_stop" not in told
        if path == STREAM:
            assert "error" in json.loads(told)[-1]

    def test_errors_reach_the_sdks(self, oai: openai.OpenAI, claude: anthropic.Anthropic) -> None:
        broken = {"x-demo-fail": "error", "x-demo-fail-after": "3"}
        with (
            oai.chat.completions.create(**chat_body(), stream=True, extra_headers=broken) as stream,
            pytest.raises(openai.APIError, match="The server had an error"),
        ):
            list(stream)
        with (
            claude.messages.stream(**claude_body(), extra_headers=broken) as messages,
            pytest.raises(anthropic.APIStatusError, match="Overloaded"),
        ):
            messages.get_final_message()

    def test_delays(self, base: str) -> None:
        started = time.monotonic()
        fetch(base, "POST", CHAT, chat_body(), {"x-demo-delay": "120"})
        assert time.monotonic() - started >= 0.12
        started = time.monotonic()
        fetch(base, "POST", CHAT, chat_body(stream=True), {"x-demo-event-delay": "10", "x-demo-events": "10"})
        assert time.monotonic() - started >= 0.1

    @pytest.mark.parametrize("header", ["x-demo-nonsense: 1", "x-demo-chunk: 0", "x-demo-fail: softly"])
    def test_unreadable(self, base: str, header: str) -> None:
        head, body, _ = raw(base, CHAT, chat_body(), header)
        assert head.startswith(b"HTTP/1.1 400 ") and header.split(":")[0].encode() in body


class TestRecord:
    def test_what_is_seen(self, base: str, seen: deque[Seen]) -> None:
        _, _, body = fetch(base, "PATCH", "/v1/echo?a=%2F&b=+", {"x": "y"}, {"X-Odd-Case": "1"})
        assert eventually(lambda: seen[-1].finished)
        last = seen[-1]
        assert (last.method, last.target, last.body) == ("PATCH", b"/v1/echo?a=%2F&b=+", b'{"x": "y"}')
        assert (b"X-Odd-Case", b"1") in last.headers and last.header("x-odd-case") == ["1"]
        told = json.loads(body)
        assert told["target"] == "/v1/echo?a=%2F&b=+" and ["X-Odd-Case", "1"] in told["headers"]
        assert told["body_sha256"] == last.body_sha256 == hashlib.sha256(last.body).hexdigest()

    def test_large_bodies_are_not_kept(self, base: str, seen: deque[Seen]) -> None:
        status, _, _ = fetch(base, "POST", CHAT, chat_body("x" * 1_500_000))
        assert status == 200 and seen[-1].body == b"" and seen[-1].body_bytes > 1_500_000

    @pytest.mark.parametrize(
        "header", ["x-demo-fail: stall", "x-demo-delay: 5000", "x-demo-event-delay: 3000", "x-demo-size: 20000000"]
    )
    def test_client_gone(self, base: str, seen: deque[Seen], header: str) -> None:
        host, port = base.removeprefix("http://").split(":")
        body = json.dumps(chat_body(stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{header}\r\n\r\n".encode()
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(head + body)
            assert eventually(lambda: bool(seen and seen[-1].body_sha256))
            time.sleep(0.05)
            assert not seen[-1].client_gone
        left = time.monotonic()
        assert eventually(lambda: seen[-1].client_gone) and not seen[-1].finished
        assert time.monotonic() - left < 0.1

    def test_client_gone_in_its_upload(self, base: str, seen: deque[Seen]) -> None:
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            assert eventually(lambda: bool(seen and seen[-1].body_bytes))
        assert eventually(lambda: seen[-1].client_gone)

    def test_nothing_is_remembered_by_default(self) -> None:
        with running() as (vendor, base):
            fetch(base, "GET", "/v1/models")
            assert not vendor.seen

    def test_stopping_ends_a_stall(self) -> None:
        with (
            running(remember=1) as (vendor, base),
            closing(socket.create_connection(("127.0.0.1", int(base[17:])))) as sock,
        ):
            sock.sendall(b"GET /v1/echo HTTP/1.1\r\nHost: x\r\nx-demo-fail: stall\r\n\r\n")
            assert sock.recv(65536) and vendor.seen
        assert not vendor.seen[-1].finished


def test_agent(base: str) -> None:
    card = json.loads(fetch(base, "GET", "/.well-known/agent-card.json")[2])
    assert card["url"] == f"{base}/v1/a2a"
    message = {"kind": "message", "role": "user", "messageId": "1", "parts": [{"kind": "text", "text": "hi"}]}
    asked = {"jsonrpc": "2.0", "id": 7, "method": "message/send", "params": {"message": message}}
    told = json.loads(fetch(base, "POST", "/v1/a2a/helper", asked)[2])
    assert told["id"] == 7 and told["result"]["parts"][0]["text"] == "Echo: hi"
    _, headers, body = fetch(base, "POST", "/v1/a2a", asked | {"method": "message/stream"})
    assert headers["content-type"].startswith("text/event-stream") and body.count(b"data: ") == 2
    assert json.loads(fetch(base, "POST", "/v1/a2a", {})[2])["error"]["code"] == -32600


@pytest.mark.parametrize("step", [1, 2, 3, 10_000])
def test_form_is_read_alike_however_it_is_cut(step: int) -> None:
    value = b"\r\n--bound\r--boundar"
    parts = [
        b'Content-Disposition: form-data; name="empty"\r\n\r\n',
        b'Content-Disposition: form-data; name="file"; filename="f \xc3\xa9"\r\nContent-Type: a/b\r\n\r\n' + value,
    ]
    body = (
        b"preamble\r\n" + b"".join(b"--boundary\r\n" + part + b"\r\n" for part in parts) + b"--boundary--\r\ntrailing"
    )
    form = FormReader(b"boundary")
    for at in range(0, len(body), step):
        form.feed(body[at : at + step])
    assert form.complete
    assert [(part.name, part.filename, bytes(part.kept)) for part in form.parts] == [
        ("empty", None, b""),
        ("file", "f é", value),
    ]
    assert form.parts[1].sha256 == hashlib.sha256(value).hexdigest()


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "STRING"}, "demo"),
        ({"enum": ["a", "b"]}, "a"),
        ({"type": ["integer", "null"]}, 1),
        ({"anyOf": [{"type": "boolean"}]}, True),
        ({"type": "array", "items": {"type": "number"}}, [1.5]),
        ({"$defs": {"T": {"const": 3}}, "properties": {"t": {"$ref": "#/$defs/T"}}}, {"t": 3}),
    ],
)
def test_example_fits_its_schema(schema: dict[str, object], value: object) -> None:
    assert example(schema) == value
