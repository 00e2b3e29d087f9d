"""The table of vendors, read from `vendors.yaml`, which says what each field means.

A vendor may have several forms: with a project of Google Cloud its addresses are others than with an API key alone.
`Vendor.shaped` gives the form for the keys that a provider's section holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

from gproxyd.dialects.quirks import Answer, BodyError, Quirks
from gproxyd.types import DialectName

AuthPlace = Literal[
    "none", "bearer", "x-api-key", "x-goog-api-key", "api-key", "service-account", "bearer+x-goog-api-key"
]
"""Where a provider's key goes on a request. For a service account it is a token that is fetched with the key."""

Shape = Literal["data_id", "models_name", "list_id"]
"""`{"data": [{"id": ..}]}`, `{"models": [{"name": ..}]}`, `[{"id": ..}]`."""
Page = Literal["none", "after_id", "pageToken", "page_token"]
"""How its list goes on; by these names `discovery.py` knows them."""

STANDARD_ROOT: Mapping[DialectName, str] = {
    "openai_chat": "/v1",
    "openai_responses": "/v1",
    "anthropic": "/v1",
    "gemini": "/v1beta",
}
"""The version prefix that a dialect's own clients put before every path."""

RefusedKey = Answer
"""An answer that means the key is no good: its status, and a word in its body if the status is not enough."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """How a vendor is asked for its models. `face` None stands for the first one, `base` None for its root, `page` None
    for what the answers tell."""

    face: DialectName | None = None
    base: str | None = None
    path: str = "/models"
    shape: Shape = "data_id"
    page: Page | None = None


@dataclass(frozen=True, slots=True)
class Vendor:
    """One vendor, in one of its forms; the fields are those of the table.

    takes  keys of a provider's section that one of its forms has a place for
    forms  what is needed -> what is different then, in the order in which they add up
    """

    name: str
    base_url: str | None
    faces: Mapping[DialectName, str]
    auth: AuthPlace
    face_auth: Mapping[DialectName, AuthPlace]
    refusals: tuple[RefusedKey, ...]
    headers: Mapping[DialectName, Mapping[str, str]]
    query: str
    endpoints: Mapping[str, str]
    can: Mapping[DialectName, frozenset[str]]
    discovery: Discovery | None
    quirks: Quirks
    unverified: str | None
    takes: frozenset[str]
    forms: tuple[tuple[frozenset[str], Mapping[str, Any]], ...]
    entry: Mapping[str, Any] = field(repr=False)

    @property
    def stream_options(self) -> bool:
        """False where a chat request must not have that member."""
        return self.quirks.stream_options

    def shaped(self, given: Collection[str]) -> Vendor:
        """The form of this vendor for a section that gives these of the keys which it takes."""
        fitting = [different for needs, different in self.forms if needs <= set(given)]
        if not fitting:
            return self
        entry = dict(self.entry)
        for different in fitting:
            entry |= different
        return _vendor(self.name, entry)


def quirks_of(told: Mapping[str, Any]) -> Quirks:
    """Quirks as plain data has them. Raises TypeError for one that does not exist."""
    plain = dict(told)
    if "limited" in plain:
        plain["limited"] = _answers(plain["limited"])
    if "body_errors" in plain:
        plain["body_errors"] = tuple(_body_error(error) for error in plain["body_errors"])
    return Quirks(**plain)


def _answers(told: Sequence[Mapping[str, Any]]) -> tuple[Answer, ...]:
    return tuple(Answer(one["status"], one["contains"].encode() if one.get("contains") else None) for one in told)


def _body_error(told: Mapping[str, Any]) -> BodyError:
    codes = {meaning: frozenset(map(str, told.get(meaning, ()))) for meaning in ("limited", "refused", "failed")}
    return BodyError(told["at"], **codes)


_FIELDS = frozenset(
    "base_url faces auth face_auth headers query endpoints can discovery quirks refusals forms unverified".split()  # noqa: SIM905
)


def _vendor(name: str, entry: Mapping[str, Any]) -> Vendor:
    assert entry.keys() <= _FIELDS, name
    forms = entry.get("forms", ())
    discovery = entry.get("discovery", {})
    vendor = Vendor(
        name=name,
        base_url=entry["base_url"],
        faces=entry["faces"],
        auth=entry["auth"],
        face_auth=entry.get("face_auth", {}),
        refusals=_answers(entry.get("refusals", ({"status": 401},))),
        headers=entry.get("headers", {}),
        query=entry.get("query", ""),
        endpoints=entry.get("endpoints", {}),
        can={dialect: frozenset(names) for dialect, names in entry.get("can", {}).items()},
        discovery=None if discovery is None else Discovery(**discovery),
        quirks=quirks_of(entry.get("quirks", {})),
        unverified=entry.get("unverified"),
        takes=frozenset(key for form in forms for key in (*form["needs"], *form.get("takes", ()))),
        forms=tuple((frozenset(form["needs"]), _different(form)) for form in forms),
        entry=entry,
    )
    assert {vendor.auth, *vendor.face_auth.values()} <= set(get_args(AuthPlace)), name
    assert set(vendor.faces) | set(vendor.can) | set(vendor.headers) <= set(STANDARD_ROOT), name
    return vendor


def _different(form: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in form.items() if key not in ("needs", "takes")}


@cache
def vendors() -> Mapping[str, Vendor]:
    """Every known vendor by name. The file is part of the program, so a fault in it is a fault of the program."""
    table = yaml.safe_load(files("gproxyd.vendors").joinpath("vendors.yaml").read_text("utf-8"))
    return {name: _vendor(name, entry) for name, entry in table.items()}
