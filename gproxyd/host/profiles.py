"""/debug/pprof/: profiles of the running daemon, for an administrator, where the configuration allows it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gproxyd.config import Config
from gproxyd.errors import Refusal
from gproxyd.observe.pprof import serving
from gproxyd.observe.pprof.answers import Busy
from gproxyd.types import Answer, Question

ROOT = "/debug/pprof"


def profiles(config: Callable[[], Config]) -> Callable[[Question], Awaitable[Answer]]:
    """What answers below /debug/. `config` gives the running configuration."""

    async def answer(question: Question) -> Answer:
        if not config().debug.pprof_enabled or not question.path.startswith(ROOT):
            raise Refusal("not_found", "there is no such endpoint")
        if question.method not in ("GET", "HEAD"):
            raise Refusal("method_not_allowed", "GET it", headers={"Allow": "GET, HEAD"})
        below = question.path.removeprefix(ROOT)
        if not below:  # the index links to its neighbours
            return Answer(301, "text/plain; charset=utf-8", b"", {"Location": ROOT + "/"})
        if not below.startswith("/"):
            raise Refusal("not_found", "there is no such endpoint")
        try:
            made = await serving.serve(below, question.query)
        except Busy as busy:
            raise Refusal("conflict", str(busy)) from busy
        return Answer(made.status, made.content_type, made.body, made.headers)

    return answer
