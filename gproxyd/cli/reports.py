"""`gproxyd usage`, `gproxyd logs`, `gproxyd audit`."""

from __future__ import annotations

import argparse
import sys
from urllib.parse import quote

import orjson

from gproxyd.cli import show
from gproxyd.cli.client import Client
from gproxyd.cli.options import Commands, command, count, group, past

_TOKENS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache read": "cache_read_tokens",
    "cache write": "cache_write_tokens",
    "reasoning": "reasoning_tokens",
}
_RECORDS = {
    "at": "at",
    "user": "user",
    "key": "key",
    "provider": "provider",
    "model": "model",
    "status": "status",
    **_TOKENS,
    "cost": "cost_usd",
    "ms": "duration_ms",
    "request": "request_id",
}
_LOGS = {name: name for name in ("at", "request_id", "user", "key", "provider", "model", "status")}
_AUDIT = {name: name for name in ("at", "who", "what", "target", "detail")}
_FILTERS = ("user", "key", "provider", "model", "endpoint", "status", "since", "until")


def add(commands: Commands) -> None:
    usage = command(commands, "usage", _usage, "what was used, by whom, and what it cost; newest first")
    for name in _FILTERS[:-2]:
        usage.add_argument(f"--{name}", help=f"only this {name}")
    usage.add_argument("--since", type=past, metavar="WHEN", help="a time, a date, or how long ago (24h)")
    usage.add_argument("--until", type=past, metavar="WHEN", help="the same; itself not included")
    usage.add_argument("--by", choices=("user", "key", "provider", "model", "day"), help="sums instead of requests")
    usage.add_argument("--limit", type=count, help="how many, at most (default: 50 requests; all of sums and CSV)")
    usage.add_argument("--csv", action="store_true", help="print CSV")

    logs = group(commands, "logs", "envelopes of requests, as far as `records` keeps them")
    listed = command(logs, "list", _list_logs, "list envelopes, newest first")
    listed.add_argument("--user", help="only this user")
    listed.add_argument("--status", help="only this status")
    listed.add_argument("--limit", type=count, default=50, help="how many, at most (default: 50)")
    command(logs, "show", _show_log, "show one envelope").add_argument("id", help="the id of a request")
    command(logs, "follow", _follow, "show requests as they finish, until Ctrl-C")

    audit = command(commands, "audit", _audit, "who changed what, newest first")
    audit.add_argument("--limit", type=count, default=50, help="how many, at most (default: 50)")


def _usage(client: Client, options: argparse.Namespace) -> None:
    filters = {name: getattr(options, name) for name in _FILTERS} | {"group_by": options.by}
    if options.csv:
        left = None if options.limit is None else options.limit + 1  # and the heading
        for line in client.lines("/admin/usage", **filters, format="csv"):
            if left == 0:
                break
            left = left if left is None else left - 1
            sys.stdout.write(line.decode())
        return
    most = options.limit or (50 if options.by is None else None)
    rows = client.rows("/admin/usage", most, **filters)
    columns = _RECORDS if options.by is None else _sums(options.by)
    show.as_list(rows, json=options.json, columns=columns, empty="nothing was used")


def _sums(by: str) -> dict[str, str]:
    return {
        by: "key",
        "requests": "requests",
        "errors": "errors",
        **_TOKENS,
        "unpriced": "unpriced",
        "cost": "cost_usd",
    }


def _list_logs(client: Client, options: argparse.Namespace) -> None:
    rows = client.rows("/admin/requests", options.limit, user=options.user, status=options.status)
    show.as_list(rows, json=options.json, columns=_LOGS, empty="no envelopes are kept")


def _show_log(client: Client, options: argparse.Namespace) -> None:
    told = client.get(f"/admin/requests/{quote(options.id, safe='')}")
    show.as_json(told) if options.json else show.details(told)


def _follow(client: Client, options: argparse.Namespace) -> None:
    """Each as it comes, so columns cannot know their widths: one line of the most important ones."""
    for line in client.lines("/admin/events", patient=True):
        if not line.startswith(b"data: "):
            continue
        told = orjson.loads(line.removeprefix(b"data: "))
        if options.json:
            print(line.removeprefix(b"data: ").decode().strip(), flush=True)
        elif "count" in told:
            print(f"({told['count']} requests were not shown: too many at once)", flush=True)
        else:
            print("  ".join(show.text(told[member]) for member in _RECORDS.values()), flush=True)


def _audit(client: Client, options: argparse.Namespace) -> None:
    rows = client.rows("/admin/audit", options.limit)
    show.as_list(rows, json=options.json, columns=_AUDIT, empty="nothing was changed")
