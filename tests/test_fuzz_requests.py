"""Damaged requests: whatever the gateway passes on is one well-formed request, the very one that it logged and
recorded, in method, path, headers and body. With aiohttp's parser in C; the one in Python has a module of its own, so
that both can run beside each other.
"""

from __future__ import annotations

import pytest

from tests.support import fuzz
from tests.support.fuzz_recorder import recording
from tests.support.running import Loop

__all__ = ["recording"]


@pytest.mark.parametrize("part", range(fuzz.PARTS))
def test_what_is_passed_on_is_what_was_logged_and_recorded(loop: Loop, part: int) -> None:
    fuzz.run(loop, "c", part)
