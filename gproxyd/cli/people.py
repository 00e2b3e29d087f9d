"""`gproxyd users`, `gproxyd keys`, `gproxyd quota`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gproxyd.cli import show
from gproxyd.cli.client import Client, Failed, user_path
from gproxyd.cli.options import Commands, amount, command, future, group, money, rate_limit

_USERS = {
    "name": "name",
    "role": "role",
    "source": "source",
    "keys": "keys",
    "quota": "quota.usd",
    "spent": "quota.spent_usd",
    "period": "quota.period",
    "permissions": "permissions",
}
_KEYS = {
    "user": "user",
    "key": "name",
    "enabled": "enabled",
    "expires": "expires_at",
    "last used": "last_used_at",
    "models": "models",
    "endpoints": "endpoints",
    "agents": "agents",
    "budget": "budget.usd",
    "spent": "budget.spent_usd",
}
_ROLES = ("admin", "user", "read-only")


def add(commands: Commands) -> None:
    _add_users(group(commands, "users", "who may call, and what they may do"))
    _add_keys(group(commands, "keys", "the keys of users"))
    _add_quota(group(commands, "quota", "the money of users"))


# Users.


def _add_users(users: Commands) -> None:
    command(users, "list", _list_users, "list all users")
    command(users, "show", _show_user, "show one user").add_argument("name")
    made = command(users, "add", _add_user, "make a user")
    made.add_argument("name")
    made.add_argument("--key", action="append", default=[], metavar="NAME", help="make a key, too; may be repeated")
    changed = command(users, "set", _set_user, "change a user; what is not given stays")
    changed.add_argument("name")
    for parser in (made, changed):
        parser.add_argument("--role", choices=_ROLES)
        _list_option(parser, "permission", "permissions", "GLOB", "a model that may be called, as in openai-main/*")
        _rate_limit_option(parser)
        _money_option(parser, "quota")
    removed = command(users, "remove", _remove_user, "remove a user with all keys; what was used stays in the books")
    removed.add_argument("name", help="the exact name")


def _list_users(client: Client, options: argparse.Namespace) -> None:
    users = client.rows("/admin/users")
    if not options.json:
        users = [user | {"keys": [key["name"] for key in user["keys"]]} for user in users]
    show.as_list(users, json=options.json, columns=_USERS, empty="there are no users")


def _show_user(client: Client, options: argparse.Namespace) -> None:
    _tell(client.get(user_path(options.name)), options)


def _add_user(client: Client, options: argparse.Namespace) -> None:
    body = _given(options, "role", "permissions", "rate_limits") | _quota(options, "quota")
    keys = [{"name": key} for key in options.key]
    told = client.ask("POST", "/admin/users", {"name": options.name, "keys": keys, **body})
    _tell(told, options)
    if told["keys"]:
        _warn_of_token()


def _set_user(client: Client, options: argparse.Namespace) -> None:
    body = _given(options, "role", "permissions", "rate_limits") | _quota(options, "quota")
    _tell(client.ask("PATCH", user_path(options.name), body), options)


def _remove_user(client: Client, options: argparse.Namespace) -> None:
    _removed(client.ask("DELETE", user_path(options.name)), options.name, options)


# Keys.


def _add_keys(keys: Commands) -> None:
    command(keys, "list", _list_keys, "list the keys of all users, or of one").add_argument("user", nargs="?")
    made = _of_key(command(keys, "add", _add_key, "make a key and print it, this once"))
    changed = _of_key(command(keys, "set", _set_key, "change a key; what is not given stays"))
    for parser in (made, changed):
        parser.add_argument("--expires", type=future, default=..., metavar="WHEN", help="a time, a date, 30d, or never")
        _list_option(parser, "model", "models", "GLOB", "narrow the key to such models", word="all")
        _list_option(parser, "endpoint", "endpoints", "GLOB", "narrow it to such endpoints: 'GET /v1/*'", word="all")
        _list_option(parser, "agent", "agents", "NAME", "narrow it to this agent", word="all")
        _rate_limit_option(parser)
        _money_option(parser, "budget")
    _of_key(command(keys, "disable", _switch_key, "refuse a key from now on")).set_defaults(enabled=False)
    _of_key(command(keys, "enable", _switch_key, "take a key again")).set_defaults(enabled=True)
    _of_key(command(keys, "remove", _remove_key, "remove a key for good"))


def _of_key(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("user")
    parser.add_argument("key")
    return parser


def _list_keys(client: Client, options: argparse.Namespace) -> None:
    one = options.user is not None
    users = [client.get(user_path(options.user))] if one else client.rows("/admin/users")
    keys = [{"user": user["name"], **key} for user in users for key in user["keys"]]
    show.as_list(keys, json=options.json, columns=_KEYS, empty="there are no keys")


def _add_key(client: Client, options: argparse.Namespace) -> None:
    told = client.ask("POST", user_path(options.user, "keys"), {"name": options.key, **_key(options)})
    show.as_json(told) if options.json else print(told["token"])
    _warn_of_token()


def _set_key(client: Client, options: argparse.Namespace) -> None:
    _tell(client.ask("PATCH", user_path(options.user, "keys", options.key), _key(options)), options)


def _switch_key(client: Client, options: argparse.Namespace) -> None:
    path = user_path(options.user, "keys", options.key)
    _tell(client.ask("PATCH", path, {"enabled": options.enabled}), options)


def _remove_key(client: Client, options: argparse.Namespace) -> None:
    told = client.ask("DELETE", user_path(options.user, "keys", options.key))
    _removed(told, f"{options.user}/{options.key}", options)


def _key(options: argparse.Namespace) -> dict[str, Any]:
    body = _given(options, "models", "endpoints", "agents", "rate_limits") | _quota(options, "budget")
    return body if options.expires is ... else body | {"expires_at": options.expires}


# Money.


def _add_quota(quota: Commands) -> None:
    command(quota, "show", _show_quota, "show what a user may spend and has spent").add_argument("user")
    fixed = command(quota, "set", _set_quota, "set what a user may spend")
    fixed.add_argument("user")
    fixed.add_argument("usd", type=money, help="US dollars, or none")
    fixed.add_argument("--period", choices=("day", "month"), help="in which it may be spent (default: for ever)")
    more = command(quota, "top-up", _top_up, "add to what a user may spend in the present period")
    more.add_argument("user")
    more.add_argument("usd", type=amount, help="US dollars")


def _show_quota(client: Client, options: argparse.Namespace) -> None:
    _tell(client.get(user_path(options.user, "quota")), options)


def _set_quota(client: Client, options: argparse.Namespace) -> None:
    body = {"usd": options.usd, "period": options.period}
    _tell(client.ask("PUT", user_path(options.user, "quota"), body), options)


def _top_up(client: Client, options: argparse.Namespace) -> None:
    _tell(client.ask("POST", user_path(options.user, "quota", "top-up"), {"usd": options.usd}), options)


# Options and what comes of them.


def _list_option(
    parser: argparse.ArgumentParser, option: str, member: str, form: str, about: str, word: str = "no"
) -> None:
    either = parser.add_mutually_exclusive_group()
    either.add_argument(f"--{option}", action="append", dest=member, metavar=form, help=f"{about}; may be repeated")
    either.add_argument(f"--{word}-{member}", action="store_true", help=f"{word} {member}")


def _rate_limit_option(parser: argparse.ArgumentParser) -> None:
    either = parser.add_mutually_exclusive_group()
    about = "as in model=openai-main/*,rpm=60,tpm=200000; may be repeated"
    either.add_argument(
        "--rate-limit", action="append", dest="rate_limits", type=rate_limit, metavar="LIMIT", help=about
    )
    either.add_argument("--no-rate-limits", action="store_true", help="no rate limits")


def _money_option(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(f"--{name}", type=money, default=..., metavar="USD", help="what may be spent, or none")
    parser.add_argument("--period", choices=("day", "month"), help=f"in which the {name} may be spent")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What the command line names. `--no-x` is an empty list, `--all-x` no narrowing."""
    found: dict[str, Any] = {}
    for name in names:
        if getattr(options, f"no_{name}", False):
            found[name] = []
        elif getattr(options, f"all_{name}", False):
            found[name] = None
        elif (value := getattr(options, name)) is not None:
            found[name] = value
    return found


def _quota(options: argparse.Namespace, name: str) -> dict[str, Any]:
    usd = getattr(options, name)
    if usd is ...:
        if options.period is not None:
            raise Failed(f"--period says when the {name} may be spent; give --{name}, too")
        return {}
    return {name: None if usd is None else {"usd": usd, "period": options.period}}


def _tell(value: Any, options: argparse.Namespace) -> None:
    show.as_json(value) if options.json else show.details(value)


def _removed(told: Any, name: str, options: argparse.Namespace) -> None:
    show.as_json(told) if options.json else print(f"removed {show.text(name)}")


def _warn_of_token() -> None:
    print("gproxyd: keep the key now; nobody can show it again", file=sys.stderr)
