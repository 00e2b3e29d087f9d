"""`gproxyd check`: what would be served, or every reason why nothing would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson

from gproxyd import daemon
from gproxyd.errors import ConfigError
from gproxyd.gateway.snapshot import Snapshot


def run(path: Path, environ: Mapping[str, str], *, as_json: bool) -> int:
    """0 if the configuration can be served, warnings or not; 1 if it cannot."""
    if not as_json:
        print(_summary(path, daemon.load(path, environ)))
        return 0
    try:
        snapshot = daemon.load(path, environ)
    except ConfigError as error:
        problems = [
            {"file": problem.file, "line": problem.line, "key": problem.key, "message": problem.message}
            for problem in error.problems
        ]
        print(orjson.dumps({"ok": False, "problems": problems, "warnings": []}).decode())
        return 1
    print(orjson.dumps({"ok": True, "problems": [], "warnings": snapshot.warnings}).decode())
    return 0


def _summary(path: Path, snapshot: Snapshot) -> str:
    usable = [name for name, provider in snapshot.providers.items() if provider.usable]
    lines = [f"warning: {warning}" for warning in snapshot.warnings]
    lines.append(f"{path}: OK")
    lines.append(f"  providers  {len(usable)} of {len(snapshot.providers)} switched on: {', '.join(usable) or 'none'}")
    lines.append(f"  aliases    {len(snapshot.aliases)}")
    lines.append(f"  keys       {len(snapshot.members)}")
    return "\n".join(lines)
