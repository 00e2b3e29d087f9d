"""What operators' machines ask all day: /statsz and /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

import orjson

from gproxyd.observe.lag import LoopLag
from gproxyd.observe.metrics import CONTENT_TYPE, Exporter
from gproxyd.observe.stats import Stats
from gproxyd.types import Answer


def figures(stats: Stats, lag: LoopLag) -> Mapping[bytes, Callable[[], Awaitable[Answer]]]:
    """Path -> what answers it."""
    exporter = Exporter(stats, lag)

    async def statsz() -> Answer:
        return Answer(200, "application/json", orjson.dumps(stats.statsz(), option=orjson.OPT_INDENT_2))

    async def metrics() -> Answer:
        return Answer(200, CONTENT_TYPE, _pieces(exporter))

    return {b"/statsz": statsz, b"/metrics": metrics}


async def _pieces(exporter: Exporter) -> AsyncGenerator[bytes, None]:
    """Many series take a while to write: everybody else's turn in between."""
    for piece in exporter.pieces():
        yield piece
        await asyncio.sleep(0)
