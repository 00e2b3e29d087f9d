"""Google's own SDK through the gateway, in every form of address and both of its versions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from google import genai
from google.genai import errors, types

from gproxyd.host.demo import DemoVendor, Seen
from gproxyd.host.demo.script import THOUGHTS
from tests.support import sdk
from tests.support.running import CLIENT_KEY, PROVIDER_KEY, Running
from tests.support.sdk import Form

FLASH = "gemini-1.5-flash"
FORMS = sdk.forms("vertex-main", {FLASH: "flash"})
AGGREGATED, SCOPED = FORMS[0], FORMS[2]
VERSIONS = [None, "v1beta"]
"""The SDK's own choice (`v1`), and what its older versions choose."""
WAYS = [(form, version) for form in (AGGREGATED, SCOPED) for version in VERSIONS]
WRONG_KEY = "ck-wrong"
HELLO = "Say hello in one short sentence."
HELLO_ANSWER = "Hello there, nice to meet you!"
WEATHER = "What is the weather in Paris?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "modelVersion": {"type": "string"}}}
ARGUMENTS = {"city": "Paris", "modelVersion": "demo"}
TOOL = types.Tool(function_declarations=[types.FunctionDeclaration(name="get_weather", parameters_json_schema=SCHEMA)])
THINKING = types.ThinkingConfig(include_thoughts=True)
CUT = {"x-demo-chunk": "3"}


@contextmanager
def client(base: str, key: str, version: str | None = None, **options: Any) -> Iterator[genai.Client]:
    http_options = types.HttpOptions(base_url=base, api_version=version, **options)
    made = genai.Client(api_key=key, http_options=http_options)
    yield made
    made.close()


@dataclass(frozen=True)
class Front:
    """A client of the gateway in one form of address, and one of the vendor itself."""

    form: Form
    gemini: genai.Client
    direct: genai.Client

    def model(self, upstream: str = FLASH) -> str:
        return self.form.model(upstream)


def config(headers: dict[str, str] | None = None, **more: Any) -> types.GenerateContentConfig:
    return types.GenerateContentConfig(http_options=types.HttpOptions(headers=headers), **more)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    yield from sdk.unset()


@pytest.fixture(scope="module")
def direct(vendor_at: tuple[DemoVendor, str]) -> Iterator[genai.Client]:
    with client(vendor_at[1], PROVIDER_KEY, "v1beta", headers=sdk.DIRECT) as made:
        yield made


@pytest.fixture(scope="module")
def clients(gateway: Running) -> Iterator[dict[tuple[str, str | None, str], genai.Client]]:
    """By the path of the form, the version, and the key."""
    with ExitStack() as stack:
        yield {
            (path, version, key): stack.enter_context(client(f"{gateway.url}{path}", key, version))
            for path in ("", "/vertex-main", "/nobody")
            for version in VERSIONS
            for key in (CLIENT_KEY, WRONG_KEY)
        }


Clients = dict[tuple[str, str | None, str], genai.Client]


def each(*ways: tuple[Form, str | None]) -> dict[str, Any]:
    """The parameters of a fixture: a form of address and a version, with names to read."""
    return {"params": ways, "ids": [f"{form.name}-{version or 'v1'}" for form, version in ways]}


@pytest.fixture(**each(*WAYS, (FORMS[1], "v1beta"), (FORMS[3], None)))
def front(clients: Clients, direct: genai.Client, request: pytest.FixtureRequest) -> Front:
    """Every form, with aliases and without, and either version."""
    form, version = request.param
    return Front(form, clients[form.path, version, CLIENT_KEY], direct)


@pytest.fixture(**each(*WAYS))
def side(clients: Clients, direct: genai.Client, request: pytest.FixtureRequest) -> Front:
    """Both forms in both versions, for what no alias changes."""
    form, version = request.param
    return Front(form, clients[form.path, version, CLIENT_KEY], direct)


@pytest.fixture(params=VERSIONS, ids=["v1", "v1beta"])
def version(request: pytest.FixtureRequest) -> str | None:
    return request.param


@pytest.fixture
def gemini(clients: Clients, version: str | None) -> genai.Client:
    return clients["", version, CLIENT_KEY]


@pytest.fixture(autouse=True)
def seen(vendor: DemoVendor) -> Iterator[list[Seen]]:
    yield from sdk.recorded(vendor, "x-goog-api-key")


CALLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("text", {"contents": HELLO}, {"system_instruction": 'Say "modelVersion": "x".'}),
    ("thinking", {"contents": "Good morning"}, {"thinking_config": THINKING}),
    ("tools", {"contents": "The weather, please, of both."}, {"tools": [TOOL]}),
    ("thinking-tools", {"contents": WEATHER}, {"tools": [TOOL], "thinking_config": THINKING}),
    ("structured", {"contents": HELLO}, {"response_mime_type": "application/json", "response_json_schema": SCHEMA}),
    ("cut", {"contents": "a long story"}, {"max_output_tokens": 2}),
]


@pytest.mark.parametrize("manner", ["plain", "stream", "cut"])
@pytest.mark.parametrize(("asked", "shape"), [call[1:] for call in CALLS], ids=[call[0] for call in CALLS])
def test_alike(front: Front, seen: list[Seen], asked: dict[str, Any], shape: dict[str, Any], manner: str) -> None:
    """What the SDK makes of the gateway's answer and of the vendor's own is the same, but for the model's name."""
    asked = asked | {"config": config(CUT if manner == "cut" else None, **shape)}
    told: list[Any] = []
    for made, model in ((front.gemini, front.model()), (front.direct, FLASH)):
        if manner == "plain":
            told.append(made.models.generate_content(model=model, **asked))
        else:
            told.append(list(made.models.generate_content_stream(model=model, **asked)))
    sdk.assert_alike(*told, sent=front.model(), upstream=FLASH)
    assert len(sdk.parted(told[1])[0]) == (1 if manner == "plain" else len(told[1]))
    assert (seen[0].method, seen[0].target, seen[0].body) == (seen[1].method, seen[1].target, seen[1].body)


class TestGenerate:
    def test_text_and_usage(self, front: Front, seen: list[Seen]) -> None:
        told = front.gemini.models.generate_content(model=front.model(), contents=HELLO)
        assert (told.model_version, told.text) == (front.model(), HELLO_ANSWER)
        spent = told.usage_metadata
        assert (spent.prompt_token_count, spent.cached_content_token_count, spent.candidates_token_count) == (8, 2, 8)
        assert spent.total_token_count == 16
        assert seen[0].target == b"/v1beta/models/gemini-1.5-flash:generateContent"

    def test_stream(self, front: Front, seen: list[Seen]) -> None:
        told = list(front.gemini.models.generate_content_stream(model=front.model(), contents=HELLO))
        assert {chunk.model_version for chunk in told} == {front.model()} and len(told) > 3
        assert "".join(chunk.text for chunk in told) == HELLO_ANSWER
        assert told[-1].usage_metadata.total_token_count == 16
        assert seen[0].target == b"/v1beta/models/gemini-1.5-flash:streamGenerateContent?alt=sse"

    def test_full_resource_name(self, front: Front, seen: list[Seen]) -> None:
        told = front.gemini.models.generate_content(model=f"models/{front.model()}", contents=HELLO)
        assert told.model_version == front.model()
        assert seen[0].target == b"/v1beta/models/gemini-1.5-flash:generateContent"

    def test_large(self, front: Front) -> None:
        asked = {"model": front.model(), "contents": HELLO, "config": config({"x-demo-size": "600000"})}
        told = front.gemini.models.generate_content(**asked)
        assert told.model_version == front.model() and len(told.text) == 600_000
        streamed = list(front.gemini.models.generate_content_stream(**asked))
        assert {chunk.model_version for chunk in streamed} == {front.model()}
        assert sum(len(chunk.text) for chunk in streamed) == 600_000

    @pytest.mark.parametrize("stream", [False, True])
    def test_thoughts_and_tools(self, front: Front, seen: list[Seen], stream: bool) -> None:
        models = front.gemini.models
        asked = {"model": front.model(), "contents": WEATHER, "config": config(tools=[TOOL], thinking_config=THINKING)}
        told = list(models.generate_content_stream(**asked)) if stream else [models.generate_content(**asked)]
        parts = [part for chunk in told for part in chunk.candidates[0].content.parts]
        assert "".join(part.text for part in parts if part.thought) == "".join(THOUGHTS)
        call = parts[-1]
        assert call.function_call.name == "get_weather" and call.function_call.args == ARGUMENTS
        assert call.thought_signature == "".join(THOUGHTS).encode()
        assert told[-1].usage_metadata.thoughts_token_count == 18
        answer = types.Part.from_function_response(name="get_weather", response={"sky": "blue"})
        turns = [
            types.Content(role="user", parts=[types.Part(text=WEATHER)]),
            types.Content(role="model", parts=[call]),
            types.Content(role="user", parts=[answer]),
        ]
        later = models.generate_content(model=front.model(), contents=turns, config=config(tools=[TOOL]))
        assert later.text == 'The tool answered: {"sky":"blue"}'
        sent = json.loads(seen[-1].body)["contents"][1]["parts"][0]
        signature = sent.get("thoughtSignature", sent.get("thought_signature"))
        assert types.Part(text="", thought_signature=signature).thought_signature == call.thought_signature

    def test_automatic_function_calling(self, front: Front, seen: list[Seen]) -> None:
        def get_weather(city: str) -> str:
            """The weather of a city."""
            return f"sunny in {city}"

        told = front.gemini.models.generate_content(
            model=front.model(), contents=WEATHER, config=config(tools=[get_weather])
        )
        assert told.text == 'The tool answered: {"result":"sunny in Paris"}' and len(seen) == 2
        assert told.model_version == front.model()

    def test_chat(self, front: Front) -> None:
        chat = front.gemini.chats.create(model=front.model(), config=config(thinking_config=THINKING))
        assert chat.send_message("Good morning").text == "Hello! You said: Good morning"
        assert "".join(chunk.text or "" for chunk in chat.send_message_stream("ping")) == "pong"

    def test_headers(self, side: Front, seen: list[Seen]) -> None:
        told = side.gemini.models.generate_content(model=side.model(), contents=HELLO, config=config({"X-Mine": "1"}))
        headers = told.sdk_http_response.headers
        assert headers["x-gproxyd-provider"] == "vertex-main" and headers["x-gproxyd-model"] == FLASH
        assert headers["x-request-id"].startswith("req_") and headers["server-timing"].startswith("gateway;dur=")
        assert headers["content-type"] == "application/json; charset=UTF-8" and "server" not in headers
        assert seen[0].header("x-mine") == ["1"]


class TestCountsAndEmbeddings:
    def test_count_tokens(self, front: Front, seen: list[Seen]) -> None:
        assert front.gemini.models.count_tokens(model=front.model(), contents=HELLO).total_tokens == 8
        assert seen[0].target == b"/v1beta/models/gemini-1.5-flash:countTokens"

    @pytest.mark.parametrize("contents", ["a", ["a", "b"]], ids=["one", "two"])
    def test_embed(self, front: Front, contents: str | list[str]) -> None:
        asked = {"contents": contents, "config": types.EmbedContentConfig(output_dimensionality=8)}
        told = front.gemini.models.embed_content(model=front.model("gemini-embedding-001"), **asked)
        assert {len(each.values) for each in told.embeddings} == {8} and len(told.embeddings) == len(contents)
        direct = front.direct.models.embed_content(model="gemini-embedding-001", **asked)
        assert told.embeddings == direct.embeddings

    @pytest.mark.parametrize("upstream", ["gemini-embedding-001", FLASH])
    def test_embed_names_the_upstreams_model(self, front: Front, seen: list[Seen], upstream: str) -> None:
        """The SDK names the model in every request of a batch, too; Google wants it to be that of the path."""
        front.gemini.models.embed_content(model=front.model(upstream), contents=["a", "b"])
        assert seen[0].target.decode() == f"/v1beta/models/{upstream}:batchEmbedContents"
        assert {each["model"] for each in json.loads(seen[0].body)["requests"]} == {f"models/{upstream}"}


class TestModels:
    def test_aggregated(self, gemini: genai.Client, seen: list[Seen]) -> None:
        names = {model.name: model for model in gemini.models.list()}
        wanted = {f"vertex-main/{FLASH}", "openai-main/gpt-4.1-mini", "flash", "chat-default"}
        assert {f"models/{name}" for name in wanted} <= names.keys()
        for name in wanted:
            assert gemini.models.get(model=name) == names[f"models/{name}"]
        assert "generateContent" in names["models/flash"].supported_actions
        assert not seen

    def test_scoped(self, clients: Clients, version: str | None) -> None:
        gemini = clients[SCOPED.path, version, CLIENT_KEY]
        names = {model.name for model in gemini.models.list()}
        assert {f"models/{FLASH}", "models/flash"} <= names
        assert not {"models/chat-default", f"models/vertex-main/{FLASH}"} & names
        for name in (FLASH, "flash"):
            assert gemini.models.get(model=name).name == f"models/{name}"

    @pytest.mark.parametrize("size", [1, 2, 3, 1000])
    def test_pages(self, gemini: genai.Client, size: int) -> None:
        whole = [model.name for model in gemini.models.list()]
        pager = gemini.models.list(config={"page_size": size})
        assert len(pager.page) == min(size, len(whole))
        assert [model.name for model in pager] == whole and len(set(whole)) == len(whole)

    @pytest.mark.parametrize("name", ["nope", "vertex-main/nope", "nobody/flash"])
    def test_unknown(self, side: Front, name: str) -> None:
        with pytest.raises(errors.ClientError) as caught:
            side.gemini.models.get(model=name)
        assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")
        assert caught.value.message.startswith("model_not_found: ")


Call = Callable[..., Any]


def plain(made: genai.Client, model: str, headers: dict[str, str]) -> Any:
    return made.models.generate_content(model=model, contents=HELLO, config=config(headers))


def streamed(made: genai.Client, model: str, headers: dict[str, str]) -> Any:
    return list(made.models.generate_content_stream(model=model, contents=HELLO, config=config(headers)))


def counted(made: genai.Client, model: str, headers: dict[str, str]) -> Any:
    options = types.CountTokensConfig(http_options=types.HttpOptions(headers=headers))
    return made.models.count_tokens(model=model, contents=HELLO, config=options)


def embedded(made: genai.Client, model: str, headers: dict[str, str]) -> Any:
    options = types.EmbedContentConfig(http_options=types.HttpOptions(headers=headers))
    return made.models.embed_content(model=model, contents=HELLO, config=options)


each_call = pytest.mark.parametrize("call", [plain, streamed, counted, embedded])


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind", "word"),
        [
            (400, errors.ClientError, "INVALID_ARGUMENT"),
            (403, errors.ClientError, "PERMISSION_DENIED"),
            (404, errors.ClientError, "NOT_FOUND"),
            (429, errors.ClientError, "RESOURCE_EXHAUSTED"),
            (500, errors.ServerError, "INTERNAL"),
            (503, errors.ServerError, "UNAVAILABLE"),
            (529, errors.ServerError, "INTERNAL"),
        ],
    )
    @pytest.mark.parametrize("call", [plain, streamed])
    def test_the_vendors_own(
        self, side: Front, seen: list[Seen], call: Call, status: int, kind: type[errors.APIError], word: str
    ) -> None:
        broken = {"x-demo-status": str(status)}
        with pytest.raises(kind) as caught:
            call(side.gemini, side.model(), broken)
        with pytest.raises(kind) as usual:
            call(side.direct, FLASH, broken)
        assert (caught.value.code, caught.value.status) == (status, word)
        assert caught.value.details == usual.value.details
        assert caught.value.response.headers.get("retry-after") == ("7" if status == 429 else None)
        assert len(seen) == 2

    @each_call
    def test_unknown_model(self, side: Front, call: Call) -> None:
        with pytest.raises(errors.ClientError, match="models/nope is not found") as caught:
            call(side.gemini, side.model("nope"), {})
        assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")

    @each_call
    def test_refused_key(self, side: Front, gateway: Running, call: Call) -> None:
        with pytest.raises(errors.ServerError) as caught:
            call(side.gemini, side.model(), {"x-demo-status": "401"})
        assert (caught.value.code, caught.value.status) == (502, "UNAVAILABLE")
        assert caught.value.message.startswith("upstream_error: upstream_auth")
        sdk.told_nothing(caught.value, caught.value.response.text)
        assert sdk.log_line(gateway, caught.value.response.headers["x-request-id"])["reason"] == "auth"

    @each_call
    def test_wrong_key(self, side: Front, clients: Clients, seen: list[Seen], call: Call) -> None:
        with pytest.raises(errors.ClientError) as caught:
            call(clients[side.form.path, None, WRONG_KEY], side.model(), {})
        assert (caught.value.code, caught.value.status) == (401, "UNAUTHENTICATED")
        assert caught.value.message.startswith("unauthorized: ")
        assert WRONG_KEY not in caught.value.response.text and not seen

    @each_call
    def test_no_prefix(self, gemini: genai.Client, seen: list[Seen], call: Call) -> None:
        with pytest.raises(errors.ClientError) as caught:
            call(gemini, FLASH, {})
        assert (caught.value.code, caught.value.status) == (400, "INVALID_ARGUMENT")
        assert caught.value.message.startswith("provider_prefix: ") and not seen

    def test_unknown_provider(self, clients: Clients, version: str | None) -> None:
        with pytest.raises(errors.ClientError) as caught:
            plain(clients["/nobody", version, CLIENT_KEY], FLASH, {})
        assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")
        assert caught.value.message.startswith("unknown_provider: ")

    def test_retries(self, side: Front, seen: list[Seen]) -> None:
        retry = types.HttpRetryOptions(attempts=2, initial_delay=0.01, max_delay=0.01, jitter=0.01)
        options = types.HttpOptions(headers={"x-demo-status": "503"}, retry_options=retry)
        with pytest.raises(errors.ServerError):
            side.gemini.models.generate_content(
                model=side.model(), contents=HELLO, config=types.GenerateContentConfig(http_options=options)
            )
        assert len(seen) == 2


class TestBreaks:
    @pytest.mark.parametrize("how", ["close", "reset"])
    @pytest.mark.parametrize("after", ["1", "4"])
    def test_stream(self, front: Front, how: str, after: str) -> None:
        with pytest.raises(errors.ServerError) as caught:
            streamed(front.gemini, front.model(), {"x-demo-fail": how, "x-demo-fail-after": after})
        assert caught.value.code == 502 and caught.value.message.startswith("upstream_error: ")

    def test_every_whole_event_came(self, front: Front) -> None:
        broken = config({"x-demo-fail-after": "3", "x-demo-chunk": "1000000"})
        stream = front.gemini.models.generate_content_stream(model=front.model(), contents=HELLO, config=broken)
        told = [next(stream) for _ in range(3)]
        with pytest.raises(errors.ServerError, match="upstream_error: "):
            next(stream)
        assert "".join(chunk.text for chunk in told) == "Hello there, nice "
        assert {chunk.model_version for chunk in told} == {front.model()}

    def test_the_vendors_own_event(self, front: Front) -> None:
        with pytest.raises(errors.ServerError, match="The model is overloaded") as caught:
            streamed(front.gemini, front.model(), {"x-demo-fail": "error", "x-demo-fail-after": "3"})
        assert (caught.value.code, caught.value.status) == (503, "UNAVAILABLE")

    @pytest.mark.parametrize("after", ["head", "0", "40"])
    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_plain(self, front: Front, after: str, how: str) -> None:
        with pytest.raises(errors.ServerError) as caught:
            plain(front.gemini, front.model(), {"x-demo-fail": how, "x-demo-fail-after": after})
        assert (caught.value.code, caught.value.status) == (502, "UNAVAILABLE")
        assert caught.value.message.startswith("upstream_error: ")


# The SDK inherits from aiohttp's session, which aiohttp would rather it did not.
@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_async(gateway: Running, version: str | None, form: Form) -> None:
    async def talk() -> None:
        with client(f"{gateway.url}{form.path}", CLIENT_KEY, version) as made:
            async with made.aio as gemini:
                asked = {"model": form.model(FLASH), "contents": HELLO}
                told = await gemini.models.generate_content(**asked)
                assert (told.model_version, told.text) == (form.model(FLASH), HELLO_ANSWER)

                async def one() -> str:
                    stream = await gemini.models.generate_content_stream(**asked)
                    return "".join([chunk.text or "" async for chunk in stream])

                assert await asyncio.gather(*(one() for _ in range(8))) == [HELLO_ANSWER] * 8
                stream = await gemini.models.generate_content_stream(**asked, config=config({"x-demo-fail-after": "3"}))
                with pytest.raises(errors.ServerError, match="upstream_error"):
                    async for _ in stream:
                        pass

    asyncio.run(talk())
