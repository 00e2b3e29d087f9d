"""`gproxyd demo`: every line that it prints, and every line of the guide to a first request, works when pasted."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.process import clean_environ
from tests.support.running import until

PORT = 8787

GUIDE = r"""
curl http://127.0.0.1:8787/v1/chat/completions \
  -H "Authorization: Bearer sk-admin-1" \
  -H "Content-Type: application/json" \
  -d '{ "model": "openai-main/gpt-4.1-mini", "messages": [ { "role": "user", "content": "Say hello in one short sentence." } ] }'

curl http://127.0.0.1:8787/openai-main/v1/chat/completions \
  -H "Authorization: Bearer sk-admin-1" \
  -H "Content-Type: application/json" \
  -d '{ "model": "gpt-4.1-mini", "messages": [ { "role": "user", "content": "Say hello in one short sentence." } ] }'

curl http://127.0.0.1:8787/v1/messages \
  -H "x-api-key: sk-admin-1" \
  -H "anthropic-version: 2023-06-01" \
  -H "Content-Type: application/json" \
  -d '{ "model": "anthropic-main/claude-3-5-sonnet-latest", "max_tokens": 256, "messages": [ { "role": "user", "content": "Hello" } ] }'

curl http://127.0.0.1:8787/anthropic-main/v1/messages \
  -H "x-api-key: sk-admin-1" \
  -H "anthropic-version: 2023-06-01" \
  -H "Content-Type: application/json" \
  -d '{ "model": "claude-3-5-sonnet-latest", "max_tokens": 256, "messages": [ { "role": "user", "content": "Hello" } ] }'

curl "http://127.0.0.1:8787/v1beta/models/vertex-main/gemini-1.5-flash:generateContent" \
  -H "x-goog-api-key: sk-admin-1" \
  -H "Content-Type: application/json" \
  -d '{ "contents": [ { "parts": [ { "text": "Hello" } ] } ] }'

curl "http://127.0.0.1:8787/vertex-main/v1beta/models/gemini-1.5-flash:generateContent" \
  -H "x-goog-api-key: sk-admin-1" \
  -H "Content-Type: application/json" \
  -d '{ "contents": [ { "parts": [ { "text": "Hello" } ] } ] }'

curl http://127.0.0.1:8787/v1/models \
  -H "Authorization: Bearer sk-admin-1"

curl http://127.0.0.1:8787/openai-main/v1/models \
  -H "Authorization: Bearer sk-admin-1"
"""  # noqa: E501 - the lines as a reader would paste them

LINES = [line for line in GUIDE.replace("\\\n", "").splitlines() if line]

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def printed() -> Iterator[str]:
    """What the demonstration prints; it serves meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gproxyd", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environ(),
    )
    try:
        assert process.stdout is not None
        lines = []
        while "healthz" not in (line := process.stdout.readline()):
            assert process.poll() is None, process.stderr and process.stderr.read()
            lines.append(line)
        yield "".join([*lines, line])
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


def paste(line: str) -> str:
    """The line in a shell, quietly; fails on a status of 400 or more."""
    done = subprocess.run(
        ["bash", "-c", line.replace("curl ", "curl -sS --fail-with-body --max-time 10 ", 1)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(answer: str) -> set[str]:
    """Every model name that an answer bears."""
    return set(re.findall(r'"(?:model|modelVersion)": ?"([^"]+)"', answer))


@pytest.mark.parametrize("line", LINES[:6], ids=range(6))
def test_the_guides_requests(printed: str, line: str) -> None:
    answer = json.loads(paste(line))
    asked = re.search(r'"model": "([^"]+)"', line)
    if asked is not None:
        assert names(json.dumps(answer)) == {asked[1]}
    elif "/v1beta/models/vertex-main/" in line:
        assert answer["modelVersion"] == "vertex-main/gemini-1.5-flash"
    else:
        assert answer["modelVersion"] == "gemini-1.5-flash"


def test_the_guides_lists(printed: str) -> None:
    everything = {model["id"] for model in json.loads(paste(LINES[6]))["data"]}
    assert {
        "openai-main/gpt-4.1-mini",
        "anthropic-main/claude-3-5-sonnet-latest",
        "vertex-main/gemini-1.5-flash",
        "chat-default",
    } <= everything
    scoped = {model["id"] for model in json.loads(paste(LINES[7]))["data"]}
    assert {"gpt-4.1-mini", "chat-default"} <= scoped
    assert not any(name.startswith("anthropic") for name in scoped)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/openai-main/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_alias_of_the_guide_comes_back_in_every_chunk(printed: str, path: str, stream: bool) -> None:
    body = json.dumps({"model": "chat-default", "stream": stream, "messages": [{"role": "user", "content": "Hi"}]})
    answer = paste(
        f"curl http://127.0.0.1:{PORT}{path} -H 'Authorization: Bearer sk-admin-1' "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )
    assert names(answer) == {"chat-default"}
    assert ("data: [DONE]" in answer) is stream


def test_every_printed_line_works(printed: str) -> None:
    lines = [line for line in printed.splitlines() if line.startswith("curl ")]
    assert len(lines) == 8
    answers = [paste(line) for line in lines]
    assert all(answers)
    streamed = [answer for line, answer in zip(lines, answers, strict=True) if " -N " in line]
    assert len(streamed) == 3
    assert all(answer.count("data: ") > 3 for answer in streamed)


def test_a_second_demonstration_says_that_the_port_is_taken(printed: str) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "gproxyd", "demo"], capture_output=True, text=True, timeout=20, env=clean_environ()
    )
    assert second.returncode == 1
    assert f"gproxyd: cannot listen on 127.0.0.1:{PORT}" in second.stderr
    until(lambda: paste(LINES[6]))
