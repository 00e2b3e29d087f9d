"""Dashboard and alerts: everything that they ask for is told by /metrics, under the labels that they name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gproxyd.observe.lag import LoopLag
from gproxyd.observe.metrics import Exporter
from gproxyd.observe.stats import Stats
from tests.test_metrics import busy

ETC = Path(__file__).parent.parent / "etc"
RULES = ETC / "prometheus" / "gproxyd.rules.yml"
DASHBOARD = ETC / "grafana" / "gproxyd.json"

GIVEN = {"instance", "job"}
"""Labels that Prometheus adds."""

_SELECTOR = re.compile(r"\b(?P<name>(?:gproxyd|process|python|gen_ai)_[a-z_]+)(?:\{(?P<labels>[^}]*)\})?")

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed"
)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def panels() -> Iterator[dict[str, Any]]:
    return (panel for panel in dashboard()["panels"] if panel["type"] != "row")


def plain(expression: str) -> str:
    """A panel's expression as Prometheus gets it."""
    return re.sub(r"\$(instance|provider|model)\b", ".*", expression.replace("$__rate_interval", "5m"))


EXPRESSIONS = [(rule["alert"], rule["expr"]) for rule in rules()]
EXPRESSIONS += [
    (f"{panel['title']} {target['refId']}", plain(target["expr"])) for panel in panels() for target in panel["targets"]
]
QUERIES = [one["definition"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]


def told() -> dict[str, set[str]]:
    """Name of every sample that /metrics can tell -> its labels."""
    names: dict[str, set[str]] = {}
    for stats, lag in (busy(), (Stats(), LoopLag())):
        for family in text_string_to_metric_families(Exporter(stats, lag).render().decode()):
            endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            for ending in endings:
                names.setdefault(family.name + ending, set())
            for sample in family.samples:
                names[sample.name] = names.get(sample.name, set()) | set(sample.labels)
    return names


TOLD = told()


@pytest.mark.parametrize(("where", "expression"), [*EXPRESSIONS, *(("variable", query) for query in QUERIES)])
def test_every_metric_and_label_exists(where: str, expression: str) -> None:
    asked = list(_SELECTOR.finditer(expression))
    assert asked or "up{" in expression
    available = set(GIVEN)
    for found in asked:
        assert found["name"] in TOLD, f"{where}: /metrics does not tell {found['name']}"
        available |= TOLD[found["name"]]
        for label in re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", found["labels"] or ""):
            assert label in TOLD[found["name"]] | GIVEN, f"{where}: {found['name']} has no label {label}"
    for group in re.findall(r"by \(([^)]*)\)", expression):
        for label in filter(None, re.split(r"[,\s]+", group)):
            assert label in available, f"{where}: nothing there has a label {label}"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_how_bad_that_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    kept = re.findall(r"sum by \(([^)]*)\)", rule["expr"])
    asked = [TOLD[found["name"]] for found in _SELECTOR.finditer(rule["expr"])]
    for label in re.findall(r"\$labels\.([a-z_]+)", json.dumps(rule["annotations"])):
        there = [set(re.split(r"[,\s]+", group)) for group in kept] or [labels | GIVEN for labels in asked] or [GIVEN]
        assert all(label in labels for labels in there), label


def test_the_dashboard_is_whole() -> None:
    shown = dashboard()
    ids = [panel["id"] for panel in shown["panels"]]
    assert len(ids) == len(set(ids)) > 20
    variables = {one["name"] for one in shown["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)\b", DASHBOARD.read_text())) <= variables
    taken: set[tuple[int, int]] = set()
    for panel in shown["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells


@promtool
def test_promtool_takes_the_rules_and_their_tests_pass() -> None:
    for command in (["check", "rules", RULES.name], ["test", "rules", "gproxyd.rules.test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    recorded = [{"record": f"x:{number}", "expr": expression} for number, (_, expression) in enumerate(EXPRESSIONS)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(EXPRESSIONS)} rules found" in done.stdout
