"""Entries for journald: what arrives on its socket, and that nothing of a peer's makes a field of its own."""

from __future__ import annotations

import array
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

import gproxyd
from gproxyd.observe import journal as journals
from gproxyd.observe import native
from gproxyd.observe.journal import Journal, default_form

CATALOG = Path(__file__).parent.parent / "systemd" / "gproxyd.catalog"

Entry = dict[str, str]


def parse(data: bytes) -> Entry:
    """A datagram as journald reads it; no field may come twice."""
    fields: Entry = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, mark, value = line.partition(b"=")
        if not mark:
            size = int.from_bytes(data[:8], "little")
            value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
            assert end == b"\n"
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), name
        assert name.decode() not in fields, f"{name!r} twice"
        fields[name.decode()] = value.decode()
    return fields


class Journald:
    """A socket like journald's."""

    def __init__(self, path: Path, buffer: int | None = None) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.bind(str(path))
        self.socket.settimeout(5)
        self.files = 0

    def read(self) -> Entry:
        data, attached, _, _ = self.socket.recvmsg(2**20, socket.CMSG_SPACE(4))
        if not attached:
            return parse(data)
        assert data == b"", "journald ignores a file that comes with a payload"
        (handle,) = array.array("i", attached[0][2])
        with os.fdopen(handle, "rb") as file:
            self.files += 1
            file.seek(0)
            return parse(file.read())

    def close(self) -> None:
        self.socket.close()
        self.path.unlink(missing_ok=True)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    made = Journald(tmp_path / "socket")
    yield made
    made.close()


@pytest.fixture
def journal(journald: Journald) -> Iterator[Journal]:
    made = Journal(level="debug", form="journal", socket=journald.path)
    yield made
    made.close()


def test_a_record_is_an_entry_with_its_fields(journal: Journal, journald: Journald) -> None:
    journal.record("warning", "credential_refused", provider="openai-main", credential="<key>", status=401, more=None)
    entry = journald.read()
    at = entry.pop("GPROXYD_TIME")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at)
    assert entry == {
        "MESSAGE": "credential_refused provider=openai-main credential=<key> status=401",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "gproxyd",
        "MESSAGE_ID": native.MESSAGE_IDS["credential_refused"],
        "GPROXYD_EVENT": "credential_refused",
        "GPROXYD_PROVIDER": "openai-main",
        "GPROXYD_CREDENTIAL": "<key>",
        "GPROXYD_STATUS": "401",
    }


@pytest.mark.parametrize(("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3")])
def test_levels_are_syslog_priorities(journal: Journal, journald: Journald, level: str, priority: str) -> None:
    journal.record(level, "ready")
    assert journald.read()["PRIORITY"] == priority


def test_rendered_members_become_fields_again(journal: Journal, journald: Journald) -> None:
    assert journal.takes_json
    told = {"request_id": "req_1", "method": "POST", "path": "/v1/x y", "provider": "p", "model": "m", "status": 200}
    rendered = journals.members({**told, "outcome": "ok", "duration_ms": 12.5, "stream": True})
    journal.put_members("info", "request", rendered)
    entry = journald.read()
    assert entry["MESSAGE"] == "POST /v1/x y p/m 200 ok 12.5 ms"
    assert entry["GPROXYD_REQUEST_ID"] == "req_1"
    assert (entry["GPROXYD_PROVIDER"], entry["GPROXYD_MODEL"]) == ("p", "m")
    assert (entry["GPROXYD_DURATION_MS"], entry["GPROXYD_STREAM"]) == ("12.5", "true")


def test_members_that_are_no_json_are_told_all_the_same(journal: Journal, journald: Journald) -> None:
    journal.put_members("info", "request", '"request_id":"req_1","broken')
    assert journald.read()["GPROXYD_UNREADABLE"] == '"request_id":"req_1","broken'
    journal.record("info", "ready")
    assert journald.read()["GPROXYD_EVENT"] == "ready"


HOSTILE = [
    "a\nPRIORITY=0",
    "\nMESSAGE=forged\n",
    "a\n\x05\x00\x00\x00\x00\x00\x00\x00",
    "a=b=c",
    "\x1b[2J",
    "\u202ereversed",
    "\udcff",
    "",
]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_no_value_becomes_another_field_or_moves_a_cursor(journal: Journal, journald: Journald, value: str) -> None:
    journal.record("info", "ready", listen=value)
    journal.put_members("info", "request", '"path":' + orjson.dumps(value.encode("utf-8", "replace").decode()).decode())
    for entry in (journald.read(), journald.read()):
        assert entry["PRIORITY"] == "6"
        told = entry.get("GPROXYD_LISTEN", entry.get("GPROXYD_PATH", ""))
        assert told.replace("\n", "").isprintable()
        assert len(told) == len(value)
        assert entry["MESSAGE"].isprintable()


def test_a_message_of_several_lines_stays_one_entry(journal: Journal, journald: Journald) -> None:
    journal.record("error", "configuration", message="first\nsecond", path="x")
    entry = journald.read()
    assert entry["MESSAGE"] == "configuration: first\nsecond"
    assert entry["GPROXYD_PATH"] == "x"


def test_what_is_too_long_for_a_datagram_goes_as_a_sealed_file(
    journald: Journald, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_BUFFER", 2048)
    journal = Journal(form="journal", socket=journald.path)
    fields = {f"field{number}": f"{number % 10}" * 500 for number in range(40)}
    journal.put("info", "ready", fields)
    entry = journald.read()
    journal.close()
    assert journald.files == 1
    assert all(entry[f"GPROXYD_{name.upper()}"] == value for name, value in fields.items())
    assert journal.lost == 0


def test_a_slow_journald_loses_nothing_and_nobody_waits_for_it(tmp_path: Path) -> None:
    journald = Journald(tmp_path / "socket")
    journal = Journal(form="journal", socket=journald.path)
    slowest = 0.0
    for number in range(3_000):
        before = time.perf_counter()
        journal.record("info", "ready", number=number, text="x" * 400)
        slowest = max(slowest, time.perf_counter() - before)
    time.sleep(0.2)
    assert [journald.read()["GPROXYD_NUMBER"] for _ in range(3_000)] == [str(number) for number in range(3_000)]
    journal.close()
    journald.close()
    assert (journal.lost, slowest < 0.2) == (0, True)


def test_a_journald_that_never_reads_costs_entries_which_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "PATIENCE", 0.02)
    monkeypatch.setattr(journals, "MAX_WAITING", 100)
    journald = Journald(tmp_path / "socket")
    journal = Journal(form="journal", socket=journald.path)
    for number in range(5_000):
        journal.record("info", "ready", number=number, text="x" * 500)
        if number % 100 == 0:
            time.sleep(0.001)
    deadline = time.monotonic() + 5
    while not journal.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert journal.lost > 0
    arrived: list[Entry] = []
    journald.socket.settimeout(0.3)
    while not any(entry["GPROXYD_EVENT"] == "log_lines_dropped" for entry in arrived):
        arrived.append(journald.read())
        journal.record("info", "ready", number=-1)
    assert [entry["GPROXYD_COUNT"] for entry in arrived if entry["GPROXYD_EVENT"] == "log_lines_dropped"] != []
    journald.close()
    journal.close()


def test_a_journald_that_was_started_anew_is_found_again(tmp_path: Path) -> None:
    first = Journald(tmp_path / "socket")
    journal = Journal(form="journal", socket=first.path)
    journal.record("info", "ready")
    first.read()
    first.close()
    second = Journald(tmp_path / "socket")
    journal.record("info", "reloaded")
    assert second.read()["GPROXYD_EVENT"] == "reloaded"
    journal.close()
    second.close()
    assert journal.lost == 0


def test_without_a_journald_it_is_lines_of_json(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    journal = Journal(form="journal", socket=tmp_path / "nobody", descriptor=writer)
    journal.record("info", "ready", version="1")
    journal.close()
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        assert orjson.loads(lines.read())["event"] == "ready"


def test_the_form_is_the_journals_only_if_stderr_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.fstat(2)
    for stream, form in (
        (f"{status.st_dev}:{status.st_ino}", "journal"),
        (f"{status.st_dev}:{status.st_ino + 1}", "json"),
        ("nonsense", "json"),
        ("", "json"),
    ):
        monkeypatch.setenv("JOURNAL_STREAM", stream)
        monkeypatch.setattr("sys.stderr", open(os.devnull, "w"))  # noqa: SIM115 - no terminal, whoever runs this
        assert default_form() == form
        os.sys.stderr.close()  # type: ignore[attr-defined]
        monkeypatch.undo()
    assert not native.is_stream(987_654, "1:2")


# The catalogue.


def catalogue() -> dict[str, str]:
    """Id -> what is said of it."""
    parts = re.split(r"^-- ([0-9a-f]{32})\n", CATALOG.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_documented_event_is_explained_and_nothing_else() -> None:
    explained = catalogue()
    assert set(explained) == set(native.MESSAGE_IDS.values())
    assert len(explained) == len(native.MESSAGE_IDS), "two events share an id"
    for text in explained.values():
        assert re.match(r"Subject: \S.*\nDefined-By: gproxyd\nDocumentation: man:gproxyd\(8\)\n\n\S", text)


def test_what_is_told_of_fields_names_fields_that_exist() -> None:
    """`@FIELD@` is filled in by journalctl; a name that no code uses would stay as it is."""
    code = "\n".join(path.read_text() for path in Path(gproxyd.__file__).parent.rglob("*.py"))
    for text in catalogue().values():
        for name in re.findall(r"@GPROXYD_([A-Z_]+)@", text):
            assert re.search(rf'\b{name.lower()}\b["=]', code), name


def test_every_event_that_the_code_tells_has_an_id() -> None:
    calls = re.compile(
        r'(?:record\(\s*"(?:debug|info|warning|error)",\s*|(?:_warn|_alarm|told\.record)\(\s*)"([a-z_]+)"'
    )
    told = {
        (event, path.name)
        for path in Path(gproxyd.__file__).parent.rglob("*.py")
        for event in calls.findall(path.read_text())
    }
    assert len(told) > 15
    assert {(event, name) for event, name in told if event not in native.MESSAGE_IDS} == set()


@pytest.mark.skipif(shutil.which("journalctl") is None, reason="journalctl is not here")
def test_journalctl_takes_the_catalogue(tmp_path: Path) -> None:
    place = tmp_path / "usr/lib/systemd/catalog"
    place.mkdir(parents=True)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    shutil.copy(CATALOG, place)
    made = subprocess.run(["journalctl", "--update-catalog", f"--root={tmp_path}"], capture_output=True, timeout=30)
    assert (made.returncode, made.stderr) == (0, b"")
    ids = list(native.MESSAGE_IDS.values())
    shown = subprocess.run(
        ["journalctl", "--dump-catalog", f"--root={tmp_path}", *ids], capture_output=True, timeout=30
    )
    assert shown.returncode == 0
    assert shown.stdout.count(b"Subject: ") == len(ids)
