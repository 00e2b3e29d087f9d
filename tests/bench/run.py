"""The cases and the table: `python -m tests.bench.run [--short]`.

Figures of a run are compared as ratios; `--short` is for a quick look and fails only on gross regressions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

from tests.bench import load, proxies
from tests.bench.load import Requests, Streams
from tests.bench.proxies import Proxy

ALIAS, PLAIN = "fast", "bench-model"

MARGIN = 4.0
"""How far over its limit a ratio may be before `--short` fails: shared machines are noisy, and short runs more so.
It is there for what makes everything several times slower."""


MANY = 100
"""Streams at once that are enough for one round."""

ROUNDS = 5
"""Rounds in which the proxies take turns: a shared machine is faster at one moment than at another, and that must
befall all of them alike."""


T = TypeVar("T")


@dataclass
class Limit:
    """A figure and what it may be at most; None where a program of the comparison is missing."""

    text: str
    value: float | None
    most: float
    unit: str = "x"


def body(model: str, size: int = 1024) -> bytes:
    head = b'{"model":"%b","messages":[{"role":"user","content":"' % model.encode()
    return head + b"y" * (size - len(head) - 4) + b'"}]}'


class Bench:
    """One run. `short` takes a tenth of the time."""

    def __init__(self, folder: Path, *, short: bool) -> None:
        self.folder = folder
        self.seconds = 2.0 if short else 6.0
        self.short = short
        self.upstream, self.port = proxies.upstream()
        self.nginx = proxies.nginx(folder / "nginx", self.port)
        self.usual: Proxy | None = proxies.usual(self.port)
        self.gproxyd = proxies.gproxyd(folder / "gproxyd", self.port)

    def close(self) -> None:
        for proxy in self.all():
            proxy.stop()
        self.upstream.kill()
        self.upstream.wait()

    def all(self) -> list[Proxy]:
        return [proxy for proxy in (self.nginx, self.usual, self.gproxyd) if proxy is not None]

    def model(self, proxy: Proxy) -> str:
        """gproxyd gets an alias, so that it rewrites both ways."""
        return ALIAS if proxy.name == "gproxyd" else PLAIN

    def direct(self, connections: int, size: int) -> Requests:
        return load.requests(
            self.port, body(PLAIN, size), self.folder, connections=connections, seconds=self.seconds / 2, proxy=None
        )

    def requests(self, connections: int, size: int = 1024) -> dict[str, Requests]:
        """By the proxy's name."""

        def once(proxy: Proxy) -> Requests:
            seconds, text = self.seconds / ROUNDS, body(self.model(proxy), size)
            return load.requests(proxy.port, text, self.folder, connections=connections, seconds=seconds, proxy=proxy)

        return {name: _all_requests(runs) for name, runs in self._in_turns(ROUNDS, once).items()}

    def streams(self, count: int, events: int, gap: float) -> dict[str, Streams]:
        """The same of streams. Few are run several times: the kernel counts time in hundredths of a second."""

        def once(proxy: Proxy) -> Streams:
            return load.streams(proxy, self.model(proxy), count=count, events=events, gap=gap)

        rounds = 1 if count > MANY or not gap else ROUNDS
        return {name: _all_streams(runs) for name, runs in self._in_turns(rounds, once).items()}

    def _in_turns(self, rounds: int, once: Callable[[Proxy], T]) -> dict[str, list[T]]:
        found: dict[str, list[T]] = {proxy.name: [] for proxy in self.all()}
        for _ in range(rounds):
            for proxy in self.all():
                found[proxy.name].append(once(proxy))
        return found


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
    each = sum(run.cpu_each * run.events for run in runs) / max(total, 1)
    return replace(runs[-1], events=total, seconds=sum(run.seconds for run in runs), cpu_each=each)


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:8.1f} us"


def show_requests(bench: Bench, title: str, connections: int, size: int = 1024) -> dict[str, Requests]:
    direct = bench.direct(connections, size)
    print(f"\n{title}, {connections} connection{'s' if connections > 1 else ''}")
    print(f"  {'':20} {'requests/s':>10} {'CPU/request':>12} {'added p50':>12} {'added p99':>12}")
    print(f"  {'direct':20} {direct.rate:10.0f} {'':>12} {micro(direct.p50):>12} {micro(direct.p99):>12} (not added)")
    found = bench.requests(connections, size)
    for proxy in bench.all():
        run = found[proxy.name]
        added = f"{micro(run.p50 - direct.p50):>12} {micro(run.p99 - direct.p99):>12}"
        failed = f"  {run.errors} FAILED" if run.errors else ""
        print(f"  {proxy.name:20} {run.rate:10.0f} {micro(run.cpu_each):>12} {added}{failed}")
    found["direct"] = direct
    return found


def show_streams(bench: Bench, title: str, count: int, events: int, gap: float) -> dict[str, Streams]:
    print(f"\n{title}")
    print(f"  {'':20} {'events/s':>10} {'CPU/event':>12} {'complete':>10}")
    found = bench.streams(count, events, gap)
    for proxy in bench.all():
        run = found[proxy.name]
        print(f"  {proxy.name:20} {run.events / run.seconds:10.0f} {micro(run.cpu_each):>12} {run.complete:>6}/{count}")
    return found


def show_memory(bench: Bench, count: int) -> float:
    print(f"\nMemory, idle and with {count} open streams (a client and an upstream socket each)")
    per_stream = 0.0
    for proxy in bench.all():
        idle = proxy.rss()
        run = load.streams(proxy, bench.model(proxy), count=count, events=3, gap=2.0, look_at=3.0)
        per_stream = (run.rss - idle) / count / 1024
        print(f"  {proxy.name:20} {idle / 2**20:7.1f} MiB {per_stream:7.1f} KiB per stream")
    return per_stream  # gproxyd comes last


def show_tls(folder: Path, *, short: bool) -> None:
    """The same with TLS towards the upstream: nginx and gproxyd, both verifying."""
    certificate, key, authority = make_certificates(folder)
    bench = Bench.__new__(Bench)
    bench.folder, bench.seconds, bench.short = folder, 2.0 if short else 4.0, short
    bench.upstream, bench.port = proxies.upstream((certificate, key))
    bench.nginx = proxies.nginx(folder / "tls-nginx", bench.port, authority)
    bench.gproxyd = proxies.gproxyd(folder / "tls-gproxyd", bench.port, authority)
    print("\nTLS towards the upstream: JSON at 32 connections, 50 streams of 100 events")
    print(f"  {'':20} {'CPU/request':>12} {'CPU/event':>12}")
    bench.usual = None
    asked, streamed = bench.requests(32), bench.streams(50, 100, 0.005)
    for proxy in bench.all():
        print(f"  {proxy.name:20} {micro(asked[proxy.name].cpu_each):>12} {micro(streamed[proxy.name].cpu_each):>12}")
        proxy.stop()
    bench.upstream.kill()
    bench.upstream.wait()


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A throw-away certificate for `localhost` that is its own authority."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return certificate, key, certificate


def ratio(of: float, to: float) -> float | None:
    return of / to if to else None


def run(*, short: bool) -> list[Limit]:
    """The whole bench; prints as it goes, returns the figures that are held to limits."""
    if not load.has_wrk():
        sys.exit("bench: wrk is not installed (Debian: apt-get install wrk)")
    with tempfile.TemporaryDirectory(prefix="gproxyd-bench-") as name:
        folder = Path(name)
        bench = Bench(folder, short=short)
        if bench.nginx is None:
            print("bench: nginx is not installed (Debian: apt-get install nginx-light); its ratios are left out")
        try:
            limits = _cases(bench)
        finally:
            bench.close()
        if not short:
            show_tls(folder, short=short)
    return limits


def _cases(bench: Bench) -> list[Limit]:
    one = show_requests(bench, "JSON request and answer of 1 KiB", 1)
    many = show_requests(bench, "JSON request and answer of 1 KiB", 32)
    if not bench.short:
        show_requests(bench, "JSON request and answer of 1 KiB", 256)
        show_requests(bench, "A prompt of 256 KiB", 8, 256 * 1024)
        show_requests(bench, "A request of 10 MiB", 2, 10 * 1024 * 1024)
    few = show_streams(bench, "50 streams of 100 events, 5 ms apart", 50, 100, 0.005)
    if bench.short:
        crowd = few
    else:
        crowd = show_streams(bench, "500 streams of 100 events, 5 ms apart", 500, 100, 0.005)
        show_streams(bench, "20 streams of 5,000 events as fast as they come", 20, 5000, 0.0)
    memory = show_memory(bench, 200 if bench.short else 1000)
    return _limits(one, many, few, crowd, memory)


def _limits(
    one: dict[str, Requests],
    many: dict[str, Requests],
    few: dict[str, Streams],
    crowd: dict[str, Streams],
    memory: float,
) -> list[Limit]:
    ours = many["gproxyd"].cpu_each
    limits = [
        Limit("CPU per JSON request / the usual aiohttp proxy's", ours / many["usual aiohttp proxy"].cpu_each, 0.5)
    ]
    if "nginx" in many:
        added: Callable[[str], float] = lambda name: one[name].p50 - one["direct"].p50  # noqa: E731
        limits += [
            Limit("CPU per JSON request / nginx's", ratio(ours, many["nginx"].cpu_each), 4.5),
            Limit("CPU per streamed event / nginx's", ratio(few["gproxyd"].cpu_each, few["nginx"].cpu_each), 1.8),
            Limit("p50 added at 1 connection / what nginx adds", ratio(added("gproxyd"), added("nginx")), 3.0),
        ]
    limits += [
        Limit("memory per open stream", memory, 30.0, "KiB"),
        Limit("CPU per event, 500 streams / 50 streams", crowd["gproxyd"].cpu_each / few["gproxyd"].cpu_each, 1.15),
    ]
    return limits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a quick look; fails on gross regressions only")
    options = parser.parse_args()
    if options.short and not load.has_wrk():
        print("bench: left out, because wrk is not installed (Debian: apt-get install wrk nginx-light)")
        return 0
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
