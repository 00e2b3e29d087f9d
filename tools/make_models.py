"""Writes gproxyd/vendors/models.yaml from a table of model facts: `python tools/make_models.py TABLE.yaml`.

The table is a mapping vendor -> model -> {mode, context, max_output, usd_per_million, above, flex, priority,
capabilities, deprecated}. What this script does not know stops it, so that nothing of the table is lost unseen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).parent.parent / "gproxyd" / "vendors" / "models.yaml"

HEAD = """\
# What is known of vendors' models: limits in tokens, list prices in US dollars per million tokens, capabilities.
# Compiled from public price tables, November 2026. Figures only; check before relying on one.
#
# One line per model, read by models.py. Its words, those without a value first:
#
#   chat, responses, embedding, ...    what it is called for (always the first word)
#   context=  max_output=              tokens
#   deprecated=                        the day from which the vendor may refuse it
#   usd(input= output= cache_read= cache_write= cache_write_1h= reasoning=)   the standard prices
#   above(tokens= input= ...)          prices once the prompt has more than that many tokens
#   flex(...)  priority(...)           prices of that service tier
#   can(...)                           capabilities
#
# A file made by tools/make_models.py; an edit by hand is fine until it is made anew.
"""

PLAIN = ("context", "max_output", "deprecated")
GROUPS = {"usd_per_million": "usd", "flex": "flex", "priority": "priority"}
KNOWN = {"mode", "above", "capabilities", *PLAIN, *GROUPS}


def group(name: str, values: Mapping[str, Any]) -> str:
    return f"{name}({' '.join(f'{key}={value}' for key, value in values.items())})"


def words(facts: Mapping[str, Any]) -> Iterator[str]:
    if unknown := set(facts) - KNOWN:
        raise SystemExit(f"unknown: {sorted(unknown)}")
    yield facts["mode"]
    yield from (f"{name}={facts[name]}" for name in PLAIN if name in facts)
    yield from (group(short, facts[name]) for name, short in GROUPS.items() if name in facts)
    yield from (group("above", step) for step in facts.get("above", ()))
    if facts.get("capabilities"):
        yield f"can({' '.join(facts['capabilities'])})"


def main(source: str) -> None:
    table = yaml.safe_load(Path(source).read_text("utf-8"))
    lines = [HEAD]
    for vendor, models in table.items():
        lines.append(f"\n{vendor}:\n")
        lines += [f'  "{model}": {" ".join(words(facts))}\n' for model, facts in models.items()]
    TARGET.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
