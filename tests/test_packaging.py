"""Manual pages and completions: made from the commands and the reference configuration, so that they cannot drift."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gproxyd.cli import _parser
from gproxyd.observe.native import MESSAGE_IDS

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"


def make(script: str, folder: Path) -> Path:
    subprocess.run([sys.executable, PACKAGING / script, folder], check=True, timeout=60, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("manual.py", tmp_path_factory.mktemp("man"))


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("completions.py", tmp_path_factory.mktemp("completions"))


def leaves() -> dict[str, set[str]]:
    """Command -> its long options, walked here by another way than where pages are made: by what `--help` says."""
    found: dict[str, set[str]] = {}
    waiting = [("gproxyd", _parser().format_help())]
    while waiting:
        at, shown = waiting.pop()
        below = re.findall(r"^    ([a-z-]+)(?:\s|$)", shown, re.MULTILINE) if "COMMAND ..." in shown else []
        for name in below:
            told = subprocess.run([sys.executable, "-m", *at.split(), name, "--help"], capture_output=True, text=True)
            waiting.append((f"{at} {name}", told.stdout))
        if not below:
            found[at] = set(re.findall(r"--[a-z-]+", shown.partition("options:")[2])) - {"--help"}
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return leaves()


def plain(page: Path) -> str:
    """A page as it is read."""
    done = subprocess.run(
        ["man", "-l", "-P", "cat", page],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "200", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    return re.sub(".\x08", "", done.stdout).replace("\u2010\n", "")


man = pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")


@man
def test_the_manual_knows_every_command_with_its_options_and_every_event(
    manual: Path, known: dict[str, set[str]]
) -> None:
    page = " ".join(plain(manual / "gproxyd.8").split())
    commands = page.partition(" COMMANDS ")[2].partition(" SIGNALS ")[0]
    assert len(known) > 25
    for command, options in known.items():
        start = re.search(rf"(?:^|[ .]){re.escape(command.removeprefix('gproxyd '))} (?:\[|--|[A-Z])", commands)
        assert start is not None, command
        for option in options:
            assert f"{option} " in commands or f"{option}]" in commands, f"{command} {option}"
    for event, found in MESSAGE_IDS.items():
        assert f"{event} {found}" in page


@man
def test_the_manual_knows_every_key_of_the_configuration(manual: Path) -> None:
    page = plain(manual / "gproxyd.yaml.5")
    told = " ".join(page.split())
    for line in (ROOT / "etc/gproxyd.yaml").read_text().splitlines():
        content = line.removeprefix("#| ").strip()
        if content and not content.startswith("#"):
            head = re.match(r"[\w-]+:$", content)
            assert (content[:-1] if head else content) in told, content
    comment = "How long open streams may run on after the order to stop."
    assert re.search(rf"drain: 10min\n\s+{re.escape(comment)}", page)


@man
@pytest.mark.parametrize("name", ["gproxyd.8", "gproxyd.yaml.5"])
def test_pages_are_sound(manual: Path, name: str) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", manual / name],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "120", "LC_ALL": "C.UTF-8"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    if shutil.which("mandoc"):
        lint = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", manual / name], capture_output=True, text=True)
        assert (lint.returncode, lint.stdout) == (0, "")


@man
def test_nothing_in_a_comment_is_taken_for_a_request(manual: Path) -> None:
    for page in manual.iterdir():
        for line in page.read_text().splitlines():
            assert not line.startswith("'") and "@" not in re.sub(r"gproxyd@|\S+@\S+", "", line), line
            assert re.match(r'\.(\\"|[A-Z][a-zA-Z]|Xo|Xc)', line) or not line.startswith("."), line


# Completions.


def complete(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    script = (
        f'source "{folder}/bash/gproxyd"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); compopt() {{ :; }}\n'
        '_gproxyd; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-euc", script, "bash", "gproxyd", *words], capture_output=True, text=True, timeout=30, cwd="/etc"
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_offers_every_command_and_every_option(completions: Path, known: dict[str, set[str]]) -> None:
    for command, options in known.items():
        *before, last = command.split()[1:]
        assert last in complete(completions, *before, last[:2])
        assert complete(completions, *before, last, "--") >= options | {"--help"}


def test_bash_offers_values_where_there_are_some(completions: Path) -> None:
    assert complete(completions, "users", "add", "x", "--role", "") == {"admin", "user", "read-only"}
    assert complete(completions, "users", "add", "x", "--role", "re") == {"read-only"}
    assert "passwd" in complete(completions, "serve", "--config", "pass")
    assert complete(completions, "users", "add", "--quota", "") == set()


def test_bash_takes_the_name_of_a_user_for_no_command(completions: Path) -> None:
    assert "add" in complete(completions, "keys", "")
    assert complete(completions, "keys", "add", "list", "--so") == {"--socket"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_completion_and_offers_what_bash_does(completions: Path, known: dict[str, set[str]]) -> None:
    subprocess.run(["zsh", "-n", completions / "zsh/_gproxyd"], check=True, timeout=30)
    # What would be offered is taken from the functions that offer it.
    script = (
        '_describe() { print -rl -- "${(@P)2}"; }; _arguments() { print -rl -- "$@"; }\n'
        'words=(gproxyd "$@"); CURRENT=$#words; set --; source ' + str(completions / "zsh/_gproxyd")
    )
    for command, options in known.items():
        *before, last = command.split()[1:]
        shown = [
            subprocess.run(["zsh", "-fc", script, "zsh", *given], capture_output=True, text=True, timeout=30)
            for given in ((*before, ""), (*before, last, ""))
        ]
        assert [one.stderr for one in shown] == ["", ""]
        assert f"{last}:" in shown[0].stdout
        assert set(re.findall(r"--[a-z-]+", shown[1].stdout)) >= options


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_offers_what_bash_does(completions: Path, known: dict[str, set[str]], tmp_path: Path) -> None:
    lines = [f"source {completions}/fish/gproxyd.fish"]
    for command in known:
        before, _, last = command.rpartition(" ")
        lines += [f"echo '== {command}'", f"complete -C '{before} '", f"complete -C '{before} {last} --'"]
    script = tmp_path / "ask.fish"
    script.write_text("\n".join(lines))
    fish = shutil.which("fish") or "fish"
    environ = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([fish, "--no-config", script], capture_output=True, text=True, timeout=60, env=environ)
    assert done.stdout.count("== ") == len(known), done.stderr
    for part in done.stdout.split("== ")[1:]:
        command, _, offered = part.partition("\n")
        words = {line.partition("\t")[0] for line in offered.splitlines()}
        assert words >= known[command] | {command.rpartition(" ")[2]}, command


def test_scripts_of_the_package_are_sound() -> None:
    for path in (PACKAGING / "build-deb", *(PACKAGING / "deb" / name for name in ("postinst", "prerm", "postrm"))):
        assert path.read_text().startswith("#!/bin/sh\n")
        subprocess.run(["sh", "-n", path], check=True)
