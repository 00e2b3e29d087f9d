"""Where a request for a model would go, and why: resolution, targets, breakers, limits, prices.

Invariant: asking changes nothing. Nothing is sent, no turn is taken, no limit and no breaker is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gproxyd.errors import Refusal
from gproxyd.gateway import agents
from gproxyd.gateway.agents import AgentAtWork
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.policy.limits import Limiter
from gproxyd.routing import names
from gproxyd.routing.agents import Place
from gproxyd.routing.health import Registry, Shown

_KINDS = ("rpm", "tpm", "concurrency")


def resolve(snapshot: Snapshot, model: str) -> tuple[str, AgentAtWork | None, list[Place]]:
    """The rule by which a name is found, the agent that it means if it does, and the targets. Raises Refusal (400)."""
    name = names.check(model)
    if name not in snapshot.aliases:
        agent = snapshot.agents.get(name)
        if agent is not None:
            rule = "agent" if name in snapshot.config.agents else "alias"
            return rule, agent, [member.place for member in agent.members]
    provider, slash, _ = name.partition("/")
    bare = not (slash and provider in snapshot.providers) and name not in snapshot.aliases
    if bare and snapshot.config.routing.bare_models == "catalog":
        agent = agents.of_bare_model(snapshot, name)
        if agent is not None:
            return "catalog", agent, [member.place for member in agent.members]
    resolved = names.aggregated(name, snapshot.aliases, snapshot.providers)
    rule = "alias" if name in snapshot.aliases else "provider/model"
    return rule, None, [Place(resolved.provider, resolved.model)]


def decision(snapshot: Snapshot, registry: Registry, limiter: Limiter, model: str) -> dict[str, Any]:
    """All that decides where a request of that name goes. Raises Refusal (400) if it goes nowhere."""
    rule, agent, places = resolve(snapshot, model)
    targets = [_target(snapshot, registry, limiter, place, model) for place in places]
    told: dict[str, Any] = {"rule": rule}
    if agent is not None:
        settings = agent.settings
        told["agent"] = {
            "name": agent.name,
            "strategy": settings.strategy,
            "required": list(settings.required),
            "sticky": agent.sticks,
            "overflow": settings.overflow,
            "system_prompt": settings.system_prompt is not None,
        }
        weights = {member.place: member.choice.weight for member in agent.members}
        for target, place in zip(targets, places, strict=True):
            target["weight"] = weights[place]
    ready = [one["ready_in_seconds"] for one in targets if one["usable"]]
    told |= {
        "targets": targets,
        "first": next((f"{one['provider']}/{one['model']}" for one in _in_order(agent, targets) if _now(one)), None),
        "ready_in_seconds": min(ready, default=None),
        "retries": {
            "max": snapshot.config.routing.retries.max if agent is not None else 0,
            "budget": snapshot.config.routing.retries.budget,
        },
    }
    return told


def _now(target: Mapping[str, Any]) -> bool:
    return bool(target["usable"] and not target["ready_in_seconds"])


def _in_order(agent: AgentAtWork | None, targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they would be asked, where that does not depend on the request or on chance."""
    if agent is None or agent.settings.strategy == "fallback":
        return targets
    if agent.settings.strategy == "cost":
        costs = {str(member.place): member.choice.cost for member in agent.members}
        return sorted(targets, key=lambda one: _cost(costs[f"{one['provider']}/{one['model']}"]))
    if agent.settings.strategy == "latency":
        return sorted(targets, key=lambda one: one["first_byte_ms"] or 0.0)
    return []


def _cost(known: int | None) -> float:
    return float("inf") if known is None else known


def _target(snapshot: Snapshot, registry: Registry, limiter: Limiter, place: Place, asked: str) -> dict[str, Any]:
    provider = snapshot.providers[place.provider]
    facts = snapshot.facts(*place, asked)
    now = registry.clock()
    health = registry.find(*place)
    median = registry.latencies.median(place, now)
    rules = snapshot.rules.get(place.provider, ())
    standing = limiter.standing(rules, asked)
    return {
        "provider": place.provider,
        "model": place.model,
        "usable": provider.usable,
        "faces": {dialect: f"{face.origin}{face.root.decode('ascii')}" for dialect, face in provider.faces.items()},
        "context": facts.context,
        "max_output": facts.max_output,
        "capabilities": sorted(snapshot.offers.facts(*place).capabilities),
        "breakers": {}
        if health is None
        else {label: _breaker(one) for label, one in registry.shown_of(health).items()},
        "keys": len(provider.credentials),
        "keys_refused": len(provider.credentials.parked()),
        "ready_in_seconds": 0.0 if health is None else round(health.ready_in(now), 3),
        "first_byte_ms": None if median is None else round(median * 1000, 1),
        "limits": {kind: limit for rule in rules for kind in _KINDS if (limit := rule.limit(kind))},  # type: ignore[arg-type]
        "requests_left": None if standing.requests is None else standing.requests.remaining,
        "tokens_left": None if standing.tokens is None else standing.tokens.remaining,
    }


def _breaker(one: Shown) -> dict[str, Any]:
    return {
        "state": one.state,
        "failures": one.failures,
        "opens": one.opens,
        "retry_in_seconds": None if one.retry_in is None else round(one.retry_in, 3),
        "rests_for_seconds": None if one.rests_for is None else round(one.rests_for, 3),
    }


def refusal(refused: Refusal) -> dict[str, Any]:
    """What a client would be told."""
    return {"error": {"status": refused.status, "code": refused.code, "message": refused.message}}
