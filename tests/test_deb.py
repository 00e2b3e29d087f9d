"""The Debian package: built, looked through, and installed, upgraded under load, removed and purged on a real systemd.

It takes a minute to build, and downloads what requirements.txt names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd import rig as rigs
from tests.systemd.rig import SCRIPT, VENDOR, Load, Rig

ROOT = Path(__file__).parent.parent
PYTHON = Path("/usr/bin/python3")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None or not PYTHON.exists(), reason="this is no Debian"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built in a copy of the checkout."""
    copy = tmp_path_factory.mktemp("source") / "gproxyd"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", ".*_cache", "*.db*"))
    out = tmp_path_factory.mktemp("debs")
    done = subprocess.run(
        ["packaging/build-deb", Path(sys.prefix, "bin"), PYTHON, out],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("gproxyd_*.deb")
    return made


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["dpkg-deb", "-R", package, folder], check=True)
    return folder


WANTED = """\
etc/gproxyd/gproxyd.yaml
opt/gproxyd/bin/gproxyd
usr/lib/systemd/catalog/gproxyd.catalog
usr/lib/systemd/system/gproxyd-admin.socket
usr/lib/systemd/system/gproxyd.service
usr/lib/systemd/system/gproxyd.socket
usr/lib/systemd/system/gproxyd@.service
usr/lib/systemd/system/gproxyd@.socket
usr/lib/sysusers.d/gproxyd.conf
usr/lib/tmpfiles.d/gproxyd.conf
usr/share/bash-completion/completions/gproxyd
usr/share/doc/gproxyd/changelog.gz
usr/share/doc/gproxyd/copyright
usr/share/fish/vendor_completions.d/gproxyd.fish
usr/share/gproxyd/grafana/gproxyd.json
usr/share/gproxyd/prometheus/gproxyd.rules.yml
usr/share/man/man5/gproxyd.yaml.5.gz
usr/share/man/man8/gproxyd.8.gz
usr/share/zsh/vendor-completions/_gproxyd
"""


def test_everything_is_where_it_belongs(unpacked: Path) -> None:
    assert [name for name in WANTED.splitlines() if not (unpacked / name).is_file()] == []
    assert os.readlink(unpacked / "usr/bin/gproxyd") == "/opt/gproxyd/bin/gproxyd"
    assert re.fullmatch(r"/usr/bin/python3\.\d+", os.readlink(unpacked / "opt/gproxyd/bin/python3"))
    assert {path.name for path in unpacked.iterdir()} == {"DEBIAN", "etc", "opt", "usr"}
    assert (unpacked / "DEBIAN/conffiles").read_text() == "/etc/gproxyd/gproxyd.yaml\n"


def test_everything_is_roots_and_nobody_elses_to_write(package: Path) -> None:
    listing = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    path = package.with_suffix(".tar")
    path.write_bytes(listing)
    with tarfile.open(path) as tar:
        for member in tar:
            assert (member.uid, member.gid) == (0, 0), member.name
            assert member.issym() or not member.mode & 0o6022, f"{member.name}: {member.mode:o}"


def test_what_the_units_start_is_in_it(unpacked: Path) -> None:
    for unit in (unpacked / "usr/lib/systemd/system").iterdir():
        for line in re.findall(r"^Exec\w+=[-+!@:]*(\S+)", unit.read_text(), re.MULTILINE):
            assert (unpacked / line.lstrip("/")).is_file(), f"{unit.name}: {line}"


def test_it_says_nothing_of_the_machine_that_built_it(unpacked: Path, package: Path) -> None:
    """Paths of a build are in no file: neither in sources, nor in compiled ones, nor in lists of files."""
    told = [str(ROOT).encode(), str(package.parent.parent).encode(), os.path.expanduser("~/").encode() + b"."]
    found = [
        path
        for path in unpacked.rglob("*")
        if path.is_file() and not path.is_symlink() and any(one in path.read_bytes() for one in told)
        if path.suffix != ".so"  # of the wheels' own builders
    ]
    assert found == []


def test_it_is_compiled_and_complete(unpacked: Path) -> None:
    library = next((unpacked / "opt/gproxyd/lib").glob("python3*")) / "site-packages"
    bare = [
        path
        for path in (library / "gproxyd").rglob("*.py")
        if not list((path.parent / "__pycache__").glob(path.stem + ".*.pyc"))
    ]
    assert bare == []
    ours = {path.relative_to(ROOT) for path in (ROOT / "gproxyd").rglob("*.py")}
    assert {path.relative_to(library) for path in (library / "gproxyd").rglob("*.py")} == ours
    assert not (library / "setuptools").exists() and not (library / "pip").exists()
    shown = subprocess.run(
        [unpacked / "opt/gproxyd/bin/python3", "-m", "gproxyd", "check", "--config", unpacked / "etc/gproxyd"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        timeout=60,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_its_lists_and_scripts_hold(unpacked: Path) -> None:
    done = subprocess.run(
        ["md5sum", "--check", "--quiet", "DEBIAN/md5sums"], cwd=unpacked, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    for script in ("postinst", "prerm", "postrm"):
        subprocess.run(["sh", "-n", unpacked / "DEBIAN" / script], check=True)
    control = (unpacked / "DEBIAN/control").read_text()
    assert "@" not in control.replace("root@localhost", "")


# On a machine.


class Machine(Rig):
    """A machine on which the package is installed as an administrator would do it."""

    def __init__(self, debs: Path) -> None:
        super().__init__()
        self._debs = debs

    def __enter__(self) -> Machine:
        place = self._added / "opt/rig"
        place.mkdir(parents=True)
        for name in ("upstream.py", "load.py"):
            shutil.copy(SCRIPT.with_name(name), place)
        units = self._added / "etc/systemd/system"
        units.mkdir(parents=True)
        (units / "vendor.service").write_text(VENDOR)
        environ = {**os.environ, "SYSD_BIND": f"{self._debs}:/debs"}
        subprocess.run([SCRIPT, "start", self._machine], check=True, env=environ, timeout=60)
        return self

    def dpkg(self, *words: str) -> str:
        done = self.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--force-confold", *words)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def debs(package: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in three versions."""
    folder = tmp_path_factory.mktemp("versions")
    control = unpacked / "DEBIAN/control"
    first = control.read_text()
    shutil.copy(package, folder / "1.deb")
    for number in (2, 3):
        control.write_text(re.sub(r"(?m)^(Version: .*)$", rf"\1+{number}", first))
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", unpacked, folder / f"{number}.deb"],
            check=True,
            capture_output=True,
        )
    control.write_text(first)
    return folder


@pytest.fixture(scope="module")
def machine(debs: Path) -> Iterator[Machine]:
    if (why := rigs.unfit()) is not None:
        pytest.skip(why)
    with Machine(debs) as made:
        yield made


CONFIG = rigs.CONFIG.replace("log: {format: json}\n", "")


def test_installed_it_runs_and_tells_the_journal(machine: Machine) -> None:
    machine.dpkg("-i", "/debs/1.deb")
    for unit in ("gproxyd.socket", "gproxyd-admin.socket", "gproxyd.service"):
        assert machine.show("ActiveState", unit) == "active", machine.tail()
        assert machine.run("systemctl", "is-enabled", unit).stdout == "enabled\n"
    assert machine.run("stat", "-c", "%U:%G %a", "/etc/gproxyd", "/var/lib/gproxyd").stdout == (
        "root:gproxyd 750\ngproxyd:gproxyd 700\n"
    )
    assert machine.status() == "200"
    assert machine.run("gproxyd", "version").stdout.startswith("gproxyd ")
    ready = machine.run("journalctl", "-u", "gproxyd", "GPROXYD_EVENT=ready", "-o", "cat", "--no-pager").stdout
    assert ready.startswith("ready version="), machine.tail()
    explained = machine.run("journalctl", "-u", "gproxyd", "GPROXYD_EVENT=ready", "--catalog", "--no-pager").stdout
    assert "Subject: gproxyd serves" in explained
    assert "man:gproxyd(8)" in explained


def test_requests_are_found_in_the_journal_by_their_fields(machine: Machine) -> None:
    machine.write("/etc/gproxyd/conf.d/rig.yaml", CONFIG)
    machine.write("/etc/gproxyd/credentials/vendor-key", rigs.VENDOR_KEY)
    machine.drop_in("credentials", rigs.CREDENTIAL)
    machine.systemctl("start", "vendor")
    machine.systemctl("restart", "gproxyd")
    assert machine.chat() == "200"
    asked = ("GPROXYD_PROVIDER=main", "GPROXYD_STATUS=200", "-o", "json", "--no-pager")
    rigs.until(lambda: machine.run("journalctl", "-u", "gproxyd", *asked).stdout, 5)
    (line,) = machine.run("journalctl", "-u", "gproxyd", *asked).stdout.splitlines()
    entry = rigs.json.loads(line)
    assert (entry["GPROXYD_MODEL"], entry["GPROXYD_KEY"], entry["PRIORITY"]) == ("m", "ann/k", "6")
    assert (entry["_TRANSPORT"], entry["SYSLOG_IDENTIFIER"]) == ("journal", "gproxyd")
    assert entry["MESSAGE"].startswith("POST /v1/chat/completions main/m 200 ok ")
    assert rigs.KEY not in line and rigs.VENDOR_KEY not in line


def test_an_upgrade_under_load_fails_no_request_and_cuts_no_stream(machine: Machine) -> None:
    before = machine.pid
    with Load(machine, keeping=16, closing=4, streaming=4) as load:
        for version in ("2", "3", "2"):
            machine.dpkg("-i", f"/debs/{version}.deb")
            assert machine.show("ActiveState") in ("active", "reloading")
    print(load.report)
    assert load.report["failures"] == {}
    assert load.report["done"]["keep"] > 50 and load.report["done"]["stream"] > 3
    assert machine.pid != before
    assert machine.chat() == "200"


def test_removed_it_is_gone_and_its_data_stays(machine: Machine) -> None:
    machine.dpkg("-r", "gproxyd")
    assert machine.status() == "000"
    assert machine.run("sh", "-c", "ls -d /opt/gproxyd /run/gproxyd", check=False).stdout == ""
    machine.run("test", "-s", "/var/lib/gproxyd/gproxyd.db")
    machine.run("test", "-s", "/etc/gproxyd/conf.d/rig.yaml")


def test_installed_again_it_goes_on_where_it_was(machine: Machine) -> None:
    machine.dpkg("-i", "/debs/3.deb")
    assert machine.chat() == "200"
    assert int(machine.sql("select count(*) from usage")) > 50


def test_purged_nothing_is_left(machine: Machine) -> None:
    machine.dpkg("-P", "gproxyd")
    left = (
        "ls -d /opt/gproxyd /etc/gproxyd /var/lib/gproxyd /run/gproxyd /usr/bin/gproxyd /etc/systemd/system/*/gproxyd*"
    )
    assert machine.run("sh", "-c", left, check=False).stdout == ""
    assert machine.status() == "000"
    assert "gproxyd" not in machine.run("systemctl", "--failed", "--no-legend", "--plain").stdout
