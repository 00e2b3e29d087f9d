"""Every request from its first byte to its last: which room answers, and what becomes of its errors.

Invariant: every request is counted once while it runs, and its books are closed once.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

import orjson
from aiohttp.web import BaseRequest, StreamResponse

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway import envelopes, listing, refusal
from gproxyd.gateway.admission import Admission, admit, client_address, demand_plain, read_target
from gproxyd.gateway.books import Books
from gproxyd.gateway.call import Call
from gproxyd.gateway.desk import Desk, local_peer
from gproxyd.gateway.doorstep import DoorProtocol
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.exchange import Exchanges
from gproxyd.gateway.intake import Budget, Intake
from gproxyd.gateway.lane import Lane
from gproxyd.gateway.refusal import guess_dialect
from gproxyd.gateway.router import Router
from gproxyd.gateway.sent import date_line
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.observe.journal import Journal
from gproxyd.observe.otel import Tracing
from gproxyd.types import Answer
from gproxyd.wire.headers import Headers
from gproxyd.wire.target import Target

TEXT = "text/plain; charset=utf-8"


_Room = Callable[[BaseRequest, Call, Downstream], Awaitable[None]]


class Gateway:
    """Answers requests. `snapshot` may be replaced at any time; `in_flight` counts requests being answered.

    `quiet` is set while there are none.
    """

    def __init__(self, snapshot: Snapshot, exchanges: Exchanges, books: Books, journal: Journal) -> None:
        self.snapshot = snapshot
        self.exchanges = exchanges
        self.budget = Budget()
        self.ops_elsewhere = bool(snapshot.config.server.ops_listen)
        self.in_flight = 0
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.draining = False
        self.tracing: Tracing | None = None
        self._journal = journal
        self.books = books
        self.lane = Lane(self)
        self.desk = Desk(open={b"/healthz": self._health, b"/readyz": self._readiness})
        self.answer = partial(self._answer, self._serve)
        """aiohttp's handler for the main listener."""
        self.answer_ops = partial(self._answer, self._serve_ops)
        """aiohttp's handler for `server.ops_listen`."""
        self.answer_local = partial(self._answer, self._serve_local)
        """aiohttp's handler for the administrators' Unix socket."""

    async def _answer(self, serve: _Room, request: BaseRequest) -> StreamResponse:
        protocol = cast(DoorProtocol, request.protocol)
        if protocol.client_paused:
            await protocol.patience.over()  # who asks on and on and reads nothing is not answered on and on
        call = Call()
        down = Downstream(protocol, request._message, request.content)
        self.enter()
        if self.draining:
            down.close_after()
        try:
            try:
                await serve(request, call, down)
            except Refusal as error:
                self._refuse(call, down, request, error)
        except asyncio.CancelledError:
            # A response that was cut on purpose ends its connection, too; what is in the books already stays as it is.
            if call.outcome == "ok" and not call.closed:
                call.outcome, call.status = "client_gone", call.status or 499
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: one request's bug ends that request only
            self._own_fault(call, down, request, error)
        finally:
            if not call.draining:
                self.books.close(call, down.body_bytes)
                self.books.keep(call)
            self.leave()
        return down.sent()

    def enter(self) -> None:
        """A request begins."""
        if not self.in_flight:
            self.quiet.clear()
        self.in_flight += 1

    def leave(self) -> None:
        """A request is over."""
        self.in_flight -= 1
        if not self.in_flight:
            self.quiet.set()

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
        target, headers, intake = self._begin(request, call, down, snapshot)
        protocol = cast(DoorProtocol, request.protocol)
        tried = self.exchanges.tried(protocol)  # whatever becomes of this request, the next one begins anew
        if self.desk.knows(target, ops=not self.ops_elsewhere):
            await self._at_desk(self.desk.serve(target, headers, call, down, intake, snapshot), intake)
            return
        admission = admit(snapshot, target, headers, call)
        operation = admission.operation
        call.heard_out = admission.heard_out
        if self.tracing is not None:
            call.trace = self.tracing.begin(headers)
        self._begin_envelope(call, down, request, target, snapshot)
        if operation is not None and operation.model == "listing" and target.form != "raw":
            self._list(admission, call, down)
            return
        try:
            exchanges = self.exchanges
            router = Router(admission, headers, intake, call, self.books, exchanges.registry, exchanges.homes)
            passage = await router.route()
            if tried is not None:
                passage.resume(tried, call)
            elif passage.usual and passage.route is not None and passage.route.most:
                self.lane.learn(protocol, request._message, admission, call, passage.route, intake)
            protocol.head, passage.release = None, intake.release
            await self.exchanges.run(passage, call, down)
        finally:
            intake.release()

    async def _serve_ops(self, request: BaseRequest, call: Call, down: Downstream) -> None:
        """`server.ops_listen`: what the operators ask, and nothing else."""
        snapshot = self.snapshot
        target, headers, intake = self._begin(request, call, down, snapshot)
        if not self.desk.is_ops(target.path):
            demand_plain(call.method, headers)
            raise Refusal("not_found", "there is no such endpoint")
        await self._at_desk(self.desk.serve(target, headers, call, down, intake, snapshot), intake)

    async def _serve_local(self, request: BaseRequest, call: Call, down: Downstream) -> None:
        """The administrators' Unix socket: who may, the kernel says."""
        target, headers, intake = self._begin(request, call, down, self.snapshot)
        peer = local_peer(down.socket)
        if peer is None:
            raise Refusal("forbidden_endpoint", "only root and the gateway's own user may come this way")
        await self._at_desk(self.desk.serve_local(target, headers, call, down, intake, peer), intake)

    def _begin(
        self, request: BaseRequest, call: Call, down: Downstream, snapshot: Snapshot
    ) -> tuple[Target, Headers, Intake]:
        message = request._message
        headers = Headers(message.raw_headers)
        call.method = message.method
        call.client = client_address(request.protocol.peername, headers, snapshot)
        target = read_target(message.path, headers, call)
        intake = Intake(request.content, headers, call, down, self.budget, snapshot.config.server.max_bodies)
        return target, headers, intake

    @staticmethod
    def _begin_envelope(call: Call, down: Downstream, request: BaseRequest, target: Target, snapshot: Snapshot) -> None:
        records = snapshot.config.records
        if envelopes.wanted(records):
            call.envelope = down.envelope = envelopes.Envelope(records)
            call.envelope.received(call.method, target.path, target.query, request._message.raw_headers)

    @staticmethod
    async def _at_desk(served: Awaitable[None], intake: Intake) -> None:
        try:
            await served
        finally:
            intake.release()

    async def _health(self) -> Answer:
        return Answer(200, TEXT, b"OK")

    async def _readiness(self) -> Answer:
        return Answer(503, TEXT, b"draining") if self.draining else Answer(200, TEXT, b"OK")

    def _list(self, admission: Admission, call: Call, down: Downstream) -> None:
        target = admission.target
        value = listing.answer(
            admission.snapshot, admission.caller, target.provider, target.id, admission.dialect, target.query
        )
        call.status = 200
        lines = date_line() + b"Content-Type: application/json\r\n" + DIALECTS[admission.dialect].id_lines(call.id)
        down.whole(200, lines, orjson.dumps(value))

    def stop_streams(self) -> None:
        """The time to drain is over: every answer under way ends as a failure that its client can see."""
        for relay in tuple(self.exchanges.relays):
            relay.failed(UpstreamError("shutdown", "the gateway is shutting down", code="overloaded"))
