"""OpenAI's own SDK through the gateway, in every form of address."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from gproxyd.host.demo import DemoVendor, Seen
from gproxyd.host.demo.script import THOUGHTS
from tests.support import sdk
from tests.support.running import CLIENT_KEY, PROVIDER_KEY, Running, until
from tests.support.sdk import Form

FORMS = sdk.forms("openai-main", {"gpt-4.1-mini": "chat-default", "whisper-1": "whisper"})
AGGREGATED, SCOPED = FORMS[0], FORMS[2]
MINI = "gpt-4.1-mini"
HELLO = [{"role": "user", "content": "Say hello in one short sentence."}]
HELLO_ANSWER = "Hello there, nice to meet you!"
WEATHER = {"role": "user", "content": "What is the weather in Paris?"}
BOTH = {"role": "user", "content": "The weather, please, of both."}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "model": {"type": "string"}}}
ARGUMENTS = {"city": "Paris", "model": "demo"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
FLAT_TOOLS = [{"type": "function", "name": "get_weather", "parameters": SCHEMA}]
SHAPE = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
CUT = {"x-demo-chunk": "3", "x-demo-eol": "crlf"}
SOUND = bytes(range(256)) * 40


@dataclass(frozen=True)
class Front:
    """A client of the gateway in one form of address, and one of the vendor itself."""

    form: Form
    oai: openai.OpenAI
    direct: openai.OpenAI

    def model(self, upstream: str = MINI) -> str:
        return self.form.model(upstream)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    yield from sdk.unset()


@pytest.fixture(scope="module")
def direct(vendor_at: tuple[DemoVendor, str]) -> Iterator[openai.OpenAI]:
    base = f"{vendor_at[1]}/v1"
    with openai.OpenAI(base_url=base, api_key=PROVIDER_KEY, default_headers=sdk.DIRECT, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def fronts(gateway: Running, direct: openai.OpenAI) -> Iterator[dict[str, Front]]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=CLIENT_KEY, max_retries=0) as client:
        yield {
            form.name: Front(form, client.with_options(base_url=f"{gateway.url}{form.path}/v1"), direct)
            for form in FORMS
        }


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def front(fronts: dict[str, Front], request: pytest.FixtureRequest) -> Front:
    """Every form, with aliases and without."""
    return fronts[request.param.name]


@pytest.fixture(params=[AGGREGATED, SCOPED], ids=lambda form: form.name)
def side(fronts: dict[str, Front], request: pytest.FixtureRequest) -> Front:
    """Both forms, for what no alias changes."""
    return fronts[request.param.name]


@pytest.fixture
def oai(fronts: dict[str, Front]) -> openai.OpenAI:
    return fronts["aggregated"].oai


@pytest.fixture(autouse=True)
def seen(vendor: DemoVendor) -> Iterator[list[Seen]]:
    yield from sdk.recorded(vendor, "authorization")


Call = Callable[..., Any]


def chat(oai: openai.OpenAI, **asked: Any) -> Any:
    options = {"stream_options": {"include_usage": True}} if asked.get("stream") else {}
    return oai.chat.completions.create(**asked, **options)


def completion(oai: openai.OpenAI, **asked: Any) -> Any:
    return oai.completions.create(**asked)


def response(oai: openai.OpenAI, **asked: Any) -> Any:
    return oai.responses.create(**asked)


SPEECH: list[tuple[str, Call, str, dict[str, Any]]] = [
    ("chat", chat, MINI, {"messages": HELLO, "n": 2}),
    ("chat-reasoning", chat, "demo-reasoner", {"messages": HELLO}),
    ("chat-tools", chat, MINI, {"messages": [BOTH], "tools": TOOLS}),
    ("chat-structured", chat, MINI, {"messages": HELLO, "response_format": SHAPE}),
    ("chat-cut", chat, MINI, {"messages": HELLO, "max_completion_tokens": 2}),
    ("completions", completion, MINI, {"prompt": ["ping", '{"model": "x"}']}),
    ("responses", response, MINI, {"input": "Good morning", "metadata": {"model": "mine"}}),
    ("responses-reasoning", response, "demo-reasoner", {"input": "Good morning"}),
    ("responses-tools", response, MINI, {"input": [BOTH], "tools": FLAT_TOOLS}),
    ("responses-cut", response, MINI, {"input": "a long story", "max_output_tokens": 2}),
]


class TestAlike:
    """What the SDK makes of the gateway's answers and of the vendor's own is the same, but for the model's name."""

    @pytest.mark.parametrize("manner", ["plain", "stream", "cut"])
    @pytest.mark.parametrize(
        ("call", "model", "asked"), [case[1:] for case in SPEECH], ids=[case[0] for case in SPEECH]
    )
    def test_speech(
        self, front: Front, seen: list[Seen], call: Call, model: str, asked: dict[str, Any], manner: str
    ) -> None:
        if manner != "plain":
            asked = asked | {"stream": True, "extra_headers": CUT if manner == "cut" else {}}
        told = [
            call(client, model=name, **asked)
            for client, name in ((front.oai, front.model(model)), (front.direct, model))
        ]
        if manner != "plain":
            told = [list(stream) for stream in told]
            assert len(told[0]) > 3
        sdk.assert_alike(*told, sent=front.model(model), upstream=model)
        assert sdk.parted(told[1])[0], "no reply bears a name"
        assert (seen[0].method, seen[0].target, seen[0].body) == (seen[1].method, seen[1].target, seen[1].body)

    @pytest.mark.parametrize(
        ("call", "model", "asked"),
        [
            (lambda oai, **a: oai.embeddings.create(**a), "text-embedding-3-small", {"input": ["a", "b"]}),
            (lambda oai, **a: oai.embeddings.create(**a), MINI, {"input": "a", "encoding_format": "float"}),
            (lambda oai, **a: oai.moderations.create(**a), "omni-moderation-latest", {"input": ["peace", "attack!"]}),
            (lambda oai, **a: oai.images.generate(**a), "gpt-image-1", {"prompt": "a pixel", "n": 2}),
            (lambda oai, **a: oai.responses.compact(**a), MINI, {"input": "Good morning"}),
            (lambda oai, **a: oai.responses.input_tokens.count(**a), MINI, {"input": "Good morning"}),
            (lambda oai, **a: oai.audio.speech.create(**a).read(), "gpt-4o-mini-tts", {"voice": "alloy", "input": "x"}),
        ],
        ids=["base64", "floats", "moderations", "images", "compact", "input-tokens", "speech"],
    )
    def test_the_rest(self, front: Front, seen: list[Seen], call: Call, model: str, asked: dict[str, Any]) -> None:
        told = call(front.oai, model=front.model(model), **asked)
        sdk.assert_alike(told, call(front.direct, model=model, **asked), sent=front.model(model), upstream=model)
        assert (seen[0].target, seen[0].body) == (seen[1].target, seen[1].body)


class TestChat:
    def test_text_and_usage(self, front: Front) -> None:
        told = front.oai.chat.completions.create(model=front.model(), messages=HELLO)
        assert (told.model, told.choices[0].message.content) == (front.model(), HELLO_ANSWER)
        assert told.usage is not None and told.usage.prompt_tokens_details is not None
        assert (told.usage.prompt_tokens, told.usage.completion_tokens, told.usage.total_tokens) == (8, 8, 16)
        assert told.usage.prompt_tokens_details.cached_tokens == 2

    def test_stream(self, front: Front) -> None:
        asked = {"model": front.model(), "messages": HELLO, "stream_options": {"include_usage": True}}
        with front.oai.chat.completions.create(**asked, stream=True) as stream:
            told = list(stream)
        assert {chunk.model for chunk in told} == {front.model()}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in told[:-1]) == HELLO_ANSWER
        assert told[-1].usage is not None and told[-1].usage.total_tokens == 16

    @pytest.mark.parametrize("stream", [False, True])
    def test_reasoning(self, front: Front, stream: bool) -> None:
        asked = {"model": front.model("demo-reasoner"), "messages": HELLO}
        if stream:
            with front.oai.chat.completions.create(**asked, stream=True) as chunks:
                deltas = [chunk.choices[0].delta for chunk in chunks]
            assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "".join(THOUGHTS)
        else:
            told = front.oai.chat.completions.create(**asked)
            assert told.choices[0].message.reasoning_content == "".join(THOUGHTS)  # type: ignore[attr-defined]
            assert told.usage.completion_tokens_details.reasoning_tokens == 18

    @pytest.mark.parametrize("stream", [False, True])
    def test_tool_loop(self, front: Front, stream: bool) -> None:
        asked = {"model": front.model(), "messages": [WEATHER], "tools": TOOLS}
        if stream:
            with front.oai.chat.completions.stream(**asked) as events:
                told = events.get_final_completion()
        else:
            told = front.oai.chat.completions.create(**asked)
        (call,) = told.choices[0].message.tool_calls
        assert told.model == front.model() and json.loads(call.function.arguments) == ARGUMENTS
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        turns = [WEATHER, told.choices[0].message.model_dump(include={"role", "content", "tool_calls"}), result]
        later = front.oai.chat.completions.create(model=front.model(), messages=turns, tools=TOOLS)
        assert later.choices[0].message.content == "The tool answered: sunny"

    def test_headers(self, side: Front, seen: list[Seen]) -> None:
        told = side.oai.chat.completions.with_raw_response.create(
            model=side.model(), messages=HELLO, extra_headers={"X-Mine": "1"}, extra_query={"a": "%2F b"}
        )
        headers = told.headers
        assert headers["x-gproxyd-provider"] == "openai-main" and headers["x-gproxyd-model"] == MINI
        assert headers["x-gproxyd-attempts"] == "1" and headers["server-timing"].startswith("gateway;dur=")
        assert headers["openai-processing-ms"] == "12" and headers["x-ratelimit-limit-requests"] == "10000"
        assert told.request_id.startswith("req_") and not told.request_id.startswith("req_demo_")
        assert headers["x-gproxyd-upstream-request-id"].startswith("req_demo_")
        assert "openai-organization" not in headers and "server" not in headers
        assert seen[0].target == b"/v1/chat/completions?a=%252F+b" and seen[0].header("x-mine") == ["1"]

    def test_large_answer(self, front: Front) -> None:
        large = {"x-demo-size": "600000"}
        told = front.oai.chat.completions.create(model=front.model(), messages=HELLO, extra_headers=large)
        assert told.model == front.model() and len(told.choices[0].message.content) == 600_000


class TestResponses:
    @pytest.mark.parametrize("pick", ["header", "query"])
    def test_life(self, front: Front, seen: list[Seen], pick: str) -> None:
        home: dict[str, Any] = {"extra_headers": front.form.home}
        if pick == "query" and front.form.home:
            home = {"extra_query": {"provider": "openai-main"}}
        api = front.oai.responses
        told = api.create(model=front.model(), input="Good morning", metadata={"a": "b"})
        assert (told.model, told.status, told.metadata) == (front.model(), "completed", {"a": "b"})
        assert told.output_text == "Hello! You said: Good morning"
        assert told.usage is not None and told.usage.total_tokens == 11
        assert api.retrieve(told.id, **home).output_text == told.output_text
        (item,) = api.input_items.list(told.id, limit=5, **home).data
        assert item.content[0].text == "Good morning"
        later = api.create(model=front.model(), input="more", previous_response_id=told.id)
        assert later.previous_response_id == told.id
        assert api.cancel(told.id, **home).status == "cancelled"
        api.delete(told.id, **home)
        with pytest.raises(openai.NotFoundError, match="Response with id"):
            api.retrieve(told.id, **home)
        path = f"/v1/responses/{told.id}"
        assert [(each.method, each.target.decode()) for each in seen] == [
            ("POST", "/v1/responses"),
            ("GET", path),
            ("GET", f"{path}/input_items?limit=5"),
            ("POST", "/v1/responses"),
            ("POST", f"{path}/cancel"),
            ("DELETE", path),
            ("GET", path),
        ]

    def test_home_is_needed(self, oai: openai.OpenAI, seen: list[Seen]) -> None:
        with pytest.raises(openai.BadRequestError, match=r"provider_prefix: .*x-gproxyd-provider"):
            oai.responses.retrieve("resp_1")
        assert not seen

    def test_stream(self, front: Front) -> None:
        with front.oai.responses.stream(model=front.model("demo-reasoner"), input=HELLO[0]["content"]) as stream:
            events = list(stream)
            final = stream.get_final_response()
        bearers = [event.response.model for event in events if hasattr(event, "response")]
        assert bearers == [front.model("demo-reasoner")] * 3 and final.model == bearers[0]
        assert events[-1].type == "response.completed" and final.output_text == HELLO_ANSWER
        assert final.output[0].type == "reasoning" and final.output[0].summary[0].text == "".join(THOUGHTS)
        assert final.usage.output_tokens_details.reasoning_tokens == 18

    @pytest.mark.parametrize("stream", [False, True])
    def test_tool_loop(self, front: Front, stream: bool) -> None:
        api, model = front.oai.responses, front.model()
        if stream:
            with api.create(model=model, input=[WEATHER], tools=FLAT_TOOLS, stream=True) as events:
                told = list(events)
            pieces = [event.delta for event in told if event.type == "response.function_call_arguments.delta"]
            assert len(pieces) > 1 and json.loads("".join(pieces)) == ARGUMENTS
            (call,) = told[-1].response.output
        else:
            (call,) = api.create(model=model, input=[WEATHER], tools=FLAT_TOOLS).output
        assert json.loads(call.arguments) == ARGUMENTS
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        turns = [WEATHER, call.model_dump(exclude_none=True), result]
        assert api.create(model=model, input=turns, tools=FLAT_TOOLS).output_text == "The tool answered: sunny"


class TestModels:
    def test_aggregated(self, oai: openai.OpenAI, seen: list[Seen]) -> None:
        names = {model.id: model for model in oai.models.list()}
        assert {"openai-main/gpt-4.1-mini", "chat-default", "smart", "flash", "whisper"} <= names.keys()
        for name in ("openai-main/gpt-4.1-mini", "vertex-main/gemini-1.5-flash", "chat-default", "whisper"):
            assert oai.models.retrieve(name) == names[name]
        assert names["smart"].owned_by == "anthropic-main"
        assert not seen

    def test_scoped(self, fronts: dict[str, Front]) -> None:
        oai = fronts["scoped"].oai
        names = {model.id: model for model in oai.models.list()}
        assert {MINI, "chat-default", "whisper"} <= names.keys()
        assert not {"smart", "flash", "openai-main/gpt-4.1-mini"} & names.keys()
        for name in (MINI, "chat-default"):
            assert oai.models.retrieve(name) == names[name]

    @pytest.mark.parametrize("name", ["nope", "openai-main/nope", "nobody/gpt-4.1-mini", "chat default"])
    def test_unknown(self, side: Front, name: str) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            side.oai.models.retrieve(name)
        assert caught.value.code == "model_not_found" and caught.value.body["message"].startswith("model_not_found: ")


class TestFiles:
    @pytest.mark.parametrize("home", ["configured", "header", "query"])
    @pytest.mark.parametrize("size", [0, 5, 2_000_000])
    def test_life(self, side: Front, seen: list[Seen], size: int, home: str) -> None:
        more: dict[str, Any] = {}
        if home == "header":
            more = {"extra_headers": side.form.home}
        elif home == "query" and side.form is AGGREGATED:
            more = {"extra_query": {"provider": "openai-main"}}
        content = (b"\r\n--x" * (size // 5 + 1))[:size]
        api = side.oai.files
        kept = api.create(file=("näme.jsonl", content), purpose="batch", **more)
        assert (kept.bytes, kept.filename, kept.purpose) == (size, "näme.jsonl", "batch")
        assert kept.sha256 == hashlib.sha256(content).hexdigest()  # type: ignore[attr-defined]
        assert api.retrieve(kept.id, **more) == kept
        assert kept.id in [each.id for each in api.list(purpose="batch", **more)]
        assert kept.id not in [each.id for each in api.list(purpose="other", **more)]
        if size <= 1 << 20:
            assert api.content(kept.id, **more).read() == content
        assert api.delete(kept.id, **more).deleted
        with pytest.raises(openai.NotFoundError, match="File with id"):
            api.content(kept.id, **more)
        assert [each.target.decode() for each in seen][:4] == [
            "/v1/files",
            f"/v1/files/{kept.id}",
            "/v1/files?purpose=batch",
            "/v1/files?purpose=other",
        ]

    def test_unknown_home(self, oai: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            oai.files.list(extra_headers={"x-gproxyd-provider": "nobody"})
        assert caught.value.code == "unknown_provider"

    def test_batches(self, side: Front) -> None:
        api = side.oai.batches
        made = api.create(input_file_id=f"file-{side.form.name}", endpoint="/v1/embeddings", completion_window="24h")
        assert api.retrieve(made.id) == made and made.id in [each.id for each in api.list(limit=5)]
        assert api.cancel(made.id).status == "cancelling"


class TestMedia:
    # OpenAI's SDK calls its translations endpoint deprecated; the gateway still carries it.
    @pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
    @pytest.mark.parametrize("api", ["transcriptions", "translations"])
    def test_audio(self, front: Front, seen: list[Seen], api: str) -> None:
        told = getattr(front.oai.audio, api).create(model=front.model("whisper-1"), file=("a.wav", SOUND))
        assert told.text == f"{len(SOUND)} bytes, sha256 {hashlib.sha256(SOUND).hexdigest()}"
        assert told.model == front.model("whisper-1")
        assert b'name="model"\r\n\r\nwhisper-1\r\n' in seen[0].body

    def test_audio_stream(self, front: Front) -> None:
        asked = {"model": front.model("whisper-1"), "file": ("a.wav", SOUND)}
        with front.oai.audio.transcriptions.create(**asked, stream=True) as stream:
            events = list(stream)
        assert "".join(event.delta for event in events[:-1]).rstrip() == events[-1].text
        assert hashlib.sha256(SOUND).hexdigest() in events[-1].text

    @pytest.mark.parametrize("shape", ["text", "srt"])
    def test_audio_as_text(self, front: Front, shape: str) -> None:
        asked = {"model": front.model("whisper-1"), "file": ("a.wav", SOUND), "response_format": shape}
        assert hashlib.sha256(SOUND).hexdigest() in front.oai.audio.transcriptions.create(**asked)

    def test_large_upload(self, front: Front) -> None:
        sound = SOUND * 250
        told = front.oai.audio.transcriptions.create(model=front.model("whisper-1"), file=("a.wav", sound))
        assert told.text == f"{len(sound)} bytes, sha256 {hashlib.sha256(sound).hexdigest()}"

    def test_speech(self, front: Front) -> None:
        asked = {"model": front.model("gpt-4o-mini-tts"), "voice": "alloy", "input": "hi"}
        large = {"x-demo-size": "300000"}
        with front.oai.audio.speech.with_streaming_response.create(**asked, extra_headers=large) as spoken:
            assert spoken.headers["content-type"] == "audio/mpeg"
            assert sum(map(len, spoken.iter_bytes())) == 300_000

    @pytest.mark.parametrize("named", [True, False])
    def test_images(self, front: Front, named: bool) -> None:
        asked = {"model": front.model("gpt-image-1")} if named else {}
        edited = front.oai.images.edit(image=("p.png", b"abc", "image/png"), prompt="brighter", **asked)
        assert hashlib.sha256(b"abc").hexdigest() in edited.data[0].revised_prompt
        if named:
            made = front.oai.images.generate(prompt="a pixel", **asked)
            assert base64.b64decode(made.data[0].b64_json).startswith(b"\x89PNG")

    def test_several_images(self, front: Front) -> None:
        pictures = [(f"{turn}.png", SOUND * turn, "image/png") for turn in (1, 2, 3)]
        told = front.oai.images.edit(image=pictures, prompt="one", model=front.model("gpt-image-1"), n=2)
        assert len(told.data) == 2
        assert all(hashlib.sha256(each[1]).hexdigest() in told.data[0].revised_prompt for each in pictures)

    def test_moderation_without_a_model(self, side: Front) -> None:
        told = side.oai.moderations.create(input="attack!", extra_headers=side.form.home)
        assert told.results[0].categories.violence and told.model == "omni-moderation-latest"

    def test_embeddings(self, front: Front) -> None:
        name = front.model("text-embedding-3-small")
        packed = front.oai.embeddings.create(model=name, input=["a", "b"], dimensions=8)
        floats = front.oai.embeddings.create(model=name, input=["a", "b"], dimensions=8, encoding_format="float")
        assert packed.model == floats.model == name and packed.usage.total_tokens == 2
        assert [each.embedding for each in packed.data] == [each.embedding for each in floats.data]


STATUSES = [
    (400, openai.BadRequestError),
    (403, openai.PermissionDeniedError),
    (404, openai.NotFoundError),
    (409, openai.ConflictError),
    (413, openai.APIStatusError),
    (422, openai.UnprocessableEntityError),
    (429, openai.RateLimitError),
    (500, openai.InternalServerError),
    (503, openai.InternalServerError),
    (529, openai.InternalServerError),
]

ASKS: list[tuple[str, Call, dict[str, Any]]] = [
    ("chat", chat, {"messages": HELLO}),
    ("chat-stream", chat, {"messages": HELLO, "stream": True}),
    ("responses", response, {"input": "Good morning"}),
    ("responses-stream", response, {"input": "Good morning", "stream": True}),
    ("embeddings", lambda oai, **a: oai.embeddings.create(**a), {"input": "a"}),
    ("transcriptions", lambda oai, **a: oai.audio.transcriptions.create(**a), {"file": ("a.wav", SOUND)}),
    ("speech", lambda oai, **a: oai.audio.speech.create(**a), {"voice": "alloy", "input": "x"}),
]
each_ask = pytest.mark.parametrize(("call", "asked"), [ask[1:] for ask in ASKS], ids=[ask[0] for ask in ASKS])


class TestErrors:
    @pytest.mark.parametrize(("status", "kind"), STATUSES, ids=[str(status) for status, _ in STATUSES])
    def test_the_vendors_own(self, side: Front, status: int, kind: type[openai.APIStatusError]) -> None:
        asked = {"messages": HELLO, "extra_headers": {"x-demo-status": str(status)}}
        caught = []
        for client, model in ((side.oai, side.model()), (side.direct, MINI)):
            with pytest.raises(kind) as raised:
                client.chat.completions.create(model=model, **asked)
            caught.append(raised.value)
        assert caught[0].status_code == status and caught[0].body == caught[1].body
        assert caught[0].response.content == caught[1].response.content
        assert caught[0].response.headers.get("retry-after") == ("7" if status == 429 else None)
        assert caught[0].request_id.startswith("req_") and caught[0].request_id != caught[1].request_id

    @each_ask
    def test_rate_limit_everywhere(self, front: Front, call: Call, asked: dict[str, Any]) -> None:
        with pytest.raises(openai.RateLimitError, match="Rate limit reached") as caught:
            call(front.oai, model=front.model(), extra_headers={"x-demo-status": "429"}, **asked)
        assert caught.value.response.headers["retry-after"] == "7"

    @each_ask
    def test_unknown_model(self, side: Front, call: Call, asked: dict[str, Any]) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            call(side.oai, model=side.model("nope"), **asked)
        assert caught.value.code == "model_not_found" and "The model `nope` does not exist" in caught.value.message

    @each_ask
    def test_refused_key(self, side: Front, gateway: Running, call: Call, asked: dict[str, Any]) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            call(side.oai, model=side.model(), extra_headers={"x-demo-status": "401"}, **asked)
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_auth")
        assert caught.value.body["message"].startswith("upstream_error: upstream_auth")
        sdk.told_nothing(caught.value, caught.value.response.text)
        line = sdk.log_line(gateway, caught.value.request_id)
        assert (line["outcome"], line["reason"], line["status"]) == ("upstream_error", "auth", 502)

    @each_ask
    def test_wrong_key(self, side: Front, seen: list[Seen], call: Call, asked: dict[str, Any]) -> None:
        with pytest.raises(openai.AuthenticationError) as caught:
            call(side.oai.with_options(api_key="ck-wrong"), model=side.model(), **asked)
        assert caught.value.code == "unauthorized" and caught.value.body["message"].startswith("unauthorized: ")
        assert "ck-wrong" not in caught.value.response.text and not seen

    @each_ask
    def test_no_prefix(self, oai: openai.OpenAI, seen: list[Seen], call: Call, asked: dict[str, Any]) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            call(oai, model=MINI, **asked)
        assert caught.value.code == "provider_prefix" and caught.value.body["message"].startswith("provider_prefix: ")
        assert not seen

    @pytest.mark.parametrize("name", ["", "a/../b", "a b", "x" * 300, "é"])
    def test_no_name(self, side: Front, name: str) -> None:
        with pytest.raises(openai.BadRequestError, match="invalid_request: "):
            side.oai.chat.completions.create(model=name, messages=HELLO)

    def test_unknown_provider(self, oai: openai.OpenAI, gateway: Running) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            oai.with_options(base_url=f"{gateway.url}/nobody/v1").chat.completions.create(model=MINI, messages=HELLO)
        assert caught.value.code == "unknown_provider"

    def test_unknown_endpoint(self, oai: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="not_found: "):
            oai.post("/nothing", cast_to=object, body={})
        with pytest.raises(openai.APIStatusError, match="method_not_allowed: ") as caught:
            oai.get("/chat/completions", cast_to=object)
        assert caught.value.status_code == 405 and caught.value.response.headers["allow"] == "POST"

    def test_retries(self, oai: openai.OpenAI, seen: list[Seen]) -> None:
        with pytest.raises(openai.InternalServerError):
            oai.with_options(max_retries=1).chat.completions.create(
                model="chat-default", messages=HELLO, extra_headers={"x-demo-status": "503"}
            )
        assert [each.header("x-stainless-retry-count") for each in seen] == [["0"], ["1"]]


class TestBreaks:
    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_chat_stream(self, front: Front, how: str) -> None:
        broken = {"x-demo-fail": how, "x-demo-fail-after": "4"}
        asked = {"model": front.model(), "messages": HELLO, "extra_headers": broken}
        told = []
        with (
            front.oai.chat.completions.create(**asked, stream=True) as stream,
            pytest.raises(openai.APIError, match=r"^upstream_error: "),
        ):
            told.extend(stream)  # keeps what came before
        assert {chunk.model for chunk in told} <= {front.model()}

    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_responses_stream(self, front: Front, how: str) -> None:
        broken = {"x-demo-fail": how, "x-demo-fail-after": "4"}
        asked = {"model": front.model(), "input": "Good morning", "extra_headers": broken}
        with (
            front.oai.responses.create(**asked, stream=True) as stream,
            pytest.raises(openai.APIError, match=r"^upstream_error: "),
        ):
            list(stream)

    def test_every_whole_event_came(self, front: Front) -> None:
        broken = {"x-demo-fail-after": "4", "x-demo-chunk": "1000000"}
        asked = {"model": front.model(), "messages": HELLO, "extra_headers": broken}
        with front.oai.chat.completions.create(**asked, stream=True) as stream:
            told = [next(stream) for _ in range(4)]
            with pytest.raises(openai.APIError, match=r"^upstream_error: "):
                next(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == "Hello there, nice "
        assert {chunk.model for chunk in told} == {front.model()}

    def test_the_vendors_own_event(self, front: Front) -> None:
        broken = {"x-demo-fail": "error", "x-demo-fail-after": "3"}
        with (
            front.oai.chat.completions.create(
                model=front.model(), messages=HELLO, stream=True, extra_headers=broken
            ) as stream,
            pytest.raises(openai.APIError, match="The server had an error"),
        ):
            list(stream)
        with front.oai.responses.create(model=front.model(), input="x", stream=True, extra_headers=broken) as events:
            told = list(events)
        assert told[-1].type == "error" and "The server had an error" in told[-1].message and len(told) == 4

    @each_ask
    def test_before_the_head(self, side: Front, call: Call, asked: dict[str, Any]) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            call(side.oai, model=side.model(), extra_headers={"x-demo-fail-after": "head"}, **asked)
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_error")

    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_in_a_json_body(self, front: Front, how: str) -> None:
        broken = {"x-demo-fail": how, "x-demo-fail-after": "40"}
        with pytest.raises(openai.InternalServerError) as caught:
            front.oai.chat.completions.create(model=front.model(), messages=HELLO, extra_headers=broken)
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_error")

    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_in_a_binary_body(self, side: Front, how: str) -> None:
        broken = {"x-demo-fail": how, "x-demo-fail-after": "2000"}
        asked = {"model": side.model("gpt-4o-mini-tts"), "voice": "alloy", "input": "x", "extra_headers": broken}
        with pytest.raises(openai.APIConnectionError):
            side.oai.audio.speech.create(**asked)

    @pytest.mark.parametrize("call", [chat, response])
    def test_by_the_client(self, front: Front, seen: list[Seen], call: Call) -> None:
        asked = {"messages": HELLO} if call is chat else {"input": "Good morning"}
        slow = {"x-demo-event-delay": "1000"}
        with call(front.oai, model=front.model(), stream=True, extra_headers=slow, **asked) as stream:
            next(stream)
        assert until(lambda: seen[0].client_gone)

    def test_the_next_request_is_well(self, side: Front) -> None:
        for _ in range(3):
            with pytest.raises(openai.APIError):
                list(
                    side.oai.chat.completions.create(
                        model=side.model(), messages=HELLO, stream=True, extra_headers={"x-demo-fail-after": "2"}
                    )
                )
            assert side.oai.chat.completions.create(model=side.model(), messages=HELLO).model == side.model()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_async(gateway: Running, form: Form) -> None:
    async def talk() -> None:
        base = f"{gateway.url}{form.path}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=CLIENT_KEY, max_retries=0) as oai:
            told = await oai.chat.completions.create(model=form.model(MINI), messages=HELLO)
            assert (told.model, told.choices[0].message.content) == (form.model(MINI), HELLO_ANSWER)
            asked = {"model": form.model(MINI), "messages": HELLO, "stream": True}

            async def one() -> str:
                async with await oai.chat.completions.create(**asked) as stream:
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            assert await asyncio.gather(*(one() for _ in range(8))) == [HELLO_ANSWER] * 8
            broken = {"x-demo-fail-after": "3"}
            with pytest.raises(openai.APIError, match="upstream_error"):
                async for _ in await oai.chat.completions.create(**asked, extra_headers=broken):
                    pass

    asyncio.run(talk())
