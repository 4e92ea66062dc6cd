"""What Grafana and Prometheus are told to ask for exists, with that type and those labels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sala_serve.telemetry import METRICS

if "CI" in os.environ:
    import promql_parser
else:
    promql_parser = pytest.importorskip("promql_parser", reason="run make install")

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "helm/dashboards/sala-serve.json").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "helm/alerts/sala-serve.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS_TEST = Path(__file__).parent / "alerts.test.yaml"
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SPECS = {spec.full_name: spec for spec in METRICS}
SUFFIXES = {
    "counter": {"": "counter"},
    "gauge": {"": "gauge"},
    "histogram": {"_bucket": "histogram", "_count": "counter", "_sum": "counter"},
}
SERIES = {
    spec.full_name + suffix: (spec, kind)
    for spec in METRICS
    for suffix, kind in SUFFIXES[spec.kind].items()
}
TARGET_LABELS = {"instance", "job"}
"""Prometheus adds them when it scrapes."""
NOT_SHOWN = {"sala_gateway_tasks"}
"""Metrics that are looked up by hand when something is wrong."""
(_QUESTIONS,) = re.findall(
    r"^```promql\n(.*?)^```$",
    (ROOT / "docs/operations.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
ASKED = dict(re.findall(r"^# (.*)\n(.*)$", _QUESTIONS, re.MULTILINE))
"""On the page for operators."""
EXPRESSIONS = {
    **{f"page {question}": expression for question, expression in ASKED.items()},
    **{f"alert {rule['alert']}": rule["expr"] for rule in RULES},
    **{
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in PANELS
        for target in panel["targets"]
    },
}

_SELECTOR = re.compile(r"(sala_gateway_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"\s*(\w+)\s*(?:=~|!~|!=|=)\s*\"[^\"]*\"\s*")
_BY = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


def plain(expression):
    """Return the expression without Grafana's variables."""
    return expression.replace("$__rate_interval", "5m").replace("$", "")


def problems(expression):
    """Name everything in ``expression`` that the code does not have or that makes no sense."""
    found = []
    text = plain(expression)
    labels = set()
    for name, matchers in _SELECTOR.findall(text):
        if name not in SERIES:
            found.append(f"no metric {name}")
            continue
        spec, kind = SERIES[name]
        known = set(spec.labels) | ({"le"} if name.endswith("_bucket") else set()) | TARGET_LABELS
        labels |= known
        for matcher in filter(str.strip, re.split(r",(?=\s*\w+\s*[=!])", matchers)):
            match = _MATCHER.fullmatch(matcher)
            if match is None or match[1] not in known:
                found.append(f"{name} has no {matcher}")
        has_rate = re.search(rf"(?:rate|increase)\(\s*{name}\b(?:{{[^}}]*}})?\[", text)
        if (kind == "gauge") == bool(has_rate):
            found.append(f"{name} is a {kind}")
        # each gateway says what it sees of the same engines
        if "engine" in spec.labels and re.search(
            rf"sum[^(]*(?:\([^()]*\) *)?\((?:rate\()?{name}", text
        ):
            found.append(f"{name} is summed over gateways")
    for grouping in _BY.findall(text):
        found += [
            f"grouped by {label}" for label in re.findall(r"\w+", grouping) if label not in labels
        ]
    if text.count("(") != text.count(")"):
        found.append("unbalanced")
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_expression_asks_for_what_exists(expression):
    assert _SELECTOR.search(expression)
    assert problems(expression) == []


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_expression_is_promql(expression):
    promql_parser.parse(plain(expression))


@pytest.mark.parametrize(
    "expression", ["sum by (engine (sala_gateway_engine_up)", "rate(sala_gateway_engine_up)"]
)
def test_planted_mistake_is_no_promql(expression):
    with pytest.raises(ValueError, match="expected|unclosed"):
        promql_parser.parse(expression)


CASES = [
    (check["alertname"], bool(check.get("exp_alerts")))
    for case in yaml.safe_load(ALERTS_TEST.read_text(encoding="utf-8"))["tests"]
    for check in case["alert_rule_test"]
]


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent(alert):
    assert {fires for name, fires in CASES if name == alert} == {True, False}


def test_alerts_fire_when_they_should_and_only_then():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH (it comes with prometheus): alerts are NOT played")
    process = subprocess.run(
        [promtool, "test", "rules", ALERTS_TEST], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stdout + process.stderr
    for path in (ROOT / "helm/alerts").glob("*.yaml"):
        subprocess.run([promtool, "check", "rules", path], check=True, timeout=60)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("sala_gateway_engines_up == 0", "no metric sala_gateway_engines_up"),
        ('sala_gateway_engine_up{tier="a"}', "has no tier"),
        ("rate(sala_gateway_engine_up[5m])", "is a gauge"),
        ("sum(sala_gateway_requests_total)", "is a counter"),
        ("sala_gateway_queue_wait_seconds > 1", "no metric sala_gateway_queue_wait_seconds"),
        ("max by (tenant) (sala_gateway_engine_up)", "grouped by tenant"),
        ("max(sala_gateway_engine_up", "unbalanced"),
        ("sum(sala_gateway_engine_kv_tokens)", "summed over gateways"),
        (
            "sum by (engine) (rate(sala_gateway_prefill_tokens_done_total[5m]))",
            "summed over gateways",
        ),
    ],
)
def test_planted_mistake_is_found(expression, problem):
    (found,) = problems(expression)
    assert problem in found


def test_every_metric_is_shown_or_watched():
    asked = {
        SERIES[name][0].full_name
        for where, expression in EXPRESSIONS.items()
        if not where.startswith("page ")
        for name, _ in _SELECTOR.findall(expression)
    }
    assert len(ASKED) * 2 == len(_QUESTIONS.splitlines())
    assert asked | NOT_SHOWN == set(SPECS)
    assert not asked & NOT_SHOWN


def test_codes_and_statuses_in_matchers_are_those_of_the_code():
    from sala_serve import errors

    codes = {getattr(each, "code", None) for each in vars(errors).values()}
    for expression in EXPRESSIONS.values():
        for asked in re.findall(r'code=~?"([^"]*)"', expression):
            assert set(asked.split("|")) <= codes


def test_variables_of_the_dashboard_ask_for_what_exists():
    variables = {
        each["name"]: each["query"]["query"]
        for each in DASHBOARD["templating"]["list"]
        if each["type"] == "query"
    }
    for name, query in variables.items():
        series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
        assert label in SERIES[series][0].labels
        assert label == name
    used = {name for text in EXPRESSIONS.values() for name in re.findall(r"\$(\w+)", text)}
    assert used - {"__rate_interval"} == set(variables)


def test_legends_name_what_their_expression_is_grouped_by():
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            outermost = re.match(r"(?:\w+\(0\.\d+, )?\w+(?: by \(([^)]*)\))? ?\(", expression)
            by = set(re.findall(r"\w+", outermost[1] or "")) - {"le"}
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert named == by, panel["title"]


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_alerts_say_how_bad_they_are_and_what_it_means():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]


def test_every_alert_is_explained():
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(Sala\w+)` \|", page, re.MULTILINE) == [
        rule["alert"] for rule in RULES
    ]
