"""Fixtures that every test may use. The gateway of a session serves all tests that need nothing of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gproxyd.host.demo import DemoVendor
from gproxyd.serving import settle_memory
from tests.support.running import CONFIG, Loop, Running

LONG = {
    "test_accounts_machine",
    "test_admin_daemon",
    "test_canaries",
    "test_disconnect_usage",
    "test_events",
    "test_faults",
    "test_framing",
    "test_fuzz_requests",
    "test_handoff",
    "test_handoff_limits",
    "test_hard_cases_disk",
    "test_hard_cases_load",
    "test_hard_cases_money",
    "test_hard_cases_peers",
    "test_hard_cases_streams",
    "test_hard_cases_wire",
    "test_ledger_kill",
    "test_limits",
    "test_load",
    "test_money",
    "test_permissions",
    "test_pressure_long",
    "test_reload",
    "test_shutdown",
    "test_store_crashes",
    "test_store_ledger",
}
"""Modules that try hostile peers, faults and load at length."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in LONG:
            item.add_marker("long")


def pytest_collection_finish() -> None:
    """Thousands of collected tests and all that they import stay to the end. A collector that goes through them again
    and again stops gateway, client and vendor for half a second each time; so it is told what the daemon tells its own.
    """
    settle_memory()


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    with Loop() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module starts ends with it: each gateway holds descriptors and threads."""
    uses = any("loop" in item.fixturenames for item in request.session.items if item.path == request.path)  # type: ignore[attr-defined]
    if not uses:
        yield
        return
    request.getfixturevalue("gateway")  # which outlives every module
    running = request.getfixturevalue("loop")
    mark = running.mark()
    yield
    running.release(mark)


@pytest.fixture(scope="session")
def vendor_at(loop: Loop) -> tuple[DemoVendor, str]:
    return loop.vendor()


@pytest.fixture(scope="session")
def vendor(vendor_at: tuple[DemoVendor, str]) -> DemoVendor:
    """The scripted vendor behind `gateway`."""
    return vendor_at[0]


@pytest.fixture(scope="session")
def gateway(loop: Loop, vendor_at: tuple[DemoVendor, str]) -> Running:
    """A daemon with three providers on the scripted vendor."""
    return loop.gateway(CONFIG.format(vendor=vendor_at[1]))
