"""Values: what contradicts itself is refused with what was expected, what the schema allows renders, the rest does not."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CHART = Path(__file__).parents[2] / "helm" / "sala-serve"
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
RENDERED = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def pool(**values):
    return {"engine": {"pools": {"default": values}}}


REFUSED = {
    "gateway's grace is too short": (
        {"gateway": {"terminationGracePeriodSeconds": 3644}},
        r"gateway\.terminationGracePeriodSeconds: expected at least 3645 .* got 3644",
    ),
    "engine's grace is too short": (
        pool(terminationGracePeriodSeconds=600),
        r"engine\.pools\.default\.terminationGracePeriodSeconds: expected at least 3660",
    ),
    "longer request makes a grace too short": (
        {"longestRequestSeconds": 7200, "gateway": {"terminationGracePeriodSeconds": 3645}},
        r"expected at least 7245",
    ),
    "route cuts the longest request": (
        {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "a"}],
                "requestTimeoutSeconds": 60,
            }
        },
        r"httpRoute\.requestTimeoutSeconds: expected 0 or at least",
    ),
    "route without a gateway": ({"httpRoute": {"enabled": True}}, r"httpRoute\.parentRefs"),
    "ingress without a host": ({"ingress": {"enabled": True}}, r"ingress\.host"),
    "deadline beyond the longest request": (
        {"gateway": {"settings": {"deadlines": {"total_s": 7200}}}},
        r"gateway\.settings\.deadlines\.total_s: expected at most",
    ),
    "several gateways without Redis": ({"redis": {"mode": "none"}}, r"gateway\.replicas"),
    "Redis elsewhere without a URL": ({"redis": {"mode": "external"}}, r"redis\.external"),
    "no secret": ({"auth": {"existingSecret": ""}}, r"auth: expected existingSecret"),
    "short secret": (
        {"auth": {"existingSecret": "", "inline": {"adminToken": "short"}}},
        r"inline\.adminToken of 16 characters",
    ),
    "tag latest": ({"gateway": {"image": {"tag": "latest"}}}, r"tag latest"),
    "no pool": ({"engine": {"pools": {"default": None}}}, r"engine\.pools: expected one"),
    "URI without digest": (
        pool(model={"source": "uri", "uri": {"url": "https://a/b.tar"}}),
        r"model\.uri: expected url and sha256",
    ),
    "Hub without commit": (
        pool(model={"source": "hub", "hub": {"repository": "a/b"}}),
        r"model\.hub: expected repository and revision",
    ),
    "GPUs that do not divide": (
        pool(tensorParallelSize=3, multiNode={"nodes": 2}),
        r"cannot be split evenly",
    ),
    "nodes without GPUs": (
        pool(profile="cpu", tensorParallelSize=2, multiNode={"nodes": 2}),
        r"expected profile gpu",
    ),
    "scaled groups": (
        pool(tensorParallelSize=2, multiNode={"nodes": 2}, autoscaling={"type": "keda"}),
        r"are not scaled",
    ),
    "scaling down sooner than the longest request": (
        {"longestRequestSeconds": 7200, **pool(autoscaling={"type": "hpa"})},
        r"held back for 3600 s at most",
    ),
    "least above most": (
        pool(autoscaling={"type": "hpa", "minReplicas": 5}),
        r"minReplicas is above maxReplicas",
    ),
    "two models scaled by one queue": (
        {"engine": {"defaults": {"autoscaling": {"type": "hpa"}}, "pools": {"other": {}}}},
        r"pools of one model only",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradiction_is_refused(chart, case):
    values, message = REFUSED[case]
    with pytest.raises(chart.Refused, match=message):
        chart.render(values)


INVALID = {
    "unknown section": {"gateways": {}},
    "unknown value": {"gateway": {"replica": 3}},
    "unknown value of a pool": pool(models={}),
    "unknown value inside a pool": pool(model={"pvc": {"claim": "a"}}),
    "unknown setting": {"gateway": {"settings": {"server": {"max_body_byte": 1}}}},
    "setting out of range": {"gateway": {"settings": {"limits": {"lease_s": 1}}}},
    "secret among the settings": {"gateway": {"settings": {"admin": {"token": "x" * 20}}}},
    "keys among the settings": {"gateway": {"settings": {"server": {"api_keys": ["a"]}}}},
    "drain among the settings": {"gateway": {"settings": {"server": {"drain_timeout_s": 5}}}},
    "name of a pool": {"engine": {"pools": {"Large_One": {}}}},
    "number for a text": {"redis": {"mode": 1}},
    "text for a number": {"longestRequestSeconds": "3600"},
    "no replicas": {"gateway": {"replicas": 0}},
    "branch for a commit": pool(model={"hub": {"revision": "main"}}),
    "short digest": pool(model={"uri": {"sha256": "abc"}}),
    "another scheme": pool(model={"uri": {"url": "ftp://a/b"}}),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_the_schema_does_not_know_is_refused(case):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(INVALID[case], SCHEMA)


def test_helm_asks_the_same_schema(chart):
    for values in (INVALID["unknown value inside a pool"], INVALID["secret among the settings"]):
        with pytest.raises(chart.Refused, match="additional properties"):
            chart.render(values)


def objects_in(schema):
    """Yield every object schema in ``schema``."""
    if isinstance(schema, dict):
        if "properties" in schema and "object" in schema.get("type", "object"):
            yield schema
        for each in schema.values():
            yield from objects_in(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from objects_in(each)


def test_schema_is_strict_everywhere():
    found = list(objects_in(SCHEMA))
    assert len(found) > 60
    for each in found:
        assert each.get("additionalProperties") is False, list(each["properties"])[:5]


def test_texts_that_look_like_numbers_stay_texts(chart, validate):
    values = {
        "auth": {"existingSecret": "5", "adminTokenKey": "7", "redisPasswordKey": "1e3"},
        "imagePullSecrets": ["12"],
        "commonLabels": {"cost-centre": "42"},
        "gateway": {"priorityClassName": "3", "podAnnotations": {"a": "true"}},
        "ingress": {"enabled": True, "host": "1.5", "className": "8", "tlsSecret": "9"},
        "smokeTest": {"existingSecret": "0x1", "key": "6"},
        "serviceAccount": {"name": "77"},
        "redis": {"internal": {"persistence": {"storageClass": "4"}}},
        **pool(
            servedModelName="1",
            maxModelLen="64000",
            runtimeClassName="2",
            model={"pvc": {"claimName": "10"}},
        ),
    }
    validate(chart.render(values), "1.37")


def test_notes_name_the_next_command(chart):
    arguments = ["install", "mine", str(CHART), "--namespace", "llm", "--dry-run=client"]
    text = chart.run(*arguments)
    _, notes = text.split("NOTES:")
    assert "kubectl create secret generic sala-serve-auth -n llm" in notes
    assert "helm test mine -n llm" in notes
    assert "service/mine-sala-serve-admin 8002:8002" in notes


# values drawn from the schema

FREE_OBJECTS = {
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "topologySpreadConstraints": [],
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraVolumes": [{"name": "extra", "emptyDir": {}}],
    "extraVolumeMounts": [],
    "affinity": {"podAntiAffinity": {}},
    "parentRefs": [{"name": "public"}],
    "clients": [{"podSelector": {}}],
    "admins": [{"namespaceSelector": {}}],
    "scrapers": [],
    "gatewayEgress": [{"ports": [{"port": 443}]}],
    "engineEgress": [],
    "extraObjects": [],
}
"""Kubernetes' own objects are not spelled out in the schema."""
LABELS = {"nodeSelector", "podLabels", "podAnnotations", "labels", "annotations", "commonLabels"}
LEFT_OUT = {"terminationGracePeriodSeconds", "deadlines", "tag", "autoscaling", "multiNode"}
"""What depends on other values; the cases above have it."""


def drawn(schema, name=""):
    """Return a strategy for values of a schema as ``scripts/chart.py`` writes them."""
    if "$ref" in schema:
        return drawn(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], name)
    if name in FREE_OBJECTS:
        return st.sampled_from([FREE_OBJECTS[name], type(FREE_OBJECTS[name])()])
    if name in LABELS:
        return st.dictionaries(st.sampled_from(["team", "app.example.com/part"]), st.just("a-1"))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([drawn(each, name) for each in schema["anyOf"]])
    kinds = schema.get("type", "object")
    match kinds if isinstance(kinds, str) else kinds[0]:
        case "object":
            return drawn_object(schema)
        case "array":
            return st.lists(drawn(schema["items"]), max_size=2)
        case "string":
            pattern = schema.get("pattern", "^[a-z]*$")
            texts = st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True)
            least = schema.get("minLength", 0)
            return texts.filter(lambda text: least <= len(text) <= 40 and "\n" not in text)
        case "integer":
            return st.integers(*bounds(schema))
        case "number":
            return st.integers(*bounds(schema))
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    raise AssertionError(schema)


def bounds(schema):
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    most = schema.get("maximum", schema.get("exclusiveMaximum", least + 1_000))
    return int(least), min(int(most), int(least) + 10_000)


def drawn_object(schema):
    fields = {k: v for k, v in schema.get("properties", {}).items() if k not in LEFT_OUT}

    @st.composite
    def make(draw):
        names = draw(st.sets(st.sampled_from(sorted(fields)), max_size=4)) if fields else ()
        return {name: draw(drawn(fields[name], name)) for name in sorted(names)}

    return make()


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # long values
@RENDERED
@given(values=drawn(SCHEMA))
def test_what_the_schema_allows_renders_and_fits(chart, validate, values):
    jsonschema.validate(values, SCHEMA)
    reason = ""
    try:
        rendered = chart.render(values)
    except chart.Refused as refused:
        rendered, reason = [], str(refused)
    validate(rendered, "1.37")
    # refused only for a reason that is ours and says what to do
    assert rendered or re.search(
        r"(execution error at|error calling fail).*(expected|several gateways|tag)", reason
    )


FREE_KEYS = {"cpu", "memory", "grafana_dashboard"}
"""Under keys that users choose."""


def dictionaries(place):
    if isinstance(place, dict) and place:
        yield place
        for each in place.values():
            yield from dictionaries(each)


@RENDERED
@given(data=st.data())
def test_mutant_of_the_defaults_is_refused(data):
    values = copy.deepcopy(DEFAULTS)
    values["engine"]["pools"]["default"] = {
        "model": {"source": "pvc"},
        "resources": {},
        "drain": {"marginSeconds": 1},
    }
    places = [place for place in dictionaries(values) if not set(place) & FREE_KEYS]
    place = data.draw(st.sampled_from(places[1:]))
    key = data.draw(st.sampled_from(sorted(place)))
    match place[key]:
        case bool() | None:
            place[key] = "yes"
        case str():
            place[key] = {"a": 1}
        case int() | list():
            place[key] = "x y"
        case dict():
            place[key] = [1]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)
