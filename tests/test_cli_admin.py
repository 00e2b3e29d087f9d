"""The commands that ask a running daemon, as a shell runs them, against the admin API on a Unix socket."""

from __future__ import annotations

import csv
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gproxyd.admin.api import Admin
from gproxyd.cli import main
from gproxyd.errors import Refusal
from gproxyd.store.database import Database
from gproxyd.types import Question
from tests.support.process import clean_environ, run
from tests.support.running import Loop
from tests.test_admin_api import Daemon, Desk
from tests.test_store_ledger import NOON, record


class Place:
    """The admin API of a house on a Unix socket."""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self._loop = loop
        self.path = folder / "admin.sock"
        self.asked: list[str] = []
        self.desk = loop.run(self._open(folder))

    async def _open(self, folder: Path) -> Desk:
        self._database = await Database.open(folder / "gproxyd.db")
        house = Daemon(self._database)
        await house.people_changed()
        self._admin = Admin(house)
        self._runner = web.ServerRunner(web.Server(self._answer, access_log=None))
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()
        return Desk(house)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path_qs}")
        question = Question(
            "unix:root", None, None, request.method, request.raw_path.partition("?")[0], request.query,
            await request.read(),
        )  # fmt: skip
        try:
            answer = await self._admin.answer(question)
        except Refusal as error:
            body = {"error": {"message": error.message, "type": "error", "param": error.param, "code": error.code}}
            return web.json_response(body, status=error.status)
        if isinstance(answer.body, bytes):
            return web.Response(body=answer.body, status=answer.status)
        response = web.StreamResponse(status=answer.status)
        await response.prepare(request)
        async for piece in answer.body:
            await response.write(piece)
        return response

    def close(self) -> None:
        async def stop() -> None:
            self.desk.house.feed.close()
            await self._runner.cleanup()
            await self._database.close()

        self._loop.run(stop())

    def work(self, work: Any) -> Any:
        return self._loop.run(work)

    def cli(self, *arguments: str, status: int = 0) -> str:
        """What the command prints."""
        told = run(*arguments, GPROXYD_ADMIN_SOCKET=str(self.path))
        assert told.returncode == status, told.stderr
        assert "Traceback" not in told.stderr
        return told.stdout if status == 0 else told.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Loop() as loop:
        opened = Place(loop, tmp_path)
        yield opened
        opened.close()


def columns(table: str) -> list[list[str]]:
    """The cells of a table, which two spaces part."""
    return [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in table.splitlines()]


COMMANDS = [
    "users", "users list", "users show", "users add", "users set", "users remove", "keys", "keys list", "keys add",
    "keys set", "keys disable", "keys enable", "keys remove", "quota", "quota show", "quota set", "quota top-up",
    "usage", "logs", "logs list", "logs show", "logs follow", "explain", "models", "providers", "reload", "audit",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: gproxyd {command}" in capsys.readouterr().out


WRONG = [
    "users", "users fly", "users show", "users remove", "users add a --role owner", "users add a --quota much",
    "users add a --rate-limit rpm=many", "users set a --permission x --no-permissions", "keys add alice",
    "quota set alice", "quota top-up alice -5", "usage --by colour", "usage --limit 0", "explain", "models list",
]  # fmt: skip


@pytest.mark.parametrize("command", WRONG)
def test_a_command_that_cannot_be_understood_is_status_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    assert "usage: gproxyd" in capsys.readouterr().err


def test_a_life_of_a_user(place: Place) -> None:
    place.cli(
        "users", "add", "alice", "--role", "read-only", "--permission", "openai-main/*", "--permission", "fast",
        "--rate-limit", "rpm=60,tpm=2000", "--rate-limit", "model=fast,rpd=5", "--quota", "25", "--period", "month",
    )  # fmt: skip
    shown = place.json("users", "show", "alice")
    assert (shown["role"], shown["permissions"]) == ("read-only", ["openai-main/*", "fast"])
    assert [(limit["model"], limit["rpm"], limit["rpd"]) for limit in shown["rate_limits"]] == [
        ("*", 60, 0),
        ("fast", 0, 5),
    ]
    assert (shown["quota"]["usd"], shown["quota"]["period"]) == ("25.00", "month")
    place.cli("users", "set", "alice", "--role", "user", "--no-rate-limits")
    changed = place.json("users", "show", "alice")
    assert (changed["role"], changed["rate_limits"], changed["permissions"]) == ("user", [], shown["permissions"])
    assert changed["quota"] == shown["quota"]
    heading, *rows = columns(place.cli("users", "list"))
    assert heading[:3] == ["NAME", "ROLE", "SOURCE"]
    assert [row[0] for row in rows] == ["alice", "filed", "warden"]
    assert place.cli("users", "remove", "alice") == "removed alice\n"
    assert "no user of that name" in place.cli("users", "show", "alice", status=1)


def test_a_life_of_a_key(place: Place) -> None:
    place.cli("users", "add", "alice")
    told = run(
        "keys", "add", "alice", "laptop", "--expires", "30d", "--model", "fast", GPROXYD_ADMIN_SOCKET=str(place.path)
    )
    token = told.stdout.strip()
    assert told.returncode == 0
    assert told.stdout == f"{token}\n"  # for scripts, the key and nothing else
    assert "nobody can show it again" in told.stderr
    assert place.desk.house.lets_in(token)
    (key,) = place.json("keys", "list", "alice")["data"]
    assert (key["user"], key["name"], key["models"], key["enabled"]) == ("alice", "laptop", ["fast"], True)
    assert key["expires_at"] is not None
    place.cli("keys", "disable", "alice", "laptop")
    assert not place.desk.house.lets_in(token)
    assert columns(place.cli("audit", "--limit", "1"))[1][2:] == ["update_key", "alice/laptop", "enabled=no"]
    place.cli("keys", "enable", "alice", "laptop")
    assert place.desk.house.lets_in(token)
    place.cli(
        "keys", "set", "alice", "laptop", "--all-models", "--expires", "never", "--budget", "2", "--period", "day"
    )
    (key,) = place.json("keys", "list", "alice")["data"]
    assert (key["models"], key["expires_at"], key["budget"]["usd"], key["budget"]["period"]) == (
        None,
        None,
        "2.00",
        "day",
    )
    assert token not in place.cli("keys", "list")
    place.cli("keys", "remove", "alice", "laptop")
    assert not place.desk.house.lets_in(token)
    assert place.cli("keys", "list", "alice") == "there are no keys\n"


def test_a_user_can_be_added_with_keys_at_once(place: Place) -> None:
    told = place.json("users", "add", "alice", "--key", "one", "--key", "two")
    assert [key["name"] for key in told["keys"]] == ["one", "two"]
    assert all(place.desk.house.lets_in(key["token"]) for key in told["keys"])


def test_the_money_of_a_user(place: Place) -> None:
    place.cli("users", "add", "alice")
    place.cli("quota", "set", "alice", "10", "--period", "day")
    assert place.json("quota", "top-up", "alice", "2.50")["remaining_usd"] == "12.50"
    assert ["remaining_usd", "12.50"] in columns(place.cli("quota", "show", "alice"))
    place.cli("quota", "set", "alice", "none")
    assert place.json("quota", "show", "alice")["usd"] is None
    assert "--quota" in place.cli("users", "set", "alice", "--period", "day", status=1)


def test_usage_as_table_sums_json_and_csv(place: Place) -> None:
    place.work(place.desk.book(*(record(id=str(number), at=NOON + number) for number in range(1200))))
    place.work(place.desk.book(record(id="b", user="bob", model="opus", at=NOON - 1, cost_nanousd=None)))
    heading, *rows = columns(place.cli("usage", "--limit", "3"))
    assert heading[:5] == ["AT", "USER", "KEY", "PROVIDER", "MODEL"]
    assert len(rows) == 3
    assert len(place.json("usage", "--limit", "1100")["data"]) == 1100
    assert [row["id"] for row in place.json("usage", "--user", "bob", "--since", "2027-01-15")["data"]] == ["b"]
    assert columns(place.cli("usage", "--by", "user"))[1:] == [
        ["alice", "1200", "0", "120000", "12000", "60000", "0", "0", "0", "0.0672"],
        ["bob", "1", "0", "100", "10", "50", "0", "0", "1", "-"],
    ]
    assert place.cli("usage", "--until", "2020-01-01") == "nothing was used\n"
    assert len(list(csv.DictReader(io.StringIO(place.cli("usage", "--csv"))))) == 1201
    assert len(list(csv.DictReader(io.StringIO(place.cli("usage", "--csv", "--limit", "1001"))))) == 1001


def test_logs_are_listed_and_shown(place: Place) -> None:
    logs = place.desk.house.logs
    assert logs is not None
    logs.put({"request_id": "req_1", "at": NOON, "user": "alice", "status": 200, "request_body": b"{}"})
    place.work(logs.stop())
    assert columns(place.cli("logs", "list"))[1][:3] == ["2027-01-15T12:00:00Z", "req_1", "alice"]
    assert place.json("logs", "show", "req_1")["request_body"] == "{}"
    assert ["request_body", "{}"] in columns(place.cli("logs", "show", "req_1"))
    assert "no envelope" in place.cli("logs", "show", "../users", status=1)
    assert place.asked[-1] == "GET /admin/requests/..%2Fusers"


def test_logs_follow_shows_requests_as_they_finish(place: Place) -> None:
    following = subprocess.Popen(
        [sys.executable, "-m", "gproxyd", "logs", "follow", "--socket", str(place.path)],
        stdout=subprocess.PIPE,
        env=clean_environ(),
    )
    try:
        assert following.stdout is not None
        feed = place.desk.house.feed
        while not feed._subscriptions:
            assert following.poll() is None
        place.work(_publish(place))
        assert b"req_7" in following.stdout.readline()
        place.work(_stop(place))
        assert following.wait(10) == 0
    finally:
        following.kill()
        following.wait(10)
        if following.stdout is not None:
            following.stdout.close()


async def _publish(place: Place) -> None:
    place.desk.house.feed.publish(record(request_id="req_7"))


async def _stop(place: Place) -> None:
    place.desk.house.feed.close()


def test_what_runs_can_be_looked_at_and_reloaded(place: Place) -> None:
    assert columns(place.cli("providers"))[0] == ["NAME", "VENDOR", "USABLE", "MODELS"]
    assert len(place.json("models")["data"]) == 5
    place.cli("models", "--refresh")
    assert "POST /admin/models/refresh" in place.asked
    assert place.json("explain", "chat-default", "--user", "filed")["user"] == "filed"
    assert "gpt-4.1-mini" in place.cli("explain", "chat-default")
    assert place.cli("reload") == "the configuration was read again\n"
    place.desk.house.problems = ["gproxyd.yaml:3: it is bad"]
    assert "gproxyd.yaml:3: it is bad" in place.cli("reload", status=1)
    assert columns(place.cli("audit"))[1][1:3] == ["unix:root", "reload_refused"]


def test_what_a_client_has_named_reaches_no_terminal_as_a_command(place: Place) -> None:
    place.work(place.desk.book(record(model="\x1b]0;owned\x07\nx\u202e")))
    told = place.cli("usage")
    assert "]0;owned" in told
    assert not {"\x1b", "\x07", "\u202e"} & set(told)
    assert len(told.splitlines()) == 2


def test_the_socket_is_an_option_a_variable_or_in_the_runtime_directory(place: Place) -> None:
    for arguments, environ in (
        (["--socket", str(place.path)], {"GPROXYD_ADMIN_SOCKET": "/nowhere"}),
        ([], {"GPROXYD_ADMIN_SOCKET": str(place.path), "RUNTIME_DIRECTORY": "/nowhere"}),
        ([], {"GPROXYD_ADMIN_SOCKET": "", "RUNTIME_DIRECTORY": f"{place.path.parent}:/other"}),
    ):
        assert run("providers", *arguments, **environ).returncode == 0


@pytest.mark.parametrize("command", ["users list", "keys list", "usage", "logs list", "explain m", "reload", "audit"])
def test_without_a_daemon_the_command_says_so(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--socket", str(tmp_path / "admin.sock")]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("gproxyd: no gproxyd runs here: nobody listens on ")


def test_a_socket_left_by_a_dead_daemon_is_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "admin.sock"))
    assert main(["users", "list", "--socket", str(tmp_path / "admin.sock")]) == 1
    assert "no gproxyd runs here" in capsys.readouterr().err


# Python itself may lie where nobody else can read: what it needs is imported before.
_AS_NOBODY = """\
import os, shutil, sys
from gproxyd.cli import main
if os.geteuid() == 0:
    os.setegid(65534), os.seteuid(65534)
sys.exit(main(["users", "list", "--socket", sys.argv[1]]))
"""


def test_a_missing_permission_is_told(place: Place) -> None:
    place.path.chmod(0)
    told = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(place.path)],
        capture_output=True,
        text=True,
        timeout=30,
        env=clean_environ(),
    )
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith(f"gproxyd: no permission for {place.path}")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"220 smtp\r\n\r\n"])
def test_something_else_behind_the_socket_is_no_traceback(
    answer: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "admin.sock"))
        other.listen()

        def serve() -> None:
            client, _ = other.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        status = main(["users", "list", "--socket", str(tmp_path / "admin.sock")])
        thread.join(10)
    assert status == 1
    assert capsys.readouterr().err.startswith("gproxyd: ")


def test_a_reader_that_has_seen_enough_is_no_failure_to_tell_of(place: Place) -> None:
    place.work(place.desk.book(*(record(id=str(number), at=NOON + number) for number in range(3000))))
    told = subprocess.run(
        f"{sys.executable} -m gproxyd usage --csv --socket {place.path} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=30,
        env=clean_environ(),
    )
    assert told.stdout.startswith("id,at,")
    assert told.stderr == ""
