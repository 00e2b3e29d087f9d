"""The commands: `gproxyd serve | check | demo | version`, and those that ask a running daemon.

client     the daemon's admin API over its Unix socket
options    what these commands have in common
show       tables, details, JSON
people     users, keys, quota
reports    usage, logs, audit
runtime    explain, providers, models, reload

Exit status: 0, 1 for a failure, 2 for a command that cannot be understood, 78 (EX_CONFIG) for `serve` with a
configuration that cannot be used, so that a service manager need not try again.

The daemon's own rooms are imported by the commands that need them, so that the others begin at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gproxyd import __version__
from gproxyd.cli import people, reports, runtime
from gproxyd.cli.client import Failed
from gproxyd.errors import ConfigError, GproxydError

EX_CONFIG = 78


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except ConfigError as error:
        _tell(error)
        return EX_CONFIG if options.command == "serve" else 1
    except BrokenPipeError:
        # Whoever read has seen enough. What Python would still flush at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (GproxydError, Failed, OSError) as error:
        print(f"gproxyd: {error}", file=sys.stderr)
        return 1


def _tell(error: ConfigError) -> None:
    count = len(error.problems)
    print(f"gproxyd: the configuration has {count} problem{'s' if count != 1 else ''}:", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gproxyd", description="A reverse proxy between LLM clients and LLM vendors.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve requests until SIGTERM; SIGHUP reloads the configuration")
    _config_option(serve)
    serve.set_defaults(run=_serve)

    checker = commands.add_parser("check", help="read the configuration and tell every problem and warning")
    _config_option(checker)
    checker.add_argument("--json", action="store_true", help="print JSON")
    checker.set_defaults(run=_check)

    demonstration = commands.add_parser(
        "demo", help="serve an embedded scripted vendor with a ready key; needs nothing"
    )
    demonstration.add_argument("--port", type=int, default=8787, help="port on 127.0.0.1 (default: 8787)")
    demonstration.set_defaults(run=_demo)

    for module in (people, reports, runtime):
        module.add(commands)

    version = commands.add_parser("version", help="print the version")
    version.add_argument("--json", action="store_true", help="print JSON")
    version.set_defaults(run=_version)
    return parser


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="a file, or a directory with gproxyd.yaml and conf.d/ (default: $GPROXYD_CONFIG, else /etc/gproxyd)",
    )


def _path(options: argparse.Namespace) -> Path:
    from gproxyd import config

    path: Path = options.config or config.default_path(os.environ)
    return path


def _serve(options: argparse.Namespace) -> int:
    from gproxyd import serving

    serving.run(_path(options), os.environ)
    return 0


def _check(options: argparse.Namespace) -> int:
    from gproxyd.cli import check

    return check.run(_path(options), os.environ, as_json=options.json)


def _demo(options: argparse.Namespace) -> int:
    from gproxyd.cli import demo

    return demo.run(options.port)


def _version(options: argparse.Namespace) -> int:
    print(f'{{"version":"{__version__}"}}' if options.json else f"gproxyd {__version__}")
    return 0
