"""OpenAI's small JSON APIs: embeddings, moderations; and rerank, as Cohere and Jina have it.

Shapes: OpenAI API reference, "Embeddings" and "Moderations"; Cohere API reference, "Rerank".
"""

from __future__ import annotations

import base64
import struct

from gproxyd.host.demo.answers import Answer, Object, VendorError, json, pretty
from gproxyd.host.demo.call import Call
from gproxyd.host.demo.script import count, text_of, vector

DIMENSIONS = 256
_FLAG = "attack"
_CATEGORIES = {
    "harassment": "text",
    "harassment/threatening": "text",
    "hate": "text",
    "hate/threatening": "text",
    "illicit": "text",
    "illicit/violent": "text",
    "self-harm": "text",
    "self-harm/instructions": "text",
    "self-harm/intent": "text",
    "sexual": "text",
    "sexual/minors": "text",
    "violence": "text",
    "violence/graphic": "text",
}


def embeddings(call: Call) -> Answer:
    """POST /v1/embeddings: floats, or little-endian 32-bit floats in base64 (what the Python SDK asks for)."""
    body = call.json()
    model = call.model(body)
    texts = _inputs(body.get("input"))
    packed = body.get("encoding_format") == "base64"
    vectors = [vector(text, body.get("dimensions") or DIMENSIONS) for text in texts]
    data = [
        {"object": "embedding", "index": index, "embedding": _pack(values) if packed else values}
        for index, values in enumerate(vectors)
    ]
    used = sum(map(count, texts))
    usage = {"prompt_tokens": used, "total_tokens": used}
    return pretty({"object": "list", "data": data, "model": model, "usage": usage})


def moderations(call: Call) -> Answer:
    """POST /v1/moderations: a text that holds the word "attack" is flagged as violence."""
    body = call.json()
    results = [_moderation(_FLAG in text.lower()) for text in _inputs(body.get("input"))]
    model = call.known_model(body.get("model") or "omni-moderation-latest")
    return pretty({"id": call.ident("modr-"), "model": model, "results": results})


def rerank(call: Call) -> Answer:
    """POST /v1/rerank: documents by the share of the query's words they hold, best first."""
    body = call.json()
    model = call.model(body)
    query, documents = body.get("query"), body.get("documents")
    if not query or not isinstance(documents, list) or not documents:
        raise VendorError(400, "Missing required parameter: 'query' or 'documents'.", param="documents")
    scores = [(_overlap(text_of(query), text_of(each)), -index) for index, each in enumerate(documents)]
    ranked = sorted(scores, reverse=True)[: body.get("top_n") or len(documents)]
    results: list[Object] = [{"index": -index, "relevance_score": score} for score, index in ranked]
    if body.get("return_documents"):
        for result in results:
            result["document"] = {"text": text_of(documents[result["index"]])}
    used = count(text_of(query)) + sum(count(text_of(each)) for each in documents)
    meta = {"billed_units": {"search_units": 1}}
    usage = {"prompt_tokens": used, "total_tokens": used}
    return json({"id": call.ident("rerank-"), "model": model, "results": results, "meta": meta, "usage": usage})


def _inputs(given: object) -> list[str]:
    """The inputs as texts: one string, many, one array of tokens, or many of those."""
    if isinstance(given, str) and given:
        return [given]
    if isinstance(given, list) and given:
        return [str(given)] if isinstance(given[0], int) else [text_of(each) or str(each) for each in given]
    raise VendorError(400, "'$.input' is invalid. Please check the API reference.", param="input")


def _pack(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _moderation(flagged: bool) -> Object:
    hit = {name: flagged and name == "violence" for name in _CATEGORIES}
    return {
        "flagged": flagged,
        "categories": hit,
        "category_scores": {name: 0.98 if found else 0.0001 for name, found in hit.items()},
        "category_applied_input_types": {name: [kind] for name, kind in _CATEGORIES.items()},
    }


def _overlap(query: str, document: str) -> float:
    wanted = set(query.lower().split())
    return round(len(wanted & set(document.lower().split())) / max(1, len(wanted)), 4)
