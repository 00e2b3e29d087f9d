"""The catalogue, as each of the three vendors lists it.

Shapes: "Models" in the OpenAI, Anthropic and Gemini API references.
"""

from __future__ import annotations

from gproxyd.host.demo.answers import Answer, Object, VendorError, json, pretty
from gproxyd.host.demo.call import CREATED, CREATED_RFC3339, Call

OPENAI = (
    "gpt-5",
    "gpt-5-mini",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4o",
    "gpt-4o-mini",
    "demo-reasoner",
    "text-embedding-3-small",
    "text-embedding-3-large",
    "omni-moderation-latest",
    "gpt-image-1",
    "whisper-1",
    "gpt-4o-mini-tts",
)
ANTHROPIC = (
    "claude-opus-4-1",
    "claude-sonnet-5",
    "claude-sonnet-4-5",
    "claude-haiku-4-5",
    "claude-3-5-sonnet-latest",
)
GEMINI = ("gemini-2.5-pro", "gemini-2.5-flash", "gemini-1.5-flash", "gemini-embedding-001")

_VERBS = ("generateContent", "streamGenerateContent", "countTokens")
_EMBEDDING_VERBS = ("embedContent", "batchEmbedContents", "countTokens")


def list_models(call: Call) -> Answer:
    """GET /v1/models, /v1beta/models."""
    if call.dialect == "gemini":
        return pretty({"models": [_gemini(name) for name in GEMINI]})
    if call.dialect == "anthropic":
        data = [_anthropic(name) for name in ANTHROPIC]
        return json({"data": data, "has_more": False, "first_id": ANTHROPIC[0], "last_id": ANTHROPIC[-1]})
    return pretty({"object": "list", "data": [_openai(name) for name in OPENAI]})


def retrieve_model(call: Call) -> Answer:
    """GET /v1/models/{id}, /v1beta/models/{id}; only what is listed exists."""
    name = call.known_model(call.place["id"])
    if call.dialect == "gemini":
        return pretty(_gemini(_listed(name, GEMINI)))
    if call.dialect == "anthropic":
        return json(_anthropic(_listed(name, ANTHROPIC)))
    return pretty(_openai(_listed(name, OPENAI)))


def _listed(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise VendorError(404, f"The model '{name}' does not exist", code="model_not_found", param="model")
    return name


def _openai(name: str) -> Object:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "system"}


def _anthropic(name: str) -> Object:
    told = {"type": "model", "id": name, "display_name": name.replace("-", " ").title(), "created_at": CREATED_RFC3339}
    return told | {"lifecycle": "active", "max_input_tokens": 200_000, "max_tokens": 64_000}


def _gemini(name: str) -> Object:
    return {
        "name": f"models/{name}",
        "version": "001",
        "displayName": name.replace("-", " ").title(),
        "description": "A model of the demo vendor",
        "inputTokenLimit": 1_048_576,
        "outputTokenLimit": 65_536,
        "supportedGenerationMethods": list(_EMBEDDING_VERBS if "embedding" in name else _VERBS),
        "temperature": 1,
        "topP": 0.95,
        "topK": 64,
    }
