"""What would become of a request, and what there is to ask for, told without sending anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gproxyd.errors import Refusal
from gproxyd.gateway.shelves import Entry
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.host import decisions
from gproxyd.policy.callers import Caller, authorise_endpoint, authorise_method
from gproxyd.policy.limits import Limiter
from gproxyd.policy.quotas import Account, Quotas
from gproxyd.routing.health import Registry
from gproxyd.units import format_usd
from gproxyd.vendors.prices import RATES, Price, Rates

Listed = Callable[[str], Mapping[str, Any]]


def providers(snapshot: Snapshot, listed: Listed | None = None) -> Sequence[Mapping[str, Any]]:
    """Every configured provider: where its faces are, whether it is switched on, how many models it offers, and what
    `listed` knows of its vendor's list. No secret but by its name.
    """
    told = []
    for name, provider in snapshot.providers.items():
        section = snapshot.config.providers[name]
        told.append(
            {
                "name": name,
                "vendor": section.vendor,
                "usable": provider.usable,
                "faces": {
                    dialect: f"{face.origin}{face.root.decode('ascii')}" for dialect, face in provider.faces.items()
                },
                "credentials": list(section.credentials),
                "models": len(snapshot.offers.of_provider(name)),
                "discovery": listed(name) if listed is not None else None,
            }
        )
    return told


def models(snapshot: Snapshot) -> Sequence[Mapping[str, Any]]:
    """Every model, agent and alias, as `GET /v1/models` calls them, and who says what of it."""
    return [_model(entry) for entry in snapshot.shelves.everything.by_id.values()]


def _model(entry: Entry) -> Mapping[str, Any]:
    facts = entry.facts
    own_price = facts is not None and entry.price is not facts.price
    return {
        "id": entry.id,
        "provider": entry.provider,
        "alias_of": entry.alias_of,
        "context": facts and facts.context,
        "max_output": facts and facts.max_output,
        "price": price(entry.price),
        "capabilities": sorted(facts.capabilities) if facts is not None else [],
        "mode": facts and facts.mode,
        "deprecated": facts and facts.deprecated,
        "origin": "configured" if facts is None or entry.alias_of else facts.origin,
        "sources": {**(facts.sources if facts else {}), **({"price": "configured"} if own_price else {})},
    }


def explain(
    snapshot: Snapshot,
    quotas: Quotas,
    limiter: Limiter,
    registry: Registry,
    model: str,
    user: str | None,
    endpoint: str | None,
) -> Mapping[str, Any]:
    """What the aggregated form makes of a model's name: targets and what is known of them, and for a user what is
    allowed and left.

    `endpoint` as a key may be narrowed to it ("POST /v1/chat/completions"). Raises Refusal (404) for an unknown user.
    """
    told: dict[str, Any] = {"model": model, "user": user, "endpoint": endpoint}
    try:
        told |= decisions.decision(snapshot, registry, limiter, model)
    except Refusal as refused:
        return told | decisions.refusal(refused)
    for target in told["targets"]:
        target["price"] = price(snapshot.facts(target["provider"], target["model"], model).price)
    first = told["targets"][0] if told["targets"] else {}
    told |= {name: first.get(name) for name in ("context", "max_output", "price")}
    if user is not None:
        told["callers"] = [_standing(caller, quotas, limiter, model, endpoint) for caller in _keys_of(snapshot, user)]
        if not told["callers"]:
            raise Refusal("not_found", "no key of a user of that name is known", param="user")
    return told


def _keys_of(snapshot: Snapshot, user: str) -> Iterable[Caller]:
    return sorted({caller for caller in snapshot.callers.values() if caller.user == user}, key=lambda one: one.key)


def _standing(caller: Caller, quotas: Quotas, limiter: Limiter, model: str, endpoint: str | None) -> Mapping[str, Any]:
    """How one key stands towards a model."""
    requests, tokens = limiter.standing(caller.rules, model)
    return {
        "key": caller.key,
        "enabled": caller.enabled,
        "may_call": caller.may_model(model) and (endpoint is None or _may_use(caller, endpoint)),
        "limits": [
            {kind: rule.limit(kind) for kind in ("rpm", "rpd", "tpm", "concurrency")} | {"model": rule.model}
            for rule in caller.rules
        ],
        "requests_left": None if requests is None else requests.remaining,
        "tokens_left": None if tokens is None else tokens.remaining,
        "accounts": [_account(account, quotas) for account in caller.accounts],
    }


def _may_use(caller: Caller, endpoint: str) -> bool:
    method, _, path = endpoint.partition(" ")
    try:
        authorise_method(caller, method)
        authorise_endpoint(caller, method, path)
    except Refusal:
        return False
    return True


def _account(account: Account, quotas: Quotas) -> Mapping[str, Any]:
    remaining = quotas.remaining(account)
    return {
        "name": account.name,
        "period": account.period,
        "usd": None if account.limit is None else format_usd(account.limit),
        "spent_usd": format_usd(quotas.spent(account)),
        "remaining_usd": None if remaining is None else format_usd(remaining),
    }


def price(of: Price | None) -> Mapping[str, Any] | None:
    """US dollars per million tokens, as decimal texts; what is unknown is left out."""
    if of is None:
        return None
    told: dict[str, Any] = _rates(of)
    if of.above:
        told["above"] = [{"tokens": tokens, **_rates(rates)} for tokens, rates in of.above]
    for tier, rates in of.tiers.items():
        told[tier] = _rates(rates)
    return told


def _rates(rates: Rates) -> dict[str, str]:
    return {name: format_usd(rate) for name in RATES if (rate := getattr(rates, name)) is not None}
