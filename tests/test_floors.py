"""The house: imports only descend, the parsers know no loop, files stay small, rooms say what they hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gproxyd

ROOT = Path(gproxyd.__file__).parent
MAX_LINES = 400

FLOORS: list[set[str]] = [
    {"errors", "types", "units"},
    {"wire"},
    {"dialects"},
    {"config", "secrets", "vendors"},
    {"store", "policy", "routing", "upstream", "observe"},
    {"mcp", "a2a"},
    {"gateway", "admin"},
    {"host"},
    {"daemon"},
    {"serving"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SANS_IO = {"wire", "dialects"}
NO_LOOP = {"asyncio", "aiohttp", "uvloop", "socket", "selectors", "threading", "ssl", "time", "concurrent"}


def room_of(path: Path) -> str:
    """The first step below the package: a package or a module; empty for the package's own `__init__`."""
    first = path.parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, wherever in it, relative imports resolved."""
    package = ["gproxyd", *path.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            yield node.lineno, name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "?"


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def violations(source: str, path: Path) -> Iterator[str]:
    """What a file below `gproxyd/` does that the house does not allow."""
    tree = ast.parse(source)
    room = room_of(path)
    if room and room not in LEVEL:
        yield f"{path}: the room {room} stands on no floor"
    for line, name in imported(tree, path):
        yield from (f"{path}:{line}: {flaw}" for flaw in _import_flaws(room, name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) == "print" and room != "cli":
            yield f"{path}:{node.lineno}: prints"
    if (lines := source.count("\n")) > MAX_LINES:
        yield f"{path}: has {lines} lines"
    if path.name == "__init__.py" and not ast.get_docstring(tree):
        yield f"{path}: does not say what the package holds"


def _import_flaws(room: str, name: str) -> Iterator[str]:
    top, _, below = name.partition(".")
    if name == "?":
        yield "imports what only it knows"
    if room in SANS_IO and top in NO_LOOP:
        yield f"the room {room} imports {top}"
    if top != "gproxyd":
        return
    other = below.partition(".")[0]
    if not room:
        yield f"the package itself imports {name}"
    elif other in LEVEL and other != room and LEVEL[other] >= LEVEL.get(room, 0):
        yield f"the room {room} imports {other}, which is not below it"
    elif other and other not in LEVEL and not other.startswith("__version"):
        yield f"imports {name}, which stands on no floor"


def all_files() -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", all_files(), ids=str)
def test_the_house_rules(path: Path) -> None:
    assert list(violations((ROOT / path).read_text(), path)) == []


def test_all_files_are_looked_at() -> None:
    assert len(all_files()) > 30
    assert {room_of(path) for path in all_files()} >= {
        "wire",
        "dialects",
        "config",
        "gateway",
        "daemon",
        "cli",
        "errors",
    }


def test_every_room_is_a_package_with_an_init() -> None:
    folders = {path.parent for path in all_files()}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


PLANTED = [
    ("wire/x.py", "import asyncio\n"),
    ("wire/x.py", "from asyncio import sleep\n"),
    ("wire/x.py", "def f():\n    import aiohttp.web\n"),
    ("dialects/x.py", "from aiohttp import web\n"),
    ("wire/x.py", "import time\n"),
    ("wire/x.py", "from gproxyd.dialects.dialect import DIALECTS\n"),
    ("wire/x.py", "from gproxyd import dialects\n"),
    ("wire/x.py", "from ..dialects import dialect\n"),
    ("wire/x.py", "from .. import dialects\n"),
    ("wire/x.py", "import gproxyd.config.schema as schema\n"),
    ("wire/x.py", "if TYPE_CHECKING:\n    from gproxyd.gateway.call import Call\n"),
    ("errors.py", "from gproxyd.units import parse_size\n"),
    ("config/x.py", "from gproxyd.vendors.catalogue import Vendor\n"),
    ("secrets.py", "import gproxyd.config\n"),
    ("policy/x.py", "from gproxyd.routing import names\n"),
    ("observe/pprof/x.py", "from ...upstream import pool\n"),
    ("gateway/x.py", "from gproxyd.admin import api\n"),
    ("gateway/x.py", "import importlib\nimportlib.import_module('gproxyd.host.demo')\n"),
    ("gateway/x.py", "importlib.import_module(name)\n"),
    ("host/x.py", "from gproxyd.daemon import Daemon\n"),
    ("daemon.py", "from gproxyd.cli import main\n"),
    ("__init__.py", '"""Doc."""\nfrom gproxyd.daemon import Daemon\n'),
    ("attic/x.py", "import os\n"),
    ("gateway/x.py", "from gproxyd.attic import y\n"),
    ("gateway/x.py", "print('x')\n"),
    ("gateway/x.py", "builtins.print('x')\n"),
    ("store/__init__.py", "X = 1\n"),
    ("wire/x.py", "\n" * (MAX_LINES + 1)),
]


@pytest.mark.parametrize(("path", "source"), PLANTED)
def test_a_planted_violation_is_found(path: str, source: str) -> None:
    assert len(list(violations(source, Path(path)))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("wire/x.py", "import re\nfrom gproxyd.errors import WireError\nfrom . import sse\nfrom ..types import Form\n"),
        ("gateway/x.py", "import asyncio\nfrom gproxyd.wire import sse\nfrom gproxyd.gateway.call import Call\n"),
        ("observe/pprof/x.py", "from ...errors import Refusal\nfrom ..journal import Journal\n"),
        ("cli/x.py", "from gproxyd import __version__\nfrom gproxyd.daemon import Daemon\nprint('x')\n"),
        ("__main__.py", "from gproxyd.cli import main\n"),
    ],
)  # fmt: skip
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert list(violations(source, Path(path))) == []
