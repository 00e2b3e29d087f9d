"""The events of a stream that go like one before them: from the upstream's chunk to the client's in one step.

Nothing is looked at here but whether a chunk bears such an event; what was found out about the one holds for the other
(`wire.refrain`). All else goes the usual way, through whoever takes the answer, and so does what comes behind it.
"""

from __future__ import annotations

import re

from gproxyd.dialects import identity, reasoning
from gproxyd.dialects.meter import Meter, tells
from gproxyd.gateway.downstream import Downstream
from gproxyd.types import DialectName
from gproxyd.wire.refrain import Refrains
from gproxyd.wire.transform import Events

_NONE = re.compile(rb"(?!)")  # matches nothing: no refrain is known yet


class Repeats:
    """One stream's. `stirred` says that something has passed since somebody last looked.

    shown  the JSON text that stands in the place of the model's name, None if that stays
    """

    __slots__ = ("_dialect", "_down", "_events", "_match", "_meter", "_refrains", "_shown", "stirred")

    def __init__(
        self,
        dialect: DialectName,
        refrains: Refrains,
        events: Events,
        meter: Meter | None,
        down: Downstream,
        shown: bytes | None,
    ) -> None:
        self._dialect = dialect
        self._refrains = refrains
        self._events = events
        self._meter = meter
        self._down = down
        self._shown = shown
        self._match = _NONE.match
        self.stirred = False

    @property
    def ready(self) -> bool:
        """Whether the next chunk may be taken: nothing of an event is held, and the answer has begun."""
        return self._events.smooth and (self._meter is None or self._meter.seen_content)

    def take(self, data: bytes) -> int:
        """Passes on the chunks at the beginning of `data` that can be; returns how many bytes those were."""
        found = self._match(data) or self._another(data, 0)
        if found is None:
            return 0
        if found.end() < len(data):
            return self._take_many(data, found)
        size, before, rest = found.groups()
        length = int(size, 16)
        if length != len(data) - len(size) - 4:
            return 0
        meter, shown, out = self._meter, self._shown, data
        if meter is not None:
            meter.event_count += 1
            meter.last = data
        if shown is not None and before:
            length = len(before) + len(shown) + len(rest) - 2
            out = b"%x\r\n%b%b%b" % (length, before, shown, rest)
        self.stirred = True
        self._down.chunk(out, length)
        return len(data)

    def _take_many(self, data: bytes, found: re.Match[bytes] | None) -> int:
        """The same for several chunks that came together: what goes on of them leaves together, too."""
        out: list[bytes] = []
        body = position = 0
        shown = self._shown
        while found is not None:
            (size, before, rest), end = found.groups(), found.end()
            length = int(size, 16)
            if length != end - position - len(size) - 4:
                break
            if shown is not None and before:
                length = len(before) + len(shown) + len(rest) - 2
                out.append(b"%x\r\n%b%b%b" % (length, before, shown, rest))
            else:
                out.append(data[position:end])
            body += length
            position = end
            found = None if end == len(data) else self._match(data, end) or self._another(data, end)
        if not out:
            return 0
        if self._meter is not None:
            self._meter.event_count += len(out)
            self._meter.last = data[:position]
        self.stirred = True
        self._down.chunk(b"".join(out), body)
        return position

    def _another(self, data: bytes, start: int) -> re.Match[bytes] | None:
        """What another refrain makes of a chunk; one that none matches is listened to."""
        refrain = self._refrains.find(data, start)
        if refrain is None:
            self._refrains.hear(data, start, self._tells)
            return None
        self._match = refrain.match
        return refrain.match(data, start)

    def _tells(self, event: bytes) -> bool:
        """Whether events like this one must be seen by whoever reads tokens, errors and ids."""
        marked = identity.EVENT_MARK in event or reasoning.MARKS[self._dialect].search(event) is not None
        return marked or tells(self._dialect, event)
