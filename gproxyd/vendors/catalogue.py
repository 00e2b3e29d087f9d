"""The table of vendors, read from `vendors.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

from gproxyd.types import DialectName

AuthPlace = Literal["none", "bearer", "x-api-key", "x-goog-api-key", "api-key"]
"""Where a provider's key goes on a request."""

STANDARD_ROOT: Mapping[DialectName, str] = {
    "openai_chat": "/v1",
    "openai_responses": "/v1",
    "anthropic": "/v1",
    "gemini": "/v1beta",
}
"""The version prefix that a dialect's own clients put before every path."""


@dataclass(frozen=True, slots=True)
class RefusedKey:
    """An answer that means the key is no good: its status, and a word in its body if the status is not enough."""

    status: int
    contains: bytes | None = None


@dataclass(frozen=True, slots=True)
class Vendor:
    """One vendor. `faces` says what replaces a dialect's standard root, below `base_url`.

    `stream_options` is False where a chat request must not have that member.
    """

    name: str
    base_url: str | None
    faces: Mapping[DialectName, str]
    auth: AuthPlace
    face_auth: Mapping[DialectName, AuthPlace]
    refusals: tuple[RefusedKey, ...]
    stream_options: bool = True


def _vendor(name: str, entry: Mapping[str, Any]) -> Vendor:
    refusals = tuple(
        RefusedKey(refusal["status"], refusal["contains"].encode() if "contains" in refusal else None)
        for refusal in entry["refusals"]
    )
    vendor = Vendor(
        name,
        entry["base_url"],
        entry["faces"],
        entry["auth"],
        entry.get("face_auth", {}),
        refusals,
        entry.get("stream_options", True),
    )
    assert vendor.auth in get_args(AuthPlace), name
    assert set(vendor.faces) <= set(STANDARD_ROOT), name
    return vendor


@cache
def vendors() -> Mapping[str, Vendor]:
    """Every known vendor by name. The file is part of the program, so a fault in it is a fault of the program."""
    table = yaml.safe_load(files("gproxyd.vendors").joinpath("vendors.yaml").read_text("utf-8"))
    return {name: _vendor(name, entry) for name, entry in table.items()}
