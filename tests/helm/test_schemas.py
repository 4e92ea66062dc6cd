"""Renderings are what Kubernetes' own schemas allow, with and without what a cluster may lack; products are current."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "sala-serve"
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
NEEDS = {
    "monitoring.coreos.com/v1": [
        {"metrics": {"serviceMonitor": {"enabled": True}}},
        {"metrics": {"podMonitor": {"enabled": True}}},
        {"metrics": {"prometheusRule": {"enabled": True}}},
    ],
    "gateway.networking.k8s.io/v1": [
        {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}
    ],
    "keda.sh/v1alpha1": [{"engine": {"defaults": {"autoscaling": {"type": "keda"}}}}],
    "leaderworkerset.x-k8s.io/v1": [
        {"engine": {"defaults": {"tensorParallelSize": 2, "multiNode": {"nodes": 2}}}}
    ],
}


@pytest.fixture(scope="module")
def all_objects(chart):
    """Every object of the defaults and the examples, each once: most are in all of them."""
    files = (None, *sorted((CHART / "examples").glob("*.yaml")))
    return list({json.dumps(each): each for file in files for each in chart.render(file)}.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_defaults_and_examples_fit_the_version(all_objects, validate, version):
    # what is rendered does not depend on the version, so that one rendering is checked for all
    validate(all_objects, version)


def test_rendering_is_the_same_for_every_version(chart):
    first, *_, last = [chart.render(None, kube_version=f"{version}.0") for version in VERSIONS]
    assert first == last


def test_older_cluster_is_refused(chart):
    with pytest.raises(chart.Refused, match=r"incompatible with Kubernetes v1\.32"):
        chart.render(None, kube_version="1.32.0")


def test_planted_mistakes_are_found(chart, validate):
    objects = copy.deepcopy(chart.render(None))
    (deployment,) = [each for each in objects if each["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        validate([deployment], "1.37")


@pytest.mark.parametrize("api", NEEDS)
def test_needed_resource_definition_is_asked_for(chart, validate, api):
    apis = tuple(each for each in NEEDS if each != api)
    for values in NEEDS[api]:
        rendered = chart.render(values, apis=(api,))
        assert [each for each in rendered if each["apiVersion"] == api]
        validate(rendered, VERSIONS[-1])
        with pytest.raises(chart.Refused, match=f"this cluster has no .*{api}"):
            chart.render(values, apis=apis)


def test_defaults_need_no_resource_definition(chart):
    rendered = chart.render(None, apis=("v1",))
    assert not [each for each in rendered if each["apiVersion"] in NEEDS]


def test_helm_lints_it(chart):
    text = chart.run("lint", "--strict", str(CHART))
    assert "0 chart(s) failed" in text


def test_chart_is_packaged_with_alerts_and_dashboards(chart, tmp_path):
    chart.run("package", str(CHART), "--destination", str(tmp_path))
    (archive,) = tmp_path.iterdir()
    listing = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True)
    assert "sala-serve/files/alerts/sala-serve.yaml" in listing.stdout.split()
    assert "sala-serve/files/dashboards/sala-serve.json" in listing.stdout.split()


def test_readme_schema_and_renderings_are_those_of_the_chart(chart, products):
    for path, text in products.products():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run scripts/chart.py"
    rendered = {path.name for path in (CHART / "examples/rendered").iterdir()}
    assert rendered == {path.name for path in (CHART / "examples").glob("*.yaml")}


def test_every_value_is_explained(products):
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    page = products.readme()

    def check(path, value):
        if f"| `{path}` |" in page:
            return
        assert isinstance(value, dict), f"{path} has no comment"
        for key, each in value.items():
            check(f"{path}.{key}" if path else key, each)

    del values["engine"]["pools"]
    check("", values)


def test_chart_and_project_have_one_version():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert meta["appVersion"] == project["version"]
