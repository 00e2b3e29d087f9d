"""The table of routes, and one place for their errors.

Invariants: a change runs to its end even if whoever asked for it is gone, and no two run at once; nothing that is
answered here may be kept by a cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from gproxyd.admin import changes, events, forms, logs, me, operations, usage
from gproxyd.admin.forms import Nothing, Paging
from gproxyd.admin.house import Call, Handler, House
from gproxyd.config.section import Section
from gproxyd.errors import Refusal
from gproxyd.store.errors import Conflict, Invalid, NotFound, StoreError
from gproxyd.types import Answer, Question


class Route(NamedTuple):
    """One method of one path. In the pattern `{}` stands for one segment; `body` None: none is read.

    `changes` says that the handler changes something.
    """

    method: str
    pattern: str
    handler: Handler
    query: type[Section] = Nothing
    body: type[Section] | None = None
    changes: bool = False


ROUTES: Sequence[Route] = (
    Route("GET", "/admin/users", changes.list_users, Paging),
    Route("POST", "/admin/users", changes.create_user, body=forms.UserForm, changes=True),
    Route("GET", "/admin/users/{}", changes.show_user),
    Route("PATCH", "/admin/users/{}", changes.change_user, body=forms.UserPatch, changes=True),
    Route("DELETE", "/admin/users/{}", changes.delete_user, body=Nothing, changes=True),
    Route("POST", "/admin/users/{}/keys", changes.create_key, body=forms.KeyForm, changes=True),
    Route("PATCH", "/admin/users/{}/keys/{}", changes.change_key, body=forms.KeyPatch, changes=True),
    Route("DELETE", "/admin/users/{}/keys/{}", changes.delete_key, body=Nothing, changes=True),
    Route("PUT", "/admin/users/{}/permissions", changes.put_permissions, body=forms.PermissionsForm, changes=True),
    Route("PUT", "/admin/users/{}/rate-limits", changes.put_rate_limits, body=forms.RateLimitsForm, changes=True),
    Route("GET", "/admin/users/{}/quota", changes.show_quota),
    Route("PUT", "/admin/users/{}/quota", changes.put_quota, body=forms.Money, changes=True),
    Route("POST", "/admin/users/{}/quota/top-up", changes.top_up, body=forms.TopUp, changes=True),
    Route("GET", "/admin/usage", usage.usage, forms.UsageQuery),
    Route("GET", "/admin/requests", logs.list_requests, forms.LogQuery),
    Route("GET", "/admin/requests/{}", logs.show_request),
    Route("GET", "/admin/providers", operations.providers, Paging),
    Route("GET", "/admin/models", operations.models, Paging),
    Route("POST", "/admin/models/refresh", operations.refresh_models, body=Nothing, changes=True),
    Route("POST", "/admin/reload", operations.reload, body=Nothing, changes=True),
    Route("GET", "/admin/config", operations.config),
    Route("POST", "/admin/explain", operations.explain, body=forms.Explain),
    Route("GET", "/admin/events", events.events),
    Route("GET", "/admin/audit", logs.audit, Paging),
)
"""For administrators."""

OWN: Sequence[Route] = (
    Route("GET", "/v1/me", me.me),
    Route("GET", "/v1/me/usage", me.usage, forms.OwnUsageQuery),
    Route("GET", "/v1/me/quota", me.quota),
)
"""For everybody who has a key."""

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Admin:
    """Answers what concerns the gateway itself. Whoever calls has made sure that the caller may ask it."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._changing = asyncio.Lock()
        self._under_way: set[asyncio.Task[Answer]] = set()

    async def answer(self, question: Question) -> Answer:
        """Everything below /admin/. Raises Refusal."""
        return await self._answer(ROUTES, question)

    async def answer_me(self, question: Question) -> Answer:
        """/v1/me and what is below it. Raises Refusal."""
        return await self._answer(OWN, question)

    async def close(self) -> None:
        """Waits for changes whose askers are gone."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def _answer(self, routes: Sequence[Route], question: Question) -> Answer:
        route, names = _find(routes, question)
        query = forms.read_query(route.query, question.query)
        body = forms.read_body(route.body, question.body) if route.body is not None else None
        call = Call(self._house, question, names, query, body)
        try:
            answer = await (self._change(route, call) if route.changes else route.handler(call))
        except StoreError as error:
            raise _refusal(error) from error
        # HEAD wants no stream; that of a whole body is for the gateway to leave out, which needs its length.
        sent = b"" if question.method == "HEAD" and not isinstance(answer.body, bytes) else answer.body
        return answer._replace(body=sent, headers={**_HEADERS, **answer.headers})

    async def _change(self, route: Route, call: Call) -> Answer:
        """A client that leaves cancels its request, but must not leave a change half taken up."""
        task = asyncio.get_running_loop().create_task(self._alone(route, call))
        self._under_way.add(task)
        task.add_done_callback(self._done)
        await asyncio.wait((task,))
        return task.result()

    async def _alone(self, route: Route, call: Call) -> Answer:
        async with self._changing:
            return await route.handler(call)

    def _done(self, task: asyncio.Task[Answer]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, even if nobody waits for it any more


def _find(routes: Sequence[Route], question: Question) -> tuple[Route, tuple[str, ...]]:
    """The route of a request, and what stands in its path. Raises Refusal (404, 405)."""
    method = "GET" if question.method == "HEAD" else question.method
    allowed = []
    for route in routes:
        names = _names(route.pattern, question.path)
        if names is not None:
            if route.method == method:
                return route, names
            allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
    if allowed:
        listed = ", ".join(allowed)
        raise Refusal("method_not_allowed", f"this path takes {listed}", headers={"Allow": listed})
    raise Refusal("not_found", "there is nothing at that path")


def _names(pattern: str, path: str) -> tuple[str, ...] | None:
    """What stands in the places of a pattern, percent-decoded once; None where the path is another one."""
    wanted, given = pattern.split("/"), path.split("/")
    if len(wanted) != len(given):
        return None
    names = []
    for expected, part in zip(wanted, given, strict=True):
        if expected == "{}" and part:
            names.append(unquote(part))
        elif expected != part:
            return None
    return tuple(names)


def _refusal(error: StoreError) -> Refusal:
    codes: dict[type[StoreError], str] = {NotFound: "not_found", Conflict: "conflict", Invalid: "invalid_request"}
    code = codes.get(type(error), "overloaded")
    return Refusal(code, f"the database says no: {error}" if code == "overloaded" else str(error))
