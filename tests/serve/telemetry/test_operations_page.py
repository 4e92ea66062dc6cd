"""docs/operations.md names metrics, settings, codes, panels, paths and log fields that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sala_serve import errors
from sala_serve.app import build_app
from sala_serve.config import Settings, setting_fields
from sala_serve.gateway import Gateway
from sala_serve.telemetry import METRICS, Phase, RequestRecord, Usage
from sala_serve.telemetry.report import fields_of

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "helm/dashboards/sala-serve.json").read_text(encoding="utf-8"))
CODE = set(re.findall(r"`([^`\n]+)`", PAGE))
"""Everything between backticks."""
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def block(language, word):
    (found,) = [text for kind, text in BLOCKS if kind == language and word in text]
    return found


def test_metrics_are_those_of_the_code():
    known = {spec.full_name for spec in METRICS}
    suffixed = {name + suffix for name in known for suffix in ("_bucket", "_count", "_sum")}
    named = set(re.findall(r"sala_gateway_\w+", PAGE))
    assert len(named) > 8
    assert named <= known | suffixed
    (short,) = re.findall(r"grep -E '_\(([^)]*)\)", PAGE)
    assert {f"sala_gateway_{name}" for name in short.split("|")} <= known


def test_settings_are_those_of_the_code():
    known = {".".join(path) for path, _ in setting_fields()}
    sections = {path[0] for path, _ in setting_fields()}
    named = {
        text
        for text in CODE
        if (match := re.fullmatch(r"(\w+)\.(\w+)", text)) and match[1] in sections
    }
    assert len(named) >= 6
    assert named <= known
    for section, field in re.findall(r"SALA_SERVE_([A-Z]+)__(\w+)", PAGE):
        assert f"{section}.{field}".lower() in known


def test_codes_are_those_of_the_code():
    known = {getattr(each, "code", None) for each in vars(errors).values()}
    table = PAGE[PAGE.index("| what is seen") : PAGE.index("## What to watch")]
    first_cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    named = {code for cell in first_cells for code in re.findall(r"`([a-z_]+)`", cell)}
    assert len(named) >= 9
    assert named <= known


def test_panels_are_those_of_the_dashboard():
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    named = {
        name
        for names in re.findall(r"[Pp]anels? ((?:\"[^\"]+\"(?: and )?)+)", PAGE)
        for name in re.findall(r'"([^"]+)"', names)
    }
    assert named == {"Prefix cache", "Prefill speed", "Between tokens"}
    assert named <= titles


def test_paths_are_those_of_the_gateway_and_its_admin_port():
    from sala_serve.api.admin import build_admin_app

    gateway = Gateway.create(Settings(admin={"token": "an-admin-token-of-24-chars"}))
    known = {
        route.path for app in (build_app(gateway), build_admin_app(gateway)) for route in app.routes
    }
    named = set(
        re.findall(
            r"(?:\$GATEWAY|\$ADMIN|`(?:GET |POST |PATCH )?)(/(?:admin/v1/|readyz|healthz|metrics)[\w/{}]*)",
            PAGE,
        )
    )
    assert {"/readyz", "/healthz", "/metrics", "/admin/v1/scheduler"} <= named
    assert named <= known


def record():
    record = RequestRecord("r-1", "/v1/chat/completions", started_at_s=0.0, clock=lambda: 2.0)
    record.tenant_id, record.key_id, record.tier, record.engine_id = "acme", "k7", "gold", "a"
    record.status, record.usage = 200, Usage(100, 20, 5)
    for phase in Phase:
        record.enter(phase)
    record.token()
    record.finish()
    return record


def test_line_of_the_log_has_the_fields_of_the_code():
    (line,) = re.findall(r"^.* INFO sala_serve\.request (.*)$", PAGE, re.MULTILINE)
    names = re.findall(r"(\w+)=", line)
    head = ["request_id", "endpoint", "status"]
    assert [*head, *names] == list(fields_of(record(), 2.0))


def test_question_to_the_log_is_answered():
    script = block("sh", "jq")
    slow, fast = record(), record()
    fast.request_id, slow.ttft_s, fast.ttft_s = "r-2", 60.0, 0.5
    lines = [json.dumps({"message": "request"} | fields_of(each, 2.0)) for each in (fast, slow)]
    lines.insert(1, "engine | not JSON")
    jq = shutil.which("jq")
    if jq is None:
        pytest.skip("no jq on PATH: the page's question to the log is NOT tried")
    (filter_,) = re.findall(r"jq -rRs '([^']*)'", script)
    answer = subprocess.run(
        [jq, "-rRs", filter_],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    rows = [row.split("\t") for row in answer.stdout.splitlines()]
    assert [(row[0], row[-1]) for row in rows] == [("r-1", "60"), ("r-2", "0.5")]


def test_configuration_of_prometheus_is_one(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH: the page's configuration is NOT checked")
    (tmp_path / "prometheus.yml").write_text(block("yaml", "scrape_configs"))
    shutil.copy(ROOT / "helm/alerts/sala-serve.yaml", tmp_path)
    command = [promtool, "check", "config", tmp_path / "prometheus.yml"]
    subprocess.run(command, check=True, timeout=30, capture_output=True)
