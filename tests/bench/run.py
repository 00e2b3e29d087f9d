"""The cases and the tables: `python -m tests.bench.run [--short]`.

Figures of a run are compared as ratios; `--short` is for a quick look and fails only on gross regressions. What an
optional program is needed for is left out where there is none: wrk for requests, nginx for its lines and ratios,
openssl for TLS.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

from tests.bench import load, proxies
from tests.bench.load import Requests, Streams, Work
from tests.bench.proxies import Proxy

ALIAS, PLAIN = "fast", "bench-model"
USUAL, NGINX = "usual aiohttp proxy", "nginx"

MARGIN = 4.0
"""How far over its limit a ratio may be before `--short` fails: shared machines are noisy, and short runs more so.
It is there for what makes everything several times slower."""

ROUND = 1
"""Seconds of requests for each proxy in each round."""

KIB, MIB = 2**10, 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Rounds:
    """In how many rounds the proxies take turns: a shared machine is faster at one moment than at another, and that
    must befall all of them alike. `requests` at the usual size, `large` ones, `few` and `many` streams; `open` is how
    many streams are held open when memory is read."""

    requests: int
    large: int
    few: int
    many: int
    open: int


FULL, SHORT, TLS = Rounds(5, 3, 5, 2, 1000), Rounds(4, 0, 3, 0, 200), Rounds(2, 2, 2, 1, 1000)


@dataclass
class Limit:
    """A figure and what it may be at most; None where a program of the comparison is missing."""

    text: str
    value: float | None
    most: float
    unit: str = "x"


@dataclass
class Found:
    """What a run has found, by the proxy's name; empty what was not run. `memory` in bytes for each open stream."""

    one: dict[str, Requests]
    many: dict[str, Requests]
    few: dict[str, Streams]
    crowd: dict[str, Streams]
    memory: dict[str, float]


def prompt(size: int) -> Work:
    """A chat request of `size` bytes."""

    def body(model: str) -> bytes:
        head = b'{"model":"%b","messages":[{"role":"user","content":"' % model.encode()
        return head + b"y" * (size - len(head) - 4) + b'"}]}'

    return Work(body)


def form(size: int) -> Work:
    """A multipart form with a file of `size` bytes, behind the name of the model."""

    def body(model: str) -> bytes:
        return (
            b'--bench\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'
            b'--bench\r\nContent-Disposition: form-data; name="file"; filename="speech.wav"\r\n'
            b"Content-Type: audio/wav\r\n\r\n%b\r\n--bench--\r\n" % (model.encode(), b"\0" * size)
        )

    return Work(body, "/v1/audio/transcriptions", "multipart/form-data; boundary=bench")


class Bench:
    """An upstream and the proxies in front of it."""

    def __init__(self, folder: Path, rounds: Rounds, certificate: tuple[Path, Path] | None = None) -> None:
        self.folder = folder
        self.rounds = rounds
        self.direct = proxies.upstream(certificate)
        self.started: list[Proxy] = [self.direct]
        self.proxies: list[Proxy] = []
        try:
            if proxies.nginx_program() is not None:
                self._take(proxies.nginx(folder / "nginx", self.direct))
            self._take(proxies.usual(self.direct))
            self._take(proxies.gproxyd(folder / "gproxyd", self.direct))
        except BaseException:
            self.close()
            raise

    def _take(self, proxy: Proxy) -> None:
        self.started.append(proxy)
        self.proxies.append(proxy)

    def limited(self) -> Proxy:
        """Another gproxyd, with limits, which takes part where it is asked to."""
        proxy = proxies.gproxyd(self.folder / "limited", self.direct, limited=True)
        self.started.append(proxy)
        return proxy

    def close(self) -> None:
        for proxy in reversed(self.started):
            proxy.stop()

    def requests(self, work: Work, connections: int, rounds: int, more: Sequence[Proxy] = ()) -> dict[str, Requests]:
        """By the proxy's name."""

        def once(proxy: Proxy) -> Requests:
            return load.requests(proxy, work, model(proxy), self.folder, connections=connections, seconds=ROUND)

        turns = self._in_turns([self.direct, *self.proxies, *more], rounds, once)
        return {name: _all_requests(runs) for name, runs in turns.items()}

    def streams(self, count: int, events: int, gap: float, rounds: int) -> dict[str, Streams]:
        """The same of streams."""

        def once(proxy: Proxy) -> Streams:
            return load.streams(proxy, model(proxy), count=count, events=events, gap=gap)

        turns = self._in_turns([self.direct, *self.proxies], rounds, once)
        return {name: _all_streams(runs) for name, runs in turns.items()}

    def _in_turns(self, taking: Sequence[Proxy], rounds: int, once: Callable[[Proxy], T]) -> dict[str, list[T]]:
        found: dict[str, list[T]] = {proxy.name: [] for proxy in taking}
        for _ in range(rounds):
            for proxy in taking:
                found[proxy.name].append(once(proxy))
        return found


def model(proxy: Proxy) -> str:
    """gproxyd gets an alias, so that it rewrites both ways."""
    return ALIAS if proxy.name in (proxies.GPROXYD, proxies.LIMITED) else PLAIN


def _all_requests(runs: Sequence[Requests]) -> Requests:
    count = sum(run.count for run in runs)
    return Requests(
        count,
        sum(run.seconds for run in runs),
        sum(run.errors for run in runs),
        median(run.p50 for run in runs),
        median(run.p99 for run in runs),
        sum(run.cpu_each * run.count for run in runs) / max(count, 1),
    )


def _all_streams(runs: Sequence[Streams]) -> Streams:
    total = sum(run.events for run in runs)
    return replace(
        runs[-1],
        events=total,
        complete=min(run.complete for run in runs),
        seconds=sum(run.seconds for run in runs),
        cpu_each=sum(run.cpu_each * run.events for run in runs) / max(total, 1),
        delays=sorted(delay for run in runs for delay in run.delays),
        times=sorted(time for run in runs for time in run.times),
    )


def percentile(values: Sequence[float], part: float) -> float | None:
    """Of values in rising order; None if there are none."""
    return values[min(len(values) - 1, int(len(values) * part))] if values else None


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def milli(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"


def line(name: str, *cells: str) -> None:
    print(f"  {name:20} {' '.join(f'{cell:>14}' for cell in cells)}".rstrip())


def show_requests(
    bench: Bench, title: str, work: Work, connections: int, rounds: int, more: Sequence[Proxy] = ()
) -> dict[str, Requests]:
    if not load.has_wrk():
        return {}
    found = bench.requests(work, connections, rounds, more)
    print(f"\n{title}, {connections} connection{'s' if connections > 1 else ''}")
    line("", "requests/s", "CPU/request", "added p50", "added p99")
    direct = found[proxies.DIRECT]
    for name, run in found.items():
        failed = f"{run.errors} FAILED" if run.errors else ""
        if run is direct:
            line(name, f"{run.rate:.0f}", "", f"of {micro(run.p50)}", f"of {micro(run.p99)}", failed)
            continue
        added = micro(run.p50 - direct.p50), micro(run.p99 - direct.p99)
        line(name, f"{run.rate:.0f}", micro(run.cpu_each), *added, failed)
    return found


def show_streams(bench: Bench, title: str, count: int, events: int, gap: float, rounds: int) -> dict[str, Streams]:
    """`complete` is of the worst round."""
    found = bench.streams(count, events, gap, rounds)
    print(f"\n{title}; added to the way of an event, and to a stream as a whole")
    line("", "events/s", "CPU/event", "event p50", "event p99", "stream p50", "stream p99", "complete")
    direct = found[proxies.DIRECT]
    for name, run in found.items():
        cells = [
            _added(percentile(values, part), None if run is direct else percentile(basis, part))
            for values, basis in ((run.delays, direct.delays), (run.times, direct.times))
            for part in (0.5, 0.99)
        ]
        cpu = "" if run is direct else micro(run.cpu_each)
        line(name, f"{run.events / run.seconds:.0f}", cpu, *cells, f"{run.complete}/{count}")
    return found


def _added(here: float | None, direct: float | None) -> str:
    """What is added to the direct way; of the direct way itself, what it is added to."""
    if here is None:
        return "-"
    return f"of {milli(here)}" if direct is None else milli(here - direct)


def show_memory(bench: Bench, over: str, count: int) -> dict[str, float]:
    """Resident bytes for each stream that is open and has had an event. Of fresh processes, which have done next to
    nothing: what was freed after other work would hold streams for nothing."""
    print(f"\nMemory{over}, idle and with {count} open streams (a client and an upstream socket each)")
    line("", "idle", f"{count} streams", "per stream")
    found = {}
    for proxy in bench.proxies:
        load.streams(proxy, model(proxy), count=10, events=1, gap=0.01)
        idle = proxy.rss()
        run = load.streams(proxy, model(proxy), count=count, events=1, gap=2.0, look_at=3.0)
        found[proxy.name] = (run.rss - idle) / count
        each = f"{found[proxy.name] / KIB:.1f} KiB"
        line(proxy.name, f"{idle / MIB:.1f} MiB", f"{run.rss / MIB:.1f} MiB", each)
    return found


def cases(bench: Bench, over: str = "", more: Sequence[Proxy] = ()) -> Found:
    """All cases. `over` is said with each title; `more` take part in one of them."""
    rounds = bench.rounds
    memory = show_memory(bench, over, rounds.open)
    json = f"JSON request and answer of 1 KiB{over}"
    one = show_requests(bench, json, prompt(KIB), 1, rounds.requests)
    many = show_requests(bench, json, prompt(KIB), 32, rounds.requests, more)
    if rounds.large:
        show_requests(bench, json, prompt(KIB), 256, rounds.requests)
        show_requests(bench, f"A prompt of 256 KiB{over}", prompt(256 * KIB), 8, rounds.large)
        show_requests(bench, f"JSON of 10 MiB{over}", prompt(10 * MIB), 2, rounds.large)
        show_requests(bench, f"An upload of 10 MiB in a multipart form{over}", form(10 * MIB), 2, rounds.large)
    few = crowd = show_streams(bench, f"50 streams of 100 events, 5 ms apart{over}", 50, 100, 0.005, rounds.few)
    if rounds.many:
        crowd = show_streams(bench, f"500 streams of 100 events, 5 ms apart{over}", 500, 100, 0.005, rounds.many)
        show_streams(bench, f"20 streams of 5,000 events as fast as they come{over}", 20, 5000, 0.0, rounds.many)
    return Found(one, many, few, crowd, memory)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A throw-away certificate for `localhost`, its own authority, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return certificate, key


def tell_missing(*, short: bool) -> None:
    """What is not here, and what is left out for that."""
    if not load.has_wrk():
        print("bench: wrk is not installed (Debian: apt-get install wrk); all requests but streams are left out")
    if proxies.nginx_program() is None:
        print("bench: nginx is not installed (Debian: apt-get install nginx-light); its lines and ratios are left out")
    if not short and shutil.which("openssl") is None:
        print("bench: openssl is not installed (Debian: apt-get install openssl); TLS is left out")


def run(*, short: bool) -> list[Limit]:
    """The whole bench; prints as it goes, returns the figures that are held to limits."""
    tell_missing(short=short)
    print("Latencies are what a proxy adds to those of the direct way, which are given there as `of`.")
    with tempfile.TemporaryDirectory(prefix="gproxyd-bench-") as name:
        folder = Path(name)
        bench = Bench(folder / "plain", SHORT if short else FULL)
        try:
            found = cases(bench, more=[bench.limited()])
        finally:
            bench.close()
        if not short and shutil.which("openssl") is not None:
            bench = Bench(folder / "tls", TLS, make_certificate(folder))
            try:
                cases(bench, " over TLS")
            finally:
                bench.close()
    return limits_of(found)


def limits_of(found: Found) -> list[Limit]:
    """The figures that are held to limits; those of a run without wrk or nginx are None."""
    cpu = {name: run.cpu_each for name, run in found.many.items()}
    event = {name: run.cpu_each for name, run in found.few.items()}
    crowd = {name: run.cpu_each for name, run in found.crowd.items()}
    direct = found.one.get(proxies.DIRECT)
    added = {name: run.p50 - direct.p50 for name, run in found.one.items()} if direct else {}
    ours = proxies.GPROXYD
    return [
        Limit("CPU per JSON request / the usual aiohttp proxy's", _ratio(cpu, ours, USUAL), 0.5),
        Limit("CPU per JSON request / nginx's", _ratio(cpu, ours, NGINX), 4.5),
        Limit("CPU per streamed event / nginx's", _ratio(event, ours, NGINX), 1.8),
        Limit("p50 added at 1 connection / what nginx adds", _ratio(added, ours, NGINX), 3.0),
        Limit("memory per open stream", found.memory[ours] / KIB, 30.0, "KiB"),
        Limit("CPU per event, 500 streams / 50 streams", crowd[ours] / event[ours] if crowd != event else None, 1.15),
    ]


def _ratio(figures: dict[str, float], of: str, to: str) -> float | None:
    return figures[of] / figures[to] if figures.get(to) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a quick look; fails on gross regressions only")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # 1,000 streams are as many sockets here
    limits = run(short=options.short)
    print("\nfigure                                                    here    at most")
    missed = 0
    for limit in limits:
        if limit.value is None:
            continue
        over = limit.value > limit.most * (MARGIN if options.short else 1.0)
        missed += over
        print(f"  {limit.text:52} {limit.value:7.2f} {limit.most:8.2f} {limit.unit:4} {'MISSED' if over else ''}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
