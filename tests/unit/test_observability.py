"""Names of metrics: what is exported, what the docs say, and what dashboard and alerts ask for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.parts import PARTS
from pipeline.workers.metrics import GAUGES, STEPS, TAGS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "kube" / "observability"
PAGE = (ROOT / "docs" / "observability.md").read_text()
EXPORTED = {f"ray_{name}" for name in (STEPS, *(one.name for one in GAUGES))}


def asked() -> dict[str, str]:
    """Queries of the dashboard and of the alerts, and where each is from."""
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    found = {target["expr"]: panel["title"] for panel in board["panels"] for target in panel.get("targets", [])}
    found |= {variable["query"]["query"]: variable["name"] for variable in board["templating"]["list"][1:]}
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    return found | {rule["expr"]: rule.get("alert", rule.get("record")) for rule in rules}


def test_the_table_of_the_docs_names_what_is_exported_with_its_labels() -> None:
    told = {
        name: set(filter(None, labels.split(",")))
        for name, labels in re.findall(r"^\| `(ray_bct_\w+)(?:\{([\w,]+)\})?` \|", PAGE, re.MULTILINE)
    }
    assert told == {f"ray_{one.name}": set(filter(None, [one.tag])) for one in GAUGES} | {f"ray_{STEPS}": set()}


def test_the_table_of_the_docs_names_the_parts() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \| ", PAGE.split("| part |")[1].split("\n\n")[0], re.MULTILINE)) == PARTS


def test_names_are_as_prometheus_wants_them_and_each_figure_has_one() -> None:
    assert len(EXPORTED) == len(GAUGES) + 1
    assert len({one.figure for one in GAUGES}) == len(GAUGES)
    for one in GAUGES:
        assert not one.name.endswith("_total"), "a gauge is no counter"
        assert one.figure.endswith("/") == bool(one.tag)
        unit = "seconds" if one.figure.startswith(("time", "checkpoint", "report")) else ""
        assert one.name.endswith(unit)
    assert STEPS.endswith("_total")


def test_dashboard_and_alerts_ask_only_for_what_is_exported() -> None:
    queries = asked()
    assert len(queries) > 30
    used: set[str] = set()
    for query, where in queries.items():
        names = set(re.findall(r"\bray_bct_\w+", query))
        assert names <= EXPORTED, where
        used |= names
        parts = [part for listed in re.findall(r'part=~?"([^"]*)"', query) for part in listed.split("|")]
        assert set(parts) <= set(PARTS), where
        own = {one.tag for one in GAUGES if one.tag}
        for grouped in re.findall(r"\bby \(([^)]*)\)", query):
            labels = {label.strip() for label in grouped.split(",")}
            assert labels <= {*TAGS, *own, "instance", "GpuIndex"}, where
    assert used == EXPORTED, "what nobody looks at"


def test_the_docs_name_the_alerts() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    assert re.findall(r"^\| `(Bct\w+)` \|", PAGE, re.MULTILINE) == [one["alert"] for one in rules if "alert" in one]
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one.get("exp_alerts")}
    assert fired == {one["alert"] for one in rules if "alert" in one}, "each is tested"


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((FOLDER / "grafana-dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_the_rule_of_the_operator_is_made_as_the_docs_say() -> None:
    (command,) = re.findall(r"    \((printf .*?)\) \| kubectl", PAGE, re.DOTALL)
    made = subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rule = yaml.safe_load(made)
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == yaml.safe_load((FOLDER / "alerts.yml").read_text())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_takes_the_folder() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {one["metadata"]["name"]: one for one in yaml.safe_load_all(done.stdout)}
    assert made.keys() == {"bct-ray", "bct-grafana-dashboard", "bct-prometheus-alerts"}
    assert json.loads(made["bct-grafana-dashboard"]["data"]["grafana-dashboard.json"])["uid"] == "bct-training"
    assert made["bct-grafana-dashboard"]["metadata"]["labels"]["grafana_dashboard"] == "1"
