"""How vendors list their models: bytes in, facts out. Nobody is asked here.

Invariants: whatever an answer holds, reading it ends, raises nothing but NoList, and gives at most MOST_MODELS models,
each under a name that a model can bear; but for such names and printable titles no text of an answer gets any further.

Sources: the vendors' references of their lists (OpenAI, Anthropic, Gemini, Cohere, Mistral, Groq, OpenRouter, GitHub
Models) and vLLM's; what is not there is looked for under the names that the others use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import orjson

from gproxyd.errors import GproxydError
from gproxyd.units import NANO_PER_USD, format_usd, parse_usd
from gproxyd.vendors.prices import RATES, Price, Rates, price_of
from gproxyd.wire.target import MODEL_NAME

MOST_MODELS = 5000
MOST_PAGES = 100
MOST_BYTES = 10 * 2**20
"""Of one vendor's list, all pages together."""

_MOST_TOKENS = 10**9


class NoList(GproxydError):
    """An answer that is no list of models. The text says why, and never what stood in the answer."""


@dataclass(frozen=True, slots=True)
class Found:
    """One model as its vendor lists it; None = not told.

    context, max_output  tokens
    title                what it is called for people
    created              seconds since the epoch
    can, cannot          capabilities that it was said to have, and not to have
    """

    id: str
    context: int | None = None
    max_output: int | None = None
    price: Price | None = None
    title: str | None = None
    created: int | None = None
    can: frozenset[str] = frozenset()
    cannot: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Paging:
    """How a list goes on.

    first      what every page's query holds
    parameter  what bears the cursor in the query of the next page
    cursor     the member of an answer that holds the cursor
    more       the member that must be true for there to be another page
    """

    first: str
    parameter: str
    cursor: str
    more: str | None = None

    def following(self, answer: Mapping[str, Any]) -> str | None:
        """The query of the next page, if there is one."""
        cursor = answer.get(self.cursor)
        if not isinstance(cursor, str) or not cursor or len(cursor) > 4096:
            return None
        if self.more is not None and answer.get(self.more) is not True:
            return None
        head = self.first + "&" if self.first else ""
        return f"{head}{self.parameter}={quote(cursor, safe='', errors='replace')}"


_PAGINGS: Mapping[str, Paging] = {
    "after_id": Paging("limit=1000", "after_id", "last_id", "has_more"),
    "after": Paging("", "after", "last_id", "has_more"),
    "pageToken": Paging("pageSize=1000", "pageToken", "nextPageToken"),
    "page_token": Paging("page_size=1000", "page_token", "next_page_token"),
}
"""By the names of their parameters: Anthropic's, OpenAI's, Google's, Cohere's."""

_RECOGNISED = tuple(replace(_PAGINGS[name], first="") for name in ("after", "pageToken", "page_token"))
"""Where nobody says how a list goes on, its own members do."""


class Asking:
    """Asks one vendor for its list, page by page.

    query  what to ask next, without `?`; None once the list is complete
    """

    def __init__(self, page: str | None = None) -> None:
        """`page` is the parameter for the next one, "none" for a list of one page, None: the answers tell."""
        known = _PAGINGS.get(page or "")
        self._pagings = () if page == "none" else (known,) if known is not None else _RECOGNISED
        self._asked: set[str] = set()
        self._found: dict[str, Found] = {}
        self._pages = 0
        self.query: str | None = known.first if known is not None else ""

    @property
    def models(self) -> Sequence[Found]:
        return tuple(self._found.values())

    def feed(self, body: bytes) -> None:
        """One page. Raises NoList; what was found before stays."""
        self._pages += 1
        answer = _json(body)
        _add(self._found, _rows(answer))
        self.query = self._following(answer)
        if self.query is None and not self._found:
            raise NoList("its list names no model")

    def _following(self, answer: Any) -> str | None:
        """A cursor that came before, or too many pages, is a list without an end."""
        if not isinstance(answer, dict) or self._pages >= MOST_PAGES or len(self._found) >= MOST_MODELS:
            return None
        for paging in self._pagings:
            query = paging.following(answer)
            if query is not None and query not in self._asked:
                self._asked.add(query)
                return query
        return None


def _add(found: dict[str, Found], rows: Sequence[Any]) -> None:
    for row in rows:
        model = _model(row)
        if model is not None and len(found) < MOST_MODELS:
            found.setdefault(model.id, model)


def read(rows: Sequence[Any]) -> Sequence[Found]:
    """The models of the rows that `write` made, or of a vendor's."""
    found: dict[str, Found] = {}
    _add(found, rows)
    return tuple(found.values())


def write(models: Sequence[Found]) -> list[dict[str, Any]]:
    """The models as rows that `read` understands: for keeping them."""
    return [_row(model) for model in models]


def _row(model: Found) -> dict[str, Any]:
    told = {
        "id": model.id,
        "context_window": model.context,
        "max_output_tokens": model.max_output,
        "display_name": model.title,
        "created": model.created,
        "capabilities": dict.fromkeys(sorted(model.can), True) | dict.fromkeys(sorted(model.cannot), False),
        "pricing": model.price and pricing(model.price),
    }
    return {name: value for name, value in told.items() if value not in (None, {})}


UNIT = "usd_per_million_tokens"


def pricing(rates: Rates) -> dict[str, str]:
    """What tokens cost, as decimal texts; what is unknown is left out."""
    told = {name: format_usd(rate) for name in RATES if (rate := getattr(rates, name)) is not None}
    return {**told, "unit": UNIT} if told else {}


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise NoList("its answer is no JSON") from None


_LISTS = ("data", "models", "publisherModels", "model_names")
_IDS = ("id", "model", "name")


def _rows(answer: Any) -> Sequence[Any]:
    if isinstance(answer, list):
        return answer
    if isinstance(answer, dict):
        for name in _LISTS:
            if isinstance(rows := answer.get(name), list):
                return rows
    raise NoList("its answer holds no list of models")


_GOOGLE = re.compile(r"(?:publishers/[a-z0-9-]+/)?models/")
"""What Google puts before the names in its lists, and wants in front of none in a request."""


def _model(row: Any) -> Found | None:
    """One model, or None for what cannot be called."""
    if isinstance(row, str):
        name = _name(row)
        return Found(name) if name else None
    if not isinstance(row, dict):
        return None
    member = next((member for member in _IDS if isinstance(row.get(member), str)), None)
    name = _name(row[member]) if member is not None else None
    if name is None:
        return None
    can, cannot = _abilities(row)
    return Found(
        name,
        context=_tokens(row, _CONTEXT),
        max_output=_tokens(row, _OUTPUT),
        price=_price(row.get("pricing")),
        title=_title(row, member),
        created=_created(row),
        can=can - cannot,
        cannot=cannot,
    )


def _name(text: str) -> str | None:
    name = text[match.end() :] if (match := _GOOGLE.match(text)) else text
    return name if MODEL_NAME.fullmatch(name) else None


_Path = tuple[str, ...]

_CONTEXT: Sequence[_Path] = (
    ("context_window",),
    ("context_length",),
    ("max_context_length",),
    ("max_model_len",),
    ("inputTokenLimit",),
    ("max_input_tokens",),
    ("limits", "max_input_tokens"),
    ("top_provider", "context_length"),
)
_OUTPUT: Sequence[_Path] = (
    ("max_output_tokens",),
    ("max_completion_tokens",),
    ("outputTokenLimit",),
    ("limits", "max_output_tokens"),
    ("top_provider", "max_completion_tokens"),
)


def _at(row: Any, path: _Path) -> Any:
    for name in path:
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _tokens(row: Mapping[str, Any], paths: Sequence[_Path]) -> int | None:
    for path in paths:
        if (count := _count(_at(row, path))) is not None:
            return count
    # Anthropic's, which elsewhere may mean anything.
    return _count(row.get("max_tokens")) if paths is _OUTPUT and "max_input_tokens" in row else None


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= _MOST_TOKENS:
        return None
    return int(value)


def _title(row: Mapping[str, Any], member: str | None) -> str | None:
    for name in ("display_name", "displayName", "name"):
        text = row.get(name)
        if name != member and isinstance(text, str) and 0 < len(text) <= 128 and text.isprintable():
            return text
    return None


def _created(row: Mapping[str, Any]) -> int | None:
    value = row.get("created")
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**33:
        return value
    text = row.get("created_at")
    if not isinstance(text, str) or len(text) > 40:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    return seconds if 0 < seconds < 2**33 else None


CAPABILITIES = frozenset(
    {
        "vision",
        "audio_in",
        "audio_out",
        "tools",
        "parallel_tools",
        "reasoning",
        "json_schema",
        "prompt_caching",
        "pdf",
        "web_search",
        "computer_use",
    }
)
"""As models.yaml calls them."""

_WORDS: Mapping[str, str] = {
    **{name: name for name in CAPABILITIES},
    "image": "vision",
    "image_input": "vision",
    "audio": "audio_in",
    "file": "pdf",
    "pdf_input": "pdf",
    "tool-calling": "tools",
    "function_calling": "tools",
    "structured_outputs": "json_schema",
    "thinking": "reasoning",
}
"""As vendors call them."""

_ABILITIES: Sequence[_Path] = (
    ("capabilities",),
    ("features",),
    ("supported_parameters",),
    ("supported_input_modalities",),
    ("architecture", "input_modalities"),
)


def _abilities(row: Mapping[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """What the model can, and what it cannot. A word that is missing from a list says nothing."""
    told: dict[str, bool] = {}
    for path in _ABILITIES:
        for word, yes in _words(_at(row, path)):
            if word in _WORDS:
                told[_WORDS[word]] = told.get(_WORDS[word], False) or yes
    if isinstance(thinks := row.get("thinking"), bool):
        told["reasoning"] = thinks
    can = frozenset(name for name, yes in told.items() if yes)
    return can, frozenset(told) - can


def _words(value: Any) -> Iterator[tuple[str, bool]]:
    if isinstance(value, list):
        yield from ((word, True) for word in value if isinstance(word, str))
    elif isinstance(value, dict):
        for word, told in value.items():
            yes = told.get("supported") if isinstance(told, dict) else told
            if isinstance(yes, bool):
                yield word, yes


_PER_TOKEN: Mapping[str, str] = {
    "prompt": "input",
    "completion": "output",
    "input_cache_read": "cache_read",
    "input_cache_write": "cache_write",
    "internal_reasoning": "reasoning",
}
"""OpenRouter's names of what has a price; in US dollars per token, as decimal texts."""

_DOLLARS = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,18})?")


def _price(value: Any) -> Price | None:
    """A price whose unit is certain: it says so, as this gateway's own do, or is in OpenRouter's words, per token.

    Tokens that are free beside something else that is not are no free tokens: such a price is unknown.
    """
    if not isinstance(value, dict):
        return None
    if value.get("unit") == UNIT:
        own = {name: rate for name in RATES if (rate := _per_million(value.get(name))) is not None}
        return price_of(Rates(**own)) if own else None
    texts = {name: text for name, text in value.items() if isinstance(text, str) and _DOLLARS.fullmatch(text)}
    rates = {kind: _per_token(texts[name]) for name, kind in _PER_TOKEN.items() if name in texts}
    if "input" not in rates:
        return None
    free = not any(rates.values())
    if free and any(Decimal(text) for name, text in texts.items() if name not in _PER_TOKEN):
        return None
    # A rate of nothing for what caches hold or thoughts cost means that there is none of its own.
    return price_of(Rates(**{kind: rate for kind, rate in rates.items() if rate or kind in ("input", "output")}))


def _per_million(text: Any) -> int | None:
    try:
        return parse_usd(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _per_token(text: str) -> int:
    return int((Decimal(text) * NANO_PER_USD * 10**6).to_integral_value())
