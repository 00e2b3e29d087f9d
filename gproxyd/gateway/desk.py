"""What the gateway answers itself: whether it is well, what it has counted, who may call, and what it is busy with.

Invariants: health and figures need no key, everything else needs one, or a local peer that the kernel vouches for;
administration needs an administrator's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import pwd
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import parse_qsl

from gproxyd.errors import Refusal
from gproxyd.gateway.admission import demand_plain
from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.intake import Intake
from gproxyd.gateway.sent import date_line
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.policy.callers import (
    Caller,
    authenticate,
    authorise_endpoint,
    authorise_method,
    presented_key,
)
from gproxyd.types import Answer, Question
from gproxyd.wire.headers import Headers
from gproxyd.wire.target import Target

MAX_BODY = 1024 * 1024
"""Bytes of a request for administration."""

Open = Callable[[], Awaitable[Answer]]
Room = Callable[[Question], Awaitable[Answer]]

_ME = frozenset({b"/v1/me", b"/v1/me/usage", b"/v1/me/quota"})
_ADMIN, _DEBUG = b"/admin/", b"/debug/"


@dataclass
class Desk:
    """The rooms behind it, set by the daemon.

    open   path -> what needs no key
    admin  everything below /admin/
    me     what callers may know of themselves
    debug  everything below /debug/, None while that is switched off
    """

    open: Mapping[bytes, Open]
    admin: Room | None = None
    me: Room | None = None
    debug: Room | None = None

    def knows(self, target: Target, *, ops: bool) -> bool:
        """Whether this is the place to ask; `ops` says that the operators' own paths are served here."""
        path = target.path
        return path.startswith(_ADMIN) or path in _ME or (ops and self.is_ops(path))

    def is_ops(self, path: bytes) -> bool:
        return path in self.open or path.startswith(_DEBUG)

    async def serve(
        self, target: Target, headers: Headers, call: Call, down: Downstream, intake: Intake, snapshot: Snapshot
    ) -> None:
        """Answers a request that came by a network. Raises Refusal."""
        path = target.path
        call.form, call.dialect = "local", "openai_chat"
        opened = self.open.get(path)
        if opened is not None:
            call.endpoint = "health" if path in (b"/healthz", b"/readyz") else "ops"
            await self._give(await opened(), call, down, get_only=True)
            return
        demand_plain(call.method, headers)
        debug = path.startswith(_DEBUG)
        key = _basic(headers) if debug else None
        caller = authenticate(snapshot.callers, key or presented_key(headers, target.keys))
        call.caller = caller
        authorise_method(caller, call.method)
        authorise_endpoint(caller, call.method, path.decode("ascii"))
        room = self.me if path in _ME else self._room(path, caller)
        await self._ask(room, caller.name, caller, target, headers, call, down, intake)

    async def serve_local(
        self, target: Target, headers: Headers, call: Call, down: Downstream, intake: Intake, peer: str
    ) -> None:
        """Answers a local peer that may administer. Raises Refusal."""
        call.form, call.dialect = "local", "openai_chat"
        opened = self.open.get(target.path)
        if opened is not None:
            call.endpoint = "ops"
            await self._give(await opened(), call, down, get_only=True)
            return
        room = self._room(target.path, None)
        await self._ask(room, f"unix:{peer}", None, target, headers, call, down, intake)

    def _room(self, path: bytes, caller: Caller | None) -> Room | None:
        debug = path.startswith(_DEBUG)
        if debug and self.debug is None:
            return None
        if caller is not None and (caller.role != "admin" or caller.agents is not None):
            raise Refusal("forbidden_endpoint", "this takes an administrator's key")
        if debug:
            return self.debug
        return self.admin if path.startswith(_ADMIN) else None

    async def _ask(
        self,
        room: Room | None,
        who: str,
        caller: Caller | None,
        target: Target,
        headers: Headers,
        call: Call,
        down: Downstream,
        intake: Intake,
    ) -> None:
        if room is None:
            raise Refusal("not_found", "there is no such endpoint")
        call.endpoint = target.path[1:].partition(b"/")[0].decode("ascii") if caller is None else _endpoint(target.path)
        body = await intake.read(MAX_BODY) if intake.present else b""
        query = dict(parse_qsl(target.query.decode("ascii"), keep_blank_values=True))
        if target.keys and (caller is None or presented_key(headers, ()) is not None):
            query["key"] = target.keys[-1].decode("utf-8", "replace")  # no credential: that stood in a header
        kind = headers.media_type().decode("ascii", "replace")
        user, key = (None, None) if caller is None else (caller.user, caller.key)
        answer = await room(Question(who, user, key, call.method, target.path.decode("ascii"), query, body, kind))
        await self._give(answer, call, down)

    async def _give(self, answer: Answer, call: Call, down: Downstream, *, get_only: bool = False) -> None:
        if get_only and call.method not in ("GET", "HEAD"):
            raise Refusal("method_not_allowed", "GET it", headers={"Allow": "GET, HEAD"})
        call.status = answer.status
        lines = [
            date_line(),
            b"Content-Type: %b\r\n" % answer.content_type.encode("ascii"),
            b"x-request-id: %b\r\n" % call.id.encode("ascii"),
            b"Cache-Control: no-store\r\n",
        ]
        lines += (
            b"%b: %b\r\n" % (name.encode("ascii"), value.encode("ascii")) for name, value in answer.headers.items()
        )
        if isinstance(answer.body, bytes):
            down.whole(answer.status, b"".join(lines), answer.body)
            return
        down.head(answer.status, b"".join(lines), None)
        pace = down.protocol.writer = _Pace()
        async with aclosing(answer.body) as pieces:
            async for piece in pieces:
                down.write(piece)
                await asyncio.sleep(0)
                await pace.free.wait()
        down.end()


class _Pace:
    """Whether a client takes what it is sent."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()

    def client_paused(self) -> None:
        self.free.clear()

    def client_resumed(self) -> None:
        self.free.set()


def _endpoint(path: bytes) -> str:
    return "me" if path in _ME else path[1:].partition(b"/")[0].decode("ascii")


def _basic(headers: Headers) -> bytes | None:
    """The password of Basic auth (RFC 7617): profilers know no other way to bear a key."""
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"basic" or len(headers.all(b"authorization")) != 1:
        return None
    try:
        return base64.b64decode(value.strip(b" "), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def local_peer(raw: socket.socket | None) -> str | None:
    """The name of the user at the other end of a Unix socket, if that may administer: root, or who runs the gateway."""
    if raw is None or raw.family != socket.AF_UNIX:
        return None
    _, uid, _ = struct.unpack("3i", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (0, os.geteuid()):
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
