"""What is written of a request when it is over, whichever way it ended."""

from __future__ import annotations

from gproxyd.gateway.call import Call
from gproxyd.observe.journal import Journal

_LEVELS = {"ok": "info", "refused": "info", "client_gone": "info", "internal_error": "error"}


class Books:
    """Closes the account of each request, once."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def close(self, call: Call, bytes_out: int) -> None:
        """The request is over: `bytes_out` of an answer's body have gone or go now. Nothing is booked twice."""
        if call.closed:
            return
        call.closed = True
        call.bytes_out = bytes_out
        level = "debug" if call.endpoint == "health" else _LEVELS.get(call.outcome, "warning")
        self._journal.put(level, "request", call.fields())
