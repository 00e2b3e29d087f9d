"""/debug/pprof/ as the HTTP layer serves it: the index, one profile at a time, as profile.proto or as text.

Who may see it is the HTTP layer's business. Invariant: while a profile is being taken no other one is, and whatever
ends it (an error, the client's leaving) makes room for the next.
"""

from __future__ import annotations

import asyncio
import html
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from gproxyd.observe.pprof import cpu, heap, stalls, tasks, waits
from gproxyd.observe.pprof.answers import Answer, Busy, Unavailable
from gproxyd.observe.pprof.proto import Profile

TEXT = "text/plain; charset=utf-8"
HTML = "text/html; charset=utf-8"
BINARY = "application/octet-stream"


class Kind(NamedTuple):
    """A profile: what it tells, who takes it, and its window in seconds.

    `default` None: without `?seconds=` it is a picture of the moment, or of all time. `most` 0: it has no window.
    """

    about: str
    take: Callable[[int | None], Awaitable[Profile]]
    default: int | None
    most: int


KINDS: Mapping[str, Kind] = {
    "profile": Kind("CPU time by stack", cpu.take, 30, 120),
    "heap": Kind(
        "what is on the heap, by type; with seconds: what was allocated meanwhile, by stack, which slows the daemon "
        "down many times",
        heap.take, None, 30,
    ),
    "goroutine": Kind("tasks by what they wait for, and threads", tasks.take, None, 0),
    "block": Kind("when the event loop stood still for more than 20 ms, and where", stalls.take, 10, 120),
    "mutex": Kind("waits for locks, pools, queues and executors; with seconds: by stack", waits.take, None, 120),
}  # fmt: skip

_SECONDS = re.compile(r"[1-9][0-9]{0,3}")
_AS_TEXT = {"0": False, "1": True, "2": True}


class _Turn:
    """Whose turn it is."""

    def __init__(self) -> None:
        self._holder: str | None = None

    @contextmanager
    def taken_by(self, name: str) -> Iterator[None]:
        """Raises Busy."""
        if self._holder is not None:
            raise Busy(f"one profile at a time: {self._holder} is being taken")
        self._holder = name
        try:
            yield
        finally:
            self._holder = None


_turn = _Turn()


async def serve(path_below: str, query: Mapping[str, str]) -> Answer:
    """The answer to `GET /debug/pprof/{path_below}`. Raises Busy while another profile is being taken.

    `query`: `seconds` (a window; whole seconds) and `debug` (1: text). Others are ignored, as a key may stand among
    them. A bad one is answered 400, an unknown path 404, what this process cannot do 501, all with a sentence.
    """
    name = path_below.removeprefix("/")
    if not name:
        return _answer(200, HTML, _index().encode())
    if name == "cmdline":
        return _answer(200, TEXT, "\0".join(sys.orig_argv).encode("utf-8", "surrogateescape"))
    kind = KINDS.get(name)
    if kind is None:
        return _refusal(404, f"There is no such profile; there are {', '.join(KINDS)} and cmdline.")
    try:
        seconds = _seconds(name, kind, query.get("seconds"))
        as_text = _AS_TEXT[query.get("debug", "0")]
    except ValueError as error:
        return _refusal(400, str(error))
    except KeyError:
        return _refusal(400, "debug must be 0 (profile.proto) or 1 (text).")
    try:
        with _turn.taken_by(name):
            profile = await kind.take(seconds)
            return await asyncio.to_thread(_rendered, name, profile, as_text)
    except Unavailable as error:
        return _refusal(501, f"{error}.")


def _seconds(name: str, kind: Kind, text: str | None) -> int | None:
    """The window. Raises ValueError with a sentence, which does not quote what came."""
    if text is None:
        return kind.default
    if not kind.most:
        raise ValueError(f"{name} shows the moment: it takes no seconds.")
    if _SECONDS.fullmatch(text) is None or int(text) > kind.most:
        raise ValueError(f"seconds must be a whole number from 1 to {kind.most}.")
    return int(text)


def _rendered(name: str, profile: Profile, as_text: bool) -> Answer:
    if as_text:
        return _answer(200, TEXT, profile.text().encode("utf-8", "replace"))
    return _answer(200, BINARY, profile.encode(), {"Content-Disposition": f'attachment; filename="{name}.pb.gz"'})


def _answer(status: int, content_type: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    fixed = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Answer(status, content_type, {**fixed, **(headers or {})}, body)


def _refusal(status: int, sentence: str) -> Answer:
    # `go tool pprof` shows an error's text only where this header says whose it is.
    return _answer(status, TEXT, f"{sentence}\n".encode(), {"X-Go-Pprof": "1"})


def _index() -> str:
    rows = [_row(name, kind) for name, kind in KINDS.items()]
    rows.append('<tr><td><a href="cmdline">cmdline</a><td><td>the command line, its words separated by NUL')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>/debug/pprof/</title><h1>/debug/pprof/</h1>'
        "<p>One profile at a time. <code>?seconds=N</code> sets the window, <code>?debug=1</code> makes text.</p>"
        f"<table>{''.join(rows)}</table></html>\n"
    )


def _row(name: str, kind: Kind) -> str:
    window = f"1 to {kind.most} s" + (f", else {kind.default} s" if kind.default else "") if kind.most else ""
    links = f'<a href="{name}">{name}</a> <a href="{name}?debug=1">(text)</a>'
    return f"<tr><td>{links}<td>{window}<td>{html.escape(kind.about)}"
