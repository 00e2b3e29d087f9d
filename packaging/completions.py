"""Writes completions for bash, zsh and fish, made from the commands themselves: completions.py FOLDER

bash/gproxyd  zsh/_gproxyd  fish/gproxyd.fish
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tree import Argument, Command, commands

_BASH = """\
# bash completion for gproxyd; made from its own commands
_gproxyd() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} at=gproxyd words= i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$at ${{COMP_WORDS[i]}}" in
            {paths}) at="$at ${{COMP_WORDS[i]}}" ;;
        esac
    done
    case "$at $prev" in
{values}
    esac
    case $at in
{words}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}}
complete -F _gproxyd gproxyd
"""

_ZSH = """\
#compdef gproxyd
# zsh completion for gproxyd; made from its own commands
_gproxyd() {{
    local at=gproxyd i
    local -i deep=0
    local -a below
    for ((i = 2; i < CURRENT; i++)); do
        case "$at $words[i]" in
            ({paths}) at="$at $words[i]"; deep=i-1 ;;
        esac
    done
    shift $deep words
    (( CURRENT -= deep ))
    case $at in
{cases}
    esac
}}
_gproxyd "$@"
"""

_FISH = """\
# fish completion for gproxyd; made from its own commands
function __gproxyd_at
    set -l at gproxyd
    for word in (commandline -opc)[2..-1]
        if contains -- "$at $word" {paths}
            set at "$at $word"
        end
    end
    test "$at" = "$argv"
end
complete -c gproxyd -f
{lines}
"""


def bash(root: Command) -> str:
    """What follows an option is known by the option; everything else by the command."""
    values, words = [], []
    for command in root.walk():
        at = " ".join(command.path)
        for option in command.options:
            if option.kind != "flag":
                marks = "|".join(shlex.quote(f"{at} {flag}") for flag in option.flags)
                values.append(f"        {marks}) {_bash_value(option)} return ;;")
        offered = [below.path[-1] for below in command.below]
        offered += [flag for option in command.options for flag in option.flags if flag.startswith("--")]
        offered += [choice for place in command.places for choice in place.choices]
        words.append(f"        {shlex.quote(at)}) words={shlex.quote(' '.join(offered))} ;;")
    return _BASH.format(paths="|".join(_paths(root, shlex.quote)), values="\n".join(values), words="\n".join(words))


def _bash_value(option: Argument) -> str:
    if option.kind == "choice":
        return f'mapfile -t COMPREPLY < <(compgen -W {shlex.quote(" ".join(option.choices))} -- "$cur");'
    if option.kind == "file":
        return 'compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$cur");'
    return ""


def zsh(root: Command) -> str:
    cases = []
    for command in root.walk():
        lines = [f"        ({shlex.quote(' '.join(command.path))})"]
        if command.below:
            told = " ".join(shlex.quote(f"{one.path[-1]}:{one.help}") for one in command.below)
            lines += [f"            below=({told})", "            _describe command below"]
        else:
            lines.append("            _arguments \\")
            lines += [f"                {_zsh_argument(one)} \\" for one in command.arguments]
            lines[-1] = lines[-1].removesuffix(" \\")
        cases += [*lines, "            ;;"]
    return _ZSH.format(paths="|".join(_paths(root, shlex.quote)), cases="\n".join(cases))


def _zsh_argument(argument: Argument) -> str:
    choices = " ".join(argument.choices)
    what = f"({choices})" if argument.kind == "choice" else "_files" if argument.kind == "file" else " "
    if not argument.flags:
        return shlex.quote(f"{'*' if argument.many else ''}:{argument.metavar}:{what}")
    about = argument.help.replace("[", r"\[").replace("]", r"\]").replace(":", r"\:")
    value = "" if argument.kind == "flag" else f":{argument.name}:{what}"
    if len(argument.flags) == 1:
        return shlex.quote(f"{'*' if argument.many else ''}{argument.flags[0]}[{about}]{value}")
    flags = " ".join(argument.flags)
    return f"{shlex.quote(f'({flags})')}{{{','.join(argument.flags)}}}{shlex.quote(f'[{about}]{value}')}"


def fish(root: Command) -> str:
    lines = []
    for command in root.walk():
        here = f"complete -c gproxyd -n {shlex.quote('__gproxyd_at ' + ' '.join(command.path))}"
        lines += [f"{here} -a {one.path[-1]} -d {_fish(one.help)}" for one in command.below]
        lines += [f"{here} {_fish_option(one)}" for one in command.options]
        lines += [f"{here} -a {_fish(' '.join(one.choices))}" for one in command.places if one.choices]
    return _FISH.format(paths=" ".join(_paths(root, _fish)), lines="\n".join(lines))


def _fish_option(option: Argument) -> str:
    flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
    value = {"flag": "", "file": " -r -F", "value": " -x"}.get(option.kind)
    if value is None:
        value = f" -x -a {_fish(' '.join(option.choices))}"
    return f"{flags}{value} -d {_fish(option.help)}"


def _fish(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _paths(root: Command, quote: Callable[[str], str]) -> list[str]:
    return [quote(" ".join(command.path)) for command in root.walk() if len(command.path) > 1]


FILES: Mapping[str, Callable[[Command], str]] = {"bash/gproxyd": bash, "zsh/_gproxyd": zsh, "fish/gproxyd.fish": fish}


def main(folder: Path) -> None:
    root = commands()
    for name, write in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(write(root))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
