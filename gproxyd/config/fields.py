"""The scalar types of the configuration: how one value is written, checked and held.

Text that stands for something else (a duration, a size, money, an address, a time, a digest) becomes that thing at
once. The sentences of the ValueErrors raised here reach the administrator; none of them quotes the value.

Names that refer to something elsewhere are checked against `Known`, which the loader passes as pydantic's
validation context; without a context they are only checked for their form.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from gproxyd.config import addresses
from gproxyd.units import parse_duration, parse_size, parse_usd
from gproxyd.wire.headers import CREDENTIALS, FRAMING, HOP_BY_HOP
from gproxyd.wire.target import MODEL_NAME, RESERVED

T = TypeVar("T")

PROVIDER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_PERSON_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_SECRET_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,99}")
_VISIBLE = re.compile(r"[!-~]{1,256}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_VENDOR_KEY = re.compile(r"(?:sk-|AIza|gsk_|xai-)[A-Za-z0-9_-]{16}")
_KEY_LIKE = re.compile(r"\Ask-|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{16}")
# The letters of a model's name, and the two that stand for others.
_MODEL_GLOB = re.compile(r"[A-Za-z0-9@_~.:/+=,\[\]*?-]{1,256}")
_ENDPOINT_GLOB = re.compile(r"(?:\*|[A-Z][A-Z-]{0,19}) /[!-~]{0,1023}")
# RFC 9110, 5.6.2: token; 5.5: field values, here without tabs and bytes beyond ASCII.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
# RFC 3339, 5.6, with the space that its note allows for the T.
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)


@dataclass(frozen=True, slots=True)
class Known:
    """What the names in a configuration may refer to. `vendors` says of each whether it has its own base URL."""

    vendors: Mapping[str, bool]
    providers: frozenset[str]
    aliases: frozenset[str]
    agents: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Target:
    """A model at a provider, by the id that the provider itself uses; an agent where `provider` is empty."""

    provider: str
    model: str

    def __str__(self) -> str:
        return f"{self.provider}/{self.model}" if self.provider else self.model


def looks_like_key(text: str) -> bool:
    """Whether the text may be an API key, so that it had better not be printed. Rather once too often."""
    return _KEY_LIKE.search(text) is not None or _VENDOR_KEY.match(text) is not None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to put behind a sentence, or nothing."""
    near = difflib.get_close_matches(word[:100], sorted(name for name in known if not looks_like_key(name)), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def _known(info: ValidationInfo) -> Known | None:
    return info.context if isinstance(info.context, Known) else None


def _from_text(parse: Callable[[str], T]) -> BeforeValidator:
    """Take text only. Whatever else is given meets the sentence that the empty text meets, which no form allows."""

    def convert(value: Any) -> T:
        return parse(value if isinstance(value, str) else "")

    return BeforeValidator(convert)


def _empty_section(value: Any) -> Any:
    """A heading with nothing under it is a section without keys."""
    return {} if value is None else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _not_empty(items: tuple[T, ...]) -> tuple[T, ...]:
    if not items:
        raise ValueError("must hold an entry; leave the key out, or give null, where it narrows nothing")
    return items


Section = BeforeValidator(_empty_section)
"""For mappings: null stands for no entries."""
Items = BeforeValidator(_as_tuple)
"""For tuples: YAML gives lists."""
Some = Annotated[tuple[T, ...], Items, AfterValidator(_not_empty)]
"""For tuples that hold one item at least."""


def _longer_than_nothing(seconds: float) -> float:
    if not seconds:
        raise ValueError("must be longer than 0s")
    return seconds


def _more_than_nothing(size: int) -> int:
    if not size:
        raise ValueError("must be larger than 0B")
    return size


Duration = Annotated[float, _from_text(parse_duration)]
Timeout = Annotated[float, _from_text(parse_duration), AfterValidator(_longer_than_nothing)]
Size = Annotated[int, _from_text(parse_size), AfterValidator(_more_than_nothing)]
NanoUsd = Annotated[int, _from_text(parse_usd)]
Listen = Annotated[addresses.ListenAddress, _from_text(addresses.parse_listen)]
Network = Annotated[addresses.Network, _from_text(addresses.parse_network)]
Url = Annotated[str, AfterValidator(addresses.parse_url)]
ProxyUrl = Annotated[str, AfterValidator(addresses.parse_proxy)]


def _time(text: str) -> datetime:
    try:
        if _TIME.fullmatch(text):
            return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError('must be a time with its offset (RFC 3339), as in "2027-01-01T00:00:00Z"')


def _digest(text: str) -> bytes:
    if not _DIGEST.fullmatch(text):
        raise ValueError("must be the SHA-256 digest of a key: 64 hexadecimal digits")
    return bytes.fromhex(text)


def _token(text: str) -> bytes:
    if not _VISIBLE.fullmatch(text):
        raise ValueError("must be a key of 1 to 256 visible ASCII characters, in quotes")
    return hashlib.sha256(text.encode("ascii")).digest()


def _database(text: str) -> Path:
    form, path = text[:10], text[10:]
    # SQLite would read parameters out of a URL, and two programs two files out of an escape.
    plain = path.isprintable() and not set("?#%") & set(path) and not {".", ".."} & set(path.split("/"))
    if form != "sqlite:///" or not path.strip("/ ") or path.endswith("/") or not plain:
        raise ValueError(
            'must be "sqlite:///" and the absolute path of a file, as in "sqlite:///var/lib/gproxyd/gproxyd.db"'
        )
    # Some tools write an absolute path with one slash more.
    return Path("/" + path.lstrip("/"))


Database = Annotated[Path, _from_text(_database)]
Time = Annotated[datetime, _from_text(_time)]
Digest = Annotated[bytes, _from_text(_digest)]
Token = Annotated[bytes, _from_text(_token)]
"""A caller's key in plain text; only its SHA-256 digest is kept."""


def _model_id(text: str) -> str:
    if not MODEL_NAME.fullmatch(text):
        raise ValueError("must be what a client can send as a model: 1 to 256 visible characters, no quotes or spaces")
    return text


def _provider_name(name: str) -> str:
    if not PROVIDER_NAME.fullmatch(name):
        raise ValueError("is no name for a provider; use up to 63 of a-z, 0-9, '-' and '_', a letter or digit first")
    if name in RESERVED:
        raise ValueError("is a path of the gateway itself; give the provider another name")
    return name


def _person_name(name: str) -> str:
    if not _PERSON_NAME.fullmatch(name):
        raise ValueError("is no valid name; use up to 63 of A-Z, a-z, 0-9 and '._@-', a letter or digit first")
    return name


def _user_name(name: str) -> str:
    if name == "primary":
        raise ValueError("is the name of the built-in administrator; give the user another name")
    return _person_name(name)


def _secret_name(name: str) -> str:
    if not _SECRET_NAME.fullmatch(name):
        raise ValueError("must be the name of a secret: a plain file name of letters, digits and '._@-'")
    if _VENDOR_KEY.match(name):
        raise ValueError("must be the name of a secret, and this looks like a key itself; put the key into a file")
    return name


def _vendor(name: str, info: ValidationInfo) -> str:
    known = _known(info)
    if known is not None and name not in known.vendors:
        hint = did_you_mean(name, known.vendors)
        raise ValueError(f"must be a known vendor (the provider's own name, if not given){hint}")
    return name


def _provider_ref(name: str, info: ValidationInfo) -> str:
    known = _known(info)
    if known is not None and name not in known.providers:
        raise ValueError(f"names a provider that is not configured{did_you_mean(name, known.providers)}")
    return name


def _target(text: str, info: ValidationInfo) -> Target:
    known = _known(info)
    if known is not None and text and text in known.aliases:
        raise ValueError("leads to another alias; name the provider and model that one stands for")
    if known is not None and text in known.agents:
        return Target("", text)
    provider, slash, model = text.partition("/")
    if not slash or not MODEL_NAME.fullmatch(model):
        raise ValueError("must be a provider and a model, as in openai-main/gpt-4.1-mini")
    return Target(_provider_ref(provider, info), model)


def _target_value(value: Any, info: ValidationInfo) -> Target:
    return value if isinstance(value, Target) else _target(value if isinstance(value, str) else "", info)


def target_alone(value: Any, info: ValidationInfo) -> Any:
    """The section that an alias is; the target may be written alone in its place."""
    return value if isinstance(value, dict) else {"target": _target_value(value, info)}


def agent_target(text: str, info: ValidationInfo) -> str:
    """A target of an agent, which is no alias and no agent itself; a provider that it names must be configured."""
    known = _known(info)
    if known is None:
        return text
    if text in known.aliases or text in known.agents:
        raise ValueError("leads to an alias or agent; name the provider and model that are meant")
    provider, slash, _ = text.partition("/")
    if slash and not set("*?") & set(provider) and provider not in known.providers:
        _provider_ref(provider, info)
    return text


def _model_glob(text: str) -> str:
    if not _MODEL_GLOB.fullmatch(text):
        raise ValueError('must be a model\'s name, where * and ? stand for others, as in "openai-main/*" (no spaces)')
    return text


def _endpoint_glob(text: str) -> str:
    if not _ENDPOINT_GLOB.fullmatch(text):
        raise ValueError(
            "must be a method in capitals (or *), a space and a path, "
            'as in "POST /v1/chat/completions" or "* /proxy/anthropic/*"'
        )
    return text


ModelId = Annotated[str, AfterValidator(_model_id)]
AliasName = Annotated[str, AfterValidator(_model_id)]
AgentName = Annotated[str, AfterValidator(_model_id)]
ModelGlob = Annotated[str, AfterValidator(_model_glob)]
EndpointGlob = Annotated[str, AfterValidator(_endpoint_glob)]
ProviderName = Annotated[str, AfterValidator(_provider_name)]
UserName = Annotated[str, AfterValidator(_user_name)]
KeyName = Annotated[str, AfterValidator(_person_name)]
SecretName = Annotated[str, AfterValidator(_secret_name)]
VendorName = Annotated[str, AfterValidator(_vendor)]
ProviderRef = Annotated[str, AfterValidator(_provider_ref)]
ModelTarget = Annotated[Target, BeforeValidator(_target_value)]


def _header_name(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise ValueError("is no name for a header; use letters, digits and '-'")
    lower = name.lower().encode("ascii")
    if lower in CREDENTIALS or lower == b"proxy-authorization":
        raise ValueError("carries a credential; name the secret under `credentials` instead")
    if lower in HOP_BY_HOP | FRAMING:
        raise ValueError("belongs to the connection and is set by the gateway itself")
    return name


def _header_value(value: str) -> str:
    if not _FIELD_VALUE.fullmatch(value):
        raise ValueError("must be printable ASCII without a space at either end")
    return value


def _plain_header(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise ValueError("is no name for a header; use letters, digits and '-'")
    return name.lower()


PlainHeader = Annotated[str, AfterValidator(_plain_header)]
"""The name of a header that is only read, in lower case."""
HeaderName = Annotated[str, AfterValidator(_header_name)]
HeaderValue = Annotated[str, AfterValidator(_header_value)]
