"""The service as systemd runs it: activation, credentials, watchdog, crashes, and what it may not do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.support.running import until
from tests.systemd.rig import ADMIN_KEY, CONFIG, KEY, PORT, PYTHON, VENDOR_KEY, Load, Rig, unfit

pytestmark = [pytest.mark.systemd, pytest.mark.skipif(unfit() is not None, reason=str(unfit()))]

PROBE = """\
import ctypes, json, mmap, os, socket
found = {}
def attempt(name, act):
    try:
        act()
        found[name] = "done"
    except OSError as error:
        found[name] = os.strerror(error.errno)
for folder in ("/etc", "/etc/gproxyd", "/usr", "/opt/gproxyd", "/var", "/var/log", "/root", "/home", "/boot", "/run",
               "/var/lib", "/var/lib/gproxyd", "/run/gproxyd", "/tmp"):
    attempt(folder, lambda: open(folder + "/probe", "w").close())
libc = ctypes.CDLL(None, use_errno=True)
def mount():
    if libc.mount(b"x", b"/tmp", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "")
attempt("mount", mount)
attempt("AF_PACKET", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close())
attempt("writable code", lambda: mmap.mmap(-1, 4096, prot=7).close())
attempt("another user", lambda: os.setuid(0))
print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as booted:
        yield booted


@pytest.fixture(autouse=True)
def _healthy(rig: Rig) -> Iterator[None]:
    """Every test finds and leaves the service as installed."""
    yield
    rig.write("/etc/gproxyd/gproxyd.yaml", CONFIG)
    rig.write("/etc/gproxyd/credentials/vendor-key", VENDOR_KEY)
    rig.drop_in("test", None)


def test_the_first_client_starts_it_and_server_listen_is_ignored(rig: Rig) -> None:
    rig.write("/etc/gproxyd/gproxyd.yaml", CONFIG.replace("drain:", 'listen: ["127.0.0.1:1"], drain:'))
    assert (rig.show("ActiveState"), rig.show("ActiveState", "gproxyd.socket")) == ("inactive", "active")
    assert rig.chat() == "200"
    assert rig.show("ActiveState") == "active"
    assert [event["listen"] for event in rig.events("ready")] == [f"127.0.0.1:{PORT}"]


def test_administrators_come_by_the_socket_of_that_name_and_nobody_else_does(rig: Rig) -> None:
    assert "ann" in rig.run("/opt/gproxyd/bin/gproxyd", "users", "list").stdout
    ask = ["/opt/gproxyd/bin/gproxyd", "users", "list"]
    other = rig.run("setpriv", "--reuid=12345", "--clear-groups", *ask, check=False)
    assert other.returncode == 1
    assert "no permission for /run/gproxyd/admin.sock" in other.stderr


def test_its_status_tells_what_is_under_way(rig: Rig) -> None:
    with Load(rig, keeping=0, closing=0, streaming=7):
        until(lambda: "7 requests in flight, 7 of them being answered" in rig.show("StatusText"), 10)
    until(lambda: rig.show("StatusText") == "serving: 0 requests in flight, 0 of them being answered", 10)


def test_an_encrypted_credential_works_as_a_plain_one_does(rig: Rig) -> None:
    encrypted = "/etc/gproxyd/credentials/vendor-key.cred"
    rig.run("systemd-creds", "encrypt", "--name=vendor-key", "-", encrypted, given=VENDOR_KEY)
    assert VENDOR_KEY not in rig.run("cat", encrypted).stdout
    rig.run("rm", "/etc/gproxyd/credentials/vendor-key")
    rig.drop_in("test", f"[Service]\nLoadCredential=\nLoadCredentialEncrypted=vendor-key:{encrypted}\n")
    rig.systemctl("restart", "gproxyd")
    assert rig.chat() == "200"


def test_a_missing_credential_stops_the_start_and_says_so(rig: Rig) -> None:
    rig.systemctl("stop", "gproxyd.socket", "gproxyd-admin.socket", "gproxyd")
    rig.run("rm", "/etc/gproxyd/credentials/vendor-key")
    rig.drop_in("test", "[Service]\nRestart=no\n")
    assert rig.systemctl("start", "gproxyd", check=False).returncode == 1
    assert (rig.show("Result"), rig.show("ExecMainStatus")) == ("exit-code", "243")
    assert any("Failed to set up credentials" in line for line in rig.journal("-n", "20"))
    rig.write("/etc/gproxyd/credentials/vendor-key", VENDOR_KEY)
    rig.systemctl("reset-failed", "gproxyd")
    rig.systemctl("start", "gproxyd.socket", "gproxyd-admin.socket")
    assert rig.chat() == "200"


def test_keys_are_nowhere_that_the_machine_can_see(rig: Rig) -> None:
    assert rig.chat() == "200"
    process = rig.run("sh", "-c", f"cat /proc/{rig.pid}/cmdline /proc/{rig.pid}/environ").stdout
    seen = process + rig.systemctl("show", "gproxyd").stdout + "\n".join(rig.journal())
    for key in (VENDOR_KEY, KEY, ADMIN_KEY):
        assert key not in seen


def test_a_configuration_that_cannot_be_used_is_not_tried_again(rig: Rig) -> None:
    rig.systemctl("stop", "gproxyd.socket", "gproxyd-admin.socket", "gproxyd")
    rig.write("/etc/gproxyd/gproxyd.yaml", CONFIG.replace("vendor: openai", "vendr: openai"))
    assert rig.systemctl("start", "gproxyd", check=False).returncode == 1
    assert (rig.show("ExecMainStatus"), rig.show("NRestarts"), rig.show("ActiveState")) == ("78", "0", "failed")
    assert any("providers.main.vendr" in line for line in rig.journal("-n", "20"))
    rig.write("/etc/gproxyd/gproxyd.yaml", CONFIG)
    rig.systemctl("start", "gproxyd.socket", "gproxyd-admin.socket")
    assert rig.chat() == "200"


def test_a_reload_with_such_a_configuration_fails_says_why_and_changes_nothing(rig: Rig) -> None:
    assert rig.chat() == "200"
    before = rig.pid
    rig.write("/etc/gproxyd/gproxyd.yaml", CONFIG.replace("vendor: openai", "vendr: openai"))
    assert rig.systemctl("reload", "gproxyd", check=False).returncode == 1
    told = "\n".join(rig.journal("-n", "20"))
    assert "conflict: the new process cannot serve" in told
    assert told.count("providers.main.vendr: is not a known key") >= 2, "by the new process, and by the command"
    assert (rig.pid, rig.show("ActiveState"), rig.chat()) == (before, "active", "200")


def test_sighup_is_a_reload_that_systemd_knows_of(rig: Rig) -> None:
    assert rig.chat() == "200"
    before, seen = rig.pid, len(rig.events("reloaded"))
    rig.systemctl("kill", "--kill-whom=main", "-s", "HUP", "gproxyd")
    until(lambda: len(rig.events("reloaded")) > seen)
    rig.until("active")
    assert (rig.pid, rig.chat()) == (before, "200")


def test_a_blocked_loop_is_ended_tells_where_it_stood_and_starts_anew(rig: Rig) -> None:
    rig.drop_in("test", "[Service]\nWatchdogSec=1\n")
    rig.systemctl("restart", "gproxyd")
    time.sleep(2.5)
    assert rig.show("NRestarts") == "0", "a loop that turns was ended"
    before = rig.pid
    rig.run("kill", "-s", "RTMIN", str(before))
    until(lambda: rig.pid not in (0, before), 15)
    assert rig.chat() == "200"
    told = rig.journal("-n", "200")
    assert any("Watchdog timeout" in line for line in told)
    assert "Fatal Python error: Aborted" in told
    assert any("in hold_up_the_loop" in line for line in told)


def test_a_stopped_process_is_replaced(rig: Rig) -> None:
    rig.drop_in("test", "[Service]\nWatchdogSec=1\n")
    rig.systemctl("restart", "gproxyd")
    before = rig.pid
    rig.run("kill", "-s", "STOP", str(before))
    # The socket's queue holds whoever comes; who came to the old process's own connections is lost with it.
    until(lambda: rig.chat() == "200", 15)
    assert rig.pid != before


def test_a_killed_process_is_replaced_and_its_records_are_whole(rig: Rig) -> None:
    assert rig.chat() == "200"
    booked = int(rig.sql("SELECT count(*) FROM usage WHERE status = 200"))
    with Load(rig, keeping=32, closing=8, streaming=10) as load:
        time.sleep(3)
        before = rig.pid
        rig.run("kill", "-9", str(before))
        until(lambda: rig.pid not in (0, before), 10)
        time.sleep(2)
    done, failures = sum(load.report["done"].values()), load.report["failures"]
    assert sum(failures.values()) <= 50, "only what was under way can fail"
    assert not any("refused" in failure for failure in failures), "the socket outlives the process"
    until(lambda: int(rig.sql("SELECT count(*) FROM usage WHERE status = 200")) - booked >= done, 10)
    rows = int(rig.sql("SELECT count(*) FROM usage WHERE status = 200")) - booked
    assert rows <= done + sum(failures.values())
    assert rig.sql("SELECT count(*) - count(DISTINCT id) FROM usage") == "0"
    assert rig.sql("SELECT (SELECT sum(requests) FROM totals) - (SELECT count(*) FROM usage)") == "0"


def test_it_writes_nowhere_but_in_its_own_directories(rig: Rig) -> None:
    rig.write("/opt/rig/probe.py", PROBE)
    rig.run("cp", "/etc/systemd/system/gproxyd.service", "/etc/systemd/system/probe.service")
    change = "[Service]\nType=oneshot\nRestart=no\nSockets=\nWatchdogSec=0\nExecStart=\n"
    rig.write("/etc/systemd/system/probe.service.d/probe.conf", f"{change}ExecStart={PYTHON} /opt/rig/probe.py\n")
    rig.systemctl("daemon-reload")
    rig.systemctl("start", "probe")
    lines = rig.run("journalctl", "-u", "probe", "-o", "cat", "--no-pager").stdout.splitlines()
    found = json.loads(next(line for line in lines if line.startswith("{")))
    own = {"/var/lib/gproxyd", "/run/gproxyd", "/tmp"}
    assert {name for name, result in found.items() if result == "done"} == own
    assert found["/etc"] == found["/usr"] == found["/opt/gproxyd"] == "Read-only file system"
    assert found["mount"] == "Operation not permitted"


def test_several_processes_share_a_port_and_the_ledger(rig: Rig) -> None:
    assert rig.chat() == "200"
    rig.systemctl("stop", "gproxyd.socket", "gproxyd-admin.socket", "gproxyd")
    booked = int(rig.sql("SELECT count(*) FROM usage"))
    rig.run("cp", "-r", "/etc/systemd/system/gproxyd.service.d", "/etc/systemd/system/gproxyd@.service.d")
    rig.systemctl("daemon-reload")
    rig.systemctl("start", "gproxyd@1.service", "gproxyd@2.service")
    try:
        assert {rig.chat() for _ in range(24)} == {"200"}
        for one in ("1", "2"):
            command = ["providers", "--json", "--socket", f"/run/gproxyd/{one}/admin.sock"]
            assert "main" in rig.run("/opt/gproxyd/bin/gproxyd", *command).stdout
            lines = rig.run("journalctl", "-u", f"gproxyd@{one}", "-o", "cat", "--no-pager").stdout
            assert '"path":"/v1/chat/completions"' in lines, "the kernel gave everything to the other one"
        rig.systemctl("reload", "gproxyd@1.service")
    finally:
        rig.systemctl("stop", "gproxyd@1.socket", "gproxyd@2.socket", "gproxyd@1.service", "gproxyd@2.service")
        rig.systemctl("start", "gproxyd.socket", "gproxyd-admin.socket")
    assert int(rig.sql("SELECT count(*) FROM usage")) - booked == 24
