"""What is known of vendors' models, read from `models.yaml` when first asked for (about 10 ms for 1,262 of them)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

import yaml

from gproxyd.units import parse_usd
from gproxyd.vendors.prices import RATES, Price, Rates, price_of

# libyaml reads the table in 8 ms, the Python reader in 100.
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_TIERS = ("flex", "priority")

# Vendors that serve others' models at their list prices.
_SHELVES: Mapping[str, tuple[str, ...]] = {"vertex": ("gemini", "anthropic")}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model. `context` and `max_output` in tokens, None = unknown; `price` None = unknown.

    mode         what it is called for: "chat", "responses", "embedding", "rerank", "image_generation", ...
    deprecated   the day from which the vendor may refuse it, "2026-11-30"
    """

    mode: str
    context: int | None
    max_output: int | None
    price: Price | None
    capabilities: frozenset[str]
    deprecated: str | None


@lru_cache(maxsize=4096)
def facts(vendor: str, model: str) -> ModelFacts | None:
    """What is known of a vendor's model by that id, or by a plainer one that means the same (see `_ids`)."""
    for shelf in _SHELVES.get(vendor, (vendor,)):
        models = _table().get(shelf, {})
        for name in _ids(model):
            if name in models:
                return _read(models[name])
    return None


@cache
def _table() -> Mapping[str, Mapping[str, str]]:
    """Vendor -> model -> its line. The file is part of the program, so a fault in it is a fault of the program."""
    text = files("gproxyd.vendors").joinpath("models.yaml").read_text("utf-8")
    table: Mapping[str, Mapping[str, str]] = yaml.load(text, _Loader)  # noqa: S506 - both loaders are safe ones
    return table


_PREFIX = re.compile(r"(?:publishers/[a-z0-9-]+/)?models/")
_DAY = r"20[0-9]{2}(?P<dash>-?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12][0-9]|3[01])"
_SNAPSHOT = re.compile(rf"(.+)-(?:{_DAY}|latest)")


def _ids(model: str) -> Iterator[str]:
    """The id itself, then ids that name the same model: without Google's path, a version behind `@` or its place in
    the name, a whole date, `-latest`.

    Snapshots that have a price of their own are in the table. Shorter suffixes ("-0905", "-001", "-mini") may well
    be other models and stay.
    """
    yield model
    name = _PREFIX.sub("", model, count=1) if _PREFIX.match(model) else model
    yield name
    if "@" in name:
        base, _, version = name.partition("@")
        yield f"{base}-{version}"
        yield base
        name = base
    if match := _SNAPSHOT.fullmatch(name):
        yield match[1]


_WORD = re.compile(r"(\w+)(?:=(\S+)|\(([^)]*)\))?")


def _read(line: str) -> ModelFacts:
    plain: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name, value, inside in _WORD.findall(line):
        if value:
            plain[name] = value
        elif inside:
            groups.setdefault(name, []).append(inside)
    return ModelFacts(
        line.split(None, 1)[0],
        int(plain["context"]) if "context" in plain else None,
        int(plain["max_output"]) if "max_output" in plain else None,
        _price(groups),
        frozenset(" ".join(groups.get("can", ())).split()),
        plain.get("deprecated"),
    )


def _price(groups: Mapping[str, list[str]]) -> Price | None:
    tiers = {tier: _rates(_pairs(groups[tier][0])) for tier in _TIERS if tier in groups}
    steps = [_pairs(step) for step in groups.get("above", ())]
    if "usd" not in groups and not tiers:
        return None
    standard = _rates(_pairs(groups["usd"][0])) if "usd" in groups else Rates()
    return price_of(standard, [(int(step["tokens"]), _rates(step)) for step in steps], tiers)


def _pairs(inside: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in inside.split())


def _rates(pairs: Mapping[str, str]) -> Rates:
    return Rates(**{name: parse_usd(pairs[name]) for name in RATES if name in pairs})
