"""What a request's method, target and headers say: who calls, what for, in which dialect.

The order is the contract's: a request that cannot be read (400, 405, 417, 426), then the key (401), then the role
(403), then whether there is such an endpoint (404, 405). Nothing is said about providers to somebody without a key.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from gproxyd.config.addresses import is_address
from gproxyd.errors import Refusal
from gproxyd.gateway.call import Call
from gproxyd.gateway.refusal import dialect_of_headers
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.policy.callers import Caller, authenticate, authorise_endpoint, authorise_method, presented_key
from gproxyd.types import DialectName
from gproxyd.wire import target as targets
from gproxyd.wire.headers import Headers
from gproxyd.wire.operations import Operation
from gproxyd.wire.target import Target


@dataclass(slots=True, eq=False)
class Admission:
    """An admitted request, its body not looked at yet. Holds for every other request with the same head, too."""

    snapshot: Snapshot
    caller: Caller
    target: Target
    operation: Operation | None
    dialect: DialectName
    headers: Headers
    path: str

    @property
    def heard_out(self) -> bool:
        """Whether an upstream is to be heard to its end though its client has left."""
        return self.snapshot.config.routing.on_disconnect == "drain"


def read_target(path: str, headers: Headers, call: Call) -> Target:
    """The request target, for a method and headers that are spoken here. Raises Refusal (400, 405, 417, 426)."""
    raw = path.encode("utf-8", "surrogateescape")
    bare = raw.partition(b"?")[0].partition(b"#")[0]
    call.path = bare.decode("ascii", "replace") if raw[:1] == b"/" else "-"  # else a user's key may stand in it
    if call.method == "CONNECT":
        raise Refusal("method_not_allowed", "CONNECT is not offered here", headers={"Allow": "GET, POST"}, close=True)
    if b"upgrade" in headers:
        raise Refusal(
            "upgrade_required", "only plain HTTP/1.1 is spoken here", headers={"Upgrade": "HTTP/1.1"}, close=True
        )
    if raw == b"*" and call.method == "OPTIONS":
        raise Refusal("method_not_allowed", "OPTIONS is not offered here", headers={"Allow": "GET, HEAD, POST"})
    target = targets.parse(raw, headers.get(b"host", b""))
    call.path = target.path.decode("ascii")
    return target


def demand_plain(method: str, headers: Headers) -> None:
    """What HTTP allows to ask and the gateway does not offer. Raises Refusal (405, 417)."""
    if method == "TRACE":
        raise Refusal("method_not_allowed", "TRACE is not offered here", headers={"Allow": "GET, POST"}, close=True)
    if b"expect" in headers and any(value.lower() != b"100-continue" for value in headers.all(b"expect")):
        raise Refusal("expectation_failed", "the only expectation that is met is 100-continue", close=True)


def admit(snapshot: Snapshot, target: Target, headers: Headers, call: Call) -> Admission:
    """Who calls, and for what. Raises Refusal (401, 403, 404, 405)."""
    demand_plain(call.method, headers)
    caller = authenticate(snapshot.callers, presented_key(headers, target.keys))
    call.caller = caller
    authorise_method(caller, call.method)
    authorise_endpoint(caller, call.method, target.path.decode("ascii"))
    operation = _operation(target, call, headers, snapshot)
    return Admission(snapshot, caller, target, operation, call.dialect or "openai_chat", headers, call.path)


def _operation(target: Target, call: Call, headers: Headers, snapshot: Snapshot) -> Operation | None:
    """The operation, if the table knows one; refuses what the gateway itself would have to answer and does not."""
    operation = target.methods.get(call.method)
    provider = snapshot.providers.get(target.provider) if target.provider is not None else None
    call.form = target.form
    call.endpoint = operation.name if operation is not None else target.form
    if operation is not None:
        call.dialect = _dialect(operation, headers)
    elif provider is not None:
        call.dialect = provider.dialect
    if target.provider is not None and provider is None and target.form != "local":
        raise Refusal("unknown_provider", "no provider of that name is configured")
    if operation is not None or target.form in ("scoped", "raw"):
        return operation
    if target.methods:
        allow = ", ".join(sorted(target.methods))
        raise Refusal("method_not_allowed", f"this endpoint takes {allow}", headers={"Allow": allow})
    raise Refusal("not_found", "there is no such endpoint")


def _dialect(operation: Operation, headers: Headers) -> DialectName:
    """The path's dialect. Files, batches and models live at one path for several; there the client's headers tell."""
    shared = operation.model in ("none", "listing") and operation.dialect == "openai_chat"
    return (dialect_of_headers(headers) if shared else None) or operation.dialect


def client_address(peer: object, headers: Headers, snapshot: Snapshot) -> str | None:
    """The client's address: the peer's, or what a trusted proxy says it is (the last address that is not its own)."""
    if not isinstance(peer, tuple):
        return None
    address = str(peer[0])
    if snapshot.trusted:
        hops = b",".join(headers.all(b"x-forwarded-for") or headers.all(b"x-real-ip")).split(b",")
        while hops and _trusted(address, snapshot):
            claimed = hops.pop().strip().decode("ascii", "replace")
            if not is_address(claimed):
                break
            address = claimed
    return address


def _trusted(address: str, snapshot: Snapshot) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in network for network in snapshot.trusted)
