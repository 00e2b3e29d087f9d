"""The units as files: what systemd's own checkers say, and what must not be left to its defaults."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = ROOT / "systemd"
SERVICES = ["gproxyd.service", "gproxyd@.service"]
SOCKETS = ["gproxyd.socket", "gproxyd-admin.socket", "gproxyd@.socket"]

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Section -> key -> every value that it is given."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in (UNITS / name).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


@needs_analyze
def test_systemd_finds_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    """It only prints what it dislikes, and exits with 0. Of the program it wants to know that it is there."""
    for name in SERVICES + SOCKETS:
        text = (UNITS / name).read_text().replace("/opt/gproxyd/bin/gproxyd", shutil.which("true") or "/bin/true")
        (tmp_path / name).write_text(text)
    line = ["systemd-analyze", "verify", "--man=no", *(tmp_path / name for name in SERVICES + SOCKETS)]
    checked = subprocess.run(line, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@needs_analyze
@pytest.mark.parametrize("name", SERVICES)
def test_the_exposure_is_no_more_than_1_3(name: str) -> None:
    line = ["systemd-analyze", "security", "--offline=true", "--no-pager", UNITS / name]
    told = subprocess.run(line, capture_output=True, text=True, env={"SYSTEMD_COLORS": "0", "PATH": "/usr/bin:/bin"})
    score = re.search(r"Overall exposure level for .*: ([0-9.]+)", told.stdout)
    assert score is not None, told.stderr
    assert float(score[1]) <= 1.3


@pytest.mark.parametrize("name", SERVICES)
def test_what_must_not_be_left_to_defaults(name: str) -> None:
    service, head = unit(name)["Service"], unit(name)["Unit"]
    assert head["StartLimitIntervalSec"] == ["0"], "many restarts would stop it, and its socket with it"
    assert service["RestartPreventExitStatus"] == ["78"]
    assert service["LimitCORE"] == ["0"]
    assert service["SystemCallErrorNumber"] == ["EPERM"], "a call that is not allowed would kill it"
    assert "ProcSubset" not in service, "it would see nothing of itself for its own figures"
    assert service["Type"] == ["notify"], "systemd 252 knows no notify-reload"
    assert service["NotifyAccess"] == ["main"]
    assert "KillMode" not in service, "a process that drains after a hand-off must hear of a stop"


def test_the_two_services_differ_in_their_names_only() -> None:
    one, many = unit(SERVICES[0])["Service"], unit(SERVICES[1])["Service"]
    differing = {key for key in one.keys() | many.keys() if one.get(key) != many.get(key)}
    assert differing == {"Sockets", "ExecReload", "RuntimeDirectory", "RuntimeDirectoryPreserve"}


@pytest.mark.parametrize("name", SOCKETS)
def test_sockets_survive_any_number_of_crashes(name: str) -> None:
    socket = unit(name)["Socket"]
    assert socket["TriggerLimitIntervalSec"] == ["0"]
    assert socket["FileDescriptorName"] == (["admin"] if "admin" in name else ["http"])
    assert socket.get("ReusePort") == (["yes"] if "@" in name else None)
    if "admin" in name:
        assert socket["SocketMode"] == ["0600"]
    else:
        assert socket["Backlog"] == ["4096"]


def test_the_user_and_the_directories_are_made_as_the_service_wants_them(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("systemd-sysusers is not installed")
    (tmp_path / "etc").mkdir()
    file = UNITS / "sysusers.d/gproxyd.conf"
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", file], check=True, capture_output=True)
    user = (tmp_path / "etc/passwd").read_text()
    assert re.search(
        r"^gproxyd:x:\d+:\d+:gproxyd, an LLM gateway:/var/lib/gproxyd:/usr/sbin/nologin$", user, re.MULTILINE
    )
    modes = (
        line.split()[:3] for line in (UNITS / "tmpfiles.d/gproxyd.conf").read_text().splitlines() if line[0] == "d"
    )
    assert {path: mode for _, path, mode in modes} == {
        "/etc/gproxyd": "0750",
        "/etc/gproxyd/credentials": "0700",
        "/run/gproxyd": "0755",
    }


def test_make_install_puts_everything_in_its_place(tmp_path: Path) -> None:
    """All but the libraries, which the internet would be needed for."""
    line = ["make", "-C", str(ROOT), "install-files", f"DESTDIR={tmp_path}", "prefix=/usr/local/gproxyd"]
    made = subprocess.run(line, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    for name in SERVICES + SOCKETS:
        assert (tmp_path / "usr/lib/systemd/system" / name).stat().st_mode & 0o777 == 0o644
    for name in SERVICES:
        text = (tmp_path / "usr/lib/systemd/system" / name).read_text()
        assert "/opt/gproxyd" not in text
        assert "ExecStart=/usr/local/gproxyd/bin/gproxyd serve\n" in text
    assert (tmp_path / "usr/lib/sysusers.d/gproxyd.conf").is_file()
    assert (tmp_path / "usr/lib/tmpfiles.d/gproxyd.conf").is_file()
    config = tmp_path / "etc/gproxyd/gproxyd.yaml"
    assert config.read_text() == (ROOT / "etc/gproxyd.yaml").read_text()
    config.write_text("mine: yes\n")
    assert subprocess.run(line, capture_output=True).returncode == 0
    assert config.read_text() == "mine: yes\n", "an administrator's file was overwritten"
    assert (tmp_path / "usr/bin/gproxyd").readlink() == Path("/usr/local/gproxyd/bin/gproxyd")
