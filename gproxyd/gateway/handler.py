"""Admission: what the request is, who sends it, and which room answers. Every request leaves one log line.

The order is the contract's: a request that cannot be read (400, 405, 417, 426), then the key (401), then the role
(403), then whether there is such an endpoint (404, 405). Nothing is said about providers to somebody without a key.
"""

from __future__ import annotations

import asyncio
import ipaddress
import traceback
from collections.abc import Awaitable, Callable
from functools import partial

import orjson
from aiohttp.web import BaseRequest, StreamResponse

from gproxyd.config.addresses import is_address
from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway import listing, refusal
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.exchange import Exchanges
from gproxyd.gateway.intake import Budget, Intake
from gproxyd.gateway.refusal import dialect_of_headers, guess_dialect, id_lines
from gproxyd.gateway.route import Router
from gproxyd.gateway.sent import date_line
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.observe.journal import Journal
from gproxyd.policy.callers import authenticate, authorise_method, presented_key
from gproxyd.types import DialectName
from gproxyd.wire import target as targets
from gproxyd.wire.headers import Headers
from gproxyd.wire.operations import Operation
from gproxyd.wire.target import Target

_LEVELS = {"ok": "info", "refused": "info", "client_gone": "info", "internal_error": "error"}
_ROOM_FOR_HEALTH = frozenset({b"/healthz", b"/readyz"})


_Room = Callable[[BaseRequest, Call, Downstream], Awaitable[None]]


class Gateway:
    """Answers requests. `snapshot` may be replaced at any time; `in_flight` counts requests being answered.

    `quiet` is set while there are none.
    """

    def __init__(self, snapshot: Snapshot, exchanges: Exchanges, journal: Journal) -> None:
        self.snapshot = snapshot
        self.exchanges = exchanges
        self.budget = Budget()
        self.in_flight = 0
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.draining = False
        self._journal = journal
        self.answer = partial(self._answer, self._serve)
        """aiohttp's handler for the main listener."""
        self.answer_ops = partial(self._answer, self._serve_ops)
        """aiohttp's handler for `server.ops_listen`."""

    async def _answer(self, serve: _Room, request: BaseRequest) -> StreamResponse:
        call = Call()
        down = Downstream(request)
        if not self.in_flight:
            self.quiet.clear()
        self.in_flight += 1
        if self.draining:
            down.close_after()
        try:
            try:
                await serve(request, call, down)
            except Refusal as error:
                self._refuse(call, down, request, error)
        except asyncio.CancelledError:
            if call.outcome == "ok":  # a response that was cut on purpose ends its connection, too
                call.outcome, call.status = "client_gone", call.status or 499
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: one request's bug ends that request only
            self._own_fault(call, down, request, error)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.quiet.set()
            call.bytes_out = down.body_bytes
            self._journal.put(self._level(call), "request", call.fields())
        return down.sent()

    def _level(self, call: Call) -> str:
        return "debug" if call.endpoint == "health" else _LEVELS.get(call.outcome, "warning")

    def _refuse(self, call: Call, down: Downstream, request: BaseRequest, error: Refusal) -> None:
        if call.outcome == "ok":
            call.outcome, call.reason = "refused", error.code
        if down.started:
            down.cut()
            return
        if call.dialect is None:
            call.dialect = guess_dialect(call.path, Headers(request._message.raw_headers))
        call.status = error.status
        refusal.write(call, down, error)

    def _own_fault(self, call: Call, down: Downstream, request: BaseRequest, error: Exception) -> None:
        """A bug: told with the place where it happened, without the values (they may be secrets or prompts)."""
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-6:]))
        self._journal.record("error", "bug", request_id=call.id, error=type(error).__name__, where=where)
        call.outcome, call.reason = "internal_error", type(error).__name__
        told = Refusal("internal_error", "the gateway failed; its log knows more", close=True)
        self._refuse(call, down, request, told)

    # What every request passes.

    async def _serve(self, request: BaseRequest, call: Call, down: Downstream) -> None:
        snapshot = self.snapshot
        message = request._message
        headers = Headers(message.raw_headers)
        call.method = message.method
        target = self._read_target(message.path, headers, call, request, snapshot)
        if target.path in _ROOM_FOR_HEALTH and not snapshot.config.server.ops_listen:
            self._health(target, call, down)
            return
        _demand_plain(message.method, headers)
        caller = authenticate(snapshot.callers, presented_key(headers, target.keys))
        call.caller = caller.name
        authorise_method(caller, message.method)
        operation = self._operation(target, call, headers, snapshot)
        if operation is not None and operation.model == "listing" and target.form != "raw":
            self._list(target, call, down, snapshot)
            return
        intake = Intake(request, headers, call, down, self.budget, snapshot.config.server.max_bodies)
        try:
            route = await Router(snapshot, target, operation, headers, intake, call).route()
            await self.exchanges.run(route, message.method, headers, call, down, snapshot.config.streams.keepalive)
        finally:
            intake.release()

    async def _serve_ops(self, request: BaseRequest, call: Call, down: Downstream) -> None:
        headers = Headers(request._message.raw_headers)
        call.method = request._message.method
        target = self._read_target(request._message.path, headers, call, request, self.snapshot)
        _demand_plain(request._message.method, headers)
        if target.path not in _ROOM_FOR_HEALTH:
            raise Refusal("not_found", "there is no such endpoint")
        self._health(target, call, down)

    def _read_target(self, path: str, headers: Headers, call: Call, request: BaseRequest, snapshot: Snapshot) -> Target:
        raw = path.encode("utf-8", "surrogateescape")
        bare = raw.partition(b"?")[0].partition(b"#")[0]
        call.path = bare.decode("ascii", "replace") if raw[:1] == b"/" else "-"  # else a user's key may stand in it
        call.client = _client(request, headers, snapshot)
        if call.method == "CONNECT":
            raise Refusal(
                "method_not_allowed", "CONNECT is not offered here", headers={"Allow": "GET, POST"}, close=True
            )
        if b"upgrade" in headers:
            raise Refusal(
                "upgrade_required", "only plain HTTP/1.1 is spoken here", headers={"Upgrade": "HTTP/1.1"}, close=True
            )
        if raw == b"*" and call.method == "OPTIONS":
            raise Refusal("method_not_allowed", "OPTIONS is not offered here", headers={"Allow": "GET, HEAD, POST"})
        return targets.parse(raw, headers.get(b"host", b""))

    def _health(self, target: Target, call: Call, down: Downstream) -> None:
        call.endpoint, call.form = "health", "local"
        if call.method not in ("GET", "HEAD"):
            raise Refusal("method_not_allowed", "GET it", headers={"Allow": "GET, HEAD"})
        draining = self.draining and target.path == b"/readyz"
        call.status = 503 if draining else 200
        lines = [date_line(), b"Content-Type: text/plain; charset=utf-8\r\n", *id_lines(call)]
        down.whole(call.status, lines, b"draining" if draining else b"OK")

    def _operation(self, target: Target, call: Call, headers: Headers, snapshot: Snapshot) -> Operation | None:
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

    def _list(self, target: Target, call: Call, down: Downstream, snapshot: Snapshot) -> None:
        dialect = call.dialect or "openai_chat"
        value = listing.answer(snapshot, target.provider, target.id, dialect, target.query)
        call.status = 200
        lines = [date_line(), b"Content-Type: application/json\r\n", *id_lines(call)]
        down.whole(200, lines, orjson.dumps(value))

    def stop_streams(self) -> None:
        """The time to drain is over: every answer under way ends as a failure that its client can see."""
        for relay in tuple(self.exchanges.relays):
            relay.failed(UpstreamError("shutdown", "the gateway is shutting down", code="overloaded"))


def _demand_plain(method: str, headers: Headers) -> None:
    """What HTTP allows to ask and the gateway does not offer."""
    if method == "TRACE":
        raise Refusal("method_not_allowed", "TRACE is not offered here", headers={"Allow": "GET, POST"}, close=True)
    if b"expect" in headers and any(value.lower() != b"100-continue" for value in headers.all(b"expect")):
        raise Refusal("expectation_failed", "the only expectation that is met is 100-continue", close=True)


def _dialect(operation: Operation, headers: Headers) -> DialectName:
    """The path's dialect. Files, batches and models live at one path for several; there the client's headers tell."""
    shared = operation.model in ("none", "listing") and operation.dialect == "openai_chat"
    return (dialect_of_headers(headers) if shared else None) or operation.dialect


def _client(request: BaseRequest, headers: Headers, snapshot: Snapshot) -> str | None:
    """The client's address: the peer's, or what a trusted proxy says it is (the last address that is not its own)."""
    peer = request.protocol.peername
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
