"""Fixtures of a `Bench` for modules that need nothing special of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.checks import Bench, quick_log
from tests.support.running import Loop


@pytest.fixture(scope="module")
def roomy_made(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        yield Bench(loop)


@pytest.fixture
def roomy(roomy_made: Bench) -> Bench:
    """A gateway with the default limits."""
    roomy_made.reset()
    return roomy_made
