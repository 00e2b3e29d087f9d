"""`gproxyd explain`, `gproxyd providers`, `gproxyd models`, `gproxyd reload`."""

from __future__ import annotations

import argparse

from gproxyd.cli import show
from gproxyd.cli.client import Client
from gproxyd.cli.options import Commands, command


def add(commands: Commands) -> None:
    asked = command(commands, "explain", _explain, "say where a request for a model would go, and why")
    asked.add_argument("model", help="the name that a client would send")
    asked.add_argument("--user", help="who would ask (default: anybody)")
    asked.add_argument("--endpoint", help="where they would, as in 'POST /v1/chat/completions'")
    command(commands, "providers", _providers, "list the providers and how they fare")
    models = command(commands, "models", _models, "list the models that can be called")
    models.add_argument("--refresh", action="store_true", help="ask the vendors for theirs before")
    again = command(commands, "reload", _reload, "read the configuration again")
    again.add_argument(
        "--hand-off",
        action="store_true",
        help="start the daemon anew beside the running one, which drains when the new one serves",
    )


def _explain(client: Client, options: argparse.Namespace) -> None:
    body = {"model": options.model, "user": options.user, "endpoint": options.endpoint}
    told = client.ask("POST", "/admin/explain", body)
    show.as_json(told) if options.json else show.details(told)


def _providers(client: Client, options: argparse.Namespace) -> None:
    show.as_list(client.rows("/admin/providers"), json=options.json, empty="there are no providers")


def _models(client: Client, options: argparse.Namespace) -> None:
    if options.refresh:
        client.ask("POST", "/admin/models/refresh")
    show.as_list(client.rows("/admin/models"), json=options.json, empty="no models are known")


def _reload(client: Client, options: argparse.Namespace) -> None:
    if options.hand_off:
        told = client.ask("POST", "/admin/handoff")
        show.as_json(told) if options.json else print(f"process {told['pid']} has taken over")
    else:
        told = client.ask("POST", "/admin/reload")
        show.as_json(told) if options.json else print("the configuration was read again")
