"""The vendors' own SDKs as clients: in which forms they address a provider, and what the vendor must have seen.

The scripted vendor answers the same request with the same bytes, ids included, and the gateway replaces nothing but
the model's name. So whatever an SDK makes of the gateway's answer must be what it makes of the vendor's own, but for
that name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel

from gproxyd.host.demo import DemoVendor, Seen
from tests.support.running import CLIENT_KEY, PROVIDER_KEY, Running, until

Json = Any

DIRECT = {"x-direct": "1"}
"""What a client of the vendor itself sends along, so that its requests are not taken for the gateway's."""

CREDENTIAL_HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie", "proxy-authorization")


@dataclass(frozen=True)
class Form:
    """One way to address a provider.

    path     what stands between the gateway's address and the vendor's own paths
    prefix   what stands before the upstream's name of a model
    aliases  upstream's name -> the name to send in its place
    home     headers that pick the provider where a request names no model
    """

    name: str
    path: str = ""
    prefix: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    home: Mapping[str, str] = field(default_factory=dict)

    def model(self, upstream: str) -> str:
        """What the client sends for the upstream's `upstream`, and must see in every reply."""
        return self.aliases.get(upstream, self.prefix + upstream)


def forms(provider: str, aliases: Mapping[str, str]) -> list[Form]:
    """All ways to one provider: aggregated and scoped, by full names and by aliases."""
    home = {"x-gproxyd-provider": provider}
    return [
        Form("aggregated", prefix=f"{provider}/", home=home),
        Form("aggregated-alias", prefix=f"{provider}/", aliases=aliases, home=home),
        Form("scoped", path=f"/{provider}"),
        Form("scoped-alias", path=f"/{provider}", aliases=aliases),
    ]


def plain(told: Json) -> Json:
    """What an SDK returned, as plain values. Headers are left out: they tell times and ids of their own."""
    if isinstance(told, BaseModel):
        return told.model_dump(exclude={"sdk_http_response"}, warnings=False)
    return [plain(each) for each in told] if isinstance(told, list) else told


_PLACES = (("model",), ("model_version",), ("response", "model"), ("message", "model"))


def parted(told: Json) -> tuple[list[str], Json]:
    """The models' names at the places where the dialects have them, and everything else."""
    value = plain(told)
    names: list[str] = []
    for root in value if isinstance(value, list) else [value]:
        for *above, last in _PLACES:
            holder = root
            for member in above:
                holder = holder.get(member) if isinstance(holder, dict) else None
            if isinstance(holder, dict) and holder.get(last) is not None:
                names.append(holder.pop(last))
    return names, value


def assert_alike(told: Json, direct: Json, *, sent: str, upstream: str) -> None:
    """`told` by the gateway is what the vendor tells `direct`ly, and bears `sent` wherever that bears `upstream`."""
    shown, rest = parted(told)
    own, usual = parted(direct)
    assert set(own) <= {upstream}
    assert shown == [sent] * len(own)
    assert rest == usual


_SETTINGS = ("OPENAI_", "ANTHROPIC_", "GOOGLE_", "GEMINI_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def unset() -> Iterator[None]:
    """For a fixture: the environment without what the SDKs would read from it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in tuple(os.environ):
            if name.upper().startswith(_SETTINGS):
                patch.delenv(name)
        yield


def recorded(vendor: DemoVendor, place: str) -> Iterator[list[Seen]]:
    """For a fixture: what the vendor sees during one test. Behind it, the gateway's requests are searched for keys.

    `place` is the header in which the provider's key belongs.
    """
    vendor.seen.clear()
    yield vendor.seen  # type: ignore[misc]
    for seen in tuple(vendor.seen):
        if not seen.header("x-direct"):
            assert_clean(seen, place)


def assert_clean(seen: Seen, place: str) -> None:
    """The request bears exactly one credential, the provider's, and nothing that is for the gateway alone."""
    key = f"Bearer {PROVIDER_KEY}" if place == "authorization" else PROVIDER_KEY
    found = [(name, value) for name in CREDENTIAL_HEADERS for value in seen.header(name)]
    assert found == [(place, key)]
    head = b"\n".join([seen.target, *(name.lower() + b": " + value for name, value in seen.headers)])
    assert CLIENT_KEY.encode() not in head + seen.body
    assert b"x-gproxyd-" not in head and b"key=" not in seen.target and b"provider=" not in seen.target


def told_nothing(error: Exception, answer: str) -> None:
    """Neither the SDK's error nor the answer behind it says what the vendor said of the gateway's key."""
    for text in (str(error), answer):
        assert PROVIDER_KEY not in text and CLIENT_KEY not in text
        assert PROVIDER_KEY[:3] not in text and "****" not in text and "Incorrect API key" not in text


def log_line(gateway: Running, request_id: str) -> Json:
    """The log line of one request, once it has been written; nothing in the log up to there is a key."""

    def look() -> Json:
        text = gateway.log_path.read_text()
        assert PROVIDER_KEY not in text and CLIENT_KEY not in text
        whole = text.split("\n")[:-1]  # what stands behind the last line end may still be half a line
        lines = [json.loads(line) for line in whole if request_id in line]
        return next((line for line in lines if line["event"] == "request"), None)

    return until(look)
