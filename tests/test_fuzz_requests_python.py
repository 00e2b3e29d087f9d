"""The same as test_fuzz_requests, with aiohttp's parser in Python."""

from __future__ import annotations

import pytest

from tests.support import fuzz
from tests.support.running import Loop

pytestmark = pytest.mark.long


@pytest.mark.parametrize("part", range(fuzz.PARTS))
def test_what_is_passed_on_is_what_was_logged_and_recorded(loop: Loop, part: int) -> None:
    fuzz.run(loop, "python", part)
