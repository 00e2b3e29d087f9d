"""Damaged requests, and the comparison of what an upstream got with what the gateway's log and records tell of it.

Most rounds are played with a gateway that keeps records; some with one that keeps none, because only that one has its
short way. Records are written a moment later and are read in batches, through the API of the administrators.

FUZZ_SEED=N makes it another run, FUZZ_SECONDS=N a longer one, FUZZ_ROUNDS=N one of so many rounds; a failure tells
its seed, its round and the bytes.
"""

from __future__ import annotations

import base64
import os
import random
import re
import sys
import time
from typing import Any, NamedTuple

import orjson
import pytest
from aiohttp import web_protocol
from aiohttp.http_parser import HttpRequestParserPy

from gproxyd.gateway import door
from tests.support import framing, raw
from tests.support.checks import CREDENTIAL_HEADERS, quick_log
from tests.support.framing import CHAT, CHUNKED, CORPUS, FILES, FIVE, LAST, get, post
from tests.support.fuzz_recorder import Received, Recorder, recording
from tests.support.running import CLIENT_KEY, CONFIG, PROVIDER_KEY, Loop, Running, until

SEED = int(os.environ.get("FUZZ_SEED", "20240607"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "0"))
"""How many rounds, whatever time they take; 0 = for SECONDS."""

PARTS = 4
"""Tests that share the time: several of them keep the modules apart where processes share out modules."""

BATCH = 100
"""Rounds after which records are read."""

ENOUGH = 200
"""Rounds of which some must come through."""

PLAIN_EVERY = 4
"""Every so many rounds it is the gateway without records that is asked."""

RECORDS = (
    "records: {{enable_upstream_log: true, enable_downstream_log: true, enable_upstream_log_body: true, "
    "enable_downstream_log_body: true}}\n"
)
BLANK = "[hidden]"
SHOWN = {b"host", b"accept", b"content-type", b"content-length", b"transfer-encoding", b"user-agent", b"x-stainless-os"}
"""Headers whose values records show. Those of credentials they never do; of others they may or may not."""

OWN = {b"host", b"authorization", b"accept-encoding", b"content-length", b"transfer-encoding"}
"""Headers that the gateway itself writes; all others come from the client."""

JSON_BODY = b'{"model":"gpt-4.1-mini","messages":[]}'
ALIASED = b'{"messages":[],"model":"chat-default","stream":true}'
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b\r\n'
    b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n\0\xff\r\n--b--\r\n'
)
FORM_TYPE = b"Content-Type: multipart/form-data; boundary=b\r\n"
ODD = b"X-Odd: caf\xe9\r\nUser-Agent: OpenAI/Python 2.0\r\nX-Stainless-OS: Linux\r\nX-Long: secret-value\r\n"


def long(body: bytes, lines: bytes = b"", *, target: bytes = CHAT) -> bytes:
    return post(b"%bContent-Length: %d\r\n" % (lines, len(body)), body, target=target)


def upload(lines: bytes, body: bytes) -> bytes:
    return post(lines, body, target=b"/v1/audio/transcriptions").replace(framing.JSON, FORM_TYPE)


VALID = [
    get(),
    get(b"X-One: 1\r\nAccept: */*\r\n") * 2,
    get(ODD, line=b"GET /openai-main/v1/files/f?limit=2&after=x;y&empty= HTTP/1.1"),
    long(FIVE),
    long(FIVE, b"X-Y: z\r\n", target=FILES),
    post(CHUNKED, b"2\r\n{ \r\n3\r\n  }\r\n0\r\n\r\n"),
    post(CHUNKED, b"2;a=b\r\n{ \r\n3\r\n  }\r\n0\r\nX-T: 1\r\n\r\n", target=FILES),
    long(FIVE, target=b"/proxy/openai-main/v1/x?a=b"),
    long(FIVE) + get() + post(CHUNKED, framing.FIVE_CHUNKED),
    long(JSON_BODY, ODD) * 2,
    long(ALIASED, target=b"/v1/chat/completions"),
    long(b"a body with secret-value in it", b"X-Long: secret-value\r\n", target=FILES),
    upload(b"Content-Length: %d\r\n" % len(FORM), FORM),
    upload(CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(FORM), FORM)),
]
SEEDS = [*VALID * 60, *(case.data for case in CORPUS if len(case.data) < 3000)]
MARKS = [
    *(bytes([byte]) for byte in b"\r\n\0 \t:;,\x0b\xff05#"),
    *(b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"chunked", b"HTTP/1.1", b"GET ", b" HTTP/1.0\r\n"),
    *(b"Content-Length: 3\r\n", b"Content-Length: 50\r\n", CHUNKED, b"Transfer-Encoding: gzip, chunked\r\n"),
    *(b"Connection: close\r\n", b"Connection: authorization\r\n", b"Upgrade: websocket\r\n"),
    *(b"Expect: 100-continue\r\n", b"Host: evil.example\r\n", b"X_Api_Key: x\r\n", b"Cookie: a=b\r\n"),
    *(b"/../", b"%2e%2e", b"?key=", b"&key=x", framing.SMUGGLED),
]

HARMLESS = [b"a", b"Z", b"7", b"-", b".", b"~", b"/", b"x-y", b"%41", b" b"]
"""What leaves most requests whole, and so goes upstream."""


def damaged(chance: random.Random) -> bytes:
    """A request, changed at one to three places."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(9):
            case 0:
                data[at:at] = chance.choice(MARKS)
            case 1:
                del data[at : at + chance.randint(1, 4)]
            case 2:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 3:
                end = min(len(data), at + chance.randint(1, 40))
                data[at:at] = data[at:end]
            case 4:
                data[at : at + chance.randint(1, 8)] = chance.choice(MARKS)
            case 5 | 6 | 7:
                data[at : at + chance.randint(0, 1)] = chance.choice(HARMLESS)
            case _:
                data[at:] = chance.choice(SEEDS)[chance.randrange(40) :]
    return bytes(data) or b"\r\n"


class Round(NamedTuple):
    """What a client sent, what came upstream of it, and the log's lines of the requests that were tried there."""

    name: str
    data: bytes
    sent: list[Received]
    lines: list[dict[str, Any]]

    def failed(self, error: Exception, connections: object) -> AssertionError:
        where = f"FUZZ_SEED={SEED}, {self.name}"
        return AssertionError(f"{where}: {error}\n{self.data!r} -> {connections}\nlogged: {self.lines}")


class Fuzzed:
    """A gateway under fuzz; `keeps` says whether it keeps records."""

    def __init__(self, loop: Loop, recorder: Recorder, *, keeps: bool) -> None:
        self._loop = loop
        self._recorder = recorder
        self.keeps = keeps
        config = (CONFIG + (RECORDS if keeps else "")).format(vendor=f"http://127.0.0.1:{recorder.port}")
        self.gateway = loop.gateway(config)
        self.gateway.daemon._told._most = sys.maxsize
        until(self.gateway.log)
        self._offset = os.path.getsize(self.gateway.log_path)

    def play(self, name: str, data: bytes) -> Round:
        """One round, and all of it that is known at once. Raises AssertionError."""
        self._recorder.begin()
        played = Round(name, data, [], [])
        try:
            self._send(data)
            self._loop.run(_emptied(self.gateway))
            self._recorder.settle()
            lines = self._logged()
            played = Round(name, data, self._recorder.requests(), [line for line in lines if line["attempts"]])
            check(played)
        except (AssertionError, ValueError) as error:
            raise played.failed(error, self._recorder.connections) from error
        return played

    def _send(self, data: bytes) -> None:
        with raw.connect(self.gateway.port, timeout=0.5) as sock:
            try:
                sock.sendall(data)
                sock.settimeout(0.01)
                reply = raw.read(sock, until_complete=False)
            except (BrokenPipeError, ConnectionResetError):
                reply = raw.Reply(b"", "rst")
        assert PROVIDER_KEY.encode() not in reply.data
        until(self.gateway.at_rest)

    def _logged(self) -> list[dict[str, Any]]:
        """The log's lines of requests since the last time."""
        marker = raw.send(self.gateway.port, LAST)
        assert marker.status == 200, "the gateway is gone"
        request_id = (marker.header("x-request-id") or "").encode()

        def written() -> bytes:
            with open(self.gateway.log_path, "rb") as log:
                log.seek(self._offset)
                text = log.read()
            return text if request_id in text and text.endswith(b"\n") else b""

        text = until(written)
        self._offset += len(text)
        assert PROVIDER_KEY.encode() not in text and CLIENT_KEY.encode() not in text, text
        lines = [orjson.loads(line) for line in text.splitlines()]
        assert {line["event"] for line in lines} <= {"request", "malformed_request"}, text
        return [line for line in lines if line["event"] == "request"]

    def compare(self, rounds: list[Round]) -> int:
        """Reads the records of these rounds, says how many there were. Raises AssertionError."""
        told = 0
        for played in rounds:
            records = [self._record(line["request_id"]) for line in played.lines]
            try:
                agree(played, records, f"http://127.0.0.1:{self._recorder.port}")
            except AssertionError as error:
                raise played.failed(error, f"{played.sent}\nrecorded: {records}") from error
            told += len(records)
        return told

    def _record(self, request_id: str) -> dict[str, Any]:
        asked = raw.request(f"/admin/requests/{request_id}", headers=[("Connection", "close")])

        def found() -> dict[str, Any] | None:
            reply = raw.send(self.gateway.port, asked)
            assert PROVIDER_KEY.encode() not in reply.data and CLIENT_KEY.encode() not in reply.data, reply.data
            return reply.json if reply.status == 200 else None

        return until(found)


async def _emptied(gateway: Running) -> None:
    """Each round has connections of its own, so that what arrives on one is this round's."""
    gateway.daemon.gateway.exchanges.pool.close()


def upstream_path(path: str) -> bytes:
    for prefix in ("/proxy/openai-main", "/openai-main"):
        if path.startswith(prefix + "/"):
            return path.removeprefix(prefix).encode()
    return path.encode()


def check(played: Round) -> None:
    """Each attempt in the log is one request upstream, with the provider's key and no header of one connection."""
    sent, lines = played.sent, played.lines
    assert len(sent) <= sum(line["attempts"] for line in lines), "more went upstream than was logged"
    waiting = list(sent)
    for line in lines:
        fits = [one for one in waiting if fits_line(one, line)]
        assert fits or line["outcome"] != "ok", f"this did not go upstream: {line}"
        if fits:
            waiting.remove(fits[0])
    assert not waiting, f"this was not logged: {waiting}"
    for one in sent:
        credentials = [(name.lower(), value) for name, value in one.headers if name.lower() in CREDENTIAL_HEADERS]
        assert credentials == [(b"authorization", b"Bearer " + PROVIDER_KEY.encode())]
        names = {name.lower() for name, _ in one.headers}
        assert not names & {b"connection", b"upgrade", b"expect", b"te", b"trailer", b"keep-alive", b"proxy-connection"}
        assert not any(b"_" in name for name in names)


def fits_line(one: Received, line: dict[str, Any]) -> bool:
    if (one.method, one.path) != (line["method"], upstream_path(line["path"])):
        return False
    return line["outcome"] != "ok" or (one.whole and (rewritten(line) or len(one.body) == line["bytes_in"]))


def rewritten(line: dict[str, Any]) -> bool:
    """Whether the body is another than the client's: it has another name of the model, or asks for the usage, too."""
    return line.get("model") != line.get("requested_model") or bool(line.get("stream"))


def agree(played: Round, records: list[dict[str, Any]], origin: str) -> None:
    """Each request upstream is what one record says, to the byte; each record has one, unless it was given up."""
    waiting = list(played.sent)
    for line, record in zip(played.lines, records, strict=True):
        assert (record["outcome"], record["attempts"]) == (line["outcome"], line["attempts"]), record
        differences = [(one, difference(one, record, origin, played.data)) for one in waiting]
        same = next((one for one, found in differences if not found), None)
        if same is not None:
            waiting.remove(same)
            assert_kept(line, record)
        else:
            assert line["outcome"] != "ok", [found for _, found in differences]
    assert not waiting, f"not recorded: {waiting}"


def difference(one: Received, record: dict[str, Any], origin: str, data: bytes) -> str:
    """In what a request differs from its record; empty if in nothing."""
    up = record["upstream"]
    if (one.method, origin + one.path.decode("ascii")) != (up["method"], up["url"]):
        return f"{one.method} {one.path!r} is recorded as {up['method']} {up['url']}"
    if len(one.headers) != len(up["headers"]):
        return f"{one.headers} are recorded as {up['headers']}"
    for (name, value), (told_name, told) in zip(one.headers, up["headers"], strict=True):
        hidden = told == BLANK and name.lower() not in SHOWN
        shown = told == value.decode("latin-1") and name.lower() not in CREDENTIAL_HEADERS
        if name.decode("latin-1") != told_name or not (hidden or shown):
            return f"{name!r}: {value!r} is recorded as {told_name}: {told}"
    kept = body_of(record["upstream_request"])
    if not says(kept, one, data):
        return f"{one.body!r} (whole: {one.whole}) is recorded as {kept!r}"
    return ""


def body_of(kept: str | dict[str, str]) -> bytes:
    return kept.encode() if isinstance(kept, str) else base64.b64decode(kept["base64"])


def says(kept: bytes, one: Received, data: bytes) -> bool:
    """Whether a recorded body is that of a request; of one that was given up, whether its beginning is.

    What was hidden of it must be the value, or the last word of the value, of a header that the client sent.
    """
    shown = kept.split(BLANK.encode())
    if not one.whole:
        return one.body[: len(shown[0])] == shown[0][: len(one.body)]
    found = re.fullmatch(b"(.+?)".join(re.escape(part) for part in shown), one.body, re.DOTALL)
    values = [value.strip() for value in re.findall(rb":([^\r\n]*)", data)]
    words = {*values, *(value.rpartition(b" ")[2] for value in values)}
    return found is not None and words.issuperset(found.groups())


def assert_kept(line: dict[str, Any], record: dict[str, Any]) -> None:
    """What the client sent is what went upstream, in all that the gateway has no business with."""
    down, up = record["downstream"], record["upstream"]
    assert (down["method"], down["url"].partition("?")[0]) == (line["method"], line["path"])
    given = iter((name, value) for name, value in down["headers"])
    for name, value in up["headers"]:
        if name.lower().encode("latin-1") not in OWN:
            assert (name, value) in given, f"{name}: {value} is not the client's, or not in the client's order"
    if line["outcome"] == "ok" and not rewritten(line):
        assert record["downstream_request"] == record["upstream_request"]


def run(loop: Loop, parser: str, part: int) -> None:
    """A part of the fuzz with one of aiohttp's parsers of requests, `c` or `python`. Raises AssertionError."""
    print(f"FUZZ_SEED={SEED} FUZZ_SECONDS={SECONDS:g} FUZZ_ROUNDS={ROUNDS}, part {part} of {PARTS}, parser {parser}")
    with pytest.MonkeyPatch.context() as patch, quick_log(), recording() as recorder:
        patch.setitem(door._OPTIONS, "lingering_time", 0.01)
        if parser == "python":
            patch.setattr(web_protocol, "HttpRequestParser", HttpRequestParserPy)
        keeping, plain = Fuzzed(loop, recorder, keeps=True), Fuzzed(loop, recorder, keeps=False)
        rounds, told, passed = _rounds(keeping, plain, part)
    print(f"{rounds} rounds, {passed} requests upstream, {told} records compared")
    if rounds >= ENOUGH:
        assert passed > rounds // 20, "nearly nothing came through, so nearly nothing was tried"
        assert told > passed // 3, "nearly nothing was recorded, so nearly nothing was compared"


def _rounds(keeping: Fuzzed, plain: Fuzzed, part: int) -> tuple[int, int, int]:
    """How many there were, how many records were compared, how many requests went upstream."""
    chance = random.Random(SEED * PARTS + part)
    number = told = passed = 0
    waiting: list[Round] = []
    end = time.monotonic() + SECONDS / PARTS
    while number < ROUNDS / PARTS or (not ROUNDS and time.monotonic() < end):
        fuzzed = plain if number % PLAIN_EVERY == PLAIN_EVERY - 1 else keeping
        played = fuzzed.play(f"part {part}, round {number}", damaged(chance))
        passed += len(played.sent)
        number += 1
        if fuzzed.keeps:
            waiting.append(played)
        if len(waiting) >= BATCH:
            told += keeping.compare(waiting)
            waiting.clear()
            keeping._logged()  # what was just asked is no part of the next round
    return number, told + keeping.compare(waiting), passed
